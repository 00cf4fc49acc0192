"""Every formula that kernels share, once. Arithmetic is in float32, whatever the storage type."""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load(pointer, mask):
    """Values in float32, 0 where masked."""
    return tl.load(pointer, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def store(pointer, value, mask):
    """Round to the pointer's type, to nearest even, and store."""
    tl.store(pointer, value.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def relu(value):
    """max(value, 0); NaN stays NaN."""
    return tl.where(value < 0, 0.0, value)


@triton.jit
def relu_grad(grad, out):
    """The gradient through a ReLU whose output (or input) was `out`; NaN lets it pass."""
    return tl.where(out <= 0, 0.0, grad)
