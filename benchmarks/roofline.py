"""The floor of a residual network: bytes and FLOPs of each kernel, by scheme, without a machine.

Each kernel takes at least the larger of bytes / bandwidth and FLOPs / rate; the floor of a step is their sum. It is a
model without cache reuse: small activations may stay in a cache and beat it.

I, O, W are the elements of a conv's input, output and weight, X and O3 those of a block's input and output:

    eager      conv I+O+W, BN 3O, ReLU 2O, block end 3O3 + 2O3; backward ReLU 3O, BN 2O + 3O, dgrad O+W+I, wgrad I+O+W,
               shortcut sum 3X; max pool 3.5 (in + out) over forward and backward
    bn_act     BN+ReLU 3O, block end 4 O3, the projection's statistics O; backward 2O + 3O, block end 3 O3 + 4 O3, and X
               more in conv1's dgrad
    hybrid     as prologue for 1x1 convs, as bn_act for the others, whose rectified input is formed in passes of its own
    prologue   conv I+O+W, block end 3 O3; backward block end 4 O3 (5 with a projection), dgrad 2O+W+2I, wgrad 2O+I+W
    gram       prologue for all but the last conv; K reads O2 (the projection: what it reads of x); conv3 O2 + O3 and
               the shortcut; backward mask 3 O3, Q O3+O2, da2 O3 + 2 O2; a fourth more FLOPs of conv3
    gram_mask  gram, the block-end mask applied in the next block's first dgrad: X more there, no mask pass
    unfused    inference: conv I+O+W, BN 2O, ReLU 2O, add 3O
    inference  conv I+O+W (+ residual), all else in its epilogue
    block      inference, a whole block in one kernel: X + O3 + W
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from .plain_resnet import plain_resnet


@dataclass(frozen=True)
class Conv:
    """A conv of the network; elements and FLOPs are per image, except the weight's."""

    name: str
    pointwise: bool
    read: int  # elements of the input that it reads
    input: int  # elements of its input
    output: int
    weight: int
    flops: int
    inputs: int  # channels per group
    positions: int  # output pixels

    @property
    def moments_flops(self) -> int:
        """Of the second moments of its input, and as many of a H in the backward pass."""
        return 2 * self.positions * self.inputs**2


@dataclass(frozen=True)
class Block:
    name: str
    convs: tuple[Conv, ...]
    projection: Conv | None

    @property
    def x(self) -> int:
        return self.convs[0].input

    @property
    def out(self) -> int:
        return self.convs[-1].output

    @property
    def gram(self) -> bool:
        return self.convs[-1].pointwise


@dataclass(frozen=True)
class Network:
    name: str
    stem: Conv
    pool_out: int
    blocks: tuple[Block, ...]
    parameters: int
    classifier: int  # its weight's elements

    def __iter__(self):  # type: ignore[no-untyped-def]
        yield self.stem
        for block in self.blocks:
            yield from block.convs
            if block.projection is not None:
                yield block.projection


def network(model: str, size: int = 224) -> Network:
    """The convs of one of the family's networks for size x size images, by a run without data."""
    with torch.device("meta"):
        net = plain_resnet(model)
        found: dict[str, Conv] = {}
        pooled: list[int] = []

        def record(name: str) -> Callable[..., None]:
            def hook(conv: nn.Conv2d, args: tuple[torch.Tensor], y: torch.Tensor) -> None:
                x, positions = args[0], y.shape[2] * y.shape[3]
                pointwise = conv.kernel_size == (1, 1)
                read = x.shape[1] * positions if pointwise else x.numel()
                flops = 2 * conv.weight.numel() * positions
                sizes = (read, x.numel(), y.numel(), conv.weight.numel(), flops, conv.weight.shape[1], positions)
                found[name] = Conv(name, pointwise, *sizes)

            return hook

        for name, module in net.named_modules():
            if isinstance(module, nn.Conv2d):
                module.register_forward_hook(record(name))
            elif isinstance(module, nn.MaxPool2d):
                module.register_forward_hook(lambda module, args, y: pooled.append(y.numel()))
        net(torch.empty(1, 3, size, size))
    blocks = []
    for name in dict.fromkeys(n.rsplit(".", 1)[0] for n in found if n.startswith("layer") and ".conv" in n):
        convs = tuple(conv for n, conv in found.items() if n.startswith(f"{name}.conv"))
        blocks.append(Block(name, convs, found.get(f"{name}.downsample.0")))
    parameters = sum(p.numel() for p in net.parameters())
    return Network(model, found["conv1"], pooled[0], tuple(blocks), parameters, net.fc.weight.numel())


