"""Batch normalisation over the batches of all processes, in models of this package and in any other."""

from __future__ import annotations

from typing import Any

from torch import nn

from fused_resnet.modules import SyncBatchNorm


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
