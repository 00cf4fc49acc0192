"""The family beyond torchvision's: CIFAR, plain and pre-activation networks, shortcuts, residual scales, features.

Their results are compared with the same networks unfused (`verify`, in float64 tight), their sizes with the papers'.
"""

from __future__ import annotations

import copy
import itertools
import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from conftest import needs_cpp
from networks import images, infer, primitives, randomise
from torch import Tensor, nn

import fused_resnet as fr
from fused_resnet.cli import load_benchmarks
from fused_resnet.convert import unfused_units
from fused_resnet.models.__main__ import PUBLISHED, counts, image
from fused_resnet.models.common import PadShortcut

# Sizes


@pytest.mark.parametrize("name", [n for n in PUBLISHED if "1202" not in n and "1001" not in n])
def test_counts_are_the_published_ones(name: str) -> None:
    with torch.device("meta"):
        found = counts(getattr(fr, name)(), *image(name))
    assert name in fr.__all__
    for value, scale, published in zip(found, (1e6, 1e9), PUBLISHED[name], strict=True):
        if published is not None:
            digits = len(str(published).partition(".")[2])
            tolerance = 1.0 if digits > 1 else 0.6  # papers round or cut the last digit they give
            assert abs(value / scale - published) <= tolerance * 10**-digits, (name, value)


@pytest.mark.parametrize("name", ["cifar_resnet1202", "cifar_preact_resnet1001"])
def test_parameters_of_the_deepest(name: str) -> None:
    with torch.device("meta"):
        parameters = sum(p.numel() for p in getattr(fr, name)().parameters())
    assert abs(parameters / 1e6 - PUBLISHED[name][0]) <= 0.15  # type: ignore[operator]


@pytest.mark.parametrize(("depth", "published"), [(50, 3.8), (101, 7.6), (152, 11.3)])
def test_multiply_adds_of_the_paper(depth: int, published: float) -> None:
    """Table 1's own figures belong to the stride on the first 1x1 conv."""
    with torch.device("meta"):
        model = getattr(fr, f"resnet{depth}")()
        for module in model.modules():
            if isinstance(module, fr.Bottleneck):
                module.conv1.stride, module.conv2.stride = module.conv2.stride, module.conv1.stride
    assert abs(counts(model, 1, 3, 224, 224)[1] / 1e9 - published) <= 0.1


def test_multiply_adds_beside_vgg(torchvision: ModuleType) -> None:
    with torch.device("meta"):
        vgg = torchvision.models.vgg19()
        resnet = fr.resnet34(shortcut="A")
    assert round(counts(vgg, 1, 3, 224, 224)[1] / 1e9, 1) == 19.6
    assert abs(counts(resnet, 1, 3, 224, 224)[1] / 1e9 - 3.6) <= 0.06


@pytest.mark.parametrize("name", ["cifar_resnet20", "resnet34"])
def test_shortcut_options_by_their_parameters(name: str) -> None:
    """A has none; B's projections stand where the shape changes, C's everywhere."""

    def parameters(option: str) -> int:
        with torch.device("meta"):
            return sum(p.numel() for p in getattr(fr, name)(shortcut=option).parameters())

    widths = {"cifar_resnet20": ((16, 3), (32, 3), (64, 3)), "resnet34": ((64, 3), (128, 4), (256, 6), (512, 3))}[name]
    changes = sum(a * b + 2 * b for (a, _), (b, _) in itertools.pairwise(widths))
    same = sum((w * w + 2 * w) * (blocks - (i > 0)) for i, (w, blocks) in enumerate(widths))
    assert parameters("B") - parameters("A") == changes
    assert parameters("C") - parameters("B") == same
    assert parameters("none") == parameters("A")


# Results

