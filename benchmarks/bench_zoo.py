"""`fused_resnet.fuse` on the models of `zoo`: what is found, parity, and the speed beside the same model unfused.

    python -m fused_resnet.benchmarks.bench_zoo [--only TEXT] [--until found | parity] [--fresh] [--readme FILE]

Writes results/cpu/zoo.csv after each model, so an interrupted run goes on where it was, and zoo.md, the table, beside
it; --readme puts the table between a README's `<!-- zoo -->` marks. All models: about 12 minutes on 2 idle cores.

Parity is `fused_resnet.verify` at the zoo's own small inputs; without it there is no speed. Times are medians of paired
ratios, fused and unfused in turn, in float32 and channels_last, at twice the zoo's image size (detectors:
at that size).
"""

from __future__ import annotations

import argparse
import copy
import gc
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from tqdm.auto import tqdm

import fused_resnet as fr

from . import RequestError, files, harness, records
from .zoo import ZOO, Entry, without_extension

MODES = {"inference": False, "training": True}
DONE = {"found": ("units", ""), "parity": ("parity", "training"), "times": ("speedup", "training")}  # the last row
START, END = "<!-- zoo -->", "<!-- /zoo -->"
_SECONDS = 3.0  # for the timed rounds of one model in one mode
_ROUNDS = (5, 20)


def _layout(entry: Entry) -> Any:
    return torch.channels_last if len(entry.shape) == 4 else torch.channels_last_3d


def _input(entry: Entry, scale: int) -> Tensor:
    shape = (*entry.shape[:-2], *(scale * side for side in entry.shape[-2:]))
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).contiguous(memory_format=_layout(entry))


def _step(model: nn.Module, x: Tensor, train: bool) -> harness.Step:
    model.train(train)

    def infer() -> Any:
        with torch.inference_mode():
            return model(x)

    def step() -> None:
        model.zero_grad()
        outputs = [o for o in pytree.tree_leaves(model(x)) if isinstance(o, Tensor) and o.requires_grad]
        torch.stack([out.sum() for out in outputs]).sum().backward()

    return step if train else infer


def speed(model: nn.Module, plain: nn.Module, x: Tensor, train: bool, least: int = _ROUNDS[0]) -> list[dict[str, Any]]:
    """Rows of the speed-up and of both times; `least`: rounds at least."""
    clock = harness.timer(x.device)
    steps: dict[str, Callable[[], harness.Step]] = {
        "fused": lambda: _step(model, x, train),
        "unfused": lambda: _step(plain, x, train),
    }
    pair = sum(min(clock(make()) for _ in range(2)) for make in steps.values()) / 1e3
    rounds = max(least, min(_ROUNDS[1], int(_SECONDS / pair)))
    times, complete = harness.measure(steps, rounds, 1, clock)
    if not complete:
        raise KeyboardInterrupt
    ratio = harness.ratio(times["unfused"], times["fused"])
    if ratio is None:
        return [{"metric": "speedup", "note": times["fused"].reason or times["unfused"].reason}]
    speedup = dict(zip(("value", "low", "high"), ratio, strict=True))
    rows = [{"metric": "speedup", "rival": "unfused", "runs": rounds, **speedup}]
    for name, entry in times.items():
        middle, low, high = harness.spread(entry.ms)
        rows.append({"metric": "ms", "rival": name, "value": middle, "low": low, "high": high, "runs": rounds})
    return rows


def measure(name: str, entry: Entry, until: str) -> list[dict[str, Any]]:
    """All rows of one model, as far as `until`, one of `DONE`."""
    torch.manual_seed(0)
    model = entry.make().to(memory_format=_layout(entry))
    plain = copy.deepcopy(model)
    report = fr.fuse(model)
    found = {"units": report.fused, "blocks": report.blocks, "left": report.skipped}
    rows: list[dict[str, Any]] = [{"metric": metric, "value": len(what)} for metric, what in found.items()]
    small, large = _input(entry, 1), _input(entry, entry.larger)
    for mode, train in MODES.items() if until != "found" else ():
        case = {"direction": mode, "dtype": "fp32", "batch": len(small)}
        try:
            fr.verify(model, small, train=train)
            note, ok = "", True
        except Exception as error:  # whatever a model does, the others are measured
            note, ok = harness.one_line(error), False
        rows.append({"metric": "parity", "case": _size(small), "value": int(ok), "note": note, **case})
        if until == "times":
            times = speed(model, plain, large, train) if ok else [{"metric": "speedup", "note": "no parity"}]
            rows += [{"case": _size(large), **case, **row} for row in times]
    return [{"suite": "zoo", "subject": name, **row} for row in rows]


