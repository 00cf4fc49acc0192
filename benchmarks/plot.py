"""Pictures: of `fused-resnet bench --plot`, and one per question of RESULTS.md."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from . import files, records, report

OURS, THEIRS, INK = "#1f6fb4", "#b8bcc2", "#222222"
WHAT = {"infer": "Inference", "train": "Training step"}


def draw(document: dict[str, Any], kind: str) -> bytes:
    """The bytes of a picture of that kind ("png", "svg", ...)."""
    from matplotlib.figure import Figure

    results = [r for r in document["results"] if any("median_ms" in row for row in r["rows"])]
    bars = max(len(result["rows"]) for result in results)
    figure = Figure(figsize=(6.8 * len(results), 1.6 + 0.55 * bars), layout="constrained")
    panels = figure.subplots(1, len(results), squeeze=False)[0]
    for axes, result in zip(panels, results, strict=True):
        _panel(axes, result)
    request, environment = document["request"], document["environment"]
    device = environment.get("device") or request["device"]
    figure.suptitle(f"{request['model']}, {request['dtype']}, {request['size']}x{request['size']}\n{device}", color=INK)
    buffer = io.BytesIO()
    figure.savefig(buffer, format=kind, dpi=150)
    return buffer.getvalue()


def _panel(axes: Any, result: dict[str, Any]) -> None:
    rows = [row for row in result["rows"] if "median_ms" in row]
    peers = [row for row in rows if not row["ours"]]
    for index, row in enumerate(rows):
        rate = row["images_per_s"]
        fast, slow = (result["batch"] / ms * 1e3 for ms in row["quartiles_ms"])
        error = [[max(rate - slow, 0)], [max(fast - rate, 0)]]
        axes.barh(index, rate, color=OURS if row["ours"] else THEIRS, height=0.7, xerr=error, ecolor=INK, capsize=3)
        note = f"{rate:.3g}"
        if row["ours"] and peers:
            note += "\n" + ", ".join(f"{peer['speedup'][row['name']]['median']:.2f}x {peer['name']}" for peer in peers)
        axes.annotate(
            note, (max(rate, fast), index), (6, 0), textcoords="offset points", va="center", color=INK, fontsize=9
        )
    axes.set_yticks(range(len(rows)), [row["name"] for row in rows])
    axes.invert_yaxis()
    axes.set_xlim(0, 1.7 * max(result["batch"] / row["quartiles_ms"][0] * 1e3 for row in rows))
    axes.set_xlabel(f"images per second (median and quartiles of {len(rows[0]['runs_ms'])} runs)")
    axes.set_title(f"{WHAT[result['mode']]}, batch {result['batch']}" + ("" if result["complete"] else " (incomplete)"))
    axes.spines[["top", "right"]].set_visible(False)


# One picture per question, from the files of one device

LINES = {"eager": "#8a8f98", "channels_last": "#d9902f", "compile": "#7a5fb0", "fused calls": "#4f9d69"}


def _colour(rival: str) -> str:
    return OURS if report._ours(rival) else THEIRS


def _save(figure: Any, path: Path) -> None:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    files.write(path, buffer.getvalue())


def _figure(width: float, height: float, columns: int = 1) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    panels = figure.subplots(1, columns, squeeze=False)[0]
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
    return figure, panels


def _bars(axes: Any, numbers: dict[str, float], model: str, text: str) -> None:
    for index, (rival, number) in enumerate(numbers.items()):
        axes.barh(index, number, color=_colour(rival), height=0.7)
        axes.annotate(f"{number:.4g}", (number, index), (5, 0), textcoords="offset points", va="center", fontsize=8)
    names = [report.named(rival, model).strip("`") for rival in numbers]
    axes.set_yticks(range(len(numbers)), names, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.18 * max(numbers.values()))
    axes.set_xlabel(text)


def _by_rival(tasks: dict[tuple[str, ...], list[Any]], metric: str, path: Path, device: str) -> None:
    """A panel for each job that everyone did."""
    main = {key: rows for key, rows in tasks.items() if report.is_main(rows)}
    if not main:
        return
    most = max(len(report.values(rows, "ms")) for rows in main.values())
    figure, panels = _figure(5.6 * len(main), 1.3 + 0.33 * most, len(main))
    for axes, ((model, mode, dtype, batch), rows) in zip(panels, main.items(), strict=True):
        if metric == "ms":
            numbers = {rival: 1e3 * int(batch) / ms for rival, ms in report.values(rows, "ms").items()}
            numbers = dict(sorted(numbers.items(), key=lambda item: item[1]))
        else:
            numbers = {rival: value / 2**20 for rival, value in report.values(rows, metric).items()}
            numbers = dict(sorted(numbers.items(), key=lambda item: -item[1]))
        _bars(axes, numbers, model, "images per second" if metric == "ms" else "peak memory, MiB")
        axes.set_title(f"{model}, {WHAT[mode].lower()}, {dtype}, batch {batch}", fontsize=10)
    figure.suptitle(device, fontsize=9, color=INK)
    _save(figure, path)


def _sweeps(tasks: dict[tuple[str, ...], list[Any]], path: Path, device: str) -> None:
    """Milliseconds per image against the batch of ResNet-50 (above) and against depth, inference and training."""
    panels_of: list[tuple[str, str, dict[str, list[tuple[float, float]]]]] = []
    for mode in ("infer", "train"):
        of_mode = {key: rows for key, rows in tasks.items() if key[1] == mode}
        if not of_mode:
            continue
        dtype = max((key[2] for key in of_mode), key=[key[2] for key in of_mode].count)
        batches: dict[str, list[tuple[float, float]]] = {}
        depths: dict[str, list[tuple[float, float]]] = {}
        of_mode = {key: rows for key, rows in of_mode.items() if key[2] == dtype}
        others = {key[3] for key in of_mode if key[0] != "resnet50"}
        for (model, _, _, batch), rows in of_mode.items():
            for rival, ms in report.values(rows, "ms").items():
                if rival not in (*LINES, report.OURS) or (report.is_main(rows) and rival not in bench_few()):
                    continue
                if model == "resnet50":
                    batches.setdefault(rival, []).append((int(batch), ms / int(batch)))
                if batch in others:
                    depths.setdefault(rival, []).append((report._depth(model), ms / int(batch)))
        panels_of.append((f"{WHAT[mode]}, resnet50, {dtype}", "batch", batches))
        if others:
            panels_of.append((f"{WHAT[mode]}, batch {next(iter(others))}, {dtype}", "depth", depths))
    if not panels_of:
        return
    figure, panels = _figure(3.7 * len(panels_of), 3.4, len(panels_of))
    for axes, (title, what, lines) in zip(panels, panels_of, strict=True):
        for rival, points in lines.items():
            xs, ys = zip(*sorted(points), strict=True)
            axes.plot(xs, ys, "o-", color=LINES.get(rival, OURS), label=rival, markersize=4)
        if what == "batch":
            axes.set_xscale("log", base=2)
        ticks = sorted({x for points in lines.values() for x, _ in points})
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.minorticks_off()
        axes.set_ylim(bottom=0)
        axes.set_xlabel(what)
        axes.set_ylabel("ms per image")
        axes.set_title(title, fontsize=9)
    panels[0].legend(frameon=False, fontsize=8)
    figure.suptitle(device, fontsize=9, color=INK)
    _save(figure, path)


def bench_few() -> tuple[str, ...]:
    from .bench_models import FEW

    return FEW


def _roofline(rows: list[Any], path: Path, device: str) -> None:
    """FLOP/s against FLOPs per byte for convs and blocks, bytes/s for what has no FLOPs; the ceilings as lines."""
    cases = report.kernel_cases(rows)
    if not cases:
        return
    limits = report.ceilings(rows)
    figure, (memory, arithmetic) = _figure(12, 4.2, 2)
    passes = [case for case in cases if not case["flops"]]
    products = [case for case in cases if case["flops"]]
    kinds = list(dict.fromkeys((case["op"], case["direction"]) for case in passes))
    rivals = ["eager", "compile", report.OURS]
    for offset, rival in zip((-0.22, 0.0, 0.22), rivals, strict=True):
        points = [
            (kinds.index((case["op"], case["direction"])) + offset, case["bytes"] / case["ms"][rival] / 1e6)
            for case in passes
            if rival in case["ms"]
        ]
        if points:
            xs, ys = zip(*points, strict=True)
            memory.plot(xs, ys, "o", color=LINES.get(rival, OURS), label=rival, markersize=4, alpha=0.7)
    memory.set_xticks(range(len(kinds)), [f"{op}\n{direction}" for op, direction in kinds], fontsize=7)
    memory.set_ylabel("GB/s, counting each pass once")
    memory.set_ylim(bottom=0)
    for dtype, (bandwidth, rate) in limits.items():
        memory.axhline(bandwidth / 1e9, color=INK, lw=0.8, ls="--")
        memory.annotate(
            f"copy, {dtype}" if len(limits) > 1 else "copy",
            (0, bandwidth / 1e9),
            (0, 3),
            textcoords="offset points",
            fontsize=7,
        )
        if products:
            reach = [case["flops"] / case["bytes"] for case in products]
            xs = [min(reach) * 0.8, rate / bandwidth, max(max(reach), rate / bandwidth) * 1.2]
            arithmetic.plot(xs, [min(x * bandwidth, rate) / 1e12 for x in xs], color=INK, lw=0.8, ls="--")
    shown = [
        rival
        for rival in ("eager", "fused calls", "compile", report.OURS)
        if any(rival in case["ms"] for case in products)
    ]
    for rival in shown:
        points = [
            (case["flops"] / case["bytes"], case["flops"] / case["ms"][rival] / 1e9)
            for case in products
            if rival in case["ms"]
        ]
        xs, ys = zip(*points, strict=True)
        arithmetic.plot(xs, ys, "o", color=LINES.get(rival, OURS), label=rival, markersize=4, alpha=0.7)
    arithmetic.set_xscale("log")
    arithmetic.set_yscale("log")
    arithmetic.set_xlabel("FLOPs per byte")
    arithmetic.set_ylabel("TFLOP/s")
    memory.set_title("passes over memory", fontsize=10)
    arithmetic.set_title("convs and blocks; dashed: the roofline", fontsize=10)
    for axes in (memory, arithmetic):
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False, fontsize=8)
    figure.suptitle(device, fontsize=9, color=INK)
    _save(figure, path)


def pictures(folder: Path) -> None:
    """throughput.png, memory.png, scaling.png and kernels.png beside the files of one device."""
    rows = [row for path in sorted(folder.glob("*.csv")) for row in records.read(path)]
    device = f"{rows[-1]['device']}, torch {rows[-1]['torch']}"
    tasks = report.grouped((row for row in rows if row["suite"] == "models"), "subject", "direction", "dtype", "batch")
    _by_rival(tasks, "ms", folder / "throughput.png", device)
    _by_rival(tasks, "peak_bytes", folder / "memory.png", device)
    _sweeps(tasks, folder / "scaling.png", device)
    _roofline(rows, folder / "kernels.png", device)
