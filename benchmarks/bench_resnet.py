"""`fused-resnet verify` and `fused-resnet bench`: whole networks on photographs; parity first, then times."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from fused_resnet import dispatch
from fused_resnet.convert import unfused_units
from fused_resnet.parity import relative_error

from . import agreement, files, harness, photographs, rivals
from .plain_resnet import plain_resnet
from .realistic import make_realistic
from .rivals import Job, Rival, title

BATCH = {"infer": 1, "train": 4}
ROUNDS = {"infer": 30, "train": 10}
WHAT = {"infer": "inference", "train": "training"}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# A rival that is farther from torch's result than that does another job, and its time says nothing.
WRONG = {torch.float32: 1e-2, torch.bfloat16: 0.2}
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
    with stages(f"parity, {WHAT[job.mode]}", (2 if job.mode == "infer" else 4) + len(ours)) as advance:
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


@contextlib.contextmanager
def recorded_backends() -> Iterator[dict[str, set[str]]]:
    """Yields op -> the backends that really serve its calls, each with the reason why an earlier one does not."""
    seen: dict[str, set[str]] = {}
    choose = dispatch.choose

    def recording(primitive: str, *args: Any, **kwargs: Any) -> dispatch.Choice:
        choice = choose(primitive, *args, **kwargs)
        op = {name: op for op, names in dispatch.OPS.items() for name in names}
        why = "; ".join(f"not {name}: {reason}" for name, reason in choice.skipped)
        seen.setdefault(op.get(primitive, primitive), set()).add(f"{choice.backend} ({why})" if why else choice.backend)
        return choice

    dispatch.choose = recording
    try:
        yield seen
    finally:
        dispatch.choose = choose


def why_unfused(job: Job) -> str:
    """Why no backend of ours serves this kind of job."""
    op, device = "bn_act" if job.mode == "train" else "conv_bn_act", job.x.device.type
    rows = [row for row in dispatch.backend_table() if (row.op, row.device, row.live) == (op, device, False)]
    return "; ".join(f"{row.backend}: {row.note}" for row in rows if row.backend != "reference")


def watched(one: Rival, job: Job, backends: dict[str, list[str]]) -> harness.Step:
    """One of ours, whose first run notes in `backends` what it really runs on, a line for each op."""
    name = title(one.name, job.model)
    entry = one.prepare(job)
    step = entry.step(job)

    def run() -> Any:
        if name in backends:
            return step()
        with recorded_backends() as seen:
            result = step()
        unfused = unfused_units(entry.model) if entry.model is not None else []
        backends[name] = [f"{op}: {', '.join(sorted(names))}" for op, names in sorted(seen.items())]
        backends[name] += [f"torch's own modules in {unit}: {reason}" for unit, reason in unfused]
        if not seen:
            backends[name].append(f"torch's own modules throughout: {why_unfused(job)}")
        return result

    return run


def time_all(request: Request, job: Job) -> dict[str, Any]:
    """The rows and ratios of one job, as they go into the JSON file."""
    rounds = request.rounds or ROUNDS[job.mode]
    everyone = [rivals.PEERS[name] for name in request.peers] + list(rivals.OURS.values())
    backends: dict[str, list[str]] = {}
    steps: dict[str, Callable[[], harness.Step]] = {}
    for one in everyone:
        prepare = (lambda one=one: watched(one, job, backends)) if one.name in rivals.OURS else one.step_for(job)
        steps[title(one.name, job.model)] = prepare
    expected = None
    with contextlib.suppress(Exception):  # out of memory, say: eager's own row tells it
        expected = rivals.PEERS["eager"].step_for(job)()()

    def check(name: str, result: torch.Tensor) -> None:
        error = 0.0 if expected is None else relative_error(result, expected)
        if not error < WRONG[job.dtype]:
            raise rivals.WrongResultError(f"its result differs from torch's by {error:.1e} (relative)")

    with tqdm(total=0, desc=f"timing, {WHAT[job.mode]}", unit="round", leave=False) as bar:

        def progress(rounds: range) -> Iterator[int]:
            bar.reset(len(rounds))
            for index in rounds:
                yield index
                bar.update()

        warmup = 2 if job.x.device.type == "cpu" else 10
        times, complete = harness.measure(steps, rounds, warmup, harness.timer(job.x.device), progress, check)

    batch = len(job.x)
    ours = {name: times[name] for name in (title(one, job.model) for one in rivals.OURS) if times[name].ms}
    rows = []
    for one, (name, entry) in zip(everyone, times.items(), strict=True):
        row: dict[str, Any] = {"name": name, "about": one.about, "ours": one.name in rivals.OURS}
        if entry.ms:
            mid, low, high = harness.spread(entry.ms)
            row |= {"median_ms": mid, "quartiles_ms": [low, high], "images_per_s": batch / mid * 1e3}
            row |= {"first_call_ms": entry.first_ms, "runs_ms": entry.ms}
            row["speedup"] = {
                our_name: dict(zip(("median", "low", "high"), ratio, strict=True))
                for our_name, our in ours.items()
                if our_name != name and (ratio := harness.ratio(entry, our)) is not None
            }
        else:
            row["not_available"] = entry.reason or "interrupted before its first timed run"
        if name in backends:
            row["backends"] = backends[name]
        rows.append(row)
    return {"mode": job.mode, "batch": batch, "rounds": rounds, "complete": complete, "rows": rows}


def table(result: dict[str, Any], model: str) -> str:
    """The rows as an aligned table; the last columns tell how many times as fast each of ours is, paired by round."""
    ours = [row["name"] for row in result["rows"] if row["ours"] and "median_ms" in row]
    cells = [["rival", "median ms", "quartiles", "images/s", *(f"speed-up: {name}" for name in ours)]]
    for row in result["rows"]:
        if "median_ms" not in row:
            cells.append([row["name"], f"not available: {row['not_available']}"])
            continue
        low, high = row["quartiles_ms"]
        faster = [row["speedup"].get(name) for name in ours]
        cells.append(
            [row["name"], f"{row['median_ms']:.2f}", f"{low:.2f} to {high:.2f}", f"{row['images_per_s']:.1f}"]
            + [
                f"{f['median']:.2f}x ({f['low']:.2f} to {f['high']:.2f})" if f and not row["ours"] else ""
                for f in faster
            ]
        )
    widths = [max(len(row[i]) for row in cells if len(row) > 2) for i in range(len(cells[0]))]
    out = []
    for row in cells:
        if len(row) == 2:
            out.append(f"{row[0]:<{widths[0]}}  {row[1]}")
            continue
        text = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        out.append("  ".join(text).rstrip())
    for row in result["rows"]:
        if row.get("first_call_ms", 0) > 1e3 and row["first_call_ms"] > 10 * row["median_ms"]:
            out.append(f"{row['name']}: its first call took {row['first_call_ms'] / 1e3:.1f} s")
        out += [f"{row['name']} ran on {line}" for line in row.get("backends", ())]
    if not result["complete"]:
        done = max(len(row.get("runs_ms", ())) for row in result["rows"])
        out.append(f"INCOMPLETE: interrupted in round {done} of {result['rounds']}")
    return "\n".join(out)


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
            result = time_all(request, job)
            document["results"].append(result)
            heading = (
                f"{request.model}, {request.dtype}, {WHAT[job.mode]}, batch {len(job.x)}, {result['rounds']} rounds"
            )
            print(f"\n{heading}\n{table(result, request.model)}", flush=True)
            if any(row["ours"] and "median_ms" not in row for row in result["rows"]) and result["complete"]:
                code = 1
            if not result["complete"]:
                raise KeyboardInterrupt
        document["complete"] = True
    except KeyboardInterrupt:
        code = INTERRUPTED
        if not document["results"]:
            print("INCOMPLETE: interrupted before any time was taken", flush=True)
    if outputs.json:
        files.write(outputs.json, (json.dumps(files.plain(document), indent=1) + "\n").encode())
    if outputs.plot and any("median_ms" in row for result in document["results"] for row in result["rows"]):
        from . import plot

        files.write(outputs.plot, plot.draw(document, outputs.plot.suffix[1:]))
    return code
