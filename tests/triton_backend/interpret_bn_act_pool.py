"""bn_act_pool: the kernels against torch and float64, in the interpreter."""

from __future__ import annotations

import contextlib
import itertools

import pytest
import torch
from harness import DTYPES, assert_close, assert_guards, guarded, like, track
from torch import Tensor

from fused_resnet.backends import reference
from fused_resnet.backends import triton as backend
from fused_resnet.backends.triton import bn_act_pool, configs

EPS = 1e-5
pytestmark = pytest.mark.usefixtures("poison")
# The size of what is added up on the way to a result; sums over rows grow with the root of the number of rows.
SCALES = {"grad gamma": 100, "grad beta": 50, "grad x": 40}
SHAPES = {
    "even": (2, 64, 16, 12),
    "odd, ragged": (1, 67, 13, 15),
    "single rows and columns": (3, 5, 1, 2),
}
VARIANTS = {  # training, activation, affine
    "training": (True, "relu", True),
    "training-linear": (True, None, False),
    "frozen": (False, "relu", True),
}
GRID = [
    pytest.param(*variant, shape, dtype, layout, id=f"{name}-{str(dtype)[6:]}-{layout}-{shape}")
    for i, (name, variant) in enumerate(VARIANTS.items())
    for (j, dtype), (k, layout) in itertools.product(enumerate(DTYPES), enumerate(("nhwc", "nchw")))
    for shape in [list(SHAPES.values())[(i + j + k) % len(SHAPES)]]
]


def double(*values: object) -> list:
    return [v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for v in values]


def chosen(y: Tensor, offsets: Tensor) -> Tensor:
    """The values of y that the windows' offsets point at."""
    rows = torch.arange(offsets.shape[2]).view(-1, 1) * 2 - 1 + offsets.long() // 3
    columns = torch.arange(offsets.shape[3]) * 2 - 1 + offsets.long() % 3
    assert ((rows >= 0) & (rows < y.shape[2]) & (columns >= 0) & (columns < y.shape[3])).all()
    return y.flatten(2).gather(2, (rows * y.shape[3] + columns).flatten(2)).view(offsets.shape)


@pytest.fixture(autouse=True)
def few_programs():
    """The interpreter's cost is per program: the narrow blocks of channels that suit NCHW would make many."""
    with contextlib.ExitStack() as stack:
        for kernel in (bn_act_pool.APPLY, bn_act_pool.BACKWARD_REDUCE, bn_act_pool.BACKWARD_APPLY):
            stack.enter_context(configs.override(kernel, {"BLOCK_R": 64, "BLOCK_C": 64, "PROGRAMS": 2, "num_warps": 8}))
        yield


@pytest.mark.parametrize(("training", "activation", "affine", "shape", "dtype", "layout"), GRID)
def test_equals_torch(training, activation, affine, shape, dtype, layout):
    n, c, h, w = shape
    x = guarded(shape, dtype, layout)
    grad = guarded((n, c, (h + 1) // 2, (w + 1) // 2), dtype, layout, seed=1)
    gamma = like(torch.randn(c).to(dtype)) if affine else None  # of both signs
    beta = like(torch.randn(c).to(dtype)) if affine else None
    running = [like(torch.randn(c).to(dtype)), like(torch.rand(c).to(dtype) + 0.5)]
    results = {}
    for name, module in (("ours", backend), ("plain", reference), ("exact", reference)):
        stats = [r.to(torch.float64 if name == "exact" else dtype, copy=True) for r in running]
        given = double(x, gamma, beta) if name == "exact" else [x, gamma, beta]
        with track():
            if training:
                out, offsets, mean, var = module.bn_act_pool_train_forward(*given, *stats, 0.1, EPS, activation, True)
                results[name] = {"out": out, "mean": mean, "var": var, "r": stats[0], "rv": stats[1]}
            else:
                out, offsets = module.bn_act_pool_eval_forward(*given, *stats, EPS, activation, True)
                results[name] = {"out": out}
                assert module.bn_act_pool_eval_forward(*given, *stats, EPS, activation, False)[1] is None
        if name == "ours":
            ours = offsets
    assert ours.dtype == torch.uint8
    assert ours.stride() == results["ours"]["out"].stride()
    statistics = (mean.float(), var.float()) if training else running
    y = reference.bn_act_eval_forward(*double(x, gamma, beta, *statistics), None, EPS, activation)
    values = torch.empty_like(results["plain"]["out"]).copy_(chosen(y, ours))
    assert_close("chosen", values, results["plain"]["out"], results["exact"]["out"], 10)
    for name, module in (("ours", backend), ("plain", reference), ("exact", reference)):
        args = [grad, offsets, x, gamma, beta, *statistics]
        args = double(*args) if name == "exact" else args
        with track():
            grads = module.bn_act_pool_backward(*args, EPS, activation, training)
        results[name] |= dict(zip(("grad x", "grad gamma", "grad beta"), grads, strict=True))
    for name, value in results["ours"].items():
        scale = SCALES.get(name, 10)
        assert_close(name, value, results["plain"][name], results["exact"][name], scale)
    assert_guards(*(t for t in (x, grad, gamma, beta, *running) if t is not None))


@pytest.mark.parametrize("activation", ["relu", None])
def test_ties_and_special_values_choose_as_torch_does(activation):
    values = torch.tensor([0.0, 1.0, 2.0, -1.0, float("nan"), float("inf"), -float("inf")])
    weights = torch.tensor([5.0, 5.0, 3.0, 5.0, 0.5, 0.3, 3.0])  # few NaN, whole windows of -inf
    drawn = torch.multinomial(weights, 2 * 8 * 11 * 10, replacement=True, generator=torch.Generator().manual_seed(0))
    x = values[drawn].view(2, 8, 11, 10).contiguous(memory_format=torch.channels_last)
    x[0, 0, :4, :4] = -float("inf")
    one = torch.ones(8)
    args = (x, one, torch.zeros(8), torch.zeros(8), one, 0.0, activation)
    for module in (backend, reference):
        out, offsets = module.bn_act_pool_eval_forward(*args, True)
        plain, indices = torch.nn.functional.max_pool2d(x.relu() if activation else x, 3, 2, 1, return_indices=True)
        assert torch.equal(out.nan_to_num(7), plain.nan_to_num(7))
        position = torch.arange(110.0).view(1, 1, 11, 10).expand(2, 8, 11, 10)
        assert torch.equal(chosen(position, offsets).long(), indices)
        grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(memory_format=torch.channels_last)
        finite = x.nan_to_num(0, 0, 0)
        grads = module.bn_act_pool_backward(grad, offsets, finite, *args[1:3], *args[3:], False)
        if activation is None:
            through = torch.ops.aten.max_pool2d_with_indices_backward(
                grad, x, [3, 3], [2, 2], [1, 1], [1, 1], False, indices
            )
            torch.testing.assert_close(grads[0], through)


def test_equals_pool_after_bn_act():
    """The same numbers as the two ops one after the other."""
    x = guarded((2, 8, 10, 10), torch.float32)
    whole = backend.bn_act_pool_train_forward(x, None, None, None, None, 0.1, EPS, "relu", True)
    y = backend.bn_act_train_forward(x, None, None, None, None, None, 0.1, EPS, "relu")[0]
    assert torch.equal(whole[0], torch.nn.functional.max_pool2d(y, 3, 2, 1))
    assert torch.equal(chosen(y, whole[1]), whole[0])
