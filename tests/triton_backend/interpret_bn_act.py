"""bn_act and bn_bn_act: the kernels against float64, in the interpreter."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import pytest
import torch
from harness import DTYPES, assert_close, assert_guards, guarded, like, track
from torch import Tensor

from fused_resnet.backends import reference
from fused_resnet.backends import triton as backend
from fused_resnet.backends.triton import bn_act, configs

EPS = 1e-5
pytestmark = pytest.mark.usefixtures("poison")
# The size of what is added up on the way to a result; sums over rows grow with the root of the number of rows.
SCALES = {"out": 10, "grad x": 20, "grad gamma": 100, "grad beta": 50} | {"grad x2": 20, "grad gamma2": 100}
SCALES |= {"grad beta2": 50, "var": 10, "var2": 10, "running var": 10, "v1": 10, "v2": 10}
# On the target "tiny" (conftest.py) blocks are 32 or 64 rows by 64 channels, and up to 2 programs run.
SHAPES = {
    "whole blocks, 2 parts": (2, 64, 8, 8),
    "ragged rows and channels, 3 tiles in one part": (2, 67, 9, 9),
    "less than a block": (3, 5, 4, 3),
}


class Variant(NamedTuple):
    training: bool = True
    residual: bool = False
    activation: str | None = "relu"
    affine: bool = True
    running: bool = True
    momentum: float | Tensor = 0.1
    vectors: torch.dtype | None = None  # of gamma, beta and the running statistics; None: x's


VARIANTS = {
    "plain": Variant(),
    "residual": Variant(residual=True),
    "residual-linear": Variant(residual=True, activation=None, vectors=torch.float32),
    "no-affine": Variant(affine=False, running=False, activation=None),
    "device-momentum": Variant(momentum=torch.tensor(0.25)),
    "frozen": Variant(training=False, vectors=torch.float32),
    "frozen-residual": Variant(training=False, residual=True),
    "frozen-linear": Variant(training=False, affine=False, residual=True, activation=None),
}
GRID = [  # every pair of variant, dtype, layout and shape meets
    pytest.param(variant, shape, dtype, layout, id=f"{name}-{str(dtype)[6:]}-{layout}-{shape}")
    for i, (name, variant) in enumerate(VARIANTS.items())
    for (j, dtype), (k, layout) in itertools.product(enumerate(DTYPES), enumerate(("nhwc", "nchw")))
    for shape in [list(SHAPES.values())[(i + j + k) % len(SHAPES)]]
]


def vector(channels: int, dtype: torch.dtype, seed: int, positive: bool = False) -> Tensor:
    values = torch.randn(channels, generator=torch.Generator().manual_seed(seed))
    return like((values.abs() + 0.5 if positive else values).to(dtype))


def double(*values: object) -> list:
    return [v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for v in values]


@pytest.mark.parametrize(("variant", "shape", "dtype", "layout"), GRID)
def test_bn_act(variant, shape, dtype, layout):
    channels = shape[1]
    kind = variant.vectors or dtype
    x, residual, grad = (guarded(shape, dtype, layout, seed=seed) for seed in range(3))
    gamma, beta = (vector(channels, kind, 3), vector(channels, kind, 4)) if variant.affine else (None, None)
    residual = residual if variant.residual else None
    running = [vector(channels, kind, 5), vector(channels, kind, 6, positive=True)]
    results = {}
    for name, module, wide in (("ours", backend, list), ("plain", reference, list), ("exact", reference, double)):
        stats = [r.to(torch.float64 if name == "exact" else kind) for r in map(torch.clone, running)]
        given = double(x, gamma, beta, residual) if wide is double else [x, gamma, beta, residual]
        with track() as launches:
            if variant.training:
                buffers = stats if variant.running else (None, None)
                out, mean, var = module.bn_act_train_forward(
                    *given[:3], *buffers, given[3], variant.momentum, EPS, variant.activation
                )
                results[name] = {"out": out, "mean": mean, "var": var}
                if variant.running:
                    results[name] |= {"running mean": stats[0], "running var": stats[1]}
            else:
                out = module.bn_act_eval_forward(*given[:3], *stats, given[3], EPS, variant.activation)
                results[name] = {"out": out}
        assert bool(launches) == (name == "ours")
    exact = results["exact"]
    # The same statistics and output go into every backward pass.
    statistics = (exact["mean"].float(), exact["var"].float()) if variant.training else running
    keep = exact["out"].to(dtype) if variant.residual and variant.activation else None
    for name, module in (("ours", backend), ("plain", reference), ("exact", reference)):
        args = [grad, x, keep, gamma, beta, *statistics]
        args = double(*args) if name == "exact" else args
        with track():
            grads = module.bn_act_backward(*args, EPS, variant.activation, variant.training, variant.residual)
        names = ("grad x", "grad gamma", "grad beta", "grad residual")
        results[name] |= {key: g for key, g in zip(names, grads, strict=True) if g is not None}
    assert results["ours"].keys() == exact.keys()
    for name, value in results["ours"].items():
        assert_close(name, value, results["plain"][name], exact[name], SCALES.get(name, 4))
    assert_guards(*(t for t in (x, residual, grad, gamma, beta, *running) if t is not None))


BN_BN_GRID = [
    pytest.param(shape, dtype, layout, id=f"{str(dtype)[6:]}-{layout}-{shape}")
    for (j, dtype), (k, layout) in itertools.product(enumerate(DTYPES), enumerate(("nhwc", "nchw")))
    for shape in [list(SHAPES.values())[(j + k) % len(SHAPES)]]
]


@pytest.mark.parametrize(("shape", "dtype", "layout"), BN_BN_GRID)
def test_bn_bn_act(shape, dtype, layout):
    channels = shape[1]
    activation = None if layout == "nchw" and dtype == torch.float16 else "relu"
    x, x2, grad = (guarded(shape, dtype, layout, seed=seed) for seed in range(3))
    vectors = [vector(channels, dtype, 3 + i, positive=i in (3, 7)) for i in range(8)]
    results = {}
    for name, module in (("ours", backend), ("plain", reference), ("exact", reference)):
        own = [v.clone().to(torch.float64 if name == "exact" else dtype) for v in vectors]
        tensors = double(x, x2, grad) if name == "exact" else [x, x2, grad]
        with track():
            forward = module.bn_bn_act_train_forward(
                tensors[0], *own[:4], 0.1, EPS, tensors[1], *own[4:], torch.tensor(0.2), 2 * EPS, activation
            )
            names = ("out", "mean", "var", "mean2", "var2")
            results[name] = dict(zip(names, forward, strict=True)) | {"r1": own[2], "v1": own[3], "v2": own[7]}
            stats = [results["exact" if "exact" in results else name][key] for key in names[1:]]
            stats = [s.to(torch.float64 if name == "exact" else torch.float32) for s in stats]
            backward = module.bn_bn_act_backward(
                tensors[2],
                tensors[0],
                *own[:2],
                *stats[:2],
                EPS,
                tensors[1],
                *own[4:6],
                *stats[2:],
                2 * EPS,
                activation,
            )
        names = ("grad x", "grad gamma", "grad beta", "grad x2", "grad gamma2", "grad beta2")
        results[name] |= dict(zip(names, backward, strict=True))
    for name, value in results["ours"].items():
        assert_close(name, value, results["plain"][name], results["exact"][name], SCALES.get(name, 4))
    assert results["ours"]["grad beta"].data_ptr() != results["ours"]["grad beta2"].data_ptr()
    assert_guards(x, x2, grad, *vectors)


def test_a_large_mean_does_not_cancel():
    x = torch.randn(64, 16, 3, 3, generator=torch.Generator().manual_seed(0)) * 0.01 + 1000
    x = x.contiguous(memory_format=torch.channels_last)
    out, mean, var = backend.bn_act_train_forward(x, None, None, None, None, None, 0.1, EPS, None)
    exact, exact_mean, exact_var = reference.bn_act_train_forward(
        x.double(), None, None, None, None, None, 0.1, EPS, None
    )
    assert (mean - exact_mean).abs().max() < 7e-5  # a unit in the last place of 1000
    assert ((var - exact_var) / exact_var).abs().max() < 1e-3
    assert (out - exact).abs().max() < 1e-2


def test_statistics_of_many_parts_merge():
    """More parts than one step of the finishing kernel takes, some of them empty."""
    parts, channels = 2 * bn_act.FINISH["BLOCK_P"] + 7, 2 * bn_act.FINISH["BLOCK_C"] + 3
    samples = torch.randn(parts, 5, channels, dtype=torch.float64) * 3 + 10
    counts = torch.arange(parts) % 6
    partials = torch.zeros(3, parts, channels, dtype=torch.float64)
    for part, count in enumerate(counts.tolist()):
        if count:
            values = samples[part, :count]
            partials[:, part] = torch.stack(
                [torch.full((channels,), count), values.mean(0), values.var(0, unbiased=False) * count]
            )
    everything = torch.cat([samples[part, :count] for part, count in enumerate(counts.tolist())])
    mean, var = like(torch.zeros(channels)), like(torch.zeros(channels))
    with track():
        bn_act.finish_statistics(like(partials.float()), mean, var, None, None, 0.1)
    torch.testing.assert_close(mean.double(), everything.mean(0), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(var.double(), everything.var(0, unbiased=False), rtol=1e-5, atol=1e-6)
    assert_guards(mean, var)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_special_values_pass(value):
    x = guarded((2, 8, 4, 4), torch.float32)
    x[0, 3, 1, 2] = value
    grad = torch.ones_like(x)
    ours = [*backend.bn_act_train_forward(x, None, None, None, None, None, 0.1, EPS, "relu")]
    ours += backend.bn_act_backward(grad, x, None, None, None, ours[1], ours[2], EPS, "relu", True, False)[:3]
    for t in (ours[0][:, 3], ours[1][3], ours[2][3], ours[3][:, 3]):
        assert t.isnan().all() or (value == float("inf") and t is ours[1][3])
    others = [c for c in range(8) if c != 3]
    assert not any(t.index_select(1 if t.dim() == 4 else 0, torch.tensor(others)).isnan().any() for t in ours)


def test_2d_and_3d_inputs():
    for shape in ((37, 20), (4, 20, 9)):
        x = torch.randn(shape)
        ours = backend.bn_act_train_forward(x, None, None, None, None, None, 0.1, EPS, "relu")[0]
        torch.testing.assert_close(ours, torch.relu(torch.nn.functional.batch_norm(x, None, None, training=True)))


def test_versions_of_running_statistics_count_up():
    """Folded weights are kept by version: a write from a kernel must not go unseen."""
    x, mean, var = torch.randn(8, 4), torch.zeros(4), torch.ones(4)
    strided = torch.zeros(4, 2)[:, 0]
    backend.bn_act_train_forward(x, None, None, mean, var, None, 0.1, EPS, None)
    assert (mean._version, var._version) == (1, 1)
    backend.bn_act_train_forward(x, None, None, strided, None, None, 0.1, EPS, None)
    torch.testing.assert_close(strided, mean)


def test_empty():
    x = torch.empty(0, 4, 3, 3)
    out, mean, _ = backend.bn_act_train_forward(x, None, None, None, None, None, 0.1, EPS, "relu")
    assert (out.shape, mean.shape) == (x.shape, (4,))


def test_grids_fill_the_device():
    """64 channels, the fewest of a ResNet, occupy every multiprocessor."""
    x = torch.empty((256, 64, 56, 56), dtype=torch.bfloat16, device="meta", memory_format=torch.channels_last)
    configs.assume("sm_90")
    try:
        for kernel in (bn_act.STATISTICS, bn_act.APPLY, bn_act.BACKWARD_REDUCE, bn_act.BACKWARD_APPLY):
            grid, _ = bn_act.plan(kernel, x, x.numel() // 64, 1)
            assert grid[0] * grid[1] == bn_act.PROGRAMS * 132
    finally:
        configs.assume("tiny")
