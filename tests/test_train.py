"""`fused-resnet train`: it learns, goes on exactly where it stopped, survives being killed, and says what is wrong."""

from __future__ import annotations

import csv
import random
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters
from torchruns import assert_trains_as_one, losses

import fused_resnet as fr
from fused_resnet import cli
from fused_resnet.cli import RequestError
from fused_resnet.train import checkpoint, data, loop
from fused_resnet.train.loop import Settings

SMALL = (("layers", (1, 1, 1)),)


def _settings(out: Path, **changes: Any) -> Settings:
    return Settings(**{"data": "digits", "model": "CifarResNet", "out": out, "options": SMALL, "epochs": 2} | changes)


def _train(out: Path, **changes: Any) -> list[dict[str, float]]:
    return loop.train(_settings(out, **changes), say=lambda text: None)


EVERYTHING: dict[str, Any] = {
    "ema": 0.9,
    "accumulate": 2,
    "label_smoothing": 0.1,
    "schedule": "step",
    "warmup": 0.5,
    "amp": "bf16",
    "batch": 64,
}


class _Killed(Exception):
    pass


def test_resumes_exactly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same losses, weights and tables as without the interruption, which falls into the middle of an epoch."""
    stop, changes = 27, EVERYTHING
    _train(tmp_path / "whole", **changes)
    step, count = loop.Run._step, 0

    def interrupted(self: Any, *args: Any) -> Any:
        nonlocal count
        count += 1
        if count == stop:
            raise _Killed
        return step(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(loop.Run, "_step", interrupted)
        with pytest.raises(_Killed):
            _train(tmp_path / "parts", save_every=4, **changes)
    _train(tmp_path / "parts", save_every=4, resume=True, **changes)
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    assert len(losses(tmp_path / "whole")) == 2 * (1348 // 64)
    ours, theirs = (torch.load(tmp_path / name / "model.pt", weights_only=True) for name in ("parts", "whole"))
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_learns_digits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Through the command; what it leaves behind is complete and loads."""
    assert cli.main(["train", "--data", "digits", "--epochs", "5", "--batch", "64", "--out", str(tmp_path)]) == 0
    with open(tmp_path / "epochs.csv") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 5
    assert float(rows[-1]["test_accuracy"]) > 0.9
    assert float(rows[-1]["lr"]) < 1e-6
    assert (tmp_path / "curves.png").stat().st_size > 10_000
    model = fr.cifar_resnet20(weights=tmp_path / "model.pt", in_channels=1).eval()
    images = data.load("digits").test
    x = torch.stack([images[i][0] for i in range(len(images))])
    with torch.no_grad():
        accuracy = (model(x).argmax(1) == torch.tensor(images.labels)).float().mean().item()
    assert accuracy == pytest.approx(float(rows[-1]["test_accuracy"]), abs=2 / len(images))
    assert "test accuracy" in capsys.readouterr().out
    assert cli.main(["train", "--data", "digits", "--out", str(tmp_path)]) == 2
    assert "--resume" in capsys.readouterr().err


def test_unfused_losses_agree(tmp_path: Path) -> None:
    for name, unfused in (("fused", False), ("unfused", True)):
        _train(tmp_path / name, unfused=unfused, epochs=1)
    fused, unfused_ = (torch.tensor([float(v) for v in losses(tmp_path / n)]) for n in ("fused", "unfused"))
    torch.testing.assert_close(fused, unfused_, rtol=2e-3, atol=2e-3)


@pytest.mark.slow
def test_compiled_losses_agree(tmp_path: Path) -> None:
    for name, compiled in (("eager", False), ("compiled", True)):
        torch.compiler.reset()
        counters.clear()
        _train(tmp_path / name, compile=compiled, epochs=1, batch=256)
        assert bool(counters["frames"]["ok"]) == compiled
    eager, compiled_ = (torch.tensor([float(v) for v in losses(tmp_path / n)]) for n in ("eager", "compiled"))
    torch.testing.assert_close(eager, compiled_, rtol=1e-3, atol=1e-3)


