"""Convolutions in training on the CPU: csrc's kernels for the output, the input's gradient and the weight's."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from conftest import threads
from convs import channels_last, guarded
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import assert_block_within_budget, projection
from torch import Tensor, nn
from torch.nn import functional as F

import fused_resnet as fr
from fused_resnet import dispatch, emulation
from fused_resnet.backends import cpp, reference
from fused_resnet.ops import residual_block as rb
from fused_resnet.ops.conv import conv2d

reason = cpp.conv_unavailable()
pytestmark = pytest.mark.skipif(reason is not None, reason=str(reason))


@pytest.fixture(autouse=True)
def whatever_the_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small tensors take the ways of large ones."""
    monkeypatch.setattr(cpp, "_PACKED_AT_EACH_CALL", 0)
    monkeypatch.setattr(cpp, "_WINOGRAD_AT_EACH_CALL", 0)


def assert_as_exact(name: str, ours: Tensor, torchs: Tensor, exact: Tensor, terms: int) -> None:
    """In the 2-norm within twice torch's error and 4 units in the last place of what `terms` products add up to."""
    typical = (exact.numel() * terms) ** 0.5
    budget = 2 * (torchs - exact).norm() + 4 * torch.finfo(ours.dtype).eps * exact.norm().clamp(min=typical)
    assert ours.shape == exact.shape
    assert (ours - exact).norm() <= budget, f"{name}: {(ours - exact).norm() / budget:.2f} times the budget"


# ---- the weight's gradient by Winograd's algorithm -------------------------------------------------------------------

WINOGRAD = {
    "one patch": (1, 16, (2, 2), 16, (1, 1)),
    "all points together, splits": (3, 48, (37, 41), 64, (1, 1)),
    "a panel and a part of one": (2, 80, (9, 11), 32, (1, 1)),
    "blocks of both": (1, 192, (12, 13), 208, (1, 1)),
    "blocks and splits": (2, 128, (40, 38), 96, (1, 1)),
    "no padding": (2, 32, (9, 12), 48, (0, 0)),
    "wide, uneven padding": (2, 16, (3, 6), 16, (4, 2)),
    "one row": (4, 32, (1, 17), 64, (1, 1)),
}


def winograd_gradient(x: Tensor, grad: Tensor, padding: tuple[int, int]) -> Tensor:
    with guarded(grad.shape[1], x.shape[1], 3, 3) as out:
        cpp._ops.winograd_gradient.default(x, grad, out, *padding)
    return out


def check_winograd_gradient(n: int, c: int, size: tuple[int, int], k: int, padding: tuple[int, int]) -> None:
    x = channels_last(n, c, *size) + 0.5
    grad = channels_last(*F.conv2d(x, x.new_zeros(k, c, 3, 3), padding=padding).shape)
    of = lambda x, grad: torch.nn.grad.conv2d_weight(x, (k, c, 3, 3), grad, padding=padding)  # noqa: E731
    ours = winograd_gradient(x, grad, padding)
    assert_as_exact("dw", ours, of(x, grad), of(x.double(), grad.double()), n * grad.shape[2] * grad.shape[3])


@pytest.mark.parametrize("shape", WINOGRAD.values(), ids=WINOGRAD)
def test_winograd_gradient(shape: Any) -> None:
    check_winograd_gradient(*shape)


@given(st.data())
@settings(max_examples=40, deadline=None)
def test_winograd_gradient_of_any_shape(data: st.DataObject) -> None:
    draw = lambda least, most: data.draw(st.integers(least, most))  # noqa: E731
    padding = (draw(0, 3), draw(0, 3))
    size = (draw(max(1, 3 - 2 * padding[0]), 40), draw(max(1, 3 - 2 * padding[1]), 40))
    torch.manual_seed(0)
    check_winograd_gradient(draw(1, 3), 16 * draw(1, 9), size, 16 * draw(1, 9), padding)


def test_threads_do_not_change_a_bit_of_it() -> None:
    x, grad = channels_last(4, 64, 40, 40), channels_last(4, 128, 40, 40)
    results = []
    for count in (1, 2, 3):
        with threads(count):
            results.append(winograd_gradient(x, grad, (1, 1)))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_empty_batches_have_no_gradient() -> None:
    assert not winograd_gradient(channels_last(0, 16, 5, 5), channels_last(0, 16, 5, 5), (1, 1)).any()


