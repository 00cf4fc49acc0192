"""RESULTS.md and its pictures come from the result files alone; gpu_check.sh does what it can where there is no GPU."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from fused_resnet.cli import load_benchmarks

bench, models, plot, records, report, summary = map(
    load_benchmarks, ("bench_all", "bench_models", "plot", "records", "report", "gpu_summary")
)
ROOT = Path(records.__file__).parents[1]
CPU = torch.device("cpu")


def model_rows(subject: str, mode: str, batch: int, ms: dict[str, float | None]) -> list[dict[str, Any]]:
    key = {"suite": "models", "subject": subject, "case": "224x224", "direction": mode, "dtype": "fp32", "batch": batch}
    rows: list[dict[str, Any]] = []
    for rival, value in ms.items():
        row = key | {"rival": rival, "metric": "ms"}
        if value is None:
            rows.append(row | {"note": "not available: no engine here"})
            continue
        rows.append(row | {"value": value, "low": value, "high": value, "runs": 10})
        rows.append(row | {"metric": "first_ms", "value": 1234.0})
        rows.append(row | {"metric": "peak_bytes", "value": 7 << 20})
        if rival != "fused_resnet":
            rows.append(row | {"metric": "speedup of fused_resnet", "value": value / 10, "low": 1, "high": 2})
    return rows


def op_rows(op: str, case: str, direction: str, flops: float, ms: dict[str, float]) -> list[dict[str, Any]]:
    key = {"suite": "ops", "subject": op, "case": case, "direction": direction, "dtype": "fp32", "batch": 4}
    rows = [key | {"metric": "bytes", "value": 1e7}, key | {"metric": "flops", "value": flops}]
    return rows + [key | {"rival": r, "metric": "ms", "value": v, "low": v, "high": v} for r, v in ms.items()]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Results of one device."""
    home = tmp_path / "results" / "cpu"
    machine = {"suite": "machine", "dtype": "fp32"}
    ceilings = [machine | {"metric": "bytes/s", "value": 1e10}, machine | {"metric": "flop/s", "value": 1e11}]
    records.Store(home / "ops.csv", CPU).put(
        ceilings
        + op_rows("bn_act", "64x56x56", "forward", 0, {"eager": 4.0, "fused_resnet": 2.0})
        + op_rows("add_relu", "64x56x56", "forward", 0, {"eager": 1.0, "fused_resnet": 1.25})
        + op_rows("conv_bn_act", "1x1", "infer", 1e9, {"eager": 30.0, "fused_resnet": 20.0})
    )
    peers = {"eager": 30.0, "channels_last": 25.0, "compile": 20.0, "openvino": 12.0, "onnxruntime": 15.0, "apex": None}
    tasks = [model_rows("resnet50", m, b, peers | {"fused_resnet": 10.0}) for m, b in (("infer", 1), ("train", 4))]
    few = {"eager": 40.0, "channels_last": 30.0, "fused_resnet": 10.0}
    tasks += [model_rows("resnet50", m, 8, few) for m in ("infer", "train")]
    tasks += [model_rows(n, m, b, few) for n in ("resnet18", "resnet152") for m, b in (("infer", 1), ("train", 4))]
    records.Store(home / "models.csv", CPU).put([row for rows in tasks for row in rows])
    key = {"suite": "layers", "subject": "resnet50", "direction": "train", "dtype": "fp32", "batch": 4, "runs": 5}
    kinds = [
        ("aten.convolution a", "torch", 6.0, 5.0),
        ("bn_act_backward b", "cpp", 3.0, 1.0),
        ("aten.add c", "torch", 1.0, 1.0),
    ]
    rows = [key | {"case": "step", "rival": "fused_resnet", "metric": "ms", "value": 11.0}]
    for case, by, ms, floor in kinds:
        rows.append(key | {"case": case, "rival": by, "metric": "ms", "value": ms, "note": "2 calls"})
        rows.append(key | {"case": case, "rival": by, "metric": "floor_ms", "value": floor})
    records.Store(home / "layers.csv", CPU).put(rows)
    return home


