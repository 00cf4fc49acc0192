"""More processes than two, sharded parameters, and a process that dies: `make test-distributed`."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))
from torchruns import assert_trains_as_one, torchrun

from fused_resnet.train import checkpoint


@pytest.mark.parametrize(("count", "how"), [(4, "ddp"), (2, "fsdp")])
def test_processes_train_as_one(tmp_path: Path, count: int, how: str) -> None:
    assert_trains_as_one(tmp_path, count, how)


def test_a_process_that_dies_ends_the_job(tmp_path: Path) -> None:
    """One of two is killed in the middle of a long run: the other ends, and the job fails and says why."""
    run = torchrun(2, tmp_path, "--epochs", "1000", "--batch", "16", "--save-every", "5")
    try:
        deadline = time.monotonic() + 120
        while not (tmp_path / "checkpoint.pt").exists():
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
    assert "SIGKILL" in said
    assert checkpoint.load(tmp_path / "checkpoint.pt")["position"]
