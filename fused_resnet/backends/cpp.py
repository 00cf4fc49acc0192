"""The compiled kernels of csrc, loaded from `_C`. Schemas stand here; csrc registers the implementations.

The CUDA kernels have been run on a CPU, emulated, and compiled for GPUs, but not yet run on one: until that is done
they count as unverified, and are chosen automatically only where `selfcheck` passes on the device at hand.
"""

from __future__ import annotations

import functools
import importlib
import json
import math
import re
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, overload

import torch
from torch import Tensor
from torch.nn import functional as F

from fused_resnet.backends import cutlass, library, products, reference, selfcheck
from fused_resnet.folding import accumulate_dtype, update_running_stats
from fused_resnet.ops.checks import conv_extent, conv_output_shape, is_channels_last

_SCHEMAS = (
    "add_relu_forward(Tensor x, Tensor residual) -> Tensor",
    "add_relu_backward(Tensor grad, Tensor out) -> Tensor",
    "bn_act_train_forward(Tensor x, Tensor? gamma, Tensor? beta, Tensor(a!)? running_mean, Tensor(b!)? running_var,"
    " Tensor? residual, float momentum, float eps, bool relu) -> (Tensor out, Tensor mean, Tensor var)",
    "bn_act_eval_forward(Tensor x, Tensor? gamma, Tensor? beta, Tensor? mean, Tensor? var, Tensor? residual,"
    " float eps, bool relu) -> Tensor",
    "bn_act_backward(Tensor grad, Tensor x, Tensor? out, Tensor? gamma, Tensor? beta, Tensor mean, Tensor var,"
    " float eps, bool relu, bool training, bool has_residual)"
    " -> (Tensor grad_x, Tensor grad_gamma, Tensor grad_beta, Tensor grad_residual)",
    "bn_act_pool_train_forward(Tensor x, Tensor? gamma, Tensor? beta, Tensor(a!)? running_mean,"
    " Tensor(b!)? running_var, float momentum, float eps, bool relu, bool with_offsets)"
    " -> (Tensor out, Tensor offsets, Tensor mean, Tensor var)",
    "bn_act_pool_eval_forward(Tensor x, Tensor? gamma, Tensor? beta, Tensor mean, Tensor var, float eps, bool relu,"
    " bool with_offsets) -> (Tensor out, Tensor offsets)",
    "bn_act_pool_backward(Tensor grad, Tensor offsets, Tensor x, Tensor? gamma, Tensor? beta, Tensor mean, Tensor var,"
    " float eps, bool relu, bool training) -> (Tensor grad_x, Tensor grad_gamma, Tensor grad_beta)",
    "bn_bn_act_train_forward(Tensor x, Tensor? gamma, Tensor? beta, Tensor(a!)? running_mean, Tensor(b!)? running_var,"
    " float momentum, float eps, Tensor x2, Tensor? gamma2, Tensor? beta2, Tensor(c!)? running_mean2,"
    " Tensor(d!)? running_var2, float momentum2, float eps2, bool relu)"
    " -> (Tensor out, Tensor mean, Tensor var, Tensor mean2, Tensor var2)",
    "bn_bn_act_backward(Tensor grad, Tensor x, Tensor? gamma, Tensor? beta, Tensor mean, Tensor var, float eps,"
    " Tensor x2, Tensor? gamma2, Tensor? beta2, Tensor mean2, Tensor var2, float eps2, bool relu)"
    " -> (Tensor grad_x, Tensor grad_gamma, Tensor grad_beta, Tensor grad_x2, Tensor grad_gamma2, Tensor grad_beta2)",
    "second_moments(Tensor rows) -> (Tensor mean, Tensor moments)",
    "masked_sums(Tensor grad, Tensor out) -> (Tensor g, Tensor sums)",
    "cuda_check() -> ()",
    "pool_new(int least) -> int",
    "pool_drop(int pool) -> ()",
    "pool_activate(int pool) -> ()",
    "pool_end_pass(int pool) -> ()",
    "pool_clear(int pool) -> ()",
    "pool_kept(int pool) -> int[]",
    "new_images(Tensor like, int n, int c, int h, int w) -> Tensor",
    "conv_available() -> bool",
    "conv_pack(Tensor weight, int panel, bool backward=False) -> Tensor",
    "nhwc_to_nchw(Tensor x, Tensor(a!) out) -> ()",
    "winograd_pack(Tensor weight, int panel, bool backward=False) -> Tensor",
    "conv_check(Tensor x, Tensor weight, int stride_h, int stride_w, int pad_h, int pad_w, int dilation_h,"
    " int dilation_w) -> ()",
    "conv_bias_act(Tensor x, Tensor packed, Tensor? bias, Tensor? residual, Tensor(a!) out, int stride_h, int stride_w,"
    " int pad_h, int pad_w, int dilation_h, int dilation_w, bool relu) -> ()",
    "conv_relu_pool(Tensor x, Tensor packed, Tensor? bias, Tensor(a!) out, int stride_h, int stride_w, int pad_h,"
    " int pad_w, int dilation_h, int dilation_w) -> ()",
    "conv_gradient(Tensor x, Tensor grad, Tensor(a!) out, int stride_h, int stride_w, int pad_h, int pad_w,"
    " int dilation_h, int dilation_w) -> ()",
    "winograd_gradient(Tensor x, Tensor grad, Tensor(a!) out, int pad_h, int pad_w) -> ()",
    "conv_bn_act(Tensor x, Tensor packed, Tensor? bias, Tensor? gamma, Tensor? beta, Tensor mean, Tensor var,"
    " Tensor? residual, Tensor(a!) out, int stride_h, int stride_w, int pad_h, int pad_w, int dilation_h,"
    " int dilation_w, float eps, bool relu) -> ()",
)
_PANEL, _WIDE_PANEL = 32, 64  # output channels that csrc's convolution takes at a time
_POOL = ((3, 3), (2, 2), (1, 1), (1, 1))  # the stem's max pool: kernel, stride, padding, dilation
_KEPT = 6  # arguments of a choice for weights that are packed once: (weight, *geometry, activation)
_PACKED_AT_EACH_CALL = 512  # output pixels from which packing a weight costs less than it gains
_WINOGRAD_AT_EACH_CALL = 192  # the same, for Winograd's algorithm
_LARGE_WEIGHT = 1 << 16  # numbers of a weight from which, where output pixels are fewer, convs are matrix products
_FEW_PIXELS = 4  # output channels per output pixel from which all of a convolution's are
_DTYPES = {
    "cpu": (torch.float64, torch.float32, torch.bfloat16, torch.float16),
    "cuda": (torch.float32, torch.bfloat16, torch.float16),
}
_MOST_VALUES = 2**31 - 2**22  # of a channel, on CUDA: kMostPositions in csrc/cuda/plan.h
ONLY_ON = {
    "conv_forward": "cpu",
    "conv_backward": "cpu",
    "bn_bn_act_train_forward": "cuda",
    "bn_bn_act_backward": "cuda",
    "masked_sums": "cpu",
}
NOTES = {
    "conv": "training",
    "conv_bias_act": "conv in torch, epilogue in csrc",
    "conv_bn_act": "conv in torch, epilogue in csrc",
}


