"""`fused_resnet.fuse` on the models of `zoo`: units found, parity, and the speed beside the same model unfused.

    python -m fused_resnet.benchmarks.bench_zoo [--only TEXT] [--rounds N] [--no-times]

Prints a table in Markdown, a row as soon as it is known. A model without parity gets no speed. Times are medians of
paired ratios, the two interleaved; inputs are the small ones of the zoo, in channels_last.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable

import torch
from fused_resnet.benchmarks.zoo import ZOO, Entry
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import fused_resnet as fr


def ratio(ours: Callable[[], object], theirs: Callable[[], object], rounds: int) -> float:
    """Median of theirs / ours."""
    found = []
    for index in range(rounds + 2):
        times = []
        for run in (ours, theirs) if index % 2 else (theirs, ours):
            start = time.perf_counter()
            run()
            times.append(time.perf_counter() - start)
        mine, other = times if index % 2 else times[::-1]
        if index > 1:
            found.append(other / mine)
    return statistics.median(found)


def infer(model: nn.Module, x: Tensor) -> Callable[[], object]:
    model.eval()

    def run() -> object:
        with torch.inference_mode():
            return model(x)

    return run


def train(model: nn.Module, x: Tensor) -> Callable[[], object]:
    model.train()

    def run() -> None:
        model.zero_grad()
        outputs = [o for o in pytree.tree_leaves(model(x)) if isinstance(o, Tensor) and o.requires_grad]
        torch.stack([out.sum() for out in outputs]).sum().backward()

    return run


def row(name: str, entry: Entry, rounds: int) -> str:
    torch.manual_seed(0)
    model = entry.make()
    plain = copy.deepcopy(model)
    report = fr.fuse(model)
    x = torch.randn(entry.shape)
    x = x.contiguous(memory_format=torch.channels_last if x.dim() == 4 else torch.channels_last_3d)
    cells = []
    for mode, step in (("inference", infer), ("training", train)):
        try:
            fr.verify(model, x, train=mode == "training")
        except fr.ParityError:
            cells += ["**no**"]
            continue
        except RuntimeError as error:
            cells += [f"not run: {str(error).splitlines()[0][:60]}"]
            continue
        speed = f", {ratio(step(model, x), step(plain, x), rounds):.2f}x" if rounds else ""
        cells += [f"yes{speed}"]
    return f"| {name} | {len(report.fused)} | {len(report.skipped)} | {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", metavar="TEXT", help="models whose name contains this")
    parser.add_argument("--rounds", type=int, default=10, metavar="N", help="timed rounds (10)")
    parser.add_argument("--no-times", action="store_true", help="fusions and parity alone")
    args = parser.parse_args()
    print("| model | units fused | batch norms left | inference: parity, speed | training: parity, speed |")
    print("|---|---|---|---|---|")
    for name, entry in ZOO.items():
        if args.only in name:
            print(row(name, entry, 0 if args.no_times else args.rounds), flush=True)


if __name__ == "__main__":
    main()
