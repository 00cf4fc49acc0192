"""The training loop: stochastic gradient descent with everything that a run of a residual network asks for."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import lr_scheduler
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm.auto import tqdm

import fused_resnet as fr
from fused_resnet.cli import RequestError
from fused_resnet.train import checkpoint, data, logs
from fused_resnet.train.distributed import Processes, load_state, parallel, processes, state


class Settings(NamedTuple):
    """A run. `batch` counts the images of one process in one step of the optimizer."""

    data: str
    model: str
    out: Path
    epochs: int = 30
    batch: int = 128
    size: int = 224
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 1e-4
    schedule: str = "cosine"
    warmup: float = 1.0
    label_smoothing: float = 0.0
    amp: str = "off"
    ema: float = 0.0
    accumulate: int = 1
    options: tuple[tuple[str, Any], ...] = ()  # of the model's constructor
    sync_bn: bool = False
    parallel: str = "ddp"
    unfused: bool = False
    compile: bool = False
    cuda_graph: bool = False
    seed: int = 0
    workers: int = 0
    save_every: int = 0
    resume: bool = False
    tensorboard: bool = False
    device: str = "cpu"
    timeout: float = 600.0

    def deciding(self, world: int) -> dict[str, Any]:
        """What decides the numbers, and so must be the same where a run goes on."""
        free = ("out", "workers", "save_every", "resume", "tensorboard", "device", "timeout", "data", "parallel")
        chosen = {name: value for name, value in self._asdict().items() if name not in free}
        return chosen | {"options": repr(self.options), "world": world}


AMP = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def schedule(optimizer: torch.optim.Optimizer, settings: Settings, steps: int) -> lr_scheduler.LRScheduler:
    """Per step: linear warm-up from 1% over `warmup` epochs of `steps` steps, then a cosine to 0, or ("step") a
    tenth at 1/2 and again at 3/4 of the run (He et al. 2015, section 4.2)."""
    total, first = settings.epochs * steps, min(round(settings.warmup * steps), settings.epochs * steps - 1)
    rest = total - first
    main: lr_scheduler.LRScheduler
    if settings.schedule == "cosine":
        main = lr_scheduler.CosineAnnealingLR(optimizer, max(rest, 1))
    else:
        main = lr_scheduler.MultiStepLR(optimizer, [max(total // 2 - first, 1), max(total * 3 // 4 - first, 2)])
    if first < 1:
        return main
    return lr_scheduler.SequentialLR(optimizer, [lr_scheduler.LinearLR(optimizer, 0.01, 1.0, first), main], [first])


def optimizer_for(model: nn.Module, settings: Settings) -> torch.optim.Optimizer:
    """SGD with Nesterov's momentum; weight decay for what has two dimensions or more (not BN, biases, scales)."""
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": settings.weight_decay},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.SGD(groups, settings.lr, settings.momentum, nesterov=settings.momentum > 0)