NETS: dict[str, Any] = {
    "cifar A": lambda: fr.CifarResNet((1, 1, 2)),
    "cifar B low": lambda: fr.CifarResNet((2, 1, 1), shortcut="B", memory="low"),
    "cifar C scaled": lambda: fr.CifarResNet((1, 2, 1), shortcut="C", residual_scale=0.4, in_channels=3),
    "cifar A scaled low": lambda: fr.CifarResNet((1, 1, 1), residual_scale=0.4, memory="low", widths=(7, 9, 13)),
    "plain": lambda: fr.CifarResNet((1, 1, 1), shortcut="none"),
    "plain imagenet": lambda: fr.ResNet(fr.BasicBlock, (1, 1, 1, 1), 5, shortcut="none"),
    "bottleneck A": lambda: fr.ResNet(fr.Bottleneck, (1, 1, 1, 1), 5, shortcut="A", width_per_group=16),
    "bottleneck D scaled": lambda: fr.ResNet(
        fr.Bottleneck, (1, 1, 1, 1), 5, stem="deep", pooled_shortcut=True, residual_scale=0.3, width_per_group=16
    ),
    "bottleneck scaled low": lambda: fr.ResNet(
        fr.Bottleneck, (1, 1, 1, 1), 5, residual_scale=-0.3, memory="low", width_per_group=16
    ),
    "preact basic": lambda: fr.PreActResNet(fr.PreActBasicBlock, (2, 1, 1, 1), 5),
    "preact bottleneck scaled": lambda: fr.PreActResNet(fr.PreActBottleneck, (2, 1, 1), 5, residual_scale=0.6),
}


@pytest.mark.parametrize("name", NETS)
def test_fused_equals_unfused(name: str) -> None:
    torch.manual_seed(5)
    model = NETS[name]()
    randomise(model)
    x = images(3, 3, 33, 33)  # odd: strides round up, and A's subsampling must agree with the convs
    fr.verify(copy.deepcopy(model).double(), x.double(), train=True)
    fr.verify(model, x, train=True)
    fr.verify(model.eval(), x)
    fr.verify(model, x.contiguous(memory_format=torch.channels_last))
    first = infer(model, x)
    for _ in range(2):
        torch.testing.assert_close(infer(model, x), first, rtol=0, atol=0)
    with torch.autocast("cpu", torch.bfloat16):
        fr.verify(model, x)


@pytest.mark.parametrize("name", NETS)
def test_nothing_runs_unfused_but_what_is_said(name: str) -> None:
    assert not list(unfused_units(NETS[name]()))


def test_a_watched_deep_stem_runs_as_one_module() -> None:
    """A hook on the stem sees its output, which fusing its last conv with the BN behind it would skip."""
    model = fr.ResNet(fr.Bottleneck, (1, 1, 1, 1), 5, stem="deep", width_per_group=16)
    randomise(model)
    x = images(2, 3, 33, 33)
    seen: list[torch.Size] = []
    expected = infer(model.eval(), x)
    handle = model.conv1.register_forward_hook(lambda module, args, out: seen.append(out.shape))
    assert [unit for unit, _ in unfused_units(model)] == ["conv1"]
    torch.testing.assert_close(infer(model, x), expected, rtol=1e-4, atol=1e-4)
    model.train()(x)
    assert seen == [(2, 64, 17, 17)] * 2
    handle.remove()
    assert not list(unfused_units(model))


def test_inference_is_one_kernel_per_conv(monkeypatch: pytest.MonkeyPatch) -> None:
    model = fr.CifarResNet((2, 2, 2), residual_scale=0.5).eval()
    with primitives(monkeypatch) as ran:
        infer(model, images(1, 3, 16, 16))
    assert ran["conv_bias_act_forward"] == 13
    assert sum(ran.values()) == 13
    preact = fr.PreActResNet(fr.PreActBasicBlock, (2, 2, 2), 10).eval()
    with primitives(monkeypatch) as ran:
        infer(preact, images(1, 3, 16, 16))
    # 13 convs (the projections' are bare), and a BN + ReLU before each block but the first, and at the end
    assert ran["conv_bias_act_forward"] == 13
    assert ran["bn_act_eval_forward"] == 6
    assert sum(ran.values()) == 19


def test_preactivation_in_training_is_one_op_per_batch_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    model = fr.PreActResNet(fr.PreActBottleneck, (2, 2, 2), 10).train()
    with primitives(monkeypatch) as ran:
        model(images(2, 3, 16, 16)).sum().backward()
    # the stem's; three in a block, but two in the first; the last
    assert ran["bn_act_train_forward"] == ran["bn_act_backward"] == 1 + 6 * 3 - 1 + 1
    assert sum(count for name, count in ran.items() if not name.startswith("conv_")) == 2 * 19


