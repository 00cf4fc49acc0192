"""Times as a table, and benchmarks/RESULTS.md from the files under benchmarks/results alone."""

from __future__ import annotations

from collections.abc import Iterable
from math import exp, log
from pathlib import Path
from statistics import median
from typing import Any

from . import files, records
from .kernels import DIRECTIONS
from .records import Row
from .rivals import WHAT
from .roofline import floor_ms

OURS = "fused_resnet"
TOP = 10


def table(result: dict[str, Any]) -> str:
    """The rows as an aligned table: times, in training what autograd saves, and how many times as fast ours are, paired
    by round."""
    ours = [row["name"] for row in result["rows"] if row["ours"] and "median_ms" in row]
    saved = any("saved_bytes" in row for row in result["rows"])
    head = ["rival", "median ms", "quartiles", "images/s", *(["saved MB"] if saved else [])]
    cells = [[*head, *(f"speed-up: {name}" for name in ours)]]
    for row in result["rows"]:
        if "median_ms" not in row:
            cells.append([row["name"], f"not available: {row['not_available']}"])
            continue
        low, high = row["quartiles_ms"]
        faster = [row["speedup"].get(name) for name in ours]
        cells.append(
            [row["name"], f"{row['median_ms']:.2f}", f"{low:.2f} to {high:.2f}", f"{row['images_per_s']:.1f}"]
            + ([f"{row['saved_bytes'] / 1e6:.0f}" if "saved_bytes" in row else ""] if saved else [])
            + [
                f"{f['median']:.2f}x ({f['low']:.2f} to {f['high']:.2f})" if f and not row["ours"] else ""
                for f in faster
            ]
        )
    widths = [max(len(row[i]) for row in cells if len(row) > 2) for i in range(len(cells[0]))]
    out = []
    for row in cells:
        if len(row) == 2:
            out.append(f"{row[0]:<{widths[0]}}  {row[1]}")
            continue
        text = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        out.append("  ".join(text).rstrip())
    for row in result["rows"]:
        if row.get("first_call_ms", 0) > 1e3 and row["first_call_ms"] > 10 * row["median_ms"]:
            out.append(f"{row['name']}: its first call took {row['first_call_ms'] / 1e3:.1f} s")
        if row.get("backends"):
            out.append(f"{row['name']} ran on {', '.join(row['backends'])}")
    if not result["complete"]:
        done = max(len(row.get("runs_ms", ())) for row in result["rows"])
        out.append(f"INCOMPLETE: interrupted in round {done} of {result['rounds']}")
    return "\n".join(out)


# RESULTS.md


def markdown(head: Iterable[str], rows: Iterable[Iterable[str]]) -> list[str]:
    """A table, its first column text and the others numbers."""
    head = list(head)
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *map(list, rows)]
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines]


def grouped(rows: Iterable[Row], *names: str) -> dict[tuple[str, ...], list[Row]]:
    found: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        found.setdefault(tuple(row[name] for name in names), []).append(row)
    return found


def values(rows: Iterable[Row], metric: str) -> dict[str, float]:
    """rival -> value, of the rows that have one."""
    return {row["rival"]: float(row["value"]) for row in rows if row["metric"] == metric and row["value"]}


def _ours(rival: str) -> bool:
    return rival in (OURS, "as is") or rival.startswith(f"{OURS} ")


def is_main(task: list[Row]) -> bool:
    """Whether a job was everyone's, not one of a sweep."""
    return len({row["rival"] for row in task}) > 6


def named(rival: str, model: str) -> str:
    return f"`fused_resnet.{model}()`" if rival == "as is" else rival


