"""`fused-resnet bench-ops`: the kernels alone, at the layer shapes of real networks, beside this machine's ceilings."""

from __future__ import annotations

import contextlib
import gc
import importlib
import pkgutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

import fused_resnet
from fused_resnet.dispatch import BackendUnavailableError

from . import RequestError, harness, kernels, records
from .harness import one_line
from .kernels import Case, Inputs, Maker, Op
from .records import Row, Store
from .roofline import floor_ms
from .timing import recorded_backends

OURS = "fused_resnet"
ROUNDS = 7
SWEEPS = 3  # how many times the cache's size a rotation moves
BATCH = {"cpu": 4, "cuda": 64}
LAST_LEVEL_CACHE = 64 << 20  # bytes; assumed where the device does not tell
DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Request:
    """What the user asked for; None leaves a default."""

    ops: tuple[str, ...] = ()
    model: str | None = None
    directions: tuple[str, ...] = tuple(kernels.DIRECTIONS)
    batch: int | None = None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    dtype: str = "fp32"
    rivals: tuple[str, ...] | None = None
    backend: str = "auto"
    rounds: int = ROUNDS
    out: Path | None = None
    fresh: bool = False


def ops() -> dict[str, Op]:
    """Every op that has a file bench_<op>.py with an `OP`."""
    found = {}
    for module in pkgutil.iter_modules([str(Path(__file__).parent)]):
        if module.name.startswith("bench_"):
            op = getattr(importlib.import_module(f".{module.name}", __package__), "OP", None)
            if op is not None:
                found[op.name] = op
    return found


@contextlib.contextmanager
def precision(dtype: str) -> Iterator[None]:
    """float32 products in TF32 where that is asked for, else in full.

    By torch's older switches: once the newer ones are set, torch.compile and torch.export fail to read these.
    """
    settings = [torch.backends.cudnn, torch.backends.cuda.matmul]
    before = [setting.allow_tf32 for setting in settings]
    for setting in settings:
        setting.allow_tf32 = dtype == "tf32"
    try:
        yield
    finally:
        for setting, value in zip(settings, before, strict=True):
            setting.allow_tf32 = value


def queued(device: torch.device) -> harness.Timer:
    """A timer of kernels: on a GPU the stream is held until all launches are queued, so that gaps between them, which
    are Python's, do not count."""
    if device.type != "cuda":
        return harness.timer(device)
    enqueue_ms: dict[Any, float] = {}

    def run(step: harness.Step) -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize(device)
        torch.cuda._sleep(int(2e6 * (1 + 1.5 * enqueue_ms.get(step, 5.0))))  # cycles, about 2e6 a millisecond
        start.record()
        began = time.perf_counter()
        step()
        enqueue_ms[step] = (time.perf_counter() - began) * 1e3
        end.record()
        end.synchronize()
        return start.elapsed_time(end)

    return run


