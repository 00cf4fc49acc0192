"""csrc's own convolution: against float64 over shapes that reach every way it cuts its work."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import threads
from convs import channels_last, guarded
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from fused_resnet import dispatch, emulation
from fused_resnet.backends import cpp, library

reason = cpp.conv_unavailable()
pytestmark = pytest.mark.skipif(reason is not None, reason=str(reason))


def packed_by(name: str, panel: int) -> Callable[..., Tensor]:
    """`conv` of a weight that was packed before; a packed one comes with a bias."""

    def conv(x: Tensor, weight: Tensor, bias: Any, residual: Any, *options: Any, out: Tensor | None = None) -> Tensor:
        bias = torch.zeros(weight.shape[0]) if bias is None else bias
        return cpp._direct(x, getattr(cpp._ops, name)(weight, panel), bias, residual, out, *options)

    return conv


DIRECT = {f"panels of {panel}": packed_by("conv_pack", panel) for panel in (32, 64)}
conv = DIRECT["panels of 32"]
BY_WINOGRAD = {f"panels of {panel}": packed_by("winograd_pack", panel) for panel in (32, 64)}


def check(
    n: int,
    c: int,
    size: tuple[int, int],
    k: int,
    kernel: tuple[int, int],
    stride: Any,
    padding: Any,
    dilation: Any,
    conv: Callable[..., Tensor] = conv,
) -> None:
    """With and without bias, residual and ReLU; the residual apart and written over; nothing around the output."""
    x, weight, bias = channels_last(n, c, *size), torch.randn(k, c, *kernel), torch.randn(k)
    exact = F.conv2d(x.double(), weight.double(), None, stride, padding, dilation)
    torchs = F.conv2d(x, weight, None, stride, padding, dilation)
    residual = channels_last(*exact.shape)
    typical = (exact.numel() * c * kernel[0] * kernel[1]) ** 0.5  # a few outputs may be small by chance
    budget = 2 * (torchs - exact).norm() / exact.norm().clamp(min=typical) + 4 * torch.finfo(x.dtype).eps
    for b, r, activation in (
        (None, None, None),
        (bias, None, "relu"),
        (bias, residual, "relu"),
        (None, residual, None),
    ):
        expected = exact if b is None else exact + b.double().view(-1, 1, 1)
        expected = expected if r is None else expected + r
        expected = expected.relu() if activation else expected
        onto = r.clone(memory_format=torch.channels_last) if r is not None else None
        results = [conv(x, weight, b, r, stride, padding, dilation, activation)]
        with guarded(n, k, *expected.shape[2:]) as inner:
            results.append(conv(x, weight, b, r, stride, padding, dilation, activation, out=inner))
        if onto is not None:
            results.append(conv(x, weight, b, onto, stride, padding, dilation, activation, out=onto))
        for y in results:
            assert (y - expected).norm() <= budget * expected.norm().clamp(min=typical)
            assert torch.equal(y, results[0])


SHAPES = {
    "stem": (2, 3, (37, 45), 64, (7, 7), (2, 2), (3, 3), (1, 1)),
    "1x1": (2, 64, (19, 13), 64, (1, 1), (1, 1), (0, 0), (1, 1)),
    "1x1, one pixel": (1, 40, (1, 1), 32, (1, 1), (1, 1), (0, 0), (1, 1)),
    "1x1, crowded": (2, 1024, (7, 9), 96, (1, 1), (1, 1), (0, 0), (1, 1)),
    "1x1, crowded, in parts": (1, 2048, (7, 7), 64, (1, 1), (1, 1), (0, 0), (1, 1)),
    "1x1, sampled": (2, 64, (15, 14), 128, (1, 1), (2, 2), (0, 0), (1, 1)),
    "1x1, sampled, crowded": (2, 512, (15, 14), 128, (1, 1), (2, 2), (0, 0), (1, 1)),
    "1x1, padded": (1, 16, (5, 6), 32, (1, 1), (1, 1), (1, 2), (1, 1)),
    "3x3": (2, 64, (20, 17), 64, (3, 3), (1, 1), (1, 1), (1, 1)),
    "3x3, two rows a tile": (1, 128, (7, 7), 64, (3, 3), (1, 1), (1, 1), (1, 1)),
    "3x3, in parts": (1, 320, (7, 5), 64, (3, 3), (1, 1), (1, 1), (1, 1)),
    "3x3, crowded, in parts": (2, 512, (9, 8), 64, (3, 3), (2, 2), (1, 1), (1, 1)),
    "3x3, stride 2": (3, 48, (14, 14), 96, (3, 3), (2, 2), (1, 1), (1, 1)),
    "3x3, dilated": (2, 32, (21, 19), 64, (3, 3), (1, 1), (2, 2), (2, 2)),
    "3x3, dilated in a row, in parts": (1, 256, (9, 12), 32, (3, 3), (1, 1), (1, 4), (1, 4)),
    "no padding": (2, 24, (9, 11), 32, (3, 3), (1, 1), (0, 0), (1, 1)),
    "1x5, long": (1, 700, (4, 9), 32, (1, 5), (1, 2), (0, 2), (1, 1)),
    "channels that 32 does not divide": (2, 5, (9, 9), 43, (3, 3), (1, 1), (1, 1), (1, 1)),
    "fewer channels than a vector": (2, 17, (9, 9), 3, (3, 2), (1, 1), (1, 1), (1, 1)),
}


@pytest.mark.parametrize("conv", DIRECT.values(), ids=DIRECT)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_against_float64(shape: Any, conv: Callable[..., Tensor]) -> None:
    check(*shape, conv=conv)


@given(st.data(), st.sampled_from([*DIRECT.values()]))
@settings(max_examples=60, deadline=None)
def test_any_shape(data: st.DataObject, conv: Callable[..., Tensor]) -> None:
    draw = lambda least, most: data.draw(st.integers(least, most))  # noqa: E731
    kernel, dilation = (draw(1, 4), draw(1, 4)), (draw(1, 3), draw(1, 3))
    stride, padding = (draw(1, 3), draw(1, 3)), tuple(draw(0, size - 1) for size in kernel)
    least = [dilation[i] * (kernel[i] - 1) + 1 for i in range(2)]
    size = tuple(draw(least[i], least[i] + 40) for i in range(2))
    torch.manual_seed(0)
    check(draw(1, 3), draw(1, 40), size, draw(1, 70), kernel, stride, padding, dilation, conv)


POOLED = {
    "a stem": (2, 3, (37, 45), 64, (7, 7), (2, 2), (3, 3), (1, 1)),
    "several rows of several blocks": (1, 3, (224, 120), 64, (7, 7), (2, 2), (3, 3), (1, 1)),
    "a deep stem": (2, 32, (22, 19), 64, (3, 3), (1, 1), (1, 1), (1, 1)),
    "no padding": (1, 4, (12, 13), 43, (3, 3), (1, 2), (0, 0), (1, 1)),
    "one row": (1, 5, (1, 9), 16, (1, 5), (1, 1), (0, 2), (1, 1)),
    "one output": (3, 2, (2, 2), 7, (2, 2), (1, 1), (0, 0), (1, 1)),
    "long rows": (1, 2, (9, 1700), 64, (3, 3), (1, 1), (1, 1), (1, 1)),
}


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("shape", POOLED.values(), ids=POOLED)
def test_pooled(shape: Any, biased: bool) -> None:
    """Bit for bit the conv's own output, pooled; NaN and all; of NCHW images too."""
    n, c, size, k, kernel, *geometry = shape
    x, weight, bias = channels_last(n, c, *size), torch.randn(k, c, *kernel), torch.randn(k) if biased else None
    x[0, 0, 0, -1] = torch.nan
    expected = F.max_pool2d(conv(x, weight, bias, None, *geometry, "relu"), 3, 2, 1)
    make = cpp.relu_pool(x, weight, bias, *geometry, 1)
    assert make is not None
    for count, images in itertools.product((1, 2), (x, x.contiguous())):
        with threads(count):
            y = make(images)
        assert y.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(y, expected, rtol=0, atol=0, equal_nan=True)
    assert expected.isnan().any()