def model_table(model: str, rows: list[Row]) -> list[str]:
    """One job: every rival's time, rate, memory, first step, and how many times as fast ours is; then who is absent."""
    batch = int(rows[0]["batch"])
    first, peak, ratio = (values(rows, metric) for metric in ("first_ms", "peak_bytes", f"speedup of {OURS}"))
    times = [row for row in rows if row["metric"] == "ms"]
    cells = []
    for row in sorted((row for row in times if row["value"]), key=lambda row: -float(row["value"])):
        rival, ms = row["rival"], float(row["value"])
        name = f"**{named(rival, model)}**" if _ours(rival) else rival
        cells.append(
            [
                name,
                f"{ms:.4g} ({float(row['low']):.4g} to {float(row['high']):.4g})",
                f"{1e3 * batch / ms:.4g}",
                f"{peak[rival] / 2**20:.0f}",
                f"{first[rival] / 1e3:.2f}",
                f"{ratio[rival]:.2f}x" if rival in ratio else "",
            ]
        )
    head = ("rival", "ms (quartiles)", "images/s", "peak MiB", "first step s", f"{OURS} is faster by")
    out = markdown(head, cells)
    absent = [f"{row['rival']}: {row['note'].removeprefix('not available: ')}" for row in times if not row["value"]]
    return out + (["", "Not available: " + "; ".join(absent) + "."] if absent else [])


def sweep_table(tasks: dict[tuple[str, ...], list[Row]]) -> list[str]:
    """A line for each job: images per second of all who ran it, and how many times as fast ours is as torch's."""
    ran = [values(rows, "ms") for rows in tasks.values()]
    rivals = list(dict.fromkeys(rival for ms in sorted(ran, key=len, reverse=True) for rival in ms))
    cells = []
    for ((model, mode, dtype, batch), rows), ms in zip(tasks.items(), ran, strict=True):
        ratios = values(rows, "speedup of as is") | values(rows, f"speedup of {OURS}")
        best = f"{ratios['channels_last']:.2f}x" if "channels_last" in ratios else ""
        rates = [f"{1e3 * int(batch) / ms[rival]:.4g}" if rival in ms else "-" for rival in rivals]
        cells.append([f"{model}, {WHAT[mode]}, {dtype}, batch {batch}", *rates, best])
    head = (f"{OURS}, as is" if rival == "as is" else rival for rival in rivals)
    return markdown(["images per second", *head, f"{OURS} beside channels_last"], cells)


def ceilings(rows: list[Row]) -> dict[str, tuple[float, float]]:
    """dtype -> (bytes/s, FLOP/s)."""
    machine = grouped((row for row in rows if row["suite"] == "machine"), "dtype")
    found = {}
    for (dtype,), of in machine.items():
        number = {row["metric"]: float(row["value"]) for row in of}
        found[dtype] = (number["bytes/s"], number["flop/s"])
    return found


def kernel_cases(rows: list[Row]) -> list[dict[str, Any]]:
    """Every measured kernel case: its key, floor in ms, FLOPs per byte, and milliseconds by rival."""
    limits = ceilings(rows)
    found = []
    ops = (row for row in rows if row["suite"] == "ops")
    for (op, case, direction, dtype, batch), of in grouped(
        ops, "subject", "case", "direction", "dtype", "batch"
    ).items():
        cost = {row["metric"]: float(row["value"]) for row in of if row["metric"] in ("bytes", "flops")}
        floor = floor_ms(cost["bytes"], cost["flops"], *limits[dtype])
        absent = {row["rival"]: row["note"] for row in of if row["metric"] == "ms" and not row["value"]}
        key = {"op": op, "case": case, "direction": direction, "dtype": dtype, "batch": batch}
        found.append(key | cost | {"floor": floor, "ms": values(of, "ms"), "absent": absent})
    return found


def geometric_mean(numbers: Iterable[float]) -> float:
    logs = [log(number) for number in numbers]
    return exp(sum(logs) / len(logs))


