"""Times of rivals that do the same job: interleaved rounds, medians, ratios as medians of paired ratios."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from statistics import median, quantiles
from typing import Any

import torch

Step = Callable[[], Any]
Timer = Callable[[Step], float]


def timer(device: torch.device) -> Timer:
    """A function that runs a step and tells its milliseconds: CUDA events on a GPU, the clock on a CPU."""
    if device.type != "cuda":

        def clock(step: Step) -> float:
            start = time.perf_counter()
            step()
            return (time.perf_counter() - start) * 1e3

        return clock

    def events(step: Step) -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize(device)
        start.record()
        step()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)

    return events


@dataclass
class Times:
    """One rival's: the first call (compilation included), the timed runs by round, or why there are none."""

    first_ms: float | None = None
    ms: list[float] = field(default_factory=list)
    reason: str | None = None


def spread(values: list[float]) -> tuple[float, float, float]:
    """(median, lower quartile, upper quartile)."""
    if len(values) < 2:
        return values[0], values[0], values[0]
    low, _, high = quantiles(values, n=4, method="inclusive")
    return median(values), low, high


def ratio(theirs: Times, ours: Times) -> tuple[float, float, float] | None:
    """How many times as fast ours is: median and quartiles of theirs / ours, round by round."""
    pairs = [t / o for t, o in zip(theirs.ms, ours.ms, strict=False)]
    return spread(pairs) if pairs else None


def one_line(error: BaseException, limit: int = 160) -> str:
    """The first line of an error, with its type where the line alone says little."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0] if lines else ""
    if not isinstance(error, (NotImplementedError, ImportError)):
        text = f"{type(error).__name__}: {text}" if text else type(error).__name__
    return text if len(text) <= limit else text[: limit - 3] + "..."


def _with_result(run: Timer, step: Step) -> tuple[float, Any]:
    results: list[Any] = []
    return run(lambda: results.append(step())), results[0]


def measure(
    steps: dict[str, Callable[[], Step]],
    rounds: int,
    warmup: int,
    run: Timer,
    progress: Callable[[range], Iterable[int]] = iter,
    check: Callable[[str, Any], None] = lambda name, result: None,
) -> tuple[dict[str, Times], bool]:
    """Time every rival `rounds` times, in turn: A B C A B C ...

    Args:
        steps: name -> a function that prepares the rival and returns its step. One that fails, there or later, is
            left with the reason, and the rest goes on.
        rounds, warmup: runs of each rival, timed and (at least one, the first of which is told apart) before that.
        run: runs a step and tells its milliseconds.
        progress: wraps the rounds, warm-up included.
        check: is called with each rival's name and first result, and raises where that is wrong.

    Returns:
        The times, and whether all rounds were done: Ctrl-C ends the measurement and keeps what there is.
    """
    times = {name: Times() for name in steps}
    ready: dict[str, Step] = {}
    collecting = gc.isenabled()
    gc.disable()
    try:
        warmup = max(warmup, 1)
        for index in progress(range(warmup + rounds)):
            for name, prepare in steps.items():
                entry = times[name]
                if entry.reason is not None:
                    continue
                try:
                    if index == 0:
                        ready[name] = prepare()
                        entry.first_ms, result = _with_result(run, ready[name])
                        check(name, result)
                        continue
                    ms = run(ready[name])
                except Exception as error:
                    entry.reason = one_line(error)
                    entry.ms = []
                    ready.pop(name, None)
                    continue
                if index >= warmup:
                    entry.ms.append(ms)
            gc.collect(1)  # what the round left; all of the heap would take longer than a round
    except KeyboardInterrupt:
        return times, False
    finally:
        if collecting:
            gc.enable()
    return times, True
