"""Compiles every config of every kernel for every target; records/<suite>.json keeps the outcome (`make test-aot`).

    python records.py [--python PATH ...] [--suite NAME ...]

Each --python is an interpreter that has another version of triton. `test_triton.py` fails where a record is missing,
or was made from another source.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

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
}


def source_hash(suite: str) -> str:
    """Of the suite's modules and cases, without comments and docstrings."""
    text = ""
    for path in (HERE / f"aot_{suite}.py", *(KERNELS / f"{module}.py" for module in SUITES[suite])):
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            if isinstance(node, (ast.Module, ast.FunctionDef, ast.ClassDef)) and ast.get_docstring(node) is not None:
                node.body = node.body[1:] or [ast.Pass()]
        text += ast.unparse(tree)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def read(suite: str) -> dict[str, Any]:
    path = HERE / "records" / f"{suite}.json"
    return json.loads(path.read_text()) if path.exists() else {}


def stale(suite: str) -> list[str]:
    """What `records/<suite>.json` lacks, or has from another source."""
    records, source = read(suite), source_hash(suite)
    wanted = [f"{target} triton-{version}" for target in TARGETS for version in TRITONS]
    return [key for key in wanted if records.get(key, {}).get("source") != source]


def summary(suite: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    kernels: dict[str, dict[str, int]] = {}
    for row in rows:
        kernel = kernels.setdefault(row["kernel"], {"compiled": 0, "registers": 0, "shared": 0})
        kernel["compiled"] += 1
        for number in ("registers", "shared"):
            kernel[number] = max(kernel[number], row[number])
    return {"source": source_hash(suite), "largest": kernels}


def write(suite: str, new: dict[str, Any]) -> None:
    records = {key: value for key, value in {**read(suite), **new}.items() if value["source"] == source_hash(suite)}
    path = HERE / "records" / f"{suite}.json"
    path.parent.mkdir(exist_ok=True)
    lines = [f"  {json.dumps(key)}: {json.dumps(records[key])}" for key in sorted(records)]
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n")


def compile_all(python: str, target: str, suites: list[str]) -> tuple[str, dict[str, Any], str]:
    """(triton's version, rows per suite, output)."""
    with tempfile.TemporaryDirectory() as folder:
        version = subprocess.run(
            [python, "-c", "from importlib.metadata import version; print(version('triton'))"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
        out = Path(folder) / "rows.json"
        command = [python, str(HERE / "aot.py"), "--full", "--quiet", "--target", target, "--json", str(out)]
        for suite in suites:
            command += ["--suite", suite]
        env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
        done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
        return version, json.loads(out.read_text()) if out.exists() else {}, done.stdout + done.stderr


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--python", action="append")
    parser.add_argument("--suite", action="append", choices=sorted(SUITES))
    parser.add_argument("--target", action="append", choices=TARGETS)
    options = parser.parse_args()
    suites = options.suite or list(SUITES)
    jobs = [(python, target) for python in options.python or [sys.executable] for target in options.target or TARGETS]
    failed = False
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for (_, target), (version, report, output) in zip(
            jobs, pool.map(lambda job: compile_all(*job, suites), jobs), strict=True
        ):
            bad = [row for rows in report.values() for row in rows if row["problems"]]
            count = sum(map(len, report.values()))
            print(f"{target} triton-{version}: {count} kernels compiled, {len(bad)} with problems", flush=True)
            if bad or set(report) != set(suites):
                failed = True
                print(output, flush=True)
            for suite, rows in report.items():
                if not any(row["problems"] for row in rows):
                    write(suite, {f"{target} triton-{version}": summary(suite, rows)})
    return int(failed)


if __name__ == "__main__":
    raise SystemExit(main())
