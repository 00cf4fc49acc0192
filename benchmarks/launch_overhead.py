"""What a call costs before the device has anything to do: eager calls of each backend's primitives on tiny tensors.

On a GPU these are the host's microseconds from Python to the last launch; the device is idle in between.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator

import torch

from fused_resnet import dispatch

CALLS, ROUNDS = 100, 15
BACKENDS = ("triton", "cpp", "reference")


def calls(backend: str, device: torch.device) -> Iterator[tuple[str, Callable[[], object]]]:
    """The primitives of bn_act and add_relu, on 64 channels of 8 x 8 pixels."""
    module = dispatch.load(backend)
    x = torch.randn(1, 64, 8, 8, device=device).contiguous(memory_format=torch.channels_last)
    gamma, beta, mean, var = torch.rand(4, 64, device=device) + 0.5
    yield "add_relu_forward", lambda: module.add_relu_forward(x, x)
    yield "add_relu_backward", lambda: module.add_relu_backward(x, x)
    train = (gamma, beta, mean, var, x, 0.1, 1e-5, "relu")
    yield "bn_act_train_forward", lambda: module.bn_act_train_forward(x, *train)
    yield "bn_act_eval_forward", lambda: module.bn_act_eval_forward(x, gamma, beta, mean, var, x, 1e-5, "relu")
    backward = (x, gamma, beta, mean, var, 1e-5, "relu", True, True)
    yield "bn_act_backward", lambda: module.bn_act_backward(x, x, *backward)


def microseconds(call: Callable[[], object], device: torch.device) -> float:
    begin = time.perf_counter()
    for _ in range(CALLS):
        call()
    end = time.perf_counter()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return (end - begin) / CALLS * 1e6


def measure(device: torch.device) -> dict[str, dict[str, float] | str]:
    """backend -> primitive -> median microseconds, the backends taking turns; or why the backend cannot be used."""
    found: dict[str, dict[str, float] | str] = {}
    able: dict[str, dict[str, Callable[[], object]]] = {}
    for backend in BACKENDS:
        reason = dispatch.load(backend).unavailable(device.type)
        if reason is None:
            able[backend] = dict(calls(backend, device))
        else:
            found[backend] = reason
    times: dict[tuple[str, str], list[float]] = {}
    with torch.no_grad():
        for round_ in range(ROUNDS + 1):
            for backend, primitives in able.items():
                for name, call in primitives.items():
                    spent = microseconds(call, device)
                    if round_:  # the first compiles and warms up
                        times.setdefault((backend, name), []).append(spent)
    for backend, primitives in able.items():
        found[backend] = {name: round(statistics.median(times[backend, name]), 2) for name in primitives}
    return found


def main() -> int:
    parser = argparse.ArgumentParser(prog="launch_overhead", description=__doc__)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    args = parser.parse_args()
    for backend, result in measure(args.device).items():
        if isinstance(result, str):
            print(f"{backend:<10} not measured: {result}")
            continue
        for name, spent in result.items():
            print(f"{backend:<10} {name:<22} {spent:8.1f} us")
    return 0


if __name__ == "__main__":
    sys.exit(main())
