"""`fused-resnet bench-all`: everything that RESULTS.md is made of; an interrupted run goes on where it was."""

from __future__ import annotations

from pathlib import Path

import torch

from . import bench_models, bench_ops, files, layers, records, report

INTERRUPTED = 130


def run(parts: tuple[str, ...], device: torch.device, out: Path | None, limit_s: float, fresh: bool) -> int:
    """Some of the parts ops, models, layers and report, into the folder `out` (the device's own below results).

    Returns 0; 1 where something of ours failed; 130 where interrupted.
    """
    folder = out or records.folder(device)
    dtype = "bf16" if device.type == "cuda" else "fp32"
    code = 0
    for part in parts:
        if part == "ops":
            rivals = None if device.type == "cuda" else ("eager", "fused calls")  # compiling 90 cases takes an hour
            request = bench_ops.Request(device=device, dtype=dtype, rivals=rivals, out=folder / "ops.csv", fresh=fresh)
            code = max(code, bench_ops.run(request))
        elif part == "models":
            tasks = bench_models.standard(device)
            code = max(
                code, bench_models.run(bench_models.Request(tasks, device, folder / "models.csv", fresh, limit_s))
            )
        elif part == "layers":
            code = max(code, layers.run(layers.standard(device), device, folder / "layers.csv", fresh))
        else:
            files.need_matplotlib("the report")
            print(f"wrote {report.write()} and the pictures beside the results")
        if code == INTERRUPTED:
            break
    return code
