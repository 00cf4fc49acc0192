"""`torchrun -m fused_resnet train` as tests start it."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path

import torch

import fused_resnet as fr
from fused_resnet.train import loop


def torchrun(processes: int, out: Path, *arguments: str) -> subprocess.Popen[str]:
    """The started job; its output and that of its processes is one stream of text."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command += ["-m", "fused_resnet", "train", "--data", "digits", "--out", str(out), *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    return subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment)


def losses(out: Path) -> list[str]:
    """Of each step, as they were written."""
    with open(out / "steps.csv") as file:
        return [row["loss"] for row in csv.DictReader(file)]


def assert_trains_as_one(folder: Path, count: int, how: str) -> None:
    """The losses of `count` processes are those of one with the whole batch, and one of them speaks."""
    settings = {"data": "digits", "model": "cifar_resnet20", "epochs": 1, "lr": 0.02}
    loop.train(loop.Settings(out=folder / "single", batch=128, **settings), say=lambda text: None)  # type: ignore[arg-type]
    options = ["--epochs", "1", "--lr", "0.02", "--sync-bn", "--batch", str(128 // count), "--parallel", how]
    run = torchrun(count, folder / "run", *options)
    said, _ = run.communicate(timeout=300)
    assert run.returncode == 0, said
    assert "Grad strides" not in said
    ours, theirs = (torch.tensor([float(v) for v in losses(folder / name)]) for name in ("run", "single"))
    torch.testing.assert_close(ours[:4], theirs[:4], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=1e-2)  # float32 steps drift apart
    assert sum(line.startswith("epoch 1:") for line in said.splitlines()) == 1, said
    fr.cifar_resnet20(weights=folder / "run" / "model.pt", in_channels=1)
