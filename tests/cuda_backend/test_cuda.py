"""The CUDA kernels without a GPU: emulated on the CPU, and their code, compiled by nvcc and looked into."""

from __future__ import annotations

import math
import runpy
import subprocess
from pathlib import Path
from types import SimpleNamespace

import builds
import cubins
import pytest
import torch

from fused_resnet import dispatch
from fused_resnet.backends import cpp, selfcheck, triton

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
    done = builds.run_emulated(*(str(builds.ROOT / "tests" / name) for name in EMULATED))
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


# What is built, and what is said where the kernels cannot be used


@pytest.mark.parametrize(
    ("wanted", "torch_cuda", "nvcc", "reason"),
    [
        (None, None, "13.0", "torch was a CPU build"),
        (None, "13.0", "13.2", None),
        ("auto", "12.8", "13.0", "nvcc was of CUDA 13.0, torch of 12.8"),
        ("auto", "13.0", None, "no CUDA toolkit"),
        ("1", None, "13.0", None),
        ("1", "12.8", "13.0", None),
        ("1", "13.0", None, "no CUDA toolkit"),
        ("0", "13.0", "13.0", "FUSED_RESNET_CUDA=0 was set"),
    ],
)
def test_when_cuda_kernels_are_built(wanted, torch_cuda, nvcc, reason, monkeypatch):
    no_cuda = COMMANDS["no_cuda"]
    monkeypatch.delenv("FUSED_RESNET_CUDA", raising=False)
    if wanted:
        monkeypatch.setenv("FUSED_RESNET_CUDA", wanted)
    monkeypatch.setattr(torch.version, "cuda", torch_cuda)
    monkeypatch.setitem(no_cuda.__globals__, "nvcc_home", lambda: nvcc and Path("toolkit"))
    monkeypatch.setitem(no_cuda.__globals__, "nvcc_version", lambda home: nvcc)
    found = no_cuda()
    assert found is None if reason is None else reason in found


def test_another_word_than_auto_0_and_1_is_refused(monkeypatch):
    monkeypatch.setenv("FUSED_RESNET_CUDA", "yes")
    with pytest.raises(RuntimeError, match="FUSED_RESNET_CUDA must be auto, 0 or 1, not 'yes'"):
        COMMANDS["no_cuda"]()


def test_architectures():
    assert COMMANDS["architecture_flags"]("8.0;9.0a 12.0+PTX") == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_90a,code=sm_90a",
        "-gencode=arch=compute_120,code=sm_120",
        "-gencode=arch=compute_120,code=compute_120",
    ]


@pytest.fixture
def on_a_gpu_machine(monkeypatch):
    """As far as `unavailable` looks, with kernels that can run."""
    monkeypatch.setattr(cpp, "_load", lambda: None)
    monkeypatch.setattr(torch._C, "_dispatch_has_kernel_for_dispatch_key", lambda name, key: True)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    ops = SimpleNamespace(cuda_check=SimpleNamespace(default=lambda: None), conv_available=cpp._ops.conv_available)
    monkeypatch.setattr(cpp, "_ops", ops)
    cpp._cuda_unavailable.cache_clear()
    yield
    cpp._cuda_unavailable.cache_clear()


def test_why_the_kernels_cannot_be_used(on_a_gpu_machine, monkeypatch):
    def reason() -> str | None:
        cpp._cuda_unavailable.cache_clear()
        return cpp.unavailable("cuda")

    def too_old() -> None:
        raise RuntimeError("cuda_check, src/csrc/cuda/driver.cu:19, the NVIDIA driver is too old: it is for CUDA 12.4")

    assert reason() is None
    monkeypatch.setattr(cpp._ops.cuda_check, "default", too_old)
    assert reason() == "its CUDA kernels cannot run: the NVIDIA driver is too old: it is for CUDA 12.4"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert reason() == "no GPU is available"
    monkeypatch.setattr(torch._C, "_dispatch_has_kernel_for_dispatch_key", lambda name, key: False)
    monkeypatch.setattr(cpp, "build_info", lambda: {"no_cuda": "no nvcc"})
    assert reason() == "the extension was built without CUDA: no nvcc"
    monkeypatch.setattr(cpp, "_load", lambda: "the extension was not built: no compiler")
    assert reason() == "the extension was not built: no compiler"


class Pretended:
    """A tensor on a GPU, as far as `supports` looks."""

    def __init__(self, *shape: int, dtype: torch.dtype = torch.float32) -> None:
        self.shape, self.dtype, self.device = shape, dtype, torch.device("cuda")

    def numel(self) -> int:
        return math.prod(self.shape)


def test_calls_that_the_kernels_do_not_serve():
    assert cpp.supports("bn_act_eval_forward", Pretended(8, 64, 56, 56)) is None
    assert cpp.supports("bn_act_eval_forward", Pretended(0, 0, 5)) is None
    assert cpp.supports("add_relu_forward", Pretended(2**40)) is None
    assert "float64" in cpp.supports("add_relu_forward", Pretended(8, dtype=torch.float64))
    assert "values per channel" in cpp.supports("bn_act_backward", Pretended(2**31, 1))
    small, large = Pretended(2**29, 1, 1, 1), Pretended(2**31, 1, 1, 2)
    assert "values per channel" in cpp.supports("bn_act_pool_backward", small, None, large)


@pytest.mark.parametrize("primitive", ["bn_bn_act_train_forward", "bn_bn_act_backward", "second_moments"])
def test_primitives_of_one_device(primitive):
    assert dispatch.implementation(cpp, primitive, "cpu") is None
    assert callable(dispatch.implementation(cpp, primitive, "cuda"))


@pytest.mark.parametrize("op", ["add_relu", "bn_act", "bn_act_pool", "bn_bn_act"])
def test_the_order_on_cuda(op):
    assert dispatch.AUTOMATIC["cuda"][op] == ("triton", "cpp", "reference")
    assert op in selfcheck.CHECKS  # else it would never be chosen


def test_the_table_tells_which_of_triton_and_cpp_is_live(on_a_gpu_machine, monkeypatch):
    """Triton where it proved equal to the reference, else csrc, each with its reason."""
    complaint = "its kernels differ from torch: out"
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *args, device=None, **options: empty(*args, **options))
    monkeypatch.setattr(triton, "unavailable", lambda device_type: None)
    monkeypatch.setattr(triton, "untested", lambda op, x: complaint if op == "bn_act" else None)
    monkeypatch.setattr(cpp, "untested", lambda op, x: None)
    rows = {(row.op, row.backend): row for row in dispatch.backend_table() if row.device == "cuda"}
    assert not rows["bn_act", "triton"].live
    assert rows["bn_act", "triton"].note == complaint
    assert rows["bn_act", "cpp"].live
    assert "self-check passed" in rows["bn_act", "cpp"].note
    assert rows["add_relu", "triton"].live
    assert not rows["add_relu", "cpp"].live
    assert rows["add_relu", "cpp"].note == "on request; triton comes first"
    monkeypatch.setattr(triton, "unavailable", lambda device_type: "triton is not installed")
    rows = {(row.op, row.backend): row for row in dispatch.backend_table() if row.device == "cuda"}
    assert rows["add_relu", "cpp"].live
    assert rows["add_relu", "triton"].note == "triton is not installed"
