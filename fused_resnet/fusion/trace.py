"""A module's own forward as a graph of calls to its children: torch.fx, with all checked that it takes for granted.

Symbolic tracing runs a forward once with stand-ins for tensors and keeps the calls it sees. What Python did meanwhile
is lost: branches not taken, attributes set, lists filled, values of globals, contexts, random numbers, prints. Here

- every attribute and global that the forward reads becomes a `Guard`; the graph is used only while all guards hold;
- a forward that does anything with an effect, or that decides by a value only a run can know, is not followed.

So a graph stands for the forward whenever its guards hold and its inputs are tensors, or there is no graph.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import FunctionType
from typing import NamedTuple

from torch import fx, nn

from fused_resnet.fusion.guards import CannotFollow, Guard, child, origin_of
from fused_resnet.fusion.inputs import Input, bind_parameters, calls
from fused_resnet.fusion.watch import Tracer, Watch, is_users


class Traced(NamedTuple):
    """A forward's graph: placeholders are the tensors of `inputs`, children are called by path; `inlined` containers
    are not called."""

    graph: fx.Graph
    inputs: tuple[Input, ...]
    guards: tuple[Guard, ...]
    inlined: tuple[str, ...]
    calls: tuple[tuple[str, tuple[Input, ...] | None], ...]  # (child's path, how it is called)


_lock = threading.RLock()


def follow(scope: nn.Module, inline: Callable[[nn.Module], bool], signature: tuple[Input, ...] | None = None) -> Traced:
    """The graph of `type(scope).forward` as it would run now, all children leaves but those that `inline` admits.

    `signature` says what it is called with; without one, the required arguments are tensors.

    Raises:
        CannotFollow: with the reason.
    """
    kind = origin_of(type(scope))
    function = kind.forward
    keys = Guard("", None, "_modules", "keys", tuple(scope._modules))
    if function is nn.Sequential.forward:
        if signature is not None and signature != (Input("input"),):
            raise CannotFollow("is called with something else than a tensor")
        return _sequential(scope, inline)
    if not isinstance(function, FunctionType):
        raise CannotFollow("is no plain function")
    if not is_users(function.__code__):
        raise CannotFollow("is no code of a model's own")
    if kind.__getattr__ is not nn.Module.__getattr__ or kind.__getattribute__ is not object.__getattribute__:
        raise CannotFollow("may read attributes that its class makes up")
    names = [name for name, _ in scope.named_modules(remove_duplicate=False)]
    if len(names) != sum(1 for _ in scope.modules()):
        raise CannotFollow("may call a child that stands under two names")
    inputs, defaults = bind_parameters(function, signature)
    inlinable = frozenset(m for m in scope.modules() if m is not scope and inline(m))
    tracer = Tracer(inlinable, inputs, defaults)
    tracer.traced_func_name = "forward" if type(scope) is kind else "_origin_forward"
    watch = Watch(scope, tracer)
    state = dict(scope.__dict__)
    with _lock:
        try:
            graph = watch.run()
        except CannotFollow as error:
            raise CannotFollow(watch.reason or str(error)) from None
        except Exception as error:  # whatever the model's own code does with stand-ins
            raise CannotFollow(watch.reason or f"fails on stand-ins: {_first_line(error)}") from error
    if watch.reason is not None:
        raise CannotFollow(watch.reason)
    if scope.__dict__.keys() != state.keys():
        raise CannotFollow("leaves attributes behind")
    guards = [keys, Guard("", kind, "forward", "object", function), *watch.guards()]
    guards += [guard for path in tracer.inlined for guard in _inlined(scope, path)]
    return Traced(graph, inputs, tuple(guards), tuple(tracer.inlined), calls(scope, graph))


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:120]}"


def _inlined(scope: nn.Module, path: str) -> tuple[Guard, Guard]:
    keys = tuple(child(scope, path)._modules)
    return Guard(path, None, "_modules", "keys", keys), Guard(path, None, "", "no hooks", None)


def _sequential(scope: nn.Module, inline: Callable[[nn.Module], bool]) -> Traced:
    """nn.Sequential's forward, which needs no watching."""
    graph = fx.Graph()
    value = graph.placeholder("input")
    inlined: list[str] = []

    def run(module: nn.Module, path: str, value: fx.Node) -> fx.Node:
        for name, part in module._modules.items():
            here = f"{path}.{name}" if path else name
            if part is None:
                raise CannotFollow(f"has None at {here}")
            if inline(part):
                inlined.append(here)
                value = run(part, here, value)
            else:
                value = graph.create_node("call_module", here, (value,))
        return value

    graph.output(run(scope, "", value))
    guards = [Guard("", None, "_modules", "keys", tuple(scope._modules))]
    guards += [guard for path in inlined for guard in _inlined(scope, path)]
    return Traced(graph, (Input("input"),), tuple(guards), tuple(inlined), calls(scope, graph))
