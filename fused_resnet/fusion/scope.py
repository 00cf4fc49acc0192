"""The class that a module with units gets: its own, with a forward in which chains run as fused ops.

The generated forward is used for tensors while every guard holds. In all other cases the module's own forward runs.
"""

from __future__ import annotations

import copyreg
import importlib
import platform
import types
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from fused_resnet._version import __version__
from fused_resnet.fusion import blocks, units
from fused_resnet.fusion.blocks import Block
from fused_resnet.fusion.guards import Guard, guards_hold, origin_of
from fused_resnet.fusion.inputs import Input
from fused_resnet.fusion.trace import Traced
from fused_resnet.fusion.units import Unit, static_reason
from fused_resnet.modules import FusedModule, call_reason

_STATE = ("_fused", "_folded", "_fusion", "_refused")


class Variant:
    """One generated forward: source, what its names stand for, and what must hold for it to be used."""

    def __init__(
        self, source: str, names: dict[str, Any], inputs: tuple[Input, ...], guards: tuple[Guard, ...]
    ) -> None:
        self.source, self.inputs, self.guards = source, inputs, guards
        namespace = {name: function_of(v) if isinstance(v, (Unit, Block)) else v for name, v in names.items()}
        exec(compile(source, "<fused forward>", "exec"), namespace)
        self.function: Callable[..., Any] = namespace["forward"]
        used = self.function.__code__.co_names
        self.names = {name: value for name, value in names.items() if name in used}
        self.blocks = tuple(value for value in self.names.values() if isinstance(value, Block))
        self.units = tuple(
            unit
            for value in self.names.values()
            if isinstance(value, (Unit, Block))
            for unit in (value.units if isinstance(value, Block) else (value,))
        )

    def __reduce__(self) -> Any:
        names = {name: _Namespace.of(value) for name, value in self.names.items()}
        guards = tuple(guard._replace(holder=_Namespace.of(guard.holder)) for guard in self.guards)
        return _load_variant, (self.source, names, self.inputs, guards)


def function_of(value: Unit | Block) -> Callable[..., Any]:
    return units.function_of(value) if isinstance(value, Unit) else blocks.function_of(value)


class _Namespace(NamedTuple):
    """A Python module in a pickle."""

    name: str

    @staticmethod
    def of(value: Any) -> Any:
        return _Namespace(value.__name__) if isinstance(value, types.ModuleType) else value

    @staticmethod
    def found(value: Any) -> Any:
        return importlib.import_module(value.name) if isinstance(value, _Namespace) else value


def _load_variant(source: str, names: dict[str, Any], inputs: tuple[Input, ...], guards: tuple[Guard, ...]) -> Variant:
    names = {name: _Namespace.found(value) for name, value in names.items()}
    return Variant(source, names, inputs, tuple(g._replace(holder=_Namespace.found(g.holder)) for g in guards))


class Fusion:
    """The variants of one scope. It names modules by path, so copies of the scope share it."""

    def __init__(self, variants: tuple[Variant, ...]) -> None:
        self.variants = variants

    def __deepcopy__(self, memo: dict[int, Any]) -> Fusion:
        return self

    def __reduce__(self) -> Any:
        return _loaded, (_versions(), self.variants)


def _versions() -> tuple[str, ...]:
    return platform.python_version(), torch.__version__, __version__


def _loaded(versions: tuple[str, ...], variants: tuple[Variant, ...]) -> Fusion:
    """From a pickle: graphs of other versions may not be those of the forwards of today."""
    return Fusion(variants if versions == _versions() else ())


def make_variant(traced: Traced, graph: fx.Graph, functions: dict[str, Unit | Block]) -> Variant:
    """The source of a graph whose fused nodes call the named functions."""
    code = graph.python_code(root_module="self")
    names = {name: functions.get(getattr(value, "__name__", ""), value) for name, value in code.globals.items()}
    return Variant(code.src, names, traced.inputs, traced.guards)


class FusedScope(FusedModule):
    """Mixed into the class of each module that `fused_resnet.fuse` changed; `_origin` is the class it had."""

    _origin: type[nn.Module]
    _fusion: Fusion
    _refused: dict[str, str]  # unit, or "" for all -> why the last call ran it unfused

    def unfused(self) -> dict[str, str]:
        """unit -> why it would run unfused now."""
        variants = self._fusion.variants
        if not variants:
            return {"": "it was fused under other versions: call fused_resnet.fuse again"}
        holding = [variant for variant in variants if guards_hold(self, variant.guards)]
        units = (holding or list(variants))[0].units
        reason = None if self._fused else "restored"
        if not holding:
            reason = reason or "what its forward reads has changed since fuse: call fused_resnet.fuse again"
        reason = reason or call_reason()
        if reason is not None:
            return {unit.name: reason for unit in units}
        if "" in self._refused:
            return {unit.name: self._refused[""] for unit in units}
        reasons = {unit.name: static_reason(self, unit) or self._refused.get(unit.name) for unit in units}
        return {name: reason for name, reason in reasons.items() if reason is not None}

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced: Any = super().__reduce_ex__(protocol)
        function, args, *state = reduced
        if function is not copyreg.__newobj__ or args != (type(self),):  # type: ignore[attr-defined]
            raise TypeError(f"{self._origin.__name__} is pickled in a way of its own: call fused_resnet.restore first")
        return _make, (self._origin,), *state


