"""What runs in a chain's place: one fused op, or the chain's own steps wherever that op would not be the same thing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from fused_resnet import dispatch, ops
from fused_resnet.fusion.guards import child
from fused_resnet.fusion.match import Chain, conv_reason, module_reason, norm_reason
from fused_resnet.fusion.norms import Norm, momentum, norm_kind, own_act, running, trains, vectors
from fused_resnet.ops.checks import DTYPES, autocast_dtype, is_autocast, is_traced, needs_grad

_PLAIN = (Tensor, nn.Parameter)


class Step(NamedTuple):
    """One node of a chain as the model wrote it; among `args`, `VALUE` and `RESIDUAL` stand for tensors."""

    op: str
    target: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


VALUE, RESIDUAL = "<value>", "<residual>"


class Unit(NamedTuple):
    """A chain by the paths of its modules below the scope. `name` is the norm's path, or the ReLU node's name."""

    name: str
    conv: str | None
    norm: str | None
    passed: tuple[str, ...]  # ReLUs and identities that the op bypasses
    adds: bool
    relu: bool
    own: str | None  # what follows in the norm itself: see `own_act`
    steps: tuple[Step, ...]

    @property
    def op(self) -> str:
        if self.norm is None:
            return "add_relu"
        return "bn_act" if self.conv is None else "conv_bn_act"

    @property
    def what(self) -> str:
        parts = ["conv"] * (self.conv is not None) + ["BN"] * (self.norm is not None)
        return " + ".join(parts + ["add"] * self.adds + ["ReLU"] * self.relu)


def make_unit(chain: Chain, scope: nn.Module) -> Unit:
    steps, passed = [], []
    previous = chain.value
    for node in chain.nodes:
        swap = {previous: VALUE, chain.residual: RESIDUAL}
        args = tuple(swap.get(arg, arg) if isinstance(arg, fx.Node) else arg for arg in node.args)
        steps.append(Step(node.op, node.target, args, dict(node.kwargs)))
        if node.op == "call_module" and node is not chain.conv and node is not chain.norm:
            passed.append(str(node.target))
        previous = node
    conv = None if chain.conv is None else str(chain.conv.target)
    norm = None if chain.norm is None else str(chain.norm.target)
    name = norm or chain.nodes[-1].name
    own = None
    if norm is not None and (kind := norm_kind(child(scope, norm))) is not None and kind.with_act:
        own = own_act(child(scope, norm))
    return Unit(name, conv, norm, tuple(passed), chain.add is not None, chain.relu, own, tuple(steps))


def static_reason(scope: nn.Module, unit: Unit) -> str | None:
    """Why the unit must run as its steps whatever the tensors are: its modules are not what they were."""
    try:
        if unit.conv is not None and (reason := conv_reason(child(scope, unit.conv))) is not None:
            return reason
        if unit.norm is not None:
            norm = child(scope, unit.norm)
            reason = norm_reason(norm)
            if reason is not None:
                return reason
            kind = norm_kind(norm)
            assert kind is not None
            if (own_act(norm) if kind.with_act else None) != unit.own:
                return "its activation was replaced"
        return passed_reason(scope, unit.passed)
    except KeyError:
        return "one of its modules is gone"


def passed_reason(scope: nn.Module, paths: tuple[str, ...]) -> str | None:
    """Why one of the modules that are passed over, ReLUs and identities, must be called itself."""
    for path in paths:
        part = child(scope, path)
        if type(part) not in (nn.ReLU, nn.Identity):
            return f"{type(part).__name__} took the place of {path}"
        if (reason := module_reason(part, type(part).__name__)) is not None:
            return reason
    return None


def run_steps(scope: nn.Module, unit: Unit, value: Any, residual: Any) -> Any:
    """The chain as the model wrote it, in-place operations included."""
    for op, target, args, kwargs in unit.steps:
        given = [value if arg is VALUE or arg == VALUE else residual if arg == RESIDUAL else arg for arg in args]
        if op == "call_module":
            value = child(scope, target)(*given, **kwargs)
        elif op == "call_method":
            value = getattr(given[0], target)(*given[1:], **kwargs)
        else:
            value = target(*given, **kwargs)
    return value


def _fits(norm: Any, kind: Norm, channels: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether a norm's vectors go with the tensor that it normalises: by size, by device and by dtype."""
    given = vectors(norm)
    training = trains(norm, kind)
    if (training and norm.eps <= 0) or (not training and (given[2] is None or given[3] is None)):
        return False
    dtypes = (dtype,) if kind.frozen or dtype.itemsize != 2 else (dtype, torch.float32)
    compiling = torch.compiler.is_compiling()
    return all(
        v is None
        or ((compiling or type(v) in _PLAIN) and v.shape == (channels,) and v.dtype in dtypes and v.device == device)
        for v in given
    )


