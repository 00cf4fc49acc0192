"""Compiles kernels for GPUs that are not here, and checks what the compiler made of them. One target per process.

python aot.py --target sm_90 --suite add_relu [--suite ...] [--full] [--quiet] [--json FILE]
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib
import json
import re
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

sys.path[:0] = [str(folder) for folder in list(Path(__file__).parents)[:3]]

from fused_resnet.backends.triton import configs, runtime  # noqa: E402

TARGETS = ("sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "gfx942")
TENSOR_CORE = {"sm_80": "mma.sync", "sm_86": "mma.sync", "sm_90": "wgmma.mma_async", "sm_100": "tcgen05.mma"}
TENSOR_CORE |= {"sm_120": "mma.sync", "gfx942": "v_mfma"}


@dataclass
class Case:
    """One call to compile.

    Args:
        name: unique in its suite; names the rows of the table and the record.
        call: runs the primitive on CPU tensors (`torch.empty` is enough). Every launch inside is compiled.
        configs: kernel name -> config, instead of what `configs.pick` says.
        vector: kernels that must load from global memory 128 bits at a time, on NVIDIA.
        dot: kernels that must use the tensor cores.
        tma: kernels that must be launched, and load by TMA.
        only: kernels to look at; None for all that `call` launches.
    """

    name: str
    call: Callable[[], Any]
    configs: dict[str, configs.Config] = field(default_factory=dict)
    vector: tuple[str, ...] = ()
    dot: tuple[str, ...] = ()
    tma: tuple[str, ...] = ()
    only: tuple[str, ...] | None = None


def install_driver(arch: str) -> None:
    """Make triton compile for `arch` without a device."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.backends.driver import DriverBase

    target = GPUTarget("hip", arch, 64) if arch.startswith("gfx") else GPUTarget("cuda", int(arch[3:]), 32)

    class Driver(DriverBase):
        def is_active(self):
            return True

        def map_python_to_cpp_type(self, ty):
            raise NotImplementedError

        def get_current_target(self):
            return target

        def get_active_torch_device(self):
            return torch.device("cpu")

        def get_benchmarker(self):
            raise NotImplementedError

        def get_current_device(self):
            return 0

        def get_current_stream(self, device):
            return 0

    triton.runtime.driver.set_active(Driver())
    configs.assume(arch)


def tool(name: str) -> str:
    import triton

    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


