"""The Triton convolution on a GPU: every tile that tuning may choose, against float64 and torch's own convolution."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import conv_layers
import pytest
import torch
from conv_layers import LAYERS, inputs

from fused_resnet.backends import triton as backend

_REASON = backend.unavailable("cuda")
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(_REASON is not None, reason=f"triton: {_REASON}")]

DTYPES = (torch.bfloat16, torch.float16, torch.float32)

check = functools.partial(conv_layers.check, backend)


@pytest.fixture(params=["tf32", "ieee"])
def fp32(request: pytest.FixtureRequest) -> Iterator[str]:
    before = torch.backends.cudnn.conv.fp32_precision
    torch.backends.cudnn.conv.fp32_precision = request.param
    yield request.param
    torch.backends.cudnn.conv.fp32_precision = before


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bit(layer, dtype):
    check(layer, inputs(layer, dtype))


@pytest.mark.parametrize("layer", LAYERS)
def test_fp32(layer, fp32):
    check(layer, inputs(layer, torch.float32))


@pytest.mark.parametrize("layer", ["1x1 narrow", "3x3 stage 3", "7x7 stem, odd", "groups of 6"])
def test_nchw(layer):
    check(layer, inputs(layer, torch.float16, torch.contiguous_format))


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_tile(layer, dtype, fp32):
    """No config may be chosen that was not held against the library: compilers have got such loops wrong."""
    from fused_resnet.backends.triton import configs, conv

    if fp32 == "ieee" and dtype != torch.float32:
        pytest.skip("the switch is of fp32 alone")
    args = inputs(layer, dtype)
    seen: list[conv.Problem] = []
    pick = configs.pick
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(configs, "pick", lambda name, key, x: seen.append(key) or pick(name, key, x))
        backend.conv_bn_act_forward(*args)
    for config in configs.candidates(conv.CONV, seen[0], configs.target(args[0])):
        with configs.override(conv.CONV, config):
            check(f"{layer} {config}", args)


@pytest.mark.parametrize("layer", ["3x3 stage 3", "7x7 stem", "groups of 4"])
def test_nan_and_infinity_pass_and_stay_where_they_are(layer):
    conv_layers.check_nan_and_infinity(backend, layer, torch.float32)


@pytest.mark.parametrize("layer", ["3x3 stage 2", "3x3 one image"])
def test_graph_replays_read_the_live_buffers(layer):
    conv_layers.check_graph_replays(backend, layer)


def test_runs_on_the_current_stream():
    conv_layers.check_stream(backend)


@pytest.mark.parametrize("layer", ["3x3 stage 4", "3x3 one image"])  # the latter's inner axis is split
def test_is_deterministic(layer):
    args = inputs(layer, torch.bfloat16)
    first = backend.conv_bn_act_forward(*args)
    assert all(torch.equal(first, backend.conv_bn_act_forward(*args)) for _ in range(5))


def test_more_than_2_31_elements():
    N = 2**31 // (64 * 56 * 56) + 2
    if torch.cuda.mem_get_info()[0] < 6 * 2 * N * 64 * 56 * 56:
        pytest.skip("too little GPU memory free")
    x = torch.empty((N, 64, 56, 56), dtype=torch.bfloat16, device="cuda", memory_format=torch.channels_last)
    x[-2:].normal_()
    weight = inputs("3x3 stage 1", torch.bfloat16)[1]
    options = ((1, 1), (1, 1), (1, 1), 1, "relu")
    out = backend.conv_bias_act_forward(x, weight, None, None, *options)
    last = backend.conv_bias_act_forward(x[-2:].clone(), weight, None, None, *options)
    assert torch.equal(out[-2:], last)
