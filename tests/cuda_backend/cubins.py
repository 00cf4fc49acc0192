"""Looks into compiled CUDA code: registers, stack, shared memory and instructions of each kernel."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

SHARED = 48 * 1024  # bytes that every GPU gives a block without being asked


class Kernel(NamedTuple):
    """What a kernel takes, and the accesses of 16 bytes in its code."""

    name: str
    registers: int
    stack: int
    shared: int
    local: int


def tool(name: str) -> str | None:
    """One of the CUDA toolkit's tools, from the toolkit itself or from triton."""
    try:
        import triton

        bundled = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    except ImportError:
        bundled = None
    found = shutil.which(name) or shutil.which(name, path="/usr/local/cuda/bin")
    return found or (str(bundled) if bundled and bundled.exists() else None)


def _output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def kernels(binary: Path) -> dict[str, list[Kernel]]:
    """Architecture -> kernels of a cubin or a shared library."""
    text = _output(str(tool("cuobjdump")), "--dump-resource-usage", str(binary))
    found: dict[str, list[Kernel]] = {}
    architecture = ""
    pattern = r"arch = (\w+)|Function (\S+):\s+(REG:\d+ .*)"
    for named, function, usage in re.findall(pattern, text):
        if named:
            architecture = named
            continue
        numbers = dict(re.findall(r"(\w+):(\d+)", usage))
        sizes = (int(numbers[key]) for key in ("REG", "STACK", "SHARED", "LOCAL"))
        found.setdefault(architecture, []).append(Kernel(function, *sizes))
    return found


def faults(binary: Path) -> list[str]:
    """Kernels that spill registers, use a stack or too much shared memory; empty where all is well."""
    found = kernels(binary)
    assert found, f"no kernels in {binary}"
    return [
        f"{architecture}: {kernel}"
        for architecture, inside in found.items()
        for kernel in inside
        if kernel.stack or kernel.local or kernel.shared > SHARED or kernel.registers > 255
    ]


def instructions(binary: Path, kernel: str, architecture: str | None = None) -> list[str]:
    """The instructions, in order, of the kernels in whose (mangled) name the pattern is found."""
    which = ("--gpu-architecture", architecture) if architecture else ()
    text = _output(str(tool("cuobjdump")), "-sass", *which, str(binary))
    parts = re.split(r"Function : (\S+)", text)
    code = [body for name, body in zip(parts[1::2], parts[2::2], strict=True) if re.search(kernel, name)]
    assert code, f"no kernel {kernel} in {binary}"
    return re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?(\S+)", "".join(code))
