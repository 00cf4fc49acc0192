"""apex's NHWC BN with its ReLU and the residual fused into it."""

from __future__ import annotations

import importlib

import torch
from torch import nn

from .peer_attorch import FusedNorms
from .rivals import Entry, Job, rival


@rival("apex", "apex.contrib.groupbn's BN + residual + ReLU, channels_last, fp16")
def apex(job: Job) -> Entry:
    job.only("train", "cuda")
    library = importlib.import_module("apex.contrib.groupbn")
    if job.dtype != torch.float16:
        raise NotImplementedError("it runs in fp16 only")

    class Norm(library.BatchNorm2d_NHWC):  # type: ignore[misc, name-defined]
        def forward(self, x, z=None):  # type: ignore[no-untyped-def]
            rows = [None if t is None else t.permute(0, 2, 3, 1).contiguous() for t in (x, z)]
            return super().forward(*rows).permute(0, 3, 1, 2)

    def convert(bn: nn.BatchNorm2d, relu: bool) -> nn.Module:
        norm = Norm(bn.num_features, fuse_relu=relu)
        norm.load_state_dict(bn.state_dict(), strict=False)
        return norm.train(bn.training).to(bn.weight.device)

    net = FusedNorms(job.plain().to(memory_format=torch.channels_last), convert)
    return Entry(net, True, net)
