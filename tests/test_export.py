"""to_plain, the marks of folded state dicts, DECOMPOSITIONS and .pt2 files. For ONNX see test_export_onnx.py."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from networks import SMALL, assert_close, images, infer, randomise, relative, twins
from test_compile import samples
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

import fused_resnet as fr
from fused_resnet.export import DECOMPOSITIONS, to_plain, to_pt2
from fused_resnet.folding import FOLDED, fold
from fused_resnet.models.weights import load_weights

SIZES = ((1, 3, 32, 32), (3, 3, 47, 33))  # a batch of one with 1x1 feature maps at the end; odd sizes


def norms(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if "Norm" in type(module).__name__]


def calls(program: torch.export.ExportedProgram) -> set[str]:
    return {str(node.target) for node in program.graph.nodes if node.op == "call_function"}


# --- to_plain ---


@pytest.mark.parametrize("name", SMALL)
def test_plain_is_torch_nn_alone_and_equal(torchvision: ModuleType, name: str) -> None:
    ours, theirs = (model.eval() for model in twins(torchvision, name))
    before = copy.deepcopy(ours.state_dict())
    plain = to_plain(ours)
    assert {type(module).__module__.partition(".")[0] for module in plain.modules() if module is not plain} == {"torch"}
    assert norms(plain) == []
    assert not plain.training
    assert not any(p.requires_grad for p in plain.parameters())
    assert_close("float32", infer(plain, images()), infer(theirs, images()), infer(theirs.double(), images().double()))
    exact = infer(theirs, images().double())
    assert relative(infer(to_plain(ours.double()), images().double()), exact) < 1e-12
    ours.float()
    assert ours.state_dict().keys() == before.keys()  # and the model is what it was
    assert all(torch.equal(value, before[key]) for key, value in ours.state_dict().items())
    assert all(module._fused for module in ours.modules() if hasattr(module, "_fused"))


@pytest.mark.parametrize("name", ["cifar_resnet20", "plain_cifar_net20", "preact_resnet18", "resnet50d"])
def test_the_rest_of_the_family(name: str) -> None:
    """Beside the same network restored; that one is held against published ones elsewhere."""
    model = getattr(fr, name)(num_classes=3).double().eval()
    randomise(model)
    plain, x = to_plain(model), images(2, 3, 64, 64).double()
    assert relative(infer(plain, x), infer(fr.restore(model), x)) < 1e-12
    assert {type(module).__module__.partition(".")[0] for module in plain.modules() if module is not plain} == {"torch"}
    assert len(norms(plain)) == (8 if "preact" in name else 0)  # BN + ReLU before a conv cannot be folded


def test_of_a_model_in_training_or_restored_or_plain(torchvision: ModuleType) -> None:
    ours, _ = twins(torchvision)
    expected = to_plain(ours.eval()).state_dict()
    for model in (ours.train(), fr.restore(copy.deepcopy(ours)), to_plain(ours)):
        state = to_plain(model).state_dict()
        assert state.keys() == expected.keys()
        assert all(torch.equal(value, expected[key]) for key, value in state.items())
    assert ours.training


def test_weights_are_rounded_once() -> None:
    model = fr.ConvBNAct(3, 8).eval()
    randomise(model)
    bn = model.bn
    vectors = (bn.weight, bn.bias, bn.running_mean, bn.running_var)
    exact, _ = fold(model.conv.weight.double(), None, *(v.double() for v in vectors), bn.eps)
    assert torch.equal(to_plain(model).half().conv.weight, exact.half())


def test_layout_and_device_stay() -> None:
    plain = to_plain(fr.resnet18().to(memory_format=torch.channels_last))
    assert plain.layer1.get_submodule("0").conv1.weight.is_contiguous(memory_format=torch.channels_last)
    assert to_plain(fr.resnet18().to("meta")).conv1.weight.is_meta


class Custom(nn.Module):
    """Our modules among others: what can be folded and what cannot."""

    def __init__(self) -> None:
        super().__init__()
        self.unit, self.inner, self.join = fr.ConvBNAct(3, 8), fr.BNAct(8), fr.AddReLU()
        self.conv, self.outer = nn.Conv2d(8, 8, 3, padding=1), fr.BNAct(8, activation=None)
        self.shared, self.bn1, self.bn2 = nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), nn.BatchNorm2d(8)
        self.seen, self.bn3 = nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)
        self.own, self.bn4 = nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8, track_running_stats=False)
        self.bare, self.bn5 = nn.Conv2d(8, 8, 1, bias=False), nn.BatchNorm2d(8, affine=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inner(self.unit(x))  # BN + ReLU with no conv before it
        x = self.outer(self.conv(x), x)  # a conv's bias, and a residual after its BN
        x = self.join(self.bn1(self.shared(x)), self.bn2(self.shared(x)))  # one conv, two BNs
        y = self.seen(x)
        x = self.bn3(y) + y  # the raw output is used as well
        x = self.bn4(self.own(x))  # batch statistics
        return self.bn5(self.bare(x)).mean((2, 3))


def test_what_cannot_be_folded_stays() -> None:
    model = Custom().eval()
    randomise(model)
    x = images().double()
    expected = infer(model.double(), x)
    plain = to_plain(model)
    assert relative(infer(plain, x), expected) < 1e-12
    assert norms(plain) == ["bn1", "bn2", "bn3", "bn4"]
    assert plain.code.count("batch_norm(") == 1  # inner
    folded = [name for name, m in plain.named_modules() if isinstance(m, nn.Conv2d) and m.bias is not None]
    assert folded == ["unit.conv", "conv", "shared", "seen", "own", "bare"]


@pytest.mark.parametrize("change", ["hook", "parametrized", "eps"])
def test_a_watched_or_changed_child_is_left_alone(change: str) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval()
    randomise(model)
    if change == "hook":
        model[0].register_forward_hook(lambda module, args, out: out * 2)
    elif change == "parametrized":
        parametrizations.weight_norm(model[0])
    elif change == "eps":
        model[1].eps = 0.5
    x = images().double()
    plain = to_plain(model.double())
    assert relative(infer(plain, x), infer(model, x)) < 1e-12
    assert (norms(plain) == []) == (change == "eps")


@pytest.mark.parametrize("training", [False, True])
def test_functional_batch_norm(training: bool) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> Tensor:
            bn = self.bn
            return F.batch_norm(
                self.conv(x), bn.running_mean, bn.running_var, bn.weight, bn.bias, training, 0.0, eps=0.1
            )

    model = Net().double().eval()
    randomise(model)
    plain = to_plain(model)
    assert relative(infer(plain, images().double()), infer(model, images().double())) < 1e-12
    assert ("batch_norm" in plain.code) == training


def test_what_torch_fx_cannot_trace_is_told() -> None:
    class Branching(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.sum() > 0 else -x

    with pytest.raises(ValueError, match=r"torch.fx cannot trace Branching: .*control flow"):
        to_plain(Branching())


def test_a_plain_model_loads_where_fused_resnet_is_not_installed(tmp_path: Path) -> None:
    model = fr.ResNet(fr.BasicBlock, (1, 1, 1, 1), num_classes=3).eval()
    randomise(model)
    plain = to_plain(model)
    torch.save((copy.deepcopy(plain), images(), infer(plain, images())), tmp_path / "plain.pt")
    code = """