def build_info() -> dict[str, Any]:
    """What the build of the extension recorded: `built`, and the `reason` where it was not."""
    try:
        return json.loads((Path(__file__).parents[1] / "_build_info.json").read_text())
    except FileNotFoundError:
        return {"built": False, "reason": "this tree was never installed (no _build_info.json)"}
    except (OSError, ValueError) as error:
        return {"built": False, "reason": f"_build_info.json cannot be read: {error}"}


@functools.cache
def _load() -> str | None:
    """Load the extension once; None, or the reason why it cannot be used."""
    try:
        importlib.import_module("fused_resnet._C")
    except ModuleNotFoundError as error:
        if error.name != "fused_resnet._C":
            return f"the extension does not load: {error}"
        return f"the extension was not built: {build_info().get('reason') or 'unknown reason'}"
    except Exception as error:  # a broken or foreign binary must never break the import of the package
        return f"the extension does not load: {error}"
    return None


_library = torch.library.Library("fused_resnet_cpp", "FRAGMENT")
for _schema in _SCHEMAS:
    _library.define(_schema)
_ops = torch.ops.fused_resnet_cpp


def unavailable(device_type: str) -> str | None:
    if device_type == "cuda":
        return _load() or _cuda_unavailable()
    return _load() if device_type == "cpu" else f"no kernels for device {device_type}"