def test_resnet50d_is_timms(torchvision: ModuleType) -> None:
    timm = pytest.importorskip("timm", reason="timm is not installed")
    theirs = timm.create_model("resnet50d", num_classes=5).eval()
    randomise(theirs)
    ours = fr.resnet50d(weights=theirs.state_dict(), num_classes=5).eval()
    x = images(2, 3, 64, 64)
    torch.testing.assert_close(infer(ours, x), infer(theirs, x), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(infer(ours.double(), x.double()), infer(theirs.double(), x.double()), rtol=1e-9, atol=0)


def test_option_a() -> None:
    x = torch.randn(2, 3, 5, 4)
    y = PadShortcut(3, 7, 2)(x)
    assert y.shape == (2, 7, 3, 2)
    assert torch.equal(y[:, :3], x[:, :, ::2, ::2])
    assert not y[:, 3:].any()


def test_preactivation_is_the_papers() -> None:
    """One block and one with a projection, written out."""
    torch.manual_seed(0)
    net = fr.PreActResNet(fr.PreActBasicBlock, (2, 1, 1), 4).eval()
    randomise(net)
    relu = torch.relu
    x = images(2, 3, 9, 9)
    with torch.no_grad():
        y = relu(net.bn1(net.conv1(x)))
        first, second = net.layer1
        y = y + first.conv2(relu(first.bn2(first.conv1(y))))  # behind the stem's own BN and ReLU
        y = y + second.conv2(relu(second.bn2(second.conv1(relu(second.bn1(y))))))
        for stage in (net.layer2, net.layer3):
            (block,) = stage
            a = relu(block.bn1(y))
            y = block.downsample(a) + block.conv2(relu(block.bn2(block.conv1(a))))
        y = net.fc(relu(net.bn(y)).mean((2, 3)))
        torch.testing.assert_close(net(x), y, rtol=1e-5, atol=1e-5)
    assert not hasattr(first, "bn1")


# Residual scales


def test_residual_scale_of_zero_is_the_identity() -> None:
    model = fr.CifarResNet((2, 1, 1), residual_scale=0.0)
    x = torch.rand(2, 16, 6, 6)
    for mode in (True, False):
        assert torch.equal(model.layer1.train(mode)(x), x), "relu(0 * f(x) + x) = x for x >= 0"


def test_residual_scale_seen_by_folded_weights() -> None:
    """A step of the scale alone must reach the next inference."""
    block = fr.BasicBlock(8, 8).eval()
    block.residual_scale = nn.Parameter(torch.tensor(0.5))
    x = images(1, 8, 6, 6)
    before = infer(block, x)
    with torch.no_grad():
        block.residual_scale.mul_(-3)
    after = infer(block, x)
    assert not torch.equal(before, after)
    torch.testing.assert_close(after, infer(fr.restore(copy.deepcopy(block)), x), rtol=1e-5, atol=1e-5)
    assert "residual_scale" in block.state_dict()
    assert "residual_scale" not in fr.BasicBlock(8, 8).state_dict()


# Features


@pytest.mark.parametrize(("name", "options"), [("resnet18", {}), ("resnet50", {"output_stride": 8})])
def test_features(name: str, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    net = getattr(fr, name)(**options).double().eval()
    features = getattr(fr, name)(weights=net.state_dict(), features_only=True, out_indices=(0, 2, 4), **options)
    features.double().eval()
    x = images(1, 3, 64, 48).double()
    seen: dict[str, Tensor] = {}
    for part in ("relu", "layer2", "layer4"):  # the first call of relu is the stem's
        getattr(net, part).register_forward_hook(lambda m, a, out, part=part: seen.setdefault(part, out.clone()))
    with torch.no_grad():
        net(x)
    maps = infer(features, x)
    for y, part, channels, reduction in zip(maps, seen, features.channels, features.reductions, strict=True):
        assert y.shape == (1, channels, -(-64 // reduction), -(-48 // reduction))
        torch.testing.assert_close(y, seen[part], rtol=1e-9, atol=1e-12)
    assert set(features.state_dict()) == {k for k in net.state_dict() if not k.startswith("fc.")}
    expected = (2, 8, 8) if options else (2, 8, 32)
    assert features.reductions == expected
    shallow = getattr(fr, name)(features_only=True, out_indices=(2,), **options)
    assert not hasattr(shallow, "layer3")
    fr.verify(shallow.double(), images(2, 3, 32, 32).double(), train=True)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: fr.cifar_resnet20(shortcut="D"), ValueError, "shortcut must be one of"),
        (lambda: fr.plain_cifar_net20(shortcut="B"), TypeError, "has no shortcuts"),
        (lambda: fr.plain_cifar_net20(residual_scale=0.1), ValueError, "without shortcuts"),
        (lambda: fr.plain_cifar_net20(zero_init_residual=True), ValueError, "without shortcuts"),
        (lambda: fr.resnet50(shortcut="none"), ValueError, "BasicBlock"),
        (lambda: fr.resnet18(stem="3x3"), ValueError, "stem must be"),
        (lambda: fr.resnet50(output_stride=4), ValueError, "8, 16 or 32"),
        (lambda: fr.resnet50(output_stride=8, replace_stride_with_dilation=[0, 1, 1]), ValueError, "not both"),
        (lambda: fr.resnet18(out_indices=(1,)), TypeError, "features_only=True"),
        (lambda: fr.resnet18(features_only=True, out_indices=(4, 1)), ValueError, "ascending"),
        (lambda: fr.resnet18(residual_scale="small"), TypeError, "residual_scale"),
        (lambda: fr.CifarResNet((1, 1)), ValueError, "three numbers"),
        (lambda: fr.PreActResNet(fr.PreActBasicBlock, (1, 1)), ValueError, "layers must be"),
    ],
)
def test_impossible_options(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


# Depth


depth = load_benchmarks("depth")


@needs_cpp
def test_calls_and_bytes_of_a_deep_network() -> None:
    """What `benchmarks/depth.py` prints: 19 convs and batch norms in any form, fewer calls and "low" fewer bytes."""
    x = images(2, 3, 16, 16).contiguous(memory_format=torch.channels_last)
    models = depth.networks("cifar_resnet20", torch.device("cpu"))
    eager, balanced, low = (depth.calls(model, x) for model in models.values())
    for forward, backward in (eager, balanced, low):
        assert forward["aten.convolution"] == backward["aten.convolution_backward"] == 19
    assert eager[0]["aten.native_batch_norm"] == eager[1]["aten.native_batch_norm_backward"] == 19
    for forward, backward in (balanced, low):
        assert not any("native_batch_norm" in name for name in forward | backward)
        assert sum(forward.values()) < 0.7 * sum(eager[0].values())
    assert sum(balanced[1].values()) < sum(eager[1].values())
    kept = [depth.saved_by(model, x) for model in models.values()]
    assert kept[1] <= 1.05 * kept[0]
    assert kept[2] < 0.6 * kept[1]
    table = depth.measure(models, images(1, 3, 8, 8), 3)
    assert [line.split()[0] for line in table[1:]] == ["torch", "fused,", "fused,"]
    assert str(sum(low[1].values())) in table[3].split()


def test_1202_layers_train() -> None:
    """A step, a deep copy and a state dict of 1,202 layers under Python's usual recursion limit; "low" keeps less."""
    assert sys.getrecursionlimit() <= 1000
    x = images(2, 3, 8, 8).contiguous(memory_format=torch.channels_last)
    model = fr.cifar_resnet1202(memory="low")
    low = depth.saved_by(model, x)
    model(x).square().mean().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())
    assert sum(bool(p.grad.any()) for p in model.parameters()) > 3000
    twin = copy.deepcopy(model)
    twin.load_state_dict(model.state_dict())
    for module in model.modules():
        if isinstance(module, fr.BasicBlock):
            module.memory = "fast"
    fast = depth.saved_by(model, x)
    assert low < 0.6 * fast, (low, fast)
