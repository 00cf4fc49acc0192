"""Builds the extension `fused_resnet._C` where it can; where it cannot, a pure Python package and the reason.

FUSED_RESNET_NO_EXT=1       builds no extension
FUSED_RESNET_REQUIRE_EXT=1  makes the whole build fail where the extension cannot be built

The metadata stands in pyproject.toml. What happened is recorded in `fused_resnet/_build_info.json`.
"""

import contextlib
import importlib
import json
import os
import re
import shutil
import site
import subprocess
import sys
import sysconfig
import tempfile
from glob import glob
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
SOURCES = sorted(glob("csrc/*.cpp", root_dir=ROOT) + glob("csrc/cpu/*.cpp", root_dir=ROOT))
HEADERS = sorted(glob("csrc/**/*.h", root_dir=ROOT, recursive=True))
FLAGS = ["-O3", "-g0", "-std=c++17", "-fvisibility=hidden", "-ffp-contract=off"]
# The oldest torch (2.11) and the oldest Python (3.10) that can load the result.
FLAGS += ["-DTORCH_TARGET_VERSION=0x020b000000000000", "-DPy_LIMITED_API=0x030A0000"]


def is_set(name):
    return os.environ.get(name, "0") not in ("", "0")


def find_torch():
    """torch.utils.cpp_extension, or None and the reason. pip's build isolation hides the environment's own torch."""
    sees_base = sys.base_prefix in site.PREFIXES  # not in a venv, or in one with system site packages
    own = site.getsitepackages() + ([site.getusersitepackages()] if sees_base else [])
    for paths in ([], own):
        sys.path += paths  # at the end: the isolated setuptools stays the one in use
        try:
            return importlib.import_module("torch.utils.cpp_extension"), None
        except Exception as error:
            reason = f"torch could not be imported when this was built: {error}"
    return None, reason


@contextlib.contextmanager
def captured_output():
    """Yields a list; at the end it holds the lines that this process and its compilers printed."""
    lines, streams = [], (sys.stdout, sys.stderr)
    with tempfile.TemporaryFile() as log:
        saved = [os.dup(1), os.dup(2)]
        try:
            for number, stream in enumerate(streams, 1):
                stream.flush()
                os.dup2(log.fileno(), number)
            yield lines
        finally:
            for number, stream in enumerate(streams, 1):
                stream.flush()
                os.dup2(saved[number - 1], number)
                os.close(saved[number - 1])
            log.seek(0)
            data = log.read()
            lines += data.decode(errors="replace").splitlines()
            with open(1, "wb", closefd=False) as stdout:
                stdout.write(data)


cpp_extension, no_torch = find_torch()
Base = cpp_extension.BuildExtension if cpp_extension else build_ext
os.environ["PATH"] += os.pathsep + sysconfig.get_path("scripts")  # where the environment's ninja is, activated or not


class BuildExt(Base):
    """What cannot be built leaves a pure Python package instead of a failed install."""

    reason = None

    def finalize_options(self):
        super().finalize_options()
        self.build_temp = str(ROOT / "build" / "objects")  # kept, so that ninja rebuilds only what changed

    def run(self):
        package = (ROOT if self.inplace else Path(self.build_lib).resolve()) / "fused_resnet"
        for stale in package.glob("_C*.so"):
            stale.unlink()
        super().run()
        info = {"built": self.reason is None, "reason": self.reason, **self.environment()}
        package.mkdir(parents=True, exist_ok=True)
        (package / "_build_info.json").write_text(json.dumps(info, indent=2) + "\n")
        if self.reason and is_set("FUSED_RESNET_REQUIRE_EXT"):
            raise RuntimeError(f"FUSED_RESNET_REQUIRE_EXT is set, and the extension was not built: {self.reason}")

    def build_extensions(self):
        self.reason = "FUSED_RESNET_NO_EXT was set" if is_set("FUSED_RESNET_NO_EXT") else no_torch
        try:
            if not self.reason:
                with captured_output() as output:
                    super().build_extensions()
        except Exception as error:  # no compiler, or a source that does not compile
            errors = [line for line in output if re.search(r"\berror:|not found|No such file", line)]
            self.reason = "\n".join(list(dict.fromkeys(errors))[:5] or [str(error)]).replace(f"{ROOT}/", "")[:1000]
        if self.reason:
            print(f"fused_resnet: no extension: {self.reason!a}")
            self.extensions = self.distribution.ext_modules = []

    @staticmethod
    def environment():
        compiler = None
        with contextlib.suppress(Exception):
            command = [cpp_extension.get_cxx_compiler(), "--version"]
            compiler = subprocess.check_output(command, text=True).splitlines()[0]
        torch = cpp_extension and str(cpp_extension.torch.__version__)
        return {"torch": torch, "compiler": compiler, "flags": FLAGS, "cuda": None}


class BdistWheel(bdist_wheel):
    """Tags the wheel by what was built, and puts nothing of an earlier build into it."""

    def run(self):
        shutil.rmtree(self.get_finalized_command("build").build_lib, ignore_errors=True)
        super().run()

    def run_command(self, command):
        super().run_command(command)
        if command == "build":
            self.root_is_pure = not self.distribution.has_ext_modules()


make_extension = cpp_extension.CppExtension if cpp_extension else Extension
setup(
    packages=[*find_packages(include=["fused_resnet", "fused_resnet.*"]), "fused_resnet.benchmarks"],
    package_dir={"fused_resnet.benchmarks": "benchmarks"},
    ext_modules=[
        make_extension(
            "fused_resnet._C",
            SOURCES,
            include_dirs=[str(ROOT / "csrc")],
            depends=HEADERS,
            extra_compile_args=FLAGS,
            py_limited_api=True,
        )
    ],
    cmdclass={"build_ext": BuildExt, "bdist_wheel": BdistWheel},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
