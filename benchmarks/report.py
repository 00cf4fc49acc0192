"""Times as a table."""

from __future__ import annotations

from typing import Any


def table(result: dict[str, Any]) -> str:
    """The rows as an aligned table; the last columns tell how many times as fast each of ours is, paired by round."""
    ours = [row["name"] for row in result["rows"] if row["ours"] and "median_ms" in row]
    cells = [["rival", "median ms", "quartiles", "images/s", *(f"speed-up: {name}" for name in ours)]]
    for row in result["rows"]:
        if "median_ms" not in row:
            cells.append([row["name"], f"not available: {row['not_available']}"])
            continue
        low, high = row["quartiles_ms"]
        faster = [row["speedup"].get(name) for name in ours]
        cells.append(
            [row["name"], f"{row['median_ms']:.2f}", f"{low:.2f} to {high:.2f}", f"{row['images_per_s']:.1f}"]
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
