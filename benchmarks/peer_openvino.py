"""OpenVINO, converted from the torch module."""

from __future__ import annotations

import torch
from torch import Tensor

from fused_resnet.frozen import compiled_by_openvino

from .rivals import Entry, Job, rival


@rival("openvino", "OpenVINO on the converted net, tuned for latency")
def openvino(job: Job) -> Entry:
    job.only("infer", "cpu")
    precision = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}[job.dtype]
    request = compiled_by_openvino(job.plain(), job.x, precision).create_infer_request()

    def run(x: Tensor) -> Tensor:
        (out,) = request.infer([x.float().numpy()], share_inputs=True).values()
        return torch.from_numpy(out.copy())

    return Entry(run)
