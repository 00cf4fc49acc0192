"""A fused model is the model it was to everything else: copies, files, tools of torch, training; and restore."""

from __future__ import annotations

import copy
import importlib.util
import io
import pickle
from collections import Counter
from types import ModuleType
from typing import Any

import pytest
import torch
from conftest import needs_cpp
from networks import TRAINING, assert_infers_as, images, primitives, randomise, units_run
from same import assert_same
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fused_resnet as fr
from fused_resnet import convert
from fused_resnet.convert import unfused_units
from fused_resnet.fusion import scope

UNITS = 20


@pytest.fixture
def pair(torchvision: ModuleType) -> tuple[nn.Module, nn.Module]:
    """(fused, as it was): torchvision's resnet18 in float64."""
    theirs = torchvision.models.resnet18(num_classes=10).double()
    randomise(theirs)
    ours = copy.deepcopy(theirs)
    fr.fuse(ours)
    return ours, theirs


def X() -> Tensor:
    return images(4, 3, 32, 32).double()


def test_in_place_and_nothing_moves(torchvision: ModuleType) -> None:
    model = torchvision.models.resnet18(num_classes=10)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    keys, names = list(model.state_dict()), [name for name, _ in model.named_modules()]
    tensors = [id(t) for t in (*model.parameters(), *model.buffers())]
    modules, classes = [id(m) for m in model.modules()], [type(m) for m in model.modules()]
    states = [set(m.__dict__) for m in model.modules()]
    other = torchvision.models.resnet18(num_classes=10)
    report = fr.fuse(model)
    assert len(report.fused) == UNITS
    assert report.skipped == []
    assert str(report).startswith("20 fused: 9 x conv + BN + ReLU, 8 x conv + BN + add + ReLU, 3 x conv + BN; 0 batch")
    assert [name for name, _ in report.blocks] == [f"layer{i}.{j}" for i in range(1, 5) for j in range(2)]
    assert list(model.state_dict()) == keys
    assert [name for name, _ in model.named_modules()] == names
    assert [id(t) for t in (*model.parameters(), *model.buffers())] == tensors
    assert [id(m) for m in model.modules()] == modules
    assert all(isinstance(m, kind) for m, kind in zip(model.modules(), classes, strict=True))
    assert "fused: bn1: conv + BN + ReLU; bn2: conv + BN + add + ReLU" in repr(model)
    assert optimizer.param_groups[0]["params"][0] is next(model.parameters())
    assert not any(isinstance(m, fr.modules.FusedModule) for m in other.modules())
    assert len(fr.fuse(model).fused) == UNITS
    assert fr.restore(model) is model
    assert [type(m) for m in model.modules()] == classes
    assert [set(m.__dict__) for m in model.modules()] == states
    assert "fused" not in repr(model)


