"""TensorRT, through Torch-TensorRT."""

from __future__ import annotations

from fused_resnet.dispatch import BackendUnavailableError
from fused_resnet.tensorrt import to_tensorrt

from .rivals import Entry, Job, rival


@rival("tensorrt", "TensorRT's engine of the whole net, which Torch-TensorRT built")
def tensorrt(job: Job) -> Entry:
    job.only("infer", "cuda")
    try:
        return Entry(to_tensorrt(job.plain(), job.x, dtype=job.dtype))
    except BackendUnavailableError as error:
        raise ImportError(str(error)) from error
