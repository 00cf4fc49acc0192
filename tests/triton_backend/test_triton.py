"""Triton without a GPU. A process either interprets kernels or compiles them, for one target, so each test is one.

To run or debug one of them alone, see harness.py.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
import records

HERE = Path(__file__).parent
QUICK_TARGETS = ("sm_90",)  # the other targets have their records
INTERPRETED = sorted(path.stem.removeprefix("interpret_") for path in HERE.glob("interpret_*.py"))

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed"),
    pytest.mark.xdist_group("triton"),  # one fixture starts all jobs
]


def _run(name: str) -> subprocess.CompletedProcess[str]:
    """One job: "interpret <file>" or "compile <target>"."""
    kind, what = name.split()
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"} | {"OMP_NUM_THREADS": "1"}
    if kind == "interpret":
        env["TRITON_INTERPRET"] = "1"
        command = ["-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider", str(HERE / f"interpret_{what}.py")]
    else:
        command = [str(HERE / "aot.py"), "--target", what]
        for suite in records.SUITES:
            command += ["--suite", suite]
    return subprocess.run([sys.executable, *command], capture_output=True, text=True, env=env, check=False)


@pytest.fixture(scope="module")
def outcome(request: pytest.FixtureRequest) -> Iterator[Callable[[str], subprocess.CompletedProcess[str]]]:
    """The outcome of a job. All jobs of the selected tests start together, as many at once as there are processors."""
    wanted = [
        item.callspec.params["job"]
        for item in request.session.items
        if item.module is request.module and "job" in item.fixturenames
    ]
    pool = ThreadPoolExecutor(min(os.cpu_count() or 1, 4))
    futures: dict[str, Future[subprocess.CompletedProcess[str]]] = {
        job: pool.submit(_run, job)
        for job in sorted(wanted)  # to compile takes longest: first
    }
    yield lambda job: futures[job].result()
    pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize("job", [f"interpret {name}" for name in INTERPRETED])
def test_interpreted(job, outcome):
    done = outcome(job)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"


@pytest.mark.parametrize("job", [f"compile {target}" for target in QUICK_TARGETS])
def test_compiles(job, outcome):
    done = outcome(job)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"


@pytest.mark.parametrize("version", records.TRITONS)
@pytest.mark.parametrize("suite", records.SUITES)
def test_every_config_was_compiled_for_every_target(suite, version):
    stale = [target for target in records.TARGETS if records.is_stale(suite, target, version)]
    assert not stale, f"run `make test-aot` and commit records/{suite}.json: not compiled from this source: {stale}"


def test_records_are_of_the_pinned_and_the_oldest_triton():
    from fused_resnet.backends import triton as backend

    pins = (HERE.parents[1] / "constraints.txt").read_text().split()
    oldest, pinned = records.TRITONS
    assert f"triton=={pinned}" in pins
    assert oldest.startswith(".".join(map(str, backend._OLDEST)) + ".")


def test_comments_and_docstrings_leave_records_as_they_are():
    text = 'def f(x):\n    """Twice."""\n    return 2 * x  # doubled\n'
    same = 'def f(x):\n\n    """Two\n    lines."""\n    # another\n    return 2 * x\n'
    assert records.code(text) == records.code(same) == "def f(x):\n    return 2 * x"
    assert records.code(text.replace("2 *", "3 *")) != records.code(text)
    assert records.code("if a:\n    b()\nc()") != records.code("if a:\n    b()\n    c()")
    assert records.code("x = '# no comment'") == "x = '# no comment'"