def cache_bytes(device: torch.device) -> int:
    """Of the last level of cache."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    units = {"K": 1 << 10, "M": 1 << 20}
    files = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    sizes = [path.read_text().strip() for path in files]
    return max((int(size[:-1]) * units[size[-1]] for size in sizes), default=LAST_LEVEL_CACHE)


def ceilings(device: torch.device, dtype: torch.dtype, rounds: int = 10) -> tuple[float, float]:
    """(bytes/s of a copy, read and written both counted; FLOP/s of a matrix product): the best of `rounds`."""
    on_gpu = device.type == "cuda"
    run = queued(device)
    source = torch.ones((2 << 30 if on_gpu else 256 << 20) // 4, device=device)
    target = torch.empty_like(source)
    copy = min(run(lambda: target.copy_(source)) for _ in range(rounds))
    side = 8192 if on_gpu else 2048
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    product = min(run(lambda: a @ b) for _ in range(rounds))
    return 2 * source.nbytes / copy * 1e3, 2 * side**3 / product * 1e3


def input_sets(op: Op, case: Case, direction: str, make: Maker, least_bytes: int) -> list[Inputs]:
    """Inputs for as many calls as move `least_bytes`: two at least."""
    first = op.inputs(case.sizes, make)
    cost = op.cost(case.sizes, direction)
    size = (cost.activations * make.batch + cost.weights) * make.dtype.itemsize
    count = max(2, -int(-least_bytes // size))
    again = lambda value: value.clone() if isinstance(value, torch.Tensor) else value  # noqa: E731
    return [first, *({name: again(value) for name, value in first.items()} for _ in range(count - 1))]


def rotation(made: list[Callable[[], Any]]) -> harness.Step:
    def step() -> None:
        for call in made:
            call()

    return step


def measure(
    op: Op, case: Case, direction: str, batch: int, request: Request, progress: Callable[[range], Any]
) -> tuple[dict[str, harness.Times], list[str], bool]:
    """(times per call, what ours ran on, whether all rounds were done) of one case in one direction."""
    dtype = DTYPES[request.dtype]
    sets = input_sets(op, case, direction, Maker(batch, dtype, request.device), SWEEPS * cache_bytes(request.device))
    gate = kernels.Parity(op, sets[0], direction, dtype)
    ran: list[str] = []

    def prepare(rival: str) -> harness.Step:
        if rival != OURS:
            gate.check(rival)
            return rotation(kernels.calls(op, rival, sets, direction))
        with fused_resnet.use_backend(request.backend), recorded_backends() as seen:
            gate.check(rival)
            made = kernels.calls(op, rival, sets, direction)
        ran.extend(f"{name}: {', '.join(sorted(backends))}" for name, backends in sorted(seen.items()))

        def step() -> None:
            with torch.set_grad_enabled(direction != "infer"), fused_resnet.use_backend(request.backend):
                rotation(made)()

        return step

    names = [name for name in op.rivals if request.rivals is None or name in (*request.rivals, OURS)]
    steps = {name: (lambda name=name: prepare(name)) for name in names}
    with torch.set_grad_enabled(direction != "infer"):
        run = queued(request.device)
        times, complete = harness.measure(steps, request.rounds, 2, lambda step: run(step) / len(sets), progress)
    return times, ran, complete


def case_rows(
    op: Op, case: Case, direction: str, batch: int, request: Request, times: dict[str, harness.Times], ran: list[str]
) -> list[Row]:
    key = {"suite": "ops", "subject": op.name, "case": case.name, "direction": direction}
    key |= {"dtype": request.dtype, "batch": batch}
    cost, itemsize = op.cost(case.sizes, direction), DTYPES[request.dtype].itemsize
    where = "/".join(model.removeprefix("resnet") for model in case.models)
    rows = [
        key
        | {"metric": "bytes", "value": (cost.activations * batch + cost.weights) * itemsize, "note": f"ResNet-{where}"},
        key | {"metric": "flops", "value": float(cost.flops * batch)},
    ]
    for name, entry in times.items():
        named = name if name != OURS or request.backend == "auto" else f"{OURS} ({request.backend})"
        row = key | {"rival": named, "metric": "ms"}
        if entry.ms:
            mid, low, high = harness.spread(entry.ms)
            row |= {"value": mid, "low": low, "high": high, "runs": len(entry.ms)}
            row["note"] = "; ".join(ran) if name == OURS else ""
        else:
            row["note"] = f"not available: {entry.reason or 'interrupted'}"
        rows.append(row)
    return rows


def line(rows: list[Row], bandwidth: float, rate: float) -> str:
    """One case in words: each rival's time, bytes or FLOPs per second, and part of the machine's ceiling."""
    values = {row["metric"]: float(row["value"]) for row in rows if row["metric"] in ("bytes", "flops")}
    floor = floor_ms(values["bytes"], values["flops"], bandwidth, rate)
    in_memory = values["bytes"] / bandwidth >= values["flops"] / rate
    out = []
    for row in rows:
        if row["metric"] != "ms":
            continue
        if row.get("value") is None:
            out.append(f"  {row['rival']:<13} {row['note']}")
            continue
        speed, unit = (values["bytes"] / 1e6, "GB/s") if in_memory else (values["flops"] / 1e9, "TFLOP/s")
        text = f"{row['value']:9.3f} ms  {speed / row['value']:8.4g} {unit:<7}  {100 * floor / row['value']:5.1f}%"
        out.append(f"  {row['rival']:<13} {text}  {row['note']}".rstrip())
    return "\n".join(out)


def chosen(request: Request) -> Iterator[tuple[Op, Case, str]]:
    known = ops()
    for name in request.ops or tuple(known):
        if name not in known:
            raise RequestError(f"unknown op {name!r}; expected some of {', '.join(known)}")
    for name in request.ops or tuple(known):
        for case in known[name].cases():
            if request.model is None or request.model in case.models:
                for direction in known[name].directions:
                    if direction in request.directions:
                        yield known[name], case, direction


def run(request: Request) -> int:
    """Parity, then times, case by case. Returns 0; 1 where ours failed; 130 where interrupted."""
    device, dtype = request.device, DTYPES[request.dtype]
    store = Store(request.out or records.folder(device) / "ops.csv", device, request.fresh)
    batch = request.batch or BATCH[device.type]
    work = list(chosen(request))
    ours = OURS if request.backend == "auto" else f"{OURS} ({request.backend})"
    code = 0
    gc.collect()
    with precision(request.dtype), contextlib.suppress(KeyboardInterrupt):
        if device.type == "cuda":
            torch.cuda.set_device(device)
            torch.backends.cudnn.benchmark = True
        bandwidth, rate = ceilings(device, dtype)
        key = {"suite": "machine", "dtype": request.dtype}
        store.put(
            [
                key | {"metric": "bytes/s", "value": bandwidth, "note": "copy, read and written both counted"},
                key | {"metric": "flop/s", "value": rate, "note": "matrix product"},
            ]
        )
        print(
            f"{records.device_name(device)}: copy {bandwidth / 1e9:.4g} GB/s, {request.dtype} matrix product ", end=""
        )
        print(f"{rate / 1e12:.4g} TFLOP/s; {len(work)} cases, batch {batch}", flush=True)
        with tqdm(work, unit="case", leave=False, disable=None) as bar:
            for op, case, direction in bar:
                bar.set_description(f"{op.name} {direction}")
                key = {"suite": "ops", "subject": op.name, "case": case.name, "direction": direction}
                key |= {"dtype": request.dtype, "batch": batch}
                if store.has(**key, rival=ours):
                    continue
                try:
                    times, ran, complete = measure(op, case, direction, batch, request, iter)
                except (BackendUnavailableError, torch.OutOfMemoryError) as error:
                    times, ran, complete = {OURS: harness.Times(reason=one_line(error))}, [], True
                if not complete:
                    raise KeyboardInterrupt
                rows = case_rows(op, case, direction, batch, request, times, ran)
                store.put(rows)
                bar.write(f"{op.name} {case.name}, {kernels.DIRECTIONS[direction]}\n{line(rows, bandwidth, rate)}")
                code = max(code, int(not times[OURS].ms))
        return code
    print(f"INCOMPLETE: interrupted; {store.path} keeps what was measured, the same command goes on from there")
    return 130