@dataclass(frozen=True)
class Kernel:
    """One launch: elements moved per image, weight elements moved once, FLOPs per image."""

    layer: str
    what: str
    elements: float
    weights: float = 0
    flops: float = 0

    def bytes(self, batch: int, itemsize: int) -> float:
        return (self.elements * batch + self.weights) * itemsize


Kernels = list[Kernel]


def _conv(c: Conv, *, extra: float = 0) -> Kernel:
    return Kernel(c.name, "conv", c.read + c.output + extra, c.weight, c.flops)


def _plain_backward(c: Conv, *, dgrad: bool = True, extra: float = 0) -> Kernels:
    wgrad = Kernel(c.name, "wgrad", c.read + c.output, c.weight, c.flops)
    if not dgrad:
        return [wgrad]
    return [Kernel(c.name, "dgrad", c.output + c.input + extra, c.weight, c.flops), wgrad]


def _passes(layer: str, elements: int, **counts: float) -> Kernels:
    return [Kernel(layer, what.replace("_", " "), count * elements) for what, count in counts.items()]


def _stem(net: Network, *, fused: bool) -> Kernels:
    """BN, ReLU and max pool as separate passes; `fused`: BN+ReLU in one."""
    stem, pool = net.stem, Kernel("maxpool", "max pool, both ways", 3.5 * (net.stem.output + net.pool_out))
    out = [_conv(stem), *_plain_backward(stem, dgrad=False), pool]
    if fused:
        return out + _passes("bn1", stem.output, BN_ReLU=3, reductions=2, BN_backward=3)
    return out + _passes("bn1", stem.output, BN=3, ReLU=2, ReLU_backward=3, reductions=2, BN_backward=3)


def _stem_one_pass(net: Network) -> Kernels:
    """BN + ReLU + max pool in one pass, statistics from the conv's epilogue."""
    stem, both = net.stem, net.stem.output + net.pool_out
    pool = [Kernel("maxpool", "BN+ReLU+pool", both), Kernel("maxpool", "backward", 2 * both)]
    return [_conv(stem), *_plain_backward(stem, dgrad=False), *pool]


def _units(block: Block) -> list[Conv]:
    return [*block.convs, *([block.projection] if block.projection else [])]


def eager(net: Network) -> Kernels:
    out = _stem(net, fused=False)
    for block in net.blocks:
        for conv in _units(block):
            out += [_conv(conv), *_plain_backward(conv)]
            out += _passes(conv.name, conv.output, BN=3, reductions=2, BN_backward=3)
        for conv in block.convs[:-1]:
            out += _passes(conv.name, conv.output, ReLU=2, ReLU_backward=3)
        out += _passes(block.name, block.out, add=3, ReLU=2, ReLU_backward=3)
        out += _passes(block.name, block.x, shortcut_sum=3)
    return out


def bn_act(net: Network) -> Kernels:
    out = _stem(net, fused=True)
    for block in net.blocks:
        for conv in _units(block):
            first = conv is block.convs[0]
            out += [_conv(conv), *_plain_backward(conv, extra=block.x if first else 0)]
        for conv in block.convs[:-1]:
            out += _passes(conv.name, conv.output, BN_ReLU=3, reductions=2, BN_backward=3)
        out += _passes(block.name, block.out, block_end=4, reductions=3, block_end_backward=4)
        if block.projection:
            out += _passes(block.projection.name, block.projection.output, statistics=1, reductions=2, BN_backward=3)
    return out


def _prologue_conv(conv: Conv) -> Kernels:
    """Operands are formed while they are loaded: dy from g and y, the input from the previous raw output."""
    dgrad = Kernel(conv.name, "dgrad", 2 * conv.output + 2 * conv.read, conv.weight, conv.flops)
    wgrad = Kernel(conv.name, "wgrad", 2 * conv.output + conv.read, conv.weight, conv.flops)
    return [_conv(conv), dgrad, wgrad]


def prologue(net: Network) -> Kernels:
    out = _stem_one_pass(net)
    for block in net.blocks:
        for conv in _units(block):
            out += _prologue_conv(conv)
        out += _block_end(block)
    return out


def _block_end(block: Block) -> Kernels:
    both = bool(block.projection)
    return _passes(block.name, block.out, block_end=3, block_end_backward=5 if both else 4)


