"""What a forward is called with, as its callers' graphs show it."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import FunctionType
from typing import Any, NamedTuple

from torch import fx, nn

from fused_resnet.fusion.guards import CannotFollow, child, origin_of


class Input(NamedTuple):
    """An argument that a forward is called with: a tensor, a list or tuple of `length` tensors, or a plain value."""

    name: str
    kind: str = "tensor"  # "list", "tuple", "value"
    length: int = 1
    value: Any = None

    @property
    def names(self) -> list[str]:
        """Of the tensors in it."""
        if self.kind == "tensor":
            return [self.name]
        return [] if self.kind == "value" else [f"{self.name}_{i}" for i in range(self.length)]

    def of(self, tensors: list[Any]) -> Any:
        """The argument made of its tensors."""
        if self.kind == "tensor":
            return tensors[0]
        return self.value if self.kind == "value" else tensors if self.kind == "list" else tuple(tensors)

    def tensors(self, argument: Any, is_tensor: Callable[[Any], bool]) -> list[Any] | None:
        """The argument's tensors, or None where it is not as in the trace."""
        if self.kind == "tensor":
            return [argument] if is_tensor(argument) else None
        if self.kind == "value":
            return [] if type(argument) is type(self.value) and argument == self.value else None
        if type(argument) is not (list if self.kind == "list" else tuple) or len(argument) != self.length:
            return None
        return list(argument) if all(is_tensor(x) for x in argument) else None


def bind_parameters(
    function: FunctionType, signature: tuple[Input, ...] | None
) -> tuple[tuple[Input, ...], dict[str, Any]]:
    """(the arguments that are passed, by the signature or else the required ones as tensors; the others' defaults)."""
    given = {input.name: input for input in signature or ()}
    inputs, defaults = [], {}
    for parameter in list(inspect.signature(function).parameters.values())[1:]:
        name = parameter.name
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        if parameter.kind is parameter.POSITIONAL_ONLY:
            raise CannotFollow("has positional-only arguments")
        if name in given:
            inputs.append(given.pop(name))
        elif parameter.default is parameter.empty:
            inputs.append(Input(name))
        else:
            defaults[name] = parameter.default
            if parameter.default is not None and not isinstance(parameter.default, (bool, int, float, str)):
                raise CannotFollow(f"has the default {name}={parameter.default!r}")
    if given or not any(input.names for input in inputs):
        raise CannotFollow("takes no tensor" if not given else "takes arguments of any number")
    return tuple(inputs), defaults


def calls(scope: nn.Module, graph: fx.Graph) -> tuple[tuple[str, tuple[Input, ...] | None], ...]:
    nodes = [node for node in graph.nodes if node.op == "call_module"]
    return tuple((str(n.target), signature_of_call(child(scope, str(n.target)), n)) for n in nodes)


def signature_of_call(callee: nn.Module, node: fx.Node) -> tuple[Input, ...] | None:
    """How a graph calls a child; None where its arguments are neither tensors, lists of them nor plain values."""
    try:
        bound = inspect.signature(origin_of(type(callee)).forward).bind(callee, *node.args, **node.kwargs)
    except (TypeError, ValueError):
        return None
    inputs = []
    for name, value in list(bound.arguments.items())[1:]:
        if isinstance(value, fx.Node):
            inputs.append(Input(name))
        elif isinstance(value, (list, tuple)) and value and all(isinstance(v, fx.Node) for v in value):
            inputs.append(Input(name, "list" if isinstance(value, list) else "tuple", len(value)))
        elif value is None or isinstance(value, (bool, int, float, str)):
            inputs.append(Input(name, "value", 0, value))
        else:
            return None
    return tuple(inputs)
