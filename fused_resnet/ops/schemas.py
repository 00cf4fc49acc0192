"""The ops as torch.library sees them: schema, implementation, fake and autograd formula, each once, for every device.

They are functional (running statistics are updated outside), so torch.compile and torch.export can hold them without
a graph break. Eager mode calls the autograd Functions directly, which costs less. The last argument is the backend
asked for when the graph was traced.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fused_resnet import dispatch
from fused_resnet.folding import accumulate_dtype
from fused_resnet.ops.checks import as_layout, dense
from fused_resnet.ops.conv_bias_act import conv_layout

_CONV = "SymInt[2] stride, SymInt[2] padding, SymInt[2] dilation, SymInt groups"
_VECTORS = "Tensor? gamma, Tensor? beta"
_SCHEMAS = (
    "add_relu(Tensor x, Tensor residual, str backend) -> Tensor",
    "add_relu_backward(Tensor grad, Tensor out, str backend) -> Tensor",
    f"bn_act_train(Tensor x, {_VECTORS}, Tensor? residual, float eps, str? activation, str backend)"
    " -> (Tensor out, Tensor mean, Tensor var)",
    f"bn_act_eval(Tensor x, {_VECTORS}, Tensor mean, Tensor var, Tensor? residual, float eps, str? activation,"
    " str backend) -> Tensor",
    f"bn_act_backward(Tensor grad, Tensor x, Tensor? out, {_VECTORS}, Tensor mean, Tensor var, float eps,"
    " str? activation, bool training, bool has_residual, str backend)"
    " -> (Tensor grad_x, Tensor grad_gamma, Tensor grad_beta, Tensor grad_residual)",
    f"bn_act_pool_train(Tensor x, {_VECTORS}, float eps, str? activation, bool with_offsets, str backend)"
    " -> (Tensor out, Tensor offsets, Tensor mean, Tensor var)",
    f"bn_act_pool_eval(Tensor x, {_VECTORS}, Tensor mean, Tensor var, float eps, str? activation, bool with_offsets,"
    " str backend) -> (Tensor out, Tensor offsets)",
    f"bn_act_pool_backward(Tensor grad, Tensor offsets, Tensor x, {_VECTORS}, Tensor mean, Tensor var, float eps,"
    " str? activation, bool training, str backend) -> (Tensor grad_x, Tensor grad_gamma, Tensor grad_beta)",
    f"conv_bias_act(Tensor x, Tensor weight, Tensor? bias, Tensor? residual, {_CONV}, str? activation, str backend)"
    " -> Tensor",
    f"conv_bn_act(Tensor x, Tensor weight, Tensor? bias, {_VECTORS}, Tensor mean, Tensor var, Tensor? residual,"
    f" {_CONV}, float eps, str? activation, str backend) -> Tensor",
)

if "_library" in globals():  # importlib.reload: hand the old registrations back first
    globals()["_library"]._destroy()
_library = torch.library.Library("fused_resnet", "FRAGMENT")
for _schema in _SCHEMAS:
    _library.define(_schema, tags=(torch.Tag.needs_fixed_stride_order,))


def _register(name: str, impl: Any, fake: Any, setup_context: Any = None, backward: Any = None) -> None:
    qualified = f"fused_resnet::{name}"
    _library.impl(name, impl, "CompositeExplicitAutograd")
    torch.library.register_fake(qualified, fake, lib=_library)
    torch.library.register_autograd(
        qualified, backward or _not_differentiable(name), setup_context=setup_context, lib=_library
    )


def _not_differentiable(name: str) -> Any:
    def backward(ctx: Any, *grads: Any) -> Any:
        what = "differentiates once only" if name.endswith("_backward") else "is an inference op without a gradient"
        raise RuntimeError(f"fused_resnet::{name.removesuffix('_backward')} {what}")

    return backward


# add_relu


def _add_relu(x: Tensor, residual: Tensor, backend: str) -> Tensor:
    x = dense(x)
    return dispatch.call("add_relu_forward", x, as_layout(residual, x), backend=backend)


def _add_relu_backward(grad: Tensor, out: Tensor, backend: str) -> Tensor:
    return dispatch.call("add_relu_backward", as_layout(grad, out), out, backend=backend)


def _add_relu_setup(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(output)
    ctx.backend = inputs[-1]


def _add_relu_grad(ctx: Any, grad: Tensor) -> Any:
    (out,) = ctx.saved_tensors
    grad = torch.ops.fused_resnet.add_relu_backward.default(grad, out, ctx.backend)
    return grad, grad, None


_register("add_relu", _add_relu, lambda x, *_: torch.empty_like(dense(x)), _add_relu_setup, _add_relu_grad)
_register("add_relu_backward", _add_relu_backward, lambda grad, out, _: torch.empty_like(out))


# bn_act


def _bn_act_train(
    x: Tensor, gamma: Any, beta: Any, residual: Any, eps: float, activation: str | None, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    x = dense(x)
    residual = None if residual is None else as_layout(residual, x)
    return dispatch.call(
        "bn_act_train_forward", x, gamma, beta, None, None, residual, 0.0, eps, activation, backend=backend
    )


def _bn_act_train_fake(x: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    vector = x.new_empty(x.shape[1], dtype=accumulate_dtype(x.dtype))
    return torch.empty_like(dense(x)), vector, torch.empty_like(vector)


def _bn_act_train_setup(ctx: Any, inputs: Any, output: Any) -> None:
    x, gamma, beta, residual, eps, activation, backend = inputs
    out, mean, var = output
    _save(ctx, x, out, gamma, beta, mean, var, residual, eps, activation, True, backend)


def _bn_act_eval(
    x: Tensor,
    gamma: Any,
    beta: Any,
    mean: Tensor,
    var: Tensor,
    residual: Any,
    eps: float,
    activation: Any,
    backend: str,
) -> Tensor:
    x = dense(x)
    residual = None if residual is None else as_layout(residual, x)
    args = (gamma, beta, mean, var, residual, eps, activation)
    return dispatch.call("bn_act_eval_forward", x, *args, backend=backend)


def _bn_act_eval_setup(ctx: Any, inputs: Any, output: Any) -> None:
    x, gamma, beta, mean, var, residual, eps, activation, backend = inputs
    _save(ctx, x, output, gamma, beta, mean, var, residual, eps, activation, False, backend)


def _save(
    ctx: Any,
    x: Tensor,
    out: Tensor,
    gamma: Any,
    beta: Any,
    mean: Tensor,
    var: Tensor,
    residual: Any,
    eps: float,
    activation: Any,
    training: bool,
    backend: str,
) -> None:
    keep = out if activation == "relu" and residual is not None else None
    ctx.save_for_backward(x, keep, gamma, beta, mean, var)
    ctx.options = (eps, activation, training, residual is not None, backend)


def _bn_act_grad(ctx: Any, grad: Tensor) -> tuple[Any, Any, Any, Any]:
    x, out, gamma, beta, mean, var = ctx.saved_tensors
    grad_x, grad_gamma, grad_beta, grad_residual = torch.ops.fused_resnet.bn_act_backward.default(
        grad, x, out, gamma, beta, mean, var, *ctx.options
    )
    _, activation, _, has_residual, _ = ctx.options
    if has_residual:
        grad_residual = grad_residual if activation == "relu" else grad
    return (
        grad_x,
        None if gamma is None else grad_gamma.to(gamma.dtype),
        None if beta is None else grad_beta.to(beta.dtype),
        grad_residual if has_residual else None,
    )


def _bn_act_train_grad(ctx: Any, grad: Tensor, grad_mean: Any, grad_var: Any) -> Any:
    return *_bn_act_grad(ctx, grad), None, None, None


def _bn_act_eval_grad(ctx: Any, grad: Tensor) -> Any:
    grad_x, grad_gamma, grad_beta, grad_residual = _bn_act_grad(ctx, grad)
    return grad_x, grad_gamma, grad_beta, None, None, grad_residual, None, None, None


def _bn_act_backward(
    grad: Tensor,
    x: Tensor,
    out: Any,
    gamma: Any,
    beta: Any,
    mean: Tensor,
    var: Tensor,
    eps: float,
    activation: Any,
    training: bool,
    has_residual: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x = dense(x)
    out = None if out is None else as_layout(out, x)
    args = (as_layout(grad, x), x, out, gamma, beta, mean, var, eps, activation, training, has_residual)
    grad_x, grad_gamma, grad_beta, grad_residual = dispatch.call("bn_act_backward", *args, backend=backend)
    if not (has_residual and activation == "relu"):
        grad_residual = x.new_empty(0)  # the caller uses `grad`: an op must not return its input
    return grad_x, grad_gamma, grad_beta, grad_residual


def _bn_act_backward_fake(
    grad: Tensor,
    x: Tensor,
    out: Any,
    gamma: Any,
    beta: Any,
    mean: Tensor,
    var: Tensor,
    eps: float,
    activation: Any,
    training: bool,
    has_residual: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    like_x = torch.empty_like(dense(x))
    vector = x.new_empty(x.shape[1], dtype=accumulate_dtype(x.dtype))
    grad_residual = torch.empty_like(like_x) if has_residual and activation == "relu" else x.new_empty(0)
    return like_x, vector, torch.empty_like(vector), grad_residual


_register("bn_act_train", _bn_act_train, _bn_act_train_fake, _bn_act_train_setup, _bn_act_train_grad)
_register("bn_act_eval", _bn_act_eval, lambda x, *_: torch.empty_like(dense(x)), _bn_act_eval_setup, _bn_act_eval_grad)
_register("bn_act_backward", _bn_act_backward, _bn_act_backward_fake)


# bn_act_pool


def _pooled(x: Tensor, dtype: torch.dtype) -> Tensor:
    """An empty tensor of the pooled shape in the layout of x, which is dense."""
    form = torch.contiguous_format if x.is_contiguous() else torch.channels_last
    shape = (x.shape[0], x.shape[1], (x.shape[2] + 1) // 2, (x.shape[3] + 1) // 2)
    return torch.empty(shape, dtype=dtype, device=x.device, memory_format=form)


def _or_nothing(offsets: Tensor | None, x: Tensor) -> Tensor:
    return x.new_empty(0, dtype=torch.uint8) if offsets is None else offsets


def _bn_act_pool_train(
    x: Tensor, gamma: Any, beta: Any, eps: float, activation: Any, with_offsets: bool, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x = dense(x)
    args = (gamma, beta, None, None, 0.0, eps, activation, with_offsets)
    out, offsets, mean, var = dispatch.call("bn_act_pool_train_forward", x, *args, backend=backend)
    return out, _or_nothing(offsets, x), mean, var


def _bn_act_pool_eval(
    x: Tensor,
    gamma: Any,
    beta: Any,
    mean: Tensor,
    var: Tensor,
    eps: float,
    activation: Any,
    with_offsets: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    x = dense(x)
    args = (gamma, beta, mean, var, eps, activation, with_offsets)
    out, offsets = dispatch.call("bn_act_pool_eval_forward", x, *args, backend=backend)
    return out, _or_nothing(offsets, x)


def _bn_act_pool_fake(x: Tensor, with_offsets: bool) -> tuple[Tensor, Tensor]:
    x = dense(x)
    return _pooled(x, x.dtype), _or_nothing(_pooled(x, torch.uint8) if with_offsets else None, x)


def _bn_act_pool_train_fake(
    x: Tensor, gamma: Any, beta: Any, eps: float, activation: Any, with_offsets: bool, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    vector = x.new_empty(x.shape[1], dtype=accumulate_dtype(x.dtype))
    return *_bn_act_pool_fake(x, with_offsets), vector, torch.empty_like(vector)


def _bn_act_pool_train_setup(ctx: Any, inputs: Any, output: Any) -> None:
    x, gamma, beta, eps, activation, _, backend = inputs
    _, offsets, mean, var = output
    ctx.save_for_backward(offsets, x, gamma, beta, mean, var)
    ctx.options = (eps, activation, True, backend)


def _bn_act_pool_eval_setup(ctx: Any, inputs: Any, output: Any) -> None:
    x, gamma, beta, mean, var, eps, activation, _, backend = inputs
    ctx.save_for_backward(output[1], x, gamma, beta, mean, var)
    ctx.options = (eps, activation, False, backend)


def _bn_act_pool_grad(ctx: Any, grad: Tensor) -> tuple[Any, Any, Any]:
    offsets, x, gamma, beta, mean, var = ctx.saved_tensors
    grad_x, grad_gamma, grad_beta = torch.ops.fused_resnet.bn_act_pool_backward.default(
        grad, offsets, x, gamma, beta, mean, var, *ctx.options
    )
    return (
        grad_x,
        None if gamma is None else grad_gamma.to(gamma.dtype),
        None if beta is None else grad_beta.to(beta.dtype),
    )


def _bn_act_pool_backward(grad: Tensor, offsets: Tensor, x: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    *args, backend = args  # type: ignore[assignment]
    x = dense(x)
    offsets = offsets.contiguous(memory_format=torch.contiguous_format if x.is_contiguous() else torch.channels_last)
    return dispatch.call("bn_act_pool_backward", as_layout(grad, offsets), offsets, x, *args, backend=backend)


def _bn_act_pool_backward_fake(grad: Tensor, offsets: Tensor, x: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    vector = x.new_empty(x.shape[1], dtype=accumulate_dtype(x.dtype))
    return torch.empty_like(dense(x)), vector, torch.empty_like(vector)


_register(
    "bn_act_pool_train",
    _bn_act_pool_train,
    _bn_act_pool_train_fake,
    _bn_act_pool_train_setup,
    lambda ctx, grad, *_: (*_bn_act_pool_grad(ctx, grad), *(None,) * 4),
)
_register(
    "bn_act_pool_eval",
    _bn_act_pool_eval,
    lambda x, *args: _bn_act_pool_fake(x, args[-2]),
    _bn_act_pool_eval_setup,
    lambda ctx, grad, *_: (*_bn_act_pool_grad(ctx, grad), *(None,) * 6),
)
_register("bn_act_pool_backward", _bn_act_pool_backward, _bn_act_pool_backward_fake)


# conv_bias_act and conv_bn_act: inference


def _conv_fake(x: Tensor, weight: Tensor, conv: Any) -> Tensor:
    return torch.nn.functional.conv2d(x, weight, None, *conv)


def _conv_bias_act(x: Tensor, weight: Tensor, bias: Any, residual: Any, *args: Any) -> Tensor:
    *conv, activation, backend = args
    x, residual = conv_layout(x, weight, residual)
    args = (weight, bias, residual, *_conv_args(conv), activation)
    return dispatch.call("conv_bias_act_forward", x, *args, backend=backend)


def _conv_bn_act(x: Tensor, weight: Tensor, *args: Any) -> Tensor:
    bias, gamma, beta, mean, var, residual, *conv, eps, activation, backend = args
    x, residual = conv_layout(x, weight, residual)
    args = (weight, bias, gamma, beta, mean, var, residual, *_conv_args(conv), eps, activation)
    return dispatch.call("conv_bn_act_forward", x, *args, backend=backend)


def _conv_args(conv: Any) -> tuple[Any, ...]:
    stride, padding, dilation, groups = conv
    return tuple(stride), tuple(padding), tuple(dilation), groups


_register("conv_bias_act", _conv_bias_act, lambda x, weight, *args: _conv_fake(x, weight, args[2:6]))
_register("conv_bn_act", _conv_bn_act, lambda x, weight, *args: _conv_fake(x, weight, args[6:10]))
