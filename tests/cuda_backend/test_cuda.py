"""The CUDA kernels without a GPU: emulated on the CPU, and their code, compiled by nvcc and looked into."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import builds
import cubins
import pytest
import torch

from fused_resnet import dispatch
from fused_resnet.backends import cpp, cutlass, library, selfcheck, triton

COMMANDS = builds.COMMANDS
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


@pytest.mark.parametrize(
    ("wanted", "headers", "names", "reason"),
    [
        (None, True, "8.0 9.0a", "FUSED_RESNET_CUTLASS=1 was not set"),
        ("0", True, "8.0 9.0a", "FUSED_RESNET_CUTLASS=1 was not set"),
        ("1", False, "8.0 9.0a", "CUTLASS's headers were not found"),
        ("1", True, "10.0;12.0+PTX", "TORCH_CUDA_ARCH_LIST is 10.0;12.0+PTX"),
        ("1", True, "8.6+PTX", None),
        ("1", True, "9.0", None),
        ("1", True, COMMANDS["ARCHITECTURES"], None),
    ],
)
def test_when_convolutions_are_built_from_cutlass(wanted, headers, names, reason, monkeypatch, tmp_path):
    monkeypatch.delenv("FUSED_RESNET_CUTLASS", raising=False)
    if wanted:
        monkeypatch.setenv("FUSED_RESNET_CUTLASS", wanted)
    monkeypatch.setenv("CUTLASS_PATH", str(tmp_path))
    if headers:
        (tmp_path / "include" / "cutlass").mkdir(parents=True)
        (tmp_path / "include" / "cutlass" / "cutlass.h").touch()
    found = COMMANDS["no_cutlass"](names)
    assert found is None if reason is None else reason in found


def test_another_word_than_0_and_1_is_refused_for_cutlass(monkeypatch):
    monkeypatch.setenv("FUSED_RESNET_CUTLASS", "auto")
    with pytest.raises(RuntimeError, match="FUSED_RESNET_CUTLASS must be 0 or 1, not 'auto'"):
        COMMANDS["no_cutlass"]("8.0")


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"FUSED_RESNET_CUDA": "0"}, "FUSED_RESNET_CUDA=0 was set"),
        ({"FUSED_RESNET_CUDA": "1", "CUTLASS_PATH": "/nowhere"}, "CUTLASS's headers were not found: pip install"),
    ],
)
def test_a_build_that_cannot_have_cutlass_fails_at_once(settings, reason, tmp_path):
    command = [sys.executable, "setup.py", "--quiet", "build_ext", "--build-lib", str(tmp_path)]
    environment = os.environ | {"FUSED_RESNET_REQUIRE_EXT": "0", "FUSED_RESNET_CUTLASS": "1"} | settings
    done = subprocess.run(command, cwd=builds.ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    sentence = f"FUSED_RESNET_CUTLASS=1 is set, and its convolutions were not built: {reason}"
    assert sentence in done.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("names", "sources"),
    [
        ("8.0", ["conv_sm80"]),
        ("8.9", ["conv_sm80"]),
        ("9.0", ["conv_sm90"]),
        ("9.0a 12.0+PTX", ["conv_sm90"]),
        (COMMANDS["ARCHITECTURES"], ["conv_sm80", "conv_sm90"]),
        ("10.0", []),
    ],
)
def test_each_convolution_is_compiled_for_its_own_gpus(names, sources):
    assert COMMANDS["cutlass_sources"](names) == sources


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


@pytest.mark.parametrize("primitive", ["bn_bn_act_train_forward", "bn_bn_act_backward"])
def test_primitives_of_one_device(primitive):
    assert dispatch.implementation(cpp, primitive, "cpu") is None
    assert callable(dispatch.implementation(cpp, primitive, "cuda"))


class OnGPU(torch.Tensor):
    """A tensor of the CPU that says it is on a GPU."""

    device = property(lambda self: torch.device("cuda"))  # type: ignore[assignment]
    is_cuda = property(lambda self: True)  # type: ignore[assignment]


@pytest.fixture
def taken(monkeypatch) -> list[str]:
    """Calls of CUTLASS's convolutions, which give zeros; torch's give what they give."""
    calls: list[str] = []

    def convolution(name):
        def call(x, weight, *args):
            calls.append(name)
            return torch.zeros(1)

        return call

    cpp._warn_of.cache_clear()
    monkeypatch.setattr(cpp, "cutlass_unavailable", lambda: None)
    monkeypatch.setattr(cutlass, "refusal", lambda *args: None)
    for name in ("conv_bias_act_forward", "conv_bn_act_forward"):
        monkeypatch.setattr(cutlass, name, convolution(name))
    return calls


CONV = ((1, 1), (1, 1), (1, 1), 1)


def convolve(primitive: str) -> torch.Tensor:
    x, weight = torch.randn(2, 8, 5, 5).as_subclass(OnGPU), torch.randn(8, 8, 3, 3).as_subclass(OnGPU)
    if primitive == "conv_bias_act_forward":
        return cpp.conv_bias_act_forward(x, weight, None, None, *CONV, None)
    norm = (None, None, torch.zeros(8), torch.ones(8))
    return cpp.conv_bn_act_forward(x, weight, None, *norm, None, *CONV, 1e-5, None)


@pytest.mark.parametrize("primitive", ["conv_bias_act_forward", "conv_bn_act_forward"])
def test_a_request_for_cpp_takes_the_convolution_of_cutlass(primitive, taken, monkeypatch):
    """Where it serves; else torch's, and the reason is warned of once. Never on a CPU."""
    monkeypatch.setattr(cpp, "bn_act_eval_forward", lambda y, *args: y)
    assert convolve(primitive).shape == (1,)
    assert taken == [primitive]
    monkeypatch.setattr(cutlass, "refusal", lambda *args: "it has no groups")
    with pytest.warns(UserWarning, match="does not take some calls .it has no groups.: torch's and a fused pass do"):
        assert convolve(primitive).shape == (2, 8, 5, 5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert convolve(primitive).shape == (2, 8, 5, 5)
        monkeypatch.setattr(cpp, "cutlass_unavailable", lambda: "the extension was built without CUTLASS")
        monkeypatch.setattr(cutlass, "refusal", lambda *args: pytest.fail("there is nothing to ask"))
        assert convolve(primitive).shape == (2, 8, 5, 5)
        monkeypatch.setattr(cpp, "cutlass_unavailable", lambda: None)
        cpp.conv_bias_act_forward(torch.randn(2, 8, 5, 5), torch.randn(8, 8, 3, 3), None, None, *CONV, None)
    assert taken == [primitive]


def test_weights_for_cutlass_are_packed_once(taken, monkeypatch):
    x, weight = torch.randn(2, 8, 5, 5).as_subclass(OnGPU), torch.randn(8, 8, 3, 3).as_subclass(OnGPU)
    assert cpp.packs(x, weight, *CONV, "relu")
    assert cpp.packs(x, weight, None, None, *CONV, "relu")
    packed = cpp.pack(weight, tuple(x.shape), *CONV)
    assert packed.shape == weight.shape
    assert packed.is_contiguous(memory_format=torch.channels_last)
    monkeypatch.setattr(cutlass, "refusal", lambda *args: "no")
    with pytest.warns(UserWarning, match="does not take some calls"):
        assert not cpp.packs(x, weight, *CONV, "relu")


@pytest.mark.parametrize("op", ["conv_bias_act", "conv_bn_act"])
def test_convolutions_of_cutlass_are_never_chosen_by_themselves(op):
    assert "cpp" not in dispatch.AUTOMATIC["cuda"][op]
    assert op in selfcheck.CHECKS  # else a request would not be served by them


def test_why_there_are_no_convolutions_of_cutlass(monkeypatch):
    monkeypatch.setattr(cpp, "_load", lambda: None)
    monkeypatch.setattr(cpp, "build_info", lambda: {"no_cutlass": "FUSED_RESNET_CUTLASS=1 was not set"})
    monkeypatch.setattr(torch._C, "_dispatch_has_kernel_for_dispatch_key", lambda name, key: False)
    cpp.cutlass_unavailable.cache_clear()
    reason = "the extension was built without CUTLASS: FUSED_RESNET_CUTLASS=1 was not set"
    assert cpp.cutlass_unavailable() == reason
    assert cpp.on_request("conv_bn_act", "cuda") == f"conv in torch, epilogue in csrc; {reason}"
    assert cpp.on_request("conv_bn_act", "cpu") == cpp.on_request("bn_act", "cuda") == ""
    monkeypatch.setattr(torch._C, "_dispatch_has_kernel_for_dispatch_key", lambda name, key: True)
    cpp.cutlass_unavailable.cache_clear()
    assert cpp.cutlass_unavailable() is None
    assert cpp.on_request("conv_bias_act", "cuda").startswith("one CUTLASS kernel")
    cpp.cutlass_unavailable.cache_clear()


@pytest.mark.parametrize("op", ["add_relu", "bn_act", "bn_act_pool", "bn_bn_act"])
def test_the_order_on_cuda(op):
    assert dispatch.AUTOMATIC["cuda"][op] == ("triton", "cpp", "reference")
    assert op in selfcheck.CHECKS  # else it would never be chosen


def test_the_table_tells_which_of_triton_and_cpp_is_live(on_a_gpu_machine, monkeypatch):
    """Triton where it proved equal to the reference, else csrc, each with its reason."""
    complaint = "its kernels differ from torch: out"
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *args, device=None, **options: empty(*args, **options))
    monkeypatch.setattr(library, "unavailable", lambda device_type: None)
    monkeypatch.setattr(library, "switched_off", lambda device_type: None)
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
    assert rows["conv_bn_act", "library"].live
    assert rows["conv_bn_act", "triton"].note == "on request"
    assert rows["conv_bn_act", "cpp"].note == f"on request: {cpp.on_request('conv_bn_act', 'cuda')}"
    monkeypatch.setattr(triton, "unavailable", lambda device_type: "triton is not installed")
    rows = {(row.op, row.backend): row for row in dispatch.backend_table() if row.device == "cuda"}
    assert rows["add_relu", "cpp"].live
    assert rows["add_relu", "triton"].note == "triton is not installed"