import sys, torch
sys.modules["fused_resnet"] = None
plain, x, expected = torch.load(sys.argv[1], weights_only=False)
assert torch.equal(plain(x), expected) and not plain.training
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "plain.pt")], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr


# --- marks ---


@pytest.mark.parametrize("strict", [True, False])
def test_folded_and_unfolded_state_dicts_do_not_mix(strict: bool) -> None:
    model = fr.ResNet(fr.BasicBlock, (1, 1, 1, 1), num_classes=3).eval()
    plain = to_plain(model)
    for target, state, message in (
        (model, plain.state_dict(), r"ResNet has batch norm, but the state dict was saved from a folded model"),
        (plain, model.state_dict(), r"this model is folded .* but the state dict was saved from an unfolded one"),
        (copy.deepcopy(plain), model.state_dict(), r"this model is folded"),
        (nn.Sequential(model), nn.Sequential(plain).state_dict(), r"ResNet has batch norm"),
    ):
        before = copy.deepcopy(target.state_dict())
        with pytest.raises(RuntimeError, match=message):
            target.load_state_dict(state, strict=strict)
        assert all(torch.equal(value, before[key]) for key, value in target.state_dict().items())


def test_folded_files_are_refused_as_weights_and_load_into_their_like(tmp_path: Path) -> None:
    model = fr.resnet18(num_classes=3).eval()
    randomise(model)
    torch.save(to_plain(model).state_dict(), tmp_path / "folded.pth")
    with pytest.raises(ValueError, match=r"^resnet18: the weights were saved from a folded model .* before folding$"):
        fr.resnet18(weights=tmp_path / "folded.pth", num_classes=3)
    other = to_plain(fr.resnet18(num_classes=3))
    other.load_state_dict(torch.load(tmp_path / "folded.pth", weights_only=True))
    assert torch.equal(infer(other, images()), infer(to_plain(model), images()))
    assert bool(other.half().state_dict()[FOLDED])


