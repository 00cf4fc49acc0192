"""conv_bn_act: act(batch_norm(conv2d(x)) + residual), held against float64 and torch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import FLOATS, backends, grid, needs_cpp, threads
from convs import CONVS, Conv, is_nhwc, make, options, refused
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tolerances import (
    arrange,
    assert_in_budget,
    columns,
    doubled,
    exact_bn_act,
    exact_conv2d,
    per_channel,
)
from torch import Tensor
from torch.nn import functional as F

import fused_resnet as fr

pytestmark = pytest.mark.usefixtures("poison")

BACKENDS = backends("reference", "library", "cpp")
VECTORS = ("gamma", "beta", "running_mean", "running_var")


def make_bn(conv: Conv, dtype: torch.dtype, params: str, vectors: str) -> dict[str, Tensor | None]:
    """Gammas of both signs and 0, means and variances that a wrong fold cannot survive."""
    wide = torch.float32 if params == "fp32" and dtype.itemsize == 2 else dtype
    gamma = torch.rand(conv.k) * 3 - 1.5
    gamma[conv.k // 2] = 0.0
    data = {
        "gamma": gamma if vectors in ("both", "gamma") else None,
        "beta": torch.randn(conv.k) if vectors in ("both", "beta") else None,
        "running_mean": torch.randn(conv.k),
        "running_var": torch.rand(conv.k) * 2 + 0.3,
    }
    return {name: None if t is None else t.to(wide) for name, t in data.items()}


def check(
    backend: str,
    conv: Conv,
    dtype: torch.dtype,
    *,
    mode: str = "infer",
    layout: str = "nchw",
    weight_layout: str = "nchw",
    residual: str = "none",
    residual_layout: str = "nchw",
    bias: bool = False,
    vectors: str = "both",
    params: str = "same",
    activation: str | None = "relu",
    momentum: float = 0.3,
    eps: float = 1e-3,
    count: int = 1,
) -> None:
    data, bn = make(conv, dtype), make_bn(conv, dtype, params, vectors)
    training, gradients = mode == "train", mode != "infer"
    if residual == "self" and conv.out_shape != data["x"].shape:
        residual = "other"
    leaves: dict[str, Tensor | None] = {
        "x": arrange(data["x"], layout),
        "weight": arrange(data["weight"], weight_layout),
        "bias": data["bias"] if bias else None,
        "gamma": bn["gamma"],
        "beta": bn["beta"],
        "residual": arrange(data["residual"], residual_layout) if residual == "other" else None,
    }
    before = {name: t.clone() for name, t in leaves.items() if t is not None}
    ours = {name: t if t is None else t.requires_grad_(gradients) for name, t in leaves.items()}
    stats = [bn["running_mean"].clone(), bn["running_var"].clone()]

    def run() -> Tensor:
        with fr.use_backend(backend):
            return fr.ops.conv_bn_act(
                ours["x"],
                ours["weight"],
                ours["gamma"],
                ours["beta"],
                *stats,
                ours["x"] if residual == "self" else ours["residual"],
                bias=ours["bias"],
                training=training,
                momentum=momentum,
                eps=eps,
                activation=activation,
                **options(conv),
            )

    reason = refused(backend, dtype)
    with threads(count):
        if reason is not None and mode == "infer":
            with pytest.raises(fr.BackendUnavailableError, match=reason):
                run()
            return
        out = run()
        if gradients:
            out.backward(data["grad"])
    for name, t in before.items():
        assert torch.equal(ours[name], t), f"{name} was written to"
    assert is_nhwc(out) == is_nhwc(F.conv2d(leaves["x"].detach(), leaves["weight"].detach(), None, *conv[7:]))

    mask = out.detach() > 0 if activation == "relu" else torch.ones_like(out, dtype=torch.bool)
    plain = {name: t if t is None else t.detach().clone().requires_grad_() for name, t in leaves.items()}
    plain_stats = [bn["running_mean"].clone(), bn["running_var"].clone()]
    y = F.conv2d(plain["x"], plain["weight"], plain["bias"], *conv[7:])
    y = F.batch_norm(y, *plain_stats, plain["gamma"], plain["beta"], training, momentum, eps)
    if residual != "none":
        y = y + (plain["x"] if residual == "self" else plain["residual"])

    exact = {name: doubled(t, leaf=True) for name, t in leaves.items()}
    z = exact_conv2d(exact["x"], exact["weight"], exact["bias"], *conv[7:])
    shortcut = {"none": None, "self": exact["x"], "other": exact["residual"]}[residual]
    given = (None, None) if training else (bn["running_mean"].double(), bn["running_var"].double())
    exact_out, mean, var = exact_bn_act(
        z, exact["gamma"], exact["beta"], *given, shortcut, training=training, eps=eps, mask=mask
    )

    absolute = {name: None if t is None else t.detach().abs() for name, t in exact.items()}
    rstd = (var.detach() + eps).rsqrt()
    slope = rstd if exact["gamma"] is None else rstd * absolute["gamma"]
    size = per_channel(exact_conv2d(absolute["x"], absolute["weight"], absolute["bias"], *conv[7:]))
    spread = 1 + rstd * per_channel(z - columns(mean, z)) if training else 1
    size = slope * (size + mean.detach().abs()) * spread
    size = size + (0 if absolute["beta"] is None else absolute["beta"])
    size = size + (0 if shortcut is None else per_channel(shortcut))
    assert_in_budget("out", out, torch.where(mask, y, 0), exact_out, size)

    if training:
        n = z.numel() / z.shape[1]
        batch = (mean.detach(), var.detach() * n / (n - 1))
        for old, new, got, torchs in zip(VECTORS[2:], batch, stats, plain_stats, strict=True):
            exact_stat = (1 - momentum) * bn[old].double() + momentum * new
            assert_in_budget(old, got, torchs, exact_stat, bn[old].double().abs() + 20 * new.abs().max())
    else:
        assert torch.equal(stats[0], bn["running_mean"])
        assert torch.equal(stats[1], bn["running_var"])

    if not gradients:
        return
    masked = torch.where(mask, data["grad"], 0)
    y.backward(masked)
    exact_out.backward(data["grad"].double())
    for name in ("x", "weight", "bias", "gamma", "beta", "residual"):
        if ours[name] is None:
            continue
        # Sums of many terms: their size is bounded by that of the largest gradient of the tensor's kind.
        size = 50 * exact[name].grad.abs().max().item() + 50 * masked.double().abs().sum((0, 2, 3)).max().item()
        if name == "residual":
            assert torch.equal(ours[name].grad, masked)
        elif dtype.itemsize > 2 or name in ("gamma", "beta"):
            assert_in_budget(f"grad {name}", ours[name].grad, plain[name].grad, exact[name].grad, size)
        else:
            # In 16 bits each rounds the gradient between BN and conv, torch and we alike: compared as a whole.
            errors = [(g.double() - exact[name].grad).norm() for g in (ours[name].grad, plain[name].grad)]
            assert errors[0] <= 2 * errors[1] + torch.finfo(dtype).eps * exact[name].grad.norm() + 1e-3, name
        assert ours[name].grad.dtype == ours[name].dtype


CASES = grid(
    {
        "conv": tuple(CONVS),
        "dtype": FLOATS,
        "mode": ("infer", "train", "eval"),
        "layout": ("nchw", "channels_last", "sliced", "sliced_channels"),
        "weight_layout": ("nchw", "channels_last", "sliced"),
        "residual": ("none", "other", "self"),
        "residual_layout": ("nchw", "channels_last", "sliced"),
        "bias": (False, True),
        "vectors": ("both", "none", "gamma", "beta"),
        "params": ("same", "fp32"),
        "activation": ("relu", None),
        "threads": (1, 2),
    },
    lambda case: case["params"] == "fp32" and case["dtype"].itemsize > 2,
)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_parity(backend: str, case: dict[str, Any]) -> None:
    case = dict(case)
    conv, dtype, count = CONVS[case.pop("conv")], case.pop("dtype"), case.pop("threads")
    if backend == "library":
        case["mode"] = "infer"
    with threads(1):
        check(backend, conv, dtype, count=count, **case)


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True, database=None)
@given(
    size=st.tuples(st.integers(1, 3), st.integers(1, 6), st.integers(3, 9), st.integers(3, 9), st.integers(1, 6)),
    kernel=st.integers(1, 3),
    stride=st.integers(1, 2),
    groups=st.integers(1, 3),
    mode=st.sampled_from(["infer", "train", "eval"]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    layout=st.sampled_from(["nchw", "channels_last"]),
    residual=st.sampled_from(["none", "other"]),
    activation=st.sampled_from(["relu", None]),
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_random_shapes(backend: str, size: Any, kernel: int, stride: int, groups: int, dtype: Any, **draw: Any) -> None:
    n, c, h, w, k = size
    padding = (kernel // 2,) * 2
    conv = Conv(n, c * groups, h, w, k * groups, kernel, kernel, (stride, stride), padding, (1, 1), groups)
    if backend == "library":
        draw["mode"] = "infer"
    with threads(1):
        check(backend, conv, dtype, params="fp32", **draw)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("backend", backends("auto", "reference", "cpp"))
def test_empty_batch(backend: str, training: bool) -> None:
    """As torch: an empty result, running statistics left alone, zero gradients."""
    weight = torch.randn(4, 3, 3, 3, requires_grad=training)
    mean, var = torch.full((4,), 0.5), torch.full((4,), 2.0)
    with fr.use_backend(backend):
        out = fr.ops.conv_bn_act(torch.randn(0, 3, 8, 8), weight, None, None, mean, var, training=training)
    assert out.shape == (0, 4, 6, 6)
    assert (mean == 0.5).all()
    assert (var == 2).all()
    if training:
        out.sum().backward()
        assert torch.equal(weight.grad, torch.zeros_like(weight))


def test_one_value_per_channel() -> None:
    x, weight = torch.randn(1, 3, 3, 3), torch.randn(4, 3, 3, 3)
    with pytest.raises(ValueError, match=r"Expected more than 1 value per channel when training, got input size"):
        fr.ops.conv_bn_act(x, weight, None, None, None, None, training=True)


def test_library_is_for_inference() -> None:
    x, weight, vector = torch.randn(2, 3, 5, 5), torch.randn(4, 3, 3, 3, requires_grad=True), torch.ones(4)
    for training in (True, False):
        with fr.use_backend("library"), pytest.raises(fr.BackendUnavailableError, match="does not implement bn_act"):
            fr.ops.conv_bn_act(x, weight, vector, vector, vector.clone(), vector.clone(), training=training)
        fr.ops.conv_bn_act(
            x, weight, vector, vector, vector.clone(), vector.clone(), training=training
        ).sum().backward()
        assert weight.grad.abs().sum() > 0
        weight.grad = None


@pytest.mark.parametrize("mode", ["infer", "train", "eval"])
@pytest.mark.parametrize("activation", ["relu", None])
@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_and_inf_are_values(backend: str, activation: str | None, mode: str) -> None:
    """Kept by every backend but oneDNN, whose fused ReLU makes 0 of NaN: pinned, so that a change shows."""
    if backend == "library" and mode != "infer":
        backend = "auto"
    conv = CONVS["3x3"]
    data, bn = make(conv, torch.float32), make_bn(conv, torch.float32, "same", "both")
    data["residual"][0, 0, 8, 6] = torch.nan
    data["residual"][1, 0, 0, 0] = torch.inf
    if mode != "train":  # there a NaN would be all that is left of its channel
        data["x"][0, 1, 2, 2] = torch.nan
        data["x"][1, 2, 6, 3] = torch.inf
    if mode != "infer":
        data["weight"].requires_grad_()
    x = arrange(data["x"], "channels_last")
    args = (bn["gamma"], bn["beta"], bn["running_mean"].clone(), bn["running_var"].clone())
    with fr.use_backend(backend):
        out = fr.ops.conv_bn_act(
            x, data["weight"], *args, data["residual"], padding=1, activation=activation, training=mode == "train"
        )
    y = F.conv2d(x, data["weight"], None, padding=1)
    y = F.batch_norm(y, bn["running_mean"], bn["running_var"], bn["gamma"], bn["beta"], mode == "train", 0.1, 1e-5)
    plain = y + data["residual"]
    plain = torch.relu(plain) if activation == "relu" else plain
    assert plain.isnan().any()
    if backend == "library":
        # gamma 0 times an infinite conv output is NaN, but finite once folded into the weight.
        finite = bn["gamma"] != 0
        out, plain = out[:, finite], plain[:, finite]
        if activation == "relu":
            assert not out.isnan().any()
            plain = plain.nan_to_num(0, torch.inf, -torch.inf)
    torch.testing.assert_close(out, plain, equal_nan=True, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode", ["infer", "train", "eval"])
@pytest.mark.parametrize("residual_dtype", [None, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("activation", ["relu", None])
@pytest.mark.parametrize("backend", backends("auto", "reference", "cpp"))
def test_autocast(backend: str, activation: str | None, x_dtype: Any, residual_dtype: Any, mode: str) -> None:
    """conv and BN in autocast's dtype, parameters in float32; a float32 residual gives float32. As eager."""
    conv = CONVS["3x3"]
    data, bn = make(conv, torch.float32), make_bn(conv, torch.float32, "same", "both")
    residual = None if residual_dtype is None else data["residual"].to(residual_dtype)
    results = []
    for ours in (True, False):
        x = data["x"].to(x_dtype)
        weight, gamma = (t.clone().requires_grad_(mode != "infer") for t in (data["weight"], bn["gamma"]))
        stats = bn["running_mean"].clone(), bn["running_var"].clone()
        with torch.autocast("cpu", torch.bfloat16):
            if ours:
                with fr.use_backend(backend):
                    y = fr.ops.conv_bn_act(
                        x,
                        weight,
                        gamma,
                        bn["beta"],
                        *stats,
                        residual,
                        padding=1,
                        training=mode == "train",
                        activation=activation,
                    )
            else:
                y = F.conv2d(x, weight, None, padding=1)
                y = F.batch_norm(y, *stats, gamma, bn["beta"], mode == "train")
                y = y if residual is None else y + residual
                y = torch.relu(y) if activation == "relu" else y
        if mode != "infer":
            y.sum().backward()
        results.append((y.detach(), *stats, *([] if mode == "infer" else [weight.grad, gamma.grad])))
    for ours, torchs in zip(*results, strict=True):
        assert ours.dtype == torchs.dtype
        assert (ours - torchs).norm() < 0.05 * torchs.norm() + 0.05
    assert results[0][0].dtype == (torch.float32 if residual_dtype == torch.float32 else torch.bfloat16)


