"""torch.compile, torch.export and the registered ops that make them work."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from conftest import backends, threads
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.library import opcheck
from torch.nn import functional as F

import fused_resnet as fr
from fused_resnet import dispatch
from fused_resnet.backends import reference

BACKENDS = backends("reference", "cpp")
CONV = ([1, 1], [1, 1], [1, 1], 1)


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    """No graph of another test, and one thread: these tests are many small calls."""
    torch._dynamo.reset()
    with threads(1):
        yield


def rand(*shape: int, dtype: torch.dtype = torch.float32, nhwc: bool = False, grad: bool = False) -> Tensor:
    t = torch.randn(shape, dtype=dtype)
    t = t.contiguous(memory_format=torch.channels_last) if nhwc else t
    return t.requires_grad_(grad)


def vectors(*, grad: bool = False, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    """gamma, beta, mean, var of 4 channels."""
    gamma, beta, mean = (torch.randn(4, dtype=dtype) for _ in range(3))
    return gamma.requires_grad_(grad), beta.requires_grad_(grad), mean, torch.rand(4, dtype=dtype) + 0.5


# --- the registered ops ---


def samples(backend: str) -> dict[str, list[tuple[Any, ...]]]:
    x, y = rand(2, 4, 3, 5, grad=True), rand(2, 4, 3, 5, grad=True)
    last, half = rand(2, 4, 3, 5, nhwc=True, grad=True), rand(2, 4, 3, 5, dtype=torch.bfloat16)
    weight, weight_last = rand(4, 4, 3, 3), rand(4, 4, 3, 3, nhwc=True)
    gamma, beta, mean, var = vectors(grad=True)
    out = torch.relu(y.detach())
    flat = rand(6, 4, grad=True)
    data, grad = x.detach(), rand(2, 4, 3, 5)
    back = (gamma.detach(), beta.detach(), mean, var, 1e-5)
    pointwise = torch.randn(4, 1, 1, 4).permute(0, 3, 1, 2)  # channels_last by its strides alone
    offsets, small = torch.full((2, 4, 2, 3), 4, dtype=torch.uint8), rand(2, 4, 2, 3)
    return {
        "add_relu": [(x, y, backend), (last, y, backend), (x, x, backend), (half, half, backend)],
        "add_relu_backward": [(grad, out, backend), (last.detach(), out, backend)],
        "bn_act_train": [
            (x, gamma, beta, y, 1e-5, "relu", backend),
            (last, gamma, None, None, 1e-5, "relu", backend),
            (flat, None, None, None, 1e-5, None, backend),
            (half, None, beta, half, 1e-5, None, backend),
        ],
        "bn_act_eval": [
            (x, gamma, beta, mean, var, y, 1e-5, "relu", backend),
            (last, None, None, mean, var, None, 1e-5, None, backend),
            (half, gamma, beta, mean, var, None, 1e-5, "relu", backend),
        ],
        "bn_act_backward": [
            (grad, data, out, *back, "relu", True, True, backend),
            (grad, last.detach(), None, *back, "relu", True, False, backend),
            (grad, data, None, *back, None, False, True, backend),
            (grad, data, None, None, None, mean, var, 1e-5, None, True, False, backend),
        ],
        "bn_act_pool_train": [
            (x, gamma, beta, 1e-5, "relu", True, backend),
            (last, None, None, 1e-5, None, True, backend),
            (half, gamma, None, 1e-5, "relu", False, backend),
        ],
        "bn_act_pool_eval": [
            (x, gamma, beta, mean, var, 1e-5, "relu", True, backend),
            (last.detach(), None, None, mean, var, 1e-5, None, False, backend),
        ],
        "bn_act_pool_backward": [
            (small, offsets, data, *back, "relu", True, backend),
            (small, offsets, last.detach(), *back, None, False, backend),
        ],
        "conv_bias_act": [
            (data, weight, gamma.detach(), grad, *CONV, "relu", backend),
            (last.detach(), weight, None, None, *CONV, None, backend),
            (data, weight_last, None, grad, *CONV, "relu", backend),
            (data, pointwise, None, grad, [1, 1], [0, 0], [1, 1], 1, "relu", backend),
        ],
        "conv_bn_act": [
            (data, weight, None, gamma.detach(), beta.detach(), mean, var, grad, *CONV, 1e-5, "relu", backend),
            (last.detach(), weight, beta.detach(), None, None, mean, var, None, *CONV, 1e-5, None, backend),
        ],
    }


OPS = tuple(samples("auto"))


def test_every_registered_op_has_samples() -> None:
    names = {
        name.partition("::")[2] for name in torch._C._dispatch_get_all_op_names() if name.startswith("fused_resnet::")
    }
    assert names == set(OPS)


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend: str, name: str) -> None:
    """Schema, fake (shapes, strides, dtypes), autograd registration; the first sample through AOT as well."""
    if name.startswith("bn_act_pool") and not hasattr(dispatch.load(backend), f"{name}_forward"):
        backend = "auto"
    op = getattr(torch.ops.fused_resnet, name).default
    tools = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    differentiable = not (name.endswith("_backward") or name.startswith("conv"))
    for i, arguments in enumerate(samples(backend)[name]):
        opcheck(op, arguments, test_utils=tools if i == 0 and differentiable else tools[:3])


@pytest.mark.parametrize("layout", ["nchw", "channels_last", "sliced", "sliced_channels", "transposed"])
@pytest.mark.parametrize(
    "name", ["add_relu", "bn_act_train", "bn_act_eval", "bn_act_pool_train", "conv_bias_act", "conv_bn_act"]
)
@pytest.mark.parametrize("backend", backends("reference", "cpp", "library"))
def test_fakes_have_the_true_strides(backend: str, name: str, layout: str) -> None:
    if (backend == "library" and not name.startswith("conv")) or "pool" in name:
        backend = "auto"
    x = {
        "nchw": rand(2, 4, 6, 7),
        "channels_last": rand(2, 4, 6, 7, nhwc=True),
        "sliced": rand(2, 4, 6, 14)[..., ::2],
        "sliced_channels": rand(2, 8, 6, 7, nhwc=True)[:, :4],
        "transposed": rand(2, 4, 7, 6).transpose(2, 3),
    }[layout]
    _, *rest = samples(backend)[name][0]
    rest = [rand(2, 4, 6, 7) if isinstance(t, Tensor) and t.dim() == 4 and t.shape[2:] == (3, 5) else t for t in rest]
    real = getattr(torch.ops.fused_resnet, name)(x, *rest)
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(t) if isinstance(t, Tensor) else t for t in (x, *rest)]
        fake = getattr(torch.ops.fused_resnet, name)(*fakes)
    for a, b in zip(*((t,) if isinstance(t, Tensor) else t for t in (real, fake)), strict=True):
        assert (a.shape, a.stride(), a.dtype) == (b.shape, b.stride(), b.dtype)


@pytest.mark.parametrize("name", ["add_relu", "bn_act", "bn_act_pool"])
def test_double_backward_is_refused(name: str) -> None:
    x = rand(2, 4, 3, 3, grad=True)
    if name == "add_relu":
        out = torch.ops.fused_resnet.add_relu(x, x, "auto")
    elif name == "bn_act_pool":
        out = torch.ops.fused_resnet.bn_act_pool_train(x, None, None, 1e-5, "relu", True, "auto")[0]
    else:
        out = torch.ops.fused_resnet.bn_act_train(x, None, None, None, 1e-5, "relu", "auto")[0]
    (grad,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=f"fused_resnet::{name} differentiates once only"):
        grad.sum().backward()


@pytest.mark.parametrize("name", ["conv_bias_act", "conv_bn_act"])
def test_inference_ops_have_no_gradient(name: str) -> None:
    """Never a silent None: the public functions take torch's conv where gradients are asked for."""
    x, *rest = samples("auto")[name][0]
    out = getattr(torch.ops.fused_resnet, name)(x.clone().requires_grad_(), *rest)
    with pytest.raises(RuntimeError, match=f"fused_resnet::{name} is an inference op without a gradient"):
        out.sum().backward()