def kernel_table(cases: list[dict[str, Any]]) -> list[str]:
    """A line per op and direction: median part of the ceiling by rival, and ours beside each."""
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for case in cases:
        groups.setdefault((case["op"], case["direction"], case["dtype"]), []).append(case)
    rivals = list(
        dict.fromkeys(rival for case in cases for rival in (*case["ms"], *case["absent"]) if not _ours(rival))
    )
    rivals += [r for r in dict.fromkeys(rival for case in cases for rival in case["ms"]) if _ours(r)]
    cells = []
    for (op, direction, dtype), of in groups.items():
        line = [f"{op}, {DIRECTIONS[direction]}, {dtype}", str(len(of))]
        for rival in rivals:
            parts = [100 * case["floor"] / case["ms"][rival] for case in of if rival in case["ms"]]
            line.append(f"{median(parts):.0f}%" if parts else "")
        both = [case["ms"]["eager"] / case["ms"][OURS] for case in of if {"eager", OURS} <= case["ms"].keys()]
        line.append(f"{geometric_mean(both):.2f}x" if both else "")
        cells.append(line)
    return markdown(["of the ceiling (median)", "shapes", *rivals, f"{OURS} beside eager"], cells)


def worst_kernels(cases: list[dict[str, Any]], count: int = TOP) -> list[str]:
    """Ours that are slowest beside the fastest rival."""
    found = []
    for case in cases:
        others = {rival: ms for rival, ms in case["ms"].items() if not _ours(rival)}
        if OURS in case["ms"] and others:
            best = min(others, key=others.__getitem__)
            found.append((others[best] / case["ms"][OURS], best, case))
    found.sort(key=lambda item: item[0])
    return markdown(
        ["op", "ms", "of the ceiling", "beside the fastest rival"],
        [
            [
                f"{case['op']} {case['case']}, {DIRECTIONS[case['direction']]}, {case['dtype']}",
                f"{case['ms'][OURS]:.4g}",
                f"{100 * case['floor'] / case['ms'][OURS]:.0f}%",
                f"{ratio:.2f}x {best}",
            ]
            for ratio, best, case in found[:count]
        ],
    )


def share_of_the_floor(rows: list[Row], count: int = TOP) -> list[str]:
    """One recorded step: what lies farthest above its floor first, then the rest, then what Amdahl's law leaves."""
    whole = next(float(row["value"]) for row in rows if row["case"] == "step")
    kinds = []
    for (case, by), of in grouped((row for row in rows if row["case"] != "step"), "case", "rival").items():
        number = {row["metric"]: float(row["value"]) for row in of}
        calls = next(row["note"] for row in of if row["metric"] == "ms")
        kinds.append((case, by, calls, number["ms"], number["floor_ms"]))
    kinds.sort(key=lambda kind: kind[4] - kind[3])
    cells = [
        [f"{case} ({calls}, {by})", f"{ms:.4g}", f"{floor:.4g}", f"{100 * floor / ms:.0f}%", f"{ms - floor:.4g}"]
        for case, by, calls, ms, floor in kinds[:count]
    ]
    rest = kinds[count:]
    if rest:
        ms, floor = sum(kind[3] for kind in rest), sum(kind[4] for kind in rest)
        cells.append(
            [f"{len(rest)} more", f"{ms:.4g}", f"{floor:.4g}", f"{100 * floor / ms:.0f}%", f"{ms - floor:.4g}"]
        )
    total, floor = sum(kind[3] for kind in kinds), sum(kind[4] for kind in kinds)
    cells.append(["all", f"{total:.4g}", f"{floor:.4g}", f"{100 * floor / total:.0f}%", f"{total - floor:.4g}"])
    parts = {"ours": 0.0, "convs": 0.0, "other": 0.0}
    at_floor = 0.0
    for case, by, _, ms, least in kinds:
        part = "ours" if by != "torch" else "convs" if "convolution" in case else "other"
        parts[part] += ms
        at_floor += min(ms, least) if part == "ours" else ms
    out = markdown(["kernel (calls in a step, by)", "ms", "floor ms", "share of the floor", "ms above it"], cells)
    outside = total - parts["ours"]
    amdahl = f"{total / outside:.2f}x as fast with them free" if outside > 0 else "nothing is outside them"
    return [
        *out,
        "",
        f"Amdahl: the step takes {whole:.4g} ms ({total:.4g} under the recorder); calls through our ops are "
        f"{100 * parts['ours'] / total:.0f}% of it, torch's own convs {100 * parts['convs'] / total:.0f}%, all else "
        f"{100 * parts['other'] / total:.0f}%. A step is at most {amdahl}, {total / at_floor:.2f}x at their floor.",
    ]


