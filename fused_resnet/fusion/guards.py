"""What a graph rests on, to be checked again at every call; and names for what a model is made of."""

from __future__ import annotations

from collections import OrderedDict
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fused_resnet.modules import HOOKS

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
MISSING = object()


class CannotFollow(Exception):
    """The reason why a forward has no graph, to be read after "its forward "."""


class Guard(NamedTuple):
    """`name`, read from the module at `path` (or from `holder`, a namespace), was `kind` and `expected`."""

    path: str
    holder: Any
    name: str
    kind: str
    expected: Any


def origin_of(kind: type[Any]) -> Any:
    """The class that a fused scope's class stands for; any other class is its own."""
    return kind.__dict__.get("_origin", kind)


def is_sequential(module: nn.Module) -> bool:
    """Whether the module only runs its children in a row: nn.Sequential's own forward, which nothing replaced."""
    return origin_of(type(module)).forward is nn.Sequential.forward and "forward" not in module.__dict__


def has_hooks(module: nn.Module) -> bool:
    return any(module.__dict__[hooks] for hooks in HOOKS)


def child(scope: nn.Module, path: str) -> nn.Module:
    """The module at a dotted path below `scope`."""
    for name in path.split(".") if path else ():
        scope = scope._modules[name]  # type: ignore[assignment]
    return scope


def _frozen(value: Any) -> Any:
    """A copy of a plain value (numbers, strings, None, and containers of them) that can be compared later."""
    if value is None or isinstance(value, (bool, int, float, str, bytes, torch.dtype, torch.device, torch.Size)):
        return type(value), value
    if type(value) in (tuple, list, set, frozenset):
        return type(value), [_frozen(v) for v in value]
    if type(value) in (dict, OrderedDict):
        return type(value), [(_frozen(k), _frozen(v)) for k, v in value.items()]
    raise CannotFollow(f"reads a {type(value).__name__}, which may change unseen")


def observed(value: Any) -> tuple[str, Any]:
    """(kind, what is compared later) of a value that a forward read."""
    if value is MISSING:
        return "missing", None
    if isinstance(value, nn.Module):
        return "module", (origin_of(type(value)), tuple(value._modules) if isinstance(value, _CONTAINERS) else None)
    if isinstance(value, Tensor):
        return "tensor", None
    if isinstance(value, MethodType):
        return "method", value.__func__
    if isinstance(value, (FunctionType, BuiltinFunctionType, type, ModuleType)):
        return "object", value
    return "value", _frozen(value)


def _holds(guard: Guard, value: Any) -> bool:
    kind, expected = guard.kind, guard.expected
    if kind == "module":
        if not isinstance(value, nn.Module) or origin_of(type(value)) is not expected[0]:
            return False
        return expected[1] is None or tuple(value._modules) == expected[1]
    if kind == "value":
        simple, plain = expected
        if type(value) is not simple:
            return False
        if simple in (bool, int, float, str) or value is None:
            return value == plain
    elif kind == "tensor":
        return isinstance(value, Tensor)
    elif kind == "object":
        return value is expected
    try:
        return observed(value) == (kind, expected)
    except CannotFollow:
        return False


def look_up(holder: Any, name: str) -> Any:
    state = holder.__dict__
    if name in state:
        return state[name]
    if isinstance(holder, nn.Module):
        value = state["_modules"].get(name, MISSING)
        if value is not MISSING:
            return value
    return getattr(holder, name, MISSING)


def guards_hold(scope: nn.Module, guards: tuple[Guard, ...]) -> bool:
    """Whether everything that a graph of `scope` rests on is still so."""
    try:
        for guard in guards:
            holder = guard.holder if guard.holder is not None else child(scope, guard.path) if guard.path else scope
            if guard.kind == "keys":
                if tuple(holder._modules) != guard.expected:
                    return False
            elif guard.kind == "no hooks":
                if has_hooks(holder) or "forward" in holder.__dict__:
                    return False
            elif not _holds(guard, look_up(holder, guard.name)):
                return False
    except (KeyError, AttributeError):
        return False
    return True
