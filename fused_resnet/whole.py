"""Residual blocks as one op in training: whether the modules and tensors at hand allow it, and the call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from fused_resnet import batchnorm, dispatch, foreach
from fused_resnet.modules import call_reason, has_pairs
from fused_resnet.ops.checks import autocast_dtype, is_channels_last, is_traced, needs_grad
from fused_resnet.ops.residual_block import Plan, Unit, residual_block
from fused_resnet.plans import plan_block
from fused_resnet.sync_batchnorm import SyncBatchNorm


class Part(NamedTuple):
    """A conv and its batch norm, which `scale` (one element) multiplies; `frozen`: it never takes batch statistics."""

    conv: nn.Conv2d
    bn: Any
    scale: Tensor | None = None
    frozen: bool = False

    @property
    def group(self) -> Any:
        """The processes whose batches this batch norm merges, or None."""
        return self.bn.group() if isinstance(self.bn, SyncBatchNorm) else None

    def unit(self) -> Unit:
        """What the op takes; counts the batch, so to be asked for once per call."""
        conv, bn = self.conv, self.bn
        running_mean, running_var = (bn.running_mean, bn.running_var) if self.frozen else batchnorm.running(bn)
        gamma, beta = batchnorm.affine(bn, self.scale)
        stride, padding, dilation = cast("Any", (conv.stride, conv.padding, conv.dilation))
        return Unit(
            weight=conv.weight,
            gamma=gamma,
            beta=beta,
            running_mean=running_mean,
            running_var=running_var,
            stride=stride,
            padding=padding,
            dilation=dilation,
            groups=conv.groups,
            momentum=0.0 if self.frozen else batchnorm.batch_momentum(bn),
            eps=bn.eps,
            training=not self.frozen and batchnorm.uses_batch_statistics(bn),
            group=self.group,
        )


def may_be_whole(x: Tensor, memory: str) -> bool:
    """Whether there is a question at all: what a call looks like before any module is looked at."""
    if memory == "fast" or not torch.is_grad_enabled() or is_traced(x) or call_reason() is not None:
        return False
    return is_channels_last(x) or not x.numel()  # an empty tensor has lost its layout


def plan_whole(x: Tensor, row: Sequence[Part], projection: Part | None, memory: str) -> Plan | None:
    """How a block runs as one op: where gradients are taken of channels_last tensors, and nothing is odd.

    Where batch norms merge processes these must agree, for DistributedDataParallel's collectives lie between the
    units' own: nothing here may depend on a batch's size then.
    """
    parts = row if projection is None else (*row, projection)
    merged = any(part.group is not None for part in parts)
    if not (is_channels_last(x) or (merged and not x.numel() and dispatch.prefers_channels_last(x))):
        return None
    if not dispatch.is_fused("bn_act", x.device.type):
        return None
    if not needs_grad(x, *(t for p in parts for t in (p.conv.weight, p.bn.weight, p.bn.bias, p.scale))):
        return None
    dtype = x.dtype if autocast_dtype(x) is None else row[0].conv.weight.dtype
    for conv, bn, *_ in parts:
        if conv.bias is not None or conv.weight.dtype != dtype or conv.weight.device != x.device:
            return None
        if not (has_pairs(conv) and batchnorm.fits(bn, conv.weight)):
            return None
    beside = None if projection is None else projection.conv
    return plan_block(x, [part.conv for part in row], beside, memory, merged)


def run_whole(x: Tensor, row: Sequence[Part], projection: Part | None, plan: Plan) -> Tensor:
    """relu(f(x) + shortcut), f the row; by a plan of `plan_whole`."""
    with foreach.counting():
        units = tuple(part.unit() for part in row)
        beside = None if projection is None else projection.unit()
    return residual_block(x, units, beside, plan)