def device_section(folder: Path) -> list[str]:
    """One device's results."""
    rows = [row for path in sorted(folder.glob("*.csv")) for row in records.read(path)]
    place = rows[-1]
    commits = ", ".join(dict.fromkeys(row["commit"] for row in rows))
    dates = sorted(row["date"] for row in rows)
    versions = [f"{n} {place[n]}" for n in ("torch", "cuda", "cudnn", "triton", "fused_resnet", "driver") if place[n]]
    out = [
        f"## {place['device']}",
        "",
        f"{', '.join(versions)}; commit {commits}; {dates[0]} to {dates[-1]} UTC. "
        f"Every number: [{folder.name}](results/{folder.name}).",
    ]
    models = [row for row in rows if row["suite"] == "models"]
    tasks = grouped(models, "subject", "direction", "dtype", "batch")
    for (model, mode, dtype, batch), of in tasks.items():
        if is_main(of):
            out += ["", f"### {model}, {WHAT[mode]}, {dtype}, batch {batch}", "", *model_table(model, of)]
    for name, title in (("throughput", "Images per second"), ("memory", "Memory")):
        out += _picture(folder, name, title)
    if tasks:
        order = sorted(tasks, key=lambda key: (key[1], key[2], _depth(key[0]), int(key[3])))
        out += ["", "### Cost against batch and depth", "", *sweep_table({key: tasks[key] for key in order})]
    out += _picture(folder, "scaling", "Cost against batch and depth")
    cases = kernel_cases(rows)
    if cases:
        limits = "; ".join(
            f"{d}: copy {b / 1e9:.4g} GB/s, matrix product {f / 1e12:.3g} TFLOP/s"
            for d, (b, f) in ceilings(rows).items()
        )
        out += ["", "### Kernels", "", f"Ceilings measured in the same run: {limits}.", ""]
        out += kernel_table(cases)
        out += ["", "The slowest of ours beside the fastest rival:", "", *worst_kernels(cases)]
        out += _picture(folder, "kernels", "Kernels against the roofline")
    steps = grouped((row for row in rows if row["suite"] == "layers"), "subject", "direction", "dtype", "batch")
    for (model, mode, dtype, batch), of in steps.items():
        out += [
            "",
            f"### What to tune next: {model}, {WHAT[mode]}, {dtype}, batch {batch}",
            "",
            *share_of_the_floor(of),
        ]
    return out


def _depth(model: str) -> int:
    return int("".join(c for c in model.removeprefix("resnet") if c.isdigit()) or 0)


def _picture(folder: Path, name: str, title: str) -> list[str]:
    path = folder / f"{name}.png"
    return ["", f"![{title}](results/{folder.name}/{name}.png)"] if path.exists() else []


HEAD = """# Results

Written by `fused-resnet bench-all --parts report` from the files under [results](results); nothing here was typed by
hand. Parity came before every number: ours within the error budget of float64, rivals near torch's result. Times are
medians over rounds in which all rivals take turns; speed-ups are medians of paired ratios. In the tables of whole
networks each rival has a process of its own. Peak memory is what the process holds more than before the network was
made, while it steps; the first step includes building, converting and compiling. Floors know neither caches nor
Winograd's algorithm, so shares of them may pass 100%."""


def write(results: Path = records.RESULTS, out: Path | None = None) -> Path:
    """RESULTS.md and the pictures of every device with files under `results`; returns its path."""
    from . import plot

    out = out or results.parent / "RESULTS.md"
    lines = [HEAD]
    for folder in sorted({path.parent for path in results.glob("*/*.csv")}):
        plot.pictures(folder)
        lines += ["", *device_section(folder)]
    files.write(out, ("\n".join(lines) + "\n").encode())
    return out
