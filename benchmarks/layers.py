"""Where a step's time goes, kernel by kernel, beside the floor of what really ran: the next thing to tune comes first.

The step runs once more under a recorder that times every call of a backend's primitive and every operator of torch
outside them, and counts the bytes and FLOPs of each from its shapes, by the counting rules of `roofline`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from fused_resnet import dispatch
from fused_resnet.ops.checks import conv_extent

from . import bench_models, bench_ops, harness, records, rivals
from .bench_models import Task
from .bench_ops import DTYPES
from .records import Row, Store
from .roofline import floor_ms

ROUNDS = 5
SLEEP_MS = 1000  # how long a GPU is held while a recorded step is queued


class Kind(NamedTuple):
    """What makes two calls one row."""

    what: str
    shape: str
    by: str  # a backend, or "torch"


@dataclass
class Total:
    """Of all calls of a kind in one step."""

    calls: int = 0
    ms: float = 0.0
    floor: float = 0.0  # ms
    bytes: float = 0.0
    flops: float = 0.0


# How many times a primitive passes over a tensor of x's size; x is the first argument.
def _with_residual(index: int, least: int) -> Callable[..., int]:
    return lambda *args: least + (isinstance(args[index], Tensor))


PASSES: dict[str, Callable[..., float]] = {
    "add_relu_forward": lambda *args: 3,
    "add_relu_backward": lambda *args: 3,
    "bn_act_train_forward": _with_residual(5, 3),
    "bn_act_eval_forward": _with_residual(5, 2),
    "bn_act_backward": lambda *args: 5 if args[2] is None else 7,  # with the mask: 3 read for the sums, then 4
    "bn_bn_act_train_forward": lambda *args: 5,
    "bn_bn_act_backward": lambda *args: 8,
    "bn_act_pool_train_forward": lambda *args: 2.25,
    "bn_act_pool_eval_forward": lambda *args: 1.25,
    # The first argument is the pooled gradient, a quarter of x: it twice, x twice and its gradient.
    "bn_act_pool_backward": lambda *args: 2 + 3 * 4,
}


OWN_CONV = "fused_resnet_cpp.conv_bias_act"  # (x, packed weight, bias, residual, out, ...)
OWN_STEM = "fused_resnet_cpp.conv_relu_pool"  # (x, packed weight, bias, pooled output, stride, padding, dilation)


def _nbytes(*values: Any) -> int:
    return sum(t.nbytes for t in {id(t): t for t in pytree.tree_leaves(values) if isinstance(t, Tensor)}.values())


def _weight(what: str, tensors: Sequence[Any]) -> Tensor:
    """Of a conv's arguments; before it stand the input, in a backward pass the gradient, and what is written over."""
    return tensors[2 if what.endswith(("conv_backward", "convolution_backward", "pointwise_")) else 1]


def _conv_flops(weight: Tensor, out: Tensor) -> float:
    return 2.0 * weight.numel() * out.numel() / out.shape[1]


def cost(what: str, args: tuple[Any, ...], out: Any) -> tuple[float, float]:
    """(bytes, FLOPs) of a call."""
    if what in PASSES:
        return PASSES[what](*args) * args[0].nbytes, 0.0
    if what == "aten.convolution_backward":
        grad, x, weight = args[:3]
        wanted = args[10]
        gradients = wanted[0] + wanted[1]
        return gradients * (grad.nbytes + weight.nbytes + x.nbytes), gradients * _conv_flops(weight, grad)
    if what == "conv_backward":
        grad, x, weight, onto, *_, needs_x, needs_weight = args
        gradients = needs_x + needs_weight
        read = gradients * (grad.nbytes + weight.nbytes + x.nbytes) + (0 if onto is None else onto.nbytes)
        return read, gradients * _conv_flops(weight, grad)
    if what == OWN_CONV:
        x, packed, bias, residual, out = args[:5]
        over = out.nbytes if residual is out else 0  # read, then written
        products = packed[0, ..., 0].numel()
        if packed.dim() == 6:  # 4x4 points of Winograd's algorithm, for 3x3 taps
            products = products * 9 // 16
        return _nbytes(x, packed, bias, residual, out) + over, 2.0 * products * out.numel()
    if what == OWN_STEM:
        x, packed, _, out, *geometry = args
        stride, padding, dilation = geometry[:2], geometry[2:4], geometry[4:]
        height, width = map(conv_extent, x.shape[2:], packed.shape[1:3], stride, padding, dilation)
        return _nbytes(args), 2.0 * packed[0, ..., 0].numel() * len(x) * height * width * out.shape[1]
    if what == "aten.convolution" or what.startswith(("conv_", "mkldnn._convolution")):
        over = args[0].nbytes if what.endswith("_") else 0  # read, then written
        return _nbytes(args, out) + over, _conv_flops(_weight(what, args), out)
    if what == "second_moments":
        rows = args[0]
        return rows.nbytes, 2.0 * rows.shape[0] * rows.shape[1] ** 2
    if what in ("aten.addmm", "aten.mm"):
        a, b = args[-2:]
        return _nbytes(args, out), 2.0 * a.shape[0] * a.shape[1] * b.shape[1]
    return _nbytes(args, out), 0.0


def _shape(what: str, args: tuple[Any, ...]) -> str:
    tensors = [t for t in pytree.tree_leaves(args) if isinstance(t, Tensor)]
    if not tensors:
        return ""
    text = "x".join(map(str, tensors[0].shape))
    if "conv" in what:
        text += f", weight {'x'.join(map(str, _weight(what, tensors).shape))}"
    return text