def test_unfolded_weights_still_load() -> None:
    source = fr.resnet18(num_classes=3)
    model = load_weights("resnet18", lambda: fr.resnet18(num_classes=3), source.state_dict(), False)
    assert torch.equal(model.conv1.weight, source.conv1.weight)


# --- DECOMPOSITIONS ---


def tensors(value: Any) -> tuple[Tensor, ...]:
    return (value,) if isinstance(value, Tensor) else tuple(value)


def widened(value: Any) -> Any:
    return value.detach().double() if isinstance(value, Tensor) and value.is_floating_point() else value


def test_every_op_has_a_decomposition() -> None:
    assert {op.name().partition("::")[2] for op in DECOMPOSITIONS} == set(samples("auto"))


@pytest.mark.parametrize("op", DECOMPOSITIONS, ids=lambda op: op.name().partition("::")[2])
def test_decompositions_compute_what_the_ops_do(op: Any) -> None:
    for arguments in samples("reference")[op.name().partition("::")[2]]:
        with torch.no_grad():
            got, expected = DECOMPOSITIONS[op](*arguments), op(*arguments)
            exact = op(*(widened(argument) for argument in arguments))
        for a, b, c in zip(tensors(got), tensors(expected), tensors(exact), strict=True):
            assert (a.shape, a.dtype) == (b.shape, b.dtype)
            if not a.numel() or not a.is_floating_point():
                assert torch.equal(a, b)
            elif a.norm():
                assert_close(op.name(), a, b, c)


