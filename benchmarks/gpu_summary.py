"""The last word of gpu_check.sh: what is red, the ten worst kernels, the headline ratios; and ncu's bytes."""

from __future__ import annotations

import argparse
import csv
import json
import sys
from pathlib import Path
from typing import Any

from . import files, records, report
from .rivals import WHAT
from .small_kernels import SEPARATOR


def steps(path: Path) -> list[str]:
    lines = [[cell.strip() for cell in line.split("|")] for line in path.read_text().splitlines()]
    red = [line for line in lines if line[2].startswith("FAILED")]
    verdict = f"{len(red)} of {len(lines)} steps are red" if red else f"none of {len(lines)} steps is red"
    return [
        f"## {verdict}",
        "",
        *report.markdown(("part", "step", "result", "time"), sorted(lines, key=lambda line: line not in red)),
    ]


def headlines(rows: list[records.Row]) -> list[str]:
    """A line for each job: the fastest of ours beside the fastest rival and beside channels_last."""
    out = []
    for (model, mode, dtype, batch), of in report.grouped(rows, "subject", "direction", "dtype", "batch").items():
        ms = report.values(of, "ms")
        ours, theirs = ({r: v for r, v in ms.items() if report._ours(r) is which} for which in (True, False))
        what = f"- {model}, {WHAT[mode]}, {dtype}, batch {batch}: "
        if not ours or not theirs:
            out.append(what + ("no rival ran" if ours else "ours did not run"))
            continue
        best, rival = min(ours, key=ours.__getitem__), min(theirs, key=theirs.__getitem__)
        text = (
            f"{best} {1e3 * int(batch) / ours[best]:.4g} images/s, {theirs[rival] / ours[best]:.2f}x the fastest rival"
        )
        text += f" ({rival})"
        if "channels_last" in ms:
            text += f", {ms['channels_last'] / ours[best]:.2f}x channels_last"
        out.append(what + text)
    return out


def profiled(path: Path) -> list[dict[str, Any]]:
    """ncu's long CSV as the calls between separators: {bytes, ns, kernels}."""
    lines = [line for line in path.read_text().splitlines() if line.startswith('"')]
    launches: dict[str, dict[str, Any]] = {}
    for row in csv.DictReader(lines):
        launch = launches.setdefault(row["ID"], {"name": row["Kernel Name"]})
        launch[row["Metric Name"]] = float(row["Metric Value"].replace(",", ""))
    calls: list[dict[str, Any]] = []
    for launch in launches.values():
        if SEPARATOR in launch["name"]:
            calls.append({"bytes": 0.0, "ns": 0.0, "kernels": 0})
        elif calls:
            calls[-1]["bytes"] += launch["dram__bytes_read.sum"] + launch["dram__bytes_write.sum"]
            calls[-1]["ns"] += launch["gpu__time_duration.sum"]
            calls[-1]["kernels"] += 1
    return calls


def traffic(ncu: Path, expected: Path) -> list[str]:
    """Bytes that went through the device's memory beside the traffic model's, call by call."""
    lines = [json.loads(line) for line in expected.read_text().splitlines() if line.startswith("{")]
    wanted = [line for line in lines if "call" in line]
    calls = profiled(ncu)
    if len(calls) != len(wanted):
        raise SystemExit(f"{ncu} has {len(calls)} calls, {expected} {len(wanted)}: they are not of one run")
    head = ("call", "kernels", "ms", "MB", "the model's MB", "GB/s")
    cells = [
        [
            want["call"],
            str(c["kernels"]),
            f"{c['ns'] / 1e6:.4f}",
            f"{c['bytes'] / 1e6:.1f}",
            f"{want['bytes'] / 1e6:.1f}",
            f"{c['bytes'] / max(c['ns'], 1):.0f}",
        ]
        for want, c in zip(wanted, calls, strict=True)
    ]
    return report.markdown(head, cells)


def summary(folder: Path) -> list[str]:
    out = ["# gpu_check", "", *steps(folder / "steps.txt")]
    rows = [
        row for name in ("ops", "models", "layers") if (p := folder / f"{name}.csv").exists() for row in records.read(p)
    ]
    if rows:
        place = rows[-1]
        out += ["", f"{place['device']}, driver {place['driver']}, torch {place['torch']}, triton {place['triton']}"]
    cases = report.kernel_cases(rows)
    if cases:
        out += [
            "",
            "## Kernels",
            "",
            *report.kernel_table(cases),
            "",
            "The ten worst:",
            "",
            *report.worst_kernels(cases),
        ]
    models = [row for row in rows if row["suite"] == "models"]
    if models:
        out += ["", "## Headlines", "", *headlines(models)]
    layers = [row for row in rows if row["suite"] == "layers"]
    for (model, mode, dtype, batch), of in report.grouped(layers, "subject", "direction", "dtype", "batch").items():
        out += ["", f"## Tune next: {model}, {WHAT[mode]}, {dtype}, batch {batch}", "", *report.share_of_the_floor(of)]
    return out


def main() -> int:
    parser = argparse.ArgumentParser(prog="gpu_summary", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument(
        "--traffic", type=Path, metavar="CALLS", help="only ncu.csv beside the calls that were profiled"
    )
    args = parser.parse_args()
    if args.traffic:
        print(*traffic(args.folder / "ncu.csv", args.traffic), sep="\n")
        return 0
    text = "\n".join(summary(args.folder))
    files.write(args.folder / "summary.md", (text + "\n").encode())
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