def test_accumulation_is_the_whole_batch(tmp_path: Path) -> None:
    """Without batch norm's dependence on the parts: gradients of the parts add up to the batch's."""
    runs = []
    for parts in (1, 4):
        with loop.processes(torch.device("cpu"), 10) as group:
            run = loop.Run(_settings(tmp_path, accumulate=parts), group)
        run.model.double().eval()
        x = torch.randn(8, 1, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        run._step(run.model, x, torch.arange(8))
        runs.append([p.detach() for p in run.model.parameters()])
    for a, b in zip(*runs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_schedules() -> None:
    def rates(**changes: Any) -> list[float]:
        settings = _settings(Path(), epochs=8, **changes)
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], settings.lr)
        steps = loop.schedule(optimizer, settings, 10)
        found = []
        for _ in range(80):
            found.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            steps.step()
        return found

    cosine = rates(warmup=1.0)
    assert cosine[0] == pytest.approx(0.001)
    assert max(cosine) == cosine[10] == pytest.approx(0.1)
    assert cosine[45] == pytest.approx(0.05)
    assert cosine[-1] < 2e-4
    step = rates(schedule="step", warmup=0.0)
    assert [step[0], step[39], step[40], step[60]] == pytest.approx([0.1, 0.1, 0.01, 0.001])


# Checkpoints

_WRITER = """
import sys, torch
from pathlib import Path
from fused_resnet.train import checkpoint
path = Path(sys.argv[1])
n = 0
while True:
    n += 1
    checkpoint.save({"position": [n], "value": torch.full((300_000,), n)}, path)
    if n == 1:
        print("ready", flush=True)
"""


def test_sigkill_at_any_moment_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    rng = random.Random(0)
    last = 0
    for _ in range(3):
        writer = subprocess.Popen([sys.executable, "-c", _WRITER, str(path)], stdout=subprocess.PIPE, text=True)
        assert writer.stdout is not None
        assert writer.stdout.readline().strip() == "ready"
        time.sleep(rng.uniform(0.0, 0.15))
        writer.send_signal(signal.SIGKILL)
        writer.wait()
        found = checkpoint.load(path)
        last = found["position"][0]
        assert torch.equal(found["value"], torch.full((300_000,), last))
    assert last >= 1


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    checkpoint.save({"position": [1]}, path)
    with pytest.raises(AttributeError, match="pickle"):
        checkpoint.save({"position": [2], "value": torch.zeros(10**6), "unwritable": lambda: None}, path)
    assert checkpoint.load(path) == {"position": [1]}
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint.pt"]


