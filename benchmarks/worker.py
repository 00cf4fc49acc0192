"""One rival in a process of its own: it can neither slow nor break the others, and its memory is its own.

The parent writes a line of JSON on its standard input, the child answers with one: first the job, answered with the
time to the first step, the peak memory and the rival's result in a file; then {"steps": n}, answered with milliseconds.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib.util
import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from fused_resnet.parity import relative_error

from . import RequestError, harness, rivals, timing
from .bench_ops import DTYPES, precision
from .rivals import Entry, Job, Rival, WrongResultError

GRAPH = " + CUDA graph"
STEADY_STEPS = 2


# The child


def _status(name: str) -> int:
    """Bytes of a field of /proc/self/status; 0 where there is no such file."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) << 10
    return 0


class Memory:
    """The most memory that a rival holds while it steps, above what the process had before: resident memory on a CPU;
    on a GPU what torch's allocator gave out, and what others took beside it."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.before = _status("VmRSS")
        self.others = self._others()

    def _others(self) -> int:
        if self.device.type != "cuda":
            return 0
        free, total = torch.cuda.mem_get_info(self.device)
        return total - free - torch.cuda.memory_reserved(self.device)

    def restart(self) -> None:
        """The peak counts from here."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            return
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # the peak becomes what is resident now

    def peak(self) -> int:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) + max(0, self._others() - self.others)
        return max(0, _status("VmHWM") - self.before)


def graphed(step: harness.Step, device: torch.device) -> harness.Step:
    """The step as one CUDA graph; its result is a tensor that every replay writes."""
    if device.type != "cuda":
        raise NotImplementedError("CUDA graphs need a GPU")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = step()

    def replay() -> Any:
        graph.replay()
        return result

    return replay


def load_job(spec: dict[str, Any]) -> Job:
    device = torch.device(spec["device"])
    state, batch = torch.load(spec["state"]), torch.load(spec["input"])
    x, target = (batch[name].to(device) for name in ("x", "target"))
    return Job(spec["model"], spec["mode"], DTYPES[spec["dtype"]], state, x, target, spec["cast"])


def load_files(paths: Sequence[str]) -> None:
    """Register the rivals of every peer_<name>.py and of the user's own files.

    Raises:
        RequestError: one cannot be read.
    """
    rivals.discover()
    for index, path in enumerate(paths):
        spec = importlib.util.spec_from_file_location(f"{__package__}.given_{index}", path)
        if spec is None or spec.loader is None:
            raise RequestError(f"{path} is no Python file")
        try:
            spec.loader.exec_module(importlib.util.module_from_spec(spec))
        except OSError as error:
            raise RequestError(f"{path} cannot be read: {error.strerror}") from error


def find(spec: dict[str, Any]) -> Rival:
    load_files(spec["files"])
    return (rivals.PEERS | rivals.OURS)[spec["rival"].removesuffix(GRAPH)]


def _prepare(spec: dict[str, Any]) -> tuple[harness.Step, dict[str, Any]]:
    device = torch.device(spec["device"])
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = True  # the shapes are fixed: everyone gets the fastest algorithms
        torch.zeros((), device=device)
    one, job, memory = find(spec), load_job(spec), Memory(device)
    run = harness.timer(device)
    backends: dict[str, list[str]] = {}
    entries: list[Entry] = []

    def prepare(job: Job) -> Entry:
        entries.append(one.prepare(job))
        return entries[-1]

    noting = replace(one, prepare=prepare)
    began = time.perf_counter()
    step = timing.watched(noting, job, backends) if spec["rival"] in rivals.OURS else noting.step_for(job)()
    result = step().detach().float().cpu()
    first_ms = (time.perf_counter() - began) * 1e3
    results = {"logits" if job.mode == "infer" else "loss": result}
    if job.mode == "train":
        results["gradients"] = torch.cat([p.grad.float().flatten().cpu() for p in entries[0].model.parameters()])
    if spec["expected"]:
        for name, expected in torch.load(spec["expected"]).items():
            # Gradients scatter with every ReLU near 0; ours were held to a budget of float64 before this.
            allowed = rivals.WRONG[job.dtype] * (1 if name != "gradients" else 10 if job.dtype == torch.float32 else 3)
            error = relative_error(results[name], expected)
            if not error < allowed:
                verb = "differs" if name == "loss" else "differ"
                raise WrongResultError(f"its {name} {verb} from torch's by {error:.1e} (relative)")
    torch.save(results, spec["result"])
    if spec["rival"].endswith(GRAPH):
        step = graphed(step, device)
    memory.restart()
    for _ in range(STEADY_STEPS):
        step()
    found = {"first_ms": first_ms, "peak_bytes": memory.peak(), "notes": [n for ns in backends.values() for n in ns]}
    return lambda: run(step), found


