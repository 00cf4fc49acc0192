"""What only the CUDA kernels have, emulated: grids of any size, vectors or not, second moments, convolutions.

Run by test_cuda.py.
"""

from __future__ import annotations

from typing import Any

import builds
import pytest
import torch
from tolerances import same_strides
from torch import Tensor

from fused_resnet.backends import cpp, cutlass, reference, selfcheck

DTYPES = cpp._DTYPES["cuda"]
EPS = 1e-5


def shifted(t: Tensor) -> Tensor:
    """The same values and strides, one element past an address that vectors could be loaded from."""
    storage = t.new_empty(t.numel() + 1)
    copy = torch.as_strided(storage, t.shape, t.stride(), 1)
    copy.copy_(t)
    assert copy.data_ptr() % 16 != 0
    return copy


def vectors(channels: int) -> list[Tensor]:
    """gamma, beta, mean, var."""
    return [*torch.randn(3, channels), torch.rand(channels) + 0.5]


def results(module: Any, x: Tensor, y: Tensor, grad: Tensor) -> list[Tensor]:
    """Every primitive's results, given the same statistics and masks whatever the module."""
    torch.manual_seed(1)
    gamma, beta, mean, var = vectors(x.shape[1])
    found: list[Any] = [module.add_relu_forward(x, y), module.add_relu_backward(grad, y)]
    for shortcut in (None, y):
        found += module.bn_act_train_forward(x, gamma, beta, mean, var, shortcut, 0.1, EPS, "relu")
        given = vectors(x.shape[1])
        training = shortcut is None
        found += module.bn_act_backward(grad, x, shortcut, *given, EPS, "relu", training, shortcut is not None)
    found.append(module.bn_act_eval_forward(x, *vectors(x.shape[1]), y, EPS, None))
    one, two = vectors(x.shape[1]), vectors(x.shape[1])
    found += module.bn_bn_act_train_forward(x, *one, 0.1, EPS, y, *two, 0.1, EPS, None)
    found += module.bn_bn_act_backward(grad, x, *vectors(x.shape[1]), EPS, y, *vectors(x.shape[1]), EPS, "relu")
    found += one + two
    out, offsets, *statistics = module.bn_act_pool_train_forward(x, gamma, beta, None, None, 0.1, EPS, None, True)
    found += [out, *statistics]
    windows = grad[:, :, : out.shape[2], : out.shape[3]].contiguous(memory_format=torch.channels_last)
    windows = windows if not x.is_contiguous() else windows.contiguous()
    _, offsets = reference._pool(x.float(), True)
    offsets = torch.empty_like(windows, dtype=torch.uint8).copy_(offsets)
    found += module.bn_act_pool_backward(windows, offsets, x, *vectors(x.shape[1]), EPS, "relu", True)
    return [t for t in found if t is not None]


@pytest.mark.parametrize("multiprocessors", [1, 7, 200])
@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_grid(dtype, layout, aligned, multiprocessors, monkeypatch):
    """Blocks of the last and the first channels and positions, one block for all, more blocks than work."""
    monkeypatch.setenv("EMULATED_MULTIPROCESSORS", str(multiprocessors))
    shape = (2, 40, 12, 20) if multiprocessors > 1 else (5, 24, 32, 36)  # a position for each thread, or several
    inputs = [torch.randn(shape).to(dtype).contiguous(memory_format=layout) for _ in range(3)]
    inputs = inputs if aligned else [shifted(t) for t in inputs]
    ours, plain = results(cpp, *inputs), results(reference, *inputs)
    exact = results(reference, *(t.double() for t in inputs))
    for i, (a, b, c) in enumerate(zip(ours, plain, exact, strict=True)):
        assert a.dtype == b.dtype
        assert a.stride() == b.stride() or a.dim() < 4
        error, allowed = ((t.double() - c).abs().max() / c.abs().max() for t in (a, b))
        assert error <= 2 * allowed + 4 * torch.finfo(a.dtype).eps, (i, error, allowed)
    again = results(cpp, *inputs)  # the emulator's blocks and threads then run in another order
    assert all(torch.equal(a, b) for a, b in zip(ours, again, strict=True))


