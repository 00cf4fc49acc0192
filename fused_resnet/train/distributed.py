"""The processes of a run: one alone, or those that torchrun started, each with its device."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fused_resnet.cli import RequestError
from fused_resnet.modules import FusedModule

_GONE = ("gloo", "nccl", "connection", "peer", "timed out", "timeout", "store", "socket")


class Processes(NamedTuple):
    """This process among the others; `world` is 1 without torchrun."""

    rank: int
    world: int
    device: torch.device

    def sum(self, values: Tensor) -> Tensor:
        """Of all processes."""
        if self.world > 1:
            dist.all_reduce(values)
        return values

    def wait(self) -> None:
        if self.world > 1:
            dist.barrier()


@contextlib.contextmanager
def processes(device: torch.device, timeout: float) -> Iterator[Processes]:
    """Join the others (torchrun's environment variables say who they are) for the length of the block.

    Raises:
        RequestError: another process has ended, or cannot be reached for `timeout` seconds.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        yield Processes(0, 1, device)
        return
    rank = int(os.environ["RANK"])
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    try:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(seconds=timeout))
        yield Processes(rank, world, device)
        dist.barrier()
    except RuntimeError as error:
        text = str(error).lower()
        if isinstance(error, torch.OutOfMemoryError) or not any(word in text for word in _GONE):
            raise
        why = str(error).strip().splitlines()[0]
        raise RequestError(
            f"process {rank} of {world}: another process has ended or cannot be reached ({why})"
        ) from error
    finally:
        if dist.is_initialized():
            with contextlib.suppress(Exception):
                dist.destroy_process_group()


def parallel(model: nn.Module, how: str, group: Processes) -> nn.Module:
    """The model for several processes: "ddp" wraps it, "fsdp" (FSDP2) shards its parameters, block by block."""
    if how == "fsdp":
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh(group.device.type, (group.world,))
        for module in model.modules():
            if isinstance(module, FusedModule) and module is not model and next(module.parameters(), None) is not None:
                fully_shard(module, mesh=mesh)
        fully_shard(model, mesh=mesh)
        return model
    if group.world == 1:
        return model
    for p in model.parameters():
        if p.dim() == 4 and p.shape[1] == 1:  # ambiguous strides: those that the gradient will have, or DDP warns
            p.data = p.data.as_strided(p.shape, (p.stride(0), 1, p.shape[3], 1))
    ids = [group.device.index] if group.device.type == "cuda" else None
    return nn.parallel.DistributedDataParallel(model, device_ids=ids)


def state(model: nn.Module, optimizer: Any, how: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """(model, optimizer): whole and on the CPU where they are sharded. All processes must call it."""
    if how != "fsdp":
        return model.state_dict(), optimizer.state_dict()
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict

    return get_state_dict(model, optimizer, options=StateDictOptions(full_state_dict=True, cpu_offload=True))


def load_state(model: nn.Module, optimizer: Any, how: str, found: tuple[dict[str, Any], dict[str, Any]]) -> None:
    """The inverse of `state`."""
    if how != "fsdp":
        model.load_state_dict(found[0])
        optimizer.load_state_dict(found[1])
        return
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_state_dict

    options = StateDictOptions(full_state_dict=True)
    set_state_dict(model, optimizer, model_state_dict=found[0], optim_state_dict=found[1], options=options)
