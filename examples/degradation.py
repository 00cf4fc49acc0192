"""The degradation experiment of He et al. 2015 (fig. 1 and 6), small and real: handwritten digits, CIFAR networks.

Plain networks train worse the deeper they are; residual ones hardly. One table, one picture, which also shows the norms
of the weights' gradients at initialisation, and that with zero_init_residual each block starts as the identity.

pip install 'fused_resnet[bench]'
python examples/degradation.py
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path
from typing import NamedTuple

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm

import fused_resnet as fr

WIDTHS = (8, 16, 32)


class Result(NamedTuple):
    """Of one network: the loss of each step; the loss and the share of errors on the training and the test images."""

    kind: str
    depth: int
    losses: list[float]
    train_loss: float
    train_error: float
    test_error: float


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """1797 scans, 8x8: (training images, labels, test images, labels), every fourth for the test."""
    found = load_digits()
    x = torch.from_numpy(found.images).float().unsqueeze(1)
    y = torch.from_numpy(found.target)
    test = torch.arange(len(x)) % 4 == 3
    x = (x - x[~test].mean()) / x[~test].std()
    return x[~test], y[~test], x[test], y[test]


def network(kind: str, depth: int, **options: bool) -> fr.CifarResNet:
    """6n + 2 layers, "plain" or "residual" (option A: the same parameters)."""
    if depth < 8 or (depth - 2) % 6:
        raise SystemExit(f"a depth must be 6n + 2 (8, 14, 20, ...), got {depth}")
    shortcut = "none" if kind == "plain" else "A"
    return fr.CifarResNet(((depth - 2) // 6,) * 3, shortcut=shortcut, widths=WIDTHS, in_channels=1, **options)


@torch.no_grad()
def evaluate(model: nn.Module, x: Tensor, y: Tensor) -> tuple[float, float]:
    """(loss, share of errors)."""
    logits = model.eval()(x)
    return F.cross_entropy(logits, y).item(), (logits.argmax(1) != y).float().mean().item()


def train(kind: str, depth: int, epochs: int, batch: int, lr: float, seed: int) -> Result:
    """The same recipe for all: SGD with momentum, linear warm-up for a tenth of the steps, cosine to 0."""
    x, y, test_x, test_y = digits()
    torch.manual_seed(seed)
    model = network(kind, depth)
    optimizer = torch.optim.SGD(model.parameters(), lr, 0.9, weight_decay=1e-4)
    steps = epochs * (len(x) // batch)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, steps, pct_start=0.1, cycle_momentum=False)
    losses = []
    with tqdm(total=steps, desc=f"{kind}-{depth}", unit="step", leave=False) as bar:
        for _ in range(epochs):
            model.train()
            for index in torch.randperm(len(x))[: len(x) // batch * batch].split(batch):
                loss = F.cross_entropy(model(x[index]), y[index])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                rate.step()
                losses.append(loss.item())
                bar.set_postfix(loss=f"{losses[-1]:.3f}")
                bar.update()
    return Result(kind, depth, losses, *evaluate(model, x, y), evaluate(model, test_x, test_y)[1])


def gradient_norms(kind: str, depth: int, seed: int) -> list[float]:
    """Of each conv's weight, from the image on, for one batch at initialisation."""
    x, y, *_ = digits()
    torch.manual_seed(seed)
    model = network(kind, depth)
    F.cross_entropy(model(x[:128]), y[:128]).backward()
    return [m.weight.grad.norm().item() for m in model.modules() if isinstance(m, nn.Conv2d)]  # type: ignore[union-attr]


def changes(depth: int, zero_init: bool, seed: int) -> list[float]:
    """|H(x) - shortcut(x)| / |shortcut(x)| of each residual block at initialisation."""
    x, *_ = digits()
    torch.manual_seed(seed)
    model = network("residual", depth, zero_init_residual=zero_init)
    found: list[float] = []

    def watch(block: nn.Module, args: tuple[Tensor], out: Tensor) -> None:
        shortcut = args[0] if block.downsample is None else block.downsample(args[0])  # type: ignore[operator]
        found.append(((out - shortcut).norm() / shortcut.norm()).item())

    for module in model.modules():
        if isinstance(module, fr.BasicBlock):
            module.register_forward_hook(watch)  # type: ignore[arg-type]
    with torch.no_grad():
        model(x[:128])
    return found