class Recorder(TorchDispatchMode):
    """Within it, every call is timed and counted; `totals` holds them. On a GPU call `finish` first."""

    def __init__(self, device: torch.device, bandwidth: float, rate: float) -> None:
        super().__init__()
        self._device, self._machine = device, (bandwidth, rate)
        self._inside = False
        self._pending: list[tuple[Kind, Any, Any]] = []
        self.totals: dict[Kind, Total] = {}

    def _mark(self) -> Any:
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _timed(self, what: str, by: str, function: Callable[..., Any], args: tuple[Any, ...], kwargs: Any) -> Any:
        if self._inside:
            return function(*args, **kwargs)
        self._inside = True
        try:
            before = self._mark()
            out = function(*args, **kwargs)
            after = self._mark()
        finally:
            self._inside = False
        kind = Kind(what, _shape(what, args), by)
        moved, flops = cost(what, args, out)
        total = self.totals.setdefault(kind, Total())
        total.calls += 1
        total.bytes += moved
        total.flops += flops
        total.floor += floor_ms(moved, flops, *self._machine)
        self._pending.append((kind, before, after))
        return out

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.is_view or func.namespace == "prim":
            return func(*args, **(kwargs or {}))
        what = f"{func.namespace}.{func.overloadpacket.__name__}"
        by = {"mkldnn": "library", "fused_resnet_cpp": "cpp"}.get(func.namespace, "torch")  # modules keep such calls
        return self._timed(what, by, func, args, kwargs or {})

    @contextmanager
    def _primitives(self) -> Iterator[None]:
        choose = dispatch.choose

        def recording(primitive: str, *args: Any, **kwargs: Any) -> dispatch.Choice:
            choice = choose(primitive, *args, **kwargs)

            def function(*given: Any, **named: Any) -> Any:
                return self._timed(primitive, choice.backend, choice.function, given, named)

            return choice._replace(function=function)

        dispatch.choose = recording
        try:
            yield
        finally:
            dispatch.choose = choose

    def record(self, step: harness.Step) -> None:
        if self._device.type == "cuda":  # nothing may wait for Python: all launches are queued before the first runs
            torch.cuda.synchronize(self._device)
            torch.cuda._sleep(int(2e6 * SLEEP_MS))
        with self._primitives(), self:
            step()
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        for kind, before, after in self._pending:
            self.totals[kind].ms += (
                before.elapsed_time(after) if self._device.type == "cuda" else 1e3 * (after - before)
            )
        self._pending.clear()


def profile(
    step: harness.Step, device: torch.device, bandwidth: float, rate: float, rounds: int = ROUNDS
) -> dict[Kind, Total]:
    """The totals of one step; milliseconds are medians over `rounds`."""
    found: list[dict[Kind, Total]] = []
    for _ in range(rounds):
        recorder = Recorder(device, bandwidth, rate)
        recorder.record(step)
        found.append(recorder.totals)
    totals = found[-1]
    for kind, total in totals.items():
        total.ms = median(one[kind].ms for one in found if kind in one)
    return totals


def measure(task: Task, device: torch.device, bandwidth: float, rate: float) -> list[Row]:
    """Rows of one step of ours: "step" as a whole, then every kind of call."""
    job, _ = bench_models.make_job(task, device)
    step = rivals.OURS[bench_models.OURS].step_for(job)()
    run = harness.timer(device)
    times = [run(step) for _ in range(2 + ROUNDS)][2:]
    key = task.key | {"suite": "layers"}
    whole = key | {"case": "step", "rival": bench_models.OURS, "metric": "ms", "runs": ROUNDS}
    rows = [whole | {"value": median(times), "low": min(times), "high": max(times)}]
    for kind, total in profile(step, device, bandwidth, rate).items():
        row = key | {"case": f"{kind.what} {kind.shape}".strip(), "rival": kind.by, "runs": ROUNDS}
        rows.append(row | {"metric": "ms", "value": total.ms, "note": f"{total.calls} calls"})
        rows.append(row | {"metric": "floor_ms", "value": total.floor})
        rows.append(row | {"metric": "bytes", "value": total.bytes})
        rows.append(row | {"metric": "flops", "value": total.flops})
    return rows


def standard(device: torch.device) -> tuple[Task, ...]:
    dtype, batches = ("bf16", (256, 128)) if device.type == "cuda" else ("fp32", (1, 4))
    modes = zip(rivals.WHAT, batches, strict=True)
    return tuple(Task("resnet50", mode, dtype, batch, (bench_models.OURS,)) for mode, batch in modes)


def run(tasks: tuple[Task, ...], device: torch.device, out: Path | None = None, fresh: bool = False) -> int:
    """Every task that is not recorded yet, and what to tune next in print. Returns 0."""
    from .report import share_of_the_floor

    store = Store(out or records.folder(device) / "layers.csv", device, fresh)
    for task in tasks:
        if not store.has(**task.key | {"suite": "layers", "case": "step"}):
            with bench_ops.precision(task.dtype):
                rows = measure(task, device, *bench_ops.ceilings(device, DTYPES[task.dtype]))
            store.drop(**{n: v for n, v in task.key.items() if n != "case"} | {"suite": "layers"})
            store.put(rows)
        wanted = {name: records._text(v) for name, v in task.key.items() if name != "case"} | {"suite": "layers"}
        mine = [row for row in store.rows.values() if wanted.items() <= row.items()]
        print(f"{task.model}, {rivals.WHAT[task.mode]}, {task.dtype}, batch {task.batch}")
        print("\n".join(share_of_the_floor(mine)), flush=True)
    return 0