def test_wrong_operands_are_refused() -> None:
    good = (channels_last(1, 16, 5, 5), channels_last(1, 32, 5, 5), channels_last(32, 16, 3, 3), 1, 1)
    cpp._ops.winograd_gradient.default(*good)
    for index, wrong, message in (
        (0, good[0].double(), "float32"),
        (0, channels_last(1, 16, 5, 4), "sizes of a 3x3 convolution"),
        (1, good[1].contiguous(), "channels_last"),
        (2, channels_last(32, 16, 3, 2), r"\(K, C, 3, 3\)"),
        (3, 0, "sizes of a 3x3 convolution"),
    ):
        with pytest.raises(RuntimeError, match=message):
            cpp._ops.winograd_gradient.default(*good[:index], wrong, *good[index + 1 :])
    odd = (channels_last(1, 8, 5, 5), channels_last(1, 32, 5, 5), channels_last(32, 8, 3, 3), 1, 1)
    with pytest.raises(RuntimeError, match="multiples of 16"):
        cpp._ops.winograd_gradient.default(*odd)


# ---- the weight's gradient tap by tap --------------------------------------------------------------------------------

TAPS = {  # n, c, size, k, kernel, stride, padding, dilation
    "3x3, stride 2": (3, 64, (19, 22), 64, (3, 3), (2, 2), (1, 1), (1, 1)),
    "splits": (2, 32, (61, 64), 48, (3, 3), (2, 2), (1, 1), (1, 1)),
    "blocks of both": (1, 320, (9, 8), 272, (3, 3), (2, 2), (1, 1), (1, 1)),
    "dilated, uneven": (2, 40, (11, 9), 33, (3, 2), (1, 3), (2, 0), (2, 1)),
    "1x1, padded": (2, 64, (5, 4), 16, (1, 1), (2, 1), (1, 1), (1, 1)),
    "few channels": (2, 3, (20, 21), 7, (7, 7), (2, 2), (3, 3), (1, 1)),
}


def check_conv_gradient(n: int, c: int, size: tuple[int, int], k: int, kernel: tuple[int, int], *geometry: Any) -> None:
    x = channels_last(n, c, *size) + 0.5
    grad = channels_last(*F.conv2d(x, x.new_zeros(k, c, *kernel), None, *geometry).shape)
    results = []
    for count in (1, 2, 3):
        with threads(count), guarded(k, c, *kernel) as ours:
            cpp._ops.conv_gradient.default(x, grad, ours, *(value for pair in geometry for value in pair))
        results.append(ours)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])
    of = lambda x, grad: torch.nn.grad.conv2d_weight(x, (k, c, *kernel), grad, *geometry)  # noqa: E731
    assert_as_exact("dw", ours, of(x, grad), of(x.double(), grad.double()), n * grad.shape[2] * grad.shape[3])


@pytest.mark.parametrize("shape", TAPS.values(), ids=TAPS)
def test_gradient_tap_by_tap(shape: Any) -> None:
    check_conv_gradient(*shape)


@given(st.data())
@settings(max_examples=40, deadline=None)
def test_gradient_tap_by_tap_of_any_shape(data: st.DataObject) -> None:
    draw = lambda least, most: data.draw(st.integers(least, most))  # noqa: E731
    kernel, dilation = (draw(1, 4), draw(1, 4)), (draw(1, 3), draw(1, 3))
    stride, padding = (draw(1, 3), draw(1, 3)), (draw(0, 3), draw(0, 3))
    least = [max(1, dilation[i] * (kernel[i] - 1) + 1 - 2 * padding[i]) for i in range(2)]
    size = (draw(least[0], least[0] + 30), draw(least[1], least[1] + 30))
    torch.manual_seed(0)
    check_conv_gradient(draw(1, 3), draw(1, 70), size, draw(1, 70), kernel, stride, padding, dilation)


