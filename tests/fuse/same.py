"""A fused model beside an untouched copy of itself: one float64 step, tensor by tensor, in training and evaluation."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from networks import assert_same_step, randomise, relative
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import fused_resnet as fr
from fused_resnet.fusion.report import FuseReport


def tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


def step(model: nn.Module, *inputs: Tensor, call: Callable[..., Any] | None = None) -> dict[str, Tensor]:
    """Outputs, gradients (the inputs' too), buffers and the inputs themselves after one pass forward and back."""
    model.zero_grad()
    leaves = [x.detach().clone(memory_format=torch.preserve_format).requires_grad_() for x in inputs]
    given = [x * 1 for x in leaves]  # not leaves: a forward may write to them
    torch.manual_seed(0)
    outputs = tensors(model(*given) if call is None else call(model, *given))
    generator = torch.Generator().manual_seed(1)
    found = {f"output {i}": out.detach().clone() for i, out in enumerate(outputs)}
    terms = [
        (out * torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out.dtype)).sum()
        for out in outputs
        if out.requires_grad
    ]
    if terms:
        torch.stack(terms).sum().backward()
    found |= {f"gradient input {i}": x.grad for i, x in enumerate(leaves) if x.grad is not None}
    found |= {f"input {i}": x.detach().clone() for i, x in enumerate(given)}
    found |= {f"gradient {name}": p.grad for name, p in model.named_parameters() if p.grad is not None}
    return found | {f"buffer {name}": b.detach().clone() for name, b in model.named_buffers()}


def assert_same(ours: nn.Module, theirs: nn.Module, *inputs: Tensor, call: Callable[..., Any] | None = None) -> None:
    """Two models of one state, as they are (float64) and in the mode they are in; both are left one step on."""
    torch.manual_seed(0)
    a = step(ours, *inputs, call=call)
    torch.manual_seed(0)
    b = step(theirs, *inputs, call=call)
    assert_same_step(a, b)
    for x, y in zip(*([o for n, o in s.items() if n.startswith("input")] for s in (a, b)), strict=True):
        assert torch.allclose(x, y, rtol=1e-12, atol=0), "an input was written to"


def _infer(model: nn.Module, *inputs: Tensor) -> list[Tensor]:
    torch.manual_seed(0)
    return tensors(model(*(x.clone() for x in inputs)))


def assert_fuses_as_itself(
    model: nn.Module,
    *inputs: Tensor,
    call: Callable[..., Any] | None = None,
    gradients: bool = True,
    stateful: bool = False,
) -> FuseReport:
    """Fuse the model and hold it, in training, in evaluation and in inference, against a copy from before."""
    randomise(model)
    model.double()
    inputs = tuple(x.double() for x in inputs)
    before = copy.deepcopy(model)
    report = fr.fuse(model)
    for mode in (True, False) if gradients else ():
        model.train(mode)
        before.train(mode)
        for _ in range(2):  # running statistics of one step reach the next
            assert_same(model, before, *inputs, call=call)
    model.eval()
    before.eval()
    with torch.no_grad():
        ours, theirs = (_infer(m, *inputs) for m in (model, before))
    for a, b in zip(ours, theirs, strict=True):
        assert a.shape == b.shape
        assert relative(a, b) < 1e-10
    # float32: the library's fused convs, which float64 does not have
    single, inputs = copy.deepcopy(model).float(), tuple(x.float() for x in inputs)
    if stateful:
        return report
    with torch.no_grad():
        for a, b in zip(_infer(single, *inputs), theirs, strict=True):
            assert relative(a, b) < 1e-4
    return report
