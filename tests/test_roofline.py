"""The traffic model reproduces the published table of the design, within 5%, and is consistent in itself."""

from __future__ import annotations

import pytest
import torch
from fused_resnet.benchmarks import roofline

import fused_resnet as fr

H100, H200 = (3.0e12, 798e12), (4.3e12, 785e12)

# ResNet-50, 224x224, batch 256, 16 bits: MB per image, MB kept, images/s on an H100 and an H200.
TABLE = {
    "eager": (477, 43.8, 5975, 8150),
    "bn_act": (352, 42, 7950, 10670),
    "hybrid": (300, 34, 9300, 12500),
    "prologue": (277, 33.5, 10180, 13660),
    "gram": (205, 19.4, 13200, 17100),
    "gram_mask": (183, 19.4, 14600, 18800),
    "unfused": (None, None, 17600, 24100),
    "inference": (None, None, 46300, 59200),
    "block": (None, None, 87900, 92600),
}


@pytest.fixture(scope="module")
def resnet50() -> roofline.Network:
    return roofline.network("resnet50")


@pytest.mark.parametrize("scheme", TABLE)
def test_reproduces_the_table(resnet50: roofline.Network, scheme: str) -> None:
    moved, kept, h100, h200 = TABLE[scheme]
    if moved is not None:
        assert roofline.megabytes_per_image(resnet50, scheme, 256, 2) == pytest.approx(moved, rel=0.05)
        assert roofline.saved(resnet50, scheme, 2) / 1e6 == pytest.approx(kept, rel=0.05)
    assert roofline.images_per_second(resnet50, scheme, 256, 2, *H100) == pytest.approx(h100, rel=0.05)
    assert roofline.images_per_second(resnet50, scheme, 256, 2, *H200) == pytest.approx(h200, rel=0.05)


@pytest.mark.parametrize(("model", "gflops"), [("resnet18", 1.81), ("resnet50", 4.09), ("resnext50_32x4d", 4.23)])
def test_published_flops(model: str, gflops: float) -> None:
    """torchvision's published multiply-adds, classifier included; two FLOPs each here."""
    net = roofline.network(model)
    assert (sum(c.flops for c in net) / 2 + net.classifier) / 1e9 == pytest.approx(gflops, rel=0.01)
    assert net.parameters == sum(p.numel() for p in getattr(fr, model)().parameters())


def test_convs_are_those_of_the_network(resnet50: roofline.Network) -> None:
    model = fr.resnet50()
    assert sum(c.weight for c in resnet50) == sum(
        m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Conv2d)
    )
    assert len(resnet50.blocks) == 16
    assert resnet50.blocks[0].out == 256 * 56 * 56


@pytest.mark.parametrize("scheme", roofline.SCHEMES)
@pytest.mark.parametrize("model", ["resnet18", "wide_resnet50_2"])
def test_every_network_has_every_scheme(model: str, scheme: str) -> None:
    net = roofline.network(model, 64)
    table = roofline.layer_table(net, scheme, 8, 4, 1e11, 1e13)
    assert len(table.splitlines()) == 2 + len(roofline.SCHEMES[scheme](net)) + len(
        roofline.around(net, 8, 4, scheme in roofline.TRAINING)
    )


def test_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert roofline.main(["--model", "resnet18", "--size", "64"]) == 0
    assert "gram_mask" in capsys.readouterr().out
    assert roofline.main(["--model", "resnet18", "--size", "64", "--scheme", "gram"]) == 0
    assert "outside the blocks" in capsys.readouterr().out
