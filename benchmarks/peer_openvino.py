"""OpenVINO, converted from the torch module."""

from __future__ import annotations

import importlib

import torch
from torch import Tensor

from .rivals import Entry, Job, rival


@rival("openvino", "OpenVINO on the converted net, tuned for latency")
def openvino(job: Job) -> Entry:
    job.only("infer", "cpu")
    ov = importlib.import_module("openvino")
    precision = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}[job.dtype]
    model = ov.convert_model(job.plain().float(), example_input=job.x, input=[list(job.x.shape)])
    options = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": precision,
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
    }
    request = ov.Core().compile_model(model, "CPU", options).create_infer_request()

    def run(x: Tensor) -> Tensor:
        (out,) = request.infer([x.float().numpy()], share_inputs=True).values()
        return torch.from_numpy(out.copy())

    return Entry(run)