@pytest.mark.parametrize("mean", [0.0, 30.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_folding_far_from_zero(dtype: torch.dtype, mean: float) -> None:
    """Folded BN where the conv's outputs are far from 0 and narrow: still in the budget."""
    conv = Conv(2, 16, 6, 6, 8, 3, 3)
    data = make(conv, dtype)
    data["bias"] += mean
    y = F.conv2d(data["x"], data["weight"], data["bias"])
    running = y.float().mean((0, 2, 3)).to(dtype), y.float().var((0, 2, 3)).to(dtype)
    with fr.use_backend("library"):
        out = fr.ops.conv_bn_act(data["x"], data["weight"], None, None, *running, bias=data["bias"], activation=None)
    plain = F.batch_norm(y, *running)
    z = exact_conv2d(*(data[n].double() for n in ("x", "weight", "bias")), *conv[7:])
    exact, _, _ = exact_bn_act(z, None, None, *(t.double() for t in running), None, training=False, eps=1e-5, mask=None)
    size = per_channel(z) * (running[1].double() + 1e-5).rsqrt()
    assert_in_budget("out", out, plain, exact, 2 * size)


@needs_cpp
def test_training_saves_the_conv_output_once() -> None:
    """conv -> BN -> add -> ReLU keeps x, the conv's output and the result; no mask, no normalised copy."""
    saved: list[Tensor] = []

    def pack(t: Tensor) -> Tensor:
        saved.append(t)
        return t

    conv = CONVS["3x3"]
    data = make(conv, torch.float32)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), fr.use_backend("cpp"):
        fr.ops.conv_bn_act(
            data["x"],
            data["weight"].requires_grad_(),
            None,
            None,
            None,
            None,
            data["residual"],
            padding=1,
            training=True,
        )
    large = {t.untyped_storage().data_ptr() for t in saved if t.numel() >= data["x"].numel()}
    assert len(large) == 3


def good() -> dict[str, Any]:
    vector = torch.ones(8)
    return {
        "x": torch.randn(2, 4, 6, 6),
        "weight": torch.randn(8, 4, 3, 3),
        "gamma": vector,
        "beta": vector.clone(),
        "running_mean": vector.clone(),
        "running_var": vector.clone(),
    }


BAD = {
    "x is a list": ({"x": [1.0]}, TypeError, "x must be a torch.Tensor, got list"),
    "x is 3-d": ({"x": torch.randn(4, 6, 6)}, ValueError, r"x must be \(N, C, H, W\)"),
    "x is float64": (
        {"x": torch.ones(2, 4, 6, 6).double()},
        TypeError,
        "weight is torch.float32, expected torch.float64",
    ),
    "x has other channels": ({"x": torch.randn(2, 5, 6, 6)}, ValueError, "x needs 4 channels"),
    "weight is on meta": ({"weight": torch.ones(8, 4, 3, 3, device="meta")}, ValueError, "weight is on meta"),
    "weight is empty": ({"weight": torch.ones(0, 4, 3, 3)}, ValueError, "weight is empty"),
    "bias is too long": ({"bias": torch.ones(4)}, ValueError, r"bias has shape \(4,\), expected \(8,\)"),
    "bias is a list": ({"bias": [1.0] * 8}, TypeError, "bias must be a torch.Tensor"),
    "gamma is too long": ({"gamma": torch.ones(9)}, ValueError, r"gamma has shape \(9,\), expected \(8,\)"),
    "beta is float64": ({"beta": torch.ones(8).double()}, TypeError, "beta is torch.float64"),
    "mean is a float": ({"running_mean": 0.0}, TypeError, "running_mean must be a torch.Tensor or None, got float"),
    "mean is None in eval": ({"running_mean": None}, ValueError, "running_mean and running_var are needed, got None"),
    "var is on meta": ({"running_var": torch.ones(8, device="meta")}, ValueError, "running_var is on meta"),
    "residual broadcasts": ({"residual": torch.ones(2, 8, 1, 1)}, ValueError, r"residual has shape .* \(2, 8, 4, 4\)"),
    "residual is float64": ({"residual": torch.ones(2, 8, 4, 4).double()}, TypeError, "residual is torch.float64"),
    "groups is 0": ({"groups": 0}, ValueError, "groups must be a positive int, got 0"),
    "stride is 0": ({"stride": 0}, ValueError, "stride must be an int >= 1 or a pair of them, got 0"),
    "padding is a name": ({"padding": "same"}, ValueError, "padding must be an int >= 0"),
    "kernel does not fit": ({"dilation": 4}, ValueError, r"3x3 kernel .* does not fit an input of 6x6"),
    "unknown activation": ({"activation": "silu"}, ValueError, "activation must be 'relu' or None, got 'silu'"),
}


@pytest.mark.parametrize("mode", ["infer", "grad", "train", "autocast"])
@pytest.mark.parametrize("name", BAD)
def test_bad_arguments(name: str, mode: str) -> None:
    change, error, message = BAD[name]
    arguments = good() | change
    if mode == "autocast" and error is TypeError and "float64" in message and "beta" not in message:
        pytest.skip("autocast casts the operands of a conv")
    if mode == "train" and name == "mean is None in eval":
        pytest.skip("training needs no running statistics")
    if mode == "grad" and arguments["weight"].is_leaf and arguments["weight"].device.type == "cpu":
        arguments["weight"] = arguments["weight"].clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=mode == "autocast"), pytest.raises(error, match=message):
        fr.ops.conv_bn_act(**arguments, training=mode == "train")


def test_meta() -> None:
    arguments = {name: t.to("meta") for name, t in good().items()}
    for training in (True, False):
        out = fr.ops.conv_bn_act(**arguments, training=training)
        assert out.is_meta
        assert out.shape == (2, 8, 4, 4)
