"""The cuDNN frontend's graphs: conv + bias (+ residual) + ReLU as one plan, BN folded."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from . import peer_fused_calls
from .rivals import Entry, Job, rival


class _Plan:
    """One conv's graph, built at its first call; a signature of `peer_fused_calls.FusedConv`."""

    def __init__(self, library: Any, weight: Tensor, bias: Tensor, stride: int) -> None:
        self.library, self.weight, self.bias = library, weight, bias.view(1, -1, 1, 1)
        self.geometry = {"padding": [weight.shape[2] // 2] * 2, "stride": [stride] * 2, "dilation": [1, 1]}
        self.graph: Any = None

    def _build(self, x: Tensor, residual: Tensor | None, relu: bool) -> None:
        cudnn = self.library
        kind = {torch.float16: "HALF", torch.bfloat16: "BFLOAT16", torch.float32: "FLOAT"}[x.dtype]
        self.handle = cudnn.create_handle()
        full = cudnn.data_type.FLOAT
        kinds = {"io_data_type": getattr(cudnn.data_type, kind), "compute_data_type": full}
        self.graph = cudnn.pygraph(handle=self.handle, intermediate_data_type=full, **kinds)
        self.keys = [self.graph.tensor_like(t.detach()) for t in (x, self.weight, self.bias)]
        y = self.graph.conv_fprop(image=self.keys[0], weight=self.keys[1], **self.geometry)
        y = self.graph.bias(input=y, bias=self.keys[2])
        if residual is not None:
            self.keys.append(self.graph.tensor_like(residual.detach()))
            y = self.graph.add(a=y, b=self.keys[-1])
        y = self.graph.relu(input=y) if relu else y
        y.set_output(True)
        self.out = y
        self.graph.build([cudnn.heur_mode.A, cudnn.heur_mode.FALLBACK])
        self.workspace = torch.empty(self.graph.get_workspace_size(), dtype=torch.uint8, device=x.device)

    def __call__(self, x: Tensor, residual: Tensor | None = None, *, relu: bool) -> Tensor:
        if self.graph is None:
            self._build(x, residual, relu)
        pad, stride = self.geometry["padding"][0], self.geometry["stride"][0]
        size = [(n + 2 * pad - self.weight.shape[2]) // stride + 1 for n in x.shape[2:]]
        shape = (len(x), len(self.weight), *size)
        out = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
        given = [x, self.weight, self.bias, *([] if residual is None else [residual])]
        self.library.set_stream(handle=self.handle, stream=torch.cuda.current_stream().cuda_stream)
        tensors = dict(zip(self.keys, given, strict=True)) | {self.out: out}
        self.graph.execute(tensors, self.workspace, handle=self.handle)
        return out


@rival("cudnn frontend", "cuDNN's graphs: conv + bias + residual + ReLU as one plan, channels_last")
def frontend(job: Job) -> Entry:
    job.only("infer", "cuda")
    library = importlib.import_module("cudnn")
    make = lambda weight, bias, stride, shape, groups: _Plan(library, weight, bias, stride)  # noqa: E731
    net = job.plain().to(memory_format=torch.channels_last)
    return Entry(peer_fused_calls.FoldedNet(net, make), True)
