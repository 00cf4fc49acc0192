"""bn_act: act(batch_norm(x) + residual), forward and backward, held against float64 and torch."""

from __future__ import annotations

import itertools
import math
import re
from typing import Any

import pytest
import torch
from conftest import FLOATS, backends, grid, needs_cpp, threads
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tolerances import (
    LAYOUTS,
    accumulation,
    arrange,
    assert_in_budget,
    columns,
    doubled,
    equal_specials,
    exact_bn_act,
    memory_format,
    over_budget,
    per_channel,
    same_strides,
    storages,
)
from torch import Tensor
from torch.autograd import gradcheck
from torch.nn import functional as F

import fused_resnet as fr
from fused_resnet import dispatch

pytestmark = pytest.mark.usefixtures("poison")

SHAPES = {
    (2, 3, 5, 7): "odd everywhere: tails in every loop",
    (1, 1, 2, 1): "the least that training takes: two values",
    (1, 64, 7, 7): "batch 1, ResNet's last spatial size",
    (2, 4): "(N, C), as BatchNorm1d; two values per channel, whose gradient with respect to x is nearly 0",
    (33, 16): "(N, C)",
    (3, 5, 9): "(N, C, L)",
    (2, 6, 3, 4, 5): "(N, C, D, H, W); channels_last_3d",
    (2, 8, 4, 4): "8 channels: one vector of 8 floats",
    (3, 13, 3, 3): "channels not divisible by anything",
    (5, 17, 1, 1): "one pixel: NCHW and channels_last at once, the strides of size-1 dimensions mean nothing",
    (7, 1, 6, 5): "one channel: NCHW and channels_last at once",
    (1, 40, 1, 9): "height 1, batch 1",
    (2, 2048, 1, 2): "ResNet-50's widest",
    (2, 1000, 2, 1): "wide and not divisible by 16",
    (12, 4, 37, 38): "17k values per channel: several chunks per channel, several threads",
    (1, 2, 260, 261): "one image of 68k pixels: chunks within one plane",
    (40000, 2): "many rows, hardly any channels",
    (17, 1030, 2, 2): "more channels than a tile of lanes, more rows than a chunk",
}


