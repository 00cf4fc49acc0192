"""Memory of large tensors on the CPU, which a network keeps from call to call.

The pages of a large new tensor cost as much time as the convolution that fills it. Within a network's calls, and in the
backward passes of its ops, csrc's kernels take the memory of their outputs from the network's pool. It goes back there
when the last tensor that uses it is gone, so nothing that somebody holds is ever written over.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Iterator
from typing import Any

import torch

from fused_resnet.backends import cpp

_ops = torch.ops.fused_resnet_cpp
_LEAST = 1 << 20  # bytes; smaller ones come from a heap that keeps its pages


class _Active(threading.local):
    buffers: Buffers | None = None


_active = _Active()


class Buffers:
    """A network's pool. In no pickle or copy. Several threads may use it at once."""

    __slots__ = ("__weakref__", "_lock", "_pool")

    def __init__(self) -> None:
        self._pool = 0
        self._lock = threading.Lock()

    def _id(self) -> int:
        with self._lock:
            if not self._pool:
                self._pool = _ops.pool_new.default(_LEAST)
                weakref.finalize(self, _ops.pool_drop.default, self._pool).atexit = False
            return self._pool

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Within, in this thread, csrc's kernels take memory from the pool."""
        if cpp.unavailable("cpu") is not None:
            yield
            return
        before, _active.buffers = _active.buffers, self
        _ops.pool_activate.default(self._id())
        try:
            yield
        finally:
            _active.buffers = before
            _ops.pool_activate.default(0 if before is None else before._id())

    @contextlib.contextmanager
    def reused(self) -> Iterator[None]:
        """`active` for one pass; what two passes did not take goes back to the system."""
        try:
            with self.active():
                yield
        finally:
            if self._pool:
                _ops.pool_end_pass.default(self._pool)

    def clear(self) -> None:
        """Give all memory that no tensor uses back to the system."""
        if self._pool:
            _ops.pool_clear.default(self._pool)

    def kept(self) -> list[int]:
        """The sizes in bytes of what is kept and used by no tensor."""
        return _ops.pool_kept.default(self._pool) if self._pool else []

    def __deepcopy__(self, memo: dict[int, Any]) -> Buffers:
        return Buffers()

    def __reduce__(self) -> tuple[type[Buffers], tuple[()]]:
        return Buffers, ()


def current() -> Buffers | None:
    """The pool that is active in this thread, for `using` in the backward pass."""
    return _active.buffers


def using(buffers: Buffers | None) -> contextlib.AbstractContextManager[None]:
    """A context in which that pool is active; with None as things are."""
    return contextlib.nullcontext() if buffers is None else buffers.active()