@pytest.mark.parametrize("multiprocessors", [1, 100])
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (200, 64), (1000, 72), (130, 200), (129, 129)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_second_moments(dtype, shape, multiprocessors, monkeypatch):
    monkeypatch.setenv("EMULATED_MULTIPROCESSORS", str(multiprocessors))
    rows = (torch.randn(shape) * 2 + 30).to(dtype)
    mean, moments = cpp.second_moments(rows)
    (_, plain), (_, exact) = reference.second_moments(rows), reference.second_moments(rows.double())
    torch.testing.assert_close(mean.double(), rows.double().mean(0), rtol=2e-7, atol=0)
    size = exact.diagonal().sqrt() * exact.diagonal().sqrt()[:, None] + 1e-9
    error, allowed = (((t - exact).abs() / size).max() for t in (moments, plain))
    assert error <= 2 * allowed + 4 * torch.finfo(torch.float32).eps
    assert torch.equal(moments, moments.t())
    assert all(torch.equal(a, b) for a, b in zip(cpp.second_moments(rows), (mean, moments), strict=True))


def test_the_self_check_passes_and_finds_faults(monkeypatch):
    """As on a GPU, before the kernels are chosen automatically."""
    case = selfcheck.Case("bn_bn_act", torch.device("cpu"), torch.bfloat16, False)
    assert selfcheck.run(cpp, case) is None
    monkeypatch.setattr(cpp, "bn_bn_act_backward", lambda *args: [2 * t for t in reference.bn_bn_act_backward(*args)])
    with pytest.warns(UserWarning, match="cpp will not be used for bn_bn_act in torch.bfloat16, NHWC.*differ"):
        assert "differ" in selfcheck.run(cpp, case)


def test_a_momentum_on_the_device_is_not_waited_for(monkeypatch):
    """It stays a tensor: float() of it would wait for the device."""
    momentum = torch.tensor(0.25)
    monkeypatch.setattr(cpp, "_on_host", lambda value: not isinstance(value, Tensor))
    monkeypatch.setattr(torch.Tensor, "__float__", lambda self: pytest.fail("waits for the device"))
    x, mean, var = torch.randn(4, 8, 3, 3), torch.zeros(8), torch.ones(8)
    cpp.bn_act_train_forward(x, None, None, mean, var, None, momentum, EPS, None)
    torch.testing.assert_close(mean, 0.25 * x.mean((0, 2, 3)))
    torch.testing.assert_close(var, 0.75 + 0.25 * x.var((0, 2, 3)))


def test_bad_input_is_named():
    x = torch.randn(2, 8, 4, 4)
    with pytest.raises(RuntimeError, match="residual must have the strides of x"):
        cpp.add_relu_forward(x, x.contiguous(memory_format=torch.channels_last))
    with pytest.raises(RuntimeError, match="offsets must be uint8"):
        cpp.bn_act_pool_backward(x, x, x, None, None, *vectors(8)[2:], EPS, None, True)
    with pytest.raises(RuntimeError, match="dtype must be float32, bfloat16 or float16"):
        cpp.add_relu_forward(x.double(), x.double())


# Convolutions: CUTLASS's kernels for sm_80 (8), emulated down to the instructions of its tensor cores; plain loops (9).

CAPABILITIES = [
    pytest.param("8", marks=pytest.mark.skipif(builds.no_cutlass() is not None, reason=builds.no_cutlass() or "")),
    "9",
]
# name: (N, C, H, W, K, (R, S), stride, padding, dilation)
CONVS = {
    "1x1": (2, 64, 6, 9, 136, (1, 1), (1, 1), (0, 0), (1, 1)),
    "1x1 strided": (1, 40, 9, 8, 72, (1, 1), (2, 2), (0, 0), (1, 1)),
    "3x3": (2, 16, 9, 11, 24, (3, 3), (1, 1), (1, 1), (1, 1)),
    "3x3 projection": (1, 72, 12, 13, 128, (3, 3), (2, 2), (1, 1), (1, 1)),
    "3x3 dilated": (3, 24, 7, 7, 8, (3, 3), (1, 1), (2, 2), (2, 2)),
    "uneven": (1, 8, 5, 12, 200, (5, 2), (1, 3), (4, 0), (1, 2)),
    "one pixel": (1, 8, 3, 3, 8, (3, 3), (1, 1), (0, 0), (1, 1)),
}