def problem(
    shape: tuple[int, ...], dtype: torch.dtype, params: str, vectors: str, running: bool, seed: int = 0
) -> dict[str, Any]:
    """Channels of different mean and size, gammas of both signs and 0."""
    g = torch.Generator().manual_seed(seed)
    channels = shape[1]

    def vector(low: float, high: float) -> Tensor:
        return torch.rand(channels, generator=g, dtype=torch.float64) * (high - low) + low

    x = torch.randn(shape, generator=g, dtype=torch.float64)
    x = x * columns(vector(0.2, 2.0), x) + columns(vector(-2.0, 2.0), x)
    gamma, beta = vector(-1.5, 1.5), vector(-1.0, 1.0)
    if channels > 2:
        gamma[channels // 2] = 0.0
    wide = dtype if params == "same" or dtype.itemsize > 2 else torch.float32
    return {
        "x": x.to(dtype),
        "gamma": gamma.to(wide) if vectors in ("both", "gamma") else None,
        "beta": beta.to(wide) if vectors in ("both", "beta") else None,
        "running_mean": vector(-1.0, 1.0).to(wide) if running else None,
        "running_var": vector(0.3, 3.0).to(wide) if running else None,
        "residual": torch.randn(shape, generator=g, dtype=torch.float64).to(dtype),
        "grad": (torch.randn(shape, generator=g, dtype=torch.float64) + 0.3).to(dtype),
    }


def plain_bn_act(
    x: Tensor, gamma: Any, beta: Any, mean: Any, var: Any, residual: Any, training: bool, momentum: float, eps: float
) -> Tensor:
    """torch's own, unfused and without the ReLU."""
    y = F.batch_norm(x, mean, var, gamma, beta, training, momentum, eps)
    return y if residual is None else y + residual


def clone(t: Tensor | None, *, leaf: bool = False) -> Tensor | None:
    if t is None:
        return None
    t = t.detach().clone()
    return t.requires_grad_() if leaf else t


def check(
    backend: str,
    data: dict[str, Any],
    *,
    layout: str = "nchw",
    residual: str = "none",
    residual_layout: str = "nchw",
    grad_layout: str = "nchw",
    activation: str | None = "relu",
    training: bool = True,
    momentum: float = 0.3,
    eps: float = 1e-5,
    count: int = 1,
) -> None:
    """One forward and backward pass against torch's and the exact one: results, layouts, running statistics."""
    stats = [clone(data["running_mean"]), clone(data["running_var"])]
    params = [clone(data["gamma"], leaf=True), clone(data["beta"], leaf=True)]
    x = arrange(data["x"], layout).requires_grad_()
    other = None
    if residual == "self":
        other = x
    elif residual == "other":
        other = arrange(data["residual"], residual_layout).requires_grad_()
    grad = data["grad"]
    if grad_layout == "expanded":  # what sum() and mean() send: stride 0
        grad = grad[(slice(0, 1), *[slice(0, 1)] * (grad.dim() - 1))].expand(grad.shape)
    else:
        grad = arrange(grad, grad_layout)

    options = {"training": training, "momentum": momentum, "eps": eps, "activation": activation}
    with threads(count):
        with fr.use_backend(backend):
            out = fr.ops.bn_act(x, *params, *stats, other, **options)
        out.backward(grad)

    mask = (out.detach() > 0) if activation == "relu" else None
    masked = grad if mask is None else grad * mask

    plain_stats = [clone(data["running_mean"]), clone(data["running_var"])]
    plain_params = [clone(data["gamma"], leaf=True), clone(data["beta"], leaf=True)]
    dense = "channels_last" if layout in ("channels_last", "sliced_channels") else "nchw"
    plain_x = arrange(data["x"], dense).requires_grad_()
    plain_other = {"none": None, "self": plain_x, "other": clone(data["residual"], leaf=True)}[residual]
    y = plain_bn_act(plain_x, *plain_params, *plain_stats, plain_other, training, momentum, eps)
    plain = y.detach() if mask is None else torch.where(mask, y.detach(), 0)
    y.backward(arrange(masked, dense))

    exact_params = [doubled(data["gamma"], leaf=True), doubled(data["beta"], leaf=True)]
    exact_x = doubled(data["x"], leaf=True)
    exact_other = {"none": None, "self": exact_x, "other": doubled(data["residual"], leaf=True)}[residual]
    given = (None, None) if training else (doubled(data["running_mean"]), doubled(data["running_var"]))
    exact, mean, var = exact_bn_act(exact_x, *exact_params, *given, exact_other, training=training, eps=eps, mask=mask)
    exact.backward(doubled(grad))

    # How large the numbers are that are added up on the way, per channel.
    rstd = (var.detach() + eps).rsqrt()
    slope = rstd if exact_params[0] is None else rstd * exact_params[0].detach().abs()
    centred = doubled(data["x"]) - columns(mean.detach(), x)
    size = slope * per_channel(data["x"]) * (1 + rstd * per_channel(centred))
    if exact_params[1] is not None:
        size = size + exact_params[1].detach().abs()
    if exact_other is not None:
        size = size + per_channel(exact_other)
    assert_in_budget("out", out, plain, exact, size)
    assert memory_format(out) == memory_format(plain_x)

    terms = doubled(masked).abs()
    dims = [d for d in range(terms.dim()) if d != 1]
    count = terms.numel() / terms.shape[1]
    sum_1, sum_2 = terms.sum(dims), (terms * centred.abs()).sum(dims) * rstd
    size = slope * per_channel(masked)
    if training:
        size = size + slope * (sum_1 + sum_2 * rstd * per_channel(data["x"])) / count
    if residual == "self":
        size = size + per_channel(masked)
    # In float64 and with two values per channel only cancellation is left of it.
    assert_in_budget("grad x", x.grad, plain_x.grad, exact_x.grad, size)
    if layout in ("nchw", "channels_last"):
        assert same_strides(x.grad, x)
    if residual == "other":
        assert_in_budget("grad residual", other.grad, plain_other.grad, exact_other.grad)
        if residual_layout in ("nchw", "channels_last"):
            assert same_strides(other.grad, other)
    cancelled = sum_2 + rstd * per_channel(data["x"]) * sum_1
    for name, size, ours, torchs, exacts in zip(
        ("grad gamma", "grad beta"), (cancelled, sum_1), params, plain_params, exact_params, strict=True
    ):
        if ours is not None:
            assert ours.grad.dtype == ours.dtype
            assert_in_budget(name, ours.grad, torchs.grad, exacts.grad, size)

    if stats[0] is None:
        return
    if not training:
        assert torch.equal(stats[0], data["running_mean"])
        assert torch.equal(stats[1], data["running_var"])
        return
    weights = {"running mean": mean, "running var": var * count / (count - 1)}
    sizes = (per_channel(data["x"]), per_channel(data["x"]) * per_channel(centred))
    for (name, batch), old, ours, torchs, size in zip(
        weights.items(), (data["running_mean"], data["running_var"]), stats, plain_stats, sizes, strict=True
    ):
        exact_stat = (1 - momentum) * old.double() + momentum * batch.detach()
        assert_in_budget(name, ours, torchs, exact_stat, size + old.double().abs())


def _impossible(case: dict[str, Any]) -> bool:
    if case["mode"] == "eval" and not case["running"]:
        return True
    return case["params"] == "fp32" and case["dtype"].itemsize > 2


CASES = grid(
    {
        "shape": tuple(SHAPES),
        "dtype": FLOATS,
        "layout": LAYOUTS,
        "residual": ("none", "other", "self"),
        "residual_layout": LAYOUTS,
        "grad_layout": (*LAYOUTS, "expanded"),
        "activation": ("relu", None),
        "mode": ("train", "eval"),
        "vectors": ("both", "none", "gamma", "beta"),
        "running": (True, False),
        "params": ("same", "fp32"),
        "threads": (1, 2),
    },
    _impossible,
)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("backend", backends("reference", "cpp"))
def test_parity(backend: str, case: dict[str, Any]) -> None:
    data = problem(case["shape"], case["dtype"], case["params"], case["vectors"], case["running"])
    names = ("layout", "residual", "residual_layout", "grad_layout", "activation")
    options = {name: case[name] for name in names}
    with threads(1):
        check(backend, data, training=case["mode"] == "train", count=case["threads"], **options)


BACKENDS = backends("reference", "cpp")


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", [(0, 4, 3, 3), (2, 4, 0, 3), (0, 4), (2, 0, 3, 3), (0, 4, 2, 2, 2)], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_empty(backend: str, shape: tuple[int, ...], training: bool) -> None:
    """As torch: an empty result, zero gradients, running statistics left alone."""
    results = []
    for ours in (True, False):
        x = torch.empty(shape, requires_grad=True)
        # With no channels aten stumbles over gamma[0].
        gamma, beta = (torch.ones(shape[1], requires_grad=True) if shape[1] else None for _ in range(2))
        mean, var = torch.full((shape[1],), 0.25), torch.full((shape[1],), 2.0)
        if ours:
            with fr.use_backend(backend):
                y = fr.ops.bn_act(x, gamma, beta, mean, var, torch.empty(shape), training=training)
        else:
            y = torch.relu(F.batch_norm(x, mean, var, gamma, beta, training) + torch.empty(shape))
        y.sum().backward()
        results.append((y, x.grad, mean, var, *(p.grad for p in (gamma, beta) if p is not None)))
    for ours, torchs in zip(*results, strict=True):
        assert torch.equal(ours, torchs)


@pytest.mark.parametrize("shape", [(1, 4), (1, 4, 1), (1, 4, 1, 1), (1, 1, 1, 1, 1)], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_one_value_per_channel(backend: str, shape: tuple[int, ...]) -> None:
    """torch's own exception and sentence in training; fine in eval mode."""
    x, vector = torch.randn(shape), torch.ones(shape[1])
    with pytest.raises(ValueError, match="Expected more than 1 value per channel") as torchs:
        F.batch_norm(x, None, None, None, None, True)
    with fr.use_backend(backend):
        with pytest.raises(ValueError, match="^" + re.escape(str(torchs.value)) + "$"):
            fr.ops.bn_act(x, None, None, None, None, training=True)
        fr.ops.bn_act(x, None, None, vector, vector)


@pytest.mark.parametrize("eps", [0.0, -1.0])
def test_eps_must_be_positive_in_training(eps: float) -> None:
    x = torch.randn(4, 3)
    with pytest.raises(ValueError, match="eps must be positive") as torchs:
        F.batch_norm(x, None, None, None, None, True, eps=eps)
    with pytest.raises(ValueError, match="^" + re.escape(str(torchs.value)) + "$"):
        fr.ops.bn_act(x, None, None, None, None, training=True, eps=eps)


@pytest.mark.parametrize("eps", [1e-5, 1e-3, 0.7])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("backend", BACKENDS)
def test_eps(backend: str, training: bool, eps: float) -> None:
    check(backend, problem((3, 5, 4, 4), torch.float32, "same", "both", True), training=training, eps=eps)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("residual", ["none", "other", "self"])
@pytest.mark.parametrize("activation", ["relu", None])
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck(backend: str, activation: str | None, residual: str, training: bool) -> None:
    data = problem((3, 2, 1, 2), torch.float64, "same", "both", True, seed=3)
    leaves = [data[name].requires_grad_() for name in ("x", "gamma", "beta", "residual")]

    def function(x: Tensor, gamma: Tensor, beta: Tensor, other: Tensor) -> Tensor:
        shortcut = {"none": None, "other": other, "self": x}[residual]
        mean, var = data["running_mean"].clone(), data["running_var"].clone()
        with fr.use_backend(backend):
            y = fr.ops.bn_act(x, gamma, beta, mean, var, shortcut, training=training, activation=activation)
        return y if residual == "other" else y + 0 * other

    with threads(1):
        assert gradcheck(function, leaves)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True, database=None)
@given(
    shape=st.tuples(st.integers(1, 5), st.integers(1, 70), st.integers(1, 9), st.integers(1, 9)),
    dims=st.integers(2, 4),
    dtype=st.sampled_from(FLOATS),
    layout=st.sampled_from(LAYOUTS),
    residual=st.sampled_from(["none", "other", "self"]),
    residual_layout=st.sampled_from(LAYOUTS),
    activation=st.sampled_from(["relu", None]),
    training=st.booleans(),
    seed=st.integers(0, 2**20),
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_random_shapes(
    backend: str, shape: Any, dims: int, dtype: Any, training: bool, seed: int, **options: Any
) -> None:
    shape = shape[:dims]
    training = training and shape[0] * math.prod(shape[2:]) > 1
    with threads(1):
        check(backend, problem(shape, dtype, "fp32", "both", True, seed), training=training, **options)


# fp32, mean 1000, std 0.01. What remains is x's own grid of 6e-5, and the mean's: half a step of it is 3e-3 standard
# deviations. torch's kernel is the reason for an absolute bound: twice its error would allow nearly anything.
STABLE = 3.5e-3


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("shape", [(8, 16, 14, 14), (256, 16), (2, 4, 150, 150)], ids=str)
@needs_cpp
def test_stability(shape: tuple[int, ...], layout: str) -> None:
    x = arrange(torch.randn(shape) * 0.01 + 1000, layout).requires_grad_()
    grad = torch.randn(shape)
    exact_x = doubled(x, leaf=True)
    exact, mean, var = exact_bn_act(exact_x, None, None, None, None, None, training=True, eps=1e-5, mask=None)
    exact.backward(grad.double())
    running_mean, running_var = torch.zeros(shape[1]), torch.zeros(shape[1])
    with fr.use_backend("cpp"):
        out = fr.ops.bn_act(x, None, None, running_mean, running_var, training=True, activation=None, momentum=1.0)
    out.backward(grad)
    assert (out - exact).abs().max() < STABLE
    count = x.numel() / shape[1]
    torch.testing.assert_close(running_mean.double(), mean.detach(), rtol=1e-7, atol=0)
    torch.testing.assert_close(running_var.double(), var.detach() * count / (count - 1), rtol=1e-6, atol=0)
    assert (x.grad - exact_x.grad).norm() < STABLE * exact_x.grad.norm()


def test_stability_of_torch() -> None:
    """Why `test_stability` cannot take torch for its budget; should torch improve, this says so."""
    x = arrange(torch.randn(8, 16, 14, 14) * 0.01 + 1000, "channels_last")
    exact, _, _ = exact_bn_act(x.double(), None, None, None, None, None, training=True, eps=1e-5, mask=None)
    assert (F.batch_norm(x, None, None, None, None, True) - exact).abs().max() > 3 * STABLE


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_constant_channel(backend: str, layout: str) -> None:
    """A variance of 0 gives beta, neither NaN nor a negative variance."""
    # torch's kernels find a variance of 0.1 at a mean of 1000.
    x = arrange(torch.full((4, 3, 5, 5), 1000.1 if backend == "cpp" else 1.1), layout)
    mean, var = torch.zeros(3), torch.ones(3)
    beta = torch.tensor([1.0, -2.0, 0.5])
    with fr.use_backend(backend):
        out = fr.ops.bn_act(x, None, beta, mean, var, training=True, momentum=1.0, activation=None)
    torch.testing.assert_close(out, columns(beta, x).expand_as(x), rtol=0, atol=0.1)  # rstd is 316, x's grid 6e-5
    assert (var >= 0).all()
    assert (var < 1e-6).all()


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("with_residual", [True, False])
@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_and_inf_are_values(
    backend: str, with_residual: bool, training: bool, dtype: torch.dtype, layout: str
) -> None:
    """Forward and backward as torch: NaN passes the ReLU, and its gradient passes the mask."""
    data = problem((3, 11, 4, 5), dtype, "fp32", "both", True)
    data["gamma"][2] = 0.7
    for channel, value in ((2, torch.nan), (4, torch.inf), (6, -torch.inf)):
        data["x"][1, channel, 2, 2] = value
    for channel, value in ((7, torch.nan), (8, torch.inf), (9, -torch.inf)):
        data["residual"][0, channel, 1, 1] = value
    data["grad"][2, 10, 0, 0] = torch.nan
    results = []
    for ours in (True, False):
        x, gamma, beta = (clone(data[name], leaf=True) for name in ("x", "gamma", "beta"))
        x = arrange(x.detach(), layout).requires_grad_()
        residual = clone(data["residual"], leaf=True) if with_residual else None
        stats = clone(data["running_mean"]), clone(data["running_var"])
        if ours:
            with fr.use_backend(backend):
                y = fr.ops.bn_act(x, gamma, beta, *stats, residual, training=training)
        else:
            y = torch.relu(plain_bn_act(x, gamma, beta, *stats, residual, training, 0.1, 1e-5))
        y.backward(data["grad"])
        grads = (x.grad, gamma.grad, beta.grad, residual.grad if with_residual else gamma.grad)
        results.append((y.detach(), *grads, *stats))
    names = ("out", "grad x", "grad gamma", "grad beta", "grad residual", "running mean", "running var")
    for name, ours, torchs in zip(names, *results, strict=True):
        assert equal_specials(ours, torchs), name
    assert results[0][0][:, 0].isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_momentum(backend: str) -> None:
    """A float or a 0-d tensor, 0 and 1 included; unbiased into the running variance, biased to normalise."""
    x = torch.randn(4, 3, 2, 2, dtype=torch.float64)
    for momentum in (0.0, 0.3, 1.0, torch.tensor(0.3), torch.tensor(0.3, dtype=torch.float64), torch.tensor(1)):
        mean, var = torch.full((3,), 0.5, dtype=torch.float64), torch.full((3,), 2.0, dtype=torch.float64)
        with fr.use_backend(backend):
            out = fr.ops.bn_act(x, None, None, mean, var, training=True, momentum=momentum, activation=None)
        m = float(momentum)
        torch.testing.assert_close(mean, (1 - m) * 0.5 + m * x.mean((0, 2, 3)), rtol=1e-7, atol=1e-12)
        torch.testing.assert_close(var, (1 - m) * 2.0 + m * x.var((0, 2, 3), correction=1), rtol=1e-7, atol=1e-12)
        torch.testing.assert_close(out.var((0, 2, 3), correction=0), torch.ones(3).double(), rtol=1e-4, atol=0)


@pytest.mark.parametrize("kept", ["mean", "var"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_one_running_statistic(backend: str, kept: str) -> None:
    x = torch.randn(4, 3, 2, 2)
    running = torch.ones(3)
    pair = (running, None) if kept == "mean" else (None, running)
    with fr.use_backend(backend):
        fr.ops.bn_act(x, None, None, *pair, training=True, momentum=1.0)
        with pytest.raises(ValueError, match="running_mean and running_var are needed"):
            fr.ops.bn_act(x, None, None, *pair)
    torch.testing.assert_close(running, x.mean((0, 2, 3)) if kept == "mean" else x.var((0, 2, 3)))


@pytest.mark.parametrize("params", ["same", "fp32"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_version_counters(backend: str, params: str) -> None:
    """autograd sees the write to the running statistics; eval mode writes nothing."""
    data = problem((4, 3, 2, 2), torch.bfloat16, params, "both", True)
    stats = data["running_mean"], data["running_var"]
    for training, change in ((True, 1), (False, 0)):
        before = [t._version for t in stats]
        with fr.use_backend(backend):
            fr.ops.bn_act(data["x"], data["gamma"], data["beta"], *stats, training=training)
        for t, version in zip(stats, before, strict=True):
            assert (t._version > version) == bool(change)


@pytest.mark.parametrize("backend", BACKENDS)
def test_inference_mode(backend: str) -> None:
    """Tensors without version counters, in training too."""
    with torch.inference_mode(), fr.use_backend(backend):
        x, vector = torch.randn(4, 3, 2, 2), torch.ones(3)
        out = fr.ops.bn_act(x, vector, vector, torch.zeros(3), vector.clone(), training=True)
        assert out.is_inference()


def saved_storages(function: Any) -> tuple[Any, set[int]]:
    saved: list[Tensor] = []

    def pack(t: Tensor) -> Tensor:
        saved.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = function()
    return out, storages(*saved)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("with_residual", [True, False])
@pytest.mark.parametrize("activation", ["relu", None])
@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_saved(backend: str, activation: str | None, with_residual: bool, training: bool) -> None:
    """x and vectors; the output only where its sign cannot be recomputed from x; never the residual."""
    data = problem((4, 16, 8, 8), torch.float32, "same", "both", True)
    x, residual = data["x"].requires_grad_(), data["residual"]
    vectors = [data[name] for name in ("gamma", "beta", "running_mean", "running_var")]
    with fr.use_backend(backend):
        out, saved = saved_storages(
            lambda: fr.ops.bn_act(
                x, *vectors, residual if with_residual else None, training=training, activation=activation
            )
        )
    expected = storages(x, *vectors[:2])
    if activation == "relu" and with_residual:
        expected |= storages(out)
    if not training:
        expected |= storages(*vectors[2:])
    assert expected <= saved
    assert len(saved - expected) == (2 if training else 0)  # batch mean and variance
    assert not saved & storages(residual)


@pytest.mark.parametrize("backend", BACKENDS)
def test_in_place_changes_are_seen(backend: str) -> None:
    """As with any op of torch: changing what is saved makes backward fail, changing what is not does not."""
    data = problem((4, 3, 2, 2), torch.float32, "same", "both", True)
    vectors = [data[name] for name in ("gamma", "beta", "running_mean", "running_var")]

    def run(with_residual: bool, training: bool, change: Any) -> None:
        x = data["x"].clone().requires_grad_()
        with fr.use_backend(backend):
            out = fr.ops.bn_act(x, *vectors, data["residual"] if with_residual else None, training=training)
        change(out)
        out.sum().backward()

    run(False, True, lambda out: out.add_(1))
    run(False, True, lambda out: vectors[2].add_(1))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        run(True, True, lambda out: out.add_(1))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        run(False, False, lambda out: vectors[2].add_(1))


@pytest.mark.parametrize("wanted", ["x", "gamma", "beta", "residual"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("backend", BACKENDS)
def test_one_gradient_only(backend: str, training: bool, wanted: str) -> None:
    data = problem((4, 5, 3, 3), torch.float32, "same", "both", True)
    data[wanted].requires_grad_()
    vectors = [data[name] for name in ("gamma", "beta", "running_mean", "running_var")]
    with fr.use_backend(backend):
        out = fr.ops.bn_act(data["x"], *vectors, data["residual"], training=training)
    out.backward(data["grad"])
    for name in ("x", "gamma", "beta", "residual"):
        assert (data[name].grad is not None) == (name == wanted)
    assert data[wanted].grad.isfinite().all()


@pytest.mark.parametrize("activation", ["relu", None])
@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_is_aliased(backend: str, activation: str | None) -> None:
    """Inputs are not written to, and no two of the gradients share memory."""
    data = problem((4, 5, 3, 3), torch.float32, "same", "both", True)
    before = {name: t.clone() for name, t in data.items()}
    x, residual = data["x"].requires_grad_(), data["residual"].requires_grad_()
    with fr.use_backend(backend):
        out = fr.ops.bn_act(x, data["gamma"], data["beta"], None, None, residual, training=True, activation=activation)
    out.backward(data["grad"])
    assert len(storages(x.grad, residual.grad, data["grad"], out, x, residual)) == 6
    for name, t in data.items():
        assert torch.equal(t, before[name]), name


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("shape", [(12, 4, 37, 38), (1, 2, 260, 261), (17, 1030, 2, 2)], ids=str)
@needs_cpp
def test_deterministic(shape: tuple[int, ...], layout: str) -> None:
    """Bitwise the same twice, and whatever the number of threads."""
    data = problem(shape, torch.float32, "same", "both", True)

    def run() -> list[Tensor]:
        stats = [data["running_mean"].clone(), data["running_var"].clone()]
        x, gamma, beta = (
            arrange(data["x"], layout).requires_grad_(),
            *(clone(data[n], leaf=True) for n in ("gamma", "beta")),
        )
        with fr.use_backend("cpp"):
            out = fr.ops.bn_act(x, gamma, beta, *stats, arrange(data["residual"], layout), training=True)
        out.backward(data["grad"])
        return [out.detach(), x.grad, gamma.grad, beta.grad, *stats]

    results = []
    for count in (1, 1, 2, 3, 5):
        with threads(count):
            results.append(run())
    for result in results[1:]:
        assert all(map(torch.equal, results[0], result))


def test_reference_is_deterministic() -> None:
    data = problem((12, 4, 37, 38), torch.float32, "same", "both", True)
    with fr.use_backend("reference"):
        runs = [fr.ops.bn_act(data["x"], None, None, None, None, training=True) for _ in range(2)]
    assert torch.equal(*runs)


@pytest.mark.parametrize("x_dtype", [torch.bfloat16, torch.float32, torch.float16])
@pytest.mark.parametrize("residual_dtype", [None, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("activation", ["relu", None])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast(backend: str, training: bool, activation: str | None, residual_dtype: Any, x_dtype: Any) -> None:
    """dtypes as eager's: the output has x's, a float32 residual makes it float32."""
    if residual_dtype == x_dtype:
        residual_dtype = None
    data = problem((4, 8, 6, 6), x_dtype, "fp32", "both", True)
    residual = None if residual_dtype is None else data["residual"].to(residual_dtype)
    results = []
    for ours in (True, False):
        x = clone(data["x"], leaf=True)
        other = clone(residual, leaf=True)
        gamma, beta = clone(data["gamma"], leaf=True), clone(data["beta"], leaf=True)
        stats = clone(data["running_mean"]), clone(data["running_var"])
        with torch.autocast("cpu", torch.bfloat16):
            if ours:
                with fr.use_backend(backend):
                    y = fr.ops.bn_act(x, gamma, beta, *stats, other, training=training, activation=activation)
            else:
                y = plain_bn_act(x, gamma, beta, *stats, other, training, 0.1, 1e-5)
                y = torch.relu(y) if activation == "relu" else y
        y.sum().backward()
        results.append([y.detach(), x.grad, gamma.grad, *stats, *([] if other is None else [other.grad])])
    for ours, torchs in zip(*results, strict=True):
        assert ours.dtype == torchs.dtype
        torch.testing.assert_close(ours, torchs, rtol=0.05, atol=0.1)


@pytest.mark.parametrize("backend", BACKENDS)
def test_double_backward_is_refused(backend: str) -> None:
    x = torch.randn(4, 3, requires_grad=True)
    with fr.use_backend(backend):
        out = fr.ops.bn_act(x, None, None, None, None, training=True)
    (grad,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_vectors(backend: str) -> None:
    """Vectors with gaps: read rightly, and written rightly where they are running statistics."""
    data = problem((4, 5, 3, 3), torch.float32, "same", "both", True)

    def gaps(t: Tensor) -> Tensor:
        return torch.stack([t, torch.full_like(t, 1e4)], 1).flatten()[::2]

    names = ("gamma", "beta", "running_mean", "running_var")
    strided, dense = [gaps(data[n]) for n in names], [data[n].clone() for n in names]
    with fr.use_backend(backend):
        results = [fr.ops.bn_act(data["x"], *vectors, training=True) for vectors in (strided, dense)]
    torch.testing.assert_close(*results, rtol=1e-6, atol=1e-6)
    for ours, plain in zip(strided, dense, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_unusual_views(backend: str) -> None:
    """An expanded input, a lazily negated one, and a requires-grad view."""
    vector = torch.rand(3) + 0.5
    expanded = torch.randn(1, 3, 1, 5).expand(4, 3, 6, 5)
    negated = torch.complex(torch.randn(4, 3, 2, 2), torch.randn(4, 3, 2, 2)).conj().imag
    assert negated.is_neg()
    view = torch.randn(4, 6, 3, 3, requires_grad=True)[:, 1:4]
    for x in (expanded, negated, view):
        with fr.use_backend(backend):
            out = fr.ops.bn_act(x, vector, vector, None, None, x, training=True)
        plain = torch.relu(F.batch_norm(x.clone(), None, None, vector, vector, True) + x)
        torch.testing.assert_close(out, plain, rtol=1e-5, atol=1e-5)
    out.sum().backward()


def good() -> dict[str, Any]:
    vector = torch.ones(3)
    return {
        "x": torch.randn(4, 3, 2, 2),
        "gamma": vector,
        "beta": vector,
        "running_mean": vector.clone(),
        "running_var": vector.clone(),
    }


BAD = {
    "x is a list": ({"x": [1.0]}, TypeError, "x must be a torch.Tensor, got list"),
    "x is None": ({"x": None}, TypeError, "x must be a torch.Tensor"),
    "x is integer": ({"x": torch.ones(4, 3, dtype=torch.int32)}, TypeError, "x must be float16.*got torch.int32"),
    "x is complex": ({"x": torch.ones(4, 3, dtype=torch.complex64)}, TypeError, "got torch.complex64"),
    "x is sparse": ({"x": torch.ones(4, 3).to_sparse()}, TypeError, "x must be a strided tensor"),
    "x is 1-d": ({"x": torch.ones(3)}, ValueError, "at least 2-d"),
    "x is on meta": ({"x": torch.ones(4, 3, device="meta")}, ValueError, "gamma is on cpu, expected meta"),
    "gamma is too long": ({"gamma": torch.ones(4)}, ValueError, r"gamma has shape \(4,\), expected \(3,\)"),
    "gamma is 2-d": ({"gamma": torch.ones(3, 1)}, ValueError, "gamma has shape"),
    "gamma is a float": ({"gamma": 1.0}, TypeError, "gamma must be a torch.Tensor or None, got float"),
    "gamma is float64": (
        {"gamma": torch.ones(3).double()},
        TypeError,
        "gamma is torch.float64, expected torch.float32",
    ),
    "beta is bfloat16": ({"beta": torch.ones(3).bfloat16()}, TypeError, "beta is torch.bfloat16"),
    "beta is on meta": ({"beta": torch.ones(3, device="meta")}, ValueError, "beta is on meta, expected cpu"),
    "mean is too short": ({"running_mean": torch.ones(2)}, ValueError, "running_mean has shape"),
    "mean is integer": ({"running_mean": torch.ones(3).int()}, TypeError, "running_mean is torch.int32"),
    "var is None in eval": ({"running_var": None}, ValueError, "running_mean and running_var are needed, got None"),
    "residual broadcasts": ({"residual": torch.ones(4, 3, 1, 1)}, ValueError, "residual has shape"),
    "residual is float64": ({"residual": torch.ones(4, 3, 2, 2).double()}, TypeError, "residual is torch.float64"),
    "residual is a float": ({"residual": 1.0}, TypeError, "residual must be a torch.Tensor, got float"),
    "residual is on meta": ({"residual": torch.ones(4, 3, 2, 2, device="meta")}, ValueError, "residual is on meta"),
    "residual is sparse": ({"residual": torch.ones(4, 3, 2, 2).to_sparse()}, TypeError, "residual must be a strided"),
    "unknown activation": ({"activation": "gelu"}, ValueError, "activation must be 'relu' or None, got 'gelu'"),
    "activation is a list": ({"activation": []}, ValueError, "activation must be 'relu' or None"),
    "momentum is None": ({"momentum": None, "training": True}, TypeError, "momentum must be"),
    "momentum is a vector": (
        {"momentum": torch.ones(3), "training": True},
        (TypeError, ValueError),
        "momentum must be",
    ),
    "momentum is on meta": ({"momentum": torch.ones((), device="meta"), "training": True}, ValueError, "momentum"),
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("backend", BACKENDS)
def test_bad_arguments(backend: str, name: str) -> None:
    change, error, message = BAD[name]
    with fr.use_backend(backend), pytest.raises(error, match=message):
        fr.ops.bn_act(**good() | change)


@pytest.mark.parametrize("training", [True, False])
def test_dtypes_must_agree_outside_autocast(training: bool) -> None:
    arguments = good() | {"x": torch.randn(4, 3, 2, 2).bfloat16(), "residual": torch.randn(4, 3, 2, 2)}
    with pytest.raises(TypeError, match=r"residual is torch.float32, expected torch.bfloat16"):
        fr.ops.bn_act(**arguments, training=training)


@needs_cpp
def test_kernels_check_what_they_are_given() -> None:
    """The registered kernels are called with what the ops prepare; anything else is an exception, never a crash."""
    ops = torch.ops.fused_resnet_cpp
    x, vector = torch.randn(4, 3, 5, 5), torch.ones(3)
    calls = {
        "strides": lambda: ops.bn_act_eval_forward(x[..., ::2], vector, vector, vector, vector, None, 1e-5, True),
        "vector size": lambda: ops.bn_act_eval_forward(x, torch.ones(2), vector, vector, vector, None, 1e-5, True),
        "vector dtype": lambda: ops.bn_act_eval_forward(x, vector.double(), None, vector, vector, None, 1e-5, True),
        "residual size": lambda: ops.bn_act_eval_forward(x, None, None, vector, vector, x[:2], 1e-5, True),
        "residual strides": lambda: ops.bn_act_eval_forward(
            x, None, None, vector, vector, x.contiguous(memory_format=torch.channels_last), 1e-5, True
        ),
        "residual dtype": lambda: ops.bn_act_eval_forward(x, None, None, vector, vector, x.double(), 1e-5, True),
        "dims": lambda: ops.bn_act_eval_forward(vector, None, None, vector, vector, None, 1e-5, True),
        "integer": lambda: ops.bn_act_eval_forward(x.int(), None, None, vector, vector, None, 1e-5, True),
        "running size": lambda: ops.bn_act_train_forward(x, None, None, torch.ones(2), vector, None, 0.1, 1e-5, True),
        "no out": lambda: ops.bn_act_backward(x, x, None, None, None, vector, vector, 1e-5, True, True, True),
        "grad size": lambda: ops.bn_act_backward(x[:1], x, None, None, None, vector, vector, 1e-5, True, True, False),
        "mean size": lambda: ops.bn_act_backward(
            x, x, None, None, None, torch.ones(2), vector, 1e-5, True, True, False
        ),
    }
    for name, call in calls.items():
        with pytest.raises(RuntimeError) as error:
            call()
        assert "must" in str(error.value) or "needed" in str(error.value), (name, error.value)


@needs_cpp
def test_large_strides_and_guard_values() -> None:
    """Nothing is written outside the tensors: running statistics that are a slice keep their neighbours."""
    around = torch.full((3, 64), 7.0)
    x = torch.randn(2, 64, 9, 9)
    with fr.use_backend("cpp"):
        fr.ops.bn_act(x, None, None, around[1], None, training=True)
    assert (around[0] == 7).all()
    assert (around[2] == 7).all()
    assert not (around[1] == 7).any()


def test_meta() -> None:
    """Shapes and layouts without data; no kernels there, so not for an explicit backend that has none."""
    x = torch.empty(4, 3, 5, 5, device="meta").to(memory_format=torch.channels_last)
    vector = torch.empty(3, device="meta")
    for training in (True, False):
        out = fr.ops.bn_act(x, vector, vector, vector, vector, x, training=training)
        assert out.device.type == "meta"
        assert out.shape == x.shape
        assert out.is_contiguous(memory_format=torch.channels_last)
    with fr.use_backend("cpp"), pytest.raises(fr.BackendUnavailableError, match="no kernels for device meta"):
        fr.ops.bn_act(x, vector, vector, vector, vector)


def test_budget_bites() -> None:
    """The error budget is no rubber stamp: small mistakes in each formula are over it."""
    data = problem((8, 6, 9, 9), torch.float32, "same", "both", True)
    x, gamma, beta = (data[n].double() for n in ("x", "gamma", "beta"))
    args = (x, gamma, beta, None, None, None)
    exact, mean, var = exact_bn_act(*args, training=True, eps=1e-5, mask=None)
    plain = F.batch_norm(data["x"], None, None, data["gamma"], data["beta"], True)
    count = x.numel() / 6
    unbiased = (x - columns(mean, x)) * columns(gamma / (var * count / (count - 1) + 1e-5).sqrt(), x) + columns(beta, x)
    other_eps, _, _ = exact_bn_act(*args, training=True, eps=2e-5, mask=None)
    one_wrong = exact.clone()
    one_wrong[7, 5, 8, 8] += 1e-4 * one_wrong[:, 5].abs().max()
    for name, wrong in {"unbiased": unbiased, "eps": other_eps, "one element": one_wrong}.items():
        used = over_budget(wrong.float(), plain, exact, 4 * per_channel(exact))
        assert used.max() > 1, name
    assert over_budget(plain, plain, exact, 4 * per_channel(exact)).max() <= 1


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@needs_cpp
def test_backward_masks_what_forward_cut_off(dtype: torch.dtype, layout: str) -> None:
    """The mask that is recomputed from x is the forward pass's to the last bit, far from 0 as well."""
    ops = torch.ops.fused_resnet_cpp
    x = arrange((torch.randn(4, 40, 9, 11) * 0.01 + (10 if dtype.itemsize == 2 else 1000)).to(dtype), layout)
    gamma, beta = (torch.randn(40).to(accumulation(dtype)) for _ in range(2))
    out, mean, var = ops.bn_act_train_forward(x, gamma, beta, None, None, None, 0.1, 1e-5, True)
    grad = torch.ones_like(x)
    frozen = ops.bn_act_backward(grad, x, None, gamma, beta, mean, var, 1e-5, True, False, False)
    assert torch.equal(frozen[0] != 0, out != 0)
    assert 0.1 < (out != 0).double().mean() < 0.9


BN_BN = [p for p in BACKENDS if dispatch.implementation(dispatch.load(p.id), "bn_bn_act_train_forward", "cpu")]


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("activation", ["relu", None])
@pytest.mark.parametrize("backend", BN_BN)
def test_two_batch_norms(backend: str, activation: str | None, dtype: torch.dtype, layout: str) -> None:
    """The primitive of projection blocks: act(bn(x) + bn2(x2)), its gradients and both running statistics."""
    data = [problem((3, 12, 5, 6), dtype, "fp32", "both", True, seed) for seed in (0, 1)]
    data[1]["gamma"] = None
    module = dispatch.load(backend)
    xs = [arrange(d["x"], layout) for d in data]
    stats = [[d["running_mean"].clone(), d["running_var"].clone()] for d in data]
    vectors = [(d["gamma"], d["beta"], *s, 0.3, 1e-5) for d, s in zip(data, stats, strict=True)]
    out, mean, var, mean2, var2 = module.bn_bn_act_train_forward(xs[0], *vectors[0], xs[1], *vectors[1], activation)
    mask = out > 0 if activation == "relu" else torch.ones_like(out, dtype=torch.bool)
    grad = arrange(data[0]["grad"], layout)
    grads = module.bn_bn_act_backward(
        grad, xs[0], *vectors[0][:2], mean, var, 1e-5, xs[1], *vectors[1][:2], mean2, var2, 1e-5, activation
    )

    exact_xs, exact_params, parts = [], [], []
    for d in data:
        exact_xs.append(doubled(d["x"], leaf=True))
        exact_params.append((doubled(d["gamma"], leaf=True), doubled(d["beta"], leaf=True)))
        parts.append(
            exact_bn_act(exact_xs[-1], *exact_params[-1], None, None, None, training=True, eps=1e-5, mask=None)
        )
    z = parts[0][0] + parts[1][0]
    z.backward(torch.where(mask, grad.double(), 0))
    plain_xs, plain_params, y = [], [], 0
    for d, s in zip(data, ([clone(t) for t in (d["running_mean"], d["running_var"])] for d in data), strict=True):
        plain_xs.append(arrange(d["x"], layout).requires_grad_())
        plain_params.append((clone(d["gamma"], leaf=True), clone(d["beta"], leaf=True)))
        y = y + F.batch_norm(plain_xs[-1], *s, *plain_params[-1], True, 0.3)
    y.backward(torch.where(mask, grad, 0))

    size = 20 * per_channel(z)
    assert_in_budget("out", out, torch.where(mask, y, 0), torch.where(mask, z, 0), size)
    count = z.numel() / z.shape[1]
    for d, s, (_, m, v), ours in zip(data, stats, parts, ((mean, var), (mean2, var2)), strict=True):
        torch.testing.assert_close(ours[0].double(), m.detach(), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(ours[1].double(), v.detach(), rtol=1e-5, atol=1e-5)
        expected = 0.7 * d["running_var"].double() + 0.3 * v.detach() * count / (count - 1)
        torch.testing.assert_close(s[1].double(), expected, rtol=1e-5, atol=1e-5)
        expected = 0.7 * d["running_mean"].double() + 0.3 * m.detach()
        torch.testing.assert_close(s[0].double(), expected, rtol=1e-5, atol=1e-5)
    total = 50 * grad.double().abs().sum((0, 2, 3))
    for i in range(2):
        name = f"of {i}"
        assert_in_budget(f"grad x {name}", grads[3 * i], plain_xs[i].grad, exact_xs[i].grad, total)
        for ours, exact in zip(grads[3 * i + 1 : 3 * i + 3], exact_params[i], strict=True):
            if exact is not None:
                assert_in_budget(f"grad of a vector {name}", ours, None, exact.grad, total)


def test_names_of_primitives_and_backends() -> None:
    for primitive in itertools.chain(*dispatch.OPS.values()):
        assert hasattr(dispatch.load("reference"), primitive)
