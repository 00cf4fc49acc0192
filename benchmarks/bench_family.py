"""Whole family, whole range of small batches: ours beside the same network on torch's modules, in both memory formats.

    python -m fused_resnet.benchmarks.bench_family [--models LIST] [--batches LIST] [--fresh] [--out FILE]

Writes results/cpu/family.csv after each network, so an interrupted run goes on where it was, and family.md, the table,
beside it. float32, 224x224; parity first (`fused_resnet.verify`, 64x64). Times are medians of paired ratios, ours and
torch's in turn: "channels_last" with parameters and images in that format, "NCHW" with nothing converted. All takes
about two hours on 2 cores.
"""

from __future__ import annotations

import argparse
import copy
import gc
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

import fused_resnet as fr

from . import RequestError, files, harness, records
from .bench_zoo import MODES, speed

MODELS = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "resnext50_32x4d", "resnext101_32x8d")
MODELS += ("resnext101_64x4d", "wide_resnet50_2", "wide_resnet101_2")
BATCHES = (1, 4, 16)
ROUNDS = 9  # at least
LAYOUTS = {"channels_last": torch.channels_last, "NCHW": torch.contiguous_format}


def _case(name: str, layout: str, mode: str, batch: int) -> dict[str, Any]:
    return {"subject": name, "case": layout, "direction": mode, "dtype": "fp32", "batch": batch}


def measure(name: str, layout: str, batches: list[int]) -> list[records.Row]:
    """All rows of one network in one memory format; no parity raises."""
    torch.manual_seed(0)
    model: nn.Module = getattr(fr, name)().to(memory_format=LAYOUTS[layout])
    plain = fr.restore(copy.deepcopy(model))
    rows = []
    for mode, train in MODES.items():
        images = torch.randn(max(batches), 3, 224, 224).contiguous(memory_format=LAYOUTS[layout])
        fr.verify(model, images[:2, :, :64, :64], train=train)
        for batch in batches:
            x = images[:batch].contiguous(memory_format=LAYOUTS[layout])
            rows += [_case(name, layout, mode, batch) | row for row in speed(model, plain, x, train, ROUNDS)]
    return [{"suite": "family"} | row for row in rows]


def table(rows: list[records.Row]) -> str:
    """The Markdown table of measured speed-ups: a line per network and mode, a column per format and batch."""
    found = {
        (row["subject"], row["direction"], row["case"], int(row["batch"])): float(row["value"])
        for row in rows
        if row["suite"] == "family" and row["metric"] == "speedup" and row["value"]
    }
    columns = sorted({(case, batch) for _, _, case, batch in found}, key=lambda column: (column[0] == "NCHW", column))
    lines = [
        f"| network | | {' | '.join(f'{case}, {batch}' for case, batch in columns)} |",
        "|---" * (len(columns) + 2) + "|",
    ]
    for name in MODELS:
        for mode in MODES:
            cells = [found.get((name, mode, *column)) for column in columns]
            if any(cells):
                lines.append(f"| {name} | {mode} | {' | '.join(f'{c:.2f}x' if c else '-' for c in cells)} |")
    return "\n".join(lines) + "\n"


def run(out: Path, names: list[str], batches: list[int], fresh: bool = False) -> int:
    """Measure what is not there yet, and write the files. 0 where nothing is slower than torch's, else 1."""
    unknown = [name for name in names if name not in MODELS]
    if unknown:
        raise RequestError(f"no network {', '.join(unknown)}; expected some of {', '.join(MODELS)}")
    store = records.Store(out, torch.device("cpu"), fresh)
    with tqdm([(name, layout) for name in names for layout in LAYOUTS], unit="network") as bar:
        for name, layout in bar:
            bar.set_description(f"{name}, {layout}")
            cases = [_case(name, layout, mode, batch) for mode in MODES for batch in batches]
            if all(store.has(suite="family", metric="speedup", **case) for case in cases):
                continue
            store.put(measure(name, layout, batches))
            gc.collect()
            files.write(out.with_suffix(".md"), table(list(store.rows.values())).encode())
    rows = list(store.rows.values())
    print(table(rows))
    slower = [row for row in rows if row["metric"] == "speedup" and row["value"] and float(row["value"]) < 1]
    for row in slower:
        print(f"slower than torch's: {row['subject']}, {row['case']}, {row['direction']}, batch {row['batch']}")
    return int(bool(slower))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(MODELS), metavar="LIST", help="networks (all ten)")
    parser.add_argument("--batches", default=",".join(map(str, BATCHES)), metavar="LIST", help="images (1,4,16)")
    parser.add_argument("--out", type=Path, default=records.RESULTS / "cpu" / "family.csv", metavar="FILE")
    parser.add_argument("--fresh", action="store_true", help="measure again what is there already")
    args = parser.parse_args()
    try:
        return run(args.out, args.models.split(","), [int(batch) for batch in args.batches.split(",")], args.fresh)
    except (RequestError, ValueError) as error:
        parser.error(harness.one_line(error))
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here")
        return 130


if __name__ == "__main__":
    raise SystemExit(main())
