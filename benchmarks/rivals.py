"""Who is measured: one small entry each. To add a rival, write a function `job -> Entry` under `@rival(...)`, here or
in a file peer_<name>.py of its own."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fused_resnet

from .plain_resnet import plain_resnet

WHAT = {"infer": "inference", "train": "training"}

# A rival that is farther from torch's result than that (relative) does another job, and its time says nothing.
WRONG = {torch.float32: 1e-2, torch.bfloat16: 0.2, torch.float16: 0.05}


@dataclass(frozen=True)
class Job:
    """What everybody does: `mode` ("infer" or "train") on NCHW images `x`, labels `target`, from the same `state`.

    16-bit dtypes are autocast's, unless `cast`: then parameters and images are of that dtype.
    """

    model: str
    mode: str
    dtype: torch.dtype
    state: dict[str, Tensor]
    x: Tensor
    target: Tensor
    cast: bool = False

    def load(self, net: nn.Module) -> nn.Module:
        """The net with this job's parameters, in its mode, on its device and, with `cast`, in its dtype."""
        net.load_state_dict(self.state)
        return net.train(self.mode == "train").to(self.x.device, self.dtype if self.cast else None)

    def only(self, mode: str = "", device: str = "") -> None:
        """Say that a rival serves this mode or kind of device alone.

        Raises:
            NotImplementedError: the job is another.
        """
        if device and device != self.x.device.type:
            raise NotImplementedError(f"it runs on {'a GPU' if device == 'cuda' else 'a CPU'} only")
        if mode and mode != self.mode:
            raise NotImplementedError(f"it does {WHAT[mode]} only")

    def plain(self) -> nn.Module:
        return self.load(plain_resnet(self.model))

    def fused(self) -> nn.Module:
        return self.load(getattr(fused_resnet, self.model)())

    def autocast(self) -> AbstractContextManager[Any]:
        if self.dtype == torch.float32 or self.cast:
            return nullcontext()
        return torch.autocast(self.x.device.type, self.dtype)

    def with_mode(self, mode: str) -> Job:
        return replace(self, mode=mode)


@dataclass(frozen=True)
class Entry:
    """A rival made ready for a job."""

    net: Callable[[Tensor], Tensor]  # images to logits
    channels_last: bool = False  # the layout in which it gets its images
    model: nn.Module | None = None  # what is trained; None: inference only

    def images(self, x: Tensor) -> Tensor:
        return x.contiguous(memory_format=torch.channels_last) if self.channels_last else x

    def step(self, job: Job) -> Callable[[], Tensor]:
        """One run to be timed: a forward pass that gives logits, or a training step that gives the loss."""
        x, target, net = self.images(job.x), job.target, self.net
        x = x.to(job.dtype) if job.cast else x
        if job.mode == "infer":

            def infer() -> Tensor:
                with torch.no_grad(), job.autocast():
                    return net(x)

            return infer
        if self.model is None:
            raise NotImplementedError("it does inference only")
        optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-3, momentum=0.9)

        def train() -> Tensor:
            optimizer.zero_grad(set_to_none=True)
            with job.autocast():
                loss = F.cross_entropy(net(x), target)
            loss.backward()
            optimizer.step()
            return loss.detach()

        return train


@dataclass(frozen=True)
class Rival:
    name: str
    about: str
    prepare: Callable[[Job], Entry]

    def step_for(self, job: Job) -> Callable[[], Callable[[], Tensor]]:
        """A function that makes the rival ready and returns its step."""
        return lambda: self.prepare(job).step(job)


class WrongResultError(RuntimeError):
    """A rival computes something else."""


PEERS: dict[str, Rival] = {}
OURS: dict[str, Rival] = {}


def rival(name: str, about: str, table: dict[str, Rival] = PEERS) -> Callable[[Callable[[Job], Entry]], Any]:
    def register(prepare: Callable[[Job], Entry]) -> Callable[[Job], Entry]:
        table[name] = Rival(name, about, prepare)
        return prepare

    return register


@rival("eager", "torch's own layers, NCHW")
def eager(job: Job) -> Entry:
    net = job.plain()
    return Entry(net, False, net)


@rival("channels_last", "torch's own layers, model and images in channels_last")
def channels_last(job: Job) -> Entry:
    net = job.plain().to(memory_format=torch.channels_last)
    return Entry(net, True, net)


@rival("compile", "torch.compile of torch's own layers in channels_last; frozen for inference")
def compiled(job: Job) -> Entry:
    torch.compiler.reset()
    net = job.plain().to(memory_format=torch.channels_last)
    options = {"freezing": True} if job.mode == "infer" else {}
    return Entry(torch.compile(net, options=options), True, net)


@rival("fused_resnet", "ours, model and images in channels_last", OURS)
def fused(job: Job) -> Entry:
    net = job.fused().to(memory_format=torch.channels_last)
    return Entry(net, True, net)


@rival("as is", "ours, NCHW, nothing else called", OURS)  # shown as fused_resnet.<model>()
def as_is(job: Job) -> Entry:
    net = job.fused()
    return Entry(net, False, net)


def discover() -> None:
    """Registers the rivals of every peer_<name>.py."""
    for module in pkgutil.iter_modules([str(Path(__file__).parent)]):
        if module.name.startswith("peer_"):
            importlib.import_module(f".{module.name}", __package__)


def title(name: str, model: str) -> str:
    """How a row is called in print: the card's own line for ours as is."""
    return f"fused_resnet.{model}()" if name == "as is" else name