def hybrid(net: Network) -> Kernels:
    out = _stem_one_pass(net)
    for block in net.blocks:
        for conv in _units(block):
            if conv.pointwise:
                out += _prologue_conv(conv)
                continue
            out += [_conv(conv), *_plain_backward(conv)]
            # Its rectified input, formed in each direction; the mask and sums of its dgrad; its dy, from g and y.
            out += _passes(conv.name, conv.input, BN_ReLU=2, BN_ReLU_again=2, mask_and_reductions=3)
            out += _passes(conv.name, conv.output, BN_backward=3)
        out += _block_end(block)
    return out


def gram(net: Network, *, mask_in_dgrad: bool = False) -> Kernels:
    out = _stem_one_pass(net)
    for block in net.blocks:
        if not block.gram:  # basic blocks: stored outputs
            for conv in _units(block):
                out += _prologue_conv(conv)
            out += _block_end(block)
            continue
        *first, last = block.convs
        for conv in first:
            out += _prologue_conv(conv)
        ends = [last, *([block.projection] if block.projection else [])]
        out += [Kernel(conv.name, "second moments", conv.read, 0, conv.moments_flops) for conv in ends]
        shortcut = block.projection.read if block.projection else block.out
        weights, flops = sum(c.weight for c in ends), sum(c.flops for c in ends)
        out.append(Kernel(last.name, "conv+BN+add+ReLU", last.read + shortcut + block.out, weights, flops))
        out += _passes(block.name, *((block.x,) if mask_in_dgrad else (block.out,)), mask=1 if mask_in_dgrad else 3)
        for conv in ends:
            out.append(Kernel(conv.name, "Q (wgrad)", block.out + conv.read, conv.weight, conv.flops))
            more = conv.flops + conv.moments_flops
            out.append(Kernel(conv.name, "da (dgrad)", block.out + 2 * conv.read, conv.weight, more))
    return out


def gram_mask(net: Network) -> Kernels:
    return gram(net, mask_in_dgrad=True)


def unfused(net: Network) -> Kernels:
    out = [_conv(net.stem), *_passes("bn1", net.stem.output, BN=2, ReLU=2)]
    out.append(Kernel("maxpool", "max pool", net.stem.output + net.pool_out))
    for block in net.blocks:
        for conv in _units(block):
            out += [_conv(conv), *_passes(conv.name, conv.output, BN=2)]
        for conv in block.convs[:-1]:
            out += _passes(conv.name, conv.output, ReLU=2)
        out += _passes(block.name, block.out, add=3, ReLU=2)
    return out


def inference(net: Network) -> Kernels:
    out = [_conv(net.stem), Kernel("maxpool", "max pool", net.stem.output + net.pool_out)]
    for block in net.blocks:
        out += [_conv(conv) for conv in _units(block) if conv is not block.convs[-1]]
        out.append(_conv(block.convs[-1], extra=block.out))
    return out


def block(net: Network) -> Kernels:
    """A block's projection is part of it; the stem and its max pool are one kernel too."""
    stem = net.stem
    out = [Kernel("stem", "conv+BN+ReLU+pool", stem.read + net.pool_out, stem.weight, stem.flops)]
    for b in net.blocks:
        units = _units(b)
        weights, flops = sum(c.weight for c in units), sum(c.flops for c in units)
        out.append(Kernel(b.name, "whole block", b.x + b.out, weights, flops))
    return out


TRAINING = {f.__name__: f for f in (eager, bn_act, hybrid, prologue, gram, gram_mask)}
INFERENCE = {f.__name__: f for f in (unfused, inference, block)}
SCHEMES = {**TRAINING, **INFERENCE}


def saved(net: Network, scheme: str, itemsize: int) -> float:
    """Bytes per image that a training step keeps for its backward pass (activations; not small vectors)."""
    stem = net.stem.output
    offsets = 8 if scheme == "eager" else 1
    elements = stem + net.pool_out + (stem if scheme in ("eager", "bn_act") else 0)
    for b in net.blocks:
        raw = [c.output for c in b.convs]
        kept = b.out + sum(raw) + (b.projection.output if b.projection else 0)
        if scheme in ("eager", "bn_act"):
            kept += sum(raw[:-1])  # rectified
        elif scheme.startswith("gram") and b.gram:
            kept = b.out + sum(raw[:-1])
        elements += kept
    return elements * itemsize + net.pool_out * offsets


def around(net: Network, batch: int, itemsize: int, training: bool) -> list[tuple[str, float, float]]:
    """What lies outside the blocks, (what, bytes, FLOPs) per step: classifier, loss, optimiser, weight casts."""
    flops = 2.0 * net.classifier * batch
    rows = [("classifier", net.classifier * itemsize * (3 if training else 1), flops * (3 if training else 1))]
    if training:
        classes = net.classifier / (net.blocks[-1].out / net.blocks[-1].convs[-1].positions)
        rows.append(("loss", 5 * classes * batch * 4, 0))
        rows.append(("optimiser (SGD, momentum)", 5 * 4 * net.parameters, 0))
        if itemsize == 2:
            rows.append(("weight casts and gradients' casts", 12 * net.parameters, 0))
    return rows


