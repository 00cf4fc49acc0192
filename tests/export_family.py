"""Every network of the family as ONNX (run by ONNX Runtime) and .pt2, fp32 and fp16: `make test-export`."""

from __future__ import annotations

import copy
from pathlib import Path
from types import ModuleType

import pytest
import torch
from networks import assert_close, images, infer, randomise, relative, twins
from test_export_onnx import run
from torch import nn

import fused_resnet as fr
from fused_resnet.cli import MODELS
from fused_resnet.export import to_onnx, to_pt2
from fused_resnet.models.__main__ import PUBLISHED

ANY_SIZE, ANY_BATCH = ((1, 3, 64, 64), (2, 3, 97, 65)), ((1, 3, 64, 64), (3, 3, 64, 64))
OTHERS = [name for name in PUBLISHED if name not in MODELS and "1202" not in name and "1001" not in name]
POOLED = ("resnet50d", "timm resnet26d")  # average pools with ceil_mode give other graphs for other sizes
PRECISIONS = pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])


def assert_exports(ours: nn.Module, theirs: nn.Module, dtype: torch.dtype, folder: Path, any_size: bool = True) -> None:
    """Both files, for other batches and sizes than the example's, within the budget that torch's own layers set."""
    example = images(1, 3, 64, 64)
    onnx = to_onnx(ours, example, folder / "net.onnx", dynamic_size=any_size, dtype=dtype)
    pt2 = to_pt2(ours, example, folder / "net.pt2", dynamic_size=any_size, dtype=dtype)
    module = torch.export.load(pt2).module()
    for shape in ANY_SIZE if any_size else ANY_BATCH:
        x = images(*shape, dtype=dtype)
        exact = infer(copy.deepcopy(theirs).double(), x.double())
        layouts = (torch.contiguous_format, torch.channels_last)
        plains = [
            infer(copy.deepcopy(theirs).to(dtype, memory_format=f), x.contiguous(memory_format=f)) for f in layouts
        ]
        plain = max(plains, key=lambda y: relative(y, exact))  # equally good sums: neither order is the better one
        assert_close(f"onnx {shape}", run(onnx, x), plain, exact)
        assert_close(f"pt2 {shape}", infer(module, x), plain, exact)


@PRECISIONS
@pytest.mark.parametrize("name", MODELS)
def test_family(torchvision: ModuleType, tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    ours, theirs = (model.eval() for model in twins(torchvision, name))
    assert_exports(ours, theirs, dtype, tmp_path)


@PRECISIONS
@pytest.mark.parametrize("name", OTHERS)
def test_the_rest_of_the_family(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    model = getattr(fr, name)(num_classes=10).eval()
    randomise(model)
    assert_exports(model, fr.restore(copy.deepcopy(model)), dtype, tmp_path, any_size=name not in POOLED)


FOREIGN = {
    "torchvision resnet50": lambda torchvision: torchvision.models.resnet50(num_classes=10),
    "torchvision resnext50_32x4d": lambda torchvision: torchvision.models.resnext50_32x4d(num_classes=10),
    "timm resnet50": lambda _: pytest.importorskip("timm", reason="timm is not installed").create_model("resnet50"),
    "timm resnet26d": lambda _: pytest.importorskip("timm", reason="timm is not installed").create_model("resnet26d"),
}


@PRECISIONS
@pytest.mark.parametrize("name", FOREIGN)
def test_fused_models_of_others(torchvision: ModuleType, tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    model = FOREIGN[name](torchvision).eval()
    randomise(model)
    fused = copy.deepcopy(model)
    assert fr.fuse(fused).fused
    any_size = name not in POOLED
    if not any_size:
        with pytest.raises(ValueError, match="not every batch and height and width will do; fix the sizes"):
            to_onnx(fused, images(1, 3, 64, 64), tmp_path / "net.onnx", dynamic_size=True)
    assert_exports(fused, model, dtype, tmp_path, any_size)
