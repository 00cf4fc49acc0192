"""The wheel with the CUDA kernels for every architecture: what is in it, and that it loads beside a CPU build of torch.

Run by `make cuda-check`, which makes the wheel first and runs test_abi.py with it, under other versions of torch.
"""

from __future__ import annotations

import json
import os
import re
import runpy
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests" / "cuda_backend"))

import builds  # noqa: E402
import cubins  # noqa: E402

COMMANDS = runpy.run_path(str(ROOT / "csrc" / "build_commands.py"))
NAMES = (os.environ.get("TORCH_CUDA_ARCH_LIST") or COMMANDS["ARCHITECTURES"]).split()
# Loaded from the unpacked wheel: the kernels are registered, and cannot run, for a reason that says what is missing.
PROBE = """
import json, fused_resnet, torch
from fused_resnet.backends import cpp
has = lambda op: torch._C._dispatch_has_kernel_for_dispatch_key(f"fused_resnet_cpp::{op}", "CUDA")
report = {"cpu": cpp.unavailable("cpu"), "cuda": cpp.unavailable("cuda"), "folder": fused_resnet.__path__[0]}
report["registered"] = [op for op in ("bn_act_backward", "add_relu_forward", "second_moments") if has(op)]
try:
    torch.ops.fused_resnet_cpp.cuda_check()
except RuntimeError as error:
    report["check"] = str(error)
print(json.dumps(report))
"""


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The unpacked wheel."""
    (wheel,) = (ROOT / "dist").glob("*.whl")
    folder = tmp_path_factory.mktemp("wheel")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


@pytest.fixture(scope="module")
def library(package: Path) -> Path:
    return package / "fused_resnet" / "_C.abi3.so"


def test_code_for_every_architecture(library: Path) -> None:
    found = cubins.kernels(library)
    assert set(found) == {f"sm_{name.partition('+')[0].replace('.', '')}" for name in NAMES}
    names = {frozenset(kernel.name for kernel in kernels) for kernels in found.values()}
    assert len(names) == 1, "a kernel is missing for an architecture"
    print(
        f"\n{len(next(iter(names)))} kernels for {len(found)} architectures, {library.stat().st_size / 2**20:.1f} MiB"
    )
    listing = subprocess.check_output([str(cubins.tool("cuobjdump")), "--list-ptx", str(library)], text=True)
    wanted = {f"sm_{name.removesuffix('+PTX').replace('.', '')}" for name in NAMES if name.endswith("+PTX")}
    assert set(re.findall(r"\.(sm_\w+)\.ptx", listing)) == wanted


def test_no_stack_and_no_spills(library: Path) -> None:
    assert not cubins.faults(library)


def test_it_loads_beside_this_torch(package: Path) -> None:
    command = [sys.executable, "-c", PROBE]
    output = subprocess.check_output(command, text=True, cwd=package, env=os.environ | {"PYTHONPATH": str(package)})
    report = json.loads(output.splitlines()[-1])
    assert Path(report["folder"]) == package / "fused_resnet"
    assert report["cpu"] is None
    assert len(report["registered"]) == 3
    if report["cuda"] is not None:  # no GPU here
        assert report["cuda"] == "no GPU is available" or "cannot run" in report["cuda"]
        assert re.search(r"driver is too old|no kernel can be loaded", report["check"])


def test_no_access_outside_a_tensor() -> None:
    """The emulated kernels under the address sanitizer: each of torch's allocations has guarded edges then."""
    tests = str(builds.HERE / "emulated_kernels.py")
    done = builds.run_emulated(tests, "-k", "(any_grid and 7) or second_moments", sanitizer="address")
    assert done.returncode == 0, done.stdout[-10000:] + done.stderr[-10000:]
    assert " passed" in done.stdout
