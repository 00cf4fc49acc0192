"""setuptools' commands for an extension that may fail to build: see setup.py."""

import contextlib
import copy
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
ARCHITECTURES = "8.0 8.6 8.9 9.0a 10.0 12.0+PTX"
NVCC_FLAGS = [
    "-O3",
    "-std=c++17",
    "-fmad=false",
    "-Xcompiler=-fvisibility=hidden",
]  # sums and products rounded as on a CPU


def is_set(name):
    return os.environ.get(name, "0") not in ("", "0")


def nvcc_home():
    """The folder of a CUDA toolkit with compiler and static runtime, or None."""
    named = [os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH")]
    on_path = [Path(nvcc).resolve().parents[1] for nvcc in (shutil.which("nvcc"),) if nvcc]
    for home in map(Path, filter(None, [*named, *on_path, "/usr/local/cuda"])):
        if (home / "bin" / "nvcc").exists() and (home / "lib64" / "libcudart_static.a").exists():
            return home
    return None


def nvcc_version(home):
    """ "13.0", say."""
    text = subprocess.check_output([str(home / "bin" / "nvcc"), "--version"], text=True)
    return re.search(r"release ([\d.]+)", text)[1]


def no_cuda():
    """Why no CUDA kernels are to be built, or None."""
    wanted, home = os.environ.get("FUSED_RESNET_CUDA") or "auto", nvcc_home()
    if wanted not in ("auto", "0", "1"):
        raise RuntimeError(f"FUSED_RESNET_CUDA must be auto, 0 or 1, not {wanted!r}")
    if wanted == "0":
        return "FUSED_RESNET_CUDA=0 was set"
    version = cpp_extension.torch.version.cuda
    if wanted == "auto" and version is None:
        return "torch was a CPU build when this was built (FUSED_RESNET_CUDA=1 builds them all the same)"
    if home is None:
        return "no CUDA toolkit (nvcc and libcudart_static.a) was found when this was built"
    if wanted == "auto" and nvcc_version(home).partition(".")[0] != version.partition(".")[0]:
        return f"nvcc was of CUDA {nvcc_version(home)}, torch of {version}"
    return None


def architecture_flags(names):
    """nvcc's flags for names such as 9.0a and 12.0+PTX."""
    flags = []
    for name in re.split(r"[\s;,]+", names.strip()):
        digits, ptx = re.fullmatch(r"(\d+\.\d+[af]?)(\+PTX)?", name).groups()
        number = digits.replace(".", "")
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if ptx:
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


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
        flags = list(self.extensions[0].extra_compile_args["cxx"])
        self.info = {"built": False, "reason": None, "torch": None, "compiler": None, "flags": flags}
        self.info |= {"cuda": None, "no_cuda": None}
        super().run()
        package.mkdir(parents=True, exist_ok=True)
        (package / "_build_info.json").write_text(json.dumps(self.info, indent=2) + "\n")
        if is_set("FUSED_RESNET_REQUIRE_EXT") and not self.info["built"]:
            reason = self.info["reason"]
            raise RuntimeError(f"FUSED_RESNET_REQUIRE_EXT is set, and the extension was not built: {reason}")
        if os.environ.get("FUSED_RESNET_CUDA") == "1" and not self.info["cuda"]:
            reason = self.info["no_cuda"] or self.info["reason"]
            raise RuntimeError(f"FUSED_RESNET_CUDA=1 is set, and the CUDA kernels were not built: {reason}")

    def build_extensions(self):
        with tempfile.TemporaryFile() as log:
            try:
                self.build_or_raise(log)
                self.info["built"] = True
            except Exception as error:  # switched off, no torch, no compiler, or a source that does not compile
                self.info["reason"] = self.reason(log, error)
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
            if self.with_cuda(log):
                return
            super().build_extensions()

    def with_cuda(self, log):
        """Builds the extension with the CUDA kernels where that is wanted and possible; tells whether it did."""
        (extension,) = self.extensions
        self.info["no_cuda"] = no_cuda()
        if self.info["no_cuda"]:
            return False
        home, names = nvcc_home(), os.environ.get("TORCH_CUDA_ARCH_LIST") or ARCHITECTURES
        before = copy.deepcopy(vars(extension))
        extension.sources += sorted(f"csrc/cuda/{path.name}" for path in Path(ROOT, "csrc", "cuda").glob("*.cu"))
        extension.extra_compile_args["nvcc"] += architecture_flags(names)
        extension.library_dirs += [str(home / "lib64")]
        extension.libraries += ["cudart_static", "rt", "dl", "pthread"]
        cpp_extension.CUDA_HOME = str(home)
        self.forget_stale_objects()
        try:
            super().build_extensions()
        except Exception as error:
            self.info["no_cuda"] = self.reason(log, error)
            vars(extension).update(before)
            return False
        self.info["cuda"] = f"{nvcc_version(home)}, for {names}"
        return True

    def forget_stale_objects(self):
        """Beside a CPU build of torch nobody tells ninja which headers a CUDA source includes."""
        newest = max(path.stat().st_mtime for path in Path(ROOT, "csrc").rglob("*.h"))
        for compiled in Path(self.build_temp, "csrc", "cuda").glob("*.o"):
            if compiled.stat().st_mtime < newest:
                compiled.unlink()

    @staticmethod
    def reason(log, error):
        log.seek(0)
        lines = log.read().decode(errors="replace").splitlines()
        errors = [line for line in lines if re.search(r"\berror:|not found|No such file", line)]
        reason = "\n".join(list(dict.fromkeys(errors))[:5] or [str(error)])
        return reason.replace(f"{ROOT}/", "")[:1000]


class BdistWheel(bdist_wheel):
    """Tags the wheel by what was built, and puts nothing of an earlier build into it."""

    def run_command(self, command):
        if command == "build":
            shutil.rmtree(self.get_finalized_command("build").build_lib, ignore_errors=True)
        super().run_command(command)
        self.root_is_pure = not self.distribution.has_ext_modules()
