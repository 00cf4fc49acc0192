"""setuptools' commands for an extension that may fail to build: see setup.py."""

import contextlib
import copy
import importlib.util
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


# Convolutions from CUTLASS: which of TORCH_CUDA_ARCH_LIST's architectures a source serves, and what it is compiled for.
CUTLASS_SOURCES = {"conv_sm80": ({"8.0", "8.6", "8.9"}, "8.0"), "conv_sm90": ({"9.0", "9.0a"}, "9.0a")}
CUTLASS_FLAGS = [
    *NVCC_FLAGS,
    "-DNDEBUG",
    "--expt-relaxed-constexpr",
    "-Xcompiler=-fPIC",
    "-Werror=cross-execution-space-call",
]


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


def cutlass_home():
    """The folder with CUTLASS's `include` and `tools`, of the package nvidia-cutlass or of $CUTLASS_PATH, or None."""
    if named := os.environ.get("CUTLASS_PATH"):
        homes = [Path(named)]
    else:
        spec = importlib.util.find_spec("cutlass_library")
        homes = [Path(folder) / "source" for folder in (spec.submodule_search_locations if spec else None) or ()]
    return next((home for home in homes if (home / "include" / "cutlass" / "cutlass.h").exists()), None)


def no_cutlass(names):
    """Why no convolutions are to be built from CUTLASS for the architectures `names`, or None."""
    wanted = os.environ.get("FUSED_RESNET_CUTLASS") or "0"
    if wanted not in ("0", "1"):
        raise RuntimeError(f"FUSED_RESNET_CUTLASS must be 0 or 1, not {wanted!r}")
    if wanted == "0":
        return "FUSED_RESNET_CUTLASS=1 was not set"
    if cutlass_home() is None:
        return "CUTLASS's headers were not found: pip install --no-deps nvidia-cutlass, or set CUTLASS_PATH"
    if not cutlass_sources(names):
        return f"they are for 8.0, 8.6, 8.9 and 9.0a, and TORCH_CUDA_ARCH_LIST is {names}"
    return None


def cutlass_sources(names):
    """Those of CUTLASS_SOURCES that serve one of the architectures `names`."""
    listed = {name.removesuffix("+PTX") for name in re.split(r"[\s;,]+", names.strip())}
    return [source for source, (served, _) in CUTLASS_SOURCES.items() if served & listed]


def cutlass_version():
    """ "4.2.0", say."""
    text = (cutlass_home() / "include" / "cutlass" / "version.h").read_text()
    return ".".join(re.search(rf"define CUTLASS_{part} (\d+)", text)[1] for part in ("MAJOR", "MINOR", "PATCH"))


def compile_once(command):
    """Runs `nvcc ... -c SOURCE -o OBJECT` where its result is not there yet; what it took is written beside it."""
    source, compiled = Path(command[-3]), Path(command[-1])
    record = compiled.with_suffix(".json")
    there = compiled.exists() and record.exists() and compiled.stat().st_mtime > source.stat().st_mtime
    if there and json.loads(record.read_text())["command"] == command:
        return
    print(*command, flush=True)
    _, status, usage = os.wait4(subprocess.Popen(command).pid, 0)
    if status:
        raise RuntimeError(f"nvcc failed on {source.name}")
    cost = {"seconds": usage.ru_utime + usage.ru_stime, "mebibytes": usage.ru_maxrss / 1024}  # of the largest process
    record.write_text(json.dumps({"command": command, **cost}))


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
        self.info |= {"cuda": None, "no_cuda": None, "cutlass": None, "no_cutlass": None}
        super().run()
        package.mkdir(parents=True, exist_ok=True)
        (package / "_build_info.json").write_text(json.dumps(self.info, indent=2) + "\n")
        if is_set("FUSED_RESNET_REQUIRE_EXT") and not self.info["built"]:
            reason = self.info["reason"]
            raise RuntimeError(f"FUSED_RESNET_REQUIRE_EXT is set, and the extension was not built: {reason}")
        if os.environ.get("FUSED_RESNET_CUTLASS") == "1" and not self.info["cutlass"]:
            reason = self.info["no_cutlass"] or self.info["no_cuda"] or self.info["reason"]
            raise RuntimeError(f"FUSED_RESNET_CUTLASS=1 is set, and its convolutions were not built: {reason}")
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
        home, names = nvcc_home(), os.environ.get("TORCH_CUDA_ARCH_LIST") or ARCHITECTURES
        self.info["no_cutlass"] = no_cutlass(names)
        if os.environ.get("FUSED_RESNET_CUTLASS") == "1" and (
            reason := self.info["no_cutlass"] or self.info["no_cuda"]
        ):
            raise RuntimeError(reason)  # before anything is compiled
        if self.info["no_cuda"]:
            return False
        before = copy.deepcopy(vars(extension))
        sources = sorted(path.name for path in Path(ROOT, "csrc", "cuda").glob("*.cu"))
        extension.sources += [f"csrc/cuda/{name}" for name in sources if not name.startswith("conv")]
        extension.extra_compile_args["nvcc"] += architecture_flags(names)
        extension.library_dirs += [str(home / "lib64")]
        extension.libraries += ["cudart_static", "rt", "dl", "pthread"]
        cpp_extension.CUDA_HOME = str(home)
        self.forget_stale_objects()
        try:
            if self.info["no_cutlass"] is None:
                extension.extra_objects += self.compile_cutlass(home, names)
            super().build_extensions()
        except Exception as error:
            self.info["no_cuda"] = self.reason(log, error)
            vars(extension).update(before)
            return False
        self.info["cuda"] = f"{nvcc_version(home)}, for {names}"
        if self.info["no_cutlass"] is None:
            compiled = [CUTLASS_SOURCES[source][1] for source in cutlass_sources(names)]
            self.info["cutlass"] = f"{cutlass_version()}, for {' '.join(compiled)}"
        return True

    def compile_cutlass(self, home, names):
        """The objects of csrc/cuda/conv*.cu, each for its own architecture; one at a time, for the memory's sake."""
        sources, cutlass = cutlass_sources(names), cutlass_home()
        own = {source: architecture_flags(CUTLASS_SOURCES[source][1]) for source in sources}
        targets = [flag for flag in self.extensions[0].extra_compile_args["nvcc"] if flag.startswith("-D")]
        own["conv"] = [*own[sources[0]], *targets, *(f"-DFR_{source.upper()}" for source in sources)]
        folders = [
            *cpp_extension.include_paths(),
            str(cutlass / "include"),
            str(cutlass / "tools" / "util" / "include"),
        ]
        common = [str(home / "bin" / "nvcc"), *CUTLASS_FLAGS, *(f"-isystem={folder}" for folder in folders)]
        folder = Path(self.build_temp, "csrc", "cuda")
        folder.mkdir(parents=True, exist_ok=True)
        objects = [str(folder / f"{name}.o") for name in own]
        for name, compiled in zip(own, objects, strict=True):
            compile_once([*common, *own[name], "-c", f"{ROOT}/csrc/cuda/{name}.cu", "-o", compiled])
        return objects

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
