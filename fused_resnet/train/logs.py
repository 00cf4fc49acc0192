"""What a run leaves: epochs.csv, steps.csv, a picture of the curves, and TensorBoard's files where they are wanted."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

from fused_resnet.cli import RequestError
from fused_resnet.train.checkpoint import replacing

Epoch = dict[str, float]


def _table(path: Path, rows: list[dict[str, Any]]) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    with replacing(path) as file:
        file.write(text.getvalue().encode())


def write_tables(folder: Path, epochs: list[Epoch], losses: list[float]) -> None:
    """All epochs and the loss of each step so far; a resumed run writes the same as one that was never interrupted."""
    if epochs:
        _table(folder / "epochs.csv", epochs)
    if losses:
        _table(folder / "steps.csv", [{"step": i, "loss": loss} for i, loss in enumerate(losses, 1)])


def draw(path: Path, title: str, epochs: list[Epoch], losses: list[float]) -> bool:
    """Loss and accuracy in one picture; False where matplotlib is missing."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    per_epoch = len(losses) / len(epochs)
    left.plot([i / per_epoch for i in range(1, len(losses) + 1)], losses, color="#b8cfe5", lw=0.8, label="each step")
    numbers = [epoch["epoch"] for epoch in epochs]
    for axes, what in ((left, "loss"), (right, "accuracy")):
        for part, color in (("train", "#1f6fb4"), ("test", "#e07b39")):
            axes.plot(numbers, [epoch[f"{part}_{what}"] for epoch in epochs], color=color, marker=".", label=part)
        axes.set(xlabel="epoch", ylabel=what)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
    left.set_yscale("log")
    figure.suptitle(title)
    with replacing(path) as file:
        figure.savefig(file, dpi=130, format="png")
    return True


class Board:
    """TensorBoard's event files."""

    def __init__(self, folder: Path, purge_step: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise RequestError("--tensorboard needs tensorboard: pip install 'fused_resnet[train]'") from error
        self.writer = SummaryWriter(str(folder), purge_step=purge_step)

    def add(self, epoch: Epoch) -> None:
        for name, value in epoch.items():
            if name not in ("epoch", "step"):
                self.writer.add_scalar(name.replace("_", "/", 1), value, int(epoch["step"]))
        self.writer.flush()