def _make(origin: type[nn.Module]) -> nn.Module:
    return object.__new__(class_for(origin))


_classes: dict[type[nn.Module], type[nn.Module]] = {}


def class_for(origin: type[nn.Module]) -> type[nn.Module]:
    """The fused class of a class, made once."""
    found = _classes.get(origin)
    if found is None:
        found = _classes[origin] = _new_class(origin)
    return found


def _new_class(origin: type[nn.Module]) -> type[nn.Module]:
    unfused = origin.forward

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        found = choose(self, args, kwargs)
        if found is None:
            return origin.forward(self, *args, **kwargs)
        function, inputs = found
        return function(self, self, *inputs)

    forward.__wrapped__ = unfused  # type: ignore[attr-defined]  # signatures and torch.fx see the model's own
    forward.__doc__ = unfused.__doc__

    # `type(self)(...)`, as slices of containers call it, makes the model's own class; `__new__` alone is for copies.
    def new(cls: type, *args: Any, **kwargs: Any) -> Any:
        return origin(*args, **kwargs) if args or kwargs else object.__new__(cls)

    def init(self: Any) -> None:
        self.__class__ = origin
        origin.__init__(self)

    def extra_repr(self: Any) -> str:
        lines = [origin.extra_repr(self)]
        if self._fused and self._fusion.variants:
            variant = self._fusion.variants[0]
            lines.append("fused: " + "; ".join(f"{unit.name}: {unit.what}" for unit in variant.units))
            lines += [f"one op in training: {block.what}" for block in variant.blocks]
        return "\n".join(filter(None, lines))

    def body(namespace: dict[str, Any]) -> None:
        namespace |= {
            "__module__": origin.__module__,
            "__qualname__": origin.__qualname__,
            "__doc__": origin.__doc__,
            "__new__": new,
            "__init__": init,
            "_origin": origin,
            "_origin_forward": unfused,
            "forward": forward,
            "extra_repr": extra_repr,
        }

    return types.new_class(origin.__name__, (FusedScope, origin), exec_body=body)


_PLAIN = (Tensor, nn.Parameter)


def choose(scope: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Callable[..., Any], Any] | None:
    """(the generated forward, its inputs), or None where the scope's own forward must run."""
    if not scope._fused or call_reason() is not None:
        return None
    is_tensor = _is_any_tensor if torch.compiler.is_compiling() else _is_plain_tensor
    for variant in scope._fusion.variants:
        tensors = bind(variant.inputs, args, kwargs, is_tensor)
        if tensors is not None and guards_hold(scope, variant.guards):
            if not torch.compiler.is_compiling():
                scope._refused.pop("", None)
            return variant.function, tensors
    if not torch.compiler.is_compiling():
        scope._refused[""] = "its last call was not as its forward was followed: other arguments, or changed attributes"
    return None


def _is_any_tensor(x: Any) -> bool:
    return isinstance(x, Tensor)


def _is_plain_tensor(x: Any) -> bool:
    return type(x) in _PLAIN


def bind(
    inputs: tuple[Input, ...], args: tuple[Any, ...], kwargs: dict[str, Any], is_tensor: Callable[[Any], bool]
) -> list[Any] | None:
    """The tensors of a call, or None where the call is not like `inputs`."""
    if len(args) + len(kwargs) != len(inputs):
        return None
    tensors: list[Any] = []
    for index, input in enumerate(inputs):
        if index < len(args):
            argument = args[index]
        elif input.name in kwargs:
            argument = kwargs[input.name]
        else:
            return None
        found = input.tensors(argument, is_tensor)
        if found is None:
            return None
        tensors += found
    return tensors


def swap_in(scope: nn.Module, fusion: Fusion) -> None:
    """Give the module its fused class. Its `__dict__` gains entries; parameters, buffers and children do not move."""
    if not isinstance(scope, FusedScope):
        scope.__class__ = class_for(type(scope))
    scope.__dict__.update(_fused=True, _folded={}, _fusion=fusion, _refused={})


def swap_out(scope: nn.Module) -> None:
    """The inverse. A class that something else (a parametrization) made of the fused one stays, and runs unfused."""
    if "_origin" in type(scope).__dict__:
        scope.__class__ = origin_of(type(scope))
        for name in _STATE:
            scope.__dict__.pop(name, None)
    else:
        scope.__dict__["_fused"] = False
