"""Do the kernels agree with `reference` on this device? Asked once per process, before they are chosen automatically.

Small tensors go through every primitive of an op. A result passes where its relative error against
float64 is at most twice that of `reference` in the same dtype, plus a few roundings. Where a backend
has `variants(op, x)`, contexts, its kernels must agree in each of them as well.
"""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from fused_resnet.backends import reference

Results = dict[str, Tensor]
Geometry = tuple[tuple[int, int], tuple[int, int], tuple[int, int], int]  # stride, padding, dilation, groups
EPS = 1e-5
COPIES = 20  # of the images, so that a convolution has work for every multiprocessor
SUMS = 2e-6  # granted to float32 sums, which torch forms in another order


def _add_relu(module: ModuleType, x: Tensor, y: Tensor, grad: Tensor) -> Results:
    out = module.add_relu_forward(x, y)
    return {"out": out, "grad": module.add_relu_backward(grad, x)}


def _bn_act(module: ModuleType, x: Tensor, y: Tensor, grad: Tensor) -> Results:
    gamma, beta, running_mean, running_var = _bn(x)
    results: Results = {}
    for residual in (None, y):
        forward = (gamma, beta, running_mean, running_var, residual, 0.1, EPS, "relu")
        out, mean, var = module.bn_act_train_forward(x, *forward)
        keep = None if residual is None else y  # any tensor serves as the mask, the same for every module
        statistics = _bn(x)[2:]
        grads = module.bn_act_backward(
            grad, x, keep, gamma, beta, *statistics, EPS, "relu", residual is None, residual is not None
        )
        found = (out, mean, var, running_mean, running_var, *grads)
        results |= {f"{i} {residual is None}": t for i, t in enumerate(found) if t is not None}
    results["eval"] = module.bn_act_eval_forward(x, gamma, beta, *_bn(x)[2:], y, EPS, "relu")
    return results


def _bn_bn_act(module: ModuleType, x: Tensor, y: Tensor, grad: Tensor) -> Results:
    first, second = _bn(x), _bn(y)
    options = (0.1, EPS)
    forward = module.bn_bn_act_train_forward(x, *first, *options, y, *second, *options, "relu")
    backward = module.bn_bn_act_backward(grad, x, *_bn(x), EPS, y, *_bn(y), EPS, "relu")
    return {str(i): t for i, t in enumerate((*forward, *backward))}


def _bn_act_pool(module: ModuleType, x: Tensor, y: Tensor, grad: Tensor) -> Results:
    gamma, beta, running_mean, running_var = _bn(x)
    options = (0.1, EPS, "relu", True)
    out, offsets, mean, var = module.bn_act_pool_train_forward(x, gamma, beta, running_mean, running_var, *options)
    y = reference.bn_act_eval_forward(x, gamma, beta, mean, var, None, EPS, "relu")
    chosen = y.flatten(2).gather(2, reference.pool_indices(offsets, x.shape[3]).flatten(2)).view(out.shape)
    windows = grad[:, :, : out.shape[2], : out.shape[3]].contiguous(memory_format=_format(x))
    valid = torch.full_like(windows, 4, dtype=torch.uint8)  # each window's middle, the same for every module
    valid[:, :, 1:, 1:] = 0
    results: Results = {"out": out, "chosen": chosen, "mean": mean, "var": var}
    for training in (True, False):
        grads = module.bn_act_pool_backward(windows, valid, x, gamma, beta, *_bn(x)[2:], EPS, "relu", training)
        results |= {f"{i} {training}": t for i, t in enumerate(grads)}
    return results | {"eval": module.bn_act_pool_eval_forward(x, gamma, beta, *_bn(x)[2:], EPS, "relu", False)[0]}


