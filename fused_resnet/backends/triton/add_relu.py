"""relu(x + residual) and its backward pass, elementwise over dense tensors of one layout."""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fused_resnet.backends.triton import configs
from fused_resnet.backends.triton.common import load, relu, relu_grad, store
from fused_resnet.backends.triton.runtime import ceil_div, launch


@triton.jit
def add_relu_forward_kernel(x, residual, out, numel, BLOCK: tl.constexpr):
    """out = relu(x + residual)."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < numel
    store(out + at, relu(load(x + at, mask) + load(residual + at, mask)), mask)


@triton.jit
def add_relu_backward_kernel(grad, out, grad_x, numel, BLOCK: tl.constexpr):
    """grad_x = grad where out > 0 or out is NaN, else 0."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < numel
    store(grad_x + at, relu_grad(load(grad + at, mask), load(out + at, mask)), mask)


def _config(vectors: int, warps: int, itemsize: int) -> configs.Config:
    """Each thread handles `vectors` vectors of 16 bytes."""
    return {"BLOCK": vectors * warps * 32 * 16 // itemsize, "num_warps": warps}


def _default(target: configs.Target, key: configs.Key) -> configs.Config:
    return _config(2, 4, int(key[0]))


def _candidates(target: configs.Target, key: configs.Key) -> list[configs.Config]:
    return [_config(vectors, warps, int(key[0])) for vectors, warps in ((1, 4), (1, 8), (2, 8), (4, 4))]


SPACE = configs.Space(_default, _candidates)
FORWARD = configs.register("add_relu_forward", SPACE)
BACKWARD = configs.register("add_relu_backward", SPACE)


def _elementwise(kernel: Any, name: str, a: Tensor, b: Tensor) -> Tensor:
    result = torch.empty_like(a)
    numel = a.numel()
    if numel:
        config = configs.pick(name, (a.element_size(),), a)
        launch(kernel, (ceil_div(numel, config["BLOCK"]),), a, b, result, numel, **config)
    return result


def add_relu_forward(x: Tensor, residual: Tensor) -> Tensor:
    return _elementwise(add_relu_forward_kernel, FORWARD, x, residual)


def add_relu_backward(grad: Tensor, out: Tensor) -> Tensor:
    return _elementwise(add_relu_backward_kernel, BACKWARD, grad, out)
