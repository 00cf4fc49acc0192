"""Rivals in processes of their own: slow, failing, crashing and wrong ones; and what is kept when a run is interrupted.

No test here looks at how long something takes.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from fused_resnet import cli
from fused_resnet.cli import load_benchmarks, main

bench, harness, layers, records, rivals, worker = map(
    load_benchmarks, ("bench_models", "harness", "layers", "records", "rivals", "worker")
)

RIVALS = """
import os, time
from fused_resnet.benchmarks.rivals import Entry, PEERS, rival

def changed(forward):
    def prepare(job):
        net = job.plain()
        return Entry(lambda x: forward(net, x), False, net)
    return prepare

def crash(net, x):
    os.abort()

def slow(net, x):
    time.sleep(600)

def fail(net, x):
    raise ImportError("no engine here")

def wrong_gradient(net, x):
    y = net(x)
    return 2 * y - y.detach()

mine = {"backwards": wrong_gradient, "crashing": crash, "slow": slow, "failing": fail}
mine |= {"wrong": lambda net, x: 2 * net(x), "good": lambda net, x: net(x)}
for name, forward in mine.items():
    rival(name, "")(changed(forward))
"""


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    (tmp_path / "mine.py").write_text(RIVALS)
    return [str(tmp_path / "mine.py")]


@pytest.fixture(autouse=True)
def _same_peers() -> Iterator[None]:
    rivals.discover()
    before = dict(rivals.PEERS)
    yield
    rivals.PEERS.clear()
    rivals.PEERS.update(before)


def command(tmp_path: Path, files: list[str], names: str, *more: str) -> list[str]:
    small = ["--model", "resnet18", "--size", "64", "--batches", "4", "--rounds", "3"]
    out = ["--out", str(tmp_path / "models.csv")]
    return ["bench-models", *small, *out, "--rivals", names, "--rival-files", *files, *more]


def by_rival(path: Path, metric: str = "ms") -> dict[str, dict[str, str]]:
    return {row["rival"]: row for row in records.read(path) if row["metric"] == metric}


@pytest.mark.slow
def test_bad_rivals_leave_the_others_alone(tmp_path: Path, files: list[str], capsys: Any) -> None:
    names = "eager,crashing,slow,failing,wrong,good,apex,eager + CUDA graph,fused_resnet"
    assert main(command(tmp_path, files, names, "--mode", "infer", "--limit", "40")) == 0
    found = by_rival(tmp_path / "models.csv")
    reasons = {name: row["note"].removeprefix("not available: ") for name, row in found.items() if not row["value"]}
    assert reasons.pop("crashing") == f"its process ended with signal {int(signal.SIGABRT)}"
    assert reasons.pop("slow") == "it took longer than 40 s"
    assert reasons.pop("failing") == "no engine here"
    assert "its logits differ from torch's" in reasons.pop("wrong")
    assert reasons.pop("apex") == "it runs on a GPU only"
    assert reasons.pop("eager + CUDA graph") == "CUDA graphs need a GPU"
    assert not reasons
    for name in ("eager", "good", "fused_resnet"):
        assert float(found[name]["value"]) > 0
        assert int(found[name]["runs"]) == 3
    assert float(by_rival(tmp_path / "models.csv", "peak_bytes")["fused_resnet"]["value"]) > 40e6, "its weights alone"
    assert float(by_rival(tmp_path / "models.csv", "first_ms")["good"]["value"]) > 0
    assert "conv_bias_act: " in found["fused_resnet"]["note"]
    out = capsys.readouterr().out
    assert "images/s" in out
    assert "not available: no engine here" in out


@pytest.mark.slow
def test_training(tmp_path: Path, files: list[str]) -> None:
    names = "eager,wrong,backwards,fused calls,as is"
    assert main(command(tmp_path, files, names, "--mode", "train")) == 0
    found = by_rival(tmp_path / "models.csv")
    assert found["fused calls"]["note"] == "not available: it does inference only"
    assert "from torch's by" in found["wrong"]["note"]
    assert "its gradients differ from torch's" in found["backwards"]["note"]
    assert float(found["as is"]["value"]) > 0
    assert set(by_rival(tmp_path / "models.csv", "speedup of as is")) == {"eager"}


def test_ours_outside_the_budget_is_red_and_has_no_number(tmp_path: Path, files: list[str], monkeypatch: Any) -> None:
    monkeypatch.setattr(bench, "_problems", lambda *args: {"fused_resnet": "1 of 1 tensors outside the error budget"})
    monkeypatch.setattr(worker, "Worker", FakeWorker)
    monkeypatch.setattr(bench, "Worker", FakeWorker)
    assert main(command(tmp_path, files, "eager,fused_resnet", "--mode", "infer")) == 1
    row = by_rival(tmp_path / "models.csv")["fused_resnet"]
    assert row["value"] == ""
    assert row["note"] == "not available: 1 of 1 tensors outside the error budget"


class FakeWorker:
    """One whose steps take a millisecond, on paper; "cut" is interrupted."""

    def __init__(self, spec: dict[str, Any], limit_s: float) -> None:
        self.name = spec["rival"]
        self.ready = {"first_ms": 5.0, "peak_bytes": 1 << 20, "notes": []}

    def step(self, steps: int) -> list[float]:
        return [1.0] * steps

    def stop(self) -> None:
        pass


def test_turns_are_taken_and_failures_dropped() -> None:
    calls: list[str] = []

    class Noting(FakeWorker):
        def step(self, steps: int) -> list[float]:
            calls.append(self.name)
            if self.name == "late" and calls.count("late") == 3:
                raise worker.WorkerError("out of memory")
            return super().step(steps)

    starts = {name: (lambda name=name: Noting({"rival": name}, 1.0)) for name in ("a", "late", "b")}
    found = worker.measure(starts, 4, 1.0, lambda stage: None)
    assert calls == ["a", "late", "b", "a", "late", "b", "a", "late", "b", "a", "b", "a", "b"]
    assert found["late"][1].reason == "out of memory"
    assert found["late"][1].ms == []
    assert found["a"][1].ms == [1.0] * 4
    assert found["a"][1].first_ms == 5.0


def test_ctrl_c_keeps_finished_jobs(tmp_path: Path, files: list[str], monkeypatch: Any, capsys: Any) -> None:
    measured: list[int] = []

    def measure(task: Any, request: Any, progress: Any) -> Any:
        if measured and len(measured) == 1:
            measured.append(0)
            raise KeyboardInterrupt
        measured.append(task.batch)
        found = {
            name: ({"first_ms": 1.0, "peak_bytes": 1, "notes": []}, harness.Times(1.0, [2.0, 2.0]))
            for name in task.rivals
        }
        return bench._rows(task, found, {}), True

    monkeypatch.setattr(bench, "measure", measure)
    argv = command(tmp_path, files, "eager,fused_resnet", "--mode", "infer")
    argv[argv.index("--batches") + 1] = "1,2,4"
    assert main(argv) == 130
    assert "INCOMPLETE" in capsys.readouterr().out
    assert {row["batch"] for row in records.read(tmp_path / "models.csv")} == {"1"}
    assert main(argv) == 0
    assert measured == [1, 0, 2, 4], "the first job was not measured again"


@pytest.mark.skipif(not hasattr(signal, "SIGINT") or sys.platform == "win32", reason="no SIGINT to send on Windows")
@pytest.mark.slow
def test_a_real_ctrl_c_leaves_no_process_behind(tmp_path: Path, files: list[str]) -> None:
    marker = tmp_path / "pid"
    text = RIVALS.replace(
        "def slow(net, x):\n", f"def slow(net, x):\n    open({str(marker)!r}, 'w').write(str(os.getpid()))\n"
    )
    Path(files[0]).write_text(text)
    argv = command(tmp_path, files, "slow", "--mode", "infer", "--limit", "500")
    environment = os.environ | {"PYTHONPATH": str(cli.PACKAGE.parent)}
    process = subprocess.Popen(
        [sys.executable, "-m", "fused_resnet", *argv],
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # in the background shells ignore it
    )
    for _ in range(1200):
        if marker.exists() and marker.read_text():
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "INCOMPLETE: interrupted" in out
    with pytest.raises(ProcessLookupError):
        os.kill(int(marker.read_text()), 0)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--rivals", "tensorflow"], ["tensorflow", "openvino"]),
        (["--rival-files", "/nowhere/mine.py"], ["/nowhere/mine.py", "cannot be read"]),
        (["--rival-files", "notes.txt"], ["notes.txt", "no Python file"]),
        (["--batches", "4,none"], ["whole number", "none"]),
        (["--dtypes", "int8"], ["int8", "bf16"]),
    ],
)
def test_bad_requests(argv: list[str], words: list[str], capsys: Any) -> None:
    try:
        code: Any = main(["bench-models", *argv])
    except SystemExit as exit:
        code = exit.code
    assert code == 2
    error = capsys.readouterr().err.strip()
    assert "\n" not in error
    assert all(word in error for word in words)


def test_every_rival_is_found() -> None:
    names = set(bench.everyone())
    expected = {
        "eager",
        "channels_last",
        "compile",
        "compile default",
        "compile max-autotune",
        "fused calls",
        "onnxruntime",
    }
    expected |= {"openvino", "tensorrt", "attorch", "apex", "cudnn frontend", "fused_resnet", "as is"}
    expected |= {"ours: fast", "ours: low", "ours: stored", "ours: Gram", "ours: prologue", "ours: frozen"}
    assert names == expected


@pytest.mark.parametrize("name", ["fused calls", "onnxruntime", "openvino"])
def test_peers_give_torchs_result(name: str) -> None:
    """Where they are installed; their own processes are the harness's business."""
    if name in ("onnxruntime", "openvino"):
        pytest.importorskip(name, reason=f"{name} is not installed")
    rivals.discover()
    torch.manual_seed(0)
    net = load_benchmarks("plain_resnet").plain_resnet("resnet18").eval()
    x = torch.randn(2, 3, 64, 64)
    job = rivals.Job("resnet18", "infer", torch.float32, net.state_dict(), x, torch.zeros(2, dtype=torch.long))
    with torch.no_grad():
        expected = net(x)
    torch.testing.assert_close(rivals.PEERS[name].step_for(job)()(), expected, rtol=1e-3, atol=1e-3)


