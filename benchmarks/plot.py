"""The picture of `fused-resnet bench --plot`: images per second, a panel for each mode."""

from __future__ import annotations

import io
from typing import Any

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
