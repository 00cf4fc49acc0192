"""ONNX files, run by ONNX Runtime on the CPU. `make test-export` does the same for the whole family."""

from __future__ import annotations

import copy
import importlib.util
import os
from pathlib import Path
from types import ModuleType

import pytest
import torch
from networks import assert_close, images, infer, randomise, twins
from torch import Tensor, nn

import fused_resnet as fr
from fused_resnet.export import to_onnx

MISSING = "not installed: pip install 'fused_resnet[onnx]'"
onnx = pytest.importorskip("onnx", reason=f"onnx is {MISSING}")
onnxruntime = pytest.importorskip("onnxruntime", reason=f"onnxruntime is {MISSING}")
pytest.importorskip("onnxscript", reason=f"onnxscript is {MISSING}")


def run(path: Path, x: Tensor) -> Tensor:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(["logits"], {"images": x.numpy()})[0])


def assert_runs_as(path: Path, theirs: nn.Module, x: Tensor) -> None:
    """ONNX Runtime's logits within the budget that torch's own layers set, in x's dtype, around float64."""
    exact = infer(copy.deepcopy(theirs).double(), x.double())
    assert_close(str(tuple(x.shape)), run(path, x), infer(copy.deepcopy(theirs).to(x.dtype), x), exact)


@pytest.mark.parametrize(("name", "dtype"), [("basic", torch.float16), ("grouped", torch.float32)])
def test_any_batch_and_any_size(torchvision: ModuleType, tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    ours, theirs = (model.eval() for model in twins(torchvision, name))
    path = to_onnx(ours, images(1, 3, 64, 64), tmp_path / "net.onnx", dynamic_size=True, dtype=dtype)
    assert os.listdir(tmp_path) == ["net.onnx"]
    for shape in ((1, 3, 64, 64), (3, 3, 32, 32), (2, 3, 47, 33)):
        assert_runs_as(path, theirs, images(*shape, dtype=dtype))


def test_the_file_says_what_it_is(tmp_path: Path) -> None:
    model = fr.ResNet(fr.Bottleneck, (1, 1, 1, 1), num_classes=3).eval()
    path = to_onnx(model, images(2, 3, 64, 64), tmp_path / "net.onnx")
    loaded = onnx.load(path)
    onnx.checker.check_model(loaded, full_check=True)
    shape = [dim.dim_param or dim.dim_value for dim in loaded.graph.input[0].type.tensor_type.shape.dim]
    assert shape == ["batch", 3, 64, 64]
    ops = [node.op_type for node in loaded.graph.node]
    assert (ops.count("Conv"), ops.count("Relu"), ops.count("Add")) == (17, 13, 4)
    assert "BatchNormalization" not in ops
    props = {entry.key: entry.value for entry in loaded.metadata_props}
    expected = {"producer": f"fused_resnet {fr.__version__}", "model": "ResNet", "batch_norm": "folded"}
    assert {key: props.get(key) for key in expected} == expected


def test_fixed_sizes_are_fixed(tmp_path: Path) -> None:
    model = fr.ResNet(fr.BasicBlock, (1, 1, 1, 1), num_classes=3).eval()
    path = to_onnx(model, images(2, 3, 32, 32), tmp_path / "net.onnx", dynamic_batch=False)
    assert run(path, images(2, 3, 32, 32)).shape == (2, 3)
    with pytest.raises(Exception, match="Got: 1 Expected: 2"):
        run(path, images(1, 3, 32, 32))


def test_a_wrong_file_would_be_seen(torchvision: ModuleType, tmp_path: Path) -> None:
    """One folded bias off by a thousandth of its size: outside the budget."""
    ours, theirs = (model.eval() for model in twins(torchvision))
    with torch.no_grad():
        ours.layer3[0].bn1.bias.mul_(1.001)
    path = to_onnx(ours, images(2, 3, 32, 32), tmp_path / "net.onnx")
    with pytest.raises(AssertionError, match="budget"):
        assert_runs_as(path, theirs, images())


def test_missing_packages_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnxscript" else find(name))
    with pytest.raises(ModuleNotFoundError, match=r"^to_onnx needs onnxscript: pip install 'fused_resnet\[onnx\]'$"):
        to_onnx(fr.resnet18(), images(), tmp_path / "net.onnx")
    assert os.listdir(tmp_path) == []


def test_modules_of_ours_among_others(tmp_path: Path) -> None:
    model = nn.Sequential(fr.ConvBNAct(3, 8), fr.BNAct(8), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    randomise(model)
    path = to_onnx(model, images(), tmp_path / "net.onnx")
    assert_runs_as(path, fr.restore(copy.deepcopy(model)), images(5, 3, 32, 32))
