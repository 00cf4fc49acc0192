"""16-bit convolutions on a CPU without instructions for them: computed in float32 and rounded once."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from networks import assert_block_within_budget, images, randomise
from torch import Tensor, nn
from torch.nn import functional as F

import fused_resnet as fr
from fused_resnet import dispatch, emulation
from fused_resnet.frozen import FrozenConv
from fused_resnet.ops.conv import ConvFunction, conv2d
from fused_resnet.ops.residual_block import Plan
from fused_resnet.parity import relative_error

DTYPES = (torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def without_instructions(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on such a CPU, whatever this one has."""
    monkeypatch.setattr(emulation, "_has_instructions", lambda dtype: False)


def tensors(dtype: torch.dtype, channels_last: bool, groups: int = 1) -> tuple[Tensor, ...]:
    x, weight = images(2, 32, 9, 7).to(dtype), images(64, 32 // groups, 3, 3, seed=1).to(dtype) / 8
    bias, residual = images(64, 1, 1, 1, seed=2).flatten().to(dtype), images(2, 64, 9, 7, seed=3).to(dtype)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return x.contiguous(memory_format=layout), weight, bias, residual.contiguous(memory_format=layout)


def wide(values: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(value.float() if isinstance(value, Tensor) else value for value in values)


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@torch.no_grad()
def test_results_are_those_of_float32_rounded_once(dtype: torch.dtype, channels_last: bool, groups: int) -> None:
    x, weight, bias, residual = tensors(dtype, channels_last, groups)
    given = x.clone(), residual.clone()
    vectors = [torch.rand(64).to(dtype) + 0.5 for _ in range(4)]
    for last, activation in itertools.product((None, residual), ("relu", None)):
        options: Any = {"padding": 1, "groups": groups, "activation": activation}
        args = (x, weight, bias, last)
        out = fr.ops.conv_bias_act(*args, **options)
        assert out.dtype == dtype
        assert torch.equal(out, fr.ops.conv_bias_act(*wide(args), **options).to(dtype))
        args = (x, weight, *vectors, last)
        out = fr.ops.conv_bn_act(*args, training=False, **options)
        assert torch.equal(out, fr.ops.conv_bn_act(*wide(args), training=False, **options).to(dtype))
    assert torch.equal(x, given[0])
    assert torch.equal(residual, given[1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@torch.no_grad()
def test_a_backend_on_request_computes_as_it_does(dtype: torch.dtype) -> None:
    x, weight, bias, _ = tensors(dtype, True)
    with fr.use_backend("reference"):
        assert not dispatch.in_float32(dtype, "cpu")
        assert torch.equal(conv2d(x, weight, bias, (1, 1), (1, 1), (1, 1), 1), F.conv2d(x, weight, bias, padding=1))


def test_only_16_bits_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    assert all(emulation.emulates(dtype, "cpu") for dtype in DTYPES)
    assert not any(emulation.emulates(dtype, "cuda") for dtype in DTYPES)
    assert not any(emulation.emulates(dtype, "cpu") for dtype in (torch.float32, torch.float64, torch.int32))
    monkeypatch.setattr(emulation, "_has_instructions", lambda dtype: True)
    assert not any(dispatch.in_float32(dtype, "cpu") for dtype in DTYPES)


def test_instructions_are_what_the_cpu_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    for avx512, native in ((True, True), (True, False)):
        emulation._has_instructions.cache_clear()
        with monkeypatch.context() as patch:
            patch.setattr(emulation.platform, "machine", lambda: "x86_64")
            patch.setattr(torch.cpu, "_is_avx512_supported", lambda avx512=avx512: avx512)
            patch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda native=native: native)
            assert emulation.emulates(torch.bfloat16, "cpu") is not native
            patch.setattr(emulation.platform, "machine", lambda: "aarch64")
            emulation._has_instructions.cache_clear()
            assert not emulation.emulates(torch.bfloat16, "cpu")  # torch decides there
    emulation._has_instructions.cache_clear()


def small(dtype: torch.dtype) -> nn.Module:
    model = fr.ResNet(fr.Bottleneck, [2, 1, 1, 1], num_classes=10, width_per_group=16)
    randomise(model)
    return model.eval().to(dtype)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@torch.no_grad()
def test_networks_are_nearer_to_float64_than_torch(dtype: torch.dtype, frozen: bool) -> None:
    model, x = small(dtype), images(2, 3, 64, 64).to(dtype)
    exact = fr.restore(copy.deepcopy(model)).double()(x.double())
    plain = fr.restore(copy.deepcopy(model))(x)
    ours = fr.freeze(model) if frozen else model
    out = ours(x)
    assert out.dtype == dtype
    assert torch.equal(out, ours(x))  # the first call, which makes the plans, gives the same
    assert relative_error(out, exact) <= relative_error(plain, exact)


@torch.no_grad()
def test_frozen_convs_round_where_others_read() -> None:
    model, x = small(torch.bfloat16), images(2, 3, 64, 64).to(torch.bfloat16)
    frozen = fr.freeze(model)
    seen = {}
    for name, module in frozen.named_modules():
        if isinstance(module, FrozenConv):
            module.register_forward_hook(lambda _, args, out, name=name: seen.update({name: out.dtype}))
    assert frozen(x).dtype == torch.bfloat16
    last = next(reversed(seen))
    assert seen.pop(last) == torch.bfloat16  # which the average pool reads
    assert set(seen.values()) == {torch.float32}
    with torch.autocast("cpu", torch.bfloat16):
        out = fr.freeze(small(torch.float32))(x.float())
        assert out.dtype == torch.bfloat16
    assert frozen.to(torch.float32)(x.float()).dtype == torch.float32


@torch.no_grad()
def test_frozen_models_still_refuse_other_dtypes() -> None:
    frozen = fr.freeze(small(torch.bfloat16))
    with pytest.raises(TypeError, match=r"weight is torch\.bfloat16, expected torch\.float32"):
        frozen(images(1, 3, 64, 64))
    frozen = fr.freeze(small(torch.float32))
    with pytest.raises(TypeError, match=r"weight is torch\.float32, expected torch\.bfloat16"):
        frozen(images(1, 3, 64, 64).to(torch.bfloat16))


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients(dtype: torch.dtype, channels_last: bool) -> None:
    x, weight, bias, grad = tensors(dtype, channels_last)
    results = []
    for cast in (dtype, torch.float32):
        leaves = [t.to(cast).clone(memory_format=torch.preserve_format).requires_grad_() for t in (x, weight, bias)]
        out = conv2d(*leaves, (1, 1), (1, 1), (1, 1), 1)
        assert cast != dtype or isinstance(out.grad_fn, ConvFunction._backward_cls)  # type: ignore[attr-defined]
        out.backward(grad.to(cast))
        results.append([out.detach(), *(leaf.grad for leaf in leaves)])
    for ours, exact in zip(*results, strict=True):
        assert ours.dtype == dtype
        torch.testing.assert_close(ours, exact.to(dtype), rtol=torch.finfo(dtype).eps, atol=1e-3)


def test_autocast_trains_by_it() -> None:
    conv, x = nn.Conv2d(32, 64, 3, padding=1), images(2, 32, 9, 7)
    with torch.autocast("cpu", torch.bfloat16):
        out = conv2d(x, conv.weight, conv.bias, (1, 1), (1, 1), (1, 1), 1)
    assert out.dtype == torch.bfloat16
    out.sum().backward()
    assert conv.weight.grad is not None
    assert conv.weight.grad.dtype == torch.float32


@pytest.mark.parametrize("gram", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_whole_blocks(dtype: torch.dtype, gram: bool) -> None:
    torch.manual_seed(0)
    block = fr.Bottleneck(64, 16).to(dtype)
    randomise(block)
    x = images(4, 64, 12, 10).to(dtype).contiguous(memory_format=torch.channels_last)
    assert_block_within_budget(block, x, Plan(gram, False))
