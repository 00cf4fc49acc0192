"""Builds what the tests here need from csrc, with ninja, under build/: only what changed is compiled again."""

from __future__ import annotations

import importlib.util
import os
import runpy
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import ModuleType

import torch

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).parent
TORCH = Path(torch.__file__).parent
COMMANDS = runpy.run_path(str(ROOT / "csrc" / "build_commands.py"))
CXX = os.environ.get("CXX", "c++")
NINJA = shutil.which("ninja", path=f"{sysconfig.get_path('scripts')}{os.pathsep}{os.environ['PATH']}")
FLAGS = "-std=c++17 -O1 -fPIC -fvisibility=hidden -ffp-contract=off -Wall -Werror -Wno-unknown-pragmas"
INCLUDES = f"-iquote {ROOT / 'csrc'} -I{HERE} -isystem {TORCH / 'include'}"
CUDA = ROOT / "csrc" / "cuda"
KERNELS = sorted(path for path in CUDA.glob("*.cu") if path.stem != "driver" and not path.stem.startswith("conv"))


def missing() -> str | None:
    """Why nothing can be built here."""
    if shutil.which(CXX.split()[0]) is None:
        return "no C++ compiler on this machine"
    if NINJA is None:
        return "no ninja on this machine"
    return None if sys.platform == "linux" else "the extension is built on Linux alone"


def build(name: str, sources: list[Path], flags: str, libraries: str = "", own: dict[str, str] | None = None) -> Path:
    """One shared library of `sources`, build/tests/<name>.so; `own`: stem -> further flags of a source."""
    folder = ROOT / "build" / "tests" / name
    folder.mkdir(parents=True, exist_ok=True)
    lines = [
        "rule compile",
        f"  command = {CXX} -x c++ {FLAGS} {INCLUDES} {flags} $own -MD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = {CXX} -shared {flags} $in -o $out {libraries}",
        *(f"build {source.stem}.o: compile {source}\n  own = {(own or {}).get(source.stem, '')}" for source in sources),
        f"build {name}.so: link {' '.join(f'{source.stem}.o' for source in sources)}",
    ]
    (folder / "build.ninja").write_text("\n".join(lines) + "\n")
    done = subprocess.run([str(NINJA), "-C", str(folder)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / f"{name}.so"


def emulated(sanitizer: str = os.environ.get("EMULATED_SANITIZER", "")) -> Path:
    """The kernels of csrc/cuda on the CPU, see emulated.h. `sanitizer`: "address", in a process that preloads it."""
    flags = "-DFUSED_RESNET_EMULATED -DTORCH_TARGET_VERSION=0x020b000000000000"
    flags += (
        " -fsanitize=alignment -fsanitize-undefined-trap-on-error"  # a GPU faults on unaligned vectors, a CPU does not
    )
    libraries = f"-L{TORCH / 'lib'} -ltorch -ltorch_cpu -lc10"
    sources, own = [*KERNELS, CUDA / "conv.cu", HERE / "emulated_conv.cpp"], {"conv": "-DFR_CONV_SM90"}
    if no_cutlass() is None:
        sources.append(CUDA / "conv_sm80.cu")
        own["conv"] += " -DFR_CONV_SM80"
        own["conv_sm80"] = f"-I{HERE / 'emulated_cutlass'} {cutlass_flags()}"
    if not sanitizer:
        return build("emulated", sources, flags, libraries, own)
    return build(f"emulated_{sanitizer}", sources, f"{flags} -fsanitize={sanitizer} -g1", libraries, own)


def run_emulated(*arguments: str, sanitizer: str = "") -> subprocess.CompletedProcess[str]:
    """pytest with the plugin emulation.py, in a process of its own: the tests of `cpp` call the emulated kernels."""
    emulated(sanitizer)
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
    environment = inherited | {"PYTHONPATH": str(HERE), "OMP_NUM_THREADS": "1", "EMULATED_SANITIZER": sanitizer}
    if sanitizer:
        runtime = subprocess.check_output([*CXX.split(), "-print-file-name=libasan.so"], text=True).strip()
        environment |= {"LD_PRELOAD": runtime, "ASAN_OPTIONS": "detect_leaks=0,detect_stack_use_after_return=0"}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "emulation",
        "-p",
        "no:cacheprovider",
        "--tb=short",
        *arguments,
    ]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, check=False)


CUTLASS = COMMANDS["cutlass_home"]()


def no_cutlass() -> str | None:
    """Why nothing of CUTLASS can be compiled for the CPU."""
    if CUTLASS is None:
        return "CUTLASS's headers are not installed (nvidia-cutlass)"
    return missing() if COMMANDS["nvcc_home"]() else "no CUDA toolkit on this machine"


def cutlass_flags() -> str:
    """To compile its headers, and the toolkit's, for the CPU."""
    toolkit = COMMANDS["nvcc_home"]() / "include"
    folders = (CUTLASS / "include", CUTLASS / "tools" / "util" / "include", toolkit, toolkit / "cccl")
    return f"-DNDEBUG -w -fpermissive {' '.join(f'-isystem {folder}' for folder in folders)}"


def module(name: str, flags: str = "") -> ModuleType:
    """A Python module of name.cpp beside this file."""
    import pybind11

    python = " ".join(f"-isystem {folder}" for folder in (pybind11.get_include(), sysconfig.get_path("include")))
    library = build(name, [HERE / f"{name}.cpp"], f"{python} {flags}")
    spec = importlib.util.spec_from_file_location(name, library)
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded
