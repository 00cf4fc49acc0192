"""setuptools' commands for an extension that may fail to build: see setup.py."""

import contextlib
import json
import os
import re
import shutil
import site
import subprocess
import sys
import tempfile
from pathlib import Path

from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

# pip's build isolation hides the environment's own torch. At the end: the isolated setuptools stays the one in use.
sys.path += site.getsitepackages()
if sys.base_prefix in site.PREFIXES:  # not in a venv, or in one with system site packages
    sys.path.append(site.getusersitepackages())
try:
    from torch.utils import cpp_extension
except Exception as error:
    cpp_extension, no_torch = None, f"torch could not be imported when this was built: {error}"

ROOT = Path(__file__).resolve().parents[1]


def is_set(name):
    return os.environ.get(name, "0") not in ("", "0")


@contextlib.contextmanager
def printed_to(log):
    """What this process and its compilers print goes into the file `log`."""
    saved = os.dup(1), os.dup(2)
    for number in (1, 2):
        os.dup2(log.fileno(), number)
    try:
        yield
    finally:
        sys.stdout.flush()
        for number, stream in enumerate(saved, 1):
            os.dup2(stream, number)
            os.close(stream)


class BuildExt(cpp_extension.BuildExtension if cpp_extension else build_ext):
    """What cannot be built leaves a pure Python package instead of a failed install."""

    def finalize_options(self):
        super().finalize_options()
        self.build_temp = str(ROOT / "build" / "objects")  # kept, so that ninja rebuilds only what changed

    def run(self):
        package = (ROOT if self.inplace else Path(self.build_lib)) / "fused_resnet"
        for stale in package.glob("_C*.so"):
            stale.unlink()
        flags = list(self.extensions[0].extra_compile_args)
        self.info = {"built": False, "reason": None, "torch": None, "compiler": None, "flags": flags, "cuda": None}
        super().run()
        package.mkdir(parents=True, exist_ok=True)
        (package / "_build_info.json").write_text(json.dumps(self.info, indent=2) + "\n")
        if is_set("FUSED_RESNET_REQUIRE_EXT") and not self.info["built"]:
            reason = self.info["reason"]
            raise RuntimeError(f"FUSED_RESNET_REQUIRE_EXT is set, and the extension was not built: {reason}")

    def build_extensions(self):
        with tempfile.TemporaryFile() as log:
            try:
                self.build_or_raise(log)
                self.info["built"] = True
            except Exception as error:  # switched off, no torch, no compiler, or a source that does not compile
                log.seek(0)
                lines = log.read().decode(errors="replace").splitlines()
                errors = [line for line in lines if re.search(r"\berror:|not found|No such file", line)]
                reason = "\n".join(list(dict.fromkeys(errors))[:5] or [str(error)])
                self.info["reason"] = reason.replace(f"{ROOT}/", "")[:1000]
                self.extensions = self.distribution.ext_modules = []
            log.seek(0)
            os.write(1, log.read() + f"fused_resnet._C: {self.info!a}\n".encode())

    def build_or_raise(self, log):
        if is_set("FUSED_RESNET_NO_EXT"):
            raise RuntimeError("FUSED_RESNET_NO_EXT was set")
        if not cpp_extension:
            raise RuntimeError(no_torch)
        self.info["torch"] = str(cpp_extension.torch.__version__)
        with printed_to(log):
            version = subprocess.check_output([cpp_extension.get_cxx_compiler(), "--version"], text=True)
            self.info["compiler"] = version.splitlines()[0]
            super().build_extensions()


class BdistWheel(bdist_wheel):
    """Tags the wheel by what was built, and puts nothing of an earlier build into it."""

    def run_command(self, command):
        if command == "build":
            shutil.rmtree(self.get_finalized_command("build").build_lib, ignore_errors=True)
        super().run_command(command)
        self.root_is_pure = not self.distribution.has_ext_modules()
