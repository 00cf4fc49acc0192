"""A block's convolutions, called at once while nothing that they were made of has changed.

Looking at every module, hook and tensor of a unit takes as long as a small convolution. What one call found is kept,
with all that it depends on; the next call compares that as a whole.
"""

from __future__ import annotations

from operator import is_
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fused_resnet import dispatch, emulation, folding
from fused_resnet.modules import HOOKS, Call, call_reason
from fused_resnet.ops.checks import is_autocast, is_channels_last


class Watch:
    """All that the modules below and including `root` are made of: attributes, children, hooks (not root's own, which
    see no more than its input and output), and the tensors with their versions."""

    __slots__ = ("_attributes", "_hooks", "_members", "_steps", "_tensors")

    def __init__(self, root: nn.Module) -> None:
        states = [module.__dict__ for module in root.modules()]
        self._attributes = [(state, state.copy()) for state in states]
        self._hooks = [state[hooks] for state in states if state is not root.__dict__ for hooks in HOOKS]
        owners = [state[name] for state in states for name in ("_parameters", "_buffers", "_modules")]
        self._members = [(owner, tuple(owner.values())) for owner in owners]
        self._tensors = [
            (t, t.detach(), -1 if t.is_inference() else t._version)
            for _, values in self._members
            for t in values
            if isinstance(t, Tensor)
        ]
        self._steps = folding.unseen_steps()

    def sees_writes(self) -> bool:
        """Whether each tensor counts what is written to it, which those made in inference mode do not."""
        return all(version >= 0 for _, _, version in self._tensors)

    def holds(self) -> bool:
        """Whether nothing has changed. In-place writes are seen as `FoldCache` sees them."""
        if any(self._hooks) or self._steps != folding.unseen_steps():
            return False
        for owner, members in self._members:
            if len(owner) != len(members) or not all(map(is_, owner.values(), members)):
                return False
        for tensor, alias, version in self._tensors:
            if tensor._version != version or not tensor.is_set_to(alias) or tensor.dtype != alias.dtype:
                return False
        try:
            return all(state == was for state, was in self._attributes)
        except RuntimeError:  # a tensor as an attribute, replaced by another
            return False


def situation(x: Tensor) -> tuple[Any, ...] | None:
    """What around a call decides how it is served; None where calls are not to be kept."""
    if type(x) is not Tensor or torch.is_grad_enabled() or torch.compiler.is_compiling() or call_reason() is not None:
        return None
    if dispatch.recorded or is_autocast(x) or not is_channels_last(x):
        return None
    return x.shape, x.dtype, x.device, dispatch.requested(), torch._C._get_mkldnn_enabled()


class InferencePlan(NamedTuple):
    """The calls of a residual block: those in a row, and the projection's or None."""

    situation: tuple[Any, ...]
    watch: Watch
    calls: tuple[Call, ...]
    projection: Call | None

    def run(self, x: Tensor, overwrite: bool) -> Tensor:
        """The block's output; with `overwrite` it may be written over x."""
        dtype = x.dtype
        in_float32 = dispatch.in_float32(dtype, x.device.type)
        if in_float32:  # which all calls then keep
            x, overwrite = emulation.wide(x), True
        shortcut = x
        if self.projection is not None:
            shortcut, overwrite = self.projection(x, None, False), True
        *first, last = self.calls
        for call in first:
            x = call(x, None, False)
        x = last(x, shortcut, overwrite)
        return emulation.narrow(x, dtype) if in_float32 else x


class PlanCache:
    """A block's plan for the last situation. In no state dict, pickle or copy."""

    __slots__ = ("_plan",)

    def __init__(self) -> None:
        self._plan: InferencePlan | None = None

    def get(self, x: Tensor) -> tuple[InferencePlan | None, tuple[Any, ...] | None]:
        """(the plan that serves x or None, the situation to put one for or None)."""
        now, plan = situation(x), self._plan
        if plan is not None and now == plan.situation and plan.watch.holds():
            return plan, now
        return None, now

    def put(self, plan: InferencePlan) -> None:
        self._plan = plan

    def clear(self) -> None:
        self._plan = None

    def __deepcopy__(self, memo: dict[int, Any]) -> PlanCache:
        return PlanCache()

    def __reduce__(self) -> tuple[type[PlanCache], tuple[()]]:
        return PlanCache, ()
