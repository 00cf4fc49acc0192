"""ONNX Runtime on the file that `to_onnx` writes, with all graph optimisations."""

from __future__ import annotations

import importlib
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from fused_resnet.export import to_onnx

from .rivals import Entry, Job, rival

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}


@rival("onnxruntime", "ONNX Runtime on the exported net, all graph optimisations")
def onnxruntime(job: Job) -> Entry:
    job.only("infer")
    ort = importlib.import_module("onnxruntime")
    device, provider = job.x.device, PROVIDERS[job.x.device.type]
    if provider not in ort.get_available_providers():
        raise ImportError(f"this onnxruntime has no {provider}")
    x = job.x.to(job.dtype)
    if x.dtype == torch.bfloat16:
        raise NotImplementedError("it runs in fp32 and fp16 only")
    net = job.plain()
    with tempfile.TemporaryDirectory() as folder:
        path = to_onnx(net, x, Path(folder, "net.onnx"), dynamic_batch=False, dtype=x.dtype)
        options = ort.SessionOptions()
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
        options.intra_op_num_threads = torch.get_num_threads()
        options.add_session_config_entry("session.force_spinning_stop", "1")  # its threads leave the others in peace
        session = ort.InferenceSession(str(path), options, providers=[provider])

    def run(x: Tensor) -> Tensor:
        if device.type == "cpu":
            return torch.from_numpy(session.run(["logits"], {"images": x.numpy()})[0])
        binding = session.io_binding()
        kind = {torch.float32: "float32", torch.float16: "float16"}[x.dtype]
        out = torch.empty(len(x), net.fc.out_features, dtype=x.dtype, device=device)
        for bind, name, tensor in ((binding.bind_input, "images", x), (binding.bind_output, "logits", out)):
            np = importlib.import_module("numpy")
            bind(name, device.type, device.index or 0, getattr(np, kind), tuple(tensor.shape), tensor.data_ptr())
        torch.cuda.synchronize(device)  # its stream is its own
        session.run_with_iobinding(binding)
        return out

    return Entry(run)
