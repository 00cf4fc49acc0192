"""Which backend serves a primitive: one ordered table, explicit requests, and the reasons for each refusal.

A *backend* is a module of `fused_resnet.backends` that has some of the function names of
`fused_resnet.backends.reference`, with the same signatures, plus

    unavailable(device_type) -> None | reason      the whole backend: not built, no such device, ...
    supports(primitive, *args) -> None | reason    this call: a dtype, a layout, a switch of torch, ...

and may have

    ONLY_ON = {primitive: device type}             primitives that it has on one kind of device alone
    untested(op, x) -> None | reason               not proven equal to reference on x's device, dtype and layout
    slower(primitive, *args) -> None | reason      a backend behind it in the order is faster at this call

which the automatic choice asks, an explicit request does not, and

    on_request(op, device_type) -> note            what `backend_table` says of a backend that is never chosen by itself
"""

from __future__ import annotations

import contextlib
import importlib
import os
import warnings
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused_resnet import emulation

BACKENDS = ("reference", "library", "cpp", "triton")

# op -> the primitives that make it up; a primitive's name starts with its op's.
OPS: dict[str, tuple[str, ...]] = {
    "add_relu": ("add_relu_forward", "add_relu_backward"),
    "bn_act": ("bn_act_train_forward", "bn_act_eval_forward", "bn_act_backward"),
    "bn_act_pool": ("bn_act_pool_train_forward", "bn_act_pool_eval_forward", "bn_act_pool_backward"),
    "bn_bn_act": ("bn_bn_act_train_forward", "bn_bn_act_backward"),
    "conv": ("conv_forward", "conv_backward"),
    "conv_bias_act": ("conv_bias_act_forward",),
    "conv_bn_act": ("conv_bn_act_forward",),
    "prologue": (
        "prologue_conv_forward",
        "prologue_conv_grad_input",
        "prologue_conv_grad_weight",
        "prologue_moments",
        "prologue_end_forward",
        "prologue_end_backward",
        "prologue_products",
        "bn_mask_backward",
    ),
    "residual_block": ("second_moments", "masked_sums"),
}
_OP_OF = {primitive: op for op, primitives in OPS.items() for primitive in primitives}

# The automatic order: device type -> op -> backends. A fused backend stands before "reference" only where it was
# measured to be faster on that kind of device (`fused-resnet bench`), or is the vendor library's own fused call.
AUTOMATIC: dict[str, dict[str, tuple[str, ...]]] = {
    "cpu": {
        "add_relu": ("cpp", "reference"),
        "bn_act": ("cpp", "reference"),
        "bn_act_pool": ("cpp", "reference"),
        "bn_bn_act": ("cpp", "reference"),
        "conv": ("cpp", "reference"),
        "conv_bias_act": ("cpp", "library", "reference"),
        "conv_bn_act": ("library", "cpp", "reference"),
        "prologue": ("reference",),
        "residual_block": ("cpp", "reference"),
    },
    "cuda": {
        # Not measured yet: fused on the strength of the bytes they save, once they have proven equal to reference.
        "add_relu": ("triton", "cpp", "reference"),
        "bn_act": ("triton", "cpp", "reference"),
        "bn_act_pool": ("triton", "cpp", "reference"),
        "bn_bn_act": ("triton", "cpp", "reference"),
        "conv": ("reference",),
        "conv_bias_act": ("library", "reference"),
        "conv_bn_act": ("library", "reference"),
        "prologue": ("triton", "reference"),  # asked for by the plans that say so alone
        "residual_block": ("reference",),
    },
}
_ELSEWHERE = ("reference",)


class BackendUnavailableError(RuntimeError):
    """A backend was asked for explicitly and cannot serve the call; the message says why."""


class Choice(NamedTuple):
    """The backend that serves a call, its function, and why each backend before it in the order does not.

    `pack` is set where the backend wants BN folded into the weight, and packs such a weight for its convolution;
    `onto_residual` is then its conv_bias_act_forward that may write over the residual, `relu_pool` makes a stem's conv
    with ReLU and max pool, of NCHW images too, where there is one.
    """

    backend: str
    function: Callable[..., Any]
    pack: Callable[..., Tensor] | None = None
    onto_residual: Callable[..., Tensor] | None = None
    relu_pool: Callable[..., Callable[[Tensor], Tensor] | None] | None = None
    skipped: tuple[tuple[str, str], ...] = ()


def _validated(name: str) -> str:
    if name != "auto" and name not in BACKENDS:
        raise ValueError(f"unknown backend {name!r}; expected 'auto' or one of {', '.join(map(repr, BACKENDS))}")
    return name