class Run:
    """The state of a run: model, optimizer, schedule, scaler, average, position and history."""

    def __init__(self, settings: Settings, group: Processes) -> None:
        self.settings, self.group = settings, group
        if settings.cuda_graph and group.device.type != "cuda":
            raise RequestError(f"--cuda-graph needs a GPU, the device is {group.device}")
        if settings.amp == "fp16" and group.device.type == "cpu":
            raise RequestError("--amp fp16 needs a GPU: on the CPU take bf16")
        if settings.cuda_graph and (group.world > 1 or settings.compile):
            raise RequestError("--cuda-graph goes with one process and without --compile")
        if settings.parallel == "fsdp" and settings.ema:
            raise RequestError("--ema does not go with --parallel fsdp: the average would be of shards")
        self.data = data.load(settings.data, settings.size)
        self.steps = len(self.data.train) // (settings.batch * group.world)
        if self.steps < 1:
            count = f"{len(self.data.train)} images for training"
            raise RequestError(f"--batch {settings.batch} on {group.world} processes is more than the {count}")
        if settings.batch % settings.accumulate:
            raise RequestError(
                f"--batch {settings.batch} cannot be split into --accumulate {settings.accumulate} parts"
            )
        torch.manual_seed(settings.seed)
        model = self._build()
        if settings.unfused:
            fr.restore(model)
        if settings.sync_bn:
            fr.convert_sync_batchnorm(model)
        self.model = model.to(group.device)
        self.average = (
            AveragedModel(self.model, multi_avg_fn=get_ema_multi_avg_fn(settings.ema), use_buffers=True)
            if settings.ema
            else None
        )
        self.runs = parallel(self.model, settings.parallel, group)
        self.optimizer = optimizer_for(self.model, settings)
        self.schedule = schedule(self.optimizer, settings, self.steps)
        self.scaler = torch.amp.GradScaler(group.device.type, enabled=settings.amp == "fp16")
        self.epoch, self.step, self.correct, self.broken = 0, 0, 0, 0
        self.seconds = 0.0
        self.losses: list[float] = []
        self.history: list[logs.Epoch] = []
        self.best = -1.0

    def _build(self) -> nn.Module:
        known = {"num_classes": len(self.data.classes), "in_channels": self.data.channels}
        try:
            return getattr(fr, self.settings.model)(**known | dict(self.settings.options))
        except (TypeError, ValueError) as error:
            raise RequestError(f"--model {self.settings.model}: {error}") from error

    # checkpoints

    @property
    def _path(self) -> Path:
        return self.settings.out / "checkpoint.pt"

    def save(self) -> None:
        """All processes call it, the first one writes."""
        model, optimizer = state(self.model, self.optimizer, self.settings.parallel)
        if self.group.rank == 0:
            found = {
                "position": [self.epoch, self.step, self.correct, self.broken],
                "settings": self.settings.deciding(self.group.world),
                "model": model,
                "optimizer": optimizer,
                "schedule": self.schedule.state_dict(),
                "scaler": self.scaler.state_dict(),
                "average": None if self.average is None else self.average.state_dict(),
                "random": torch.get_rng_state(),
                "losses": self.losses,
                "history": self.history,
                "best": self.best,
                "seconds": self.seconds,
            }
            checkpoint.save(found, self._path)
        self.group.wait()

    def load(self) -> None:
        """Go on where the checkpoint stands."""
        found = checkpoint.load(self._path)
        before, now = found["settings"], self.settings.deciding(self.group.world)
        changed = [f"{n} {before.get(n)!r} then, {now[n]!r} now" for n in now if before.get(n) != now[n]]
        if changed:
            raise RequestError(f"--resume: {self._path} belongs to another run: {'; '.join(changed)}")
        load_state(self.model, self.optimizer, self.settings.parallel, (found["model"], found["optimizer"]))
        self.schedule.load_state_dict(found["schedule"])
        self.scaler.load_state_dict(found["scaler"])
        if self.average is not None:
            self.average.load_state_dict(found["average"])
        torch.set_rng_state(found["random"])
        self.epoch, self.step, self.correct, self.broken = found["position"]
        self.losses, self.history = found["losses"], found["history"]
        self.best, self.seconds = found["best"], found["seconds"]

    # steps

    def _images(self, x: Tensor) -> Tensor:
        return x.to(self.group.device, non_blocking=True, memory_format=torch.channels_last)

    def _precision(self) -> Any:
        dtype = AMP[self.settings.amp]
        graph = {"cache_enabled": False} if self.settings.cuda_graph else {}
        return torch.autocast(self.group.device.type, dtype, **graph) if dtype else contextlib.nullcontext()

    def _step(self, forward: Any, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """One step of the optimizer: (mean loss, correct answers), on the device."""
        parts = self.settings.accumulate
        loss = torch.zeros((), device=self.group.device)
        correct = torch.zeros((), dtype=torch.long, device=self.group.device)
        self.optimizer.zero_grad()
        for i, (images, labels) in enumerate(zip(x.chunk(parts), y.chunk(parts), strict=True)):
            with self._gradients_stay(i < parts - 1):
                with self._precision():
                    logits = forward(images)
                part = F.cross_entropy(logits.float(), labels, label_smoothing=self.settings.label_smoothing) / parts
                self.scaler.scale(part).backward()
            loss += part.detach()
            correct += (logits.detach().argmax(1) == labels).sum()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.average is not None:
            self.average.update_parameters(self.model)
        return loss, correct

    @contextlib.contextmanager
    def _gradients_stay(self, stay: bool) -> Iterator[None]:
        """With `stay`, gradients are not exchanged yet."""
        if isinstance(self.runs, nn.parallel.DistributedDataParallel) and stay:
            with self.runs.no_sync():
                yield
        elif self.settings.parallel == "fsdp":
            self.runs.set_requires_gradient_sync(not stay)  # type: ignore[operator]
            yield
        else:
            yield

    def forward(self) -> Any:
        """What a step calls: the model, compiled or captured where that was asked for."""
        if self.settings.compile:
            return torch.compile(self.runs)
        if self.settings.cuda_graph:
            images = self.settings.batch // self.settings.accumulate
            sample = self._images(torch.zeros(images, *self.data.train[0][0].shape))
            buffers = [buffer.clone() for buffer in self.model.buffers()]
            with self._precision():
                captured = torch.cuda.make_graphed_callables(self.runs, (sample,))
            with torch.no_grad():  # the warm-up's images were none
                for buffer, value in zip(self.model.buffers(), buffers, strict=True):
                    buffer.copy_(value)
            return captured
        return self.runs

    def train_epoch(self, forward: Any) -> None:
        settings, group = self.settings, self.group
        self.model.train()
        batches = data.loader(
            self.data.train,
            settings.batch,
            group.rank,
            group.world,
            seed=settings.seed,
            epoch=self.epoch,
            start=self.step,
            workers=settings.workers,
        )
        bar = tqdm(batches, f"epoch {self.epoch + 1}/{settings.epochs}", disable=None if group.rank == 0 else True)
        bar.total, bar.initial = self.steps, self.step
        bar.refresh()
        started = time.perf_counter()
        for x, y, broken in bar:
            loss, correct = self._step(forward, self._images(x), y.to(group.device))
            self.schedule.step()
            sums = group.sum(torch.stack([loss.double(), correct.double(), loss.new_tensor(broken).double()]))
            mean = sums[0].item() / group.world
            self.losses.append(mean)
            self.correct += int(sums[1])
            self.broken += int(sums[2])
            self.step += 1
            if not math.isfinite(mean) and self.settings.amp != "fp16":
                raise RequestError(
                    f"the loss is {mean} at step {len(self.losses)}: try a smaller --lr, or a longer --warmup"
                )
            bar.set_postfix(loss=f"{mean:.3f}")
            if settings.save_every and self.step % settings.save_every == 0:
                self.seconds += time.perf_counter() - started
                self.save()
                started = time.perf_counter()
        self.seconds += time.perf_counter() - started

    @torch.no_grad()
    def test(self) -> tuple[float, float]:
        """(loss, accuracy) on the test images, of the average where there is one."""
        model = (self.average or self.model).eval()
        batches = data.loader(
            self.data.test, self.settings.batch, self.group.rank, self.group.world, workers=self.settings.workers
        )
        sums = torch.zeros(3, dtype=torch.float64, device=self.group.device)
        for x, y, _ in batches:
            with self._precision():
                logits = model(self._images(x)).float()
            y = y.to(self.group.device)
            sums += torch.stack(
                [F.cross_entropy(logits, y, reduction="sum"), (logits.argmax(1) == y).sum(), y.new_tensor(len(y))]
            ).double()
        loss, correct, count = self.group.sum(sums).tolist()
        return loss / count, correct / count

    def finish_epoch(self) -> logs.Epoch:
        loss, accuracy = self.test()
        seen = self.steps * self.settings.batch * self.group.world
        row: logs.Epoch = {
            "epoch": self.epoch + 1,
            "step": len(self.losses),
            "lr": self.optimizer.param_groups[0]["lr"],
            "train_loss": sum(self.losses[-self.steps :]) / self.steps,
            "train_accuracy": self.correct / seen,
            "test_loss": loss,
            "test_accuracy": accuracy,
            "broken_images": self.broken,
            "seconds": round(self.seconds, 3),
            "images_per_second": round(seen / self.seconds, 1),
        }
        self.history.append(row)
        self.epoch, self.step, self.correct, self.broken, self.seconds = self.epoch + 1, 0, 0, 0, 0.0
        self.save()
        best, self.best = accuracy > self.best, max(self.best, accuracy)
        model, _ = state(self.model, self.optimizer, self.settings.parallel)
        if self.average is not None:
            model = self.average.module.state_dict()
        if best and self.group.rank == 0:
            checkpoint.save(model, self.settings.out / "best.pt")
        if self.epoch == self.settings.epochs and self.group.rank == 0:
            checkpoint.save(model, self.settings.out / "model.pt")
        return row


def train(settings: Settings, say: Any = print) -> list[logs.Epoch]:
    """Carry a run out, or on; the rows of epochs.csv.

    In the folder `out`: checkpoint.pt (to go on from), best.pt and model.pt (state dicts for `weights=`), epochs.csv,
    steps.csv, curves.png.
    """
    with processes(torch.device(settings.device), settings.timeout) as group:
        run = Run(settings, group)
        first = group.rank == 0
        settings.out.mkdir(parents=True, exist_ok=True)
        if settings.resume:
            run.load()
        elif run._path.exists():
            raise RequestError(f"{run._path} is there already: --resume to go on with it, or another --out")
        board = logs.Board(settings.out / "tensorboard", len(run.losses)) if settings.tensorboard and first else None
        if first:
            for note in run.data.notes:
                say(note)
            parameters = sum(p.numel() for p in run.model.parameters())
            say(
                f"{settings.model}: {parameters / 1e6:.2f} M parameters, {len(run.data.classes)} classes, "
                f"{len(run.data.train)} images for training, {len(run.data.test)} for the test, {group.world} "
                f"process{'es' if group.world > 1 else ''} on {group.device}"
            )
        group.wait()
        forward = run.forward()
        while run.epoch < settings.epochs:
            run.train_epoch(forward)
            row = run.finish_epoch()
            if first:
                logs.write_tables(settings.out, run.history, run.losses)
                if board is not None:
                    board.add(row)
                say(
                    f"epoch {row['epoch']}: loss {row['train_loss']:.4f}, test loss {row['test_loss']:.4f}, "
                    f"test accuracy {row['test_accuracy']:.2%}, {row['images_per_second']:.0f} images/s"
                    + (f", {row['broken_images']:.0f} broken images replaced" if row["broken_images"] else "")
                )
        if first and run.history:
            title = f"{settings.model} on {settings.data}"
            if not logs.draw(settings.out / "curves.png", title, run.history, run.losses):
                say("no picture of the curves: matplotlib is not installed")
        return run.history