# --- torch.compile ---


def compare(
    function: Callable[..., Tensor],
    tensors: tuple[Tensor, ...],
    *,
    backward: bool = True,
    tolerance: float = 1e-5,
    backend: str = "aot_eager",
    **options: Any,
) -> None:
    """Compiled without a graph break, against eager: results, strides, gradients, and what is updated in place."""
    ours, theirs = (
        [t.detach().clone(memory_format=torch.preserve_format).requires_grad_(t.requires_grad) for t in tensors]
        for _ in range(2)
    )
    compiled = torch.compile(function, fullgraph=True, backend=backend, **options)
    for _ in range(2):
        out, expected = compiled(*ours), function(*theirs)
        torch.testing.assert_close(out, expected, rtol=tolerance, atol=tolerance)
        assert out.stride() == expected.stride()
        if backward:
            grad = torch.randn_like(expected)
            out.backward(grad)
            expected.backward(grad)
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
            assert (a.grad is None) == (b.grad is None)
            if a.grad is not None:
                torch.testing.assert_close(a.grad, b.grad, rtol=10 * tolerance, atol=10 * tolerance)


@pytest.mark.parametrize("nhwc", [False, True])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("backend", BACKENDS)
def test_bn_act(backend: str, training: bool, nhwc: bool) -> None:
    """Running statistics are updated too, and the graph holds one op of ours."""

    def function(x: Tensor, residual: Tensor, gamma: Tensor, beta: Tensor, mean: Tensor, var: Tensor) -> Tensor:
        return fr.ops.bn_act(x, gamma, beta, mean, var, residual, training=training)

    x, residual = rand(3, 4, 5, 5, nhwc=nhwc, grad=True), rand(3, 4, 5, 5, grad=True)
    with fr.use_backend(backend):
        compare(function, (x, residual, *vectors(grad=True)))


