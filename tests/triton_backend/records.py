"""Compiles every config of every kernel for every target; records/<suite>.json keeps the outcome (`make test-aot`).

    python records.py [--python PATH ...] [--suite NAME ...] [--target NAME ...] [--jobs N] [--seconds N]

Each --python is an interpreter that has another version of triton. What has a record of this source is not compiled
again, so a run that was cut short, or ended after --seconds, goes on where it was. `test_triton.py` fails where a
record is missing, or was made from another source.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import io
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
import tokenize
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).parent
KERNELS = HERE.parents[1] / "fused_resnet" / "backends" / "triton"
TRITONS = ("3.6.0", "3.7.1")
TARGETS = ("sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "gfx942")
# suite -> the modules of fused_resnet.backends.triton whose source its kernels and configs come from
SUITES: dict[str, tuple[str, ...]] = {
    "add_relu": ("add_relu", "common"),
    "bn_act": ("bn_act", "common"),
    "bn_act_pool": ("bn_act_pool", "bn_act", "common"),
    "conv": ("conv", "common"),
    "prologue": ("prologue", "prologue_parts", "prologue_tma", "conv", "bn_act", "common"),
}


def code(text: str) -> str:
    """Python source without comments, docstrings and blank lines."""
    lines = text.splitlines()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            row, column = token.start
            lines[row - 1] = lines[row - 1][:column]
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.Module, ast.FunctionDef, ast.ClassDef)) and ast.get_docstring(node) is not None:
            for row in range(node.body[0].lineno - 1, node.body[0].end_lineno or 0):
                lines[row] = ""
    return "\n".join(line.rstrip() for line in lines if line.strip())


def source_hash(suite: str) -> str:
    """Of the code of the suite's cases and modules."""
    paths = (HERE / f"aot_{suite}.py", *(KERNELS / f"{module}.py" for module in SUITES[suite]))
    return hashlib.sha256("\n".join(code(path.read_text()) for path in paths).encode()).hexdigest()[:16]


def read(suite: str) -> dict[str, Any]:
    path = HERE / "records" / f"{suite}.json"
    return json.loads(path.read_text()) if path.exists() else {}


def is_stale(suite: str, target: str, version: str) -> bool:
    return read(suite).get(f"{target} triton-{version}", {}).get("source") != source_hash(suite)


def summary(source: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    kernels: dict[str, dict[str, int]] = {}
    for row in rows:
        kernel = kernels.setdefault(row["kernel"], {"compiled": 0, "registers": 0, "shared": 0})
        kernel["compiled"] += 1
        for number in ("registers", "shared"):
            kernel[number] = max(kernel[number], row[number])
    return {"source": source, "largest": kernels}


def write(suite: str, new: dict[str, Any]) -> None:
    records = {key: value for key, value in {**read(suite), **new}.items() if value["source"] == source_hash(suite)}
    path = HERE / "records" / f"{suite}.json"
    path.parent.mkdir(exist_ok=True)
    lines = [f"  {json.dumps(key)}: {json.dumps(records[key])}" for key in sorted(records)]
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n")


class Job(NamedTuple):
    """One process: a suite for a target, with the triton of an interpreter."""

    python: str
    version: str
    target: str
    suite: str

    def run(self) -> tuple[list[dict[str, Any]] | None, str, str]:
        """(a row per kernel, None where the process failed; output; hash of the source)."""
        source = source_hash(self.suite)
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "rows.json"
            options = ["--full", "--quiet", "--target", self.target, "--suite", self.suite, "--json", str(out)]
            env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
            command = [self.python, str(HERE / "aot.py"), *options]
            done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
            rows = json.loads(out.read_text())[self.suite] if out.exists() else None
            return rows, done.stdout + done.stderr, source


def triton_version(python: str) -> str:
    command = [python, "-c", "from importlib.metadata import version; print(version('triton'))"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", action="append")
    parser.add_argument("--suite", action="append", choices=sorted(SUITES))
    parser.add_argument("--target", action="append", choices=TARGETS)
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes at once")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="start no process after this time")
    options = parser.parse_args()
    begun = time.monotonic()
    pythons = {python: triton_version(python) for python in options.python or [sys.executable]}
    jobs = [
        Job(python, version, target, suite)
        for (python, version), target, suite in itertools.product(
            pythons.items(), options.target or TARGETS, options.suite or SUITES
        )
        if is_stale(suite, target, version)
    ]
    failed = late = 0
    with ThreadPoolExecutor(options.jobs) as pool:

        def run(job: Job) -> tuple[list[dict[str, Any]] | None, str, str] | None:
            return job.run() if time.monotonic() - begun < options.seconds else None

        futures = {pool.submit(run, job): job for job in jobs}
        for future in as_completed(futures):
            job, outcome = futures[future], future.result()
            if outcome is None:
                late += 1
                continue
            rows, output, source = outcome
            bad = [row for row in rows or () if row["problems"]]
            name = f"{job.suite}, {job.target} triton-{job.version}"
            print(f"{name}: {len(rows or ())} kernels compiled, {len(bad)} with problems", flush=True)
            if bad or not rows:
                failed += 1
                print(output, flush=True)
            else:
                write(job.suite, {f"{job.target} triton-{job.version}": summary(source, rows)})
    if late:
        print(f"{late} of {len(jobs)} left for the next run")
    return int(failed > 0 or late > 0)


if __name__ == "__main__":
    raise SystemExit(main())
