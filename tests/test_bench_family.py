"""The family's table: what was measured stands in it, and what is slower than torch's is said."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from fused_resnet.benchmarks import RequestError, bench_family
from fused_resnet.benchmarks.records import RESULTS, read


def fake(monkeypatch: pytest.MonkeyPatch, speedup: float) -> list[tuple[Any, ...]]:
    """Measures nothing; the calls."""
    calls: list[tuple[Any, ...]] = []

    def measure(name: str, layout: str, batches: list[int]) -> list[dict[str, Any]]:
        calls.append((name, layout, batches))
        cases = [bench_family._case(name, layout, mode, b) for mode in bench_family.MODES for b in batches]
        return [{"suite": "family", "metric": "speedup", "value": speedup} | case for case in cases]

    monkeypatch.setattr(bench_family, "measure", measure)
    return calls


def test_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "family.csv"
    calls = fake(monkeypatch, 1.25)
    assert bench_family.run(out, ["resnet34", "resnet18"], [2, 16]) == 0
    assert [call[:2] for call in calls] == [(n, f) for n in ("resnet34", "resnet18") for f in bench_family.LAYOUTS]
    lines = out.with_suffix(".md").read_text().splitlines()
    assert lines[0] == "| network | | channels_last, 2 | channels_last, 16 | NCHW, 2 | NCHW, 16 |"
    assert lines[2] == "| resnet18 | inference | 1.25x | 1.25x | 1.25x | 1.25x |"
    assert len(lines) == 6
    assert bench_family.run(out, ["resnet18"], [2, 16]) == 0
    assert len(calls) == 4, "measured again"
    fake(monkeypatch, 0.9)
    assert bench_family.run(out, ["resnet18"], [1]) == 1
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("slower than torch's")]
    assert said[0] == "slower than torch's: resnet18, channels_last, inference, batch 1"
    assert len(said) == 4


def test_requests(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="no network resnet19; expected some of resnet18, "):
        bench_family.run(tmp_path / "family.csv", ["resnet19"], [1])


def test_one_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parity first, then both formats in both modes."""
    checked: list[bool] = []
    monkeypatch.setattr(bench_family.fr, "verify", lambda model, x, train: checked.append(train))
    monkeypatch.setattr(bench_family, "speed", lambda model, plain, x, *_: [{"metric": "speedup", "value": len(x)}])
    for layout in bench_family.LAYOUTS:
        rows = bench_family.measure("resnet18", layout, [1, 2])
        assert [(row["case"], row["direction"], row["batch"], row["value"]) for row in rows] == [
            (layout, mode, batch, batch) for mode in bench_family.MODES for batch in (1, 2)
        ]
    assert checked == [False, True] * 2


@pytest.mark.skipif(not (RESULTS / "cpu" / "family.csv").exists(), reason="the family was not measured yet")
def test_the_committed_table_is_what_was_measured() -> None:
    assert (RESULTS / "cpu" / "family.md").read_text() == bench_family.table(read(RESULTS / "cpu" / "family.csv"))