@needs_cpp
def test_what_runs(pair: tuple[nn.Module, nn.Module], monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = pair
    model.float()
    with primitives(monkeypatch) as ran:
        model(X().float()).sum().backward()
    assert units_run(ran, TRAINING) == UNITS
    model.eval()
    with primitives(monkeypatch) as ran, torch.no_grad():
        model(X().float())
    assert ran == Counter(conv_bias_act_forward=UNITS)
    fr.restore(model)
    with primitives(monkeypatch) as ran, torch.no_grad():
        model(X().float())
    assert not ran


def by_pickle(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


def by_file(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def by_averaging(model: nn.Module) -> nn.Module:
    return torch.optim.swa_utils.AveragedModel(model).module


@needs_cpp
@pytest.mark.parametrize("how", [copy.deepcopy, by_pickle, by_file, by_averaging])
def test_copies(pair: tuple[nn.Module, nn.Module], how: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are fused, on their own, and restoring one leaves the other."""
    ours, theirs = pair
    model = how(ours)
    assert not {id(p) for p in model.parameters()} & {id(p) for p in ours.parameters()}
    with primitives(monkeypatch) as ran:
        assert_same(model, copy.deepcopy(theirs), X())
    assert units_run(ran, TRAINING) == UNITS
    fr.restore(model)
    assert unfused_units(ours) == []
    assert_same(ours, theirs, X())
    assert type(model.layer1[0]) is type(theirs.layer1[0])


def test_pickles_of_other_versions_run_unfused(
    pair: tuple[nn.Module, nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, theirs = pair
    data = pickle.dumps(ours)
    monkeypatch.setattr(scope, "_versions", lambda: ("another",))
    model = pickle.loads(data)
    assert_same(model, theirs, X())
    assert "other versions" in unfused_units(model)[0][1]


def test_state_dicts(pair: tuple[nn.Module, nn.Module]) -> None:
    ours, theirs = pair
    assert list(ours.state_dict()) == list(theirs.state_dict())
    randomise(theirs, seed=5)
    ours.eval()
    ours(X())
    ours.load_state_dict(theirs.state_dict())
    assert_same(ours, theirs.eval(), X())


def test_partial_modes(pair: tuple[nn.Module, nn.Module]) -> None:
    for model in pair:
        model.train()
        model.layer2.eval()
        model.layer1.requires_grad_(False)
        model.layer3[0].bn1.eval()
    assert_same(*pair, X())
    assert_same(*pair, X())


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtypes_and_layouts(pair: tuple[nn.Module, nn.Module], dtype: torch.dtype, layout: Any) -> None:
    ours, theirs = (model.to(dtype).to(memory_format=layout).eval() for model in pair)
    x = X().to(dtype).contiguous(memory_format=layout)
    assert_infers_as(ours, theirs, x)
    assert ours.layer1(ours.conv1(x)).stride() == theirs.layer1(theirs.conv1(x)).stride()


def test_autocast(pair: tuple[nn.Module, nn.Module]) -> None:
    ours, theirs = (model.float() for model in pair)
    x = X().float()
    with torch.autocast("cpu", torch.bfloat16):
        assert fr.verify(ours, x, train=True).ok
        assert fr.verify(ours, x).ok
        assert ours(x).dtype == theirs(x).dtype


def test_compile(pair: tuple[nn.Module, nn.Module]) -> None:
    """In one graph, with our ops in it."""
    ours, theirs = pair
    graphs: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(ours, backend=backend, fullgraph=True)
    assert_same(ours, theirs, X(), call=lambda m, x: compiled(x) if m is ours else m(x))
    ops = [str(node.target) for graph in graphs for node in graph.graph.nodes if "fused_resnet." in str(node.target)]
    assert len(ops) == UNITS


def test_feature_extraction(pair: tuple[nn.Module, nn.Module]) -> None:
    from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

    ours, theirs = (model.eval() for model in pair)
    assert get_graph_node_names(ours) == get_graph_node_names(theirs)
    nodes = {"layer2.1.relu": "a", "layer4": "b"}
    a, b = (create_feature_extractor(model, nodes)(X()) for model in (ours, theirs))
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name])


def test_grad_cam(pair: tuple[nn.Module, nn.Module]) -> None:
    """Hooks on a stage and on a BN inside a unit, added later."""
    found: dict[int, list[Tensor]] = {}
    for index, model in enumerate(pair):
        found[index] = []
        for layer in (model.layer4, model.layer4[1].bn1):
            layer.register_forward_hook(lambda m, args, out, i=index: found[i].append(out.detach().clone()))
            layer.register_full_backward_hook(lambda m, gin, gout, i=index: found[i].append(gout[0]))
    for model in pair:
        for module in model.modules():
            if isinstance(module, nn.ReLU):
                module.inplace = False
    assert_same(*pair, X())
    assert len(found[0]) == len(found[1]) == 4
    for a, b in zip(found[0], found[1], strict=True):
        torch.testing.assert_close(a, b)


def test_activation_checkpointing(pair: tuple[nn.Module, nn.Module]) -> None:
    def call(model: Any, x: Tensor) -> Tensor:
        x = model.maxpool(model.relu(model.bn1(model.conv1(x))))
        for stage in (model.layer1, model.layer2):
            x = checkpoint(stage, x, use_reentrant=False)
        return x

    assert_same(*pair, X(), call=call)


def test_torch_func_runs_unfused(pair: tuple[nn.Module, nn.Module], monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = (model.eval() for model in pair)
    parameters = dict(ours.named_parameters())
    with primitives(monkeypatch) as ran:
        value = torch.func.grad(lambda p: torch.func.functional_call(ours, p, (X(),)).sum())(parameters)
    assert not ran
    other = torch.func.grad(lambda p: torch.func.functional_call(theirs, p, (X(),)).sum())(
        dict(theirs.named_parameters())
    )
    for name in value:
        torch.testing.assert_close(value[name], other[name])


def test_second_derivatives_are_refused(pair: tuple[nn.Module, nn.Module]) -> None:
    x = X().requires_grad_()
    (gradient,) = torch.autograd.grad(pair[0](x).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate"):
        gradient.sum().backward()


def test_distributed(pair: tuple[nn.Module, nn.Module], tmp_path: Any) -> None:
    """Fused before DDP wraps the model, and through the wrapper."""
    import torch.distributed as dist

    if not dist.is_available():
        pytest.skip("this torch was built without torch.distributed")
    ours, theirs = pair
    other = fr.restore(copy.deepcopy(ours))
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        for model in (ours, other):
            wrapped = nn.parallel.DistributedDataParallel(model)
            assert len(fr.fuse(wrapped).fused) == UNITS
            assert_same(
                model, copy.deepcopy(theirs), X(), call=lambda m, x, w=wrapped, k=model: (w if m is k else m)(x)
            )
    finally:
        dist.destroy_process_group()


def test_an_error_in_the_middle_changes_nothing(torchvision: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    model = torchvision.models.resnet18(num_classes=10)
    classes, states = [type(m) for m in model.modules()], [set(m.__dict__) for m in model.modules()]
    real, calls = convert.swap_in, []

    def failing(*args: Any) -> None:
        calls.append(args)
        if len(calls) == 4:
            raise MemoryError
        real(*args)

    monkeypatch.setattr(convert, "swap_in", failing)
    with pytest.raises(MemoryError):
        fr.fuse(model)
    assert [type(m) for m in model.modules()] == classes
    assert [set(m.__dict__) for m in model.modules()] == states
    monkeypatch.undo()
    fr.fuse(model)
    calls.clear()
    monkeypatch.setattr(convert, "swap_in", lambda *args: failing(*args) if len(calls) < 4 else real(*args))
    with pytest.raises(MemoryError):
        fr.fuse(model)
    assert unfused_units(model) == []


def test_arguments() -> None:
    with pytest.raises(TypeError, match="must be a torch"):
        fr.fuse("resnet50")  # type: ignore[arg-type]


def test_our_own_models() -> None:
    """They are fused already: nothing changes, and the report says so; restored ones are fused again."""
    model = fr.resnet18(num_classes=10)
    kinds = [type(m) for m in model.modules()]
    report = fr.fuse(model)
    assert [type(m) for m in model.modules()] == kinds
    assert len(report.fused) == UNITS
    assert report.skipped == []
    assert report.blocks[0] == ("layer1.0", "conv1, conv2")
    assert len(report.blocks) == 8
    fr.restore(model)
    assert unfused_units(model)
    fr.fuse(model)
    assert unfused_units(model) == []


def test_slices_of_containers_are_plain(torchvision: ModuleType) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten())
    fr.fuse(model)
    assert type(model[:2]) is nn.Sequential
    assert len(model[:2]) == 2


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.bn(self.conv(x)))


def test_instances_made_of_a_fused_one() -> None:
    """Another instance by its class is not fused; a replica, as DataParallel makes them, is."""
    model = Small().double()
    fr.fuse(model)
    other = type(model)()
    assert type(other) is Small
    assert other(images(2, 3, 9, 9)).shape == (2, 4, 7, 7)
    assert list(other.state_dict()) == list(model.state_dict())
    replica = model._replicate_for_data_parallel()
    assert isinstance(replica, fr.modules.FusedModule)
    assert torch.equal(replica(images(2, 3, 9, 9).double()), model(images(2, 3, 9, 9).double()))
    assert unfused_units(replica) == []


def test_export(pair: tuple[nn.Module, nn.Module]) -> None:
    """torch.export follows the fused forward, ops included."""
    ours, theirs = (model.eval() for model in pair)
    program = torch.export.export(ours, (X(),))
    ops = [node for node in program.graph.nodes if "fused_resnet." in str(node.target)]
    assert len(ops) == UNITS
    torch.testing.assert_close(program.module()(X()), theirs(X()))


@pytest.mark.skipif(importlib.util.find_spec("timm") is None, reason="timm is not installed")
def test_timm_entry_points(torchvision: ModuleType) -> None:
    import timm

    import fused_resnet.timm

    torch.manual_seed(0)
    ours = timm.create_model("fused_resnet26d", num_classes=7, in_chans=1)
    torch.manual_seed(0)
    theirs = timm.create_model("resnet26d", num_classes=7, in_chans=1)
    assert isinstance(ours, type(theirs))
    assert unfused_units(ours) == []
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert_same(ours.double(), theirs.double(), images(4, 1, 32, 32).double())
    assert fused_resnet.timm.fused_resnet26d(num_classes=3).num_classes == 3


def test_torchvision_entry_points(torchvision: ModuleType) -> None:
    import fused_resnet.torchvision

    model = torchvision.models.get_model("fused_resnet18", num_classes=7)
    assert isinstance(model, torchvision.models.ResNet)
    assert model.fc.out_features == 7
    assert unfused_units(model) == []
    assert "fused_resnet50" in fused_resnet.torchvision.__all__
