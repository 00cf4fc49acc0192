"""bn_act_pool: max_pool(act(batch_norm(x))), a network's stem, held against float64 and torch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import FLOATS, backends, grid, needs_cpp, threads
from tolerances import LAYOUTS, arrange, assert_in_budget, columns, doubled, exact_bn_act, memory_format, per_channel
from torch import Tensor
from torch.autograd import gradcheck
from torch.nn import functional as F

import fused_resnet as fr
from fused_resnet import dispatch

pytestmark = pytest.mark.usefixtures("poison")

BACKENDS = backends("reference", "cpp")
SHAPES = {
    (2, 3, 8, 6): "even: the last window has three columns, the first two",
    (2, 3, 7, 9): "odd: the last window is cut as well",
    (1, 5, 1, 2): "one window, all but two of its values padding",
    (3, 4, 2, 1): "one column",
    (1, 64, 14, 14): "ResNet's 64 channels",
    (2, 1, 6, 5): "one channel: NCHW and channels_last at once",
    (1, 13, 37, 35): "channels not divisible by anything",
    (2, 20, 66, 71): "several parts of an image, several threads",
}


def pool(t: Tensor) -> Tensor:
    return F.max_pool2d(t, 3, 2, 1)


def exact_pool(t: Tensor) -> Tensor:
    """Nine shifted views, differentiable by autograd; equal maxima (zeros of a ReLU) have no gradient anyway."""
    height, width = (t.shape[2] + 1) // 2, (t.shape[3] + 1) // 2
    padded = F.pad(t, (1, 2, 1, 2), value=-torch.inf)
    views = [padded[:, :, r : r + 2 * height : 2, c : c + 2 * width : 2] for r in range(3) for c in range(3)]
    return torch.stack(views).amax(0)


def problem(shape: tuple[int, ...], dtype: torch.dtype, vectors: str = "both") -> dict[str, Any]:
    channels = shape[1]
    wide = torch.float32 if dtype.itemsize == 2 else dtype
    x = torch.randn(shape).double()
    x = x * columns(torch.rand(channels).double() + 0.5, x) + columns(torch.randn(channels).double(), x)
    out_shape = (*shape[:2], (shape[2] + 1) // 2, (shape[3] + 1) // 2)
    return {
        "x": x.to(dtype),
        "gamma": (torch.rand(channels) * 3 - 1.5).to(wide) if vectors == "both" else None,
        "beta": torch.randn(channels).to(wide) if vectors == "both" else None,
        "stats": (torch.randn(channels).to(wide), (torch.rand(channels) + 0.5).to(wide)),
        "grad": torch.randn(out_shape).to(dtype),
    }


@pytest.mark.parametrize(
    "case",
    grid(
        {
            "shape": tuple(SHAPES),
            "dtype": FLOATS,
            "layout": LAYOUTS,
            "grad_layout": LAYOUTS,
            "activation": ("relu", None),
            "training": (True, False),
            "vectors": ("both", "none"),
        }
    ),
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_parity(backend: str, case: dict[str, Any]) -> None:
    dtype, training, activation = case["dtype"], case["training"], case["activation"]
    data = problem(case["shape"], dtype, case["vectors"])
    x = arrange(data["x"], case["layout"]).requires_grad_()
    params = [None if data[n] is None else data[n].clone().requires_grad_() for n in ("gamma", "beta")]
    stats = [t.clone() for t in data["stats"]]
    with fr.use_backend(backend):
        out = fr.ops.bn_act_pool(x, *params, *stats, training=training, momentum=0.3, activation=activation)
        with torch.no_grad():
            again = (
                fr.ops.bn_act_pool(x, *params, None, None, training=True, activation=activation) if training else out
            )
    assert torch.equal(out, again), "with and without gradients differ"
    out.backward(arrange(data["grad"], case["grad_layout"]))

    plain_x = data["x"].clone().requires_grad_()
    plain_params = [None if p is None else p.detach().clone().requires_grad_() for p in params]
    plain_stats = [t.clone() for t in data["stats"]]
    y = F.batch_norm(plain_x, *plain_stats, *plain_params, training, 0.3)
    plain = pool(torch.relu(y) if activation == "relu" else y)
    plain.backward(data["grad"])

    exact_x = doubled(data["x"], leaf=True)
    exact_params = [doubled(p, leaf=True) for p in params]
    given = (None, None) if training else tuple(t.double() for t in data["stats"])
    z, _, var = exact_bn_act(exact_x, *exact_params, *given, None, training=training, eps=1e-5, mask=None)
    exact = exact_pool(torch.relu(z) if activation == "relu" else z)
    exact.backward(data["grad"].double())

    rstd = (var.detach() + 1e-5).rsqrt()
    slope = rstd if params[0] is None else rstd * exact_params[0].detach().abs()
    size = slope * per_channel(data["x"]) * (1 + per_channel(z)) + per_channel(z)
    assert_in_budget("out", out, plain, exact, size)
    nhwc = case["layout"] in ("channels_last", "sliced_channels")
    expected = arrange(out.detach(), "channels_last") if nhwc and out.shape[1] > 1 else out.detach().contiguous()
    assert memory_format(out) == memory_format(expected)
    for name, ours, torchs, kept in zip(("mean", "var"), stats, plain_stats, data["stats"], strict=True):
        if training:
            torch.testing.assert_close(ours, torchs, rtol=1e-5, atol=1e-6, msg=f"running {name}")
        else:
            assert torch.equal(ours, kept)

    if dtype.itemsize == 2:
        # Rounded to 16 bits many values of a window are equal, and any of them may have the gradient.
        total = data["grad"].double().abs().sum((0, 2, 3))
        if activation is None and not training:
            scale = slope * total
            assert ((x.grad.double().sum((0, 2, 3)) - exact_x.grad.sum((0, 2, 3))).abs() <= 0.01 * scale + 1e-3).all()
        assert x.grad.isfinite().all()
        return
    terms = data["grad"].double().abs().sum((0, 2, 3))
    size = slope * (per_channel(data["grad"]) * 4 + terms * (1 + per_channel(z)) * (1 + rstd * per_channel(data["x"])))
    assert_in_budget("grad x", x.grad, plain_x.grad, exact_x.grad, size)
    for name, ours, torchs, exacts in zip(("gamma", "beta"), params, plain_params, exact_params, strict=True):
        if ours is not None:
            size = terms * (1 + rstd * per_channel(data["x"]))
            assert_in_budget(f"grad {name}", ours.grad, torchs.grad, exacts.grad, size)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck(backend: str, training: bool) -> None:
    data = problem((2, 2, 3, 3), torch.float64)

    def function(x: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
        with fr.use_backend(backend):
            return fr.ops.bn_act_pool(x, gamma, beta, *(t.clone() for t in data["stats"]), training=training)

    assert gradcheck(function, [data[n].requires_grad_() for n in ("x", "gamma", "beta")])


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_equal_values_and_nan(backend: str, layout: str) -> None:
    """Among equal values the first has the gradient, NaN counts as largest: as torch."""
    x = torch.randint(-1, 2, (2, 3, 7, 8)).float()
    x[0, 0, 2, 3] = x[1, 2, 6, 7] = x[1, 2, 6, 6] = torch.nan
    x[0, 1, 0, 0] = torch.inf
    mean, var = torch.zeros(3), torch.ones(3)
    grad = torch.randn(2, 3, 4, 4)
    results = []
    for ours in (True, False):
        leaf = arrange(x, layout).requires_grad_()
        if ours:
            with fr.use_backend(backend):
                y = fr.ops.bn_act_pool(leaf, None, None, mean, var, activation=None)
        else:
            y = pool(F.batch_norm(leaf, mean, var))
        y.backward(grad)
        results.append((y.detach(), leaf.grad))
    for ours, torchs in zip(*results, strict=True):
        torch.testing.assert_close(ours, torchs, equal_nan=True)


@needs_cpp
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("shape", [(2, 20, 13, 18), (1, 3, 1, 1), (3, 8, 2, 35)])
def test_offsets_are_the_references(shape: tuple[int, ...], layout: str, dtype: torch.dtype) -> None:
    """Equal values, NaN, infinities, whole windows of -inf: the gradient goes where torch sends it."""
    values = torch.tensor([0.0, 1.0, 2.0, -1.0, torch.nan, torch.inf, -torch.inf], dtype=dtype)
    drawn = torch.multinomial(torch.tensor([5.0, 5.0, 3.0, 5.0, 0.5, 0.3, 3.0]), torch.Size(shape).numel(), True)
    x = values[drawn].view(shape)
    x[0, 0, :4, :4] = -torch.inf
    x = arrange(x, layout)
    given = (x, None, None, torch.zeros(shape[1]), torch.ones(shape[1]), 0.0)
    modules = (dispatch.load("cpp"), dispatch.load("reference"))
    for activation in (None, "relu"):
        ours, plain = (
            dispatch.load(n).bn_act_pool_eval_forward(*given, activation, True) for n in ("cpp", "reference")
        )
        assert torch.equal(ours[1], plain[1])
        assert ours[1].dtype == torch.uint8
        assert torch.equal(ours[0].nan_to_num(7), plain[0].nan_to_num(7))
        assert torch.equal(
            modules[0].bn_act_pool_eval_forward(*given, activation, False)[0].nan_to_num(7), ours[0].nan_to_num(7)
        )
        grad = torch.empty_like(ours[0]).copy_(torch.randint(-3, 4, ours[0].shape))
        finite = (grad, ours[1], x.nan_to_num(0, 1, -1), *given[1:], activation, False)
        assert torch.equal(*(m.bn_act_pool_backward(*finite)[0] for m in modules))


@needs_cpp
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
def test_results_do_not_depend_on_the_number_of_threads(layout: str) -> None:
    data = problem((3, 20, 66, 71), torch.float32)
    results = []
    for count in (1, 2, 3):
        x = arrange(data["x"], layout).requires_grad_()
        params = [data[n].clone().requires_grad_() for n in ("gamma", "beta")]
        stats = [t.clone() for t in data["stats"]]
        with threads(count), fr.use_backend("cpp"):
            out = fr.ops.bn_act_pool(x, *params, *stats, training=True)
            out.backward(data["grad"])
        results.append([out.detach(), *stats, x.grad, *(p.grad for p in params)])
    for others in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], others, strict=True))


@needs_cpp
def test_the_kernel_refuses_windows_of_another_layout() -> None:
    backend, vector = dispatch.load("cpp"), torch.ones(3)
    x, grad = torch.randn(2, 3, 8, 8), torch.randn(2, 3, 4, 4)
    offsets, options = torch.zeros(grad.shape, dtype=torch.uint8), (vector, vector, vector, vector, 1e-5, "relu", True)
    backend.bn_act_pool_backward(grad, offsets, x, *options)
    with pytest.raises(RuntimeError, match="grad must have the layout of x"):
        backend.bn_act_pool_backward(arrange(grad, "channels_last"), offsets, x, *options)
    with pytest.raises(RuntimeError, match="offsets must be uint8"):
        backend.bn_act_pool_backward(grad, offsets.long(), x, *options)
    with pytest.raises(RuntimeError, match="one value per window"):
        backend.bn_act_pool_backward(grad[..., :3], offsets, x, *options)


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_saved(backend: str) -> None:
    """x, vectors, and one byte per output element."""
    saved: list[Tensor] = []

    def pack(t: Tensor) -> Tensor:
        saved.append(t)
        return t

    x = torch.randn(2, 4, 16, 16, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), fr.use_backend(backend):
        out = fr.ops.bn_act_pool(x, None, None, None, None, training=True)
    sizes = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in saved if t.numel() > 4}
    assert sizes.pop(x.untyped_storage().data_ptr())
    assert list(sizes.values()) == [out.numel()]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_batch(backend: str, training: bool) -> None:
    x, vector = torch.empty(0, 4, 6, 6, requires_grad=True), torch.ones(4)
    with fr.use_backend(backend):
        out = fr.ops.bn_act_pool(x, vector, vector, vector.clone(), vector.clone(), training=training)
    assert out.shape == (0, 4, 3, 3)
    out.sum().backward()
    assert x.grad.shape == x.shape


@pytest.mark.parametrize("backend", BACKENDS)
def test_double_backward_is_refused(backend: str) -> None:
    x = torch.randn(2, 3, 4, 4, requires_grad=True)
    with fr.use_backend(backend):
        out = fr.ops.bn_act_pool(x, None, None, None, None, training=True)
    (grad,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


BAD = {
    "x is 3-d": ({"x": torch.randn(3, 4, 4)}, ValueError, r"x must be \(N, C, H, W\)"),
    "x is integer": ({"x": torch.ones(2, 3, 4, 4).int()}, TypeError, "x must be float16"),
    "no pixels": ({"x": torch.ones(2, 3, 0, 4)}, ValueError, "must have channels and pixels"),
    "gamma is too long": ({"gamma": torch.ones(4)}, ValueError, "gamma has shape"),
    "mean is None in eval": ({"running_mean": None}, ValueError, "running_mean and running_var are needed, got None"),
    "one value": (
        {"x": torch.ones(1, 3, 1, 1), "training": True},
        ValueError,
        r"Expected more than 1 value per channel when training, got input size torch.Size\(\[1, 3, 1, 1\]\)",
    ),
    "eps is 0": ({"eps": 0.0, "training": True}, ValueError, "eps must be positive during training, but got 0.0"),
    "unknown activation": ({"activation": "gelu"}, ValueError, "activation must be 'relu' or None"),
    "momentum is None": ({"momentum": None, "training": True}, TypeError, "momentum must be"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments(name: str) -> None:
    change, error, message = BAD[name]
    vector = torch.ones(3)
    good = {
        "x": torch.randn(2, 3, 4, 4),
        "gamma": vector,
        "beta": vector,
        "running_mean": vector,
        "running_var": vector,
    }
    with pytest.raises(error, match=message):
        fr.ops.bn_act_pool(**good | change)
