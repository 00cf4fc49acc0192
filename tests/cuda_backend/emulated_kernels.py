"""What only the CUDA kernels have, emulated: grids of any size, vectors or not, second moments. Run by test_cuda.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fused_resnet.backends import cpp, reference, selfcheck

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
