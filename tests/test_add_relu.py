"""add_relu: relu(x + residual), forward and backward, held against float64 and torch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import FLOATS, backends, grid, needs_cpp, threads
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tolerances import LAYOUTS, arrange, assert_in_budget, memory_format, same_strides, storages
from torch import Tensor
from torch.autograd import gradcheck

import fused_resnet as fr

pytestmark = pytest.mark.usefixtures("poison")

BACKENDS = backends("reference", "cpp")
SHAPES = {
    (): "a scalar",
    (1,): "one value",
    (17,): "a vector with a tail",
    (3, 5): "2-d",
    (3, 5, 9): "3-d",
    (2, 3, 5, 7): "odd everywhere",
    (1, 64, 7, 7): "batch 1",
    (2, 6, 3, 4, 5): "5-d; channels_last_3d",
    (2, 2, 2, 2, 2, 3): "6-d, for which no channels_last exists",
    (4, 8, 1, 1): "NCHW and channels_last at once",
    (7, 1, 6, 5): "one channel",
    (3, 2048, 2, 2): "ResNet-50's widest",
    (2, 33, 37, 53): "129k values: several threads, the last block not full",
    (0, 3, 4, 4): "empty batch",
    (2, 0, 4, 4): "no channels",
}


def layout_of(shape: tuple[int, ...], layout: str) -> str:
    return layout if len(shape) > 1 else "nchw"


def check(
    backend: str,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    *,
    layout: str = "nchw",
    residual: str = "other",
    residual_layout: str = "nchw",
    grad_layout: str = "nchw",
    count: int = 1,
) -> None:
    """Forward and backward. There is one rounding only, so beside the budget the result is torch's, bit for bit."""
    x = arrange(torch.randn(shape).to(dtype), layout_of(shape, layout)).requires_grad_()
    other = x if residual == "self" else arrange(torch.randn(shape).to(dtype), layout_of(shape, residual_layout))
    other.requires_grad_()
    if grad_layout == "expanded":
        grad = torch.randn(()).to(dtype).expand(shape)
    else:
        grad = arrange(torch.randn(shape).to(dtype), layout_of(shape, grad_layout))
    with threads(count):
        with fr.use_backend(backend):
            out = fr.ops.add_relu(x, other)
        out.backward(grad)

    exact = x.detach().double() + other.detach().double()
    plain = torch.relu(x.detach() + other.detach())
    assert_in_budget("out", out, plain, exact.clamp(min=0))
    assert torch.equal(out, plain)
    dense = "channels_last" if layout in ("channels_last", "sliced_channels") else "nchw"
    assert memory_format(out) == memory_format(arrange(x.detach(), layout_of(shape, dense)))
    expected = torch.where(out > 0, grad, 0) * (2 if residual == "self" else 1)
    assert torch.equal(x.grad, expected)
    assert torch.equal(other.grad, expected)
    if layout in ("nchw", "channels_last"):
        assert same_strides(x.grad, x)


@pytest.mark.parametrize(
    "case",
    grid(
        {
            "shape": tuple(SHAPES),
            "dtype": FLOATS,
            "layout": LAYOUTS,
            "residual": ("other", "self"),
            "residual_layout": LAYOUTS,
            "grad_layout": (*LAYOUTS, "expanded"),
            "threads": (1, 2),
        }
    ),
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_parity(backend: str, case: dict[str, Any]) -> None:
    names = ("layout", "residual", "residual_layout", "grad_layout")
    with threads(1):
        options = {name: case[name] for name in names}
        check(backend, case["shape"], case["dtype"], count=case["threads"], **options)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True, database=None)
