"""Convolutions with prologues: each primitive against float64 and plain torch, whole blocks against torch's modules."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from harness import DTYPES, assert_close, assert_guards, guarded, like, track
from networks import assert_block_within_budget, projection
from torch import Tensor, nn

import fused_resnet as fr
from fused_resnet.backends import reference, selfcheck
from fused_resnet.backends import triton as backend
from fused_resnet.backends.triton import bn_act, configs, prologue, runtime
from fused_resnet.ops.residual_block import Plan

EPS = 1e-3
# (N, C, H, W), K, kernel size, stride, padding, dilation
SHAPES: dict[str, tuple[Any, ...]] = {
    "1x1": ((2, 64, 8, 8), 64, (1, 1), (1, 1), (0, 0), (1, 1)),
    "1x1-ragged": ((1, 67, 5, 7), 35, (1, 1), (1, 1), (0, 0), (1, 1)),
    "1x1-stride": ((2, 24, 9, 7), 40, (1, 1), (2, 2), (0, 0), (1, 1)),
    "3x3": ((2, 32, 7, 9), 48, (3, 3), (1, 1), (1, 1), (1, 1)),
    "3x3-stride": ((2, 20, 9, 8), 24, (3, 3), (2, 2), (1, 1), (1, 1)),
    "3x3-dilated": ((1, 16, 9, 9), 16, (3, 3), (1, 1), (2, 2), (2, 2)),
    "uneven": ((2, 8, 7, 12), 16, (1, 5), (1, 3), (0, 4), (1, 2)),
}
POINTWISE = [name for name in SHAPES if name.startswith("1x1")]


def bn_of(y: Tensor, seed: int, vectors: torch.dtype = torch.float32) -> tuple[Any, ...]:
    """(mean, var, gamma, beta, eps), gammas of both signs."""
    mean, var, gamma, beta = (guarded((y.shape[1],), vectors, seed=seed + i) for i in range(4))
    return mean, like(var.abs() + 0.5), gamma, beta, EPS


def sums_of(y: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    count = y.numel() // y.shape[1]
    return guarded((y.shape[1],), torch.float32, seed=seed, std=count), guarded(
        (y.shape[1],), torch.float32, seed=seed + 1, std=count
    )


def double(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(double(v) for v in value)
    return value.detach().double() if isinstance(value, Tensor) else value


def tensors(value: Any) -> list[Tensor]:
    if isinstance(value, tuple):
        return [t for v in value for t in tensors(v)]
    return [value] if hasattr(value, "guard") else []


def check(name: str, *given: Any, scale: dict[int, float] | None = None) -> list[Any]:
    """The primitive on guarded tensors against reference.py in the same dtype and in float64; returns the results."""
    exact = getattr(reference, name)(*double(given))
    theirs = getattr(reference, name)(*(copy.deepcopy(v) if isinstance(v, Tensor) else v for v in given))
    with track():
        ours = getattr(backend, name)(*given)
    single = isinstance(ours, Tensor)
    found = [(ours, theirs, exact)] if single else list(zip(ours, theirs, exact, strict=True))
    for index, (one, plain, truth) in enumerate(found):
        assert (one is None) == (truth is None)
        if one is not None:
            assert_close(f"{name} {index}", one, plain, truth, (scale or {}).get(index))
    assert_guards(*tensors(given))
    return [ours] if single else list(ours)


def rounded(dtype: torch.dtype, count: int = 1, size: float = 2.0) -> float:
    """The scale of a sum of `count` numbers of this size, times a few, which were rounded to `dtype` first."""
    return size * (5.0 * count + 2 * count**0.5 * torch.finfo(dtype).eps / (16 * torch.finfo(torch.float32).eps))


def images(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    return guarded(shape, dtype, seed=seed)


def output(shape: str, dtype: torch.dtype, seed: int) -> Tensor:
    """A tensor like the convolution's output."""
    size, columns, kernel, stride, padding, dilation = SHAPES[shape]
    x, weight = torch.empty(size, device="meta"), torch.empty((columns, size[1], *kernel), device="meta")
    return images(tuple(torch.conv2d(x, weight, None, stride, padding, dilation).shape), dtype, seed)