def test_what_is_not_pooled_at_once() -> None:
    x = channels_last(1, 8, 6, 6)
    for weight, groups in ((torch.randn(32, 8, 1, 1), 1), (torch.randn(32, 4, 3, 3), 2)):
        assert cpp.relu_pool(x, weight, None, (1, 1), (1, 1), (1, 1), groups) is None
    assert cpp.relu_pool(x.double(), torch.randn(32, 8, 3, 3).double(), None, (1, 1), (1, 1), (1, 1), 1) is None
    packed = cpp._ops.conv_pack(torch.randn(32, 8, 1, 1), 32)
    with pytest.raises(RuntimeError, match="larger than 1x1"):
        torch.ops.fused_resnet_cpp.conv_relu_pool(x, packed, None, channels_last(1, 32, 3, 3), 1, 1, 0, 0, 1, 1)
    packed = cpp._ops.conv_pack(torch.randn(32, 8, 3, 3), 32)
    with pytest.raises(RuntimeError, match="sizes of the convolution's result"):
        torch.ops.fused_resnet_cpp.conv_relu_pool(x, packed, None, channels_last(1, 32, 6, 6), 1, 1, 1, 1, 1, 1)


WINOGRAD = {
    "one block": (1, 32, (6, 8), 64, (1, 1)),
    "odd sizes, several blocks": (3, 48, (17, 21), 96, (1, 1)),
    "one image, many channels": (1, 256, (7, 7), 64, (1, 1)),
    "long chains": (2, 320, (5, 4), 32, (1, 1)),
    "no padding": (2, 16, (9, 11), 32, (0, 0)),
    "uneven padding": (1, 16, (4, 9), 32, (0, 2)),
    "wide padding": (2, 16, (3, 2), 40, (3, 4)),
    "one output": (2, 16, (3, 3), 3, (0, 0)),
    "channels that 32 does not divide": (1, 16, (8, 8), 43, (1, 1)),
}


