"""What a forward pass keeps for the backward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor


def saved_bytes(run: Callable[[], Tensor], own: Iterable[Tensor]) -> int:
    """Bytes of the distinct storages that autograd saves in `run`, those of `own` (parameters and buffers) aside."""
    aside = {t.untyped_storage()._cdata for t in own}
    found: dict[int, Tensor] = {}

    def pack(t: Tensor) -> Tensor:
        found[t.untyped_storage()._cdata] = t  # alive until all are counted, so that no address stands for two
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = run()
    if not out.requires_grad:
        raise ValueError("saved_bytes: the result of `run` has no graph; expected one that requires grad")
    return sum(t.untyped_storage().nbytes() for storage, t in found.items() if storage not in aside)


def saved_by(model: torch.nn.Module, x: Tensor) -> int:
    """`saved_bytes` of a call of the model."""
    return saved_bytes(lambda: model(x), (*model.parameters(), *model.buffers()))