@functools.cache
def _cuda_unavailable() -> str | None:
    if not torch._C._dispatch_has_kernel_for_dispatch_key("fused_resnet_cpp::cuda_check", "CompositeExplicitAutograd"):
        return f"the extension was built without CUDA: {build_info().get('no_cuda') or 'unknown reason'}"
    if torch.version.hip:
        return "its CUDA kernels are for NVIDIA GPUs, and this torch is for AMD's"
    if not torch.cuda.is_available():
        return "no GPU is available"
    try:
        _ops.cuda_check.default()
    except RuntimeError as error:  # the driver is too old, or there is no code for this GPU
        message = str(error).splitlines()[0]
        return f"its CUDA kernels cannot run: {re.sub(r'^.*?[.](cu|h):[0-9]+, ', '', message)}"
    return None


def supports(primitive: str, x: Tensor, *args: Any) -> str | None:
    if x.dtype not in _DTYPES[x.device.type]:
        return f"no kernels for {x.dtype}"
    if x.device.type == "cuda" and primitive.startswith("bn_"):
        x = args[1] if primitive == "bn_act_pool_backward" else x
        if x.numel() >= _MOST_VALUES * max(x.shape[1], 1):
            return f"{_MOST_VALUES} values per channel or more"
    return None


_tested: dict[selfcheck.Case, str | None] = {}


def untested(op: str, x: Tensor) -> str | None:
    """None where the CUDA kernels of an op proved equal to `reference` for x's device, dtype and layout, or why not.

    The proof is run once per process, by the first automatic choice; see `selfcheck`.
    """
    return None if x.device.type == "cpu" else selfcheck.untested(sys.modules[__name__], op, x, _tested)


@functools.cache
def cutlass_unavailable() -> str | None:
    """Why there are no convolutions for CUDA here, or None."""
    reason = _load()
    if reason is not None or torch._C._dispatch_has_kernel_for_dispatch_key("fused_resnet_cpp::conv_bn_act", "CUDA"):
        return reason
    return f"the extension was built without CUTLASS: {build_info().get('no_cutlass') or 'unknown reason'}"


@functools.cache
def _warn_of(reason: str) -> None:
    message = f"fused_resnet: csrc's CUDA convolution does not take some calls ({reason}): torch's and a fused pass do."
    warnings.warn(message, stacklevel=4)


def _by_cutlass(op: str, x: Tensor, weight: Tensor, residual: Tensor | None, *geometry: Any) -> bool:
    """Whether csrc's convolution for CUDA serves the call; each reason why not is warned of once."""
    if x.device.type != "cuda" or cutlass_unavailable() is not None:
        return False
    reason = cutlass.refusal(op, x, weight, residual, *geometry)
    if reason is not None:
        _warn_of(reason)
    return reason is None


@functools.cache
def conv_unavailable() -> str | None:
    """Why csrc's own convolution cannot be used here, or None."""
    return _load() or (None if _ops.conv_available.default() else "csrc's convolution needs AVX-512")


def _is_packed(weight: Tensor) -> bool:
    return weight.dim() > 4