def _initial() -> str:
    name = os.environ.get("FUSED_RESNET_BACKEND") or "auto"
    try:
        return _validated(name)
    except ValueError as error:  # importing never fails
        warnings.warn(f"FUSED_RESNET_BACKEND ignored: {error}", stacklevel=2)
        return "auto"


# Whether somebody records the choices: each call then makes one, where blocks would take the calls that they kept.
recorded = False

_default = _initial()
_scoped: ContextVar[str | None] = ContextVar("fused_resnet_backend", default=None)
_warned: set[str] = set()


def requested() -> str:
    """The backend asked for in this context: "auto" or a name. Fixed at trace time in a compiled graph."""
    return _scoped.get() or _default


def is_fused(op: str, device_type: str) -> bool:
    """Whether a call of `op` would run something better than torch's own modules do: False where the automatic choice
    is "reference", so that modules had better run unfused."""
    if requested() != "auto":
        return True
    order = AUTOMATIC.get(device_type, {}).get(op, _ELSEWHERE)
    return next(name for name in order if _available(name, device_type) is None) != "reference"


def _available(backend: str, device_type: str) -> str | None:
    """None, or why the backend cannot be used at all; the automatic choice warns of it once."""
    reason = _module(backend).unavailable(device_type)
    case = f"{backend} on {device_type}"
    if reason is not None and case not in _warned and requested() == "auto":
        _warned.add(case)
        warnings.warn(
            f"fused_resnet: the {backend!r} backend is not available ({reason}); falling back. "
            "`fused-resnet info` shows what runs instead.",
            stacklevel=6,
        )
    return reason


def _onednn_enabled() -> bool:
    return torch.backends.mkldnn.is_available() and torch._C._get_mkldnn_enabled()


for _function in (requested, is_fused, _onednn_enabled):
    # What torch.compiler.assume_constant_result sets; calling that would import all of torch._dynamo.
    setattr(_function, "_dynamo_marked_constant", True)  # noqa: B010


def set_backend(name: str) -> None:
    """Ask for one backend everywhere: "auto" or one of `BACKENDS`. `use_backend` overrides it within its block."""
    global _default
    _default = _validated(name)


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Ask for one backend within a `with` block: "auto" or one of `BACKENDS`.

    The request holds for this thread or task only; a backward pass uses what its forward pass was asked for, wherever
    it runs. Calls that the backend cannot serve raise `BackendUnavailableError`.
    """
    token = _scoped.set(_validated(name))
    try:
        yield
    finally:
        _scoped.reset(token)


def load(backend: str) -> ModuleType:
    """The backend's module; importing it never fails, `unavailable` tells whether it can be used."""
    return importlib.import_module(f"fused_resnet.backends.{backend}")


_modules: dict[str, ModuleType] = {}


def _module(backend: str) -> ModuleType:
    module = _modules.get(backend)
    if module is None:
        module = _modules[backend] = load(backend)
    return module


def implementation(module: ModuleType, primitive: str, device_type: str) -> Callable[..., Any] | None:
    """A backend's function for a primitive on one kind of device, or None."""
    if getattr(module, "ONLY_ON", {}).get(primitive, device_type) != device_type:
        return None
    return getattr(module, primitive, None)


def _refusal(backend: str, primitive: str, x: Tensor, args: tuple) -> tuple[Callable[..., Any] | None, str | None]:
    """(function, None) where the backend serves the call, else (None, reason)."""
    reason = _available(backend, x.device.type)
    if reason is not None:
        return None, reason
    module = _module(backend)
    function = implementation(module, primitive, x.device.type)
    if function is None:
        return None, f"it does not implement {primitive}"
    reason = module.supports(primitive, x, *args)
    return (function, None) if reason is None else (None, reason)


def choose(primitive: str, x: Tensor, *args: Any, backend: str | None = None) -> Choice:
    """The backend that serves `primitive(x, *args)`. The automatic choice has 16-bit convolutions that this CPU could
    only emulate computed in float32, see `fused_resnet.emulation`.

    Args:
        primitive: a function name of `fused_resnet.backends.reference`.
        x, args: the arguments of the call; `x` decides the device.
        backend: "auto" or a name; None asks for what `use_backend` or `set_backend` said.

    Raises:
        BackendUnavailableError: one backend was asked for and cannot serve the call.
    """
    name = backend or requested()
    if name != "auto":
        function, reason = _refusal(name, primitive, x, args)
        if function is None:
            raise BackendUnavailableError(f"backend {name!r} cannot serve {primitive} on {x.device.type}: {reason}")
        return _choice(name, primitive, function, x, args)
    if primitive in emulation.PRIMITIVES and emulation.emulates(x.dtype, x.device.type):
        return emulation.widened(_automatic(primitive, *map(emulation.stand_in, (x, *args))))
    return _automatic(primitive, x, *args)


