"""Every registered op of `fused_resnet.ops.schemas` in ATen, for whatever knows no ops of ours."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload

from fused_resnet.backends import reference
from fused_resnet.folding import accumulate_dtype
from fused_resnet.ops import schemas  # noqa: F401  (registers the ops)

aten = torch.ops.aten
Activation = str | None
_POOL = ([3, 3], [2, 2], [1, 1])  # kernel, stride, padding


def _wide(vector: Tensor | None, x: Tensor) -> Tensor | None:
    return None if vector is None else vector.to(accumulate_dtype(x.dtype))


def _finish(y: Tensor, residual: Tensor | None, activation: Activation) -> Tensor:
    if residual is not None:
        y = y + residual
    return torch.relu(y) if activation == "relu" else y


def _add_relu(x: Tensor, residual: Tensor, backend: str) -> Tensor:
    return _finish(x, residual, "relu")


def _add_relu_backward(grad: Tensor, out: Tensor, backend: str) -> Tensor:
    return reference.add_relu_backward(grad, out)


def _bn_act_eval(
    x: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    mean: Tensor,
    var: Tensor,
    residual: Tensor | None,
    eps: float,
    activation: Activation,
    backend: str,
) -> Tensor:
    vectors = (_wide(vector, x) for vector in (gamma, beta, mean, var))
    y = aten._native_batch_norm_legit_no_training.default(x, *vectors, 0.0, eps)[0]
    return _finish(y, residual, activation)


def _bn_act_train(
    x: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    residual: Tensor | None,
    eps: float,
    activation: Activation,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    dims = [d for d in range(x.dim()) if d != 1]
    var, mean = torch.var_mean(x.to(accumulate_dtype(x.dtype)), dims, correction=0)
    gamma = (
        torch.ones_like(mean) if gamma is None else _wide(gamma, x)
    )  # with none, aten rounds statistics to x's dtype
    y = aten._native_batch_norm_legit.no_stats(x, gamma, _wide(beta, x), True, 0.0, eps)[0]  # differentiable
    return _finish(y, residual, activation), mean, var


def _bn_act_backward(
    grad: Tensor,
    x: Tensor,
    out: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    mean: Tensor,
    var: Tensor,
    eps: float,
    activation: Activation,
    training: bool,
    has_residual: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grad_x, grad_gamma, grad_beta, grad_residual = reference.bn_act_backward(
        grad, x, out, gamma, beta, mean, var, eps, activation, training, has_residual
    )
    if grad_residual is None or activation is None:  # as the op: the caller uses `grad` itself
        grad_residual = grad.new_empty(0)
    return grad_x, grad_gamma, grad_beta, grad_residual


def _pool(y: Tensor, with_offsets: bool) -> tuple[Tensor, Tensor]:
    out, indices = aten.max_pool2d_with_indices.default(y, *_POOL)
    return out, reference.pool_offsets(indices, y.shape[3]) if with_offsets else y.new_empty(0, dtype=torch.uint8)


def _bn_act_pool_eval(
    x: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    mean: Tensor,
    var: Tensor,
    eps: float,
    activation: Activation,
    with_offsets: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    return _pool(_bn_act_eval(x, gamma, beta, mean, var, None, eps, activation, backend), with_offsets)


def _bn_act_pool_train(
    x: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    eps: float,
    activation: Activation,
    with_offsets: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    y, mean, var = _bn_act_train(x, gamma, beta, None, eps, activation, backend)
    return *_pool(y, with_offsets), mean, var


def _bn_act_pool_backward(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    return reference.bn_act_pool_backward(*args[:-1])


def _conv_bias_act(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    activation: Activation,
    backend: str,
) -> Tensor:
    y = aten.convolution.default(x, weight, bias, stride, padding, dilation, False, [0, 0], groups)
    return _finish(y, residual, activation)


def _conv_bn_act(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    mean: Tensor,
    var: Tensor,
    residual: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    eps: float,
    activation: Activation,
    backend: str,
) -> Tensor:
    y = _conv_bias_act(x, weight, bias, None, stride, padding, dilation, groups, None, backend)
    return _bn_act_eval(y, gamma, beta, mean, var, residual, eps, activation, backend)


_ops = torch.ops.fused_resnet
# For `torch.export.ExportedProgram.run_decompositions`, alone or merged into `torch.export.default_decompositions()`:
# each formula is that of `fused_resnet.backends.reference` without writes in place. The backend asked for is ignored.
DECOMPOSITIONS: dict[OpOverload, Callable[..., Any]] = {
    _ops.add_relu.default: _add_relu,
    _ops.add_relu_backward.default: _add_relu_backward,
    _ops.bn_act_train.default: _bn_act_train,
    _ops.bn_act_eval.default: _bn_act_eval,
    _ops.bn_act_backward.default: _bn_act_backward,
    _ops.bn_act_pool_train.default: _bn_act_pool_train,
    _ops.bn_act_pool_eval.default: _bn_act_pool_eval,
    _ops.bn_act_pool_backward.default: _bn_act_pool_backward,
    _ops.conv_bias_act.default: _conv_bias_act,
    _ops.conv_bn_act.default: _conv_bn_act,
}