def weight_of(shape: str, dtype: torch.dtype, layout: str = "nhwc") -> Tensor:
    size, columns, kernel, *_ = SHAPES[shape]
    fan_in = size[1] * kernel[0] * kernel[1]
    return guarded((columns, size[1], *kernel), dtype, layout, seed=9, std=fan_in**-0.5)


CASES = [(s, d) for s in SHAPES for d in DTYPES if d == torch.bfloat16 or s in ("1x1-ragged", "3x3-stride")]


@pytest.mark.parametrize(("shape", "dtype"), CASES, ids=str)
@pytest.mark.parametrize("normalised", [True, False])
def test_forward(shape, dtype, normalised):
    x, conv = images(SHAPES[shape][0], dtype, 0), SHAPES[shape][3:]
    bn = bn_of(x, 1) if normalised else None
    weight = weight_of(shape, dtype, "nhwc" if normalised else "nchw")
    running = torch.zeros(weight.shape[0]), torch.ones(weight.shape[0])
    mine, plain = [copy.deepcopy(r) for r in running], [copy.deepcopy(r) for r in running]
    scale = dict.fromkeys((1, 2), rounded(dtype))
    check("prologue_conv_forward", x, bn, weight, *conv, True, None, None, 0.0, scale=scale)
    backend.prologue_conv_forward(x, bn, weight, *conv, True, *mine, 0.1)
    reference.prologue_conv_forward(x, bn, weight, *conv, True, *plain, 0.1)
    for one, two in zip(mine, plain, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-2, atol=1e-3)
    check("prologue_conv_forward", x, bn, weight, *conv, False, None, None, 0.0)


@pytest.mark.parametrize(("shape", "dtype"), CASES, ids=str)
@pytest.mark.parametrize("kind", ["first", "first, added", "inner", "frozen"])
def test_grad_input(shape, dtype, kind):
    x, y, g = images(SHAPES[shape][0], dtype, 0), output(shape, dtype, 1), output(shape, dtype, 2)
    add = None
    if kind == "first, added":  # of every pixel, or of every other
        add = images(tuple(x.shape) if "stride" not in shape else tuple(x[:, :, ::2, ::2].shape), dtype, 3)
    x_bn = bn_of(x, 4) if kind in ("inner", "frozen") else None
    sums = None if kind == "frozen" else sums_of(y, 20)
    given = (g, y, bn_of(y, 10), sums, weight_of(shape, dtype), x, x_bn, add, *SHAPES[shape][3:])
    scale = dict.fromkeys((1, 2), rounded(dtype, x[:, 0].numel()))
    check("prologue_conv_grad_input", *given, scale=scale)


@pytest.mark.parametrize(("shape", "dtype"), CASES, ids=str)
@pytest.mark.parametrize("kind", ["first", "inner", "frozen"])
def test_grad_weight(shape, dtype, kind):
    x, y, g = images(SHAPES[shape][0], dtype, 0), output(shape, dtype, 1), output(shape, dtype, 2)
    x_bn = None if kind == "first" else bn_of(x, 4)
    sums = None if kind == "frozen" else sums_of(y, 20)
    _, _, kernel, *conv = SHAPES[shape]
    check("prologue_conv_grad_weight", g, y, bn_of(y, 10), sums, x, x_bn, kernel, *conv, scale={0: y[:, 0].numel()})


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", POINTWISE)
@pytest.mark.parametrize("normalised", [True, False])
def test_moments(shape, dtype, normalised):
    x, stride = images(SHAPES[shape][0], dtype, 0), SHAPES[shape][3]
    count = x[:, 0, :: stride[0], :: stride[1]].numel()
    check("prologue_moments", x, bn_of(x, 1) if normalised else None, stride, scale={0: rounded(dtype), 1: 9.0 * count})


