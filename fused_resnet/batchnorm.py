"""What an nn.BatchNorm2d hands to its op at a call: vectors, momentum, whose statistics."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fused_resnet import foreach
from fused_resnet.folding import accumulate_dtype


def affine(bn: nn.BatchNorm2d, scale: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """BN's gamma and beta, times a residual branch's scale: scale * bn(y) is a BN itself, so kernels need not know."""
    if scale is None:
        return bn.weight, bn.bias
    gamma = scale.repeat(bn.num_features) if bn.weight is None else bn.weight * scale
    return gamma, None if bn.bias is None else bn.bias * scale


def batch_momentum(bn: nn.BatchNorm2d) -> float | Tensor:
    """Count the batch as nn.BatchNorm2d does; the weight of its statistics, on the device where it is an average."""
    if bn.training and bn.track_running_stats and bn.num_batches_tracked is not None:
        if bn.momentum is not None:
            foreach.count(bn.num_batches_tracked)
        else:
            foreach.count_now(bn.num_batches_tracked)
            dtype = torch.float32 if bn.running_mean is None else accumulate_dtype(bn.running_mean.dtype)
            return bn.num_batches_tracked.to(dtype).reciprocal()
    return 0.0 if bn.momentum is None else bn.momentum


def uses_batch_statistics(bn: nn.BatchNorm2d) -> bool:
    return bn.training or (bn.running_mean is None and bn.running_var is None)


def running(bn: nn.BatchNorm2d) -> tuple[Tensor | None, Tensor | None]:
    """The running statistics as nn.BatchNorm2d hands them on: not where it trains without tracking."""
    return (bn.running_mean, bn.running_var) if not bn.training or bn.track_running_stats else (None, None)


def fits(bn: nn.BatchNorm2d, weight: Tensor) -> bool:
    """Whether BN's vectors are of the size and of a type that go with a conv's weight; where not, ops refuse them."""
    shape, dtypes = weight.shape[:1], (weight.dtype, torch.float32 if weight.dtype.itemsize == 2 else weight.dtype)
    vectors = (bn.weight, bn.bias, bn.running_mean, bn.running_var)
    return all(v is None or (v.shape == shape and v.dtype in dtypes) for v in vectors)
