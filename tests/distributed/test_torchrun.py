"""More processes than two, sharded parameters, and a process that dies: `make test-distributed`."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))
from torchruns import assert_trains_as_one, losses, torchrun

from fused_resnet.train import checkpoint


@pytest.mark.parametrize(("count", "how"), [(4, "ddp"), (2, "fsdp")])
def test_processes_train_as_one(tmp_path: Path, count: int, how: str) -> None:
    assert_trains_as_one(tmp_path, count, how)


def run_and_kill_one(folder: Path, *arguments: str) -> str:
    """What a job of two says whose second process is killed after the first checkpoint."""
    run = torchrun(2, folder, *arguments)
    try:
        deadline = time.monotonic() + 120
        while not (folder / "checkpoint.pt").exists():
            assert time.monotonic() < deadline, "no checkpoint in two minutes"
            assert run.poll() is None, run.communicate()[0]
            time.sleep(0.1)
        children = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
        victims = [pid for pid in children if b"fused_resnet" in Path(f"/proc/{pid}/cmdline").read_bytes()]
        assert len(victims) == 2
        os.kill(int(victims[1]), signal.SIGKILL)
        said, _ = run.communicate(timeout=120)
    finally:
        run.kill()
    assert run.returncode != 0
    return said


def test_a_process_that_dies_ends_the_job(tmp_path: Path) -> None:
    """One of two is killed in the middle of a long run: the other ends, and the job fails and says why."""
    assert "SIGKILL" in run_and_kill_one(tmp_path, "--epochs", "1000", "--batch", "16", "--save-every", "5")
    assert checkpoint.load(tmp_path / "checkpoint.pt")["position"]


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_a_killed_job_resumes_exactly(tmp_path: Path, how: str) -> None:
    arguments = ["--epochs", "3", "--batch", "64", "--sync-bn", "--parallel", how]
    whole = torchrun(2, tmp_path / "whole", *arguments)
    assert whole.wait(300) == 0, whole.communicate()[0]
    run_and_kill_one(tmp_path / "parts", *arguments, "--save-every", "2")
    stopped = len(checkpoint.load(tmp_path / "parts" / "checkpoint.pt")["losses"])
    resumed = torchrun(2, tmp_path / "parts", *arguments, "--save-every", "2", "--resume")
    assert resumed.wait(300) == 0, resumed.communicate()[0]
    assert stopped < len(losses(tmp_path / "parts"))
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