def conv_inputs(name: str, dtype: torch.dtype) -> tuple[Any, ...]:
    """Arguments of conv_bn_act_forward, one of the vectors in x's dtype."""
    n, c, h, w, k, kernel, *geometry = CONVS[name]

    def image(*shape: int) -> Tensor:
        return torch.randn(shape).to(dtype).contiguous(memory_format=torch.channels_last)

    x, weight = image(n, c, h, w), image(k, c, *kernel) / (c * kernel[0] * kernel[1]) ** 0.5
    out = reference.conv_bias_act_forward(x, weight, None, None, *geometry, 1, None)
    gamma, beta, mean, var = vectors(k)
    return x, weight, torch.randn(k), gamma, beta.to(dtype), mean, var, image(*out.shape), *geometry, 1, EPS, "relu"


def within(ours: Tensor, plain: Tensor, exact: Tensor) -> None:
    error, allowed = ((t.double() - exact).abs().max() / exact.abs().max() for t in (ours, plain))
    assert error <= 2 * allowed + 4 * torch.finfo(ours.dtype).eps, (error, allowed)
    assert same_strides(ours, plain)


def doubles(args: Any) -> Any:
    return (a.double() if isinstance(a, Tensor) else a for a in args)


@pytest.mark.parametrize("multiprocessors", [1, 100])  # wide tiles where they are enough, and narrow ones
@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("name", CONVS)
@pytest.mark.parametrize("dtype", cutlass.DTYPES, ids=str)
def test_conv_bn_act(dtype, name, capability, multiprocessors, monkeypatch):
    monkeypatch.setenv("EMULATED_CAPABILITY", capability)
    monkeypatch.setenv("EMULATED_MULTIPROCESSORS", str(multiprocessors))
    args = conv_inputs(name, dtype)
    bn = reference.conv_bn_act_forward
    plain = reference.conv_bn_act_forward(*args[:2], args[2].to(dtype), *args[3:])
    within(cutlass.conv_bn_act_forward(*args), plain, bn(*doubles(args)))
    bare = (*args[:2], None, None, None, *args[5:7], None, *args[8:-1], None)
    within(cutlass.conv_bn_act_forward(*bare), bn(*bare), bn(*doubles(bare)))


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("activation", ["relu", None])
@pytest.mark.parametrize("with_residual", [True, False])
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("dtype", cutlass.DTYPES, ids=str)
def test_conv_bias_act(dtype, with_bias, with_residual, activation, capability, monkeypatch):
    monkeypatch.setenv("EMULATED_CAPABILITY", capability)
    x, weight, bias, *_, residual, stride, padding, dilation, groups, _, _ = conv_inputs("3x3", dtype)
    residual = residual.contiguous() if with_residual else None  # NCHW: taken in the layout of the output
    args = (x, weight.contiguous(), bias.to(dtype) if with_bias else None, residual)
    args = (*args, stride, padding, dilation, groups, activation)
    function = reference.conv_bias_act_forward
    within(cutlass.conv_bias_act_forward(*args), function(*args), function(*doubles(args)))


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_convolutions_keep_nan_and_infinity_where_they_are(capability, monkeypatch):
    monkeypatch.setenv("EMULATED_CAPABILITY", capability)
    args = list(conv_inputs("3x3", torch.float16))
    args[0][0, 0, 2, 3], args[0][1, -1, 5, 6], args[7][0, 1, 0, 0] = torch.nan, torch.inf, torch.nan
    args[2] = None
    ours, theirs = (module.conv_bn_act_forward(*args) for module in (cutlass, reference))
    assert torch.equal(ours.isnan(), theirs.isnan())


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("name", ["1x1", "3x3 projection"])
def test_convolutions_write_nothing_but_their_output(name, capability, monkeypatch):
    monkeypatch.setenv("EMULATED_CAPABILITY", capability)
    guard = 4096
    kept: list[Tensor] = []
    empty = torch.empty

    def guarded(size: Any, **options: Any) -> Tensor:
        like = empty(size, **options)
        kept.append(empty(like.numel() + 2 * guard, dtype=like.dtype).fill_(7.0))
        return torch.as_strided(kept[-1], like.shape, like.stride(), guard)

    monkeypatch.setattr(torch, "empty", guarded)
    args = conv_inputs(name, torch.float16)
    before = [a.clone() if isinstance(a, Tensor) else a for a in args]
    cutlass.conv_bn_act_forward(*args)
    assert bool((kept[-1][:guard] == 7).all() and (kept[-1][-guard:] == 7).all())
    assert all(torch.equal(a, b) for a, b in zip(args, before, strict=True) if isinstance(a, Tensor))