def _automatic(primitive: str, x: Tensor, *args: Any) -> Choice:
    skipped: list[tuple[str, str]] = []
    for name in AUTOMATIC.get(x.device.type, {}).get(_OP_OF[primitive], _ELSEWHERE):
        function, reason = _refusal(name, primitive, x, args)
        if function is not None:
            module = _module(name)
            if hasattr(module, "untested"):
                reason = module.untested(_OP_OF[primitive], x)
            if reason is None and hasattr(module, "slower"):
                reason = module.slower(primitive, x, *args)
            if reason is None:
                return _choice(name, primitive, function, x, args, tuple(skipped))
        skipped.append((name, str(reason)))
    raise AssertionError(f"no backend serves {primitive}: {skipped}")  # "reference" refuses nothing


def _choice(
    name: str,
    primitive: str,
    function: Callable[..., Any],
    x: Tensor,
    args: tuple,
    skipped: tuple[tuple[str, str], ...] = (),
) -> Choice:
    module = _module(name)
    packs = primitive == "conv_bias_act_forward" and getattr(module, "packs", None)
    if not packs or not packs(x, *args):
        return Choice(name, function, skipped=skipped)
    relu_pool = getattr(module, "relu_pool", None)
    return Choice(name, function, module.pack, module.conv_bias_act_onto_residual, relu_pool, skipped)


def call(primitive: str, x: Tensor, *args: Any, backend: str | None = None) -> Any:
    """Run `primitive(x, *args)` on the backend that `choose` names."""
    return choose(primitive, x, *args, backend=backend).function(x, *args)


def in_float32(dtype: torch.dtype, device_type: str, backend: str | None = None) -> bool:
    """Whether convolutions of the dtype are computed in float32 here and rounded; `backend` as in `choose`."""
    return (backend or requested()) == "auto" and emulation.emulates(dtype, device_type)


def prefers_channels_last(x: Tensor) -> bool:
    """Whether the convolutions on x's device and dtype are fastest on NHWC tensors (torch's channels_last)."""
    if x.device.type == "cpu":
        return _onednn_enabled()
    if x.device.type == "cuda":
        return x.dtype in (torch.float16, torch.bfloat16) or torch.is_autocast_enabled("cuda")
    return False


class Row(NamedTuple):
    """One line of `backend_table`."""

    op: str
    device: str
    backend: str
    live: bool
    note: str


class BackendTable(list[Row]):
    """The rows of `backend_table`; prints as a table."""

    def __str__(self) -> str:
        head = ("op", "device", "backend", "", "note")
        cells = [head, *((r.op, r.device, r.backend, "live" if r.live else "-", r.note) for r in self)]
        widths = [max(len(row[i]) for row in cells) for i in range(4)]
        return "\n".join(
            "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[4]]).rstrip()
            for row in cells
        )


def backend_table() -> BackendTable:
    """Per op, device and backend: live (what the automatic choice takes there for fp32), or the reason why not.

    A backend that is live for some calls alone says for which; the next live one serves the others.

    Where a backend must prove itself on a device before it is chosen, it does so now (seconds, once per process).
    """
    rows = BackendTable()
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    for device in devices:
        for op, primitives in OPS.items():
            order = AUTOMATIC[device].get(op, _ELSEWHERE)
            live = None
            for name in [*order, *(b for b in BACKENDS if b not in order)]:
                module = _module(name)
                reason = module.unavailable(device)
                if reason is None and not any(implementation(module, p, device) for p in primitives):
                    reason = "does not implement it"
                if reason is None and hasattr(module, "switched_off"):
                    reason = module.switched_off(device)
                note = getattr(module, "NOTES", {}).get(op, "")
                partly = module.partly(op) if hasattr(module, "partly") and name in order else None
                if reason is None and live is None and partly is not None:
                    rows.append(Row(op, device, name, *partly))
                    continue
                if reason is None and name in order and live is None and hasattr(module, "untested"):
                    reason = module.untested(op, torch.empty((1, 2, 2, 2), device=device))
                    note = "equal to reference on this device: its self-check passed"
                if reason is None and name in order and live is None:
                    live = name
                    rows.append(Row(op, device, name, True, note))
                else:
                    detail = module.on_request(op, device) if hasattr(module, "on_request") else ""
                    request = f"on request: {detail}" if detail else "on request"
                    note = reason or (request if name not in order else f"on request; {live} comes first")
                    rows.append(Row(op, device, name, False, note))
    return rows