def test_moments_far_from_zero():
    """In float32 what is squared is the distance to the first pixel: nothing cancels."""
    x = like(images((2, 24, 7, 7), torch.float32, 0) * 0.01 + 1000.0)
    check("prologue_moments", x, None, (1, 1), scale={0: 1e3, 1: 98 * 1e-3})


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", POINTWISE)
@pytest.mark.parametrize("second", ["", "projection", "identity"])
def test_end(shape, dtype, second):
    """Forward and backward of the products of the Gram form."""
    x, stride, weight = images(SHAPES[shape][0], dtype, 0), SHAPES[shape][3], weight_of(shape, dtype)
    columns = weight.shape[0]
    g = output(shape, dtype, 3)
    bn = bn_of(x, 4) if second and stride == (1, 1) else None
    shift = guarded((columns,), torch.float32, seed=5)
    x2 = weight2 = residual = None
    if second == "projection":
        x2 = images((x.shape[0], 19, 2 * g.shape[2] - 1, 2 * g.shape[3]), dtype, 6)
        weight2 = guarded((columns, 19, 1, 1), dtype, seed=7, std=0.2)
    elif second == "identity":
        residual = output(shape, dtype, 8)
    given = (x, bn, weight, x2, weight2, shift, residual, stride, (2, 2), "relu" if second else None)
    check("prologue_end_forward", *given, scale={0: rounded(dtype)})
    check("prologue_products", g, x, bn, stride, scale={0: 3.0 * g[:, 0].numel(), 1: 3.0 * g[:, 0].numel()})
    square = guarded((x.shape[1],) * 2, dtype, seed=9, std=0.1) if second else None
    inward = guarded((x.shape[1],), torch.float32, seed=10) if second else None
    scaled = guarded((columns, x.shape[1]), dtype, seed=11, std=0.2)
    scale = dict.fromkeys((1, 2), rounded(dtype, g[:, 0].numel(), 10.0))
    check("prologue_end_backward", g, scaled, x, bn, square, inward, stride, scale=scale)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("masked", [True, False])
def test_mask(dtype, masked):
    grad, y, out = (images((2, 35, 5, 7), dtype, seed) for seed in range(3))
    given = (grad, out if masked else None, y, *bn_of(y, 4)[:2], EPS)
    check("bn_mask_backward", *given, scale={1: 70.0 * 9, 2: 70.0})


def test_64_bit_offsets(monkeypatch):
    monkeypatch.setattr(prologue.conv, "WIDE_FROM", 0)
    x, bn = images(SHAPES["3x3-stride"][0], torch.bfloat16, 0), None
    conv = SHAPES["3x3-stride"][3:]
    check("prologue_conv_forward", x, bn, weight_of("3x3-stride", torch.bfloat16), *conv, False, None, None, 0.0)
    y, g = output("3x3-stride", torch.bfloat16, 1), output("3x3-stride", torch.bfloat16, 2)
    check("prologue_conv_grad_weight", g, y, bn_of(y, 4), None, x, None, (3, 3), *conv, scale={0: 60.0})


TILE = {"BM": 64, "BN": 32, "BK": 32, "GROUP_M": 2, "LOOPS": 1, "SPLITS": 1, "PERSISTENT": 0}
TILE |= {"num_warps": 4, "num_stages": 2}


