"""Whole networks: images per second, peak memory and time to the first step of every rival, each in its own process."""

from __future__ import annotations

import contextlib
import functools
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from . import RequestError, agreement, bench_resnet, records, rivals, worker
from .bench_ops import DTYPES, precision
from .records import Row, Store
from .rivals import Job
from .worker import GRAPH, Worker, load_files

OURS = "fused_resnet"
FEW = ("eager", "channels_last", OURS)
CASTS = {"bf16", "fp16"}  # inference in these is on parameters of that dtype, training under autocast


@dataclass(frozen=True)
class Task:
    """One job for a row of rivals."""

    model: str
    mode: str
    dtype: str
    batch: int
    rivals: tuple[str, ...]
    rounds: int = 10
    size: int = 224

    @property
    def key(self) -> Row:
        return {
            "suite": "models",
            "subject": self.model,
            "case": f"{self.size}x{self.size}",
            "direction": self.mode,
            "dtype": self.dtype,
            "batch": self.batch,
        }


@dataclass(frozen=True)
class Request:
    """What to measure, and where to keep it."""

    tasks: tuple[Task, ...]
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    out: Path | None = None
    fresh: bool = False
    limit_s: float = 300.0
    files: tuple[str, ...] = ()  # rivals of the user's own


def everyone() -> tuple[str, ...]:
    """The names of all rivals, ours last."""
    rivals.discover()
    return (*rivals.PEERS, *rivals.OURS)


def standard(device: torch.device) -> tuple[Task, ...]:
    """The tasks that RESULTS.md is made of: everyone at the main jobs, a few over batch sizes and over depth."""
    on_gpu = device.type == "cuda"
    dtype, large = ("bf16", 256) if on_gpu else ("fp32", 4)
    graphs = tuple(name + GRAPH for name in FEW) if on_gpu else ()
    everybody = (*everyone(), *graphs)
    some = (*FEW, *graphs)
    tasks = [
        Task("resnet50", "infer", dtype, 1, everybody, 20),
        Task("resnet50", "train", dtype, large, everybody, 10),
    ]
    if on_gpu:
        tasks += [Task("resnet50", "infer", dtype, 256, everybody, 20)]
        tasks += [Task("resnet50", mode, other, 64, some) for other in ("fp32", "tf32", "fp16") for mode in rivals.WHAT]
    for batch in (16, 64, 512) if on_gpu else (4, 16):
        tasks.append(Task("resnet50", "infer", dtype, batch, some))
    for batch in (16, 64, 128) if on_gpu else (1, 8):
        tasks.append(Task("resnet50", "train", dtype, batch, some, 7))
    for model in ("resnet18", *(("resnet34", "resnet101") if on_gpu else ()), "resnet152"):
        tasks.append(Task(model, "infer", dtype, 256 if on_gpu else 1, some))
        tasks.append(Task(model, "train", dtype, 128 if on_gpu else large, some, 5))
    return tuple(tasks)


def tasks(
    device: torch.device,
    model: str,
    modes: tuple[str, ...],
    dtypes: tuple[str, ...],
    batches: tuple[int, ...],
    rivals: tuple[str, ...],
    size: int,
    rounds: int,
) -> tuple[Task, ...]:
    """Every combination.

    Raises:
        RequestError: there is no such rival.
    """
    known = {name + end for name in everyone() for end in ("", GRAPH)}
    for name in rivals:
        if name not in known:
            raise RequestError(
                f"unknown rival {name!r}; expected some of {', '.join(everyone())}, or one of them{GRAPH}"
            )
    default = {task.mode: task.batch for task in reversed(standard(device))}
    return tuple(
        Task(model, mode, dtype, batch, rivals or everyone(), rounds, size)
        for mode in modes
        for dtype in dtypes
        for batch in batches or (default[mode],)
    )


def main(args: Any) -> int:
    """`fused-resnet bench-models`, with its parsed arguments."""
    load_files(args.rival_files)
    chosen = tasks(args.device, args.model, args.mode, args.dtypes, args.batches, args.rivals, args.size, args.rounds)
    return run(Request(chosen, args.device, args.out, args.fresh, args.limit_s, args.rival_files))


@functools.lru_cache(maxsize=1)
def _input(model: str, size: int, count: int, device: torch.device) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """(crops, the state dict for everyone)."""
    request = bench_resnet.Request(model=model, device=device, batch=count, size=size)
    with precision("fp32"):
        crops, state, _ = bench_resnet.prepare(request)
    return crops, state


def make_job(task: Task, device: torch.device) -> tuple[Job, torch.Tensor]:
    """(the job, crops of photographs)."""
    crops, state = _input(task.model, task.size, max(agreement.CROPS, task.batch), device)
    request = bench_resnet.Request(model=task.model, device=device, batch=task.batch)
    job = bench_resnet.make_job(request, task.mode, crops, state)
    return replace(job, dtype=DTYPES[task.dtype], cast=task.dtype in CASTS and task.mode == "infer"), crops


@functools.cache
def _problems(task: Task, device: torch.device) -> dict[str, str]:
    """Ours that miss the error budget, and how."""
    job, crops = make_job(task, device)
    ours = [rivals.OURS[name] for name in task.rivals]
    with precision(task.dtype):
        if task.mode == "infer":
            found = agreement.infer_agreement(job, ours, crops[: agreement.CROPS], lambda stage: None)
        else:
            found = agreement.train_agreement(job, ours, lambda stage: None)
    return {result.name: "; ".join(result.problems) for result in found if not result.ok}