@pytest.mark.parametrize("conv", BY_WINOGRAD.values(), ids=BY_WINOGRAD)
@pytest.mark.parametrize("shape", WINOGRAD.values(), ids=WINOGRAD)
def test_winograd_against_float64(shape: Any, conv: Callable[..., Tensor]) -> None:
    *sizes, padding = shape
    check(*sizes, (3, 3), (1, 1), padding, (1, 1), conv)


@given(st.data(), st.sampled_from([*BY_WINOGRAD.values()]))
@settings(max_examples=60, deadline=None)
def test_winograd_any_shape(data: st.DataObject, conv: Callable[..., Tensor]) -> None:
    draw = lambda least, most: data.draw(st.integers(least, most))  # noqa: E731
    padding = (draw(0, 3), draw(0, 3))
    size = (draw(max(1, 3 - 2 * padding[0]), 40), draw(max(1, 3 - 2 * padding[1]), 40))
    torch.manual_seed(0)
    check(draw(1, 3), 16 * draw(1, 4), size, draw(1, 70), (3, 3), (1, 1), padding, (1, 1), conv)


def weight_in(layout: str, k: int, c: int, r: int, s: int) -> Tensor:
    if layout == "strided":
        return torch.randn(r, s, c, 2 * k)[..., ::2].permute(3, 2, 0, 1)
    weight = torch.randn(k, c, r, s)
    return weight.contiguous(memory_format=torch.channels_last) if layout == "channels_last" else weight


