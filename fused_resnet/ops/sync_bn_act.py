"""act(batch_norm(x) + residual) with the statistics of all processes: nn.SyncBatchNorm with residual and ReLU fused.

Formulas as `bn_act`, their sums taken over all processes: one collective forward (`merge_statistics`), one backward
(`mean_gradients`). How a process comes by its own part does not matter to the others."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from fused_resnet import dispatch
from fused_resnet.folding import accumulate_dtype, update_running_stats
from fused_resnet.ops.add_relu import add_relu
from fused_resnet.ops.checks import (
    as_layout,
    check_activation,
    check_batch_statistics,
    check_channels,
    check_input,
    check_momentum,
    check_shape,
    dense,
    is_autocast,
)


def sync_bn_act(
    x: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    residual: Tensor | None = None,
    *,
    momentum: float | Tensor = 0.1,
    eps: float = 1e-5,
    activation: str | None = "relu",
    process_group: Any = None,
) -> Tensor:
    """activation(batch_norm(x) + residual), normalised over the batches of all processes of a group.

    Every process of the group must make the call, forward and backward; batches may differ in size, an empty one is
    allowed. As in torch.nn.SyncBatchNorm the gradients of gamma and beta are those of this process's part: data
    parallelism sums or averages them. Under torch.compile the call stays outside the graph.

    Args:
        x: (N, C, ...), at least 2-d; float16, bfloat16, float32 or float64; NCHW or channels_last, any strides.
        gamma, beta, running_mean, running_var, residual, momentum, eps, activation: as `bn_act` in training.
        process_group: of torch.distributed; None is the default group.

    Returns:
        A tensor of x's shape and dtype, channels_last where x is.

    Raises:
        ValueError, TypeError: as `bn_act`. RuntimeError: torch.distributed is not initialised, or a process is gone.
    """
    check_activation("sync_bn_act", activation)
    check_input("sync_bn_act", "x", x)
    if x.dim() < 2:
        raise ValueError(f"sync_bn_act: x must be (N, C, ...), at least 2-d, got shape {tuple(x.shape)}")
    vectors = (("gamma", gamma), ("beta", beta), ("running_mean", running_mean), ("running_var", running_var))
    check_channels("sync_bn_act", x, x.shape[1], vectors)
    check_momentum("sync_bn_act", momentum, x)
    check_batch_statistics(x.shape, eps, merged=True)
    if not (dist.is_available() and dist.is_initialized()):
        raise RuntimeError("sync_bn_act: torch.distributed is not initialised: call init_process_group, or use bn_act")
    running = (running_mean, running_var)
    group = dist.group.WORLD if process_group is None else process_group
    options = (momentum, eps, activation, group, dispatch.requested())
    if residual is not None:
        if isinstance(residual, Tensor) and residual.dtype != x.dtype and is_autocast(x):  # eager's promotion
            y = _synchronised(x, gamma, beta, None, *running, momentum, eps, None, *options[3:])
            return add_relu(y, residual) if activation == "relu" else y + residual
        check_input("sync_bn_act", "residual", residual, like=x)
        check_shape("sync_bn_act", "residual", residual, x.shape)
    return _synchronised(x, gamma, beta, residual, *running, *options)


def _synchronised(*args: Any) -> Tensor:
    return SyncBNActFunction.apply(*args)


# What torch.compiler.disable sets; calling that would import all of torch._dynamo.
setattr(_synchronised, "_torchdynamo_disable", True)  # noqa: B010


def local_statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of the channels of x, zeros where it is empty, in the accumulation type."""
    if not x.numel():
        zeros = x.new_zeros(x.shape[1], dtype=accumulate_dtype(x.dtype))
        return zeros, zeros
    if not x.is_cuda:  # where torch's function keeps them in x's own type
        x = x.to(accumulate_dtype(x.dtype))
    return torch.batch_norm_update_stats(x, None, None, 0.0)