def _size(x: Tensor) -> str:
    return "x".join(map(str, x.shape[1:]))


def table(rows: list[records.Row]) -> str:
    """The Markdown table of measured rows, in the order of the zoo."""
    values: dict[tuple[str, str, str], records.Row] = {
        (row["subject"], row["direction"], row["metric"]): row
        for row in rows
        if row["suite"] == "zoo" and row["metric"] != "ms"
    }
    lines = [
        "| model | units fused | whole blocks | batch norms left | parity | inference | training |",
        "|---|---|---|---|---|---|---|",
    ]
    speeds: dict[str, list[float]] = {mode: [] for mode in MODES}
    for name in ZOO:
        if (name, "", "units") not in values:
            continue
        cells = [name, *(values[name, "", metric]["value"] for metric in ("units", "blocks", "left"))]
        known = [mode for mode in MODES if (name, mode, "parity") in values]
        failed = [mode for mode in known if values[name, mode, "parity"]["value"] != "1"]
        cells.append(f"**not in {' and '.join(failed)}**" if failed else "yes" if known else "-")
        for mode in MODES:
            row = values.get((name, mode, "speedup"))
            if row is not None and row["value"]:
                speeds[mode].append(float(row["value"]))
            cells.append(f"{float(row['value']):.2f}x" if row is not None and row["value"] else "-")
        lines.append(f"| {' | '.join(cells)} |")
    if all(speeds.values()):
        medians = [f"{statistics.median(found):.2f}x" for found in speeds.values()]
        lines.append(f"| median | | | | | {' | '.join(medians)} |")
    return "\n".join(lines) + "\n"


def with_table(readme: str, markdown: str) -> str:
    """The README with the table between its marks.

    Raises:
        RequestError: it has none.
    """
    before, start, rest = readme.partition(START)
    _, end, after = rest.partition(END)
    if not start or not end:
        raise RequestError(f"the README has no marks {START} and {END}")
    return f"{before}{START}\n{markdown}{END}{after}"


def run(out: Path, only: str = "", fresh: bool = False, until: str = "times", readme: Path | None = None) -> int:
    """Measure what is not there yet, and write the files. 0 where parity holds everywhere, else 1."""
    store = records.Store(out, torch.device("cpu"), fresh)
    names = [name for name in ZOO if only in name]
    if not names:
        raise RequestError(f"no model of the zoo has {only!r} in its name: {', '.join(ZOO)}")
    metric, direction = DONE[until]
    with tqdm(names, unit="model") as bar:
        for name in bar:
            bar.set_description(name)
            if store.has(suite="zoo", subject=name, metric=metric, direction=direction):
                continue
            try:
                rows = measure(name, ZOO[name], until)
            except ImportError as error:
                bar.write(f"{name} is left out: {harness.one_line(error)}")
                continue
            store.drop(suite="zoo", subject=name)
            store.put(rows)
            gc.collect()
            files.write(out.with_suffix(".md"), table(list(store.rows.values())).encode())
    markdown = table(list(store.rows.values()))
    files.write(out.with_suffix(".md"), markdown.encode())
    if readme is not None:
        files.write(readme, with_table(readme.read_text(), markdown).encode())
    print(markdown)
    return int(any(row["metric"] == "parity" and row["value"] != "1" for row in store.rows.values()))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", metavar="TEXT", help="models whose name contains this")
    parser.add_argument("--out", type=Path, default=records.RESULTS / "cpu" / "zoo.csv", metavar="FILE")
    parser.add_argument("--fresh", action="store_true", help="measure again what is there already")
    parser.add_argument("--until", choices=DONE, default="times", help="stop after this (times)")
    parser.add_argument("--readme", type=Path, metavar="FILE", help="a README to put the table into")
    args = parser.parse_args()
    without_extension()
    try:
        return run(args.out, args.only, args.fresh, args.until, args.readme)
    except RequestError as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here")
        return 130


if __name__ == "__main__":
    raise SystemExit(main())
