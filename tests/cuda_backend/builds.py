"""Builds what the tests here need from csrc, with ninja, under build/: only what changed is compiled again."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).parent
TORCH = Path(torch.__file__).parent
CXX = os.environ.get("CXX", "c++")
NINJA = shutil.which("ninja", path=f"{sysconfig.get_path('scripts')}{os.pathsep}{os.environ['PATH']}")
FLAGS = "-std=c++17 -O1 -fPIC -fvisibility=hidden -ffp-contract=off -Wall -Werror -Wno-unknown-pragmas"
INCLUDES = f"-iquote {ROOT / 'csrc'} -I{HERE} -isystem {TORCH / 'include'}"
KERNELS = sorted(path for path in (ROOT / "csrc" / "cuda").glob("*.cu") if path.stem != "driver")


def missing() -> str | None:
    """Why nothing can be built here."""
    if shutil.which(CXX.split()[0]) is None:
        return "no C++ compiler on this machine"
    if NINJA is None:
        return "no ninja on this machine"
    return None if sys.platform == "linux" else "the extension is built on Linux alone"


def build(name: str, sources: list[Path], flags: str, libraries: str = "") -> Path:
    """One shared library of `sources`, build/tests/<name>.so."""
    folder = ROOT / "build" / "tests" / name
    folder.mkdir(parents=True, exist_ok=True)
    lines = [
        "rule compile",
        f"  command = {CXX} -x c++ {FLAGS} {INCLUDES} {flags} -MD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = {CXX} -shared {flags} $in -o $out {libraries}",
        *(f"build {source.stem}.o: compile {source}" for source in sources),
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
    if not sanitizer:
        return build("emulated", KERNELS, flags, libraries)
    return build(f"emulated_{sanitizer}", KERNELS, f"{flags} -fsanitize={sanitizer} -g1", libraries)


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


def internals() -> Path:
    """csrc/math.h and csrc/cuda/plan.h as a Python module."""
    import pybind11

    includes = f"-isystem {pybind11.get_include()} -isystem {sysconfig.get_path('include')}"
    return build("internals", [HERE / "internals.cpp"], includes)
