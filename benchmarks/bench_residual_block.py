"""residual_block: a whole block with identity shortcut, in training as the models run it."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch import Tensor, nn

import fused_resnet

from . import roofline
from .kernels import Case, Cost, Inputs, Maker, Op, Prepare, across_models
from .plain_resnet import PlainBasicBlock, PlainBottleneck
from .roofline import Network

Sizes = tuple[str, int, int]  # kind, channels in and out, side


def _identity_blocks(net: Network) -> Iterator[tuple[Sizes, str]]:
    for block in net.blocks:
        if block.projection is None:
            conv = block.convs[-1]
            kind = "bottleneck" if block.gram else "basic"
            channels, side = conv.output // conv.positions, round(conv.positions**0.5)
            yield (kind, channels, side), f"{kind} {channels}x{side}x{side}"


def cases() -> list[Case]:
    return across_models(_identity_blocks)


def _plain(sizes: Sizes) -> nn.Module:
    kind, channels, _ = sizes
    if kind == "basic":
        return PlainBasicBlock(channels, channels, 1, None)
    return PlainBottleneck(channels, channels // 4, 1, None, 1, 64)


def _ours(sizes: Sizes) -> nn.Module:
    kind, channels, _ = sizes
    block = fused_resnet.BasicBlock if kind == "basic" else fused_resnet.Bottleneck
    return block(channels, channels if kind == "basic" else channels // 4)


def inputs(sizes: Sizes, make: Maker) -> Inputs:
    """x (rectified, as a block gives it) and a state by torchvision's names."""
    _, channels, side = sizes
    found: Inputs = {"x": make.image(channels, side, side).relu_(), "sizes": sizes}
    for name, tensor in _plain(sizes).state_dict().items():
        owner, _, leaf = name.rpartition(".")
        if tensor.dim() == 4:
            found[name] = make.weight(*tensor.shape)
        elif leaf == "weight":
            drawn = make.bn(len(tensor))
            renamed = {"gamma": "weight", "beta": "bias"}
            found |= {f"{owner}.{renamed.get(key, key)}": value for key, value in drawn.items()}
    return found


def cost(sizes: Sizes, direction: str) -> Cost:
    """By `roofline`'s scheme bn_act: each conv, and one fused pass after it."""
    kind, channels, side = sizes
    model = "resnet18" if kind == "basic" else "resnet50"
    net = roofline.network(model)
    block = next(
        b
        for b in net.blocks
        if b.projection is None and (b.out, b.convs[-1].positions) == (channels * side**2, side**2)
    )
    part = roofline.Network(net.name, net.stem, net.pool_out, (block,), 0, 0)
    stem = len(roofline.bn_act(roofline.Network(net.name, net.stem, net.pool_out, (), 0, 0)))
    backward = ("dgrad", "wgrad", "reductions", "backward")
    kernels = [
        k for k in roofline.bn_act(part)[stem:] if any(word in k.what for word in backward) == (direction == "backward")
    ]
    return Cost(sum(k.elements for k in kernels), sum(k.weights for k in kernels), sum(k.flops for k in kernels))


def _block(build: Callable[[Sizes], nn.Module]) -> Prepare:
    def prepare(inputs: Inputs, training: bool) -> Callable[[], Tensor]:
        x, net = inputs["x"], build(inputs["sizes"]).train(training).to(inputs["x"].device)
        for name, value in inputs.items():
            owner, _, leaf = name.rpartition(".")
            if owner:
                setattr(net.get_submodule(owner), leaf, value)
        return lambda: net(x)

    return prepare


OP = Op(
    "residual_block",
    "relu(f(x) + x), a block in training",
    cases,
    inputs,
    cost,
    {"eager": _block(_plain), "fused_resnet": _block(_ours)},
    leaves=("x", "weight", "bias"),
    directions=("forward", "backward"),
)
