"""Networks of fused_resnet beside torchvision's with the same state, and the budget their results are held to.

The budget is that of `tolerances.py` on the scale of a whole tensor: relative errors in the L2 norm against the same
network in float64, |ours - exact| <= 2 |torch - exact| + tiny. In training, float32 and below, only sums over all
tensors are compared: a ReLU whose input is near 0 opens in one computation and stays shut in the other, so that single
gradients of equally good computations differ by 1e-3 and more. Float64 has no such luck, and is compared tightly.
"""

from __future__ import annotations

import contextlib
import copy
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fused_resnet as fr
from fused_resnet import dispatch
from fused_resnet.blocks import ResidualBlock
from fused_resnet.inference import InferencePlan
from fused_resnet.ops.residual_block import Plan
from fused_resnet.parity import compare
from fused_resnet.whole import Part, run_whole

# name -> (block, layers, options): four blocks hold all that a deep one does, in a fraction of the time.
SMALL: dict[str, tuple[str, tuple[int, ...], dict[str, Any]]] = {
    "basic": ("BasicBlock", (1, 1, 1, 1), {}),
    "bottleneck": ("Bottleneck", (1, 1, 1, 1), {"width_per_group": 16}),
    "grouped": ("Bottleneck", (1, 1, 1, 1), {"groups": 4, "width_per_group": 8}),
    "dilated": (
        "Bottleneck",
        (1, 1, 2, 1),
        {"width_per_group": 16, "replace_stride_with_dilation": [False, True, True]},
    ),
}
CLASSES = 10