@given(
    shape=st.lists(st.integers(0, 9), max_size=5).map(tuple),
    dtype=st.sampled_from(FLOATS),
    layout=st.sampled_from(LAYOUTS),
    residual=st.sampled_from(["other", "self"]),
    residual_layout=st.sampled_from(LAYOUTS),
    grad_layout=st.sampled_from(LAYOUTS),
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_random_shapes(backend: str, shape: Any, dtype: Any, **options: Any) -> None:
    with threads(1):
        check(backend, shape, dtype, **options)


@needs_cpp
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_16_bit_value(dtype: torch.dtype) -> None:
    """All 65,536 bit patterns, subnormals, NaN and Inf among them, plus 0 and plus themselves: bitwise torch's."""
    x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    for residual in (torch.zeros_like(x), x, x.flip(0), torch.full_like(x, 3.1415)):
        with fr.use_backend("cpp"):
            ours = fr.ops.add_relu(x, residual)
        torchs = torch.relu(x + residual)
        assert torch.equal(ours.isnan(), torchs.isnan())
        assert torch.equal(ours.nan_to_num(0), torchs.nan_to_num(0))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_and_inf_are_values(backend: str, dtype: torch.dtype) -> None:
    specials = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0, -0.0, 1.0, -1.0, 1e-7, -1e-7], dtype=dtype)
    x, residual, grad = (t.flatten() for t in torch.meshgrid(specials, specials, specials, indexing="ij"))
    results = []
    for ours in (True, False):
        a, b = x.clone().requires_grad_(), residual.clone().requires_grad_()
        if ours:
            with fr.use_backend(backend):
                y = fr.ops.add_relu(a, b)
        else:
            y = torch.relu(a + b)
        y.backward(grad)
        results.append((y.detach(), a.grad, b.grad))
    for ours, torchs in zip(*results, strict=True):
        torch.testing.assert_close(ours, torchs, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("same", [True, False])
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck(backend: str, same: bool) -> None:
    x = torch.randn(2, 3, 2, 2, dtype=torch.float64, requires_grad=True)
    residual = torch.randn(2, 3, 2, 2, dtype=torch.float64, requires_grad=True)
    with fr.use_backend(backend), threads(1):
        assert gradcheck(
            (lambda a: fr.ops.add_relu(a, a)) if same else fr.ops.add_relu, (x,) if same else (x, residual)
        )


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_saved(backend: str) -> None:
    saved: list[Tensor] = []

    def pack(t: Tensor) -> Tensor:
        saved.append(t)
        return t

    x, residual = torch.randn(2, 3, 4, 4, requires_grad=True), torch.randn(2, 3, 4, 4)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), fr.use_backend(backend):
        out = fr.ops.add_relu(x, residual)
    assert storages(*saved) == storages(out)