def _prologue(module: ModuleType, x: Tensor, y: Tensor, grad: Tensor) -> Results:
    """A 3x3 conv between two BNs, a 1x1 conv of many pixels, and the products of the Gram form."""
    x, y, grad = (t.contiguous(memory_format=torch.channels_last) for t in (x, y, grad))
    channels = x.shape[1]
    weight = _weight(channels, x, 3).contiguous()
    bn = _bn_of(x)
    mean, var, _, beta, _ = bn
    sums = (10 * mean, 10 * beta)
    same, one = ((1, 1), (1, 1), (1, 1)), (1, 1)
    square = weight[:, :, 1, 1].contiguous()
    point = square.view(channels, channels, 1, 1)
    many = _eights(x).repeat(COPIES, 1, 1, 1).contiguous(memory_format=torch.channels_last)
    wide, dense = _weight(4 * many.shape[1], many, 1), ((1, 1), (0, 0), (1, 1))
    found = {
        "forward": module.prologue_conv_forward(x, bn, weight, *same, True, None, None, 0.1),
        "input": module.prologue_conv_grad_input(grad, y, bn, sums, weight, x, bn, None, *same),
        "first": module.prologue_conv_grad_input(grad, y, bn, None, weight, x, None, y, *same),
        "1x1": module.prologue_conv_forward(many, _bn_of(many), wide, *dense, True, None, None, 0.1),
        "1x1 input": module.prologue_conv_grad_input(grad, y, bn, sums, point, x, bn, None, *dense),
        "weight": [module.prologue_conv_grad_weight(grad, y, bn, sums, x, bn, (3, 3), *same)],
        "moments": module.prologue_moments(x, bn, one),
        "products": module.prologue_products(grad, x, bn, one),
        "end": [module.prologue_end_forward(x, bn, point, y, point, beta, grad, one, one, "relu")],
        "back": module.prologue_end_backward(grad, square, x, bn, square, beta, one),
        "mask": module.bn_mask_backward(grad, x, y, mean, var, EPS),
    }
    return {f"{name} {i}": t for name, several in found.items() for i, t in enumerate(several) if t is not None}


def _weight(channels: int, x: Tensor, kernel: int) -> Tensor:
    """Fixed values without a pattern, for a conv of x to so many channels."""
    inner = x.shape[1] * kernel * kernel
    steps = torch.arange(channels * inner, device=x.device) * 31 % 97
    weight = ((steps - 48) / (28 * inner**0.5)).to(x.dtype).view(channels, x.shape[1], kernel, kernel)
    return weight.contiguous(memory_format=_format(x))


