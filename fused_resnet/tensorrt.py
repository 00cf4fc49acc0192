"""TensorRT through Torch-TensorRT: a folded model as one engine, and converters for programs that hold our ops.

`to_tensorrt` hands TensorRT plain convolutions, additions and ReLUs: it fuses them itself, and better than around
opaque plugins. Torch-TensorRT is imported only when asked for.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fused_resnet.dispatch import BackendUnavailableError
from fused_resnet.export.writers import to_program
from fused_resnet.folding import fold
from fused_resnet.ops import schemas  # noqa: F401  (registers the ops)


def to_tensorrt(
    model: nn.Module,
    example: Tensor,
    *,
    dtype: torch.dtype = torch.float16,
    dynamic_batch: int | tuple[int, int, int] | None = None,
    **options: Any,
) -> nn.Module:
    """The model, folded (`to_plain`), as one TensorRT engine: the whole network, nothing left to torch.

    Args:
        model: as in `to_plain`; it is not touched, and may be on the CPU.
        example: a batch of images, (N, C, H, W); only its shape matters.
        dtype: of weights, images and logits: float16, float32 or bfloat16.
        dynamic_batch: None for the example's batch size alone; else the largest one, or (smallest, the one to
            optimise for, largest). An int stands for (1, the example's, largest).
        options: passed on to `torch_tensorrt.dynamo.compile`.

    Returns:
        A module on the current GPU, from images of `dtype` to logits; `torch_tensorrt.save` writes it.

    Raises:
        BackendUnavailableError: Torch-TensorRT, TensorRT or a GPU is missing. ValueError: the model cannot be traced
        or exported, or an argument is wrong. Torch-TensorRT's own errors where an engine cannot be built.
    """
    with _needed_by("to_tensorrt"):
        torch_tensorrt, device = _torch_tensorrt(), gpu()
    if dtype not in (torch.float16, torch.float32, torch.bfloat16):
        raise ValueError(f"to_tensorrt: dtype must be torch.float16, float32 or bfloat16, got {dtype}")
    batches = _batches(example, dynamic_batch)
    least, _, most = batches or (1, 1, None)
    program = to_program(
        "to_tensorrt", model, example, batches is not None, False, dtype, device=device, batches=(least, most)
    )
    sizes = tuple(example.shape[1:])
    shapes: dict[str, Any] = {"shape": tuple(example.shape)}
    if batches is not None:
        shapes = {f"{name}_shape": (n, *sizes) for name, n in zip(("min", "opt", "max"), batches, strict=True)}
    inputs = [torch_tensorrt.Input(**shapes, dtype=dtype)]
    return torch_tensorrt.dynamo.compile(program, arg_inputs=inputs, **{"require_full_compilation": True} | options)


def _batches(example: Tensor, dynamic: int | tuple[int, int, int] | None) -> tuple[int, int, int] | None:
    if dynamic is None:
        return None
    batches = (1, len(example), dynamic) if isinstance(dynamic, int) else tuple(dynamic)
    if len(batches) != 3 or not 1 <= batches[0] <= batches[1] <= batches[2]:
        raise ValueError(
            "to_tensorrt: dynamic_batch must be the largest batch, at least the example's, or (smallest, optimal, "
            f"largest) in order; got {dynamic!r} for an example of {len(example)}"
        )
    return batches


def unavailable() -> str | None:
    """What `to_tensorrt` lacks here, as one clause, or None."""
    try:
        _torch_tensorrt()
        gpu()
    except BackendUnavailableError as error:
        return str(error)
    return None


def gpu() -> torch.device:
    """The current one.

    Raises:
        BackendUnavailableError: there is none.
    """
    if not torch.cuda.is_available():
        why = "this torch is a CPU build" if torch.version.cuda is None else "torch sees none"
        raise BackendUnavailableError(f"an NVIDIA GPU, and {why}")
    return torch.device("cuda", torch.cuda.current_device())


def _torch_tensorrt() -> Any:
    """torch_tensorrt. It raises a plain Exception where its libraries are missing, and pins one minor of torch."""
    try:
        import torch_tensorrt
        import torch_tensorrt.dynamo.conversion.impl
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and error.name == "torch_tensorrt":
            why = "is not installed: pip install 'fused_resnet[tensorrt]'"
        else:
            why = f"does not import beside torch {torch.__version__}: {error}"
        raise BackendUnavailableError(f"Torch-TensorRT, which {why}") from error
    return torch_tensorrt


@contextlib.contextmanager
def _needed_by(name: str) -> Iterator[None]:
    try:
        yield
    except BackendUnavailableError as error:
        raise BackendUnavailableError(f"{name} needs {error}") from error


@functools.cache
def register_converters() -> None:
    """Teach Torch-TensorRT the inference ops of this package, for exported programs that still hold them.

    Known afterwards: add_relu, conv_bias_act, conv_bn_act (folded into one convolution), bn_act_eval, and
    bn_act_pool_eval without offsets; weights and statistics must be constants. Every other op, and these elsewhere,
    go by `run_decompositions(fused_resnet.export.DECOMPOSITIONS)`. Calling it again does nothing.

    Raises:
        BackendUnavailableError: Torch-TensorRT is missing or does not import.
    """
    with _needed_by("register_converters"):
        _torch_tensorrt()
    from torch_tensorrt.dynamo._SourceIR import SourceIR
    from torch_tensorrt.dynamo.conversion import dynamo_tensorrt_converter, impl

    ops = torch.ops.fused_resnet

    def finish(ctx: Any, target: Any, name: str, y: Any, residual: Any, activation: str | None) -> Any:
        if residual is not None:
            y = impl.elementwise.add(ctx, target, SourceIR.ATEN, f"{name}_add", y, residual)
        if activation == "relu":
            y = impl.activation.relu(ctx, target, SourceIR.ATEN, f"{name}_relu", y)
        return y

    def convolve(ctx: Any, target: Any, name: str, x: Any, weight: Any, bias: Any, conv: Any) -> Any:
        stride, padding, dilation, groups = conv
        return impl.conv.convNd(
            ctx, target, SourceIR.ATEN, name, False, x, weight, bias, stride, padding, dilation, groups
        )

    def normalise(ctx: Any, target: Any, name: str, x: Any, vectors: Any, eps: float) -> Any:
        gamma, beta, mean, var = vectors
        scale, shift = fold(torch.ones_like(mean), None, gamma, beta, mean, var, eps)
        return impl.normalization.batch_norm(
            ctx,
            target,
            SourceIR.ATEN,
            name,
            x,
            momentum=0.0,
            eps=0.0,
            return_mean_rstd=False,
            weight=scale,
            bias=shift,
            running_mean=torch.zeros_like(scale),
            running_var=torch.ones_like(scale),
        )

    def constants(*positions: int) -> Any:
        def check(node: torch.fx.Node, settings: Any = None) -> bool:
            given = (node.args[position] for position in positions)
            return all(arg is None or (isinstance(arg, torch.fx.Node) and arg.op == "get_attr") for arg in given)

        return check

    def converter(op: Any, validator: Any = None) -> Any:
        return dynamo_tensorrt_converter(op, capability_validator=validator, supports_dynamic_shapes=True)

    @converter(ops.add_relu.default)
    def add_relu(ctx: Any, target: Any, args: Any, kwargs: Any, name: str) -> Any:
        x, residual, _ = args
        return finish(ctx, target, name, x, residual, "relu")

    @converter(ops.conv_bias_act.default, constants(1, 2))
    def conv_bias_act(ctx: Any, target: Any, args: Any, kwargs: Any, name: str) -> Any:
        x, weight, bias, residual, *conv, activation, _ = args
        y = convolve(ctx, target, name, x, weight, bias, conv)
        return finish(ctx, target, name, y, residual, activation)

    @converter(ops.conv_bn_act.default, constants(1, 2, 3, 4, 5, 6))
    def conv_bn_act(ctx: Any, target: Any, args: Any, kwargs: Any, name: str) -> Any:
        x, weight, bias, gamma, beta, mean, var, residual, *conv, eps, activation, _ = args
        weight, bias = fold(weight, bias, gamma, beta, mean, var, eps)
        y = convolve(ctx, target, name, x, weight, bias, conv)
        return finish(ctx, target, name, y, residual, activation)

    @converter(ops.bn_act_eval.default, constants(1, 2, 3, 4))
    def bn_act_eval(ctx: Any, target: Any, args: Any, kwargs: Any, name: str) -> Any:
        x, *vectors, residual, eps, activation, _ = args
        return finish(ctx, target, name, normalise(ctx, target, name, x, vectors, eps), residual, activation)

    def without_offsets(node: torch.fx.Node, settings: Any = None) -> bool:
        return not node.args[7] and constants(1, 2, 3, 4)(node)

    @converter(ops.bn_act_pool_eval.default, without_offsets)
    def bn_act_pool_eval(ctx: Any, target: Any, args: Any, kwargs: Any, name: str) -> Any:
        x, *vectors, eps, activation, _, _ = args
        y = finish(ctx, target, name, normalise(ctx, target, name, x, vectors, eps), None, activation)
        pooled = impl.pool.max_poolNd(ctx, target, SourceIR.ATEN, f"{name}_pool", y, (3, 3), (2, 2), (1, 1))
        return pooled, None