def output_shape(
    conv: Any, norm: Any, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, autocast: torch.dtype | None
) -> tuple[int, ...] | None:
    """The shape that conv and norm make of a 4-d tensor; None where the op does not do with it what they do."""
    kind = norm_kind(norm)
    assert kind is not None
    weight, bias = conv.weight, conv.bias
    if not is_plain(weight) or shape[1] != weight.shape[1] * conv.groups or device != weight.device:
        return None
    if type(conv.stride) is not tuple or type(conv.padding) is not tuple or type(conv.dilation) is not tuple:
        return None
    if autocast is None and (dtype != weight.dtype or (bias is not None and bias.dtype != dtype)):
        return None
    size = tuple(
        (shape[2 + i] + 2 * conv.padding[i] - conv.dilation[i] * (weight.shape[2 + i] - 1) - 1) // conv.stride[i] + 1
        for i in range(2)
    )
    out = (shape[0], weight.shape[0], *size)
    if min(size) < 1 or (trains(norm, kind) and out[0] * out[2] * out[3] == 1):
        return None
    return out if _fits(norm, kind, out[1], autocast or dtype, device) else None


def call(scope: Any, unit: Unit, x: Any, residual: Any = None) -> Any:
    """The unit's result for these tensors. What it does is noted on the scope, for `unfused_units`."""
    compiling = torch.compiler.is_compiling()
    if static_reason(scope, unit) is None:
        result = _add_relu(x, residual) if unit.norm is None else _normed(scope, unit, x, residual)
        if result is not None:
            if not compiling:
                scope._refused.pop(unit.name, None)
            if unit.own == "other":
                norm = child(scope, unit.norm)  # type: ignore[arg-type]
                result = norm._modules["act"](norm._modules["drop"](result))  # type: ignore[misc]
            return result
        if not compiling:
            scope._refused[unit.name] = f"no op of ours takes its tensors, {_described(x)}"
    return run_steps(scope, unit, x, residual)


def _described(x: Any) -> str:
    return f"{str(x.dtype).removeprefix('torch.')} {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__


def is_plain(x: Any) -> bool:
    """A tensor that the ops take: dense, of a floating-point type, and not empty."""
    compiling = torch.compiler.is_compiling()
    if not (isinstance(x, Tensor) if compiling else type(x) in _PLAIN):
        return False
    return x.dtype in DTYPES and x.layout == torch.strided and x.numel() > 0


def _alike(x: Tensor, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> bool:
    return is_plain(x) and x.shape == shape and x.dtype == dtype and x.device == device


def _add_relu(x: Any, residual: Any) -> Tensor | None:
    if not is_plain(x) or not _alike(residual, x.shape, x.dtype, x.device):
        return None
    if not dispatch.is_fused("add_relu", x.device.type):
        return None
    return ops.add_relu(x, residual)


def _normed(scope: Any, unit: Unit, x: Any, residual: Any) -> Tensor | None:
    """The fused op; None where something about the tensors asks for the unit's own steps."""
    norm: Any = child(scope, unit.norm)  # type: ignore[arg-type]
    kind = norm_kind(norm)
    assert kind is not None
    if not is_plain(x) or (unit.adds and not is_plain(residual)):
        return None
    training = trains(norm, kind)
    activation = "relu" if unit.relu else None
    if kind.frozen and is_autocast(x):
        return None  # its arithmetic follows type promotion there, not autocast
    if unit.conv is None:
        return _bn_act(x, residual, norm, kind, training, activation)
    conv: Any = child(scope, unit.conv)
    dtype = autocast_dtype(x)
    shape = output_shape(conv, norm, x.shape, x.dtype, x.device, dtype) if x.dim() == 4 else None
    if shape is None or (residual is not None and not _alike(residual, shape, dtype or x.dtype, x.device)):
        return None
    inference = not training and not needs_grad(x, conv.weight, conv.bias, norm.weight, norm.bias, residual)
    if inference and not is_traced(x):
        y = scope._infer(unit.name, x, conv, norm, activation, residual)
        if y is not None:
            return y
    if not dispatch.is_fused("conv_bn_act" if inference else "bn_act", x.device.type):
        return None
    return ops.conv_bn_act(
        x,
        conv.weight,
        norm.weight,
        norm.bias,
        *running(norm, kind),
        residual,
        bias=conv.bias,
        stride=conv.stride,
        padding=conv.padding,
        dilation=conv.dilation,
        groups=conv.groups,
        training=training,
        momentum=momentum(norm, kind),
        eps=norm.eps,
        activation=activation,
    )


def _bn_act(x: Tensor, residual: Any, norm: Any, kind: Norm, training: bool, activation: str | None) -> Tensor | None:
    if x.dim() not in kind.dims or (not kind.frozen and x.shape[1] != norm.num_features):
        return None
    if training and x.numel() == x.shape[1]:
        return None
    if not _fits(norm, kind, x.shape[1], x.dtype, x.device):
        return None
    if residual is not None and not _alike(residual, x.shape, x.dtype, x.device):
        return None
    if not dispatch.is_fused("bn_act", x.device.type):
        return None
    return ops.bn_act(
        x,
        norm.weight,
        norm.bias,
        *running(norm, kind),
        residual,
        training=training,
        momentum=momentum(norm, kind),
        eps=norm.eps,
        activation=activation,
    )


def function_of(unit: Unit) -> Callable[..., Any]:
    """The unit as a function of (scope, value, residual) for generated code."""

    def fused(scope: Any, x: Any, residual: Any = None) -> Any:
        return call(scope, unit, x, residual)

    fused.__name__ = fused.__qualname__ = f"fused_{unit.op}"
    return fused