@pytest.mark.parametrize("panel", [32, 64])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "strided"])
def test_winograd_weights(layout: str, panel: int) -> None:
    """G w G' in float64, rounded once, for each of 16 points a matrix (C, panel)."""
    weight = weight_in(layout, 40, 16, 3, 3)
    g = torch.tensor([[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]], dtype=torch.float64)
    packed = cpp._ops.winograd_pack(weight, panel)
    assert packed.shape == (-(-40 // panel), 4, 4, 1, 16, panel)
    rows = packed.squeeze(3).permute(0, 4, 3, 1, 2).reshape(64, 16, 4, 4)
    torch.testing.assert_close(rows[:40], (g @ weight.double() @ g.T).float(), rtol=2**-23, atol=1e-12)
    assert not rows[40:].any()


def test_winograd_keeps_nan() -> None:
    """In each patch that meets it: where the direct conv has it, and up to two pixels further."""
    x, weight = channels_last(1, 16, 12, 12), torch.randn(32, 16, 3, 3)
    x[0, 3, 5, 6] = torch.nan
    y = BY_WINOGRAD["panels of 32"](x, weight, None, None, (1, 1), (1, 1), (1, 1), "relu")
    assert y[0, :, 4:7, 5:8].isnan().all()
    assert not y[0, :, [0, 1, 8, 11]].isnan().any()


@pytest.mark.parametrize("conv", [*DIRECT.values(), *BY_WINOGRAD.values()])
def test_threads_and_batches_do_not_change_a_bit(conv: Callable[..., Tensor]) -> None:
    options = ((1, 1), (1, 1), (1, 1), "relu")
    x, weight, bias = channels_last(3, 64, 14, 14), torch.randn(64, 64, 3, 3), torch.randn(64)
    results = []
    for count in (1, 2, 3):
        with threads(count):
            results.append(conv(x, weight, bias, None, *options))
    assert all(torch.equal(results[0], y) for y in results)
    for i in range(3):
        one = x[i : i + 1].contiguous(memory_format=torch.channels_last)
        assert torch.equal(conv(one, weight, bias, None, *options), results[0][i : i + 1])


def test_nan_stays() -> None:
    x, weight = channels_last(1, 8, 6, 6), torch.randn(32, 8, 1, 1)
    x[0, 3, 2, 4] = torch.nan
    y = conv(x, weight, None, None, (1, 1), (0, 0), (1, 1), "relu")
    assert y[0, :, 2, 4].isnan().all()
    assert y.isnan().sum() == 32


@pytest.mark.parametrize("panel", [32, 64])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "strided"])
def test_packed_weights(layout: str, panel: int) -> None:
    weight = weight_in(layout, 70, 9, 3, 2)
    packed = cpp._ops.conv_pack(weight, panel)
    assert packed.shape == (-(-70 // panel), 3, 2, 9, panel)
    rows = packed.permute(0, 4, 3, 1, 2).flatten(0, 1)
    assert torch.equal(rows[:70], weight)
    assert not rows[70:].any()


def test_wrong_operands_are_refused() -> None:
    x, out = channels_last(1, 8, 6, 6), channels_last(1, 32, 6, 6)
    packed = cpp._ops.conv_pack(torch.randn(32, 8, 3, 3), 32)
    call = torch.ops.fused_resnet_cpp.conv_bias_act.default
    good = (x, packed, None, None, out, 1, 1, 1, 1, 1, 1, True)
    call(*good)
    for index, wrong, message in (
        (0, x.contiguous(), "channels_last"),
        (0, x.double(), "float32"),
        (1, cpp._ops.conv_pack(torch.randn(32, 9, 3, 3), 32), "packed for x's channels"),
        (2, torch.randn(31), "one element per channel"),
        (3, channels_last(1, 32, 5, 6), "sizes of x"),
        (4, channels_last(1, 32, 5, 6), "sizes of the convolution's result"),
        (1, torch.randn(1, 3, 3, 8, 48), "panels of 32 or 64"),
        (1, cpp._ops.winograd_pack(torch.randn(32, 8, 3, 3), 32), "multiple of 16"),
        (5, 0, "must be positive"),
    ):
        with pytest.raises(RuntimeError, match=message):
            call(*good[:index], wrong, *good[index + 1 :])


@pytest.mark.parametrize(
    ("x", "k", "groups", "why"),
    [
        (channels_last(1, 8, 6, 6), 32, 1, None),
        (channels_last(2, 8, 6, 6), 32, 1, None),
        (channels_last(1, 8, 6, 6), 48, 1, "wastes work on 48"),
        (channels_last(1, 8, 6, 6), 32, 2, "ungrouped"),
        (torch.randn(1, 8, 6, 6), 32, 1, "channels_last"),
        (channels_last(1, 8, 6, 6).bfloat16(), 32, 1, "float32"),
    ],
    ids=["served", "batch", "channels", "groups", "layout", "dtype"],
)
def test_the_automatic_choice(x: Tensor, k: int, groups: int, why: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(emulation, "_has_instructions", lambda dtype: True)
    weight = torch.randn(k, x.shape[1] // groups, 3, 3, dtype=x.dtype)
    geometry = ((1, 1), (1, 1), (1, 1), groups)
    if library.supports("conv_bias_act_forward", x, weight, *geometry, "relu") is not None:
        pytest.skip("oneDNN does not serve this call here, so that csrc does")
    choice = dispatch.choose("conv_bias_act_forward", x, weight, *geometry, "relu")
    assert choice.backend == ("cpp" if why is None else "library")
    assert why is None or why in dict(choice.skipped)["cpp"]
    assert dispatch.choose("conv_bias_act_forward", x, weight, None, None, *geometry, "relu").backend == "library"
    y = choice.function(x, weight, None, None, *geometry, "relu")
    torch.testing.assert_close(y, F.conv2d(x, weight, None, 1, 1, 1, groups).relu(), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize(
    ("shape", "kernel", "stride", "dilation", "why"),
    [
        ((2, 32, 8, 8), 1, 1, 1, None),
        ((2, 32, 8, 8), 3, 1, 1, None),
        ((1, 32, 8, 8), 3, 2, 1, None),
        ((2, 3, 8, 8), 7, 2, 1, None),
        ((2, 32, 8, 8), 3, 2, 1, "faster for batches"),
        ((2, 32, 2, 1), 3, 1, 1, "faster for batches"),
        ((1, 32, 8, 8), 3, 1, 2, "products with padding"),
    ],
    ids=["1x1", "winograd", "stride 2", "stem", "stride 2, batch", "too small for winograd", "dilated"],
)
def test_the_automatic_choice_by_geometry(
    shape: tuple[int, ...], kernel: int, stride: int, dilation: int, why: str | None
) -> None:
    x, weight = channels_last(*shape), torch.randn(64, shape[1], kernel, kernel)
    pad = dilation * (kernel // 2)
    choice = dispatch.choose(
        "conv_bias_act_forward", x, weight, (stride, stride), (pad, pad), (dilation, dilation), 1, "relu"
    )
    assert choice.backend == ("cpp" if why is None else "library")
    assert why is None or why in dict(choice.skipped)["cpp"]