@pytest.mark.parametrize("backend", BACKENDS)
def test_in_place_changes_are_seen(backend: str) -> None:
    x = torch.randn(2, 3, requires_grad=True)
    with fr.use_backend(backend):
        out = fr.ops.add_relu(x, torch.randn(2, 3))
    out.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@pytest.mark.parametrize("wanted", ["x", "residual"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_one_gradient_only(backend: str, wanted: str) -> None:
    x, residual = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    leaf, other = (x, residual) if wanted == "x" else (residual, x)
    leaf.requires_grad_()
    with fr.use_backend(backend):
        out = fr.ops.add_relu(x, residual)
    out.sum().backward()
    assert torch.equal(leaf.grad, (out > 0).float())
    assert other.grad is None


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_is_aliased(backend: str) -> None:
    """Inputs and the incoming gradient are not written to; the two gradients share no memory."""
    x, residual = (torch.randn(2, 3, 4, 4, requires_grad=True) for _ in range(2))
    grad = torch.randn(2, 3, 4, 4)
    before = [t.detach().clone() for t in (x, residual, grad)]
    with fr.use_backend(backend):
        out = fr.ops.add_relu(x, residual)
    out.backward(grad)
    assert len(storages(x, residual, grad, out, x.grad, residual.grad)) == 6
    assert all(map(torch.equal, before, (x, residual, grad)))


@pytest.mark.parametrize("backend", BACKENDS)
def test_deterministic(backend: str) -> None:
    x, residual, grad = (torch.randn(2, 33, 37, 53) for _ in range(3))
    x.requires_grad_()
    results = []
    for count in (1, 1, 2, 3):
        with threads(count), fr.use_backend(backend):
            out = fr.ops.add_relu(x, residual)
            results.append((out.detach(), *torch.autograd.grad(out, x, grad)))
    for result in results[1:]:
        assert all(map(torch.equal, results[0], result))


@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_dtypes(backend: str, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    """Under autocast as eager's promotion, gradients in their input's dtype; outside it an error."""
    x, residual = (torch.randn(2, 3, 4, 4).to(dtype).requires_grad_() for dtype in dtypes)
    with fr.use_backend(backend):
        with torch.autocast("cpu", torch.bfloat16):
            out = fr.ops.add_relu(x, residual)
        with pytest.raises(TypeError, match=f"residual is {dtypes[1]}, expected {dtypes[0]}"):
            fr.ops.add_relu(x, residual)
    assert torch.equal(out, torch.relu(x + residual))
    assert out.dtype == torch.float32
    out.sum().backward()
    assert (x.grad.dtype, residual.grad.dtype) == dtypes


@pytest.mark.parametrize("backend", BACKENDS)
def test_double_backward_is_refused(backend: str) -> None:
    x = torch.randn(4, 3, requires_grad=True)
    with fr.use_backend(backend):
        out = fr.ops.add_relu(x, torch.randn(4, 3))
    (grad,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize("backend", BACKENDS)
def test_unusual_views(backend: str) -> None:
    expanded = torch.randn(1, 3, 1, 5).expand(4, 3, 6, 5)
    negated = torch.complex(torch.randn(4, 3, 6, 5), torch.randn(4, 3, 6, 5)).conj().imag
    view = torch.randn(4, 6, 6, 5, requires_grad=True)[:, 1:4]
    with fr.use_backend(backend):
        for x in (expanded, negated, view):
            for residual in (expanded, negated, view):
                assert torch.equal(fr.ops.add_relu(x, residual), torch.relu(x + residual))


BAD = {
    "x is a list": (([1.0], torch.ones(1)), TypeError, "x must be a torch.Tensor, got list"),
    "x is integer": ((torch.ones(3).int(), torch.ones(3).int()), TypeError, "x must be float16.*got torch.int32"),
    "x is bool": ((torch.ones(3).bool(), torch.ones(3).bool()), TypeError, "got torch.bool"),
    "x is complex": ((torch.ones(3) * 1j, torch.ones(3)), TypeError, "got torch.complex64"),
    "x is float8": ((torch.ones(3).to(torch.float8_e4m3fn), torch.ones(3)), TypeError, "got torch.float8_e4m3fn"),
    "x is sparse": ((torch.ones(3).to_sparse(), torch.ones(3)), TypeError, "x must be a strided tensor"),
    "residual is a float": ((torch.ones(3), 1.0), TypeError, "residual must be a torch.Tensor, got float"),
    "residual is None": ((torch.ones(3), None), TypeError, "residual must be a torch.Tensor, got NoneType"),
    "residual broadcasts": ((torch.ones(2, 3), torch.ones(3)), ValueError, r"has shape \(3,\), expected \(2, 3\)"),
    "residual is float64": ((torch.ones(3), torch.ones(3).double()), TypeError, "residual is torch.float64"),
    "residual is on meta": ((torch.ones(3), torch.ones(3, device="meta")), ValueError, "residual is on meta"),
    "x is on meta": ((torch.ones(3, device="meta"), torch.ones(3)), ValueError, "residual is on cpu, expected meta"),
    "residual is sparse": ((torch.ones(3), torch.ones(3).to_sparse()), TypeError, "residual must be a strided"),
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("backend", BACKENDS)
def test_bad_arguments(backend: str, name: str) -> None:
    arguments, error, message = BAD[name]
    with fr.use_backend(backend), pytest.raises(error, match=message):
        fr.ops.add_relu(*arguments)


@needs_cpp
def test_kernels_check_what_they_are_given() -> None:
    ops = torch.ops.fused_resnet_cpp
    x = torch.randn(4, 3, 5, 6)
    for call in (
        lambda: ops.add_relu_forward(x[..., ::2], x[..., ::2]),
        lambda: ops.add_relu_forward(x, x[:2]),
        lambda: ops.add_relu_forward(x, x.double()),
        lambda: ops.add_relu_forward(x, x.contiguous(memory_format=torch.channels_last)),
        lambda: ops.add_relu_forward(x, x.flatten()),
        lambda: ops.add_relu_forward(x.int(), x.int()),
        lambda: ops.add_relu_forward(x[:1].expand(4, 3, 5, 6), x[:1].expand(4, 3, 5, 6)),
        lambda: ops.add_relu_backward(x[:2], x),
        lambda: ops.add_relu_backward(x.bfloat16(), x),
    ):
        with pytest.raises(RuntimeError, match="must"):
            call()


def test_meta() -> None:
    x = torch.empty(4, 3, 5, 5, device="meta").to(memory_format=torch.channels_last)
    out = fr.ops.add_relu(x, torch.empty(4, 3, 5, 5, device="meta"))
    assert out.is_meta
    assert out.shape == x.shape
    assert out.is_contiguous(memory_format=torch.channels_last)
    with fr.use_backend("cpp"), pytest.raises(fr.BackendUnavailableError, match="no kernels for device meta"):
        fr.ops.add_relu(x, x)
