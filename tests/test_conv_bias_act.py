"""conv_bias_act: act(conv2d(x) + bias + residual), held against float64 and torch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import FLOATS, backends, grid, threads
from convs import CONVS, Conv, is_nhwc, make, options, refused
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tolerances import arrange, assert_in_budget, doubled, exact_conv2d, per_channel, same_strides, storages
from torch import Tensor
from torch.nn import functional as F

import fused_resnet as fr
from fused_resnet import dispatch, emulation
from fused_resnet.backends import cpp

pytestmark = pytest.mark.usefixtures("poison")

BACKENDS = backends("reference", "library", "cpp")


def check(
    backend: str,
    conv: Conv,
    dtype: torch.dtype,
    *,
    layout: str = "nchw",
    weight_layout: str = "nchw",
    residual: str = "none",
    residual_layout: str = "nchw",
    bias: bool = True,
    activation: str | None = "relu",
    gradients: bool = False,
    count: int = 1,
) -> None:
    data = make(conv, dtype)
    if residual == "self" and conv.out_shape != data["x"].shape:
        residual = "other"
    x, weight = arrange(data["x"], layout), arrange(data["weight"], weight_layout)
    vector = data["bias"] if bias else None
    shortcut = {"none": None, "self": x, "other": arrange(data["residual"], residual_layout)}[residual]
    leaves = [t for t in (x, weight, vector, shortcut if residual == "other" else None) if t is not None]
    before = [t.clone() for t in leaves]
    for t in leaves:
        t.requires_grad_(gradients)

    reason = refused(backend, dtype)
    with threads(count):
        with fr.use_backend(backend):
            if reason is not None and not gradients:
                with pytest.raises(fr.BackendUnavailableError, match=reason):
                    fr.ops.conv_bias_act(x, weight, vector, shortcut, activation=activation, **options(conv))
                return
            out = fr.ops.conv_bias_act(x, weight, vector, shortcut, activation=activation, **options(conv))
        if gradients:
            out.backward(data["grad"])
    assert all(map(torch.equal, before, leaves)), "an input was written to"
    assert is_nhwc(out) == is_nhwc(F.conv2d(x.detach(), weight.detach(), None, *conv[7:]))

    mask = out.detach() > 0 if activation == "relu" else torch.ones_like(out, dtype=torch.bool)
    plain = [t.detach().clone().requires_grad_(gradients) for t in leaves]
    plain_x, plain_weight = plain[:2]
    y = F.conv2d(plain_x, plain_weight, plain[2] if bias else None, *conv[7:])
    if shortcut is not None:
        y = y + (plain_x if residual == "self" else plain[-1])
    exact = [doubled(t, leaf=True) for t in leaves]
    z = exact_conv2d(exact[0], exact[1], exact[2] if bias else None, *conv[7:])
    if shortcut is not None:
        z = z + (exact[0] if residual == "self" else exact[-1])
    absolute = [t.detach().abs() for t in exact]
    size = exact_conv2d(absolute[0], absolute[1], absolute[2] if bias else None, *conv[7:])
    size = per_channel(size) + (0 if shortcut is None else per_channel(shortcut))
    assert_in_budget("out", out, torch.where(mask, y, 0), torch.where(mask, z, 0), size)
    # What the mask hid: elements that the ReLU cut off are not above the budget either.
    assert (z[~mask] <= 2 * torch.finfo(dtype).eps * per_channel(z).max()).all()

    if not gradients:
        return
    masked = torch.where(mask, data["grad"], 0)
    y.backward(masked)
    z.backward(masked.double())
    sizes = [t.clone().requires_grad_() for t in absolute[:2]]
    exact_conv2d(*sizes, None, *conv[7:]).backward(masked.double().abs())
    extra = masked.double().abs() if residual == "self" else 0
    cancelled = (per_channel(sizes[0].grad + extra), sizes[1].grad.abs().amax(), masked.double().abs().sum((0, 2, 3)))
    for i, (name, ours) in enumerate(zip(("x", "weight", "bias"), leaves[: 3 if bias else 2], strict=False)):
        scale = cancelled[i] if name != "weight" else cancelled[i].expand(ours.shape[1])
        assert_in_budget(f"grad {name}", ours.grad, plain[i].grad, exact[i].grad, scale)
        if {"x": layout, "weight": weight_layout, "bias": "nchw"}[name] in ("nchw", "channels_last"):
            assert same_strides(ours.grad, ours), name
    if residual == "other":
        assert torch.equal(leaves[-1].grad, masked)


@pytest.mark.parametrize(
    "case",
    grid(
        {
            "conv": tuple(CONVS),
            "dtype": FLOATS,
            "layout": ("nchw", "channels_last", "sliced", "sliced_channels"),
            "weight_layout": ("nchw", "channels_last", "sliced"),
            "residual": ("none", "other", "self"),
            "residual_layout": ("nchw", "channels_last", "sliced"),
            "bias": (True, False),
            "activation": ("relu", None),
            "gradients": (False, True),
            "threads": (1, 2),
        }
    ),
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_parity(backend: str, case: dict[str, Any]) -> None:
    case = dict(case)
    conv, dtype, count = CONVS[case.pop("conv")], case.pop("dtype"), case.pop("threads")
    if backend == "library":
        case["gradients"] = False  # an inference backend: test_library_is_for_inference
    with threads(1):
        check(backend, conv, dtype, count=count, **case)


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True, database=None)
@given(
    size=st.tuples(st.integers(1, 3), st.integers(1, 6), st.integers(1, 9), st.integers(1, 9), st.integers(1, 6)),
    kernel=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    padding=st.tuples(st.integers(0, 3), st.integers(0, 3)),
    dilation=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    groups=st.integers(1, 3),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    layout=st.sampled_from(["nchw", "channels_last"]),
    residual=st.sampled_from(["none", "other"]),
    activation=st.sampled_from(["relu", None]),
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_random_shapes(backend: str, size: Any, kernel: Any, groups: int, dtype: Any, **draw: Any) -> None:
    n, c, h, w, k = size
    conv = Conv(
        n, c * groups, h, w, k * groups, *kernel, *(draw.pop(o) for o in ("stride", "padding", "dilation")), groups
    )
    with threads(1):
        if min(conv.out_shape) < 1:
            data = {"x": torch.randn(n, conv.c, h, w), "weight": torch.randn(conv.k, c, *kernel)}
            with fr.use_backend(backend), pytest.raises(ValueError, match="does not fit"):
                fr.ops.conv_bias_act(**data, **options(conv))
        else:
            check(backend, conv, dtype, **draw)


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("name", ["auto", "reference", "cpp"])
def test_empty_batch(name: str, gradients: bool) -> None:
    """As torch: an empty result of the right shape, zero gradients; oneDNN is not asked."""
    x, weight = torch.randn(0, 3, 8, 8), torch.randn(4, 3, 3, 3, requires_grad=gradients)
    with fr.use_backend(name):
        out = fr.ops.conv_bias_act(x, weight, None, torch.randn(0, 4, 6, 6))
    assert out.shape == (0, 4, 6, 6)
    if gradients:
        out.sum().backward()
        assert torch.equal(weight.grad, torch.zeros_like(weight))
    else:
        with fr.use_backend("library"), pytest.raises(fr.BackendUnavailableError, match="the input is empty"):
            fr.ops.conv_bias_act(x, weight)


def test_library_is_for_inference() -> None:
    """oneDNN's fused calls have no gradient and backward would silently give None: torch's own conv runs instead."""
    x, weight = torch.randn(2, 3, 5, 5), torch.randn(4, 3, 3, 3, requires_grad=True)
    out = fr.ops.conv_bias_act(x, weight, activation="relu")
    out.sum().backward()
    assert weight.grad.abs().sum() > 0
    with fr.use_backend("library"), pytest.raises(fr.BackendUnavailableError, match="does not implement add_relu"):
        fr.ops.conv_bias_act(x, weight, None, torch.randn(2, 4, 3, 3))
    with torch.no_grad(), fr.use_backend("library"):
        fr.ops.conv_bias_act(x, weight, None, torch.randn(2, 4, 3, 3))


@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("activation", ["relu", None])
@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_and_inf_are_values(backend: str, gradients: bool, activation: str | None, with_residual: bool) -> None:
    """Kept by every backend but oneDNN, whose fused ReLU makes 0 of NaN: pinned, so that a change shows.

    In channels_last, as torch fuses the residual on the CPU in that layout only.
    """
    if backend == "library" and gradients:
        backend = "auto"
    data = make(CONVS["3x3"], torch.float32)
    data["x"][0, 1, 2, 2] = torch.nan
    data["x"][1, 2, 6, 3] = torch.inf
    data["residual"][0, 0, 8, 6] = torch.nan
    data["residual"][1, 0, 0, 0] = torch.inf
    residual = data["residual"] if with_residual else None
    weight = data["weight"].requires_grad_(gradients)
    with fr.use_backend(backend):
        x = arrange(data["x"], "channels_last")
        out = fr.ops.conv_bias_act(x, weight, None, residual, padding=1, activation=activation)
    y = F.conv2d(data["x"], weight, None, padding=1)
    y = y if residual is None else y + residual
    plain = torch.relu(y) if activation == "relu" else y
    assert plain.isnan().any()
    assert (plain == torch.inf).any()
    if backend == "library" and activation == "relu":
        assert not out.isnan().any()
        assert (out[plain.isnan()] == 0).all()
        plain = plain.nan_to_num(0, torch.inf, -torch.inf)
    assert torch.equal(out.isnan(), plain.isnan())
    torch.testing.assert_close(out, plain, equal_nan=True)


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("residual_dtype", [None, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("activation", ["relu", None])
@pytest.mark.parametrize("backend", backends("auto", "reference", "cpp"))
def test_autocast(backend: str, activation: str | None, x_dtype: Any, residual_dtype: Any, gradients: bool) -> None:
    """The conv in autocast's dtype; a float32 residual gives float32. As eager."""
    data = make(CONVS["3x3"], torch.float32)
    results = []
    for ours in (True, False):
        x = data["x"].to(x_dtype)
        weight, bias = (data[n].clone().requires_grad_(gradients) for n in ("weight", "bias"))
        residual = None if residual_dtype is None else data["residual"].to(residual_dtype)
        with torch.autocast("cpu", torch.bfloat16):
            if ours:
                with fr.use_backend(backend):
                    y = fr.ops.conv_bias_act(x, weight, bias, residual, padding=1, activation=activation)
            else:
                y = F.conv2d(x, weight, bias, padding=1)
                y = y if residual is None else y + residual
                y = torch.relu(y) if activation == "relu" else y
        if gradients:
            y.sum().backward()
            results.append((y.detach(), weight.grad, bias.grad))
        else:
            results.append((y,))
    for ours, torchs in zip(*results, strict=True):
        assert ours.dtype == torchs.dtype
        torch.testing.assert_close(ours, torchs, rtol=0.05, atol=0.05 * torchs.abs().max().item())
    assert results[0][0].dtype == (torch.float32 if residual_dtype == torch.float32 else torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_choices_agree(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """The automatic choice is one of the backends, and says why it is not an earlier one."""
    monkeypatch.setattr(emulation, "_has_instructions", lambda dtype: True)
    conv = CONVS["3x3"]
    x, weight = make(conv, dtype)["x"], make(conv, dtype)["weight"]
    args = (weight, None, None, *conv[7:], "relu")
    choice = dispatch.choose("conv_bias_act_forward", x, *args)
    assert choice.backend == ("library" if refused("library", dtype) is None else choice.backend)
    for name, reason in choice.skipped:
        if name == "cpp" and cpp.slower("conv_bias_act_forward", x, *args) == reason:
            continue  # it could serve the call
        with pytest.raises(fr.BackendUnavailableError, match=reason):
            dispatch.choose("conv_bias_act_forward", x, *args, backend=name)


@pytest.mark.parametrize("value", [2, (2, 2), [2, 2]], ids=str)
def test_ints_pairs_and_lists(value: Any) -> None:
    x, weight = torch.randn(1, 2, 12, 12), torch.randn(3, 2, 3, 3)
    out = fr.ops.conv_bias_act(x, weight, stride=value, padding=value, dilation=value)
    torch.testing.assert_close(out, torch.relu(F.conv2d(x, weight, None, 2, 2, 2)))


def test_saved_once() -> None:
    """With gradients the pass after the conv keeps its output, and nothing of the size of the conv's own."""
    saved: list[Tensor] = []

    def pack(t: Tensor) -> Tensor:
        saved.append(t)
        return t

    data = make(CONVS["3x3"], torch.float32)
    weight = data["weight"].requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = fr.ops.conv_bias_act(data["x"], weight, data["bias"], data["residual"], padding=1)
    assert storages(*saved) - storages(weight, data["bias"]) <= storages(data["x"], out)


def good() -> dict[str, Any]:
    return {"x": torch.randn(2, 4, 6, 6), "weight": torch.randn(8, 4, 3, 3)}


BAD = {
    "x is a list": ({"x": [1.0]}, TypeError, "x must be a torch.Tensor, got list"),
    "x is 3-d": ({"x": torch.randn(4, 6, 6)}, ValueError, r"x must be \(N, C, H, W\)"),
    "x is integer": ({"x": torch.ones(2, 4, 6, 6).int()}, TypeError, "x must be float16"),
    "x is float64": (
        {"x": torch.ones(2, 4, 6, 6).double()},
        TypeError,
        "weight is torch.float32, expected torch.float64",
    ),
    "x is sparse": ({"x": torch.ones(2, 4, 6, 6).to_sparse()}, TypeError, "x must be a strided tensor"),
    "x has other channels": ({"x": torch.randn(2, 5, 6, 6)}, ValueError, "x needs 4 channels"),
    "x is on meta": ({"x": torch.empty(2, 4, 6, 6, device="meta")}, ValueError, "weight is on cpu, expected meta"),
    "weight is None": ({"weight": None}, TypeError, "weight must be a torch.Tensor, got NoneType"),
    "weight is 2-d": ({"weight": torch.randn(8, 4)}, ValueError, r"weight \(K, C / groups, R, S\)"),
    "weight is bfloat16": ({"weight": torch.ones(8, 4, 3, 3).bfloat16()}, TypeError, "weight is torch.bfloat16"),
    "weight is empty": ({"weight": torch.ones(8, 4, 0, 3)}, ValueError, "weight"),
    "bias is too long": ({"bias": torch.ones(4)}, ValueError, r"bias has shape \(4,\), expected \(8,\)"),
    "bias is a float": ({"bias": 1.0}, TypeError, "bias must be a torch.Tensor"),
    "bias is float64": ({"bias": torch.ones(8).double()}, TypeError, "bias is torch.float64"),
    "bias is on meta": ({"bias": torch.ones(8, device="meta")}, ValueError, "bias is on meta"),
    "residual broadcasts": ({"residual": torch.ones(2, 8, 1, 1)}, ValueError, r"residual has shape .* \(2, 8, 4, 4\)"),
    "residual is float64": ({"residual": torch.ones(2, 8, 4, 4).double()}, TypeError, "residual is torch.float64"),
    "residual is a float": ({"residual": 0.5}, TypeError, "residual must be a torch.Tensor"),
    "residual is on meta": ({"residual": torch.ones(2, 8, 4, 4, device="meta")}, ValueError, "residual is on meta"),
    "groups is 0": ({"groups": 0}, ValueError, "groups must be a positive int, got 0"),
    "groups is a float": ({"groups": 2.0}, ValueError, "groups must be a positive int, got 2.0"),
    "groups does not divide": ({"groups": 3}, ValueError, "with groups=3"),
    "stride is 0": ({"stride": 0}, ValueError, "stride must be an int >= 1 or a pair of them, got 0"),
    "stride is a float": ({"stride": 1.5}, ValueError, "stride must be an int"),
    "stride is a triple": ({"stride": (1, 1, 1)}, ValueError, "stride must be an int"),
    "stride is negative": ({"stride": (1, -1)}, ValueError, "stride must be an int"),
    "padding is a name": ({"padding": "same"}, ValueError, "padding must be an int >= 0 or a pair of them, got 'same'"),
    "padding is negative": ({"padding": -1}, ValueError, "padding must be an int >= 0"),
    "padding is None": ({"padding": None}, ValueError, "padding must be an int >= 0"),
    "dilation is 0": ({"dilation": 0}, ValueError, "dilation must be an int >= 1"),
    "kernel does not fit": ({"dilation": 4}, ValueError, r"3x3 kernel .* does not fit an input of 6x6"),
    "unknown activation": ({"activation": "silu"}, ValueError, "activation must be 'relu' or None, got 'silu'"),
}


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("backend", BACKENDS)
def test_bad_arguments(backend: str, name: str, gradients: bool) -> None:
    change, error, message = BAD[name]
    arguments = good() | change
    if gradients and isinstance(arguments["weight"], Tensor):
        arguments["weight"].requires_grad_()
    with fr.use_backend(backend), pytest.raises(error, match=message):
        fr.ops.conv_bias_act(**arguments)


@pytest.mark.parametrize("gradients", [False, True])
def test_bias_in_another_dtype_is_an_error(gradients: bool) -> None:
    """As torch's conv2d, which has no mixed types: also for a float32 bias beside 16-bit tensors."""
    x, weight = torch.randn(2, 4, 6, 6).bfloat16(), torch.randn(8, 4, 3, 3).bfloat16().requires_grad_(gradients)
    with pytest.raises(TypeError, match=r"bias is torch.float32, expected torch.bfloat16"):
        fr.ops.conv_bias_act(x, weight, torch.ones(8))


def test_meta() -> None:
    x, weight = torch.empty(2, 4, 6, 6, device="meta"), torch.empty(8, 4, 3, 3, device="meta")
    out = fr.ops.conv_bias_act(x.to(memory_format=torch.channels_last), weight)
    assert out.is_meta
    assert out.shape == (2, 8, 4, 4)