# where the time goes


def task(mode: str) -> Any:
    return bench.Task("resnet18", mode, "fp32", 2, ("fused_resnet",), size=64)


@pytest.mark.parametrize("mode", ["infer", "train"])
def test_every_conv_of_a_step_is_recorded_once(mode: str) -> None:
    rows = layers.measure(task(mode), torch.device("cpu"), 1e10, 1e11)
    steps = {row["metric"] for row in rows if row["case"] == "step"}
    assert steps == {"ms"}
    calls: dict[str, int] = {}
    flops = 0.0
    for row in rows:
        kind = row["case"].split()[0]
        if row["metric"] == "ms" and "note" in row:
            calls[kind] = calls.get(kind, 0) + int(row["note"].split()[0])
        if row["metric"] == "flops" and "conv" in kind:
            flops += row["value"]
    net = load_benchmarks("roofline").network("resnet18", 64)
    forward = 2 * sum(conv.flops for conv in net)
    if mode == "infer":
        assert sum(count for kind, count in calls.items() if "conv" in kind) == 20
        assert flops == pytest.approx(forward)
    else:
        for torchs, ours in (("aten.convolution", "conv_forward"), ("aten.convolution_backward", "conv_backward")):
            assert calls.get(torchs, 0) + calls.get(ours, 0) == 20
        assert flops == pytest.approx(3 * forward - 2 * net.stem.flops), "the stem has no dgrad"
        assert (
            calls["bn_act_backward"] + calls.get("bn_act_pool_backward", 0) + 2 * calls.get("bn_bn_act_backward", 0)
            == 20
        )


def test_bytes_of_a_step_are_those_of_its_plan() -> None:
    """A training step unit by unit moves what the roofline's scheme bn_act says, by its own counting of each call."""
    net = load_benchmarks("roofline").network("resnet18", 64)
    rows = layers.measure(task("train"), torch.device("cpu"), 1e10, 1e11)
    ours = ("bn_act", "bn_bn_act", "add_relu", "aten.convolution", "conv_")
    found = sum(r["value"] for r in rows if r["metric"] == "bytes" and r["case"].startswith(ours))
    kernels = load_benchmarks("roofline").bn_act(net)
    wanted = sum(k.bytes(2, 4) for k in kernels)
    assert found == pytest.approx(wanted, rel=0.1)