@pytest.mark.parametrize("case", ["no residual", "itself", "none of four", "no activation", "tensor momentum"])
def test_bn_act_variants(case: str) -> None:
    x = rand(3, 4, 5, 5, grad=True)
    gamma, beta, mean, var = vectors(grad=True)
    functions: dict[str, tuple[Callable[..., Tensor], tuple[Tensor, ...]]] = {
        "no residual": (lambda x, g, b: fr.ops.bn_act(x, g, b, None, None, training=True), (x, gamma, beta)),
        # An autograd.Function that is given one tensor twice is refused by dynamo.
        "itself": (lambda x, g, b: fr.ops.bn_act(x, g, b, None, None, x, training=True), (x, gamma, beta)),
        "none of four": (lambda x: fr.ops.bn_act(x, None, None, None, None, training=True), (x,)),
        "no activation": (
            lambda x, m, v: fr.ops.bn_act(x, None, None, m, v, training=True, activation=None),
            (x, mean, var),
        ),
        "tensor momentum": (
            lambda x, m, v, w: fr.ops.bn_act(x, None, None, m, v, training=True, momentum=w),
            (x, mean, var, torch.tensor(0.25)),
        ),
    }
    compare(*functions[case])


@pytest.mark.parametrize("training", [True, False])
def test_bn_act_pool(training: bool) -> None:
    def function(x: Tensor, gamma: Tensor, beta: Tensor, mean: Tensor, var: Tensor) -> Tensor:
        return fr.ops.bn_act_pool(x, gamma, beta, mean, var, training=training)

    compare(function, (rand(3, 4, 5, 6, nhwc=True, grad=True), *vectors(grad=True)))


