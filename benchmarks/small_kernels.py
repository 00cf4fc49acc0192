"""Every op once in each direction, for a sanitizer or a profiler: its smallest shape, or the largest of ResNet-50."""

from __future__ import annotations

import argparse
import json
import sys

import torch

import fused_resnet
from fused_resnet.dispatch import BackendUnavailableError

from . import bench_ops, kernels
from .kernels import Case, Maker, Op

SEPARATOR = "spin_kernel"  # what torch.cuda._sleep launches; it stands between calls in a profile


def picked(op: Op, large: bool) -> Case:
    cost = lambda case: op.cost(case.sizes, op.directions[-1]).activations  # noqa: E731
    if large:
        return max((case for case in op.cases() if "resnet50" in case.models or op.name == "add_relu"), key=cost)
    return min(op.cases(), key=cost)


def main() -> int:
    """Prints a line of JSON for each call, in the order in which they run: its name and the bytes of the model."""
    parser = argparse.ArgumentParser(prog="small_kernels", description=__doc__)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--dtype", choices=tuple(bench_ops.DTYPES), default="bf16")
    parser.add_argument("--profile", action="store_true", help="large shapes; only the calls, each after a separator")
    args = parser.parse_args()
    dtype, on_gpu = bench_ops.DTYPES[args.dtype], args.device.type == "cuda"
    plan = {"gram": True, "prologue": True} if args.backend == "triton" else {}  # what nothing chooses by itself yet
    for op in bench_ops.ops().values():
        case = picked(op, args.profile)
        for direction in op.directions:
            name = f"{op.name} {case.name}, {kernels.DIRECTIONS[direction]}"
            make = Maker(args.batch, dtype, args.device)
            inputs = [op.inputs(case.sizes, make)]
            with (
                torch.set_grad_enabled(direction != "infer"),
                fused_resnet.use_backend(args.backend),
                fused_resnet.use_plan(**plan),
            ):
                try:
                    kernels.calls(op, bench_ops.OURS, inputs, direction)[0]()  # compiles
                    (call,) = kernels.calls(op, bench_ops.OURS, inputs, direction)
                    if on_gpu:
                        torch.cuda.synchronize()
                    if args.profile and on_gpu:
                        torch.cuda.profiler.start()
                        torch.cuda._sleep(1)
                    call()
                    if on_gpu:
                        torch.cuda.synchronize()
                    if args.profile and on_gpu:
                        torch.cuda.profiler.stop()
                except BackendUnavailableError as error:
                    print(json.dumps({"skipped": name, "reason": str(error)}), flush=True)
                    continue
            cost = op.cost(case.sizes, direction)
            moved = (cost.activations * args.batch + cost.weights) * dtype.itemsize
            print(json.dumps({"call": name, "bytes": moved}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