def _run(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


# Bytes of stack that a kernel may have. Triton 3.6 spills a few words in 4 of 1,600 kernels, 3.7 in 6 that share an
# inner axis on sm_120: ptxas stays below 72 or 96 registers there, so that one more block fits.
STACK = 48 if version("triton").startswith("3.6.") else 16


def measure(compiled: Any, arch: str, sass: bool) -> dict[str, Any]:
    """Registers, shared memory, stack and spills of a compiled kernel, and its global loads of 128 bits.

    `sass` asks for the loads of the machine code instead of those of the PTX: the same, but it takes a second.
    """
    row: dict[str, Any] = {"shared": compiled.metadata.shared}
    if arch.startswith("gfx"):
        text = compiled.asm["amdgcn"]
        numbers = {key: int(value) for key, value in re.findall(r"\.(\w+):\s+(\d+)", text)}
        wide = len(re.findall(r"\b(?:global|buffer)_load_dwordx4", text))
        row |= {
            "registers": numbers["vgpr_count"],
            "stack": 0,
            "spills": numbers["vgpr_spill_count"],
            "wide_loads": wide,
        }
        return row
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _run(tool("cuobjdump"), "--dump-resource-usage", file.name)
        code = _run(tool("cuobjdump"), "-sass", file.name) if sass else ""
    numbers = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    if sass:  # LDGSTS copies straight to shared memory; Blackwell can load 256 bits
        wide = len(re.findall(r"\bLDG(?:STS)?\.E(?:\.\w+)*\.(?:128|256)", code))
    else:
        wide = len(
            re.findall(r"ld\.global\S*\.(?:v4\.b32|v2\.b64|v8\.b32|v4\.b64)|cp\.async\S* .*, 0x10", compiled.asm["ptx"])
        )
    stack = numbers["STACK"] + numbers["LOCAL"]
    return row | {
        "registers": numbers["REG"],
        "stack": stack,
        "spills": len(re.findall(r"\bSTL\b", code)),
        "wide_loads": wide,
    }


def problems(row: dict[str, Any], compiled: Any, arch: str, vector: bool, dot: bool, tma: bool) -> list[str]:
    found = []
    if row["shared"] > configs.TARGETS[arch].shared:
        found.append(f"{row['shared']} bytes of shared memory, {configs.TARGETS[arch].shared} at most")
    if row["stack"] > STACK or row["spills"]:
        found.append(f"stack {row['stack']}, spills {row['spills']}")
    nvidia = not arch.startswith("gfx")
    text = compiled.asm["ptx" if nvidia else "amdgcn"]
    if re.search(r"\b(?:atom|red)\.|_atomic_", text):
        found.append("atomics")
    if vector and nvidia and not row["wide_loads"]:
        found.append("no 128-bit loads")
    if tma and "cp.async.bulk.tensor" not in text:
        found.append("no cp.async.bulk.tensor")
    if dot:
        if TENSOR_CORE[arch] not in text:
            found.append(f"no {TENSOR_CORE[arch]}")
        if arch == "sm_90" and "C7511" in ptxas_messages(compiled, arch):
            found.append("ptxas warning C7511: wgmma instructions are serialised")
    return found


def ptxas_messages(compiled: Any, arch: str) -> str:
    """What ptxas says about a kernel when asked to be verbose."""
    with tempfile.NamedTemporaryFile(suffix=".ptx", mode="w") as file:
        file.write(compiled.asm["ptx"])
        file.flush()
        suffix = re.search(r"\.target (sm_\w+)", compiled.asm["ptx"])
        command = [
            tool("ptxas"),
            "-v",
            f"--gpu-name={suffix.group(1) if suffix else arch}",
            file.name,
            "-o",
            "/dev/null",
        ]
        return subprocess.run(command, capture_output=True, text=True, check=False).stderr


def compile_cases(cases: list[Case], arch: str, sass: bool) -> list[dict[str, Any]]:
    """One row per distinct kernel compiled: case, kernel, config, what `measure` found, and `problems`."""
    rows: list[dict[str, Any]] = []
    seen: set[int] = set()
    launched: set[str] = set()
    for case in cases:
        launched.clear()

        def launcher(kernel: Any, grid: tuple[int, ...], *args: Any, case: Case = case, **meta: Any) -> None:
            name = kernel.__name__
            launched.add(name)
            if case.only is not None and name not in case.only:
                return
            row = {"case": case.name, "kernel": name, "config": meta}
            try:
                compiled = kernel.warmup(*args, grid=grid, **meta)
            except Exception as error:
                rows.append(row | {"problems": [f"does not compile: {type(error).__name__}: {error}"[:2000]]})
                return
            if id(compiled) in seen:
                return
            seen.add(id(compiled))
            target = compiled.metadata.target
            assert str(target.arch) in (arch, arch[3:]), f"compiled for {target}, not {arch}"
            row |= measure(compiled, arch, sass and name in case.vector)
            asked = (name in kernels for kernels in (case.vector, case.dot, case.tma))
            row["problems"] = problems(row, compiled, arch, *asked)
            rows.append(row)

        before, runtime.launcher = runtime.launcher, launcher
        try:
            with contextlib.ExitStack() as stack:
                for kernel, config in case.configs.items():
                    stack.enter_context(configs.override(kernel, config))
                case.call()
        finally:
            runtime.launcher = before
        for name in set(case.tma) - launched:
            rows.append({"case": case.name, "kernel": name, "config": {}, "problems": ["it was not launched"]})
    return rows


@functools.cache
def cases_of(suite: str, full: bool) -> list[Case]:
    cases = list(importlib.import_module(f"aot_{suite}").cases(full))
    assert len({case.name for case in cases}) == len(cases), f"{suite}: names of cases repeat"
    return cases


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--target", required=True, choices=TARGETS)
    parser.add_argument("--suite", action="append", required=True)
    parser.add_argument("--full", action="store_true")
    parser.add_argument("--quiet", action="store_true", help="print problems only")
    parser.add_argument("--json")
    options = parser.parse_args()
    warnings.filterwarnings("ignore", category=UserWarning)
    install_driver(options.target)
    report = {
        suite: compile_cases(cases_of(suite, options.full), options.target, not options.full) for suite in options.suite
    }
    rows = [row for suite in report.values() for row in suite]
    if options.json:
        Path(options.json).write_text(json.dumps(report))
    for row in rows:
        if options.quiet and not row["problems"]:
            continue
        config = " ".join(f"{key}={value}" for key, value in row["config"].items())
        numbers = " ".join(f"{k}={row[k]}" for k in ("registers", "shared", "wide_loads") if k in row)
        print(f"{options.target} {row['case']} {row['kernel']} {config}: {numbers}", *row["problems"], sep="  ")
    return 1 if any(row["problems"] for row in rows) else 0


if __name__ == "__main__":
    raise SystemExit(main())
