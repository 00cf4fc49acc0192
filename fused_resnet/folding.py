"""The small per-channel algebra of batch normalisation: accumulation types, running statistics, folding into a conv."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

FOLDED = "batch_norm_folded"  # the entry by which state dicts of folded models are known


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type that statistics and scales of a `dtype` tensor are computed in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def update_running_stats(
    running_mean: Tensor | None,
    running_var: Tensor | None,
    mean: Tensor,
    var: Tensor,
    momentum: float | Tensor,
    count: int,
) -> None:
    """running += momentum * (batch - running), in place; `var` is biased, the running variance unbiased.

    `momentum` is a float or a 0-d tensor on the same device; nothing waits for the device.
    """
    for running, batch in ((running_mean, mean), (running_var, var * (count / (count - 1)) if count > 1 else var)):
        if running is not None:
            weight = momentum.to(batch.dtype) if isinstance(momentum, Tensor) else momentum
            if running.dtype == batch.dtype:
                running.lerp_(batch, weight)
            else:  # 16-bit buffers: rounded once
                running.copy_(running.to(batch.dtype).lerp_(batch, weight))


def fold(
    weight: Tensor,
    bias: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    mean: Tensor,
    var: Tensor,
    eps: float,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """The (weight, bias) of the conv that equals conv followed by batch norm with given statistics.

    w' = w * s and b' = beta + (b - mean) * s with s = gamma / sqrt(var + eps), computed in the accumulation type and
    rounded once to `dtype` (default: the weight's).
    """
    dtype = dtype or weight.dtype
    acc = accumulate_dtype(weight.dtype)
    scale = torch.rsqrt(var.to(acc) + eps)
    if gamma is not None:
        scale = scale * gamma.to(acc)
    shift = -mean.to(acc) if bias is None else bias.to(acc) - mean.to(acc)
    shift = shift * scale if beta is None else torch.addcmul(beta.to(acc), shift, scale)
    folded = weight.to(acc) * scale.view([-1] + [1] * (weight.dim() - 1))
    return folded.to(dtype), shift.to(dtype)


_unseen_steps = 0
_watching = False


def unseen_steps() -> int:
    """How often an optimizer has written to parameters behind their version counters."""
    return _unseen_steps


def _count_unseen_step() -> None:
    global _unseen_steps
    _unseen_steps += 1


# What torch.compiler.disable sets; calling that would import all of torch._dynamo.
setattr(_count_unseen_step, "_torchdynamo_disable", True)  # noqa: B010


def _after_optimizer_step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    """Count the steps that version counters do not show: torch's with fused=True, and kernels of other packages."""
    seen = torch.compiler.is_compiling() or type(optimizer).__module__.startswith("torch.optim.")
    if not seen or any(group.get("fused") for group in optimizer.param_groups):
        _count_unseen_step()


class FoldCache:
    """One unit's folded and packed inference weights, valid while no tensor that they come from has changed.

    Change is seen by storage, shape, strides, version counter, and the steps of optimizers that bypass the counter:
    every in-place write through torch counts, a write through `.data`, a raw pointer or by another process does not
    (call `fused_resnet.refresh`). The cache is in no state dict, pickle or copy.
    """

    __slots__ = ("_entry",)

    def __init__(self) -> None:
        self._entry: tuple[Any, ...] | None = None

    def clear(self) -> None:
        self._entry = None

    def get(self, tensors: tuple[Tensor | None, ...], key: tuple[Any, ...]) -> Any:
        """The value put for these tensors and this key, or None."""
        entry = self._entry
        if entry is None or entry[0] != key or entry[3] != _unseen_steps:
            return None
        for tensor, alias, version in zip(tensors, entry[1], entry[2], strict=True):
            if tensor is None or alias is None:
                if tensor is not alias:
                    return None
            elif not tensor.is_set_to(alias) or tensor._version != version or tensor.dtype != alias.dtype:
                return None
        return entry[4]

    @staticmethod
    def stamp(tensors: tuple[Tensor | None, ...]) -> tuple[Any, ...] | None:
        """The present state of the tensors, to be taken before the value is made of them; see `put`.

        None for inference tensors, which carry no version counter: nothing made of them is kept.
        """
        global _watching
        if any(t is not None and t.is_inference() for t in tensors):
            return None
        if not _watching:
            register_optimizer_step_post_hook(_after_optimizer_step)
            _watching = True
        # The aliases keep each storage alive, so that its address cannot be given to another tensor meanwhile.
        aliases = tuple(None if t is None else t.detach() for t in tensors)
        return aliases, tuple(0 if t is None else t._version for t in tensors), _unseen_steps

    def put(self, stamp: tuple[Any, ...] | None, key: tuple[Any, ...], value: Any) -> None:
        """Keep `value`, made of tensors in the state `stamp`."""
        self._entry = None if stamp is None else (key, *stamp, value)

    def __deepcopy__(self, memo: dict[int, Any]) -> FoldCache:
        return FoldCache()

    def __reduce__(self) -> tuple[type[FoldCache], tuple[()]]:
        return FoldCache, ()
