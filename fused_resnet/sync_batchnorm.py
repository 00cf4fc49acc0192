"""Batch normalisation over the batches of all processes, in models of this package and in any other."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.fx import Proxy

from fused_resnet import batchnorm
from fused_resnet.ops.sync_bn_act import sync_bn_act


class SyncBatchNorm(nn.BatchNorm2d):
    """batch_norm(x) over the batches of all processes of a group; see `fused_resnet.convert_sync_batchnorm`.

    As torch.nn.SyncBatchNorm, on any device, and in our blocks with the residual and the ReLU fused. (No subclass of
    it: DistributedDataParallel refuses those on the CPU.)
    """

    process_group: Any = None

    @classmethod
    def of(cls, bn: nn.BatchNorm2d, process_group: Any = None) -> SyncBatchNorm:
        """What takes the place of `bn`: the same parameters, buffers, hooks and mode."""
        new = cls(0)
        new.__dict__.update(bn.__dict__)
        new.process_group = process_group
        return new

    def merges(self) -> bool:
        """Whether there are other processes to take statistics with, and batch statistics are taken."""
        return self.group() is not None

    def group(self) -> Any:
        """The processes to take statistics with; None where there are no others, or no batch statistics are taken."""
        if not (batchnorm.uses_batch_statistics(self) and dist.is_available() and dist.is_initialized()):
            return None
        group = dist.group.WORLD if self.process_group is None else self.process_group
        return group if dist.get_world_size(group) > 1 else None

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to the same shape."""
        if not isinstance(x, Proxy) and self.merges():
            self._check_input_dim(x)
            return self.bn_act(x, self.weight, self.bias)
        return super().forward(x)

    def bn_act(
        self,
        x: Tensor,
        gamma: Tensor | None,
        beta: Tensor | None,
        residual: Tensor | None = None,
        activation: str | None = None,
    ) -> Tensor:
        """activation(batch_norm(x) + residual) with the statistics of all processes."""
        return sync_bn_act(
            x,
            gamma,
            beta,
            *batchnorm.running(self),
            residual,
            momentum=batchnorm.batch_momentum(self),
            eps=self.eps,
            activation=activation,
            process_group=self.process_group,
        )


def convert_sync_batchnorm(model: nn.Module, process_group: Any = None) -> nn.Module:
    """Let every batch norm of the model take its statistics over the batches of all processes of a group.

    As torch.nn.SyncBatchNorm.convert_sync_batchnorm, with normalisation, residual and ReLU fused where the model's
    blocks are ours. Parameters, buffers, hooks and state-dict keys stay; inference stays fused. On one process, or
    before torch.distributed is initialised, it computes what nn.BatchNorm2d does.

    Args:
        model: any module; changed in place, but for a model that is itself a batch norm. BN of other types (a subclass
            of nn.BatchNorm2d, nn.BatchNorm1d, ...) is left to torch's own conversion, whose modules run unfused.
        process_group: of torch.distributed; None is the default group.

    Returns:
        The model, or its replacement where it is itself a batch norm.
    """
    if type(model) is nn.BatchNorm2d:
        return SyncBatchNorm.of(model, process_group)
    for name, child in model.named_children():
        setattr(model, name, convert_sync_batchnorm(child, process_group))
    if isinstance(model, nn.modules.batchnorm._BatchNorm) and not isinstance(model, (SyncBatchNorm, nn.SyncBatchNorm)):
        return nn.SyncBatchNorm.convert_sync_batchnorm(model, process_group)
    return model