def test_wrong_operands_of_it_are_refused() -> None:
    good = (channels_last(1, 16, 6, 6), channels_last(1, 32, 3, 3), channels_last(32, 16, 3, 3), 2, 2, 1, 1, 1, 1)
    cpp._ops.conv_gradient.default(*good)
    for index, wrong, message in (
        (0, good[0].double(), "float32"),
        (1, channels_last(1, 32, 3, 2), "sizes of a convolution"),
        (2, channels_last(32, 8, 3, 3), "sizes of a convolution"),
        (3, 0, "must be positive"),
    ):
        with pytest.raises(RuntimeError, match=message):
            cpp._ops.conv_gradient.default(*good[:index], wrong, *good[index + 1 :])


# ---- what the Gram form asks for -------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1, 32), (70, 96), (1500, 64), (5000, 160)], ids=str)
@pytest.mark.parametrize("offset", [0.0, 100.0])
def test_second_moments(shape: tuple[int, int], offset: float) -> None:
    """No digits are lost where the mean is large; symmetric to the bit, whatever the number of threads."""
    rows = torch.randn(shape) * torch.rand(shape[1]) + offset
    exact_mean, exact = reference.second_moments(rows.double())
    results = []
    for count in (1, 2, 3):
        with threads(count):
            results.append(cpp.second_moments(rows))
    mean, moments = results[0]
    assert all(torch.equal(mean, m) and torch.equal(moments, k) for m, k in results)
    assert torch.equal(moments, moments.T)
    assert (mean - exact_mean).abs().max() <= torch.finfo(torch.float32).eps * max(1.0, offset)
    bound = exact.diagonal().sqrt().outer(exact.diagonal().sqrt())  # Cauchy and Schwarz
    assert ((moments - exact).abs() <= 2e-6 * bound + 1e-12).all()


def test_second_moments_of_other_rows() -> None:
    for rows in (torch.randn(50, 32).double(), torch.randn(50, 17), torch.randn(0, 32)):
        mean, moments = cpp.second_moments(rows)
        expected = reference.second_moments(rows)
        torch.testing.assert_close((mean, moments), expected, equal_nan=True)


