"""Fresh virtual environments for the install tests. What is done to them is printed: `make test-install` shows it."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, field
from importlib.metadata import distribution, distributions
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[2]
COMPILERS = ("c++", "g++", "gcc", "cc", "as", "ld")
# Run outside the checkout: what was installed, and whether its kernels are there and right.
PROBE = """
import json, pathlib, fused_resnet, torch
package = pathlib.Path(fused_resnet.__file__).parent
has_kernel = lambda: torch._C._dispatch_has_kernel_for_dispatch_key("fused_resnet_cpp::add_relu_forward", "CPU")
report = {
    "package": str(package),
    "torch": torch.__version__,
    "library": [path.name for path in package.glob("_C*")],
    "info": json.loads((package / "_build_info.json").read_text()),
}
x, residual = torch.randn(2, 2, 8, 5, 5)
with fused_resnet.use_backend("reference"):
    expected = fused_resnet.ops.add_relu(x, residual)
try:
    with fused_resnet.use_backend("cpp"):
        report["correct"] = bool((fused_resnet.ops.add_relu(x, residual) == expected).all())
except fused_resnet.BackendUnavailableError as error:
    report["refused"] = str(error)
report["registered"] = has_kernel()
print(json.dumps(report))
"""


def copy_checkout(target: Path) -> Path:
    """The files that git knows or would take up, so that a build leaves the checkout alone."""
    listing = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    for name in subprocess.check_output(listing, text=True).split("\0"):
        if name and (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name)
    return target


def path_without(folder: Path, *missing: str) -> str:
    """A PATH with nothing but a compiler and ninja in it, less what is named."""
    folder.mkdir(exist_ok=True)
    for tool in {*COMPILERS, "ninja", "git"} - set(missing):
        if found := shutil.which(tool):
            (folder / tool).symlink_to(found)
    return str(folder)


def link_packages(target: Path, *names: str) -> None:
    """Links installed packages, and what they require, from this environment into the folder `target`."""
    wanted, done = list(names), set()
    installed = {d.metadata["Name"].lower().replace("_", "-") for d in distributions()}
    while wanted:
        name = wanted.pop().lower().replace("_", "-")
        if name in done or name not in installed:
            continue
        done.add(name)
        for requirement in map(Requirement, distribution(name).requires or []):
            if not requirement.marker or requirement.marker.evaluate({"extra": ""}):
                wanted.append(requirement.name)
        origin = Path(str(distribution(name).locate_file("")))
        for top in {file.parts[0] for file in distribution(name).files or []} - {"..", "__pycache__"}:
            if not (target / top).exists():
                (target / top).symlink_to(origin / top)


@dataclass
class Environment:
    """A fresh environment: Python and pip, and nothing else until it is linked or installed."""

    folder: Path
    variables: dict[str, str] = field(default_factory=dict)
    flags: tuple[str, ...] = ()
    interpreter: str = sys.executable

    def __post_init__(self) -> None:
        subprocess.run([self.interpreter, "-m", "venv", *self.flags, str(self.folder)], check=True)
        self.python = self.folder / "bin" / "python"
        (self.site_packages,) = self.folder.glob("lib/python*/site-packages")

    def link(self, *names: str) -> Environment:
        print(f"\n  {', '.join(names)} is there already", end="")
        if "setuptools" in names:
            for old in self.site_packages.glob("setuptools*"):  # the copy that Python 3.11 and older bundle
                shutil.rmtree(old)
        link_packages(self.site_packages, *names)
        return self

    def run(self, *command: str, cwd: Path | None = None, succeeds: bool = True, **variables: str) -> str:
        """Runs `python ...` and returns what it printed."""
        settings = {**self.variables, **variables}
        shown = " ".join([*(f"{k}={v}" for k, v in variables.items()), "python", *map(shlex.quote, command)])
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(("FUSED_RESNET_", "PYTHON"))}
        start = time.perf_counter()
        done = subprocess.run(
            [str(self.python), *command],
            cwd=cwd or self.folder,
            env={**inherited, "PYTHONWARNINGS": "ignore", **settings},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        if command[0] == "-m":
            print(f"\n  {shown}  -> {done.returncode}, {time.perf_counter() - start:.0f} s", end="", flush=True)
        assert (done.returncode == 0) == succeeds, f"{shown}\n{done.stdout}"
        return done.stdout

    def pip_install(self, *arguments: str, cwd: Path | None = None, succeeds: bool = True, **variables: str) -> str:
        return self.run("-m", "pip", "install", *arguments, cwd=cwd, succeeds=succeeds, **variables)

    def probe(self) -> dict:
        """What PROBE reports, from outside the checkout."""
        report = json.loads(self.run("-c", PROBE).splitlines()[-1])
        info = report["info"]
        made = info["reason"] or info["compiler"]
        print(f"\n  built: {info['built']}; {made}; torch {report['torch']}", end="", flush=True)
        return report


def assert_built(report: dict) -> None:
    info = report["info"]
    assert report["library"] == ["_C.abi3.so"], report
    assert (info["built"], info["reason"]) == (True, None), report
    assert all(info[key] for key in ("torch", "compiler", "flags")), report
    assert (report["registered"], report["correct"]) == (True, True), report


def assert_pure(report: dict, reason: str) -> None:
    """No extension, the reason on record, and an explicit request refused with that reason."""
    info = report["info"]
    assert report["library"] == [], report
    assert (info["built"], report["registered"]) == (False, False), report
    assert reason in info["reason"], report
    assert info["reason"] in report["refused"], report
