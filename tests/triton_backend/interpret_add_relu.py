"""add_relu: the kernels against torch, in the interpreter."""

from __future__ import annotations

import pytest
import torch
from harness import DTYPES, assert_guards, guarded, track

from fused_resnet.backends import reference
from fused_resnet.backends import triton as backend

pytestmark = pytest.mark.usefixtures("poison")
SHAPES = [
    pytest.param((2, 64, 8, 8), id="whole-blocks"),
    pytest.param((1, 3, 7, 5), id="one-part-block"),
    pytest.param((3, 67, 5, 11), id="ragged"),
]


@pytest.mark.parametrize("layout", ["nhwc", "nchw"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equals_torch(shape, dtype, layout):
    x, residual, grad = (guarded(shape, dtype, layout, seed=seed) for seed in range(3))
    x[0, 0, 0, 0] = float("nan")
    with track():
        out = backend.add_relu_forward(x, residual)
        grad_x = backend.add_relu_backward(grad, out)
    assert torch.equal(out.nan_to_num(7), reference.add_relu_forward(x, residual).nan_to_num(7))
    assert torch.equal(grad_x, reference.add_relu_backward(grad, out))
    assert_guards(x, residual, grad)