@pytest.mark.parametrize("shape", [(2, 24, 5, 7), (3, 64, 40, 41), (1, 1, 3, 3), (0, 8, 4, 4)], ids=str)
def test_masked_sums(shape: tuple[int, ...]) -> None:
    grad, out = channels_last(*shape), channels_last(*shape).relu()
    if out.numel():
        out[0, 0, 0, 0] = torch.nan
    g, sums = cpp.masked_sums(grad, out)
    expected, exact = reference.masked_sums(grad, out)[0], reference.masked_sums(grad.double(), out.double())[1]
    assert torch.equal(g, expected)
    terms = max(1, grad.numel() // max(shape[1], 1))
    assert ((sums - exact).abs() <= 4 * torch.finfo(torch.float32).eps * terms**0.5 * 4).all()


# ---- weights in other orders -----------------------------------------------------------------------------------------


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_packed_weights(data: st.DataObject) -> None:
    """(panels, R, S, C, panel), filled up with zeros, from a weight of any strides, by any number of threads."""
    draw = lambda least, most: data.draw(st.integers(least, most))  # noqa: E731
    k, c, *kernel = draw(1, 70), draw(1, 40), draw(1, 6), draw(1, 6)
    panel, backward = 32 * draw(1, 2), data.draw(st.booleans())
    weight = torch.randn(2 * k, c + 1, *kernel)
    weight = weight.contiguous(memory_format=data.draw(st.sampled_from([torch.contiguous_format, torch.channels_last])))
    weight = weight[::2, 1:] if data.draw(st.booleans()) else weight[:k].clone()
    read = weight.transpose(0, 1).flip(2, 3) if backward else weight
    panels = -(-read.shape[0] // panel)
    filled = torch.cat([read, read.new_zeros(panels * panel - read.shape[0], *read.shape[1:])])
    expected = filled.view(panels, panel, *read.shape[1:]).permute(0, 3, 4, 2, 1)
    with threads(draw(1, 3)):
        assert torch.equal(cpp._ops.conv_pack.default(weight, panel, backward), expected)


@pytest.mark.parametrize(
    "shape", [(3, 32, 3, 3), (70, 37, 2, 5), (2, 16, 7, 7), (1, 5, 1, 19), (4, 1, 3, 3), (0, 8, 2, 2)]
)
def test_turned_into_planes(shape: tuple[int, ...]) -> None:
    x = channels_last(*shape)
    with guarded(shape[0], 1, 1, x[0].numel() if x.numel() else 0) as out:
        cpp._ops.nhwc_to_nchw.default(x, out.view(shape))
    assert torch.equal(out.view(shape), x)
    with pytest.raises(RuntimeError, match="of x's shape"):
        cpp._ops.nhwc_to_nchw.default(x, x.new_empty(*shape[:3], shape[3] + 1))


def test_only_float32_in_channels_last_is_turned() -> None:
    x = torch.randn(2, 8, 3, 3)
    for wrong in (x, channels_last(2, 8, 3, 3).double()):
        with pytest.raises(RuntimeError, match=r"x must be"):
            cpp._ops.nhwc_to_nchw.default(wrong, torch.empty_like(x))


@pytest.mark.parametrize("pack", ["conv_pack", "winograd_pack"])
@pytest.mark.parametrize("panel", [32, 64])
@pytest.mark.parametrize("channels", [(70, 37), (64, 48)])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_backward_weights(pack: str, panel: int, channels: tuple[int, int], layout: torch.memory_format) -> None:
    """The same as of the weight with its channels exchanged and its taps in reverse."""
    weight = torch.randn(*channels, 3, 3).contiguous(memory_format=layout)
    function = getattr(cpp._ops, pack).default
    turned = weight.transpose(0, 1).flip(2, 3)
    assert torch.equal(function(weight, panel, True), function(turned, panel, False))


# ---- primitives ------------------------------------------------------------------------------------------------------

CONVS = {  # n, c, size, k, kernel, stride, padding, dilation, groups
    "stem": (2, 3, (20, 23), 32, (7, 7), (2, 2), (3, 3), (1, 1), 1),
    "1x1": (2, 64, (9, 11), 96, (1, 1), (1, 1), (0, 0), (1, 1), 1),
    "1x1, wide": (2, 256, (7, 6), 288, (1, 1), (1, 1), (0, 0), (1, 1), 1),
    "1x1, stride 2": (2, 64, (9, 10), 96, (1, 1), (2, 2), (0, 0), (1, 1), 1),
    "1x1, wide, stride 2": (2, 256, (9, 10), 256, (1, 1), (2, 2), (0, 0), (1, 1), 1),
    "1x1, padded": (1, 32, (5, 6), 32, (1, 1), (1, 1), (1, 1), (1, 1), 1),
    "3x3": (2, 64, (10, 9), 96, (3, 3), (1, 1), (1, 1), (1, 1), 1),
    "3x3, no padding": (2, 32, (10, 9), 64, (3, 3), (1, 1), (0, 0), (1, 1), 1),
    "3x3, wide padding": (2, 32, (6, 7), 32, (3, 3), (1, 1), (3, 3), (1, 1), 1),
    "3x3, stride 2": (2, 32, (11, 12), 64, (3, 3), (2, 2), (1, 1), (1, 1), 1),
    "3x3, two pixels": (1, 32, (3, 4), 64, (3, 3), (1, 1), (0, 0), (1, 1), 1),
    "3x3, one row": (1, 32, (3, 9), 64, (3, 3), (1, 1), (0, 0), (1, 1), 1),
    "3x3, dilated": (1, 32, (11, 12), 32, (3, 3), (1, 1), (2, 2), (2, 2), 1),
    "3x3, groups": (1, 32, (8, 8), 64, (3, 3), (1, 1), (1, 1), (1, 1), 2),
    "odd channels": (2, 37, (8, 9), 70, (3, 3), (1, 1), (1, 1), (1, 1), 1),
    "1x3": (2, 32, (8, 9), 32, (1, 3), (1, 1), (0, 1), (1, 1), 1),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("shape", CONVS.values(), ids=CONVS)
def test_primitives(shape: Any, layout: torch.memory_format, dtype: torch.dtype) -> None:
    assert_primitives(shape, layout, layout, dtype)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("shape", CONVS.values(), ids=CONVS)
def test_few_pixels(shape: Any, layout: torch.memory_format, monkeypatch: pytest.MonkeyPatch) -> None:
    """By matrix products, the weight in either layout."""
    monkeypatch.setattr(cpp, "_PACKED_AT_EACH_CALL", 1 << 30)
    monkeypatch.setattr(cpp, "_WINOGRAD_AT_EACH_CALL", 1 << 30)
    monkeypatch.setattr(cpp, "_FEW_PIXELS", 0)
    monkeypatch.setattr(cpp, "_LARGE_WEIGHT", 0)
    refused = lambda *_: pytest.fail("torch's own convolution was called")  # noqa: E731
    with monkeypatch.context() as patch:
        if shape[-1] == 1:
            patch.setattr(cpp.reference, "conv_backward", refused)
        x, weight = channels_last(*shape[:2], *shape[2]), torch.randn(shape[3], shape[1] // shape[-1], *shape[4])
        weight = weight.contiguous(memory_format=layout)
        y = cpp.conv_forward(x, weight, None, *shape[5:])
        _, dw = cpp.conv_backward(
            y.contiguous(memory_format=torch.channels_last), x, weight, None, *shape[5:], True, True
        )
    assert dw is not None
    if shape[-1] == 1:
        assert dw.is_contiguous(memory_format=layout)
    assert_primitives(shape, torch.channels_last, layout, torch.float32)


def assert_primitives(
    shape: Any, layout: torch.memory_format, weight_layout: torch.memory_format, dtype: torch.dtype
) -> None:
    """Output and gradients, with what a gradient is added to, and each alone."""
    n, c, size, k, kernel, *geometry, groups = shape
    x = torch.randn(n, c, *size, dtype=dtype).contiguous(memory_format=layout)
    weight = torch.randn(k, c // groups, *kernel, dtype=dtype).contiguous(memory_format=weight_layout)
    bias = torch.randn(k, dtype=dtype)
    y = cpp.conv_forward(x, weight, bias, *geometry, groups)
    exact = F.conv2d(x.double(), weight.double(), bias.double(), *geometry, groups)
    terms = c // groups * kernel[0] * kernel[1]
    assert_as_exact("y", y, F.conv2d(x, weight, bias, *geometry, groups), exact, terms)
    grad = torch.randn_like(y).contiguous(memory_format=layout)
    double = (grad.double(), x.double(), weight.double())
    for added, (needs_x, needs_weight) in itertools.product(
        (False, True), ((True, True), (True, False), (False, True))
    ):
        onto = torch.randn_like(x) if added else None
        rest = (*geometry, groups, needs_x, needs_weight)
        exact_x, exact_weight = reference.conv_backward(*double, None if onto is None else onto.double(), *rest)
        torch_x, torch_weight = reference.conv_backward(grad, x, weight, None if onto is None else onto.clone(), *rest)
        kept = weight.clone(), grad.clone(), x.clone()
        ours_x, ours_weight = cpp.conv_backward(grad, x, weight, onto, *rest)
        assert (ours_x is None, ours_weight is None) == (not needs_x, not needs_weight)
        assert all(map(torch.equal, kept, (weight, grad, x)))
        if ours_x is not None:
            assert_as_exact("dx", ours_x, torch_x, exact_x, k // groups * kernel[0] * kernel[1])
            assert ours_x.stride() == x.stride()
        if ours_weight is not None:
            assert_as_exact("dw", ours_weight, torch_weight, exact_weight, grad.numel() // k)


def test_which_kernels_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not torch's where csrc has its own."""
    refused = lambda *_: pytest.fail("torch's own convolution was called")  # noqa: E731
    monkeypatch.setattr(reference, "conv_backward", refused)
    monkeypatch.setattr(F, "conv2d", refused)
    for name in ("1x1, wide", "3x3"):
        n, c, size, k, kernel, *geometry = CONVS[name]
        x, weight = channels_last(n, c, *size), torch.randn(k, c, *kernel)
        y = cpp.conv_forward(x, weight, None, *geometry)
        cpp.conv_backward(y, x, weight, None, *geometry, True, True)


# ---- as differentiable operations ------------------------------------------------------------------------------------


@pytest.mark.parametrize("needed", [(True, True, True), (False, True, False), (True, False, False)])
@pytest.mark.parametrize("name", ["stem", "1x1, wide", "3x3", "3x3, stride 2"])
def test_conv2d(name: str, needed: tuple[bool, ...]) -> None:
    """Gradients of those that ask for one, in their own strides, from a gradient of any layout."""
    n, c, size, k, kernel, *geometry = CONVS[name]
    tensors = (channels_last(n, c, *size), torch.randn(k, c, *kernel), torch.randn(k))
    grad = torch.randn(*F.conv2d(*tensors, *geometry).shape)

    def run(conv: Any, dtype: torch.dtype) -> list[Tensor]:
        leaves = [t.detach().to(dtype).requires_grad_(asks) for t, asks in zip(tensors, needed, strict=True)]
        y = conv(*leaves, *geometry)
        y.backward(grad.to(dtype))
        assert [leaf.grad is not None for leaf in leaves] == list(needed)
        if conv is conv2d:
            assert all(leaf.grad.stride() == leaf.stride() for leaf in leaves if leaf.grad is not None)
        return [y.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]

    y = conv2d(*(t.clone().requires_grad_() for t in tensors), *geometry)
    assert type(y.grad_fn).__name__ == "ConvFunctionBackward"
    results = run(conv2d, torch.float32), run(F.conv2d, torch.float32), run(F.conv2d, torch.float64)
    for ours, torchs, exact in zip(*results, strict=True):
        assert_as_exact(name, ours, torchs, exact, 1)


@pytest.mark.parametrize("backend", ["reference", "library", "triton"])
def test_other_backends_leave_it_to_torch(backend: str) -> None:
    x, weight = channels_last(1, 32, 6, 6).requires_grad_(), torch.randn(32, 32, 1, 1)
    with fr.use_backend(backend):
        y = conv2d(x, weight, None, (1, 1), (0, 0), (1, 1), 1)
    assert type(y.grad_fn).__name__ == "ConvolutionBackward0"


@pytest.mark.parametrize("what", ["autocast", "float64", "contiguous", "mkldnn off"])
def test_what_csrc_does_not_serve_is_torchs(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(emulation, "_has_instructions", lambda dtype: True)
    x, weight = channels_last(1, 32, 6, 6).requires_grad_(), torch.randn(32, 32, 1, 1)
    if what == "float64":
        x, weight = x.double(), weight.double()
    if what == "contiguous":
        x = x.contiguous()
    with torch.autocast("cpu", enabled=what == "autocast"), torch.backends.mkldnn.flags(enabled=what != "mkldnn off"):
        y = conv2d(x, weight, None, (1, 1), (0, 0), (1, 1), 1)
    assert type(y.grad_fn).__name__ == "ConvolutionBackward0"
    assert y.dtype == (torch.bfloat16 if what == "autocast" else x.dtype)


BLOCKS = {
    "bottleneck": lambda: (fr.Bottleneck(128, 32), 128),
    "bottleneck, projection": lambda: (fr.Bottleneck(64, 32, 1, projection(64, 128, 1)), 64),
    "bottleneck, stride 2": lambda: (fr.Bottleneck(64, 32, 2, projection(64, 128, 2)), 64),
    "basic": lambda: (fr.BasicBlock(32, 32), 32),
    "basic, stride 2": lambda: (fr.BasicBlock(32, 64, 2, projection(32, 64, 2)), 32),
}


@pytest.mark.parametrize("memory", ["balanced", "low"])
@pytest.mark.parametrize("gram", [False, True])
@pytest.mark.parametrize("name", BLOCKS)
def test_whole_blocks(name: str, gram: bool, memory: str) -> None:
    """A residual block as one op on csrc's convolutions, in float32 beside torch's modules and float64."""
    block, channels = BLOCKS[name]()
    for module in block.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
    plan = rb.Plan(gram and isinstance(block, fr.Bottleneck), gram, memory)
    assert_block_within_budget(block, channels_last(3, channels, 11, 10), plan)


def test_a_network_takes_them() -> None:
    model = fr.resnet18(num_classes=5).to(memory_format=torch.channels_last)
    used: list[str] = []
    original = dispatch.choose

    def noting(primitive: str, *args: Any, **kwargs: Any) -> Any:
        choice = original(primitive, *args, **kwargs)
        used.append(f"{primitive}: {choice.backend}")
        return choice

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dispatch, "choose", noting)
        model(channels_last(2, 3, 64, 64)).sum().backward()
    assert used.count("conv_forward: cpp") >= 20
    assert used.count("conv_backward: cpp") == 20
    assert not [entry for entry in used if entry.startswith("conv") and not entry.endswith("cpp")]
