"""`ops.residual_block`: whole blocks as one Function, in every form, beside torch's own modules in float64."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable

import pytest
import torch
from networks import assert_block_within_budget, block_step, projection, run_block
from torch import Tensor, nn

import fused_resnet as fr
from fused_resnet.blocks import ResidualBlock
from fused_resnet.cli import load_benchmarks
from fused_resnet.ops import residual_block as rb

saved_bytes = load_benchmarks("saved").saved_bytes


def _all_grouped() -> tuple[ResidualBlock, int]:
    block = fr.Bottleneck(8, 4, 2, projection(8, 16, 2))
    for name, inputs, outputs, stride in (("conv1", 8, 4, 1), ("conv3", 4, 16, 1)):
        setattr(block, name, nn.Conv2d(inputs, outputs, 1, stride, groups=2, bias=False))
    block.downsample[0] = nn.Conv2d(8, 16, 1, 2, groups=4, bias=False)
    return block, 8


BLOCKS: dict[str, Callable[[], tuple[ResidualBlock, int]]] = {
    "basic": lambda: (fr.BasicBlock(6, 6), 6),
    "basic, projection": lambda: (fr.BasicBlock(5, 6, 2, projection(5, 6, 2)), 5),
    "bottleneck": lambda: (fr.Bottleneck(12, 3), 12),
    "bottleneck, projection": lambda: (fr.Bottleneck(5, 3, 1, projection(5, 12, 1)), 5),
    "bottleneck, stride 2": lambda: (fr.Bottleneck(6, 3, 2, projection(6, 12, 2)), 6),
    "bottleneck, groups": lambda: (fr.Bottleneck(16, 4, groups=2, base_width=64), 16),
    "bottleneck, groups, stride 2": lambda: (
        fr.Bottleneck(12, 4, 2, projection(12, 16, 2), groups=2, base_width=64),
        12,
    ),
    "bottleneck, groups everywhere": _all_grouped,
    "bottleneck, dilation": lambda: (fr.Bottleneck(12, 3, dilation=2), 12),
}


def _randomise(block: nn.Module) -> None:
    for module in block.modules():
        if isinstance(module, nn.BatchNorm2d):
            if module.affine:
                nn.init.normal_(module.weight)  # both signs
                nn.init.normal_(module.bias)
            if module.running_mean is not None:
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2)


PLANS = [
    rb.Plan(gram, gram, memory, prologue)
    for gram, memory, prologue in itertools.product((True, False), ("balanced", "low"), (False, True))
]


@pytest.mark.parametrize("plan", PLANS, ids=str)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", BLOCKS)
def test_float64_formulas(name: str, training: bool, plan: rb.Plan) -> None:
    block, channels = BLOCKS[name]()
    if isinstance(block, fr.BasicBlock):
        plan = plan._replace(gram=False)  # its last conv is 3x3; the projection still takes the Gram form
    elif block.conv3.groups > 1:
        plan = plan._replace(gram=False, gram_projection=False)
    _randomise(block)
    block.double().train(training)
    plain = fr.restore(copy.deepcopy(block))
    x = torch.randn(3, channels, 7, 9, dtype=torch.float64).to(memory_format=torch.channels_last)
    ours = block_step(block, x, lambda x: run_block(block, x, plan))
    theirs = block_step(plain, x, plain)
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        torch.testing.assert_close(ours[key], value, rtol=1e-9, atol=1e-9, msg=lambda m, key=key: f"{key}: {m}")


@pytest.mark.parametrize("plan", PLANS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_error_budget(dtype: torch.dtype, plan: rb.Plan) -> None:
    block = fr.Bottleneck(24, 8, 2, projection(24, 32, 2))
    _randomise(block)
    x = torch.randn(4, 24, 14, 14).to(dtype).to(memory_format=torch.channels_last)
    block.to(dtype)
    for module in block.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.float()
    assert_block_within_budget(block, x, plan)


@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_gradcheck(plan: rb.Plan) -> None:
    block = fr.Bottleneck(4, 2, 2, projection(4, 8, 2)).double()
    _randomise(block)
    x = torch.randn(2, 4, 5, 4, dtype=torch.float64).to(memory_format=torch.channels_last).requires_grad_()
    parameters = tuple(block.parameters())
    for module in block.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean = module.running_var = None  # gradcheck calls often; a function has no state
    assert torch.autograd.gradcheck(lambda x, *_: run_block(block, x, plan), (x, *parameters))


def test_what_is_kept() -> None:
    """x, the raw conv outputs and the block's output; in Gram form not the wide one; with "low" none of them."""
    block = fr.Bottleneck(64, 16)
    x = torch.randn(8, 64, 28, 28).to(memory_format=torch.channels_last).requires_grad_()
    wide, narrow = x.numel() * 4, x.numel()

    def kept(plan: rb.Plan) -> float:
        return saved_bytes(lambda: run_block(block, x, plan), block.parameters())

    small = 0.02 * wide
    assert kept(rb.Plan(True, True)) == pytest.approx(2 * wide + 2 * narrow, abs=small)
    assert kept(rb.Plan(False, False)) == pytest.approx(3 * wide + 2 * narrow, abs=small)
    assert kept(rb.Plan(True, True, "low")) == pytest.approx(2 * wide, abs=small)
    assert kept(rb.Plan(False, False, "low")) == pytest.approx(2 * wide, abs=small)


def _hard_gram_case(kind: str) -> tuple[fr.Bottleneck, Tensor]:
    block = fr.Bottleneck(32, 8)
    _randomise(block)
    x = torch.randn(4, 32, 9, 9).to(memory_format=torch.channels_last)
    with torch.no_grad():
        if kind == "mean >> std":
            block.bn2.weight.mul_(1e-3)
            block.bn2.bias.fill_(10.0)
        elif kind == "dead channels":
            block.bn2.bias[:4] = -100.0
        elif kind == "gamma 0":
            block.bn3.weight[::2] = 0.0
        elif kind == "null space":  # two inputs of conv3 are equal, and its weights cancel them
            block.conv2.weight[1] = block.conv2.weight[0]
            block.bn2.weight[1], block.bn2.bias[1] = block.bn2.weight[0], block.bn2.bias[0]
            block.conv3.weight.mul_(1e-4)
            block.conv3.weight[:, 0] = 1.0
            block.conv3.weight[:, 1] = -1.0
    return block, x


@pytest.mark.parametrize("kind", ["mean >> std", "dead channels", "gamma 0", "null space"])
def test_hard_statistics(kind: str) -> None:
    """Where second moments cancel, the plan must fall back to stored outputs rather than lose digits."""
    block, x = _hard_gram_case(kind)
    assert_block_within_budget(block, x, rb.Plan(True, True))


@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_nan_is_not_hidden(plan: rb.Plan) -> None:
    block = fr.Bottleneck(32, 8)
    x = torch.randn(2, 32, 5, 5).to(memory_format=torch.channels_last)
    x[0, 3, 2, 2] = float("nan")
    assert run_block(block, x, plan).isnan().all()


def test_deterministic_and_differentiable_once() -> None:
    block = fr.Bottleneck(32, 8)
    x = torch.randn(4, 32, 9, 9).to(memory_format=torch.channels_last).requires_grad_()
    first, second = (
        block_step(copy.deepcopy(block), x.detach(), lambda x: run_block(block, x, PLANS[0])) for _ in range(2)
    )
    assert torch.equal(first["out"], second["out"])
    assert torch.equal(first["x"], second["x"])
    (grad,) = torch.autograd.grad(run_block(block, x, PLANS[0]).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()
