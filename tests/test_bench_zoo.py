"""The table of fused models: measured rows, files, the README."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

from fused_resnet.cli import RequestError, load_benchmarks

ROOT = Path(__file__).parent.parent
bench = load_benchmarks("bench_zoo")
records = load_benchmarks("records")


def test_a_model_is_measured_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parity and speed of both modes; what is there is not measured again, unless asked."""
    monkeypatch.setattr(bench, "_SECONDS", 0.0)
    out = tmp_path / "zoo.csv"
    assert bench.run(out, "medical", until="found") == 0
    assert "| medical | 4 | 0 | 0 | - | - | - |" in out.with_suffix(".md").read_text()
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- zoo -->\nold\n<!-- /zoo -->\nafter\n")
    assert bench.run(out, "medical", readme=readme) == 0
    rows = records.read(out)
    by = {(row["direction"], row["metric"], row["rival"]): row for row in rows}
    assert by["", "units", ""]["value"] == "4"
    for mode in ("inference", "training"):
        assert by[mode, "parity", ""]["value"] == "1"
        ratio = by[mode, "speedup", "unfused"]
        assert float(ratio["low"]) <= float(ratio["value"]) <= float(ratio["high"])
        assert float(by[mode, "ms", "fused"]["value"]) > 0
    markdown = out.with_suffix(".md").read_text()
    assert readme.read_text() == f"before\n<!-- zoo -->\n{markdown}<!-- /zoo -->\nafter\n"
    assert "| medical | 4 | 0 | 0 | yes | " in markdown

    monkeypatch.setattr(bench, "measure", lambda *args: pytest.fail("measured again"))
    assert bench.run(out, "medical") == 0
    with pytest.raises(pytest.fail.Exception):
        bench.run(out, "medical", fresh=True)
    assert records.read(out) == rows


def test_no_speed_without_parity(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(model: nn.Module, x: torch.Tensor, train: bool) -> None:
        raise bench.fr.ParityError("worse than torch")

    monkeypatch.setattr(bench.fr, "verify", wrong)
    out = tmp_path / "zoo.csv"
    assert bench.run(out, "unet") == 1
    rows = records.read(out)
    assert not any(row["metric"] == "ms" for row in rows)
    assert {row["note"] for row in rows if row["metric"] == "parity"} == {"ParityError: worse than torch"}
    assert "| unet | 10 | 0 | 0 | **not in inference and training** | - | - |" in out.with_suffix(".md").read_text()
    monkeypatch.setattr(bench, "measure", lambda *args: pytest.fail("measured again"))
    bench.run(out, "unet")


def test_a_missing_package_leaves_its_models_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    assert bench.run(tmp_path / "zoo.csv", "timm:resnet26d") == 0
    assert "timm:resnet26d is left out: " in capsys.readouterr().out
    assert "resnet26d" not in (tmp_path / "zoo.md").read_text()


def test_requests(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="no model of the zoo has 'nothing' in its name"):
        bench.run(tmp_path / "zoo.csv", "nothing")
    with pytest.raises(RequestError, match="has no marks"):
        bench.with_table("a README", "| |")


def test_the_readme_shows_what_was_measured() -> None:
    """Between its marks, the table that the kept results make."""
    if not (ROOT / "README.md").is_file() or not (bench.records.RESULTS / "cpu" / "zoo.csv").is_file():
        pytest.skip("not in a source tree")
    rows = records.read(ROOT / "benchmarks" / "results" / "cpu" / "zoo.csv")
    readme = (ROOT / "README.md").read_text()
    assert bench.with_table(readme, bench.table(rows)) == readme
    found: dict[str, Any] = {(row["subject"], row["metric"]): row["value"] for row in rows if not row["direction"]}
    for name, entry in bench.ZOO.items():
        assert [found[name, metric] for metric in ("units", "blocks", "left")] == [str(n) for n in entry[2:5]], name


def test_torchvision_beside_a_torch_that_it_was_not_built_for(torchvision: ModuleType) -> None:
    boxes = torch.tensor([[0.0, 0, 10, 10], [1, 1, 10, 10], [20, 20, 30, 30]])
    assert load_benchmarks("zoo").nms(boxes, torch.tensor([0.1, 0.9, 0.5]), 0.5).tolist() == [1, 2]
