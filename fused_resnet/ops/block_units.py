"""What both ways of running a residual block share: its units and plan, what is kept of them, and the Gram form.

Gram form of y = W a, a 1x1 conv that does not narrow: its batch statistics follow, before the conv runs, from the mean
mu and the second moments K = sum (a - mu)(a - mu)^T of its narrow input: m = W mu, var = rowsum((W K) * W) / M. So
conv, BN, shortcut and ReLU are one convolution with folded weights, in training too, and y never exists.

Backward, with g = dL/dout * (out > 0), r = 1 / sqrt(var + eps), A = gamma r, rows of W the outputs:

    Q = g^T a     S1 = sum(g) = dbeta     S2 = r (rowsum(Q * W) - m S1) = dgamma     B = -A r S2 / M
    H = W^T diag(B) W       e = B (W mu - m) - A S1 / M
    dW = A Q + B (W K) + n e mu^T         da = g (diag(A) W) + (a - mu) H + e W

Across processes (`Unit.group`) m, var, M, and S1 and S2 in B and e are those of all, merged as `sync_bn_act` does; a,
g, mu, K, Q, the n rows, dgamma and dbeta stay this process's own (alone, n = M and W mu = m). Both forms thus exchange
the same numbers, and each process is free to choose. With given statistics (eval, frozen) B = e = 0.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused_resnet.folding import accumulate_dtype, fold
from fused_resnet.ops.sync_bn_act import mean_gradients, merge_statistics


class Unit(NamedTuple):
    """A bias-free conv and its BN. `training`: normalise with batch statistics, else with the running ones; `group`:
    with those of all processes of a group of torch.distributed."""

    weight: Tensor
    gamma: Tensor | None
    beta: Tensor | None
    running_mean: Tensor | None
    running_var: Tensor | None
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    momentum: float | Tensor = 0.1
    eps: float = 1e-5
    training: bool = True
    group: Any = None

    @property
    def geometry(self) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int], int]:
        return self.stride, self.padding, self.dilation, self.groups


class Plan(NamedTuple):
    """How a block runs: Gram form (else stored output) for the last conv and for the projection; what is kept for
    backward ("balanced", raw conv outputs; "low", none of them, they are computed again); and whether the convs read
    raw outputs through a prologue, or rectified ones that are formed before."""

    gram: bool
    gram_projection: bool
    memory: str = "balanced"
    prologue: bool = False


class Spec(NamedTuple):
    """A block: its units (the projection last), how it runs, and the backend that was asked for."""

    units: tuple[Unit, ...]
    projected: bool
    plan: Plan
    backend: str

    def split(self, values: Any) -> tuple[Any, Any]:
        """(the main path's, the projection's or None) of one value per unit."""
        return (values[:-1], values[-1]) if self.projected else (values, None)


class State(NamedTuple):
    """What backward knows of one unit: its raw output (None in Gram form) and the statistics it was normalised with,
    of `count` values per channel; in Gram form also the mean and the second moments of the unit's input, and how far
    the mean of this process's outputs is from `mean`."""

    y: Any
    mean: Tensor
    var: Tensor
    count: Any = None
    mu: Any = None
    moments: Any = None
    offset: Any = None


_CANCELLED = 1e-3


def gram_state(unit: Unit, mu: Tensor, moments: Tensor, count: int) -> State | None:
    """The state of a unit whose input has these moments over `count` rows; updates the running statistics.

    None where the variances would lose their digits (rows of W nearly in the null space of K), checked on the CPU.
    """
    weight = unit.weight.flatten(1).to(moments.dtype)
    own, var = weight @ mu, ((weight @ moments) * weight).sum(1).div_(count).clamp_(min=0)
    if mu.device.type == "cpu":
        magnitude = (weight.abs() @ moments.diagonal().clamp(min=0).sqrt()).square_().div_(count)
        lost = magnitude.mul_(torch.finfo(weight.dtype).eps) > _CANCELLED * (var + unit.eps)
        if bool(lost.any()):
            return None
    running = (unit.running_mean, unit.running_var)
    mean, var, total = merge_statistics(own, var, count, *running, unit.momentum, unit.group)
    return State(None, mean, var, total, mu, moments, own - mean)


def given_state(unit: Unit) -> State:
    """The state of a unit that is normalised with its running statistics."""
    return State(None, unit.running_mean, unit.running_var)  # type: ignore[arg-type]


def gram_folded(unit: Unit, state: State) -> tuple[Tensor, Tensor]:
    """(weight, shift) of the one convolution that the conv and its BN are; the shift in the accumulation type."""
    acc = accumulate_dtype(unit.weight.dtype)
    folded, _ = fold(unit.weight, None, unit.gamma, unit.beta, state.mean, state.var, unit.eps)
    scale = bn_scale(unit, state.var.to(acc))
    if state.mu is None:
        shift = -scale * state.mean.to(acc)
    else:  # from the rounded weights, so that their rounding shifts no channel's mean
        shift = scale * state.offset - folded.flatten(1).to(acc) @ state.mu
    return folded, shift if unit.beta is None else shift + unit.beta


def bn_scale(unit: Unit, var: Tensor) -> Tensor:
    """gamma / sqrt(var + eps) in the type of `var`."""
    rstd = torch.rsqrt(var + unit.eps)
    return rstd if unit.gamma is None else rstd * unit.gamma.to(var.dtype)


class GramGradients(NamedTuple):
    """Of a unit in Gram form, and what its input's gradient is made of: da = g scaled + a square + shift."""

    weight: Tensor
    gamma: Tensor
    beta: Tensor
    scaled: Tensor
    square: Tensor | None
    shift: Tensor | None


def gram_gradients(q: Tensor, s1: Tensor, rows: int, unit: Unit, state: State) -> GramGradients:
    """From Q = g^T a and S1 = sum(g) over this process's rows; everything in the accumulation type."""
    acc = q.dtype
    weight = unit.weight.flatten(1).to(acc)
    mean, var = state.mean.to(acc), state.var.to(acc)
    rstd, scale = torch.rsqrt(var + unit.eps), bn_scale(unit, var)
    s2 = rstd * ((q * weight).sum(1) - mean * s1)
    scaled = scale[:, None] * weight
    dweight = scale[:, None] * q
    if not unit.training:
        return GramGradients(dweight.view_as(unit.weight), s2, s1, scaled, None, None)
    mean_g, mean_gx = mean_gradients(s1, s2, state.count, unit.group)
    slope = -scale * rstd * mean_gx  # B
    rest = slope * state.offset - scale * mean_g  # e
    dweight.addcmul_(slope[:, None], weight @ state.moments).addr_(rows * rest, state.mu)
    square = weight.t() @ (slope[:, None] * weight)
    return GramGradients(dweight.view_as(unit.weight), s2, s1, scaled, square, rest @ weight - state.mu @ square)


def as_gradient(value: Tensor, parameter: Tensor) -> Tensor:
    """The value in the parameter's dtype and strides, which DistributedDataParallel compares (1x1 weights in
    channels_last have the memory of NCHW ones, but other strides)."""
    value = value.to(parameter.dtype)
    if value.stride() == parameter.stride():
        return value
    if value.shape[2:] == (1, 1) and value.is_contiguous() and parameter.is_contiguous():
        return value.as_strided(parameter.shape, parameter.stride())
    return torch.empty_like(parameter).copy_(value)
