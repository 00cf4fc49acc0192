"""`fused-resnet export`, and what is said where TensorRT is missing. The engines themselves: `make test-tensorrt`."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from networks import images, infer, randomise

import fused_resnet as fr
from fused_resnet.cli import main
from fused_resnet.export import command, writers
from fused_resnet.tensorrt import register_converters, to_tensorrt, unavailable

SMALL = ["--model", "resnet18", "--size", "64", "--num-classes", "10"]
PARITY = re.compile(
    r"parity ok: logits within (\S+) of float64 \(torch \S+, allowed (\S+)\); the top-1 class agrees on 16 of 16"
)


def export(*arguments: object) -> int:
    return main(["export", *map(str, arguments)])


@pytest.mark.parametrize(("kind", "options"), [("pt2", ["--any-size"]), ("onnx", ["--batch", 4])])
def test_the_file_is_written_and_its_parity_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str, options: list[object]
) -> None:
    if kind == "onnx":
        pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
        pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    path = tmp_path / f"net.{kind}"
    assert export("--to", kind, "--out", path, *SMALL, *options) == 0
    out = capsys.readouterr().out
    found = PARITY.search(out)
    assert found, out
    assert 0 < float(found[1]) <= float(found[2]) < 1e-4
    assert "china.jpg" in out
    assert f"wrote {path}, {path.stat().st_size / 1e6:.1f} MB" in out
    assert os.listdir(tmp_path) == [path.name]


def test_weights_of_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = fr.resnet18(num_classes=10).eval()
    randomise(model)
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    path = tmp_path / "net.pt2"
    assert export("--to", "pt2", "--out", path, *SMALL, "--weights", tmp_path / "weights.pth") == 0
    assert "none were given" not in capsys.readouterr().out
    x = images(3, 3, 64, 64)
    torch.testing.assert_close(torch.export.load(path).module()(x), infer(model, x), rtol=1e-4, atol=1e-4)


def test_where_parity_fails_there_is_no_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    fold_all = writers.to_plain

    def folds_badly(model: torch.nn.Module) -> torch.nn.Module:
        plain = fold_all(model)
        plain.conv1.bias.mul_(0.99)
        return plain

    monkeypatch.setattr(writers, "to_plain", folds_badly)
    (tmp_path / "net.pt2").write_text("old")
    assert export("--to", "pt2", "--out", tmp_path / "net.pt2", *SMALL) == 1
    out = capsys.readouterr().out
    assert "parity FAILED" in out
    assert f"{tmp_path / 'net.pt2'} was not written" in out
    assert (tmp_path / "net.pt2").read_text() == "old"
    assert os.listdir(tmp_path) == ["net.pt2"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--to", "pt2"], "required: --out"),
        (["--to", "caffe", "--out", "x"], "argument --to: invalid choice: 'caffe'"),
        (["--to", "pt2", "--out", "none/x.pt2"], "--out none/x.pt2 cannot be written: there is no such folder"),
        (["--to", "pt2", "--out", "."], "--out . cannot be written: it is a folder"),
        (["--to", "pt2", "--out", "x.pt2", "--weights", "none.pth"], "--weights: resnet50: no weights file at"),
        (["--to", "pt2", "--out", "x.pt2", "--image", "none.jpg"], "none.jpg cannot be read: No such file"),
        (["--to", "tensorrt", "--out", "x", "--any-size"], "--any-size: a TensorRT engine is built for one"),
        (["--to", "tensorrt", "--out", "x"], "--to tensorrt needs Torch-TensorRT, which is not installed"),
    ],
)
def test_wrong_requests(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "torch_tensorrt", None)
    try:
        code = export(*arguments)
    except SystemExit as stop:
        code = stop.code
    assert code == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert os.listdir(tmp_path) == []


def test_interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "_agreement", interrupt)
    assert export("--to", "pt2", "--out", tmp_path / "net.pt2", *SMALL) == 130
    assert os.listdir(tmp_path) == []


# --- TensorRT missing ---


def test_without_torch_tensorrt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch_tensorrt", None)
    reason = "Torch-TensorRT, which is not installed: pip install 'fused_resnet[tensorrt]'"
    assert unavailable() == reason
    with pytest.raises(fr.BackendUnavailableError, match=f"^to_tensorrt needs {re.escape(reason)}$"):
        to_tensorrt(fr.resnet18(), images())
    with pytest.raises(fr.BackendUnavailableError, match=f"^register_converters needs {re.escape(reason)}$"):
        register_converters()


def test_a_torch_tensorrt_that_does_not_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It raises a plain Exception where TensorRT's libraries are missing."""
    (tmp_path / "torch_tensorrt.py").write_text('raise Exception("libnvinfer.so.11 is missing")\n')
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "torch_tensorrt", raising=False)
    assert unavailable() == (
        f"Torch-TensorRT, which does not import beside torch {torch.__version__}: libnvinfer.so.11 is missing"
    )


def test_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("torch_tensorrt", "torch_tensorrt.dynamo", "torch_tensorrt.dynamo.conversion"):
        module = ModuleType(name)
        module.__path__ = []  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setitem(sys.modules, "torch_tensorrt.dynamo.conversion.impl", ModuleType("impl"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    why = "this torch is a CPU build" if torch.version.cuda is None else "torch sees none"
    with pytest.raises(fr.BackendUnavailableError, match=f"^to_tensorrt needs an NVIDIA GPU, and {why}$"):
        to_tensorrt(fr.resnet18(), images())