def serve() -> None:
    """The child's loop; `sys.stdout` is kept for answers alone."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)

    def answer(**message: Any) -> None:
        answers.write(json.dumps(message) + "\n")

    spec = json.loads(sys.stdin.readline())
    try:
        with precision(spec["dtype"]):
            timed, found = _prepare(spec)
            answer(**found)
            for line in sys.stdin:
                gc.collect()
                gc.disable()
                answer(ms=[timed() for _ in range(json.loads(line)["steps"])])
                gc.enable()
                if spec["device"] != "cpu":
                    torch.cuda.empty_cache()  # the next rival's turn
    except Exception as error:
        answer(reason=harness.one_line(error))


# The parent


class WorkerError(RuntimeError):
    """A rival gave no answer; the message says why."""


class Worker:
    """A rival's process. `ready` is its first answer.

    Args:
        spec: the job, as `serve` reads it.
        limit_s: how long any answer may take.

    Raises:
        WorkerError: the rival cannot run, is wrong, crashed or took too long.
    """

    def __init__(self, spec: dict[str, Any], limit_s: float) -> None:
        code = "from fused_resnet.cli import load_benchmarks; load_benchmarks('worker').serve()"
        root = str(Path(rivals.fused_resnet.__file__).parents[1])
        self._folder = tempfile.TemporaryDirectory()  # what is compiled is compiled here and now
        env = os.environ | {
            "PYTHONPATH": os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH")))),
            "TORCHINDUCTOR_CACHE_DIR": self._folder.name,
        }
        self._limit_s = limit_s
        self._process = subprocess.Popen(
            [sys.executable, "-c", code],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=env,
            start_new_session=True,  # Ctrl-C is the parent's to answer
        )
        self._lines: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()
        self.ready = self._ask(spec)

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(line)
        self._lines.put("")

    def _ask(self, message: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        try:
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.write(json.dumps(message) + "\n")
                self._process.stdin.flush()
            line = self._lines.get(timeout=self._limit_s)
        except queue.Empty:
            self.stop()
            raise WorkerError(f"it took longer than {self._limit_s:g} s") from None
        except BaseException:
            self.stop()
            raise
        if not line:
            code = self._process.wait()
            raise WorkerError(f"its process ended with {f'signal {-code}' if code < 0 else f'exit code {code}'}")
        found = json.loads(line)
        if "reason" in found:
            self.stop()
            raise WorkerError(found["reason"])
        return found

    def step(self, steps: int) -> list[float]:
        """Milliseconds of each of `steps` steps."""
        return self._ask({"steps": steps})["ms"]

    def stop(self) -> None:
        self._process.kill()
        self._process.wait()
        with contextlib.suppress(OSError):
            self._folder.cleanup()


def measure(
    starts: dict[str, Callable[[], Worker]], rounds: int, turn_ms: float, progress: Callable[[str], None]
) -> dict[str, tuple[dict[str, Any], harness.Times]]:
    """name -> (first answer, times): the rivals start one after the other, then take turns, A B C A B C ...

    A turn is as many steps as fit in `turn_ms`, and counts as its median. One that fails leaves the rest alone.
    """
    found: dict[str, tuple[dict[str, Any], harness.Times]] = {}
    workers: dict[str, Worker] = {}
    steps: dict[str, int] = {}
    try:
        for name, start in starts.items():
            progress(f"start {name}")
            found[name] = ({}, harness.Times())
            try:
                workers[name] = start()
                warm = harness.median(workers[name].step(2))
                steps[name] = max(1, min(20, round(turn_ms / max(warm, 0.1))))
                found[name] = (workers[name].ready, harness.Times(workers[name].ready["first_ms"]))
            except WorkerError as error:
                found[name] = ({}, harness.Times(reason=str(error)))
                workers.pop(name, None)
        for index in range(rounds):
            progress(f"round {index + 1} of {rounds}")
            for name, worker in list(workers.items()):
                try:
                    ms = worker.step(steps[name] + (steps[name] > 1))
                    found[name][1].ms.append(harness.median(ms[1:] or ms))
                except WorkerError as error:
                    found[name] = ({}, harness.Times(reason=str(error)))
                    del workers[name]
    finally:
        for worker in workers.values():
            worker.stop()
    return found