MODES: dict[str, tuple[Callable[[], Any], bool, str]] = {
    "inference": (torch.no_grad, False, "conv_bn_act"),
    "with gradients": (torch.enable_grad, False, "bn_act_eval"),
    "training": (torch.enable_grad, True, "bn_act_train"),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("defaults", [False, True], ids=["alone", "with torch's"])
def test_decomposed_programs_are_aten_alone(mode: str, defaults: bool) -> None:
    context, training, op = MODES[mode]
    model = fr.ResNet(fr.BasicBlock, (1, 1, 1, 1), num_classes=3)
    randomise(model)
    model.double().train(training)
    x = images().double()
    with context():
        program = torch.export.export(model, (x,))
    assert f"fused_resnet.{op}.default" in calls(program)
    table: Any = DECOMPOSITIONS
    if defaults:
        table = torch.export.default_decompositions()
        table.update(DECOMPOSITIONS)
    aten = program.run_decompositions(table)
    assert not [name for name in calls(aten) if not name.startswith("aten.") and "getitem" not in name]
    stream = io.BytesIO()
    torch.export.save(aten, stream)
    stream.seek(0)
    ours, theirs = torch.export.load(stream).module(), fr.restore(copy.deepcopy(model))
    out, expected = ours(x), theirs(x)
    assert relative(out, expected) < 1e-11
    if context is torch.enable_grad:  # and it trains
        ours_grads, their_grads = (
            torch.autograd.grad(y.square().sum(), list(net.parameters()))
            for y, net in ((out, ours), (expected, theirs))
        )
        for a, b in zip(ours_grads, their_grads, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)
    for name, buffer in theirs.named_buffers():  # the running statistics of a training step too
        torch.testing.assert_close(dict(ours.named_buffers())[name], buffer, rtol=1e-11, atol=1e-11)


# --- .pt2 ---


@pytest.mark.parametrize("name", ["bottleneck", "grouped"])
def test_pt2_round_trip(torchvision: ModuleType, tmp_path: Path, name: str) -> None:
    ours, theirs = (model.eval() for model in twins(torchvision, name))
    path = to_pt2(ours, images(1, 3, 64, 64), tmp_path / "net.pt2", dynamic_size=True)
    extra = {"fused_resnet.json": ""}
    program = torch.export.load(path, extra_files=extra)
    assert '"batch_norm": "folded"' in extra["fused_resnet.json"]
    assert not [call for call in calls(program) if not call.startswith(("aten.", "<built-in function"))]
    assert FOLDED in program.state_dict
    for shape in SIZES:
        x = images(*shape)
        exact = infer(copy.deepcopy(theirs).double(), x.double())
        assert_close(str(shape), infer(program.module(), x), infer(theirs, x), exact)


def test_option_a_takes_any_size(tmp_path: Path) -> None:
    """Its shortcut has no conv whose size torch.export could know for equal to the block's."""
    model = fr.CifarResNet((1, 1, 1)).eval()
    randomise(model)
    module = torch.export.load(to_pt2(model, images(2, 3, 32, 32), tmp_path / "net.pt2", dynamic_size=True)).module()
    theirs = fr.restore(copy.deepcopy(model))
    for shape in SIZES:
        x = images(*shape)
        exact = infer(copy.deepcopy(theirs).double(), x.double())
        assert_close(str(shape), infer(module, x), infer(theirs, x), exact)


def test_fixed_sizes_and_dtypes(tmp_path: Path) -> None:
    model = fr.ResNet(fr.BasicBlock, (1, 1, 1, 1), num_classes=3).eval()
    randomise(model)
    path = to_pt2(model, images(2, 3, 32, 32), tmp_path / "net.pt2", dynamic_batch=False, dtype=torch.float64)
    module = torch.export.load(path).module()
    x = images().double()
    assert relative(module(x), infer(model.double(), x)) < 1e-6  # folded in float32
    with pytest.raises(Exception, match=r"size|shape"):
        module(images(1, 3, 32, 32).double())


def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "net.pt2"
    path.write_text("old")
    model = fr.ResNet(fr.BasicBlock, (1, 1, 1, 1), num_classes=3)

    def breaks(program: Any, stream: Any, **_: Any) -> None:
        stream.write(b"half a file")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch.export, "save", breaks)
    with pytest.raises(KeyboardInterrupt):
        to_pt2(model, images(), path)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_bad_arguments(tmp_path: Path) -> None:
    model = fr.ResNet(fr.BasicBlock, (1, 1, 1, 1), num_classes=3)
    with pytest.raises(ValueError, match=r"^to_pt2: example must be a batch of images, \(N, C, H, W\), got list$"):
        to_pt2(model, [1], tmp_path / "net.pt2")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^to_pt2: ResNet cannot be exported: .*channels"):
        to_pt2(model, images(2, 5, 32, 32), tmp_path / "net.pt2")
    with pytest.raises(FileNotFoundError, match="there is no such folder"):
        to_pt2(model, images(), tmp_path / "none" / "net.pt2")
    with pytest.raises(IsADirectoryError, match="it is a folder"):
        to_pt2(model, images(), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_links_are_followed_and_pickle_is_refused(tmp_path: Path) -> None:
    model = fr.ResNet(fr.BasicBlock, (1, 1, 1, 1), num_classes=3)
    (tmp_path / "link.pt2").symlink_to(tmp_path / "target.pt2")
    to_pt2(model, images(), tmp_path / "link.pt2")
    assert (tmp_path / "link.pt2").is_symlink()
    assert (tmp_path / "target.pt2").stat().st_size > 1e6
    assert pickle.loads(pickle.dumps(to_plain(model))) is not None