def _eights(x: Tensor) -> Tensor:
    """Its first channels, as many as 8 divides."""
    return x[:, : x.shape[1] // 8 * 8].contiguous(memory_format=_format(x))


def _convolutions(x: Tensor, y: Tensor) -> Iterator[tuple[str, Tensor, Tensor, Tensor, Geometry]]:
    """(name, input, weight, residual, geometry): as many tiles as a GPU has multiprocessors, few, and ragged ones."""
    few = _eights(x)
    many = few.repeat(COPIES, 1, 1, 1).contiguous(memory_format=_format(x))
    cases = {
        "3x3 wide": (many, 128, 3, ((1, 1), (1, 1), (1, 1), 1)),
        "3x3": (few, 72, 3, ((2, 1), (2, 1), (2, 1), 1)),
        "1x1": (few, 200, 1, ((1, 2), (0, 0), (1, 1), 1)),
    }
    for name, (read, wide, kernel, geometry) in cases.items():
        weight = _weight(wide, read, kernel)
        shape = reference.conv_bias_act_forward(read, weight, None, None, *geometry, None).shape
        values = y.flatten().repeat(math.ceil(shape.numel() / y.numel()))[: shape.numel()]
        yield name, read, weight, values.view(shape).contiguous(memory_format=_format(x)), geometry


def _conv_bias_act(module: ModuleType, x: Tensor, y: Tensor, grad: Tensor) -> Results:
    results: Results = {}
    for name, read, weight, residual, geometry in _convolutions(x, y):
        bias = _bn(weight.transpose(0, 1))[1].to(x.dtype)
        results[name] = module.conv_bias_act_forward(read, weight, bias, residual, *geometry, "relu")
        results[f"{name} alone"] = module.conv_bias_act_forward(read, weight, None, None, *geometry, None)
    return results


def _conv_bn_act(module: ModuleType, x: Tensor, y: Tensor, grad: Tensor) -> Results:
    results: Results = {}
    for name, read, weight, residual, geometry in _convolutions(x, y):
        bn = _bn(weight.transpose(0, 1))
        results[name] = module.conv_bn_act_forward(read, weight, None, *bn, residual, *geometry, EPS, "relu")
        bias = bn[1].to(x.dtype)
        results[f"{name} alone"] = module.conv_bn_act_forward(
            read, weight, bias, None, None, *bn[2:], None, *geometry, EPS, None
        )
    return results


def _bn(x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Fresh gamma, beta, running mean and variance."""
    steps = torch.arange(x.shape[1], device=x.device) % 5
    kind = torch.float64 if x.dtype == torch.float64 else torch.float32
    return tuple((a + b * steps).to(kind) for a, b in ((0.5, 0.25), (-0.5, 0.25), (-0.1, 0.05), (0.8, 0.1)))  # type: ignore[return-value]


def _bn_of(x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, float]:
    """`_bn` as operands of convolutions have it."""
    gamma, beta, mean, var = _bn(x)
    return mean, var, gamma, beta, EPS


def _format(x: Tensor) -> torch.memory_format:
    return torch.contiguous_format if x.is_contiguous() else torch.channels_last


CHECKS: dict[str, Callable[[ModuleType, Tensor, Tensor, Tensor], Results]] = {
    "add_relu": _add_relu,
    "bn_act": _bn_act,
    "bn_bn_act": _bn_bn_act,
    "bn_act_pool": _bn_act_pool,
    "conv_bias_act": _conv_bias_act,
    "conv_bn_act": _conv_bn_act,
    "prologue": _prologue,
}


def _inputs(device: torch.device, dtype: torch.dtype, nchw: bool) -> Iterator[list[Tensor]]:
    generator = torch.Generator().manual_seed(0)
    for shape in ((4, 64, 16, 16), (2, 19, 9, 11)):
        values = [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(3)]
        form = torch.contiguous_format if nchw else torch.channels_last
        yield [v.to(device, dtype).contiguous(memory_format=form) for v in values]


def _relative_error(value: Tensor, exact: Tensor) -> float:
    return float(torch.linalg.vector_norm(value.double() - exact) / torch.linalg.vector_norm(exact))


def _complaint(ours: Results, plain: Results, exact: Results) -> str | None:
    for name, value in ours.items():
        error, allowed = (_relative_error(t, exact[name]) for t in (value, plain[name]))
        budget = 2 * allowed + 4 * torch.finfo(value.dtype).eps + (0.0 if value.dim() == 4 else SUMS)
        if not error <= budget:
            return f"{name} of {tuple(value.shape)}: relative error {error:.1e}, {allowed:.1e} in torch"
    return None


class Case(NamedTuple):
    """What is proven at once."""

    op: str
    device: torch.device
    dtype: torch.dtype
    nchw: bool


def untested(backend: ModuleType, op: str, x: Tensor, tested: dict[Case, str | None]) -> str | None:
    """None where the backend's kernels of an op agree on x's device, dtype and layout, else the reason.

    Run by the first question of a case; `tested` keeps the answers.
    """
    case = Case(op, x.device, x.dtype, x.is_contiguous())
    if case in tested:
        return tested[case]
    if x.is_cuda and torch.cuda.is_current_stream_capturing():
        return "a CUDA graph is being captured, and the kernels are not checked yet: run once before"
    reason = tested[case] = run(backend, case)
    return reason


def run(backend: ModuleType, case: Case) -> str | None:
    """None where all results are within the error budget, else the reason, which is warned about as well."""
    op, device, dtype, nchw = case
    check = CHECKS.get(op)
    if check is None:
        return "there is no self-check for it"
    variants = getattr(backend, "variants", lambda op, x: ())
    reason = None
    try:
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            for inputs in _inputs(device, dtype, nchw):
                exact, plain = check(reference, *(t.double() for t in inputs)), check(reference, *inputs)
                for context in (contextlib.nullcontext(), *variants(op, inputs[0])):
                    with context:
                        complaint = _complaint(check(backend, *inputs), plain, exact)
                    reason = reason or (complaint and f"its kernels differ from torch: {complaint}")
    except Exception as error:
        reason = f"its kernels fail: {type(error).__name__}: {error}"
    if reason is not None:
        where = f"{op} in {dtype}, {'NCHW' if nchw else 'NHWC'}, on {device}"
        name = backend.__name__.rpartition(".")[2]
        warnings.warn(f"fused_resnet: {name} will not be used for {where}: {reason}", stacklevel=2)
    return reason
