"""The times of everybody at one job, and what ours really ran on."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from tqdm.auto import tqdm

from fused_resnet import dispatch
from fused_resnet.convert import unfused_units
from fused_resnet.parity import relative_error

from . import harness, rivals
from .rivals import Job, Rival, title
from .saved import saved_bytes


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

    dispatch.choose, dispatch.recorded = recording, True
    try:
        yield seen
    finally:
        dispatch.choose, dispatch.recorded = choose, False


def why_unfused(job: Job) -> str:
    """Why no backend of ours serves this kind of job."""
    op, device = "bn_act" if job.mode == "train" else "conv_bn_act", job.x.device.type
    rows = [row for row in dispatch.backend_table() if (row.op, row.device, row.live) == (op, device, False)]
    return "; ".join(f"{row.backend}: {row.note}" for row in rows if row.backend != "reference")


def watched(one: Rival, job: Job, backends: dict[str, list[str]]) -> harness.Step:
    """One of ours, whose first run notes in `backends` what it really runs on, a line for each op."""
    return _noting(title(one.name, job.model), one.prepare(job), job, backends)


def _noting(name: str, entry: rivals.Entry, job: Job, backends: dict[str, list[str]]) -> harness.Step:
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


def saved_by_forward(entry: rivals.Entry, job: Job) -> int | None:
    """What autograd saves in a forward pass; None for what is not made of modules alone."""
    if entry.model is None or hasattr(entry.net, "_orig_mod"):  # compiled
        return None
    x = entry.images(job.x)
    with job.autocast():
        return saved_bytes(lambda: entry.net(x), (*entry.model.parameters(), *entry.model.buffers()))


def time_all(job: Job, peers: tuple[str, ...], rounds: int) -> dict[str, Any]:
    """The rows and ratios of one job, as they go into the JSON file."""
    everyone = [rivals.PEERS[name] for name in peers] + list(rivals.OURS.values())
    backends: dict[str, list[str]] = {}
    saved: dict[str, int | None] = {}

    def prepare(one: Rival) -> harness.Step:
        name, entry = title(one.name, job.model), one.prepare(job)
        if job.mode == "train":
            saved[name] = saved_by_forward(entry, job)
        return _noting(name, entry, job, backends) if one.name in rivals.OURS else entry.step(job)

    steps: dict[str, Callable[[], harness.Step]] = {
        title(one.name, job.model): functools.partial(prepare, one) for one in everyone
    }
    expected = None
    with contextlib.suppress(Exception):  # out of memory, say: eager's own row tells it
        expected = rivals.PEERS["eager"].step_for(job)()()

    def check(name: str, result: torch.Tensor) -> None:
        error = 0.0 if expected is None else relative_error(result, expected)
        if not error < rivals.WRONG[job.dtype]:
            raise rivals.WrongResultError(f"its result differs from torch's by {error:.1e} (relative)")

    with tqdm(total=0, desc=f"timing, {rivals.WHAT[job.mode]}", unit="round", leave=False) as bar:

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
        if saved.get(name) is not None:
            row["saved_bytes"] = saved[name]
        if name in backends:
            row["backends"] = backends[name]
        rows.append(row)
    return {"mode": job.mode, "batch": batch, "rounds": rounds, "complete": complete, "rows": rows}
