"""Measures which configs of the Triton kernels are fastest on this GPU and keeps them: the command `fused-resnet tune`.

A workload (a model's step) is run once with the Triton backend, and each call that a kernel's problem first appears in
is kept. Each candidate config is then timed in that very call. One that misses the reference's result is never kept.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused_resnet import dispatch
from fused_resnet.backends import reference
from fused_resnet.backends import triton as backend
from fused_resnet.backends.triton import configs
from fused_resnet.plans import use_plan

LEAST_GAIN = 0.02  # a config replaces the default where it saves at least this part of the call's time


class Call(NamedTuple):
    """A call of a primitive, and the kernels' problems that were solved in it."""

    primitive: str
    args: tuple[Any, ...]
    problems: tuple[tuple[str, configs.Key], ...]


class Tuned(NamedTuple):
    """The outcome for one problem: milliseconds of the call with the default and with the kept config."""

    kernel: str
    key: configs.Key
    config: configs.Config
    default_ms: float
    best_ms: float
    refused: int  # candidates that failed or missed the result


def record(workload: Callable[[], Any]) -> list[Call]:
    """The calls of Triton's primitives in `workload`: for each problem of a kernel the one on the most elements."""
    largest: dict[tuple[str, configs.Key], Call] = {}
    problems: list[tuple[str, configs.Key]] = []
    pick = configs.pick

    def noting_pick(kernel: str, key: configs.Key, x: Tensor) -> configs.Config:
        problems.append((kernel, key))
        return pick(kernel, key, x)

    def noting(primitive: str) -> Callable[..., Any]:
        function = getattr(backend, primitive)

        def noting_call(*args: Any) -> Any:
            problems.clear()
            result = function(*args)
            call = Call(primitive, args, tuple(dict.fromkeys(problems)))
            for problem in call.problems:
                before = largest.get(problem)
                if before is None or args[0].numel() > before.args[0].numel():
                    largest[problem] = call
            return result

        return noting_call

    def triton_first(ops: dict[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
        return {op: ("triton", *(name for name in order if name != "triton")) for op, order in ops.items()}

    replaced: list[tuple[Any, str, Any]] = [
        (configs, "pick", noting_pick),
        (backend, "untested", lambda op, x: None),
        (dispatch, "AUTOMATIC", {device: triton_first(ops) for device, ops in dispatch.AUTOMATIC.items()}),
        *((backend, primitive, noting(primitive)) for primitive in backend.PRIMITIVES),
    ]
    with contextlib.ExitStack() as stack:
        for module, name, value in replaced:
            stack.callback(setattr, module, name, getattr(module, name))
            setattr(module, name, value)
        with dispatch.use_backend("auto"):
            workload()
    calls: list[Call] = []
    for problem, call in largest.items():
        own = tuple(p for p in call.problems if largest[p] is call)
        if problem == own[0]:
            calls.append(call._replace(problems=own))
    return calls


def milliseconds(run: Callable[[], Any]) -> float:
    """The median time of a call on the GPU, the L2 cache being flushed before each."""
    from triton.testing import do_bench

    return do_bench(run, warmup=20, rep=80, return_mode="median")


def _tensors(result: Any) -> list[Tensor]:
    return [t for t in (result if isinstance(result, tuple) else (result,)) if isinstance(t, Tensor)]


def _agrees(ours: list[Tensor], expected: list[Tensor]) -> bool:
    """Within one rounding of the dtype in the L2 norm (float32 may be multiplied in TF32)."""
    for a, b in zip(ours, expected, strict=True):
        if a.is_floating_point():
            a, b = a.double(), b.double()
            tolerance = 2e-3 if ours[0].dtype == torch.float32 else torch.finfo(ours[0].dtype).eps
            if not torch.linalg.vector_norm(a - b) <= tolerance * torch.linalg.vector_norm(b):
                return False
    return True


def tune(
    calls: list[Call], *, measure: Callable[[Callable[[], Any]], float] = milliseconds, progress: bool = True
) -> Iterator[Tuned]:
    """Time every candidate of every problem, keep the fastest in the user's cache, and yield each outcome."""
    from tqdm.auto import tqdm

    total = sum(len(configs.candidates(*p, configs.target(call.args[0]))) for call in calls for p in call.problems)
    with tqdm(total=total, unit="config", disable=not progress) as bar:
        for call in calls:
            x = call.args[0]
            function = getattr(backend, call.primitive)
            with torch.no_grad():
                expected = _tensors(getattr(reference, call.primitive)(*call.args))
            for kernel, key in call.problems:
                bar.set_description(kernel)
                times: list[tuple[float, configs.Config]] = []
                refused = 0
                for index, config in enumerate(configs.candidates(kernel, key, configs.target(x))):
                    with configs.override(kernel, config):
                        time = _time(lambda: function(*call.args), expected, measure)  # noqa: B023
                    bar.update()
                    if time is not None:
                        times.append((time, config))
                    elif index == 0:
                        times.append((float("inf"), config))  # the default is what others are compared with
                    refused += time is None
                best, config = min(times, key=lambda pair: pair[0])
                if best > (1 - LEAST_GAIN) * times[0][0]:
                    best, config = times[0]
                configs.store(x, kernel, key, config)
                yield Tuned(kernel, key, config, times[0][0], best, refused)


def _time(
    run: Callable[[], Any], expected: list[Tensor], measure: Callable[[Callable[[], Any]], float]
) -> float | None:
    """Milliseconds of the call, or None where it fails or misses the expected result."""
    try:
        with torch.no_grad():
            return measure(run) if _agrees(_tensors(run()), expected) else None
    except Exception:  # a config that does not compile, or needs more than the device has
        return None


# The command line


def workload(model: torch.nn.Module, x: Tensor, modes: Sequence[str] = ("infer", "train")) -> Callable[[], Any]:
    """One step of inference, of training (one with prologues as well), or of both; changes the model's running
    statistics and gradients."""

    def run() -> None:
        if "infer" in modes:
            with torch.inference_mode():
                model.eval()(x)
        if "train" in modes:
            for prologue in (False, True):
                with use_plan(prologue=prologue):
                    model.train()(x).float().sum().backward()

    return run


def main(args: argparse.Namespace) -> int:
    """`fused-resnet tune`: model, mode, batch, size, dtype, device. Returns 1 where no config of a problem is right.

    Raises:
        BackendUnavailableError: the Triton backend cannot run there.
        OSError: the cache cannot be written.
    """
    import fused_resnet

    device = args.device or torch.device("cuda")
    reason = backend.unavailable(device.type)
    if reason is not None:
        raise dispatch.BackendUnavailableError(f"there is nothing to tune on {device.type}: {reason}")
    configs.cache_folder().mkdir(parents=True, exist_ok=True)  # before hours of work, not after
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[args.dtype]
    model = getattr(fused_resnet, args.model)().to(device, dtype, memory_format=torch.channels_last)
    x = torch.randn(args.batch, 3, args.size, args.size, device=device, dtype=dtype)
    print(f"{args.model}, batch {args.batch}, {args.dtype}: one step, to see which kernels run", flush=True)
    calls = record(workload(model, x.contiguous(memory_format=torch.channels_last), args.mode))
    outcomes = list(tune(calls))
    for kernel, key, config, default_ms, best_ms, refused in outcomes:
        note = f", {refused} refused" if refused else ""
        print(f"{kernel} {key}: {default_ms:.3f} ms -> {best_ms:.3f} ms{note}  {config}")
    gains = [o.default_ms / o.best_ms for o in outcomes if o.best_ms < float("inf")]
    if gains:
        median, file = statistics.median(gains), configs.cache_file(x)
        print(f"{len(outcomes)} problems, the median call {median:.2f} times as fast; kept in {file}")
    return int(any(o.best_ms == float("inf") for o in outcomes))