def merge_statistics(
    mean: Tensor,
    var: Tensor,
    count: int,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    momentum: float | Tensor,
    group: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """(mean, biased variance, count) over the processes of a group, of this one's over `count` values per channel.

    Chan et al. 1979, in float64 and in the order of the ranks. Updates the running statistics. Group None: no others.
    """
    if group is None:
        update_running_stats(running_mean, running_var, mean, var, momentum, count)
        return mean, var, mean.new_full((), count, dtype=torch.float64)
    channels = mean.numel()
    packed = torch.cat([mean.double(), var.double() * count, mean.new_full((1,), count, dtype=torch.float64)])
    gathered = packed.new_empty(dist.get_world_size(group), packed.numel())
    dist.all_gather(list(gathered.unbind()), packed, group=group)
    means, m2, counts = gathered[:, :channels], gathered[:, channels:-1], gathered[:, -1:]
    total = counts.sum()
    merged = (counts * means).sum(0) / total
    m2 = (m2 + counts * (means - merged).square()).sum(0)
    merged, biased, unbiased = (t.to(mean.dtype) for t in (merged, m2 / total, m2 / (total - 1).clamp(min=1)))
    update_running_stats(running_mean, running_var, merged, unbiased, momentum, 1)  # count 1: the variance as it is
    return merged, biased, total


def mean_gradients(s1: Tensor, s2: Tensor, count: Tensor, group: Any) -> tuple[Tensor, Tensor]:
    """(S1 / M, S2 / M) over the processes of a group, of this one's sums S1 of g and S2 of g xhat. Group None: no
    others."""
    sums = torch.stack([s1, s2]).double()
    if group is not None:
        dist.all_reduce(sums, group=group)
    mean_g, mean_gx = (sums / count).to(s1.dtype)
    return mean_g, mean_gx


def sync_bn_act_forward(
    x: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    residual: Tensor | None,
    momentum: float | Tensor,
    eps: float,
    activation: str | None,
    group: Any,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`bn_act_train_forward` with the statistics of a group: (out, mean, var, count)."""
    rows = x.shape[0] * math.prod(x.shape[2:])
    mean, var, count = merge_statistics(*local_statistics(x), rows, running_mean, running_var, momentum, group)
    if not x.numel():
        return torch.empty_like(x), mean, var, count
    args = (gamma, beta, mean, var, residual, eps, activation)
    return dispatch.call("bn_act_eval_forward", x, *args, backend=backend), mean, var, count


def sync_bn_act_backward(
    grad: Tensor,
    x: Tensor,
    out: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    mean: Tensor,
    var: Tensor,
    count: Tensor,
    eps: float,
    activation: str | None,
    has_residual: bool,
    group: Any,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """`bn_act_backward` with the sums of a group in grad_x; grad_gamma and grad_beta are this process's part.

    grad_x = s g - s S1/M - s xhat S2/M: the first term and this process's sums are the backward pass for given
    statistics, the rest is one more affine pass over x.
    """
    args = (x, out, gamma, beta, mean, var, eps, activation, False, has_residual)
    grad_x, s2, s1, grad_residual = dispatch.call("bn_act_backward", grad, *args, backend=backend)
    mean_g, mean_gx = mean_gradients(s1, s2, count, group)
    if x.numel():
        scale = torch.rsqrt(var + eps) if gamma is None else torch.rsqrt(var + eps) * gamma
        rest = (-scale * mean_gx, -scale * mean_g, mean, var, grad_x, eps, None)
        grad_x = dispatch.call("bn_act_eval_forward", x, *rest, backend=backend)
    return grad_x, s2, s1, grad_residual


class SyncBNActFunction(torch.autograd.Function):
    """Saves what `BNActFunction` saves, and the number of values per channel over all processes."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        gamma: Tensor | None,
        beta: Tensor | None,
        residual: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        momentum: float | Tensor,
        eps: float,
        activation: str | None,
        group: Any,
        backend: str,
    ) -> Tensor:
        x = dense(x)
        if residual is not None:
            residual = as_layout(residual, x)
        args = (gamma, beta, running_mean, running_var, residual, momentum, eps, activation, group, backend)
        out, mean, var, count = sync_bn_act_forward(x, *args)
        keep = out if activation == "relu" and residual is not None else None
        ctx.save_for_backward(x, keep, gamma, beta, mean, var, count)
        ctx.options = (eps, activation, residual is not None, group, backend)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        x, _, gamma, beta, *_ = saved
        grad_x, s2, s1, grad_residual = sync_bn_act_backward(as_layout(grad, x), *saved, *ctx.options)
        return (
            grad_x,
            None if gamma is None else s2.to(gamma.dtype),
            None if beta is None else s1.to(beta.dtype),
            grad_residual,
            *(None,) * 7,
        )