def _by_winograd(weight: Tensor, shape: tuple[int, ...], stride: Any, padding: Any, dilation: Any) -> bool:
    """Whether a conv on inputs of the shape had better take Winograd's algorithm: 4x4 patches for 2x2 outputs."""
    k, c, *kernel = weight.shape
    if kernel != [3, 3] or tuple(stride) != (1, 1) or tuple(dilation) != (1, 1) or c % 16 or k % _PANEL:
        return False
    height, width = map(conv_extent, shape[2:], kernel, stride, padding, dilation)
    return 16 * -(-height // 2) * -(-width // 2) < 0.8 * 9 * height * width


def _is_direct(x: Tensor, weight: Tensor, groups: int) -> bool:
    """Whether csrc's own convolution serves the call."""
    if (
        x.device.type != "cpu"
        or x.dtype != torch.float32
        or groups != 1
        or x.dim() != 4
        or conv_unavailable() is not None
    ):
        return False
    return _is_packed(weight) or (weight.dtype == x.dtype and x.numel() > 0 and is_channels_last(x))


def _not_direct(x: Tensor, weight: Tensor, groups: int) -> str | None:
    if _is_direct(x, weight, groups):
        return None
    return conv_unavailable() or "csrc's convolution is for float32 in channels_last, ungrouped"


def _pays(weight: Tensor, pixels: int, stride: Any, padding: Any, dilation: Any, shape: tuple[int, ...]) -> bool:
    """Whether csrc's convolution, where it serves a batch, is faster than oneDNN's though it packs its weight."""
    channels, inputs, *kernel = weight.shape
    if channels % _PANEL or max(dilation) > 1:
        return False
    if _by_winograd(weight, shape, stride, padding, dilation):
        return pixels >= _WINOGRAD_AT_EACH_CALL
    return (max(kernel) == 1 or inputs < 16) and pixels >= _PACKED_AT_EACH_CALL


def partly(op: str) -> tuple[bool, str] | None:
    """Where the automatic choice does not take this backend for all calls: (whether for some, for which or why not)."""
    if op not in ("conv", "conv_bias_act"):
        return None
    reason = conv_unavailable()
    if reason is not None:
        return False, f"on request; {reason}"
    if op == "conv":
        return True, "training: float32, channels_last, ungrouped, where faster than oneDNN"
    convs = f"float32, channels_last, output channels in multiples of {_PANEL}"
    return True, f"modules: {convs}; 3x3 with stride 1 by Winograd's algorithm, other 3x3 of single images"


def on_request(op: str, device_type: str) -> str:
    """What an explicit request of an op gets, where that is not clear."""
    if device_type != "cuda" or op not in NOTES:
        return ""
    reason = cutlass_unavailable()
    if reason is not None:
        return f"{NOTES[op]}; {reason}"
    return f"one CUTLASS kernel for 16-bit NHWC, channels in multiples of 8, if its self-check passes; else {NOTES[op]}"


def slower(primitive: str, x: Tensor, *args: Any) -> str | None:
    """Why another backend is faster at this call, which the automatic choice asks."""
    if not primitive.startswith("conv_") or library.unavailable("cpu"):
        return None
    if primitive in ("conv_forward", "conv_backward"):
        weight, groups = (args[0], args[5]) if primitive == "conv_forward" else (args[1], args[6])
        return library.switched_off("cpu") or _not_direct(x, weight, groups)
    if library.supports(primitive, x, *args):
        return None
    if primitive == "conv_bn_act_forward":
        return "oneDNN's fused convolution is faster"
    weight, geometry = args[0], args[-5:-2]
    reason = _not_direct(x, weight, args[-2])
    if reason is not None:
        return reason
    channels, inputs, *kernel = weight.shape
    if max(geometry[2]) > 1:
        return "oneDNN leaves out products with padding, of which dilated convolutions have many"
    shape = conv_output_shape(x, weight, *geometry) if len(args) > _KEPT else None
    if shape is not None and shape[0] * shape[2] * shape[3] < _PACKED_AT_EACH_CALL:
        return "csrc's convolution would pack the weight at each call"
    if x.shape[0] > 1 and max(kernel) > 1 and inputs >= 16 and not _by_winograd(weight, x.shape, *geometry):
        return "oneDNN's fused convolution is faster for batches"
    return None if channels % _PANEL == 0 else f"csrc's convolution wastes work on {channels} output channels"


@overload
def _wide(vector: Tensor, x: Tensor) -> Tensor: ...
@overload
def _wide(vector: None, x: Tensor) -> None: ...
def _wide(vector: Tensor | None, x: Tensor) -> Tensor | None:
    return None if vector is None else vector.to(accumulate_dtype(x.dtype)).contiguous()


def add_relu_forward(x: Tensor, residual: Tensor) -> Tensor:
    return _ops.add_relu_forward.default(x, residual)


def add_relu_backward(grad: Tensor, out: Tensor) -> Tensor:
    return _ops.add_relu_backward.default(grad, out)


def _updatable(running: Tensor | None, x: Tensor) -> bool:
    return running is None or (running.dtype == accumulate_dtype(x.dtype) and running.is_contiguous())


def _on_host(momentum: float | Tensor) -> bool:
    return not isinstance(momentum, Tensor) or momentum.device.type == "cpu"


_Running = tuple[Tensor | None, Tensor | None, "float | Tensor"]  # mean, variance, momentum


def _update_in_kernel(x: Tensor, running: _Running) -> bool:
    """Whether types, strides and momentum allow it; nothing may wait for a momentum on the device."""
    return _on_host(running[2]) and _updatable(running[0], x) and _updatable(running[1], x)


def _kernel_args(running: _Running, in_kernel: bool) -> tuple[Tensor | None, Tensor | None, float]:
    return (*running[:2], float(running[2])) if in_kernel else (None, None, 0.0)


def _updated(x: Tensor, running: _Running, in_kernel: bool, mean: Tensor, var: Tensor) -> None:
    """What is left to do for the running statistics after the kernel."""
    if in_kernel:
        for buffer in running[:2]:
            if buffer is not None and not buffer.is_inference():  # torch does not see the kernel's writes
                torch.autograd.graph.increment_version(buffer)
    elif x.numel():
        update_running_stats(*running[:2], mean, var, running[2], x.numel() // x.shape[1])


def bn_act_train_forward(
    x: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    residual: Tensor | None,
    momentum: float | Tensor,
    eps: float,
    activation: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    running = (running_mean, running_var, momentum)
    in_kernel = _update_in_kernel(x, running)
    *buffers, weight = _kernel_args(running, in_kernel)
    out, mean, var = _ops.bn_act_train_forward.default(
        x, _wide(gamma, x), _wide(beta, x), *buffers, residual, weight, eps, activation == "relu"
    )
    _updated(x, running, in_kernel, mean, var)
    return out, mean, var


def bn_act_eval_forward(
    x: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    mean: Tensor,
    var: Tensor,
    residual: Tensor | None,
    eps: float,
    activation: str | None,
) -> Tensor:
    gamma, beta = _wide(gamma, x), _wide(beta, x)
    return _ops.bn_act_eval_forward.default(
        x, gamma, beta, _wide(mean, x), _wide(var, x), residual, eps, activation == "relu"
    )


def bn_act_backward(
    grad: Tensor,
    x: Tensor,
    out: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    mean: Tensor,
    var: Tensor,
    eps: float,
    activation: str | None,
    training: bool,
    has_residual: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    relu = activation == "relu"
    gamma, beta, mean, var = _wide(gamma, x), _wide(beta, x), _wide(mean, x), _wide(var, x)
    grad_x, grad_gamma, grad_beta, grad_residual = _ops.bn_act_backward.default(
        grad, x, out, gamma, beta, mean, var, eps, relu, training, has_residual
    )
    if not has_residual:
        return grad_x, grad_gamma, grad_beta, None
    return grad_x, grad_gamma, grad_beta, grad_residual if relu else grad


def bn_act_pool_train_forward(
    x: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    momentum: float | Tensor,
    eps: float,
    activation: str | None,
    with_offsets: bool,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    running = (running_mean, running_var, momentum)
    in_kernel = _update_in_kernel(x, running)
    out, offsets, mean, var = _ops.bn_act_pool_train_forward.default(
        x, _wide(gamma, x), _wide(beta, x), *_kernel_args(running, in_kernel), eps, activation == "relu", with_offsets
    )
    _updated(x, running, in_kernel, mean, var)
    return out, offsets if with_offsets else None, mean, var


def bn_act_pool_eval_forward(
    x: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    mean: Tensor,
    var: Tensor,
    eps: float,
    activation: str | None,
    with_offsets: bool,
) -> tuple[Tensor, Tensor | None]:
    vectors = (_wide(gamma, x), _wide(beta, x), _wide(mean, x), _wide(var, x))
    out, offsets = _ops.bn_act_pool_eval_forward.default(x, *vectors, eps, activation == "relu", with_offsets)
    return out, offsets if with_offsets else None


def bn_act_pool_backward(
    grad: Tensor,
    offsets: Tensor,
    x: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    mean: Tensor,
    var: Tensor,
    eps: float,
    activation: str | None,
    training: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    vectors = (_wide(gamma, x), _wide(beta, x), _wide(mean, x), _wide(var, x))
    return _ops.bn_act_pool_backward.default(grad, offsets, x, *vectors, eps, activation == "relu", training)


def bn_bn_act_train_forward(
    x: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    momentum: float | Tensor,
    eps: float,
    x2: Tensor,
    gamma2: Tensor | None,
    beta2: Tensor | None,
    running_mean2: Tensor | None,
    running_var2: Tensor | None,
    momentum2: float | Tensor,
    eps2: float,
    activation: str | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    first, second = (running_mean, running_var, momentum), (running_mean2, running_var2, momentum2)
    in_kernel, in_kernel2 = _update_in_kernel(x, first), _update_in_kernel(x2, second)
    out, mean, var, mean2, var2 = _ops.bn_bn_act_train_forward.default(
        *(x, _wide(gamma, x), _wide(beta, x), *_kernel_args(first, in_kernel), eps),
        *(x2, _wide(gamma2, x), _wide(beta2, x), *_kernel_args(second, in_kernel2), eps2, activation == "relu"),
    )
    _updated(x, first, in_kernel, mean, var)
    _updated(x2, second, in_kernel2, mean2, var2)
    return out, mean, var, mean2, var2


def bn_bn_act_backward(
    grad: Tensor,
    x: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    mean: Tensor,
    var: Tensor,
    eps: float,
    x2: Tensor,
    gamma2: Tensor | None,
    beta2: Tensor | None,
    mean2: Tensor,
    var2: Tensor,
    eps2: float,
    activation: str | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    first = (_wide(gamma, x), _wide(beta, x), _wide(mean, x), _wide(var, x), eps)
    second = (_wide(gamma2, x), _wide(beta2, x), _wide(mean2, x), _wide(var2, x), eps2)
    return _ops.bn_bn_act_backward.default(grad, x, *first, x2, *second, activation == "relu")


def second_moments(rows: Tensor) -> tuple[Tensor, Tensor]:
    wide = rows if rows.is_cuda else rows.to(accumulate_dtype(rows.dtype))
    ours = rows.is_cuda or (wide.dtype == torch.float32 and rows.shape[1] % 32 == 0 and conv_unavailable() is None)
    return _ops.second_moments.default(wide.contiguous()) if rows.numel() and ours else reference.second_moments(wide)


def masked_sums(grad: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:
    if out.dtype == torch.float32 and is_channels_last(out):
        return _ops.masked_sums.default(grad, out)
    g = add_relu_backward(grad, out)
    return g, g.sum((0, 2, 3), dtype=accumulate_dtype(g.dtype))


def converted(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x.to(dtype); images in channels_last take memory from the network's pool, if there is one."""
    if x.dtype == dtype or not is_channels_last(x) or x.dim() != 4 or _load() is not None:
        return x.to(dtype)
    return _ops.new_images.default(torch.empty(0, dtype=dtype), *x.shape).copy_(x)


def _like(residual: Tensor, y: Tensor) -> Tensor:
    """The residual in the strides of y, which torch's conv chose."""
    return residual if residual.stride() == y.stride() else torch.empty_like(y).copy_(residual)


def conv_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    groups: int,
) -> Tensor:
    geometry = (stride, padding, dilation)
    n, _, height, width = conv_output_shape(x, weight, *geometry)
    pixels = n * height * width
    if _is_direct(x, weight, groups):
        if _pays(weight, pixels, *geometry, tuple(x.shape)):
            return _direct(x, weight, bias, None, None, *geometry, None)
        fewest = _FEW_PIXELS * pixels <= weight.shape[0] and not is_channels_last(weight)  # else oneDNN does as well
        if _is_large(weight, pixels) and (fewest or _is_pointwise(weight, padding)):
            y = products.output(x, weight, (n, height, width), *geometry)
            return y if bias is None else y.add_(bias[:, None, None])
    return F.conv2d(x, weight, bias, stride, padding, dilation, groups)


def conv_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    onto: Tensor | None,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    groups: int,
    needs_x: bool,
    needs_weight: bool,
) -> tuple[Tensor | None, Tensor | None]:
    grad_x = grad_weight = None
    if _is_direct(grad, weight, groups) and _is_direct(x, weight, groups):
        if needs_x:
            grad_x = _input_gradient(grad, x, weight, onto, stride, padding, dilation)
            needs_x = grad_x is None
        if needs_weight:
            grad_weight = _weight_gradient(grad, x, weight, stride, padding, dilation)
            needs_weight = grad_weight is None
    if needs_x or needs_weight:
        rest = (onto, stride, padding, dilation, groups, needs_x, needs_weight)
        torchs = reference.conv_backward(grad, x, weight, *rest)
        grad_x, grad_weight = (torchs[0] if needs_x else grad_x), (torchs[1] if needs_weight else grad_weight)
    return grad_x, None if grad_weight is None else _laid_out(grad_weight, weight)


def _laid_out(grad: Tensor, weight: Tensor) -> Tensor:
    """A weight's gradient, contiguous where it came in channels_last and the weight is contiguous."""
    turned = grad.dim() == 4 and is_channels_last(grad) and weight.is_contiguous()
    return products.nchw(grad) if turned and grad.dtype == torch.float32 else grad


def _input_gradient(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    onto: Tensor | None,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
) -> Tensor | None:
    """Added to `onto`, where a convolution of csrc's is the faster way to it; else None."""
    n, _, height, width = grad.shape
    pixels, kernel = n * height * width, weight.shape[2:]
    if onto is not None and not is_channels_last(onto):
        return None
    large = _is_large(weight, pixels)
    if large and _is_pointwise(weight, padding):
        out = products.images_of(products.rows_of(grad) @ weight.flatten(1), n, height, width)
        return _onto(onto, out, x, stride)
    if large and _FEW_PIXELS * pixels <= weight.shape[0]:
        out = products.input_gradient(grad, x, weight, stride, padding, dilation)
        return _onto(onto, out, x, (1, 1))
    if stride != (1, 1) and (max(kernel) > 1 or padding != (0, 0) or onto is None):
        return None
    margins = (kernel[0] - 1 - padding[0], kernel[1] - 1 - padding[1])
    if min(margins) < 0 or not _pays(weight.transpose(0, 1), pixels, (1, 1), margins, dilation, tuple(grad.shape)):
        return None
    packed = pack(weight, tuple(grad.shape), (1, 1), margins, dilation, 1, backward=True)
    dense = onto if stride == (1, 1) else None
    size = x.shape[2:] if stride == (1, 1) else grad.shape[2:]
    out = _ops.new_images.default(x, x.shape[0], x.shape[1], *size) if dense is None else dense
    _ops.conv_bias_act.default(grad, packed, None, dense, out, 1, 1, *margins, 1, 1, False)
    return out if stride == (1, 1) else _onto(onto, out, x, stride)


def _onto(onto: Tensor | None, out: Tensor, x: Tensor, stride: tuple[int, int]) -> Tensor:
    """`out`, the gradient of every `stride`-th pixel of x, added to `onto` or to zeros."""
    if onto is None:
        if stride == (1, 1):
            return out
        onto = torch.zeros_like(x)
    onto[:, :, :: stride[0], :: stride[1]] += out
    return onto


def _is_large(weight: Tensor, pixels: int) -> bool:
    """Whether a weight is what takes time, and not the pixels that it meets."""
    return pixels < _PACKED_AT_EACH_CALL and weight.numel() >= _LARGE_WEIGHT


def _is_pointwise(weight: Tensor, padding: tuple[int, int]) -> bool:
    return weight.shape[2:] == (1, 1) and tuple(padding) == (0, 0)


_LEAST_CHANNELS = 256  # for a matrix product to be as good as oneDNN's gradient of a 1x1 conv's weight


def _weight_gradient(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
) -> Tensor | None:
    """Where there is a faster way to it than oneDNN's; else None."""
    (k, c, *kernel), geometry = weight.shape, (stride, padding, dilation)
    pixels = grad.shape[0] * grad.shape[2] * grad.shape[3]
    large = _is_large(weight, pixels)
    if _is_pointwise(weight, padding) and (large or min(k, c) >= _LEAST_CHANNELS):
        return products.product(products.rows_of(grad), products.rows_of(x, stride)).view(k, c, 1, 1)
    whole = c % 32 == 0 and k % 16 == 0
    if whole and pixels >= _WINOGRAD_AT_EACH_CALL and _by_winograd(weight, tuple(x.shape), *geometry):
        out = _ops.new_images.default(x, k, c, *kernel)
        _ops.winograd_gradient.default(x, grad, out, *padding)
        return out
    if large:
        return products.weight_gradient(grad, x, weight, *geometry)
    if whole and pixels >= _PACKED_AT_EACH_CALL and kernel != [1, 1] and stride != (1, 1):
        out = _ops.new_images.default(x, k, c, *kernel)
        _ops.conv_gradient.default(x, grad, out, *stride, *padding, *dilation)
        return out
    return None


def conv_bias_act_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    groups: int,
    activation: str | None,
) -> Tensor:
    """As `reference.conv_bias_act_forward`; the weight may be packed, then there is a bias."""
    if _by_cutlass("conv_bias_act", x, weight, residual, stride, padding, dilation, groups):
        return cutlass.conv_bias_act_forward(x, weight, bias, residual, stride, padding, dilation, groups, activation)
    if _is_direct(x, weight, groups):
        return _direct(x, weight, bias, residual, None, stride, padding, dilation, activation)
    y = F.conv2d(x, weight, bias, stride, padding, dilation, groups)
    if activation == "relu" and residual is not None:
        return add_relu_forward(y, _like(residual, y))
    if residual is not None:
        y += residual
    return y.relu_() if activation == "relu" else y


def conv_bias_act_onto_residual(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    groups: int,
    activation: str | None,
) -> Tensor:
    """As `conv_bias_act_forward`, written over the residual where that saves a new tensor's pages."""
    if _is_direct(x, weight, groups) and is_channels_last(residual):
        return _direct(x, weight, bias, residual, residual, stride, padding, dilation, activation)
    return conv_bias_act_forward(x, weight, bias, residual, stride, padding, dilation, groups, activation)


def _direct(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    out: Tensor | None,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    activation: str | None,
) -> Tensor:
    """csrc's own convolution of a channels_last x, into `out` or a new tensor."""
    if _is_packed(weight):
        kernel: Sequence[int] = (3, 3) if weight.dim() == 6 else weight.shape[1:3]
        channels = bias.shape[0]  # type: ignore[union-attr]
    else:
        channels, _, *kernel = weight.shape
        weight = pack(weight, tuple(x.shape), stride, padding, dilation, 1)
    if out is None:
        height, width = map(conv_extent, x.shape[2:], kernel, stride, padding, dilation)
        out = _ops.new_images.default(x, x.shape[0], channels, height, width)
    if residual is not None:
        residual = _like(residual, out)
    _ops.conv_bias_act.default(x, weight, bias, residual, out, *stride, *padding, *dilation, activation == "relu")
    return out


def relu_pool(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    groups: int,
) -> Callable[[Tensor], Tensor] | None:
    """max_pool2d(relu(conv(x) + bias), 3, 2, 1) in one pass, as a function of tensors like x, in NCHW or channels_last,
    the weight packed once; None where there is none."""
    channels, _, *kernel = weight.shape
    if kernel == [1, 1] or not _is_direct(x, weight, groups):
        return None
    packed = _ops.conv_pack.default(weight, _PANEL)

    def run(x: Tensor) -> Tensor:
        height, width = map(conv_extent, map(conv_extent, x.shape[2:], kernel, stride, padding, dilation), *_POOL)
        out = _ops.new_images.default(x, x.shape[0], channels, height, width)
        _ops.conv_relu_pool.default(x, packed, bias, out, *stride, *padding, *dilation)
        return out

    return run


def packs(x: Tensor, weight: Tensor, *args: Any) -> bool:
    """Whether `pack` makes of a weight what `conv_bias_act_forward` runs on at once."""
    return _by_cutlass("conv_bias_act", x, weight, None, *args[-5:-1]) or _is_direct(x, weight, args[-2])


def pack(
    weight: Tensor,
    input_shape: tuple[int, ...],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    groups: int,
    backward: bool = False,
) -> Tensor:
    """A (K, C, R, S) weight as csrc's convolution reads it: (panels of 32 or 64 channels, R, S, C, 32 or 64);
    transformed for Winograd's algorithm, where that serves inputs of the shape, (panels, 4, 4, 1, C, 32 or 64). Either
    serves all shapes. `backward`: of the convolution (the arguments are its own) that takes a gradient of the weight's
    conv from its output to its input. On CUDA `cutlass.pack`'s."""
    if weight.is_cuda:
        return cutlass.pack(weight)
    read = weight.transpose(0, 1) if backward else weight
    if _by_winograd(read, input_shape, stride, padding, dilation):
        return _ops.winograd_pack.default(weight, _PANEL, backward)
    pointwise = tuple(weight.shape[2:]) == tuple(stride) == (1, 1) and tuple(padding) == (0, 0)
    wide = pointwise and read.shape[0] % _WIDE_PANEL == 0 and input_shape[0] * math.prod(input_shape[2:]) >= 14 * 14
    return _ops.conv_pack.default(weight, _WIDE_PANEL if wide else _PANEL, backward)


def conv_bn_act_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    mean: Tensor,
    var: Tensor,
    residual: Tensor | None,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    groups: int,
    eps: float,
    activation: str | None,
) -> Tensor:
    if _by_cutlass("conv_bn_act", x, weight, residual, stride, padding, dilation, groups):
        return cutlass.conv_bn_act_forward(
            x, weight, bias, gamma, beta, mean, var, residual, stride, padding, dilation, groups, eps, activation
        )
    y = F.conv2d(x, weight, bias, stride, padding, dilation, groups)
    residual = None if residual is None else _like(residual, y)
    return bn_act_eval_forward(y, gamma, beta, mean, var, residual, eps, activation)
