"""A small residual net learns scikit-learn's handwritten digits, fused and unfused, from one seed and the same batches.

pip install 'fused_resnet[bench]'
python examples/train_digits.py
"""

from __future__ import annotations

import argparse
import copy
import time
from pathlib import Path
from typing import NamedTuple

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm

import fused_resnet as fr


class Data(NamedTuple):
    train_x: Tensor  # [N, 1, 8, 8]
    test_x: Tensor
    train_y: Tensor  # [N]
    test_y: Tensor


class Run(NamedTuple):
    """What came of one net: the loss of each step, the share of test images that it gets right, its time."""

    losses: list[float]
    accuracy: float
    seconds: float


def digits(device: torch.device) -> Data:
    """1797 scans of handwritten digits; a quarter of them, evenly over the classes, for the test."""
    data = load_digits()
    x = torch.from_numpy(data.images).float().unsqueeze(1)
    x = (x - x.mean()) / x.std()
    y = torch.from_numpy(data.target)
    parts = train_test_split(x, y, test_size=0.25, stratify=y, random_state=0)
    return Data(*(part.to(device) for part in parts))


def net() -> nn.Module:
    """7 convs: a stem and three residual blocks, each of the last two at half the resolution."""

    def projection(inplanes: int, planes: int) -> nn.Module:
        return fr.ConvBNAct(inplanes, planes, 1, stride=2, activation=None)

    return nn.Sequential(
        fr.ConvBNAct(1, 32),
        fr.BasicBlock(32, 32),
        fr.BasicBlock(32, 64, 2, projection(32, 64)),
        fr.BasicBlock(64, 128, 2, projection(64, 128)),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(128, 10),
    )


def compare(epochs: int = 12, batch: int = 64, seed: int = 0, device: torch.device | str = "cpu") -> dict[str, Run]:
    """Train the net fused and unfused, side by side, batch by batch. Returns a `Run` for each."""
    device = torch.device(device)
    data = digits(device)
    torch.manual_seed(seed)
    fused = net().to(device, memory_format=torch.channels_last)
    nets = {"fused": fused, "unfused": fr.restore(copy.deepcopy(fused))}
    steps = epochs * (len(data.train_x) // batch)
    optimizers = {
        n: torch.optim.SGD(m.parameters(), 0.05, 0.9, weight_decay=5e-4, nesterov=True) for n, m in nets.items()
    }
    schedules = {n: torch.optim.lr_scheduler.OneCycleLR(o, 0.05, steps) for n, o in optimizers.items()}
    losses: dict[str, list[float]] = {name: [] for name in nets}
    seconds = dict.fromkeys(nets, 0.0)

    with tqdm(total=steps, desc="training", unit="step") as bar:
        for _ in range(epochs):
            order = torch.randperm(len(data.train_x)).to(device)
            for index in order[: len(order) // batch * batch].split(batch):  # whole batches
                x, y = data.train_x[index].contiguous(memory_format=torch.channels_last), data.train_y[index]
                for name, model in nets.items():
                    start = time.perf_counter()
                    loss = F.cross_entropy(model(x), y)
                    optimizers[name].zero_grad()
                    loss.backward()
                    optimizers[name].step()
                    losses[name].append(loss.item())  # waits for the device
                    seconds[name] += time.perf_counter() - start
                    schedules[name].step()
                bar.set_postfix({name: f"{values[-1]:.3f}" for name, values in losses.items()})
                bar.update()

    accuracy = {}
    for name, model in nets.items():
        with torch.no_grad():
            accuracy[name] = (model.eval()(data.test_x).argmax(1) == data.test_y).float().mean().item()
    return {name: Run(losses[name], accuracy[name], seconds[name]) for name in nets}


def draw(runs: dict[str, Run], path: Path) -> None:
    """Both loss curves in one picture."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    styles = {"fused": {"color": "#1f6fb4", "lw": 1.5}, "unfused": {"color": "#e07b39", "lw": 1.5, "ls": (0, (4, 4))}}
    for name, run in sorted(runs.items()):
        label = f"{name}: test accuracy {run.accuracy:.1%}, {run.seconds:.1f} s"
        axes.plot(range(1, len(run.losses) + 1), run.losses, label=label, **styles[name])
    axes.set(yscale="log", xlabel="step", ylabel="training loss (cross entropy)")
    axes.set_title("Handwritten digits: one seed, the same batches")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--plot", type=Path, default=Path("train_digits.png"), help="the picture (train_digits.png)")
    args = parser.parse_args()
    runs = compare(args.epochs, seed=args.seed, device=args.device)
    draw(runs, args.plot)
    for name, run in runs.items():
        print(f"{name:<8} test accuracy {run.accuracy:.2%}, last loss {run.losses[-1]:.4f}, {run.seconds:.1f} s")
    print(f"both loss curves: {args.plot}")


if __name__ == "__main__":
    main()
