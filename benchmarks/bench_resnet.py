"""`fused-resnet verify` and `fused-resnet bench`: whole networks on photographs; parity first, then times."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from . import agreement, files, photographs, report, rivals, timing
from .plain_resnet import plain_resnet
from .realistic import make_realistic
from .rivals import Job, title

BATCH = {"infer": 1, "train": 4}
ROUNDS = {"infer": 30, "train": 10}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
INTERRUPTED = 130  # as shells have it


@dataclass(frozen=True)
class Request:
    """What the user asked for; None leaves the default of the mode."""

    model: str = "resnet50"
    modes: tuple[str, ...] = ("infer", "train")
    batch: int | None = None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    dtype: str = "fp32"
    peers: tuple[str, ...] = ("eager", "channels_last")
    images: tuple[str, ...] = ()
    size: int = 224
    rounds: int | None = None
    json: Path | None = None
    plot: Path | None = None
    environment: dict[str, Any] = field(default_factory=dict)


@contextlib.contextmanager
def stages(what: str, total: int) -> Iterator[agreement.Advance]:
    """A progress bar over named stages; call the result with the name of each as it starts."""
    with tqdm(total=total, desc=what, leave=False, bar_format="{desc} |{bar}| {n_fmt}/{total_fmt} {elapsed}") as bar:
        started = False

        def advance(stage: str) -> None:
            nonlocal started
            bar.update(int(started))
            started = True
            bar.set_description(f"{what}: {stage}")

        yield advance


def prepare(request: Request, seed: int = 0) -> tuple[Tensor, dict[str, Tensor], str]:
    """(crops, the state dict for all nets, what the input is)."""
    if request.images:
        images = [photographs.open_image(path) for path in request.images]
        names = [Path(path).name for path in request.images]
    else:
        found = photographs.bundled()
        images, names = list(found.values()), list(found)
    with stages("input", 2) as advance:
        advance("crops of photographs")
        largest = max((request.batch or BATCH[mode]) for mode in request.modes)
        crops = photographs.crops(images, max(agreement.CROPS, min(largest, 512)), request.size, seed)
        advance("batch norm's statistics")
        torch.manual_seed(seed)
        net = plain_resnet(request.model).to(request.device, memory_format=torch.channels_last)
        make_realistic(net, crops[: agreement.CROPS].to(request.device), seed)
    shown = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
    source = f"seeded crops of {shown}"
    return crops, {name: value.cpu() for name, value in net.state_dict().items()}, source


def make_job(request: Request, mode: str, crops: Tensor, state: dict[str, Tensor], seed: int = 0) -> Job:
    batch = request.batch or BATCH[mode]
    generator = torch.Generator().manual_seed(seed)
    target = torch.randint(0, state["fc.bias"].numel(), (batch,), generator=generator)
    x = crops[torch.arange(batch) % len(crops)].to(request.device)
    return Job(request.model, mode, DTYPES[request.dtype], state, x, target.to(request.device))


def agree(request: Request, job: Job, crops: Tensor) -> list[agreement.Agreement]:
    """Hold every one of ours against the plain net, and print what was found."""
    ours = list(rivals.OURS.values())
    with stages(f"parity, {rivals.WHAT[job.mode]}", (2 if job.mode == "infer" else 3) + len(ours)) as advance:
        if job.mode == "infer":
            results = agreement.infer_agreement(job, ours, crops[: agreement.CROPS], advance)
        else:
            results = agreement.train_agreement(job, ours, advance)
    for result in results:
        print(*agreement.lines(result, request.model), sep="\n", flush=True)
    return results


def verify(request: Request) -> int:
    """Parity alone. Returns 0 where all of it holds, else 1."""
    crops, state, source = prepare(request)
    print(describe(request, source))
    results = [r for mode in request.modes for r in agree(request, make_job(request, mode, crops, state), crops)]
    return 0 if all(result.ok for result in results) else 1


def load_note() -> str | None:
    """A warning where other work keeps the CPUs busy."""
    load, cpus = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0, os.cpu_count() or 1
    if load <= 0.75 * cpus:
        return None
    return f"note: other work runs on this machine (load {load:.1f} on {cpus} CPUs), so the times will scatter"


def describe(request: Request, source: str) -> str:
    return f"{request.model}, {request.dtype}, {request.size}x{request.size}, on {request.device}; {source}"


def bench(request: Request) -> int:
    """Parity, then times, for each mode. Returns 0; 1 where parity failed or one of ours did not run."""
    outputs = files.check(json=request.json, plot=request.plot)
    if request.device.type == "cuda":
        torch.cuda.set_device(request.device)
        torch.backends.cudnn.benchmark = True  # the shapes are fixed: everyone gets the fastest algorithms
    document: dict[str, Any] = {
        "schema": 1,
        "complete": False,
        "environment": request.environment,
        "request": {
            "model": request.model,
            "device": str(request.device),
            "dtype": request.dtype,
            "size": request.size,
            "peers": list(request.peers),
        },
        "parity": [],
        "results": [],
    }
    code = 0
    busy = load_note()  # before our own work counts
    try:
        crops, state, source = prepare(request)
        document["input"] = source
        print(describe(request, source), *([busy] if busy else []), sep="\n", flush=True)
        good = []
        for mode in request.modes:
            job = make_job(request, mode, crops, state)
            found = agree(request, job, crops)
            document["parity"] += [result.as_dict() | {"name": title(result.name, request.model)} for result in found]
            if all(result.ok for result in found):
                good.append(job)
            else:
                code = 1
        for job in good:
            result = timing.time_all(job, request.peers, request.rounds or ROUNDS[job.mode])
            document["results"].append(result)
            heading = f"{request.model}, {request.dtype}, {rivals.WHAT[job.mode]}, batch {len(job.x)}"
            print(f"\n{heading}, {result['rounds']} rounds\n{report.table(result)}", flush=True)
            if any(row["ours"] and "median_ms" not in row for row in result["rows"]) and result["complete"]:
                code = 1
            if not result["complete"]:
                raise KeyboardInterrupt
        document["complete"] = True
    except KeyboardInterrupt:
        code = INTERRUPTED
        print("INCOMPLETE: interrupted" if document["results"] else "INCOMPLETE: interrupted before any time was taken")
    if outputs.json:
        files.write(outputs.json, (json.dumps(files.plain(document), indent=1) + "\n").encode())
    if outputs.plot and any("median_ms" in row for result in document["results"] for row in result["rows"]):
        from . import plot

        files.write(outputs.plot, plot.draw(document, outputs.plot.suffix[1:]))
    return code
