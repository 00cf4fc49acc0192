"""Our SyncBatchNorm beside torch.nn.SyncBatchNorm, which takes tensors on a GPU alone: two processes, on one or two.

On the CPU ours is compared with one process that sees the whole batch: tests/test_sync_batchnorm.py.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from networks import assert_close, images, relative
from processes import on_processes
from test_sync_batchnorm import _gradients, _network
from torch import Tensor, nn

import fused_resnet as fr

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="nn.SyncBatchNorm refuses CPU tensors"),
]
PARTS = (3, 5)
Found = dict[str, dict[str, Tensor]]


def _step(rank: int, model: nn.Module, dtype: torch.dtype) -> Found:
    """Output, gradients and running statistics of one training step on this process's part of the batch."""
    device = torch.device("cuda", rank % torch.cuda.device_count()) if torch.cuda.is_available() else "cpu"
    model = model.to(device, dtype, memory_format=torch.channels_last)
    x = images(sum(PARTS), 3, 32, 32).split(PARTS)[rank].to(device, dtype, memory_format=torch.channels_last)
    out = model(x)
    out.square().sum().backward()
    found = {"output": {"": out.detach()}, "gradients": _gradients(model), "buffers": dict(model.named_buffers())}
    return {what: {name: value.cpu() for name, value in tensors.items()} for what, tensors in found.items()}


def _part(rank: int, world: int, memory: str) -> dict[str, Found]:
    torch.backends.cudnn.allow_tf32 = False
    found = {}
    for dtype in (torch.float64, torch.float32):
        found[f"ours {dtype}"] = _step(rank, fr.convert_sync_batchnorm(_network(memory)), dtype)
        theirs = nn.SyncBatchNorm.convert_sync_batchnorm(fr.restore(_network(memory)))
        found[f"torch {dtype}"] = _step(rank, theirs, dtype)
    return found


@pytest.mark.parametrize("memory", ["balanced", "low"])
def test_a_step_is_that_of_torchs_sync_batch_norm(tmp_path: Path, memory: str) -> None:
    """In float64 tensor by tensor; in float32 outputs and statistics, within the budget that torch's set."""
    parts = on_processes(len(PARTS), tmp_path, _part, memory)
    ours, theirs, ours32, theirs32 = (
        [part[f"{who} {dtype}"] for part in parts]
        for dtype in (torch.float64, torch.float32)
        for who in ("ours", "torch")
    )
    exact = torch.cat([part["output"][""] for part in theirs])
    assert relative(torch.cat([part["output"][""] for part in ours]), exact) < 1e-10
    assert_close("output", *(torch.cat([part["output"][""] for part in found]) for found in (ours32, theirs32)), exact)
    assert ours[0]["gradients"].keys() == theirs[0]["gradients"].keys()
    for name in theirs[0]["gradients"]:  # each process has its part of the sum
        mine, other = (sum(part["gradients"][name] for part in found) for found in (ours, theirs))
        assert relative(mine, other) < 1e-8, name
    for rank, part in enumerate(theirs):
        for name, value in part["buffers"].items():
            if not value.is_floating_point():
                assert torch.equal(ours[rank]["buffers"][name], value), name
                continue
            assert relative(ours[rank]["buffers"][name], value) < 1e-10, name
            assert_close(name, ours32[rank]["buffers"][name], theirs32[rank]["buffers"][name], value)