def floor_ms(kernel_bytes: float, flops: float, bandwidth: float, rate: float) -> float:
    return 1e3 * max(kernel_bytes / bandwidth, flops / rate)


def images_per_second(net: Network, scheme: str, batch: int, itemsize: int, bandwidth: float, rate: float) -> float:
    """The blocks' floor as a rate; `bandwidth` in bytes/s, `rate` in FLOP/s."""
    kernels = SCHEMES[scheme](net)
    ms = sum(floor_ms(k.bytes(batch, itemsize), k.flops * batch, bandwidth, rate) for k in kernels)
    return 1e3 * batch / ms


def megabytes_per_image(net: Network, scheme: str, batch: int, itemsize: int) -> float:
    return sum(k.bytes(batch, itemsize) for k in SCHEMES[scheme](net)) / batch / 1e6


def layer_table(net: Network, scheme: str, batch: int, itemsize: int, bandwidth: float, rate: float) -> str:
    """A line per kernel: MB, GFLOP, FLOP per byte, floor in ms and what bounds it; then what lies around the blocks."""
    rows = [(f"{k.layer} {k.what}", k.bytes(batch, itemsize), k.flops * batch) for k in SCHEMES[scheme](net)]
    inner = sum(floor_ms(b, f, bandwidth, rate) for _, b, f in rows)
    outer = around(net, batch, itemsize, scheme in TRAINING)
    rows += outer
    width = max(len(name) for name, _, _ in rows)
    lines = [f"{'kernel':<{width}}  {'MB':>9}  {'GFLOP':>9}  {'FLOP/B':>7}  {'floor ms':>9}  bound by"]
    for name, moved, flops in rows:
        bound = "memory" if moved / bandwidth >= flops / rate else "arithmetic"
        ms = floor_ms(moved, flops, bandwidth, rate)
        intensity = flops / moved if moved else 0.0
        lines.append(f"{name:<{width}}  {moved / 1e6:9.2f}  {flops / 1e9:9.2f}  {intensity:7.1f}  {ms:9.4f}  {bound}")
    total = inner + sum(floor_ms(b, f, bandwidth, rate) for _, b, f in outer)
    outside = 100 * (1 - inner / total)
    lines.append(f"floor {total:.3f} ms, {1e3 * batch / total:,.0f} images/s; outside the blocks {outside:.1f}%")
    return "\n".join(lines)


def summary(net: Network, batch: int, itemsize: int, bandwidth: float, rate: float) -> str:
    """A line per scheme: MB per image, MB kept per image, images/s at the floor."""
    lines = [f"{'scheme':<11} {'MB/image':>9} {'kept MB':>8} {'images/s':>10}"]
    for scheme in SCHEMES:
        kept = f"{saved(net, scheme, itemsize) / 1e6:8.1f}" if scheme in TRAINING else " " * 8
        speed = images_per_second(net, scheme, batch, itemsize, bandwidth, rate)
        lines.append(f"{scheme:<11} {megabytes_per_image(net, scheme, batch, itemsize):9.1f} {kept} {speed:10,.0f}")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """`python -m fused_resnet.benchmarks.roofline`."""
    parser = argparse.ArgumentParser(prog="roofline", description="The floor of a residual network, by scheme.")
    parser.add_argument("--model", default="resnet50")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--size", type=int, default=224, help="height and width of the images")
    parser.add_argument("--itemsize", type=int, default=2, choices=(2, 4), help="bytes of an element")
    parser.add_argument("--bandwidth", type=float, default=3.0, help="TB/s (an H100's copy bandwidth: 3.0)")
    parser.add_argument("--rate", type=float, default=798, help="TFLOP/s (an H100's bf16 matmul: 798)")
    parser.add_argument("--scheme", choices=tuple(SCHEMES), help="show every kernel of this scheme")
    args = parser.parse_args(argv)
    net = network(args.model, args.size)
    machine = (args.bandwidth * 1e12, args.rate * 1e12)
    if args.scheme:
        print(layer_table(net, args.scheme, args.batch, args.itemsize, *machine))
    else:
        print(summary(net, args.batch, args.itemsize, *machine))
    return 0


if __name__ == "__main__":
    sys.exit(main())