def randomise(model: nn.Module, seed: int = 0) -> None:
    """Gammas of both signs, betas and running statistics with which no wrong fold and no lost sign can pass."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            vectors = dict(module.named_parameters(recurse=False)) | dict(module.named_buffers(recurse=False))
            if "Norm" not in type(module).__name__:
                continue
            for name, low, high in (
                ("weight", 0.5, 1.5),
                ("bias", -0.3, 0.3),
                ("running_mean", -0.3, 0.3),
                ("running_var", 0.5, 2),
            ):
                if vectors.get(name) is not None:
                    value = torch.rand(vectors[name].shape, generator=g) * (high - low) + low
                    if name == "weight":
                        value *= torch.where(torch.rand(value.shape, generator=g) < 0.3, -1, 1)
                    vectors[name].copy_(value)


def twins(torchvision: ModuleType, name: str = "basic", **options: Any) -> tuple[nn.Module, nn.Module]:
    """(ours, torchvision's): a network of `SMALL`, or a constructor of both packages; one random state in both."""
    options = {"num_classes": CLASSES} | options
    if name in SMALL:
        block, layers, defaults = SMALL[name]
        resnet = torchvision.models.resnet
        ours: nn.Module = fr.ResNet(getattr(fr, block), layers, **defaults | options)
        theirs = resnet.ResNet(getattr(resnet, block), list(layers), **defaults | options)
    else:
        ours = getattr(fr, name)(**options)
        theirs = getattr(torchvision.models, name)(**options)
    randomise(theirs)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return ours, theirs


def images(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    shape = shape or (2, 3, 32, 32)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def relative(value: Tensor, exact: Tensor) -> float:
    """|value - exact| / |exact| in the L2 norm; infinite where a value is not finite."""
    value, exact = value.detach().double(), exact.detach().double()
    assert value.shape == exact.shape
    error = torch.linalg.vector_norm(value - exact) / torch.linalg.vector_norm(exact).clamp_min(1e-300)
    return error.item() if torch.isfinite(error) else float("inf")


def assert_close(name: str, ours: Tensor, theirs: Tensor, exact: Tensor) -> None:
    """`ours` within the budget that `theirs`, torchvision's result in the same dtype, sets around `exact`."""
    assert ours.dtype == theirs.dtype, f"{name}: {ours.dtype}, torchvision gives {theirs.dtype}"
    assert ours.shape == theirs.shape
    error, torchs = relative(ours, exact), relative(theirs, exact)
    budget = 2 * torchs + 4 * torch.finfo(ours.dtype).eps
    assert error <= budget, f"{name}: relative error {error:.2e}, torch's own {torchs:.2e}, budget {budget:.2e}"


def assert_same(name: str, ours: Tensor, theirs: Tensor, tolerance: float = 1e-11) -> None:
    """Float64 results that differ by rounding alone; anything else must be equal."""
    assert ours.dtype == theirs.dtype, name
    if not ours.is_floating_point():
        assert torch.equal(ours, theirs), name
    else:
        assert ours.dtype == torch.float64, "single precision needs a budget: use assert_close"
        error = relative(ours, theirs)
        assert error <= tolerance, f"{name}: relative difference {error:.2e} in float64"


def infer(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model(x)


def assert_infers_as(ours: nn.Module, theirs: nn.Module, x: Tensor | None = None) -> None:
    """Both in evaluation mode, float32: within the budget of the float64 twin of `theirs`."""
    x = images() if x is None else x
    exact = infer(copy.deepcopy(theirs).double(), x.double())
    assert_close("output", infer(ours, x), infer(theirs, x), exact)


def step(model: nn.Module, x: Tensor, run: Callable[..., Any] | None = None) -> dict[str, Tensor]:
    """Outputs, gradients (the input's too) and buffers of one forward and backward pass with a fixed cotangent."""
    model.zero_grad()
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    out = model(x) if run is None else run(model, x)
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (out * cotangent.to(out.dtype)).sum().backward()
    result = {"output": out.detach(), "gradient input": x.grad}
    result |= {f"gradient {name}": p.grad for name, p in model.named_parameters() if p.grad is not None}
    return result | {f"buffer {name}": b.detach().clone() for name, b in model.named_buffers()}


def assert_same_step(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor], tolerance: float = 1e-9) -> None:
    """Two float64 steps: every tensor, names included."""
    assert ours.keys() == theirs.keys()
    for name in theirs:
        if name.startswith("gradient"):
            # Some gradients are 0 but for rounding (a bias before BN): measured on the scale of all.
            scale = max(
                theirs[name].norm().item(), 1e-6 * max(t.norm().item() for n, t in theirs.items() if n[:4] == "grad")
            )
            error = (ours[name] - theirs[name]).norm().item() / scale
            assert error <= tolerance, f"{name}: relative difference {error:.2e} in float64"
            assert ours[name].stride() == theirs[name].stride() or name == "gradient input", name
        else:
            assert_same(name, ours[name], theirs[name], tolerance)


def assert_trains_as(ours: nn.Module, theirs: nn.Module, x: Tensor | None = None, **kwargs: Any) -> None:
    """One step of float64 copies, as they are (modes, hooks, frozen parameters), compared tensor by tensor."""
    x = images(4, 3, 32, 32) if x is None else x
    ours, theirs = copy.deepcopy(ours).double(), copy.deepcopy(theirs).double()
    assert_same_step(step(ours, x.double(), **kwargs), step(theirs, x.double(), **kwargs))


# How many conv + BN units one call of a primitive stands for: in training, with given statistics, in inference.
TRAINING = {
    "bn_act_train_forward": 1,
    "second_moments": 1,
    "bn_bn_act_train_forward": 2,
    "bn_act_pool_train_forward": 1,
}
GIVEN = {"bn_act_eval_forward": 1, "conv_bias_act_forward": 1, "bn_act_pool_eval_forward": 1}
INFERENCE = {"conv_bias_act_forward": 1, "conv_bn_act_forward": 1}


# Blocks


def projection(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))


def run_block(block: ResidualBlock, x: Tensor, plan: Plan) -> Tensor:
    """The block as one op, by a plan."""
    row = [Part(getattr(block, conv), getattr(block, bn)) for conv, bn in block._UNITS]
    return run_whole(x, row, None if block.downsample is None else Part(*block.downsample), plan)


def block_step(block: nn.Module, x: Tensor, forward: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """The output, every gradient and the running statistics of one step with a random gradient."""
    x = x.clone().requires_grad_()
    out = forward(x)
    out.backward(torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(out))
    named = {"out": out.detach(), "x": x.grad}
    named |= {name: p.grad for name, p in block.named_parameters() if p.grad is not None}
    return named | {name: b.detach() for name, b in block.named_buffers() if "num_batches" not in name}


def assert_block_within_budget(block: ResidualBlock, x: Tensor, plan: Plan) -> None:
    """At least as accurate as torch's modules in the same dtype, both against float64."""
    plain, exact = fr.restore(copy.deepcopy(block)), fr.restore(copy.deepcopy(block)).double()
    ours = block_step(block, x, lambda x: run_block(block, x, plan))
    theirs, truth = block_step(plain, x, plain), block_step(exact, x.double(), exact)
    worst = max(compare(key, theirs[key], theirs[key], truth[key]).torch for key in truth)
    for key in truth:
        row = compare(key, ours[key], theirs[key], truth[key], granted=worst)
        assert row.ok, row


def units_run(ran: Mapping[str, int], weights: Mapping[str, int]) -> int:
    """The units that ran fused, of what `primitives` counted."""
    return sum(count * weights.get(primitive, 0) for primitive, count in ran.items())


def units_of(model: nn.Module) -> int:
    return sum(isinstance(module, nn.BatchNorm2d) for module in model.modules())


@contextlib.contextmanager
def primitives(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    """Counts, per primitive, what runs fused within the block: what `dispatch` hands out, the calls of kept plans."""
    counts: Counter[str] = Counter()
    choose, run = dispatch.choose, InferencePlan.run

    def planned(plan: InferencePlan, *args: Any) -> Tensor:
        counts["conv_bias_act_forward"] += len(plan.calls) + (plan.projection is not None)
        return run(plan, *args)

    def counted(primitive: str, *args: Any, **kwargs: Any) -> dispatch.Choice:
        counts[primitive] += 1
        return choose(primitive, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(dispatch, "choose", counted)
        patch.setattr(InferencePlan, "run", planned)
        yield counts
