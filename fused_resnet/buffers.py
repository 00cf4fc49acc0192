"""Memory of large outputs in inference on the CPU, which a network keeps from call to call.

The pages of a large new tensor cost as much time as the convolution that fills it. A storage is given out again only
where no tensor refers to it any more, so that nothing that somebody holds is written over. Each thread has its own.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

_LEAST = 8 << 20  # bytes; smaller ones come from a heap that keeps its pages
_PASSES = 2  # without use, after which a storage is dropped

_use_count: Any = getattr(torch._C, "_storage_Use_Count", None)


class _Pool:
    """The storages of one network and thread, each with the pass that last took it."""

    def __init__(self) -> None:
        self.taken: list[tuple[torch.UntypedStorage, int]] = []
        self.passes = 0

    def take(self, nbytes: int) -> torch.UntypedStorage:
        """A storage of at least that size, and less than twice that, to which no tensor refers."""
        best = None
        for index, (storage, _) in enumerate(self.taken):
            fits = nbytes <= storage.nbytes() < 2 * nbytes and _use_count(storage._cdata) == 1
            if fits and (best is None or storage.nbytes() < self.taken[best][0].nbytes()):
                best = index
        storage = torch.UntypedStorage(nbytes) if best is None else self.taken.pop(best)[0]
        self.taken.append((storage, self.passes))
        return storage

    def end(self) -> None:
        self.passes += 1
        self.taken = [(storage, last) for storage, last in self.taken if last >= self.passes - _PASSES]


class _Active(threading.local):
    pool: _Pool | None = None


_active = _Active()


class Buffers:
    """What a network keeps. In no pickle or copy."""

    __slots__ = ("_threads",)

    def __init__(self) -> None:
        self._threads = threading.local()

    @contextlib.contextmanager
    def reused(self) -> Iterator[None]:
        """Within, `empty` takes from what is kept; what two passes did not take is dropped afterwards."""
        pool = self._threads.__dict__.get("pool")
        if pool is None:
            pool = self._threads.pool = _Pool()
        before, _active.pool = _active.pool, pool
        try:
            yield
        finally:
            _active.pool = before
            pool.end()

    def __deepcopy__(self, memo: dict[int, Any]) -> Buffers:
        return Buffers()

    def __reduce__(self) -> tuple[type[Buffers], tuple[()]]:
        return Buffers, ()


def empty(like: Tensor, n: int, c: int, h: int, w: int) -> Tensor:
    """(n, c, h, w), channels_last, uninitialised, of `like`'s dtype."""
    strides, nbytes = (h * w * c, 1, w * c, c), n * c * h * w * like.element_size()
    if _active.pool is None or nbytes < _LEAST or _use_count is None or torch.is_grad_enabled():
        return like.new_empty_strided((n, c, h, w), strides)
    return like.new_empty(0).set_(_active.pool.take(nbytes), 0, (n, c, h, w), strides)
