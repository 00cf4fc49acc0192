"""What the layers of a network do together in a forward: they count their batches, and cast weights for autocast.

Each is one operation for all layers, where there would be a small one for each. Counters may wait until no later than
somebody could look; a weight's copy is good for one use while nobody has written to the weight.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class _Active(threading.local):
    """Of this thread: the counters that wait, with how often each is due (None: none may wait); the weights that were
    cast beforehand, by id, with their versions and copies; and a list that the weights asked for are noted in."""

    counters: dict[int, tuple[Tensor, int]] | None = None
    copies: dict[int, tuple[Tensor, int, Tensor]] | None = None
    asked: list[Tensor] | None = None


_active = _Active()


def count(counter: Tensor) -> None:
    """Add one to a batch norm's counter: now, or with the others."""
    counters = _waiting()
    if counters is None:
        counter.add_(1)
    else:
        counters[id(counter)] = counter, _times(counters, counter) + 1


def count_now(counter: Tensor) -> None:
    """`count`, for whoever reads the counter next."""
    counters = _waiting() or {}
    counter.add_(1 + _times(counters, counter))
    counters.pop(id(counter), None)


def _waiting() -> dict[int, tuple[Tensor, int]] | None:
    return None if torch.compiler.is_compiling() else _active.counters


def _times(counters: dict[int, tuple[Tensor, int]], counter: Tensor) -> int:
    return counters[id(counter)][1] if id(counter) in counters else 0


def _settle(counters: dict[int, tuple[Tensor, int]]) -> None:
    due: dict[int, list[Tensor]] = {}
    for counter, times in counters.values():
        due.setdefault(times, []).append(counter)
    counters.clear()
    for times, group in due.items():
        torch._foreach_add_(group, times)


class _Counting:
    __slots__ = ("_outer",)

    def __enter__(self) -> None:
        self._outer = _active.counters
        if self._outer is None:
            _active.counters = {}

    def __exit__(self, *_: Any) -> None:
        if self._outer is None:
            counters, _active.counters = _active.counters, None
            _settle(counters or {})


class _Apart:
    __slots__ = ("_outer",)

    def __enter__(self) -> None:
        self._outer, _active.counters = _active.counters, None
        if self._outer:
            _settle(self._outer)

    def __exit__(self, *_: Any) -> None:
        _active.counters = self._outer


def waiting() -> bool:
    """Whether counters may wait now."""
    return _waiting() is not None


def counting() -> AbstractContextManager[None]:
    """Within, counters wait for each other: no code but this package's, and torch's own, may run there."""
    return contextlib.nullcontext() if torch.compiler.is_compiling() else _Counting()


def apart() -> AbstractContextManager[None]:
    """Within, code of others may run, hooks for one: no counter waits."""
    return _Apart() if waiting() else contextlib.nullcontext()


class Together:
    """A network's own: which weights its last such forward in a thread asked for. In no pickle or copy."""

    __slots__ = ("_threads",)

    def __init__(self) -> None:
        self._threads = threading.local()

    @contextlib.contextmanager
    def forward(self, device: torch.device, dtype: torch.dtype | None) -> Iterator[None]:
        """One forward of the network: as `counting`; weights on the device are cast to autocast's dtype (None: it is
        off) at once, those that the last forward asked for."""
        before = _active.copies, _active.asked
        asked: list[Tensor] | None = None
        copies: dict[int, tuple[Tensor, int, Tensor]] = {}
        if dtype is not None:
            asked = []
            alive = [weight() for weight in self._threads.__dict__.get("weights", ())]
            last = [w for w in alive if w is not None and w.dtype != dtype and w.device == device]
            for weight, copy in zip(last, _cast(last, dtype), strict=True):
                copies[id(weight)] = weight, weight._version, copy
        _active.copies, _active.asked = copies, asked
        try:
            with counting():
                yield
            if asked is not None:
                self._threads.weights = [weakref.ref(weight) for weight in asked]
        finally:
            _active.copies, _active.asked = before

    def __deepcopy__(self, memo: dict[int, Any]) -> Together:
        return Together()

    def __reduce__(self) -> tuple[type[Together], tuple[()]]:
        return Together, ()


def casting() -> bool:
    """Whether a network's forward is under way that casts weights at once, so that its layers are to ask `cast`."""
    return not torch.compiler.is_compiling() and _active.asked is not None


def _cast(weights: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    copies = [torch.empty_like(weight, dtype=dtype, requires_grad=False) for weight in weights]
    if copies:
        with torch.no_grad():
            torch._foreach_copy_(copies, list(weights))
    return copies


def cast(weights: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """The weights in a dtype, those that no copy was made of beforehand by one operation; so are their gradients.

    Copies keep the weights' strides, gradients the copies'. A copy requires a gradient where its weight does.
    """
    other = [weight for weight in weights if weight.dtype != dtype]
    kept = [_kept(weight, dtype) for weight in other]
    if _active.asked is not None:
        _active.asked += [weight for weight in other if not weight.is_inference()]
    made = iter(_cast([weight for weight, copy in zip(other, kept, strict=True) if copy is None], dtype))
    every: Sequence[Tensor] = [next(made) if copy is None else copy for copy in kept]
    if torch.is_grad_enabled() and any(weight.requires_grad for weight in other):
        every = CastFunction.apply(every, *other)
    found = iter(every)
    return [weight if weight.dtype == dtype else next(found) for weight in weights]


def _kept(weight: Tensor, dtype: torch.dtype) -> Tensor | None:
    """The copy that was made of the weight beforehand, handed out once."""
    if not _active.copies or id(weight) not in _active.copies:
        return None
    _, version, copy = _active.copies.pop(id(weight))
    return copy if version == weight._version and copy.dtype == dtype else None


class CastFunction(torch.autograd.Function):
    """Copies of weights, made beforehand, as what they are: functions of the weights. Saves nothing."""

    @staticmethod
    def forward(ctx: Any, copies: Sequence[Tensor], *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(
            *(copy for copy, weight in zip(copies, weights, strict=True) if not weight.requires_grad)
        )
        ctx.like = [(weight.dtype, copy.stride()) for copy, weight in zip(copies, weights, strict=True)]
        return tuple(copies)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        given = {i: grad for i, grad in enumerate(grads) if grad is not None}
        found = {}
        for i, grad in given.items():
            dtype, strides = ctx.like[i]
            found[i] = grad.new_empty_strided(grad.shape, strides, dtype=dtype)
        if given:
            torch._foreach_copy_(list(found.values()), list(given.values()))
        return None, *(found.get(i) for i in range(len(grads)))
