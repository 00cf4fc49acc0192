"""Ours in other ways than a model runs by itself: trained by other plans, and frozen for inference."""

from __future__ import annotations

import torch
from torch import Tensor

import fused_resnet

from .rivals import Entry, Job, rival


def _planned(job: Job, memory: str, **plan: bool) -> Entry:
    job.only(mode="train")
    net = job.load(getattr(fused_resnet, job.model)(memory=memory)).to(memory_format=torch.channels_last)

    def run(x: Tensor) -> Tensor:
        with fused_resnet.use_plan(**plan):
            return net(x)

    return Entry(run, True, net)


@rival("ours: fast", "ours unit by unit, raw and rectified outputs kept")
def fast(job: Job) -> Entry:
    return _planned(job, "fast")


@rival("ours: low", "ours, block inputs and statistics kept, convs computed again")
def low(job: Job) -> Entry:
    return _planned(job, "low")


@rival("ours: stored", "ours, blocks as one op, no Gram form")
def stored(job: Job) -> Entry:
    return _planned(job, "balanced", gram=False, prologue=False, stored=True)


@rival("ours: Gram", "ours, the Gram form in every conv that allows it")
def gram(job: Job) -> Entry:
    return _planned(job, "balanced", gram=True, prologue=False)


@rival("ours: prologue", "ours, Gram form and convs that read raw outputs through BN and ReLU")
def prologue(job: Job) -> Entry:
    return _planned(job, "balanced", gram=True, prologue=True)


@rival("ours: frozen", "ours, frozen: no look-ups between the convs")
def frozen(job: Job) -> Entry:
    job.only(mode="infer")
    return Entry(fused_resnet.freeze(job.fused()), True)
