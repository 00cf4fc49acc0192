"""What depth costs: calls and time a layer where arithmetic is next to nothing, and what training keeps in memory.

    python -m fused_resnet.benchmarks.depth [--model cifar_resnet1202] [--batch 4] [--rounds 5]

The same network three times, in turn, in channels_last: of torch's own modules, and fused with memory="balanced" and
"low". First one image of 8x8 pixels, whose time is that of launching; then a batch of 32x32. A step is forward and
backward; views count as no call.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from tqdm.auto import tqdm

import fused_resnet as fr

from . import harness
from .saved import saved_by
from .worker import Memory

MEMORY = ("balanced", "low")


class Calls(TorchDispatchMode):
    """Counts by name the operators that run within it, below autograd; views are none, nor is the choice of a pool."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view and func.overloadpacket.__name__ != "pool_activate":
            self.counts[f"{func.namespace}.{func.overloadpacket.__name__}"] += 1
        return func(*args, **(kwargs or {}))


def step(model: nn.Module, x: Tensor) -> Callable[[], None]:
    """A forward and a backward pass in training."""
    model.train()

    def run() -> None:
        model.zero_grad(set_to_none=True)
        model(x).square().mean().backward()

    return run


def calls(model: nn.Module, x: Tensor) -> tuple[Counter[str], Counter[str]]:
    """The operators that run forward, and backward."""
    model.zero_grad(set_to_none=True)
    with Calls() as forward:
        loss = model.train()(x).square().mean()
    with Calls() as backward:
        loss.backward()
    return forward.counts, backward.counts


def peak(run: Callable[[], None], device: torch.device) -> int:
    """The most bytes that a step holds above what was there before it."""
    run()
    Memory(device).restart()
    memory = Memory(device)
    before = memory.peak()
    run()
    return memory.peak() - before


def networks(name: str, device: torch.device) -> dict[str, nn.Module]:
    """ "torch": the network restored; else by `memory`."""
    build = getattr(fr, name)
    found = {"torch": fr.restore(build())} | {f'fused, "{memory}"': build(memory=memory) for memory in MEMORY}
    state = found["torch"].state_dict()
    for model in found.values():
        model.load_state_dict(state)
        model.to(device, memory_format=torch.channels_last)
    return found


def measure(models: dict[str, nn.Module], x: Tensor, rounds: int) -> list[str]:
    """The table for one batch, in lines."""
    with tqdm(total=0, desc="x".join(map(str, x.shape)), unit="round", leave=False) as bar:

        def progress(rounds: range) -> Any:
            bar.reset(len(rounds))
            for index in rounds:
                yield index
                bar.update()

        steps = {name: lambda model=model: step(model, x) for name, model in models.items()}
        times, _ = harness.measure(steps, rounds, 1, harness.timer(x.device), progress)
    head = (
        "",
        "calls forward",
        "backward",
        "ms (quartiles)",
        "us a layer",
        "times as fast as torch",
        "kept MiB",
        "peak MiB",
    )
    rows = [head]
    for name, model in models.items():
        layers = sum(isinstance(module, (nn.Conv2d, nn.Linear)) for module in model.modules())
        forward, backward = (sum(counts.values()) for counts in calls(model, x))
        if times[name].reason is not None:
            rows.append((name, str(forward), str(backward), f"not available: {times[name].reason}", *[""] * 4))
            continue
        ms, low, high = harness.spread(times[name].ms)
        ratio = harness.ratio(times["torch"], times[name]) or (float("nan"),) * 3
        rows.append(
            (
                name,
                str(forward),
                str(backward),
                f"{ms:.0f} ({low:.0f} to {high:.0f})",
                f"{1e3 * ms / layers:.0f}",
                "{:.2f} ({:.2f} to {:.2f})".format(*ratio),
                f"{saved_by(model.train(), x) / 2**20:.0f}",
                f"{peak(step(model, x), x.device) / 2**20:.0f}",
            )
        )
        model.zero_grad(set_to_none=True)
    names, *columns = zip(*rows, strict=True)
    widths = [max(map(len, column)) for column in columns]
    return [
        f"{name:<{max(map(len, names))}}  " + "  ".join(f"{cell:>{w}}" for cell, w in zip(cells, widths, strict=True))
        for name, *cells in rows
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="cifar_resnet1202", metavar="M", help="a CIFAR network (cifar_resnet1202)")
    parser.add_argument("--batch", type=int, default=4, metavar="N", help="images of 32x32 in a batch (4)")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="timed steps of each (5)")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"), help="(cpu)")
    args = parser.parse_args()
    models = networks(args.model, args.device)
    for shape in ((1, 3, 8, 8), (args.batch, 3, 32, 32)):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        x = x.to(args.device, memory_format=torch.channels_last)
        print(f"{args.model}, training, {'x'.join(map(str, shape))}, float32, on {args.device}")
        print("\n".join(measure(models, x, args.rounds)), flush=True)


if __name__ == "__main__":
    main()