@pytest.mark.parametrize("itself", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_add_relu(backend: str, itself: bool) -> None:
    x, residual = rand(2, 4, 3, 3, grad=True), rand(2, 4, 3, 3, nhwc=True, grad=True)
    with fr.use_backend(backend):
        if itself:
            compare(lambda x: fr.ops.add_relu(x, x), (x,))
        else:
            compare(fr.ops.add_relu, (x, residual))


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("with_residual", [False, True])
def test_convs(with_residual: bool, gradients: bool) -> None:
    x, weight = rand(2, 4, 6, 6, nhwc=True), rand(4, 4, 3, 3, grad=gradients)
    _, beta, mean, var = vectors()
    residual = rand(2, 4, 6, 6)

    def function(x: Tensor, weight: Tensor, beta: Tensor, mean: Tensor, var: Tensor, residual: Tensor) -> Tensor:
        shortcut = residual if with_residual else None
        y = fr.ops.conv_bn_act(x, weight, None, beta, mean, var, shortcut, padding=1)
        return fr.ops.conv_bias_act(y, weight, beta, shortcut, padding=(1, 1), activation=None)

    compare(function, (x, weight, beta, mean, var, residual), backward=gradients, tolerance=1e-4)


def test_autocast() -> None:
    x, weight = rand(2, 4, 6, 6), rand(4, 4, 3, 3, grad=True)

    def function(x: Tensor, weight: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            y = fr.ops.conv_bn_act(x, weight, None, None, None, None, padding=1, training=True)
            return fr.ops.add_relu(y, x)

    compare(function, (x, weight), tolerance=2e-2)


def test_dynamic_shapes() -> None:
    """One graph for every batch size."""
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(graph)
        return graph

    def function(x: Tensor, weight: Tensor, mean: Tensor, var: Tensor) -> Tensor:
        y = fr.ops.conv_bn_act(x, weight, None, None, mean, var, padding=1)
        return fr.ops.bn_act(y, None, None, mean, var, x, training=True)

    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=backend)
    weight = rand(4, 4, 3, 3)
    for n, size in ((2, 5), (3, 6), (7, 9)):
        x = rand(n, 4, size, size)
        ours, theirs = (torch.zeros(4), torch.ones(4)), (torch.zeros(4), torch.ones(4))
        torch.testing.assert_close(compiled(x, weight, *ours), function(x, weight, *theirs))
        torch.testing.assert_close(ours, theirs)
    assert len(graphs) == 1


def test_errors_are_the_same() -> None:
    """A wrong argument raises in a compiled function too."""
    compiled = torch.compile(fr.ops.add_relu, backend="eager")
    with pytest.raises((ValueError, torch._dynamo.exc.TorchDynamoException), match="residual has shape"):
        compiled(rand(2, 3), rand(3, 2))
    with pytest.raises((TypeError, torch._dynamo.exc.TorchDynamoException), match=r"residual is torch.float64"):
        compiled(rand(2, 3), rand(2, 3).double())


def test_the_request_is_fixed_at_trace_time(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    original = reference.add_relu_forward
    monkeypatch.setattr(reference, "add_relu_forward", lambda *args: seen.append(1) or original(*args))
    compiled = torch.compile(fr.ops.add_relu, fullgraph=True, backend="aot_eager")
    x = rand(2, 3)
    with fr.use_backend("reference"):
        compiled(x, x)
    compiled(x, x)
    assert len(seen) == 2
    with pytest.raises(fr.BackendUnavailableError, match="does not implement"):
        torch.ops.fused_resnet.add_relu(x, x, "library")


def test_inductor_training() -> None:
    """Forward and backward, ours and aten's kernels only: nothing that inductor has to compile, which takes long."""

    def function(x: Tensor, residual: Tensor, weight: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
        y = fr.ops.conv_bn_act(x, weight, gamma, beta, None, None, padding=1, training=True)
        return fr.ops.bn_act_pool(fr.ops.add_relu(y, residual), gamma, None, None, None, training=True)

    x, residual = rand(2, 4, 6, 6, nhwc=True, grad=True), rand(2, 4, 6, 6, grad=True)
    tensors = (x, residual, rand(4, 4, 3, 3, grad=True), *vectors(grad=True)[:2])
    compare(function, tensors, backend="inductor", tolerance=1e-4)


def test_inductor_inference() -> None:
    """Between pointwise kernels of inductor's own, which must respect the strides of ours."""

    def function(x: Tensor, weight: Tensor, beta: Tensor, mean: Tensor, var: Tensor) -> Tensor:
        y = fr.ops.conv_bn_act(x * 2, weight, None, beta, mean, var, padding=1)
        return fr.ops.add_relu(fr.ops.bn_act(y, None, None, mean, var, x), y)

    x = rand(2, 4, 6, 6, nhwc=True)
    compare(function, (x, rand(4, 4, 3, 3), *vectors()[1:]), backward=False, backend="inductor", tolerance=1e-4)


# --- torch.export, torch.fx, tracing, torch.func ---


class Net(nn.Module):
    """Ops of ours as a user's module would hold them."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        with torch.no_grad():
            self.bn.weight.uniform_(-1, 1)
            self.bn.running_mean.normal_()

    def forward(self, x: Tensor) -> Tensor:
        bn = self.bn
        vectors = (bn.weight, bn.bias, bn.running_mean, bn.running_var)
        y = fr.ops.conv_bn_act(x, self.conv.weight, *vectors, x, padding=1, training=self.training)
        y = fr.ops.conv_bias_act(y, self.conv.weight, bn.bias, padding=1)
        return fr.ops.add_relu(fr.ops.bn_act(y, *vectors), x)


@pytest.mark.parametrize("dynamic", [False, True])
def test_export(dynamic: bool) -> None:
    """Exported, saved, loaded and run; the batch may be dynamic."""
    net = Net().eval()
    x = rand(2, 4, 6, 6)
    shapes = {"x": {0: torch.export.Dim("batch", min=1, max=64)}} if dynamic else None
    with torch.no_grad():
        program = torch.export.export(net, (x,), dynamic_shapes=shapes)
    targets = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert targets == {
        f"fused_resnet.{name}.default" for name in ("conv_bn_act", "conv_bias_act", "bn_act_eval", "add_relu")
    }
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    loaded = torch.export.load(buffer).module()
    for n in (2, 5) if dynamic else (2,):
        x = rand(n, 4, 6, 6)
        with torch.no_grad():
            torch.testing.assert_close(loaded(x), net(x), rtol=1e-4, atol=1e-5)


def test_export_of_training_keeps_the_statistics() -> None:
    """The update of running statistics is part of the exported program."""
    net = Net().train()
    program = torch.export.export(copy.deepcopy(net), (rand(2, 4, 6, 6),))
    exported = program.module()
    x = rand(2, 4, 6, 6)
    torch.testing.assert_close(exported(x), net(x), rtol=1e-4, atol=1e-5)
    ours = dict(exported.named_buffers())
    torch.testing.assert_close(ours["bn.running_mean"], net.bn.running_mean)
    torch.testing.assert_close(ours["bn.running_var"], net.bn.running_var)


def test_make_fx() -> None:
    x = rand(2, 4, 3, 3)
    graph = make_fx(lambda x: fr.ops.bn_act(fr.ops.add_relu(x, x), None, None, None, None, training=True))(x)
    targets = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
    assert "fused_resnet.add_relu.default" in targets
    assert "fused_resnet.bn_act_train.default" in targets
    y = rand(2, 4, 3, 3)
    torch.testing.assert_close(graph(y), torch.relu(F.batch_norm(torch.relu(2 * y), None, None, training=True)))


def test_fake_tensors() -> None:
    with FakeTensorMode():
        x, vector = torch.empty(2, 4, 6, 6).to(memory_format=torch.channels_last), torch.empty(4)
        for training in (True, False):
            out = fr.ops.bn_act(x, vector, vector, vector, vector, x, training=training)
            assert out.shape == x.shape
            assert out.is_contiguous(memory_format=torch.channels_last)
        assert fr.ops.conv_bn_act(x, torch.empty(8, 4, 3, 3), None, None, torch.empty(8), torch.empty(8)).shape[1] == 8


@pytest.mark.parametrize("transform", ["grad", "vmap", "jvp"])
@pytest.mark.parametrize("name", ["add_relu", "bn_act"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_torch_func(backend: str, name: str, transform: str) -> None:
    """Right or refused, never silently wrong."""

    def ours(x: Tensor) -> Tensor:
        return fr.ops.add_relu(x, x) if name == "add_relu" else fr.ops.bn_act(x, None, None, None, None, training=True)

    def plain(x: Tensor) -> Tensor:
        return torch.relu(x + x) if name == "add_relu" else torch.relu(F.batch_norm(x, None, None, training=True))

    x = rand(3, 6, 4, 2, 2)

    def run(function: Callable[[Tensor], Tensor]) -> Tensor:
        if transform == "grad":
            return torch.func.grad(lambda t: (function(t) * x[1]).sum())(x[0])
        if transform == "vmap":
            return torch.func.vmap(function)(x)
        return torch.func.jvp(function, (x[0],), (x[1],))[1]

    with fr.use_backend(backend):
        try:
            result = run(ours)
        except (RuntimeError, NotImplementedError):
            return
    torch.testing.assert_close(result, run(plain), rtol=1e-4, atol=1e-4)


def test_choice_of_path() -> None:
    """Eager calls do not pay for the registered ops."""
    x = rand(2, 4, 3, 3, grad=True)
    assert type(fr.ops.add_relu(x, x).grad_fn).__name__ == "AddReLUFunctionBackward"
    assert type(fr.ops.bn_act(x, None, None, None, None, training=True).grad_fn).__name__ == "BNActFunctionBackward"
    assert dispatch.requested() == "auto"
