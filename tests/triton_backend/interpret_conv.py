"""conv_bias_act and eval conv_bn_act: the kernel against float64 and torch, in the interpreter."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
import triton
from harness import DTYPES, assert_close, assert_guards, guarded, like, track
from tolerances import arrange
from torch import Tensor

import fused_resnet as fr
from fused_resnet.backends import reference
from fused_resnet.backends import triton as backend
from fused_resnet.backends.triton import configs, conv

EPS = 1e-3


class Shape(NamedTuple):
    """A convolution: x (N, C, H, W), K output channels."""

    N: int
    C: int
    H: int
    W: int
    K: int
    taps: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1

    @property
    def conv(self) -> tuple[Any, ...]:
        return self.stride, self.padding, self.dilation, self.groups


SHAPES = {
    "1x1": Shape(2, 64, 8, 8, 128),
    "1x1-ragged": Shape(1, 67, 5, 7, 35),
    "1x1-stride": Shape(2, 64, 9, 7, 64, stride=(2, 2)),
    "1x1-padded": Shape(1, 32, 4, 4, 16, padding=(1, 1)),
    "3x3": Shape(2, 64, 8, 8, 64, (3, 3), padding=(1, 1)),
    "3x3-stride": Shape(1, 64, 9, 11, 32, (3, 3), (2, 2), (1, 1)),
    "3x3-dilated": Shape(1, 32, 9, 9, 32, (3, 3), padding=(2, 2), dilation=(2, 2)),
    "3x3-ragged": Shape(1, 20, 7, 5, 70, (3, 3), padding=(1, 1)),
    "3x3-eights": Shape(1, 72, 6, 6, 24, (3, 3), padding=(1, 1)),
    "3x3-one-channel": Shape(1, 1, 6, 7, 1, (3, 3), padding=(1, 1)),
    "stem": Shape(1, 3, 20, 18, 64, (7, 7), (2, 2), (3, 3)),
    "uneven": Shape(2, 8, 7, 12, 16, (1, 5), (1, 3), (0, 4), (1, 2)),
    "one-pixel": Shape(3, 64, 3, 3, 64, (3, 3)),
    "groups-of-4": Shape(1, 64, 6, 6, 64, (3, 3), padding=(1, 1), groups=16),
    "groups-of-6": Shape(1, 30, 5, 5, 30, (3, 3), padding=(1, 1), groups=5),  # tiles begin inside a group
    "groups-of-48": Shape(1, 32, 4, 4, 96, (1, 1), groups=2),
    "groups-of-64": Shape(1, 128, 5, 5, 128, (3, 3), padding=(1, 1), groups=2),
    "groups-widen": Shape(1, 16, 5, 5, 64, (3, 3), (2, 2), (1, 1), groups=4),
}
FEW = ("1x1", "3x3-stride", "stem", "groups-of-4")  # one of each way through the kernel


class Inputs(NamedTuple):
    x: Tensor
    weight: Tensor
    bias: Tensor
    gamma: Tensor
    beta: Tensor
    mean: Tensor
    var: Tensor
    residual: Tensor


def inputs(shape: Shape, dtype: torch.dtype, layout: str = "nhwc", vectors: torch.dtype = torch.float32) -> Inputs:
    N, C, H, W, K, taps, *_ = shape
    x = guarded((N, C, H, W), dtype, layout)
    fan_in = C // shape.groups * taps[0] * taps[1]
    weight = guarded((K, C // shape.groups, *taps), dtype, layout, seed=1, std=fan_in**-0.5)
    out = torch.nn.functional.conv2d(x.new_empty(x.shape, device="meta"), weight.to("meta"), None, *shape.conv)
    residual = guarded(tuple(out.shape), dtype, layout, seed=2)
    bias, gamma, beta, mean = (guarded((K,), vectors, seed=3 + i) for i in range(4))
    return Inputs(x, weight, bias, gamma, beta, mean, like(guarded((K,), vectors, seed=8).abs() + 0.1), residual)


def check(name: str, given: tuple[Any, ...], options: tuple[Any, ...]) -> Tensor:
    """The primitive on guarded tensors against reference.py in the same dtype and in float64; returns the result."""
    exact = [t.detach().double() if isinstance(t, Tensor) else t for t in given]
    with track() as launches:
        ours = getattr(backend, name)(*given, *options)
    assert len(launches) == 1 + (launches[0].meta["SPLITS"] > 1)
    theirs = getattr(reference, name)(*given, *options)
    assert_close(name, ours, theirs, getattr(reference, name)(*exact, *options))
    assert ours.is_contiguous() == theirs.is_contiguous()
    assert_guards(*(t for t in given if isinstance(t, Tensor)))
    return ours


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [(s, d) for s in SHAPES for d in DTYPES if d != torch.float16 or s in FEW],
    ids=lambda value: str(value).removeprefix("torch."),
)
def test_every_shape(shape, dtype):
    i, conv_args = inputs(SHAPES[shape], dtype), SHAPES[shape].conv
    given = (i.x, i.weight, None, i.gamma, i.beta, i.mean, i.var, i.residual)
    check("conv_bn_act_forward", given, (*conv_args, EPS, "relu"))


@pytest.mark.parametrize("shape", FEW)
@pytest.mark.parametrize(
    ("given", "activation"), [("", None), ("bias", "relu"), ("residual", "relu"), ("bias residual", None)]
)
def test_bias_options(shape, given, activation):
    i = inputs(SHAPES[shape], torch.bfloat16, vectors=torch.bfloat16)
    options = (getattr(i, name) if name in given else None for name in ("bias", "residual"))
    check("conv_bias_act_forward", (i.x, i.weight, *options), (*SHAPES[shape].conv, activation))


@pytest.mark.parametrize("given", ["bias gamma", "bias beta residual", "gamma beta", "residual"])
@pytest.mark.parametrize("vectors", [torch.float16, torch.float32], ids=str)
def test_bn_options(given, vectors):
    shape = SHAPES["3x3-stride"]
    i = inputs(shape, torch.float16, vectors=vectors)
    bias, gamma, beta, residual = (
        getattr(i, name) if name in given else None for name in ("bias", "gamma", "beta", "residual")
    )
    if bias is not None and vectors != i.x.dtype:
        bias = like(bias.to(i.x.dtype))  # as torch has it
    given = (i.x, i.weight, bias, gamma, beta, i.mean, i.var, residual)
    check("conv_bn_act_forward", given, (*shape.conv, EPS, None))


@pytest.mark.parametrize("shape", [*FEW, "one-pixel"])
def test_nchw(shape):
    i = inputs(SHAPES[shape], torch.float32, "nchw")
    given = (i.x, i.weight, None, i.gamma, i.beta, i.mean, i.var, i.residual)
    check("conv_bn_act_forward", given, (*SHAPES[shape].conv, EPS, "relu"))


@pytest.mark.parametrize("layout", ["nchw", "sliced", "transposed"])
def test_weight_of_any_strides(layout):
    shape = SHAPES["3x3-stride"]
    i = inputs(shape, torch.float32)
    weight = arrange(i.weight, layout)
    exact = reference.conv_bias_act_forward(i.x.double(), weight.double(), None, None, *shape.conv, None)
    ours = backend.conv_bias_act_forward(i.x, weight, None, None, *shape.conv, None)
    plain = reference.conv_bias_act_forward(i.x, i.weight, None, None, *shape.conv, None)
    assert_close("out", ours, plain, exact)


def test_64_bit_offsets(monkeypatch):
    monkeypatch.setattr(conv, "WIDE_FROM", 0)
    for name in FEW:
        i = inputs(SHAPES[name], torch.bfloat16)
        check("conv_bias_act_forward", (i.x, i.weight, None, i.residual), (*SHAPES[name].conv, "relu"))


def configs_of(shape: Shape) -> list[configs.Config]:
    """The distinct tiles that tuning may try on any architecture; in the interpreter warps and stages are nothing."""
    rows = shape.N * shape.H * shape.W
    problem = conv.Problem("bfloat16", "ieee", shape.taps[0] * shape.taps[1], 1, shape.C, shape.K, shape.groups, rows)
    found = [c for target in configs.TARGETS.values() for c in configs.candidates(conv.CONV, problem, target)]
    return list({tuple((k, c[k]) for k in ("BM", "BN", "BK", "LOOPS")): c for c in found}.values())


@pytest.mark.parametrize(
    "shape",
    [
        pytest.param(Shape(1, 64, 13, 13, 200), id="1x1"),
        pytest.param(Shape(1, 256, 9, 15, 72, (2, 1), padding=(1, 0)), id="2x1"),
    ],
)
def test_every_tile(shape):
    i = inputs(shape, torch.bfloat16)
    found = configs_of(shape)
    assert len(found) >= 6
    for config in found:
        with configs.override(conv.CONV, config):
            check("conv_bias_act_forward", (i.x, i.weight, None, i.residual), (*shape.conv, "relu"))


TILE = {"BM": 64, "BN": 32, "BK": 32, "GROUP_M": 2, "LOOPS": 1, "num_warps": 4, "num_stages": 2}


@pytest.mark.parametrize(("splits", "loops"), [(2, 1), (16, 3)])
@pytest.mark.parametrize("shape", [*FEW, "1x1-ragged", "groups-of-6"])
def test_split_inner_axis(shape, splits, loops):
    """Both epilogues after the sums of the programs that share a tile; more programs than steps, too."""
    i, options = inputs(SHAPES[shape], torch.bfloat16), SHAPES[shape].conv
    with configs.override(conv.CONV, TILE | {"SPLITS": splits, "LOOPS": loops}):
        check("conv_bias_act_forward", (i.x, i.weight, None, i.residual), (*options, "relu"))
        bias = like(i.bias.to(i.x.dtype))
        given = (i.x, i.weight, bias, i.gamma, i.beta, i.mean, i.var, None)
        check("conv_bn_act_forward", given, (*options, EPS, None))


def test_only_small_problems_are_split():
    """By themselves; tuning then tries tiles unsplit as well, and larger problems are never split."""
    target = configs.TARGETS["sm_90"]

    def splits(channels: int, columns: int, size: int, batch: int, taps: int) -> tuple[int, set[int]]:
        rows = conv.power_of_two(batch * size * size)
        key = conv.Problem("bfloat16", "ieee", taps, 1, channels, columns, 1, rows)
        found = configs.candidates(conv.CONV, key, target)
        for config in found:
            tiles = triton.cdiv(rows, config["BM"]) * triton.cdiv(columns, config["BN"])
            assert config["SPLITS"] == 1 or config["SPLITS"] * tiles <= target.multiprocessors
        return found[0]["SPLITS"], {config["SPLITS"] for config in found}

    for layer in ((512, 512, 7, 1, 9), (2048, 512, 7, 1, 1), (256, 256, 14, 1, 9)):
        default, tried = splits(*layer)
        assert default > 1
        assert 1 in tried
    for layer in ((64, 64, 56, 8, 9), (512, 512, 7, 256, 9), (64, 256, 56, 8, 1), (3, 64, 224, 1, 49)):
        assert splits(*layer) == (1, {1})


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize(
    "shape",
    [SHAPES["3x3"], SHAPES["stem"], SHAPES["groups-of-6"], Shape(1, 16, 6, 6, 16, (3, 3), padding=(1, 1), groups=4)],
    ids=["3x3", "stem", "groups-of-6", "groups-of-4"],
)
@pytest.mark.filterwarnings("ignore:invalid value encountered in matmul")
def test_nan_and_infinity_pass_and_stay_in_their_window_and_group(shape, splits, monkeypatch):
    monkeypatch.setattr(conv, "splits_of", lambda *args: splits)
    configs.assume("tiny")  # forget what was picked
    i = inputs(shape, torch.float32)
    i.x[0, 0, 2, 3], i.x[0, shape.C - 1, 4, 4], i.residual[0, 7, 0, 0] = torch.nan, torch.inf, torch.nan
    args = (i.x, i.weight, None, i.residual, *shape.conv)
    for activation in ("relu", None):
        ours, theirs = (f(*args, activation) for f in (backend.conv_bias_act_forward, reference.conv_bias_act_forward))
        assert 0 < theirs.isnan().sum() < theirs.numel()
        assert torch.equal(ours.isnan(), theirs.isnan())
        assert torch.equal(ours.isinf(), theirs.isinf())
        assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-5, equal_nan=True)


def test_a_large_mean_cancels():
    """s * (y - m) + beta; with s * y + t the result would be off by 1."""
    shape = SHAPES["1x1"]
    i = inputs(shape, torch.float32)
    mean = torch.full((shape.K,), 1000.0)
    weight, var = i.weight * 1e-2, torch.full((shape.K,), 1e-4)
    x = like(torch.cat([i.x[:, 1:], torch.ones_like(i.x[:, :1])], 1))
    weight[:, -1] = 1000.0
    given = (x, like(weight), None, i.gamma, i.beta, mean, var, None)
    exact = [t.double() if isinstance(t, Tensor) else t for t in given]
    ours = backend.conv_bn_act_forward(*given, *shape.conv, 0.0, None)
    exact = reference.conv_bn_act_forward(*exact, *shape.conv, 0.0, None)
    assert (ours - exact).abs().max() < 0.02  # one rounding of a sum near 1000, over the standard deviation


@pytest.mark.parametrize(("shape", "layout"), [("3x3-stride", "nchw"), ("stem", "channels_last")])
def test_the_ops_eager_and_compiled(shape, layout):
    shape = SHAPES[shape]
    i = inputs(shape, torch.float32)
    x, weight, residual = (arrange(t, layout) for t in (i.x, i.weight, i.residual))
    options = dict(zip(("stride", "padding", "dilation", "groups"), shape.conv, strict=True))

    def net(x: Tensor) -> Tensor:
        vectors = (i.gamma, i.beta, i.mean, i.var)
        y = fr.ops.conv_bn_act(x, weight, *vectors, residual, bias=i.bias, **options)
        return y + fr.ops.conv_bias_act(x, weight, i.bias, activation=None, **options)

    with fr.use_backend("reference"):
        expected = net(x)
    with fr.use_backend("triton"):
        eager = net(x)
        compiled = torch.compile(net, backend="aot_eager", fullgraph=True)(x)
    for ours in (eager, compiled):
        assert ours.stride() == expected.stride()
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


def test_empty_batch():
    i = inputs(SHAPES["3x3"], torch.float16)
    out = backend.conv_bias_act_forward(i.x[:0], i.weight, None, i.residual[:0], *SHAPES["3x3"].conv, "relu")
    assert out.shape == (0, 64, 8, 8)
    assert out.dtype == torch.float16


def test_what_is_refused():
    def reason(x: Tensor, weight: Tensor, groups: int) -> str | None:
        bias = (None, None, (1, 1), (0, 0), (1, 1), groups, "relu")
        bn = (None,) * 6 + ((1, 1), (0, 0), (1, 1), groups, EPS, "relu")
        found = backend.supports("conv_bias_act_forward", x, weight, *bias)
        assert found == backend.supports("conv_bn_act_forward", x, weight, *bn)
        return found

    x = torch.empty(1, 8, 4, 4)
    assert reason(x, torch.empty(16, 8, 1, 1), 1) is None
    assert reason(x, torch.empty(16, 2, 1, 1), 4) is None
    assert "depthwise" in reason(x, torch.empty(16, 1, 1, 1), 8)
    assert "float64" in reason(x.double(), torch.empty(16, 8, 1, 1).double(), 1)
    assert "no channels" in reason(x[:, :0], torch.empty(16, 0, 1, 1), 1)
    assert "2**31" in reason(torch.empty(1, device="meta").expand(2, 1, 1 << 15, 1 << 15), torch.empty(16, 1, 1, 1), 1)


def test_tf32_follows_the_switch_of_torchs_convolutions():
    x, half = torch.empty(1), torch.empty(1, dtype=torch.float16)
    before = torch.backends.cudnn.conv.fp32_precision
    try:
        for setting in ("tf32", "ieee"):
            torch.backends.cudnn.conv.fp32_precision = setting
            assert conv._precision(x) == setting
            assert conv._precision(half) == "ieee"
    finally:
        torch.backends.cudnn.conv.fp32_precision = before


# The convolutions of ResNet-50 at 224x224, one of each kind: (shape, has a residual).
RESNET50 = {
    "stem": (Shape(1, 3, 224, 224, 64, (7, 7), (2, 2), (3, 3)), False),
    "stage 1 3x3": (Shape(1, 64, 56, 56, 64, (3, 3), padding=(1, 1)), False),
    "stage 1 widen": (Shape(1, 64, 56, 56, 256), True),
    "stage 2 projection": (Shape(1, 256, 56, 56, 512, stride=(2, 2)), False),
    "stage 3 narrow": (Shape(1, 1024, 14, 14, 256), False),
}


@pytest.mark.parametrize("layer", RESNET50)
def test_traffic(layer):
    """Every byte of I, O, W and the residual is needed once; how often it is asked for (the L2 serves the rest)."""
    shape, has_residual = RESNET50[layer]
    N, C, H, W, K, taps, stride, *_ = shape
    i = inputs(shape, torch.bfloat16)
    P, Q = i.residual.shape[2:]
    rows = conv.power_of_two(256 * P * Q)
    problem = conv.Problem("bfloat16", "ieee", taps[0] * taps[1], stride[0], C, K, 1, rows)
    config = conv.SPACE.default(configs.TARGETS["sm_90"], problem)  # of a large batch
    large = config | {"BM": 512}  # fewer programs to interpret: only the weight is asked for less often
    with track() as launches, configs.override(conv.CONV, large):
        backend.conv_bias_act_forward(i.x, i.weight, None, i.residual if has_residual else None, *shape.conv, "relu")
    (launch,) = launches
    pixels = P * Q if taps == (1, 1) else H * W  # a 1x1 kernel of stride 2 skips three pixels in four
    model = 2 * (N * pixels * C + N * P * Q * K * (1 + has_residual) + i.weight.numel())
    assert launch.total.unique == pytest.approx(model, rel=0.05)
    assert launch.stores["out"].issued == launch.stores["out"].unique
    weight = launch.loads["weight"]
    assert weight.issued == weight.unique * triton.cdiv(N * P * Q, 512)
    assert launch.loads["x"].issued <= 1.05 * 2 * N * P * Q * C * taps[0] * taps[1] * triton.cdiv(K, config["BN"])
    issued = launch.total.issued - weight.issued + weight.unique * triton.cdiv(N * P * Q, config["BM"])
    print(f"{layer}: {launch.total.unique / 1e6:.2f} MB, asked for {issued / launch.total.unique:.2f} times")