@pytest.mark.parametrize(("splits", "loops"), [(2, 1), (16, 3)])
@pytest.mark.parametrize("shape", ["1x1-ragged", "1x1-stride", "3x3", "3x3-stride"])
def test_split_inner_axis(shape, splits, loops, monkeypatch):
    """Every epilogue after the sums of the programs that share a tile; more programs than steps, too."""
    kernels = []
    monkeypatch.setattr(
        prologue, "launch", lambda kernel, *args, **meta: kernels.append(kernel) or launch(kernel, *args, **meta)
    )
    launch = runtime.launch
    x, conv, weight = images(SHAPES[shape][0], torch.bfloat16, 0), SHAPES[shape][3:], weight_of(shape, torch.bfloat16)
    y, g = output(shape, x.dtype, 1), output(shape, x.dtype, 2)
    sums = dict.fromkeys((1, 2), rounded(x.dtype, x[:, 0].numel()))
    add = images(tuple(x[:, :, :: conv[0][0], :: conv[0][1]].shape), x.dtype, 3)
    with configs.override(prologue.CONV, TILE | {"SPLITS": splits, "LOOPS": loops}):
        given = (x, bn_of(x, 1), weight, *conv, True, None, None, 0.0)
        check("prologue_conv_forward", *given, scale=dict.fromkeys((1, 2), rounded(x.dtype)))
        for x_bn, more in ((bn_of(x, 4), None), (None, add)):
            given = (g, y, bn_of(y, 10), sums_of(y, 20), weight, x, x_bn, more, *conv)
            check("prologue_conv_grad_input", *given, scale=sums)
        if shape in POINTWISE:
            shift, columns = guarded((weight.shape[0],), torch.float32, seed=5), weight.shape[0]
            x2 = images((x.shape[0], 75, 2 * g.shape[2] - 1, 2 * g.shape[3]), x.dtype, 6)
            weight2 = guarded((columns, 75, 1, 1), x.dtype, seed=7, std=0.1)
            for beside in ((x2, weight2, shift, None), (None, None, shift, y)):
                given = (x, None, weight, *beside, conv[0], (2, 2), "relu")
                check("prologue_end_forward", *given, scale={0: rounded(x.dtype)})
            square = guarded((x.shape[1],) * 2, x.dtype, seed=9, std=0.1)
            scaled = guarded((columns, x.shape[1]), x.dtype, seed=11, std=0.2)
            bn = bn_of(x, 4) if conv[0] == (1, 1) else None
            inward = guarded((x.shape[1],), torch.float32, seed=10)
            many = dict.fromkeys((1, 2), rounded(x.dtype, g[:, 0].numel(), 10.0))
            check("prologue_end_backward", g, scaled, x, bn, square, inward, conv[0], scale=many)
    assert kernels == [prologue.prologue_conv_kernel, prologue.prologue_merge_kernel] * (len(kernels) // 2)


def test_only_small_problems_are_split():
    """By themselves; tuning then tries tiles unsplit as well, and larger problems are never split."""
    target = configs.TARGETS["sm_90"]

    def splits(channels: int, columns: int, size: int, batch: int, taps: int) -> tuple[int, set[int]]:
        rows = prologue.power_of_two(batch * size * size)
        key = prologue.Problem("bfloat16", "ieee", False, taps, columns, channels, rows, False)
        found = [config["SPLITS"] for config in configs.candidates(prologue.CONV, key, target)]
        for config in configs.candidates(prologue.CONV, key, target):
            tiles = -(-rows // config["BM"]) * -(-columns // config["BN"])
            assert config["SPLITS"] == 1 or config["SPLITS"] * tiles <= target.multiprocessors
        return found[0], set(found)

    for layer in ((512, 512, 7, 1, 9), (2048, 512, 7, 1, 1), (256, 256, 14, 1, 9)):
        default, tried = splits(*layer)
        assert default > 1
        assert 1 in tried
    for layer in ((64, 64, 56, 8, 9), (512, 512, 7, 256, 9), (64, 256, 56, 8, 1), (64, 64, 7, 1, 1)):
        assert splits(*layer) == (1, {1})


def test_tiles_of_every_shape():
    """A tile larger and one smaller than the matrix, and several loops over the taps."""
    x, weight, conv = images(SHAPES["3x3"][0], torch.bfloat16, 0), weight_of("3x3", torch.bfloat16), SHAPES["3x3"][3:]
    for BM, BN, BK, loops in ((256, 64, 16, 9), (32, 16, 32, 1), (64, 128, 64, 3)):
        config = TILE | {"BM": BM, "BN": BN, "BK": BK, "LOOPS": loops}
        with configs.override(prologue.CONV, config):
            given = (x, bn_of(x, 1), weight, *conv, True, None, None, 0.0)
            check("prologue_conv_forward", *given, scale=dict.fromkeys((1, 2), rounded(x.dtype)))


@pytest.mark.parametrize("parts", [prologue.MANY - 1, prologue.MANY, 21 * prologue.GATHER["BLOCK_P"] + 5])
def test_many_partials_are_merged_by_groups_first(parts):
    """Some of them empty; each is read once, and what finishes them reads few."""
    columns = prologue.GATHER["BLOCK_C"] + 3
    counts = (torch.arange(parts) % 6).double()[:, None].expand(-1, columns)
    means, m2 = (guarded((parts, columns), torch.float32, seed=seed).double() for seed in (0, 1))
    means, m2 = (means + 10) * (counts > 0), m2.square() * (counts > 0)
    mean = (counts * means).sum(0) / counts.sum(0)
    var = (m2 + counts * (means - mean).square()).sum(0) / counts.sum(0)
    partials = like(torch.stack([counts, means, m2]).float())
    few = parts if parts < prologue.MANY else -(-parts // prologue.GATHER["BLOCK_P"])
    with track() as launches:
        fewer = prologue._gathered(partials, True)
        found = bn_act.merged_statistics(fewer, None, None, 0.1, parts)
    assert [launch.loads["partials"].issued for launch in launches] == [t.nbytes for t in (partials, fewer)][
        -len(launches) :
    ]
    assert fewer.shape == (3, few, columns)
    for ours, exact in zip(found, (mean, var), strict=True):
        torch.testing.assert_close(ours.double(), exact, rtol=1e-6, atol=1e-6)
    for numbers in (2, 3):
        sums = guarded((numbers, parts, columns), torch.float32, seed=2)
        with track():
            found = prologue._gathered(sums, False)
        assert found.shape == (numbers, few, columns)
        torch.testing.assert_close(found.double().sum(1), sums.double().sum(1), rtol=1e-5, atol=1e-4)
        assert_guards(sums)


def test_shares_are_added_in_a_fixed_order():
    x = images((4, 24, 9, 9), torch.float32, 0)
    configs.assume("sm_90")
    try:
        with track() as launches:
            first = backend.prologue_moments(x, None, (1, 1))
        assert launches[0].grid[1] > 1
        second = backend.prologue_moments(x, None, (1, 1))
    finally:
        configs.assume("tiny")
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    for one, exact in zip(first, reference.prologue_moments(x.double(), None, (1, 1)), strict=True):
        torch.testing.assert_close(one.double(), exact, rtol=1e-5, atol=1e-4)


def test_the_self_check_passes_and_can_fail(monkeypatch):
    every = selfcheck._inputs
    monkeypatch.setattr(selfcheck, "_inputs", lambda *args: list(every(*args))[1:])  # the small ones
    monkeypatch.setattr(backend, "_tested", {})
    x = torch.ones((1, 2, 2, 2), dtype=torch.bfloat16).to(memory_format=torch.channels_last)
    assert backend.untested("prologue", x) is None
    good = backend.prologue_products
    monkeypatch.setattr(backend, "_tested", {})
    monkeypatch.setattr(backend, "prologue_products", lambda *args: (good(*args)[0] * 1.05, good(*args)[1]))
    with pytest.warns(UserWarning, match="products"):
        assert "differ" in str(backend.untested("prologue", x))


# Whole blocks


def _block(kind: str) -> tuple[fr.blocks.ResidualBlock, int]:
    blocks = {
        "basic": lambda: (fr.BasicBlock(24, 24), 24),
        "basic, stride 2": lambda: (fr.BasicBlock(20, 24, 2, projection(20, 24, 2)), 20),
        "bottleneck": lambda: (fr.Bottleneck(64, 16), 64),
        "bottleneck, stride 2": lambda: (fr.Bottleneck(24, 16, 2, projection(24, 64, 2)), 24),
        "bottleneck, groups": lambda: (fr.Bottleneck(24, 16, 2, projection(24, 64, 2), groups=2, base_width=64), 24),
    }
    return blocks[kind]()


PLANS = (Plan(True, True, "balanced", True), Plan(False, False, "low", True))
TRAINED = [(True, dtype, plan) for dtype in (torch.float32, torch.bfloat16) for plan in PLANS]


@pytest.mark.parametrize(("training", "dtype", "plan"), [*TRAINED, (False, torch.bfloat16, PLANS[0])], ids=str)
@pytest.mark.parametrize(
    "kind", ["basic", "basic, stride 2", "bottleneck", "bottleneck, stride 2", "bottleneck, groups"]
)
def test_blocks(kind, training, dtype, plan):
    """At least as accurate as torch's modules in the same dtype, both against float64."""
    torch.manual_seed(0)
    block, inputs = _block(kind)
    if plan.gram and kind.startswith("basic"):
        plan = plan._replace(gram=False)
    for module in block.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
    x = torch.randn(2, inputs, 9, 8).to(dtype).to(memory_format=torch.channels_last)
    block.to(dtype).train(training)
    for module in block.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.float()
    with fr.use_backend("triton"):
        assert_block_within_budget(block, x, plan)