def test_results_come_from_the_files(folder: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    text = report.write(folder.parent, folder.parents[1] / "RESULTS.md").read_text()
    assert "**fused_resnet** | 10 (10 to 10) | 100 | 7 | 1.23 |" in text
    assert "| openvino | 12 (12 to 12) | 83.33 | 7 | 1.23 | 1.20x |" in text
    assert "Not available: apex: no engine here." in text
    assert "| bn_act, forward in training, fp32 | 1 | 25% | 50% | 2.00x |" in text
    assert "| add_relu 64x56x56, forward in training, fp32 | 1.25 | 80% | 0.80x eager |" in text
    assert "at most 1.43x as fast" in text
    assert records.read(folder / "ops.csv")[0]["commit"] in text
    for picture in ("throughput", "memory", "scaling", "kernels"):
        path = folder / f"{picture}.png"
        assert path.read_bytes()[:4] == b"\x89PNG"
        assert f"(results/cpu/{picture}.png)" in text
    assert report.write(folder.parent, folder.parents[1] / "RESULTS.md").read_text() == text


def test_the_top_row_is_what_to_tune_next(folder: Path) -> None:
    lines = report.share_of_the_floor(records.read(folder / "layers.csv"))
    assert lines[2] == "| bn_act_backward b (2 calls, cpp) | 3 | 1 | 33% | 2 |"
    assert lines[5] == "| all | 10 | 7 | 70% | 3 |"
    assert "calls through our ops are 30% of it, torch's own convs 60%, all else 10%" in lines[-1]
    assert "at most 1.43x as fast with them free, 1.25x at their floor" in lines[-1]


def test_committed_results_are_reported() -> None:
    """RESULTS.md is what the committed files say: nobody edits it, nobody forgets it."""
    committed = ROOT / "benchmarks" / "RESULTS.md"
    folders = sorted({path.parent for path in records.RESULTS.glob("*/*.csv")})
    if not folders:
        pytest.skip("no results are committed yet")
    lines = [report.HEAD]
    for home in folders:
        lines += ["", *report.device_section(home)]
    assert committed.read_text() == "\n".join(lines) + "\n"


def test_summary(folder: Path) -> None:
    (folder / "steps.txt").write_text("build | extension | ok | 3 s\ntest | GPU tests | FAILED: exit code 1 | 9 s\n")
    text = "\n".join(summary.summary(folder))
    assert "## 1 of 2 steps are red" in text
    assert text.index("GPU tests") < text.index("| build |")
    assert "The ten worst" in text
    assert "fused_resnet 100 images/s, 1.20x the fastest rival (openvino), 2.50x channels_last" in text


def test_bytes_of_a_profile(tmp_path: Path) -> None:
    head = '"ID","Kernel Name","Metric Name","Metric Unit","Metric Value"\n'
    launches = ["spin_kernel(long)", "_bn_kernel", "_bn_finish", "at::spin_kernel(long)", "conv"]
    text = "==PROF== Connected\n" + head
    for index, name in enumerate(launches):
        for metric, value in (
            ("dram__bytes_read.sum", "1,000"),
            ("dram__bytes_write.sum", "24"),
            ("gpu__time_duration.sum", "500"),
        ):
            text += f'"{index}","{name}","{metric}","byte","{value}"\n'
    (tmp_path / "ncu.csv").write_text(text)
    (tmp_path / "calls").write_text('{"call": "a", "bytes": 2000}\n{"skipped": "x"}\n{"call": "b", "bytes": 1024}\n')
    calls = summary.profiled(tmp_path / "ncu.csv")
    assert [(call["bytes"], call["ns"], call["kernels"]) for call in calls] == [(2048, 1000, 2), (1024, 500, 1)]
    assert len(summary.traffic(tmp_path / "ncu.csv", tmp_path / "calls")) == 4


# gpu_check.sh

needs_bash = pytest.mark.skipif(shutil.which("bash") is None, reason="no bash on this machine")


def gpu_check(*argv: str, path: str | None = None) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHON": sys.executable} | ({"PATH": path} if path else {})
    script = str(ROOT / "benchmarks" / "gpu_check.sh")
    return subprocess.run(["bash", script, *argv], capture_output=True, text=True, env=environment, check=False)


@needs_bash
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: the script would use it")
@pytest.mark.parametrize("part", ["test", "cutlass", "sanitize", "profile"])
def test_gpu_check_says_what_it_could_not_do(part: str, tmp_path: Path) -> None:
    done = gpu_check("--part", part, str(tmp_path / "out"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "no GPU here" in done.stdout
    assert "is red" in done.stdout
    assert "summary.md" in os.listdir(tmp_path / "out")
    assert len(os.listdir(tmp_path / "out")) <= 8


@needs_bash
@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: the script would use it")
def test_gpu_check_does_what_it_can_without_a_gpu(tmp_path: Path) -> None:
    for part in ("kernels", "models"):
        done = gpu_check("--part", part, str(tmp_path))
        assert done.returncode == 0, done.stdout + done.stderr
    text = (tmp_path / "steps.txt").read_text()
    assert "kernels | one kernel on the CPU | ok" in text
    assert "models | a small job on the CPU | ok" in text


@needs_bash
def test_a_failing_step_is_red_and_stops_nothing(tmp_path: Path) -> None:
    tools = tmp_path / "tools"
    tools.mkdir()
    fake = tools / "python3"
    broken = 'if [ "$1" = -m ] && [ "$2" = fused_resnet ]; then echo broken; exit 3; fi'
    fake.write_text(f'#!/bin/bash\n{broken}\nexec {sys.executable} "$@"\n')
    fake.chmod(0o755)
    environment = os.environ | {"PYTHON": str(fake)}
    script = str(ROOT / "benchmarks" / "gpu_check.sh")
    out = tmp_path / "out"
    done = subprocess.run(
        ["bash", script, "--part", "models", str(out)], capture_output=True, text=True, env=environment, check=False
    )
    if torch.cuda.is_available():
        pytest.skip("there is a GPU: this part has other steps there")
    assert done.returncode == 1
    assert "FAILED: exit code 3" in done.stdout
    assert "1 of 2 steps are red" in (out / "summary.md").read_text()


@needs_bash
@pytest.mark.parametrize("argv", [[], ["--part", "dance", "out"], ["--part"], ["a", "b"], ["--fast", "out"]])
def test_gpu_check_refuses_bad_arguments(argv: list[str]) -> None:
    done = gpu_check(*argv)
    assert done.returncode == 2
    assert "usage: benchmarks/gpu_check.sh" in done.stderr
