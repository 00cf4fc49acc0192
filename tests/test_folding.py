"""The algebra of folding.py: BN folded into a conv, running statistics, and the cache of folded weights by itself.

What the modules do with the cache is in test_folded_cache.py.
"""

from __future__ import annotations

import copy
import gc
import pickle
from typing import Any

import pytest
import torch
from conftest import FLOATS
from tolerances import exact_conv2d
from torch import Tensor
from torch.nn import functional as F

from fused_resnet.folding import FoldCache, accumulate_dtype, fold, update_running_stats

pytestmark = pytest.mark.usefixtures("poison")


def bn(channels: int, dtype: torch.dtype, vectors: str = "both") -> tuple[Tensor | None, ...]:
    """gamma of both signs and 0, beta, mean, var."""
    gamma = torch.randn(channels)
    gamma[0] = 0.0
    beta, mean, var = torch.randn(channels), torch.randn(channels), torch.rand(channels) * 3 + 0.01
    gamma = gamma.to(dtype) if vectors in ("both", "gamma") else None
    return gamma, beta.to(dtype) if vectors in ("both", "beta") else None, mean.to(dtype), var.to(dtype)


def exact_fold(
    weight: Tensor,
    bias: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    mean: Tensor,
    var: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """By its definition: what a conv and BN make of the input 0, and of each unit input, in float64."""
    scale = 1 / (var.double() + eps).sqrt()
    scale = scale if gamma is None else scale * gamma.double()
    shift = (0 if bias is None else bias.double()) - mean.double()
    shift = shift * scale + (0 if beta is None else beta.double())
    return torch.stack([w.double() * s for w, s in zip(weight, scale, strict=True)]), shift


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("vectors", ["both", "gamma", "beta", "none"])
@pytest.mark.parametrize("groups", [1, 3])
def test_folded_conv_is_conv_and_bn(groups: int, vectors: str, with_bias: bool) -> None:
    """conv(x, fold(...)) = bn(conv(x)), in float64, against F.batch_norm itself."""
    x, weight = torch.randn(2, 6, 5, 5).double(), torch.randn(9, 6 // groups, 3, 3).double()
    bias = torch.randn(9).double() if with_bias else None
    gamma, beta, mean, var = bn(9, torch.float64, vectors)
    conv = ((1, 1), (1, 1), (1, 1), groups)
    expected = F.batch_norm(exact_conv2d(x, weight, bias, *conv), mean, var, gamma, beta, eps=1e-3)
    folded = fold(weight, bias, gamma, beta, mean, var, 1e-3)
    torch.testing.assert_close(exact_conv2d(x, *folded, *conv), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("params", ["same", "fp32"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_rounded_once(dtype: torch.dtype, params: str) -> None:
    """Computed in float32 (float64 for float64) and rounded to the weight's type at the end, not on the way."""
    wide = torch.float32 if params == "fp32" and dtype.itemsize == 2 else dtype
    weight, bias, vectors = torch.randn(16, 8, 3, 3).to(dtype), torch.randn(16).to(dtype), bn(16, wide)
    folded = fold(weight, bias, *vectors, 1e-5)
    for ours, exact in zip(folded, exact_fold(weight, bias, *vectors, 1e-5), strict=True):
        assert ours.dtype == dtype
        half_a_step = 0.5 * torch.finfo(dtype).eps * exact.abs()
        accumulated = 6 * torch.finfo(accumulate_dtype(dtype)).eps * (exact.abs() + 10)
        assert ((ours.double() - exact).abs() <= half_a_step + accumulated).all()


def test_into_another_type() -> None:
    """float32 weights folded for bfloat16: one rounding, where rounding the weight first would make two."""
    weight, vectors = torch.randn(16, 8, 3, 3), bn(16, torch.float32)
    folded, shift = fold(weight, None, *vectors, 1e-5, torch.bfloat16)
    exact, exact_shift = exact_fold(weight, None, *vectors, 1e-5)
    assert folded.dtype == shift.dtype == torch.bfloat16
    assert torch.equal(folded, exact.float().bfloat16())
    torch.testing.assert_close(shift, exact_shift.float().bfloat16(), rtol=0.01, atol=1e-6)


@pytest.mark.parametrize("shape", [(5, 3), (5, 3, 4), (5, 3, 2, 2), (5, 3, 2, 2, 2), (5, 1, 1, 1)], ids=str)
def test_weights_of_any_rank(shape: tuple[int, ...]) -> None:
    """Linear and 1-d, 2-d, 3-d convs: the output channels come first; the layout is kept."""
    weight, vectors = torch.randn(shape), bn(5, torch.float32)
    folded, _ = fold(weight, None, *vectors, 1e-5)
    torch.testing.assert_close(folded.double(), exact_fold(weight, None, *vectors, 1e-5)[0], rtol=1e-6, atol=1e-7)
    if len(shape) == 4:
        last = weight.contiguous(memory_format=torch.channels_last)
        assert fold(last, None, *vectors, 1e-5)[0].stride() == last.stride()


def test_nothing_is_written_or_shared() -> None:
    weight, bias, vectors = torch.randn(4, 3, 1, 1), torch.randn(4), bn(4, torch.float32)
    identity = (None, None, torch.zeros(4), torch.ones(4))
    before = [t.clone() for t in (weight, bias, *vectors)]
    for given in (vectors, identity):
        folded, shift = fold(weight, bias, *given, 0.0)
        folded.fill_(7), shift.fill_(7)
    assert all(map(torch.equal, before, (weight, bias, *vectors)))


def test_var_of_zero_and_large_means() -> None:
    """eps keeps a dead channel finite; the shift does not lose a bias beside a large mean."""
    weight, gamma, beta = torch.ones(2, 1, 1, 1), torch.ones(2), torch.zeros(2)
    mean, var, bias = torch.tensor([1e4, 0.0]), torch.tensor([1.0, 0.0]), torch.tensor([1e4 + 0.5, 1.0])
    folded, shift = fold(weight, bias, gamma, beta, mean, var, 1e-5)
    torch.testing.assert_close(shift, torch.tensor([0.5, 1e-5**-0.5]), rtol=1e-5, atol=0)
    torch.testing.assert_close(folded.flatten(), torch.tensor([1.0, 1e-5**-0.5]), rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_accumulate_dtype(dtype: torch.dtype) -> None:
    assert accumulate_dtype(dtype) == (torch.float64 if dtype == torch.float64 else torch.float32)


# --- running statistics ---


@pytest.mark.parametrize("momentum", [0.0, 0.1, 1.0, "tensor", "tensor64"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_update_running_stats(dtype: torch.dtype, momentum: Any) -> None:
    """In place, the variance unbiased, and rounded once where the buffers have 16 bits."""
    acc = accumulate_dtype(dtype)
    running = torch.randn(64).to(dtype), torch.rand(64).to(dtype)
    mean, var = -running[0].to(acc) * 3 + torch.randn(64, dtype=acc), torch.rand(64, dtype=acc)
    m = 0.3 if isinstance(momentum, str) else momentum
    weight = momentum
    if isinstance(momentum, str):
        weight = torch.tensor(0.3, dtype=torch.float64 if momentum == "tensor64" else torch.float32)
    expected = [(1 - m) * r.double() + m * b.double() for r, b in zip(running, (mean, var * (10 / 9)), strict=True)]
    before = [t._version for t in running]
    pointers = [t.data_ptr() for t in running]
    update_running_stats(*running, mean, var, weight, 10)
    for r, exact in zip(running, expected, strict=True):
        accumulated = 4e-7 * (exact.abs() + 4) if acc == torch.float32 or isinstance(momentum, str) else 1e-14
        assert ((r.double() - exact).abs() <= 0.5 * torch.finfo(dtype).eps * exact.abs() + accumulated).all()
    assert all(t._version > version for t, version in zip(running, before, strict=True))
    assert [t.data_ptr() for t in running] == pointers


def test_update_of_nothing_and_of_one_value() -> None:
    update_running_stats(None, None, torch.ones(3), torch.ones(3), 0.1, 5)
    var = torch.zeros(3)
    update_running_stats(None, var, torch.ones(3), torch.ones(3), 1.0, 1)  # no unbiased variance exists
    assert torch.equal(var, torch.ones(3))


# --- the cache ---


def filled(*tensors: Tensor | None, key: tuple[Any, ...] = ("key",), value: Any = "value") -> FoldCache:
    cache = FoldCache()
    cache.put(FoldCache.stamp(tensors), key, value)
    return cache


def test_hit_and_miss() -> None:
    weight, bias = torch.randn(4, 3), torch.randn(4)
    cache = filled(weight, None, bias)
    assert cache.get((weight, None, bias), ("key",)) == "value"
    assert cache.get((weight.detach(), None, bias), ("key",)) == "value"  # another object, the same memory
    assert cache.get((weight, None, bias), ("other",)) is None
    assert cache.get((weight, bias, None), ("key",)) is None
    assert cache.get((weight, bias, bias), ("key",)) is None
    assert cache.get((weight.clone(), None, bias), ("key",)) is None
    cache.clear()
    assert cache.get((weight, None, bias), ("key",)) is None
    assert FoldCache().get((weight,), ("key",)) is None


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.add_(0),
        lambda t: t[0].zero_(),
        lambda t: t.copy_(t.clone()),
        lambda t: torch._foreach_add_([t], 1.0),
        lambda t: t.detach().mul_(2),
        lambda t: t.view(-1)[2:3].fill_(1),
        lambda t: torch.nn.init.normal_(t),
    ],
    ids=["add", "slice", "copy", "foreach", "detached", "view", "init"],
)
def test_in_place_writes_are_seen(change: Any) -> None:
    weight = torch.randn(4, 3)
    cache = filled(weight)
    with torch.no_grad():
        change(weight)
    assert cache.get((weight,), ("key",)) is None


def test_other_views_of_the_memory_are_another_tensor() -> None:
    """One storage and version, but other elements: a slice, a transposed view, another type."""
    weight = torch.randn(4, 4)
    cache = filled(weight)
    for other in (weight[:2], weight.t(), weight[:, :2], weight.view(2, 8), weight.view(torch.int32)):
        assert cache.get((other,), ("key",)) is None
    weight.data = weight.data.t()
    assert cache.get((weight,), ("key",)) is None


def test_a_new_tensor_at_the_old_address_is_seen() -> None:
    """The cache keeps the memory that it knows, so that no new tensor can get its address."""
    weight = torch.randn(64, 64)
    cache = filled(weight)
    del weight
    gc.collect()
    for _ in range(20):
        assert cache.get((torch.randn(64, 64),), ("key",)) is None


def test_a_write_between_stamp_and_put_counts() -> None:
    weight = torch.randn(4)
    cache = FoldCache()
    stamp = FoldCache.stamp((weight,))
    weight.add_(1)
    cache.put(stamp, ("key",), "made of the old weight")
    assert cache.get((weight,), ("key",)) is None


def test_inference_tensors_are_not_kept() -> None:
    """They have no version counter, so nothing could be seen."""
    with torch.inference_mode():
        weight = torch.randn(4)
    assert FoldCache.stamp((weight,)) is None
    cache = filled(torch.randn(4))
    cache.put(None, ("key",), "value")
    assert cache._entry is None


def test_in_no_copy_and_no_pickle() -> None:
    weight = torch.randn(4)
    cache = filled(weight)
    for other in (copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))):
        assert isinstance(other, FoldCache)
        assert other.get((weight,), ("key",)) is None
    assert cache.get((weight,), ("key",)) == "value"
