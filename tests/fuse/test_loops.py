"""Fused models in the training loops of others: timm's, Lightning's, and plain ones with averaged weights."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from conftest import needs_cpp
from networks import images, randomise
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fused_resnet as fr
from fused_resnet import whole
from fused_resnet.convert import unfused_units

pytestmark = [needs_cpp, pytest.mark.filterwarnings("ignore")]
needs_timm = pytest.mark.skipif(importlib.util.find_spec("timm") is None, reason="timm is not installed")
STEPS = 4


@pytest.fixture
def blocks(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """One entry for each residual block that runs as one op."""
    seen: list[int] = []
    real = whole.residual_block
    monkeypatch.setattr(whole, "residual_block", lambda *args: (seen.append(1), real(*args))[1])
    return seen


def pair(torchvision: ModuleType, **options: Any) -> tuple[nn.Module, nn.Module]:
    """(fused, as it was): a small network of bottlenecks in float64."""
    resnet = torchvision.models.resnet
    theirs = resnet.ResNet(resnet.Bottleneck, [1, 1, 1, 1], num_classes=5, width_per_group=16, **options)
    randomise(theirs)
    theirs = theirs.double().to(memory_format=torch.channels_last)
    ours = copy.deepcopy(theirs)
    fr.fuse(ours, memory="low")
    return ours, theirs


def batches() -> Iterator[tuple[Tensor, Tensor]]:
    for seed in range(STEPS):
        yield images(6, 3, 32, 32, seed=seed).double(), torch.arange(6) % 5


def assert_same_state(ours: nn.Module, theirs: nn.Module) -> None:
    a, b = ours.state_dict(), theirs.state_dict()
    assert list(a) == list(b)
    for key, value in b.items():
        torch.testing.assert_close(a[key], value, rtol=1e-6, atol=1e-8, msg=lambda m, key=key: f"{key}: {m}")


def timm_loop(model: nn.Module, folder: Path) -> tuple[list[float], Any]:
    """Its task, optimiser with layer decay, schedule, clipping, averaged weights and checkpoints."""
    import timm.loss
    import timm.optim
    import timm.scheduler
    import timm.task
    import timm.utils

    torch.manual_seed(0)
    model.train()
    optimizer = timm.optim.create_optimizer_v2(model, opt="sgd", lr=0.05, weight_decay=1e-3, momentum=0.9)
    scheduler, _ = timm.scheduler.create_scheduler_v2(
        optimizer, num_epochs=STEPS, updates_per_epoch=1, step_on_epochs=False
    )
    ema = timm.utils.ModelEmaV3(model, decay=0.7)
    task = timm.task.ClassificationTask(model, timm.loss.LabelSmoothingCrossEntropy(0.1), device=torch.device("cpu"))
    saver = timm.utils.CheckpointSaver(
        model, optimizer, model_ema=ema, checkpoint_dir=str(folder), recovery_dir=str(folder)
    )
    losses = []
    for step, (x, target) in enumerate(batches()):
        loss = task(x, target)["loss"]
        optimizer.zero_grad()
        loss.backward()
        timm.utils.dispatch_clip_grad(model.parameters(), 0.5, mode="norm")
        optimizer.step()
        ema.update(model, step=step)
        scheduler.step_update(step + 1)
        losses.append(loss.item())
    saver.save_checkpoint(0, metric=1.0)
    return losses, ema.module


@needs_timm
def test_timms_loop(torchvision: ModuleType, tmp_path: Path, blocks: list[int]) -> None:
    ours, theirs = pair(torchvision)
    for name in ("ours", "theirs"):
        (tmp_path / name).mkdir()
    losses, average = timm_loop(ours, tmp_path / "ours")
    assert len(blocks) == 4 * STEPS
    expected, their_average = timm_loop(theirs, tmp_path / "theirs")
    assert losses == pytest.approx(expected, rel=1e-6)
    assert_same_state(ours, theirs)
    assert_same_state(average, their_average)
    assert unfused_units(average) == []
    saved = torch.load(tmp_path / "ours" / "model_best.pth.tar", weights_only=False)
    theirs.load_state_dict(saved["state_dict"])  # without a trace of fusion
    assert_same_state(ours, theirs)


@needs_timm
def test_timm_freezes_and_thaws(torchvision: ModuleType) -> None:
    """`timm.utils.freeze` puts other batch norms in place, inside fused modules."""
    import timm.utils

    ours, theirs = pair(torchvision)
    for change in (timm.utils.freeze, timm.utils.unfreeze):
        for model in (ours, theirs):
            change(model, ["layer1", "bn1"])
        for model in (ours, theirs):
            model.zero_grad()
            x, target = next(batches())
            nn.functional.cross_entropy(model(x), target).backward()
        assert_same_state(ours, theirs)
        for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
            assert (a.grad is None) == (b.grad is None)
            torch.testing.assert_close(a.grad, b.grad)


def test_lightnings_loop(torchvision: ModuleType, tmp_path: Path, blocks: list[int]) -> None:
    """Fit with gradients accumulated and clipped, validate, checkpoint, and go on from there."""
    lightning = pytest.importorskip("lightning", reason="lightning is not installed", exc_type=ImportError)

    class Net(lightning.LightningModule):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.model = model

        def training_step(self, batch: Any, index: int) -> Tensor:
            return nn.functional.cross_entropy(self.model(batch[0]), batch[1])

        def validation_step(self, batch: Any, index: int) -> None:
            self.log("loss", nn.functional.cross_entropy(self.model(batch[0]), batch[1]))

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), 0.05, momentum=0.9)

    data = torch.utils.data.DataLoader(list(batches()), batch_size=None)

    def fit(net: Any, folder: Path, epochs: int, resume: str | None = None) -> str:
        trainer = lightning.Trainer(
            accelerator="cpu",
            precision="64-true",
            max_epochs=epochs,
            accumulate_grad_batches=2,
            gradient_clip_val=0.5,
            default_root_dir=folder,
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(net, data, data, ckpt_path=resume)
        path = str(folder / f"{epochs}.ckpt")
        trainer.save_checkpoint(path)
        return path

    nets = [Net(model) for model in pair(torchvision)]
    ends = []
    for index, net in enumerate(nets):
        first = fit(net, tmp_path / str(index), 1)
        again = Net(copy.deepcopy(net.model))
        fit(again, tmp_path / str(index), 2, resume=first)
        ends.append(again)
        assert len(blocks) == 2 * 4 * STEPS
    assert_same_state(*nets)
    assert_same_state(*ends)
    assert unfused_units(nets[0]) == []


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_stages(torchvision: ModuleType, reentrant: bool, blocks: list[int]) -> None:
    """Blocks are computed again in the backward pass; statistics move as they do unfused."""
    ours, theirs = pair(torchvision)
    for model in (ours, theirs):
        model.train()
        x, target = next(batches())
        x = model.maxpool(model.relu(model.bn1(model.conv1(x))))
        for stage in (model.layer1, model.layer2, model.layer3, model.layer4):
            x = checkpoint(stage, x, use_reentrant=reentrant)
        nn.functional.cross_entropy(model.fc(model.avgpool(x).flatten(1)), target).backward()
    assert len(blocks) == 8 if not reentrant else len(blocks) >= 4
    assert_same_state(ours, theirs)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-6, atol=1e-9)


def test_averaged_weights_and_new_statistics(torchvision: ModuleType) -> None:
    """torch.optim.swa_utils: averages, then batch norm's statistics of the averaged model from data."""
    swa = torch.optim.swa_utils
    averages = []
    for model in pair(torchvision):
        model.train()
        optimizer = torch.optim.SGD(model.parameters(), 0.05)
        average = swa.AveragedModel(model, use_buffers=True)
        for x, target in batches():
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), target).backward()
            optimizer.step()
            average.update_parameters(model)
        swa.update_bn(list(batches()), average)
        averages.append(average)
    assert_same_state(*averages)
    assert unfused_units(averages[0]) == []


def test_gradient_scaling_under_autocast(torchvision: ModuleType) -> None:
    """The loss falls alike under bfloat16 autocast with a scaler, as in a mixed-precision loop."""
    losses = []
    for model in pair(torchvision):
        model.float().train()
        optimizer = torch.optim.SGD(model.parameters(), 0.002)  # small enough for losses to fall
        scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
        found = []
        for _ in range(2):
            for x, target in batches():
                optimizer.zero_grad()
                with torch.autocast("cpu", torch.bfloat16):
                    loss = nn.functional.cross_entropy(model(x.float()), target)
                scaler.scale(loss).backward()
                scaler.step(optimizer)
                scaler.update()
                found.append(loss.item())
        losses.append(found)
    assert losses[0][0] == pytest.approx(losses[1][0], rel=0.05)
    assert all(sum(found[-STEPS:]) < sum(found[:STEPS]) for found in losses)
