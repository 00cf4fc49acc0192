"""The convolutions of CUTLASS on a GPU, both tiles of them, against float64 and torch's own convolution."""

from __future__ import annotations

import functools
import warnings

import conv_layers
import pytest
import torch
from conv_layers import LAYERS, inputs
from torch import Tensor

import fused_resnet as fr
from fused_resnet import parity
from fused_resnet.backends import cpp, reference
from fused_resnet.backends import cutlass as backend

_REASON = cpp.unavailable("cuda") or cpp.cutlass_unavailable()
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(_REASON is not None, reason=f"cpp: {_REASON}")]

DTYPES = backend.DTYPES
check = functools.partial(conv_layers.check, backend)
SERVED = {name: layer for name, layer in LAYERS.items() if layer[1] % 8 == 0 and layer[3] % 8 == 0 and layer[-1] == 1}


def refusal(layer: str, dtype: torch.dtype, op: str = "conv_bn_act") -> str | None:
    x, weight, *_, residual, stride, padding, dilation, groups, _, _ = inputs(layer, dtype)
    return backend.refusal(op, x, weight, residual, stride, padding, dilation, groups)


def test_layers_of_every_kind_are_served():
    assert {name.split()[0] for name in SERVED} == {"1x1", "3x3"}
    assert len(SERVED) >= 8


@pytest.mark.parametrize("op", ["conv_bias_act", "conv_bn_act"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_self_check_passes(dtype, op):
    assert refusal("3x3 stage 3", dtype, op) is None


@pytest.mark.parametrize("layer", SERVED)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_batch_norm_residual_and_relu(dtype, layer):
    assert refusal(layer, dtype) is None
    check(layer, inputs(layer, dtype))


@pytest.mark.parametrize("layer", ["1x1 widen", "3x3 stage 2", "3x3 stage 4"])
@pytest.mark.parametrize("activation", ["relu", None])
@pytest.mark.parametrize("with_residual", [True, False])
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bias_residual_and_relu_as_they_are_asked_for(dtype, with_bias, with_residual, activation, layer):
    x, weight, _, bias, *_, residual, stride, padding, dilation, groups, _, _ = inputs(layer, dtype)
    args = (x, weight, bias.to(dtype) if with_bias else None, residual if with_residual else None)
    args = (*args, stride, padding, dilation, groups, activation)
    exact = reference.conv_bias_act_forward(*(a.double() if isinstance(a, Tensor) else a for a in args))
    row = parity.compare(layer, backend.conv_bias_act_forward(*args), reference.conv_bias_act_forward(*args), exact)
    assert row.ok, row


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        ("7x7 stem", "input and output channels must be multiples of 8"),
        ("1x1 ragged", "input and output channels must be multiples of 8"),
        ("groups of 32", "it has no groups"),
    ],
)
def test_other_calls_are_served_by_torch_and_one_pass(layer, reason):
    args = inputs(layer, torch.float16)
    assert refusal(layer, torch.float16) == reason
    cpp._warn_of.cache_clear()
    with pytest.warns(UserWarning, match=reason):
        conv_layers.check(cpp, layer, args)


def test_nan_and_infinity_pass_and_stay_where_they_are():
    conv_layers.check_nan_and_infinity(backend, "3x3 stage 3", torch.float16)


def test_a_residual_that_is_not_there_is_not_read():
    """What an uninitialised output holds must not get into the result."""
    args = list(inputs("3x3 stage 3", torch.float16))
    args[7] = None
    for _ in range(3):
        torch.full_like(inputs("3x3 stage 3", torch.float16)[7], torch.nan)  # freed at once: the next output's memory
        assert not check("3x3 stage 3", tuple(args)).isnan().any()


def test_graph_replays_read_the_live_buffers():
    conv_layers.check_graph_replays(backend)


def test_runs_on_the_current_stream():
    conv_layers.check_stream(backend)


@pytest.mark.parametrize("layer", ["3x3 stage 4", "1x1 widen"])
def test_is_deterministic(layer):
    args = inputs(layer, torch.bfloat16)
    first = backend.conv_bn_act_forward(*args)
    assert all(torch.equal(first, backend.conv_bn_act_forward(*args)) for _ in range(5))


def test_a_network_on_request():
    """All but the stem's convolution; the weights are packed once."""
    torch.manual_seed(0)
    model = fr.resnet50().cuda().half().eval()
    x = torch.randn(4, 3, 64, 64, device="cuda").half().contiguous(memory_format=torch.channels_last)
    with torch.inference_mode(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with fr.use_backend("reference"):
            plain, exact = model(x), model.double()(x.double())
        model.half()
        with fr.use_backend("cpp"):
            ours = model(x)
    row = parity.compare("resnet50", ours, plain, exact)
    assert row.ok, row