@pytest.mark.parametrize("content", [b"", b"nonsense", None])
def test_bad_checkpoints(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "checkpoint.pt"
    if content is None:
        torch.save({"state_dict": {}}, path)
    else:
        path.write_bytes(content)
    with pytest.raises(RequestError, match="checkpoint"):
        checkpoint.load(path)


def test_resume_of_another_run_is_refused(tmp_path: Path) -> None:
    _train(tmp_path, epochs=1)
    with pytest.raises(RequestError, match=r"lr 0.1 then, 0.2 now"):
        _train(tmp_path, epochs=1, lr=0.2, resume=True)


# Data


def _png(path: Path, color: tuple[int, int, int], noise: int) -> None:
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    rng = random.Random(noise)
    pixels = bytes(min(255, max(0, c + rng.randint(-40, 40))) for _ in range(40 * 36) for c in color)
    Image.frombytes("RGB", (40, 36), pixels).save(path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "images"
    for name, color in (("blue", (40, 40, 200)), ("red", (200, 40, 40))):
        for i in range(20):
            _png(root / name / f"{i:02}.png", color, i)
    return root


def test_a_folder_of_images(tmp_path: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two classes that colour tells apart; a broken image and an empty class are skipped and counted."""
    (folder / "red" / "03.png").write_bytes((folder / "red" / "03.png").read_bytes()[:60])
    (folder / "green").mkdir()
    arguments = ["--size", "16", "--batch", "8", "--epochs", "3", "--lr", "0.05"]
    assert cli.main(["train", "--data", str(folder), "--out", str(tmp_path / "out"), *arguments]) == 0
    said = capsys.readouterr().out
    assert "1 classes without images were skipped: green" in said
    assert "1 broken images replaced" in said
    found = data.load(str(folder), 16)
    assert (len(found.train), len(found.test), found.classes) == (36, 4, ["blue", "red"])
    with open(tmp_path / "out" / "epochs.csv") as file:
        assert float(list(csv.DictReader(file))[-1]["train_accuracy"]) > 0.7


def test_a_folder_that_is_split(tmp_path: Path) -> None:
    for part, count in (("train", 3), ("val", 2)):
        for name in ("a", "b"):
            for i in range(count):
                _png(tmp_path / part / name / f"{i}.png", (9, 9, 9), i)
    found = data.load(str(tmp_path), 16)
    assert (len(found.train), len(found.test)) == (6, 4)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda root: None, "no such folder"),
        (lambda root: root.mkdir(), "got 0 folders"),
        (lambda root: _png(root / "one" / "1.png", (1, 2, 3), 0), "got 1 folder "),
        (lambda root: [_png(root / n / "1.png", (1, 2, 3), 0) for n in "ab"], "no image is left for the test"),
    ],
)
def test_folders_that_will_not_do(tmp_path: Path, make: Any, message: str) -> None:
    make(tmp_path / "data")
    with pytest.raises(RequestError, match=message):
        data.load(str(tmp_path / "data"))


@pytest.mark.parametrize("classes", [10, 100])
def test_cifars_binary_files(tmp_path: Path, classes: int) -> None:
    """Written as their description says: label(s), then 1024 red, green and blue values in rows."""
    head = 1 if classes == 10 else 2
    rng = random.Random(0)
    names = (
        [f"data_batch_{i}.bin" for i in range(1, 6)] + ["test_batch.bin"] if head == 1 else ["train.bin", "test.bin"]
    )
    for number, name in enumerate(names):
        records = b"".join(
            struct.pack("B" * head, *[7] * (head - 1), (number + i) % classes) + rng.randbytes(3072) for i in range(4)
        )
        (tmp_path / name).write_bytes(records)
    found = data.load(str(tmp_path))
    assert (len(found.train), len(found.test), len(found.classes)) == (4 * (len(names) - 1), 4, classes)
    assert found.train.labels[:4] == [0, 1, 2, 3]
    raw = (tmp_path / names[0]).read_bytes()
    pixel = raw[head + 1024 + 5 * 32 + 9] / 255  # green, row 5, column 9 of the first image
    assert found.train[0][0][1, 5, 9].item() == pytest.approx((pixel - 0.4822) / 0.2435, rel=1e-5)
    (tmp_path / names[-1]).write_bytes(raw[:-1])
    with pytest.raises(RequestError, match="cut short"):
        data.load(str(tmp_path))


def test_batches_are_shared_among_processes() -> None:
    """Each image at most once an epoch, whatever the number of processes; another order in another epoch."""
    images = data.load("digits").train

    def epoch(number: int, world: int) -> list[list[int]]:
        order = [torch.Generator().manual_seed(number) for _ in range(world)]
        parts = [list(data.Batches(len(images), 100 // world, r, world, order[r], 0)) for r in range(world)]
        return [[i for part in step for i in part] for step in zip(*parts, strict=True)]

    assert epoch(0, 1) == epoch(0, 2) == epoch(0, 4)
    assert epoch(0, 1) != epoch(1, 1)
    assert len({i for step in epoch(0, 4) for i in step}) == 1300
    test = [i for rank in range(4) for batch in data.Batches(50, 8, rank, 4, None, 0) for i in batch]
    assert sorted(test) == list(range(50))


def test_augmentation_depends_on_seed_epoch_and_index_alone() -> None:
    found = data.load("digits").train
    for seed, epoch in ((0, 0), (0, 1), (1, 0)):
        found.seed, found.epoch = seed, epoch
        assert torch.equal(found[3][0], found[3][0])
    seen = []
    for found.epoch in range(8):
        seen.append(found[3][0])
    assert len({tuple(x.flatten().tolist()) for x in seen}) > 2, "shifted, and not always alike"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--model resnet99", "unknown model 'resnet99'"),
        ("--model ResNet", "unknown model"),
        ("--batch 5000", "more than the 1348 images"),
        ("--batch 9 --accumulate 2", "cannot be split"),
        ("--lr 0", "above 0"),
        ("--lr nan", "above 0"),
        ("--ema 1", "up to 1"),
        ("--option depth", "NAME=VALUE"),
        ("--option depth=3", "depth"),
        ("--amp fp16", "needs a GPU"),
        ("--cuda-graph", "needs a GPU"),
        ("--lr 1e30 --warmup 0", "smaller --lr"),
    ],
)
def test_bad_arguments(tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: str, message: str) -> None:
    try:
        code = cli.main(["train", "--data", "digits", "--out", str(tmp_path / "out"), *arguments.split()])
    except SystemExit as error:
        code = error.code  # type: ignore[assignment]
    assert code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert message in lines[-1], lines
    assert not any("Traceback" in line for line in lines)


def test_tensorboard(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    _train(tmp_path, epochs=1, tensorboard=True)
    assert list((tmp_path / "tensorboard").glob("events.*"))


# Several processes; more of them in tests/distributed


def test_two_processes_train_as_one(tmp_path: Path) -> None:
    assert_trains_as_one(tmp_path, 2, "ddp")