def _rows(task: Task, found: dict[str, Any], problems: dict[str, str]) -> list[Row]:
    rows: list[Row] = []
    for name, (ready, times) in found.items():
        row = task.key | {"rival": name}
        if not times.ms:
            reason = problems.get(name.removesuffix(GRAPH)) or times.reason
            rows.append(row | {"metric": "ms", "note": f"not available: {reason}"})
            continue
        mid, low, high = worker.harness.spread(times.ms)
        note = "; ".join(ready["notes"])
        rows.append(row | {"metric": "ms", "value": mid, "low": low, "high": high, "runs": len(times.ms), "note": note})
        rows.append(row | {"metric": "first_ms", "value": ready["first_ms"], "runs": 1})
        rows.append(row | {"metric": "peak_bytes", "value": ready["peak_bytes"], "runs": 1})
    for name, (_, times) in found.items():
        for ours in rivals.OURS:
            if ours in found and name not in rivals.OURS and times.ms and found[ours][1].ms:
                mid, low, high = worker.harness.ratio(times, found[ours][1]) or (0.0, 0.0, 0.0)
                row = task.key | {"rival": name, "metric": f"speedup of {ours}"}
                rows.append(row | {"value": mid, "low": low, "high": high, "runs": len(times.ms)})
    return rows


def measure(task: Task, request: Request, progress: Callable[[str], None]) -> tuple[list[Row], bool]:
    """(rows, whether ours are right) of one task."""
    progress("parity")
    ours = {name.removesuffix(GRAPH) for name in task.rivals} & rivals.OURS.keys()
    few = 32 if request.device.type == "cuda" else agreement.EXACT  # the budget knows no batch: one proof serves all
    problems = _problems(replace(task, batch=few, rivals=tuple(sorted(ours)), rounds=0), request.device)
    job, _ = make_job(task, request.device)
    with tempfile.TemporaryDirectory() as folder:
        paths = {name: os.path.join(folder, name) for name in ("state", "input", "expected", "result")}
        torch.save({name: value.cpu() for name, value in job.state.items()}, paths["state"])
        torch.save({"x": job.x.cpu(), "target": job.target.cpu()}, paths["input"])
        spec = {
            "model": task.model,
            "mode": task.mode,
            "dtype": task.dtype,
            "cast": job.cast,
            "device": str(request.device),
            "files": list(request.files),
            "state": paths["state"],
            "input": paths["input"],
        }
        del job

        def start(name: str) -> Worker:
            if name.removesuffix(GRAPH) in problems:
                raise worker.WorkerError("parity")
            first = not os.path.exists(paths["expected"])  # eager's result is what the others are held to
            goal = {"result": paths["expected" if first else "result"], "expected": "" if first else paths["expected"]}
            return Worker(spec | goal | {"rival": name}, request.limit_s)

        order = ("eager", *(name for name in task.rivals if name != "eager"))
        turn_ms = 50.0 if request.device.type == "cpu" else 200.0
        found = worker.measure(
            {name: (lambda name=name: start(name)) for name in order}, task.rounds, turn_ms, progress
        )
    return _rows(task, found, problems), not problems


def lines(rows: list[Row]) -> str:
    out = []
    extra = {(row["rival"], row["metric"]): row["value"] for row in rows if row.get("value") is not None}
    for row in rows:
        if row["metric"] != "ms":
            continue
        if row.get("value") is None:
            out.append(f"  {row['rival']:<22} {row['note']}")
            continue
        rate, name = 1e3 * row["batch"] / row["value"], row["rival"]
        first, peak = extra[name, "first_ms"] / 1e3, extra[name, "peak_bytes"] / 2**20
        ratio = extra.get((name, f"speedup of {OURS}"))
        beside = f"  {ratio:.2f}x by {OURS}" if ratio else ""
        out.append(
            f"  {name:<22} {row['value']:9.2f} ms {rate:9.1f} images/s {peak:8.0f} MiB, first {first:6.2f} s{beside}"
        )
    return "\n".join(out)


def run(request: Request) -> int:
    """Every task that is not measured yet. Returns 0; 1 where ours failed; 130 where interrupted."""
    store = Store(request.out or records.folder(request.device) / "models.csv", request.device, request.fresh)
    code = 0
    with contextlib.suppress(KeyboardInterrupt):
        if request.device.type == "cuda":
            torch.cuda.set_device(request.device)
        with tqdm(request.tasks, unit="job", leave=False, disable=None) as bar:
            for task in bar:
                what = f"{task.model}, {rivals.WHAT[task.mode]}, {task.dtype}, batch {task.batch}"
                missing = [name for name in task.rivals if not store.has(**task.key, rival=name, metric="ms")]
                if not missing:
                    continue
                rows, good = measure(task, request, lambda stage, what=what: bar.set_description(f"{what}: {stage}"))
                store.put(rows)
                bar.write(f"{what}\n{lines(rows)}")
                ours = [row for row in rows if row["rival"] in rivals.OURS and row["metric"] == "ms"]
                code = max(code, int(not good or any(row.get("value") is None for row in ours)))
        return code
    print(f"INCOMPLETE: interrupted; {store.path} keeps what was measured, the same command goes on from there")
    return 130