REFUSALS = {
    "it has no groups": {"groups": 2},
    "it is for bfloat16 and float16, not torch.float32": {"dtype": torch.float32},
    "the input is not channels_last": {"layout": torch.contiguous_format},
    "a tensor is not aligned to 16 bytes": {"aligned": False},
    "input and output channels must be multiples of 8": {"channels": 12},
    "the padding, dilation or stride is larger than the GPU's tensor maps allow": {"stride": (9, 9)},
    "no convolution was compiled for GPUs of compute capability 12.0": {"capability": "12"},
}


@pytest.mark.parametrize("reason", REFUSALS)
def test_why_a_convolution_is_refused(reason, monkeypatch):
    case = REFUSALS[reason]
    monkeypatch.setenv("EMULATED_CAPABILITY", case.get("capability", "9"))
    monkeypatch.setattr(cutlass, "_checked", {})
    monkeypatch.setattr(selfcheck, "untested", lambda *args: None)
    dtype, layout = case.get("dtype", torch.float16), case.get("layout", torch.channels_last)
    x = torch.randn(2, case.get("channels", 16), 12, 12).to(dtype).contiguous(memory_format=layout)
    x = x if case.get("aligned", True) else shifted(x)
    weight = torch.randn(8, x.shape[1], 3, 3).to(dtype)
    geometry = (case.get("stride", (1, 1)), (1, 1), (1, 1), case.get("groups", 1))
    assert cutlass.refusal("conv_bias_act", x, weight, None, *geometry) == reason
    served = torch.randn(2, 16, 12, 12).half().contiguous(memory_format=torch.channels_last)
    monkeypatch.setenv("EMULATED_CAPABILITY", "9")
    monkeypatch.setattr(cutlass, "_checked", {})
    assert cutlass.refusal("conv_bias_act", served, torch.randn(8, 16, 3, 3).half(), None, *[(1, 1)] * 3, 1) is None


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_the_self_check_of_convolutions(capability, monkeypatch):
    """As on a GPU, before a request is served; and its answer is the reason of a refusal."""
    monkeypatch.setenv("EMULATED_CAPABILITY", capability)
    monkeypatch.setattr(selfcheck, "COPIES", 1)
    monkeypatch.setattr(cutlass, "_tested", {})
    x, weight, *_ = conv_inputs("3x3", torch.bfloat16)
    call = (x, weight, None, (1, 1), (1, 1), (1, 1), 1)
    assert cutlass.refusal("conv_bn_act", *call) is None
    right = cutlass.conv_bias_act_forward
    monkeypatch.setattr(cutlass, "conv_bias_act_forward", lambda *args: right(*args) * 1.1)
    with pytest.warns(UserWarning, match="cutlass will not be used for conv_bias_act in torch.bfloat16, NHWC.*differ"):
        assert "differ" in cutlass.refusal("conv_bias_act", *call)
    assert cutlass.refusal("conv_bn_act", *call) is None


def test_bad_operands_of_convolutions_are_named():
    x, weight, bias, *_, residual, stride, padding, dilation, _, _, _ = conv_inputs("3x3", torch.float16)
    geometry, out = (*stride, *padding, *dilation), torch.empty_like(residual)
    call = cutlass._ops.conv_bias_act.default
    call(x, weight, bias, residual, out, *geometry, True)
    for message, args in {
        "x must be bfloat16 or float16": (x.float(), weight, bias, None, out),
        "weight must have 4 dimensions and the dtype of x": (x, weight.float(), bias, None, out),
        "weight must be channels_last": (x, weight.contiguous(), bias, None, out),
        "the same channels": (x, weight[:, :8].contiguous(memory_format=torch.channels_last), bias, None, out),
        "out must have the sizes": (x, weight, bias, None, out[:, :, 1:].contiguous(memory_format=torch.channels_last)),
        "residual must have the strides": (x, weight, bias, residual.contiguous(), out),
        "out must be aligned to 16 bytes": (x, weight, bias, None, shifted(out)),
        "bias must be a contiguous vector": (x, weight, bias[1:], None, out),
        "bias must be float64 for": (x, weight, bias.bfloat16(), None, out),
    }.items():
        with pytest.raises(RuntimeError, match=message):
            call(*args, *geometry, True)
    with pytest.raises(RuntimeError, match="strides and dilations must be positive"):
        call(x, weight, bias, None, out, 0, *geometry[1:], True)
