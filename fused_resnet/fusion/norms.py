"""The batch norms that fusion knows: what of them an op needs, whoever wrote the class."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor, nn

from fused_resnet import batchnorm
from fused_resnet.fusion.guards import has_hooks, origin_of

_TORCH = {nn.BatchNorm1d: (2, 3), nn.BatchNorm2d: (4,), nn.BatchNorm3d: (5,)}
# Fixed statistics and parameters, all of them buffers: (x - mean) / sqrt(var + eps) * weight + bias.
_FROZEN = {("torchvision.ops.misc", "FrozenBatchNorm2d"), ("timm.layers.norm_act", "FrozenBatchNormAct2d")}
# A batch norm with a `drop` and an `act` behind it.
_WITH_ACT = {("timm.layers.norm_act", "BatchNormAct2d"), ("timm.layers.norm_act", "FrozenBatchNormAct2d")}
_VECTORS = ("weight", "bias", "running_mean", "running_var")


class Norm(NamedTuple):
    """A kind of batch norm: the input's dimensions, whether it never trains, whether an activation belongs to it."""

    dims: tuple[int, ...]
    frozen: bool = False
    with_act: bool = False


def norm_kind(module: nn.Module) -> Norm | None:
    """What kind of batch norm the module is, by its exact class; None for anything else."""
    kind = type(module)
    if kind in _TORCH:
        return Norm(_TORCH[kind])
    name = (kind.__module__, kind.__name__)
    if name in _FROZEN or name in _WITH_ACT:
        return Norm((4,), name in _FROZEN, name in _WITH_ACT)
    return None


def looks_like_norm(module: nn.Module) -> bool:
    """Whether the report owes a line to this module: a batch norm of any class, its subclasses and wrappers too."""
    if isinstance(module, nn.modules.batchnorm._BatchNorm) or norm_kind(module) is not None:
        return True
    return "BatchNorm" in origin_of(type(module)).__name__ and hasattr(module, "running_var")


def own_act(norm: nn.Module) -> str | None:
    """What follows in a norm with a `drop` and an `act`: "relu", "none", or "other", which is called as it is; None
    where one of the two is hooked, replaced or gone."""
    act, drop = norm._modules.get("act"), norm._modules.get("drop")
    for part in (act, drop):
        if part is None or has_hooks(part) or "forward" in part.__dict__:
            return None
    if type(drop) is not nn.Identity or type(act) not in (nn.ReLU, nn.Identity):
        return "other"
    return "relu" if type(act) is nn.ReLU else "none"


def vectors(norm: Any) -> tuple[Tensor | None, ...]:
    """(gamma, beta, running mean, running variance) as they stand on the module."""
    return norm.weight, norm.bias, norm.running_mean, norm.running_var


def trains(norm: Any, kind: Norm) -> bool:
    """Whether it normalises with the batch's own statistics now."""
    return not kind.frozen and batchnorm.uses_batch_statistics(norm)


def running(norm: Any, kind: Norm) -> tuple[Tensor | None, Tensor | None]:
    return (norm.running_mean, norm.running_var) if kind.frozen else batchnorm.running(norm)


def momentum(norm: Any, kind: Norm) -> Any:
    """Counts the batch where the norm would: to be asked for once per call."""
    return 0.0 if kind.frozen else batchnorm.batch_momentum(norm)