def smooth(values: list[float], weight: float = 0.9) -> list[float]:
    found, mean = [], values[0]
    for value in values:
        mean = weight * mean + (1 - weight) * value
        found.append(mean)
    return found


def draw(results: list[Result], seed: int, path: Path) -> None:
    """Training losses of both kinds, gradients at initialisation, distance of the blocks from the identity."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 7), layout="constrained")
    axes = figure.subplots(2, 2)
    depths = sorted({result.depth for result in results})
    shades = {
        "plain": ["#f4b183", "#e07b39", "#a84e12", "#5c2a08"],
        "residual": ["#9dc3e6", "#4a90c8", "#1f5f99", "#0d2f50"],
    }
    top = max(max(smooth(result.losses)) for result in results)
    for axis, kind in zip(axes[0], ("plain", "residual"), strict=True):
        for result in (r for r in results if r.kind == kind):
            color = shades[kind][depths.index(result.depth) % 4]
            label = f"{result.depth} layers: {result.train_loss:.3f} in the end"
            axis.plot(smooth(result.losses), color=color, label=label)
        axis.set(title=f"{kind} networks", xlabel="step", ylabel="training loss", yscale="log", ylim=(1e-3, 1.2 * top))
        axis.legend(frameon=False)
    deepest = depths[-1]
    for kind in ("plain", "residual"):
        norms = gradient_norms(kind, deepest, seed)
        axes[1, 0].plot(range(1, len(norms) + 1), norms, color=shades[kind][1], label=kind)
    axes[1, 0].set(
        title=f"at initialisation: gradients, {deepest} layers",
        xlabel="conv",
        ylabel="norm of its gradient",
        yscale="log",
    )
    for zero_init, style in ((False, "o"), (True, "s")):
        label = f"zero_init_residual={zero_init}"
        found = changes(deepest, zero_init, seed)
        axes[1, 1].plot(
            range(1, len(found) + 1), found, style, ms=4, label=label, color=shades["residual"][2 * zero_init]
        )
    axes[1, 1].set(
        title="at initialisation: each block's change of its input", xlabel="block", ylabel="|H(x) - x| / |x|"
    )
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
        axis.xaxis.get_major_locator().set_params(integer=True)
    for axis in axes[1]:
        axis.legend(frameon=False)
    figure.suptitle("Plain and residual networks on handwritten digits, one recipe")
    figure.savefig(path, dpi=130)


def table(results: list[Result]) -> str:
    lines = [f"{'layers':>6}  {'':<8}  {'training loss':>13}  {'training error':>14}  {'test error':>10}"]
    for r in results:
        lines.append(f"{r.depth:>6}  {r.kind:<8}  {r.train_loss:13.4f}  {r.train_error:14.2%}  {r.test_error:10.2%}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--depths", type=int, nargs="+", default=[8, 20, 44], help="6n + 2 each (8 20 44)")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("degradation"), help="path of .png and .csv, without ending")
    args = parser.parse_args()
    for depth in args.depths:
        network("plain", depth)  # or a sentence
    results = []
    for depth in sorted(args.depths):
        for kind in ("plain", "residual"):
            results.append(train(kind, depth, args.epochs, args.batch, args.lr, args.seed))
            print(table(results).splitlines()[0 if len(results) == 1 else -1], flush=True)
            if len(results) == 1:
                print(table(results).splitlines()[-1], flush=True)
    draw(results, args.seed, args.out.with_suffix(".png"))
    with open(args.out.with_suffix(".csv"), "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["layers", "kind", "train_loss", "train_error", "test_error"])
        writer.writerows([r.depth, r.kind, r.train_loss, r.train_error, r.test_error] for r in results)
    print(f"the picture: {args.out.with_suffix('.png')}; the table: {args.out.with_suffix('.csv')}")


if __name__ == "__main__":
    main()
