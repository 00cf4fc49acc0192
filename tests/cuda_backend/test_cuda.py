"""The CUDA kernels without a GPU: emulated on the CPU, and their code, compiled by nvcc and looked into."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from pathlib import Path

import builds
import cubins
import pytest

from fused_resnet.backends import cpp

COMMANDS = runpy.run_path(str(builds.ROOT / "csrc" / "build_commands.py"))
NVCC_HOME = COMMANDS["nvcc_home"]()
EMULATED = ("test_bn_act.py", "test_bn_act_pool.py", "test_add_relu.py", "cuda_backend/emulated_kernels.py")
# Each element once, 16 bytes at a time.
WIDE = {
    "bn_act": ("apply_kernel", "backward_reduce_kernel", "backward_apply_kernel"),
    "batch_norm": ("statistics_kernel",),
}


@pytest.mark.skipif(builds.missing() is not None, reason=builds.missing() or "")
@pytest.mark.skipif(cpp.unavailable("cpu") is not None, reason="the extension was not built")
@pytest.mark.xdist_group("csrc")
def test_the_emulated_kernels_pass_the_tests_of_the_cpp_backend():
    """In a process of its own, where `cpp` calls them; see emulation.py, also to run or debug one of the tests."""
    environment = os.environ | {"PYTHONPATH": str(builds.HERE), "OMP_NUM_THREADS": "1"}
    environment = {key: value for key, value in environment.items() if not key.startswith("PYTEST_")}
    tests = [str(builds.ROOT / "tests" / name) for name in EMULATED]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "emulation", "-p", "no:cacheprovider", "--tb=short", *tests]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=builds.ROOT, check=False)
    assert done.returncode == 0, done.stdout[-20000:] + done.stderr
    assert " passed" in done.stdout


@pytest.mark.skipif(NVCC_HOME is None, reason="no CUDA toolkit on this machine")
@pytest.mark.parametrize("source", sorted(builds.KERNELS), ids=lambda path: path.stem)
def test_the_kernels_compile(source: Path, tmp_path: Path) -> None:
    """For one architecture, without a warning; no stack, no spilled registers, accesses of 16 bytes."""
    cubin = tmp_path / f"{source.stem}.cubin"
    flags = [*COMMANDS["NVCC_FLAGS"], "-arch=sm_90a", "--expt-relaxed-constexpr", "-Werror", "all-warnings"]
    flags += ["-isystem", str(builds.TORCH / "include"), "-DTORCH_TARGET_VERSION=0x020b000000000000"]
    command = [str(NVCC_HOME / "bin" / "nvcc"), *flags, "-cubin", "-o", str(cubin), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    if cubins.tool("cuobjdump") is None:
        pytest.skip("compiled, but there is no cuobjdump to look into the code")
    assert not cubins.faults(cubin)
    for kernel in WIDE.get(source.stem, ()):
        found = cubins.instructions(cubin, rf"{kernel}.*(?:Li8ELb|fLi4ELb)")
        assert any(i.startswith("LDG.E.128") for i in found), kernel
        assert not any(i.startswith("LDG.E.U16") for i in found), kernel
        if kernel.endswith("apply_kernel"):
            assert any(i.startswith("STG.E.128") for i in found), kernel
