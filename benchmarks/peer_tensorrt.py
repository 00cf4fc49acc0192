"""Torch-TensorRT."""

from __future__ import annotations

import importlib

import torch

from .rivals import Entry, Job, rival


@rival("torch-tensorrt", "Torch-TensorRT's engine of the whole net, channels_last")
def tensorrt(job: Job) -> Entry:
    job.only("infer", "cuda")
    trt = importlib.import_module("torch_tensorrt")
    net = job.plain().to(job.dtype, memory_format=torch.channels_last)
    x = job.x.to(job.dtype, memory_format=torch.channels_last)
    options = {"require_full_compilation": True, "use_explicit_typing": True}
    return Entry(trt.compile(net, ir="dynamo", inputs=[x], **options), True)
