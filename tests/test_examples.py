"""The examples run, and the numbers they state are so."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch
from networks import primitives
from torch.utils.flop_counter import FlopCounterMode

import fused_resnet as fr

EXAMPLES = Path(__file__).parents[1] / "examples"


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_worked_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every number of its description."""
    worked = example("worked_block")
    block, ones = worked.averaging()
    assert sum(p.numel() for p in block.parameters()) == 168
    with FlopCounterMode(display=False) as counter:
        block.unfused(ones)
    assert counter.get_total_flops() // 2 == 663_552
    assert ones.nbytes == 49_152
    with torch.no_grad(), primitives(monkeypatch) as ran:
        y = block(ones)
    assert ran == {"conv_bias_act_forward": 2, "add_relu_forward": 1}
    assert y[0, 0, 32, 32].item() == pytest.approx(2)
    assert y[0, :, 0, 0].tolist() == pytest.approx([1 + 25 / 81] * 3)
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64, requires_grad=True)
    block = worked.Block().double()
    grads = [torch.autograd.grad(run(x).square().sum(), [x, *block.parameters()]) for run in (block, block.unfused)]
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("net", "loss"), [("FPN", "find_digits"), ("UNet", "colour")])
def test_heads_on_feature_maps_learn(net: str, loss: str) -> None:
    dense = example("fpn_unet")
    torch.manual_seed(0)
    model = getattr(dense, net)()
    losses = dense.train(model, getattr(dense, loss), 12, net)
    assert sum(losses[-3:]) < 0.8 * sum(losses[:3])
    x = torch.randn(2, 1, 96, 64)
    out = model(x)
    if net == "FPN":
        assert [tuple(y.shape) for y in out] == [(2, 11, 96 // s, 64 // s) for s in (4, 8, 16)]
    else:
        assert out.shape == (2, 3, 96, 64)
    fr.verify(model.double(), x.double(), train=True)


def test_degradation_counts_what_it_says() -> None:
    """Same parameters in both kinds; the gradients of each conv; zero_init_residual is the identity."""
    degradation = example("degradation")
    nets = [degradation.network(kind, 20) for kind in ("plain", "residual")]
    assert len({sum(p.numel() for p in net.parameters()) for net in nets}) == 1
    assert len(degradation.gradient_norms("plain", 20, 0)) == 19
    assert max(degradation.changes(20, True, 0)) == 0
    assert min(degradation.changes(20, False, 0)) > 0.05
    result = degradation.train("residual", 8, 1, 64, 0.1, 0)
    assert result.losses[-1] < result.losses[0]
    with pytest.raises(SystemExit, match="6n"):
        degradation.network("plain", 9)
