"""What a network's layers do together: one operation counts the batches, one casts the weights for autocast."""

from __future__ import annotations

import contextlib
import copy
import pickle
import threading
import weakref
from collections import Counter
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from networks import images, randomise
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import fused_resnet as fr
from fused_resnet import emulation, foreach
from fused_resnet.blocks import ResidualBlock
from fused_resnet.models.common import Network

NETS: dict[str, Callable[[], nn.Module]] = {
    "bottleneck": lambda: fr.ResNet(fr.Bottleneck, [2, 1, 1, 1], num_classes=4, width_per_group=16),
    "low": lambda: fr.ResNet(fr.Bottleneck, [2, 1, 1, 1], num_classes=4, width_per_group=16, memory="low"),
    "deep stem": lambda: fr.ResNet(fr.BasicBlock, [1, 1, 1, 1], num_classes=4, stem="deep", pooled_shortcut=True),
    "plain": lambda: fr.ResNet(fr.BasicBlock, [1, 1, 1, 1], num_classes=4, shortcut="none"),
    "features": lambda: fr.resnet18(features_only=True, out_indices=(0, 2, 3)),
    "cifar": lambda: fr.cifar_resnet20(),
    "preact": lambda: fr.preact_resnet18(num_classes=4),
}


class Operations(TorchDispatchMode):
    """Counts the operations that reach a device."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not torch.ops.aten.add_.Tensor or args[0].dtype is torch.int64:  # of additions, the counters'
            self.found[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def made(name: str) -> nn.Module:
    torch.manual_seed(0)
    net = NETS[name]().train()
    randomise(net)
    return net


def counts(net: nn.Module) -> dict[str, int]:
    return {name: int(b) for name, b in net.named_buffers(remove_duplicate=False) if name.endswith("_tracked")}


def scalar(out: Tensor | list[Tensor]) -> Tensor:
    return sum((t.float().square().mean() for t in ([out] if isinstance(out, Tensor) else out)), torch.zeros(()))


# ---------------------------------------------------------------------------------------------------- counters


@pytest.mark.parametrize("name", NETS)
def test_batches_are_counted_by_one_operation(name: str) -> None:
    net, x = made(name), images(2, 3, 64, 64)
    with Operations() as operations:
        net(x)
    assert operations.found["_foreach_add_"] == 1
    assert operations.found["add_"] == 0
    assert set(counts(net).values()) == {1}
    with Operations() as operations, torch.no_grad():
        net.eval()(x)
    assert operations.found["_foreach_add_"] == operations.found["add_"] == 0
    assert set(counts(net).values()) == {1}


def _frozen(net: Any) -> None:
    for bn in (net.bn1, net.layer1[0].bn2, net.layer3[0].downsample[1]):
        bn.eval()


def _averaging(net: Any) -> None:
    for bn in (net.layer1[0].bn1, net.layer2[0].bn3, net.layer2[0].downsample[1]):
        bn.momentum = None


def _untracked(net: Any) -> None:
    net.layer1[0].bn1 = nn.BatchNorm2d(net.layer1[0].bn1.num_features, track_running_stats=False)
    net.layer1[1].bn2.num_batches_tracked = None


def _shared(net: Any) -> None:
    net.layer1[1].bn2 = net.layer1[1].bn1


def _shared_averaging(net: Any) -> None:
    _shared(net)
    net.layer1[1].bn2.momentum = None


def _twice(net: Any) -> None:
    net.layer1.append(net.layer1[1])
    net.layer1.append(net.layer1[1])


def _a_counter_for_two(net: Any) -> None:
    net.layer4[0].bn2.num_batches_tracked = net.layer1[0].bn1.num_batches_tracked


def _an_averaging_counter_for_two(net: Any) -> None:
    _a_counter_for_two(net)
    net.layer4[0].bn2.momentum = None


CHANGES = [
    _frozen,
    _averaging,
    _untracked,
    _shared,
    _shared_averaging,
    _twice,
    _a_counter_for_two,
    _an_averaging_counter_for_two,
]


@pytest.mark.parametrize("memory", ["bottleneck", "low"])
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__.strip("_"))
def test_counters_are_those_of_the_modules(change: Callable[[Any], None], memory: str) -> None:
    """Two steps, the first under no_grad; running statistics too, which momentum None makes depend on the counter."""
    net = made(memory)
    change(net)
    plain = fr.restore(copy.deepcopy(net))
    for model in (net, plain):
        with torch.no_grad():
            model(images(4, 3, 64, 64))
        scalar(model(images(4, 3, 64, 64))).backward()
    assert counts(net) == counts(plain)
    for (name, ours), theirs in zip(net.named_buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}")


HOOKED = {
    "a block": lambda net: net.layer2[0],
    "a stage": lambda net: net.layer2,
    "a batch norm": lambda net: net.layer2[0].bn2,
    "a projection": lambda net: net.layer2[0].downsample,
    "the stem's pool": lambda net: net.maxpool,
    "the last pool": lambda net: net.avgpool,
}


@pytest.mark.parametrize("where", HOOKED)
def test_a_hook_sees_the_counters_as_ever(where: str) -> None:
    net = made("bottleneck")
    seen: list[dict[str, int]] = []
    for model in (net, fr.restore(copy.deepcopy(net))):
        HOOKED[where](model).register_forward_hook(lambda *_, model=model: seen.append(counts(model)))
        HOOKED[where](model).register_forward_pre_hook(lambda *_, model=model: seen.append(counts(model)))
        model(images(2, 3, 64, 64))
    assert len(seen) == 4
    assert seen[:2] == seen[2:]
    assert sum(seen[0].values()) > 0


@pytest.mark.parametrize("where", ["pool", "whole", "replaced"])
def test_a_hook_within_a_pooled_projection(where: str) -> None:
    """Such a projection, and the parts of it, are no units of the block's, which calls them."""
    net = made("deep stem")
    seen: list[dict[str, int]] = []

    class Recording(nn.Identity):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(counts(self.model[0]))
            return x

    for model in (net, fr.restore(copy.deepcopy(net))):
        path = model.layer2[0].downsample
        if where == "replaced":
            path[0] = nn.Sequential(path[0], Recording())
            path[0][1].__dict__["model"] = [model]
        else:
            hooked = path[0] if where == "pool" else path
            hooked.register_forward_hook(lambda *_, model=model: seen.append(counts(model)))
        model(images(2, 3, 64, 64))
    assert len(seen) == 2
    # Ours runs the projection before the main path, torch's order being the other way round.
    first, later = ({n: c for n, c in each.items() if not n.startswith("layer2.0.")} for each in seen)
    assert first == later
    assert first["layer1.0.bn2.num_batches_tracked"] == 1
    assert first["layer3.0.bn1.num_batches_tracked"] == 0


def test_an_error_leaves_the_counters_of_what_had_run() -> None:
    net = made("bottleneck")
    net.layer3[0].conv2 = nn.Conv2d(3, 3, 3)
    with contextlib.suppress(RuntimeError, ValueError):
        net(images(2, 3, 64, 64))
    found = counts(net)
    assert all(found[name] == (not name.startswith(("layer3", "layer4"))) for name in found if "layer3" not in name)
    net.layer3 = nn.Sequential()
    net.layer4 = nn.Sequential()
    net.fc = nn.Linear(net.layer2[-1].bn3.num_features, 2)
    net(images(2, 3, 64, 64))
    assert net.bn1.num_batches_tracked == net.layer2[0].bn3.num_batches_tracked == 2


def test_a_block_alone_and_threads() -> None:
    """A counter waits in its own network and thread alone."""
    net = made("bottleneck")
    block = net.layer1[1]
    with Operations() as operations, fr.use_plan(gram=True):
        block(images(2, 256, 8, 8).contiguous(memory_format=torch.channels_last).requires_grad_())
    assert operations.found["_foreach_add_"] == 1
    assert block.bn1.num_batches_tracked == 1
    seen: list[int] = []

    def other() -> None:
        net(images(2, 3, 64, 64))
        seen.append(int(net.bn1.num_batches_tracked))

    with foreach.counting():
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert seen == [1]
    assert set(counts(net).values()) == {1, 2}


def test_a_subclass_of_a_block_counts_by_itself() -> None:
    """It may look at any counter between the ops."""
    seen = []

    class Looking(fr.Bottleneck):
        def forward(self, x: Tensor) -> Tensor:
            x = super().forward(x)
            seen.append(counts(self))
            return x

    net = fr.ResNet(Looking, [1, 1, 1, 1], num_classes=4, width_per_group=16).train()
    net(images(2, 3, 64, 64))
    assert all(set(each.values()) == {1} for each in seen)
    assert len(seen) == 4


def test_counters_beside_a_compiled_block() -> None:
    """It counts by itself while the others' counters wait. (Compiled networks: see test_resnet.)"""
    net = fr.models.cifar.CifarResNet((1, 1, 1)).train()
    net.layer2[0].compile(backend="aot_eager", fullgraph=True)
    for _ in range(2):
        scalar(net(images(2, 3, 16, 16))).backward()
    assert set(counts(net).values()) == {2}


def test_counters_of_fused_models(torchvision: ModuleType) -> None:
    """Between the blocks of such models code of others may run: each block counts at once."""
    model = torchvision.models.resnet.ResNet(torchvision.models.resnet.Bottleneck, [1, 1, 1, 1], num_classes=4).train()
    model = model.to(memory_format=torch.channels_last)
    fr.fuse(model)
    x = images(2, 3, 64, 64).contiguous(memory_format=torch.channels_last)
    with Operations() as operations, fr.use_plan(gram=True):
        model(x)
    assert operations.found["_foreach_add_"] == 4
    assert operations.found["add_"] == 1  # the stem's
    assert set(counts(model).values()) == {1}


# ---------------------------------------------------------------------------------------------------- autocast

# One per block, and one per conv outside of blocks: stems, pooled projections, plain networks.
CASTS_OF_GRADIENTS = {
    "bottleneck": 5 + 1,
    "low": 5 + 1,
    "deep stem": 4 + 3 + 3,
    "plain": 9,
    "features": 6 + 1,
    "cifar": 9 + 1,
    "preact": 8 + 1,
}


def steps(
    net: nn.Module, number: int = 2, lr: float = 0.01, run: Callable[..., Any] | None = None
) -> dict[str, Tensor | None]:
    """The gradients of the last of some SGD steps under autocast, and the parameters after it."""
    optimizer = torch.optim.SGD(net.parameters(), lr=lr)
    x = images(2, 3, 64, 64)
    for _ in range(number):
        net.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = (run or (lambda net, x: net(x)))(net, x)
        scalar(out).backward()
        optimizer.step()
    found = {name: p.grad for name, p in net.named_parameters()}
    return found | {f"{name} after": p.detach() for name, p in net.named_parameters()}


def assert_as_autocast_alone(
    monkeypatch: pytest.MonkeyPatch, net: nn.Module, error: float = 0.0, **options: Any
) -> dict[str, Any]:
    """What the network gives where autocast casts each weight by itself: bit for bit, but for an `error` in L2."""
    other = copy.deepcopy(net)
    found = steps(net, **options)
    with monkeypatch.context() as patch:
        patch.setattr(Network, "_at_once", lambda self, x: contextlib.nullcontext())
        patch.setattr(foreach, "cast", lambda weights, dtype: [weight.to(dtype) for weight in weights])
        with Operations() as operations:
            expected = steps(other, **options)
    assert operations.found["_foreach_copy_"] == 0
    for name, value in expected.items():
        if value is None:
            assert found[name] is None, name
            continue
        mine = found[name]
        assert mine is not None, name
        assert mine.dtype == value.dtype
        assert torch.linalg.vector_norm(mine - value) <= error * torch.linalg.vector_norm(value), name
    return found


@pytest.mark.parametrize("name", NETS)
def test_weights_are_cast_by_one_operation(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the second forward on: the first finds out which. Gradients are cast by one per block."""
    monkeypatch.setattr(emulation, "_has_instructions", lambda dtype: True)  # else convolutions cast too
    net, x = made(name), images(2, 3, 64, 64)
    convs = [p for p in net.parameters() if p.dim() == 4]
    for forward in (1, 2, 3):
        with Operations() as operations, torch.autocast("cpu", dtype=torch.bfloat16):
            out = net(x)
        assert (operations.found["_foreach_copy_"] == 1) == (forward > 1)
        assert operations.found["_to_copy"] <= 4, "the image, a feature map, the classifier's weight and bias"
        with Operations() as operations:
            scalar(out).backward()
        assert operations.found["_foreach_copy_"] == CASTS_OF_GRADIENTS[name]
        assert operations.found["_to_copy"] <= 8
    assert all(p.grad is not None for p in convs)


@pytest.mark.parametrize("name", NETS)
def test_gradients_are_those_of_autocast(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    net = made(name).to(memory_format=torch.channels_last)
    assert_as_autocast_alone(monkeypatch, net)
    for parameter in net.parameters():
        assert parameter.grad is not None
        assert parameter.grad.stride() == parameter.stride()


def test_whole_blocks_under_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    with fr.use_plan(gram=True, stored=True):
        assert_as_autocast_alone(monkeypatch, made("bottleneck"))


SUMMED = 0.01  # of a weight that is used twice, autocast adds the gradients before it casts them, in bfloat16

SUBSETS: dict[str, Callable[[str], bool]] = {
    "no conv": lambda name: "conv" not in name and "downsample.0" not in name,
    "some convs": lambda name: "conv2" in name or name.startswith("layer4"),
    "head": lambda name: name.startswith("fc"),
}


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("subset", SUBSETS)
def test_frozen_weights(subset: str, whole: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    net = made("bottleneck")
    for name, parameter in net.named_parameters():
        parameter.requires_grad_(SUBSETS[subset](name))
    with fr.use_plan(gram=whole or None, stored=whole or None):
        found = assert_as_autocast_alone(monkeypatch, net)
    for name, parameter in net.named_parameters():
        assert (found[name] is not None) == SUBSETS[subset](name) == parameter.requires_grad


def test_shared_weights_and_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    net = made("bottleneck")
    net.layer1[1].conv2.weight = net.layer1[0].conv2.weight
    net.layer1.append(net.layer1[1])
    assert_as_autocast_alone(monkeypatch, net, error=SUMMED, lr=0)


def test_two_forwards_in_one_autocast_region(monkeypatch: pytest.MonkeyPatch) -> None:
    net = made("bottleneck")

    def run(net: nn.Module, x: Tensor) -> Tensor:
        with torch.no_grad():
            net(x)  # what it casts knows no gradient
        return net(x) + net(x.flip(0))

    assert_as_autocast_alone(monkeypatch, net, error=SUMMED, lr=0, run=run)


def test_a_weight_written_between_cast_and_use(monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy is good for the version that it was made of."""
    net: Any = made("bottleneck")

    class Halves(nn.Sequential):
        """A projection of one's own, which writes to a weight that is used after it."""

        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                net.layer4[0].conv2.weight.mul_(0.5)
            return super().forward(x)

    net.layer2[0].downsample = Halves(*net.layer2[0].downsample)
    x = images(2, 3, 64, 64)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        expected = net(x)
        weight = 2 * net.layer4[0].conv2.weight
    for forward in (1, 2):
        with torch.no_grad():
            net.layer4[0].conv2.weight.copy_(weight)
        with torch.autocast("cpu", dtype=torch.bfloat16), Operations() as operations:
            assert torch.equal(net(x), expected)
        assert operations.found["_foreach_copy_"] == (6 if forward == 1 else 2)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpointed_network(reentrant: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(net: nn.Module, x: Tensor) -> Tensor:
        return checkpoint(net, x.requires_grad_(), use_reentrant=reentrant)

    assert_as_autocast_alone(monkeypatch, made("low"), run=run)


@pytest.mark.parametrize(
    "options", [{}, {"find_unused_parameters": True}, {"static_graph": True, "gradient_as_bucket_view": True}], ids=str
)
def test_distributed_data_parallel(options: dict[str, Any], tmp_path: Any, recwarn: pytest.WarningsRecorder) -> None:
    """One process: gradients come as without it, in its buckets' strides, and batches are counted once."""
    net = made("bottleneck").to(memory_format=torch.channels_last)
    expected = steps(copy.deepcopy(net), 3)
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(net, **options)
        found = steps(wrapped, 3)
        del wrapped
    finally:
        torch.distributed.destroy_process_group()
    for name, value in expected.items():
        mine = found[f"module.{name}"]
        assert mine is not None
        assert torch.equal(mine, value), name  # type: ignore[arg-type]
    assert set(counts(net).values()) == {3}
    assert not [w for w in recwarn if "stride" in str(w.message)]


def test_gradients_arrive_block_by_block() -> None:
    """As DistributedDataParallel needs it, which sends them while the backward pass goes on."""
    net = made("bottleneck")
    order: list[str] = []
    for name, parameter in net.named_parameters():
        parameter.register_post_accumulate_grad_hook(lambda _, name=name: order.append(name))
    for _ in range(2):
        order.clear()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = net(images(2, 3, 64, 64))
        scalar(out).backward()
    blocks = [name.rsplit(".", 2)[0].removesuffix(".downsample") for name in order if name.startswith("layer")]
    first = {name: blocks.index(name) for name in blocks}
    last = {name: len(blocks) - 1 - blocks[::-1].index(name) for name in blocks}
    for later, earlier in (("layer4.0", "layer3.0"), ("layer3.0", "layer2.0"), ("layer2.0", "layer1.1")):
        assert last[later] < first[earlier]


@pytest.mark.parametrize("name", ["bottleneck", "cifar", "preact"])
def test_evaluation_between_steps(name: str) -> None:
    """It casts nothing here (inference keeps its own weights), and what is cast at once in training stays known."""
    net, x = made(name), images(2, 3, 64, 64)
    steps(net, 1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with Operations() as operations, torch.no_grad():
            net.eval()(x)
        assert operations.found["_foreach_copy_"] == 0
        with Operations() as operations:
            net.train()(x)
        assert operations.found["_foreach_copy_"] == 1


def test_what_a_network_knows_keeps_nothing_alive() -> None:
    """Replaced weights are gone at once, and the next forward casts the new ones; copies know nothing."""
    net: Any = made("bottleneck")
    steps(net, 1)
    old = weakref.ref(net.layer1[0].conv1.weight)
    state = {name: t.clone() for name, t in net.state_dict().items()}
    net.load_state_dict(state, assign=True)
    assert old() is None
    for number in (6, 1):
        with Operations() as operations, torch.autocast("cpu", dtype=torch.bfloat16):
            net(images(2, 3, 64, 64))
        assert operations.found["_foreach_copy_"] == number
    for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert not other._together._threads.__dict__
    with Operations() as operations:
        net.double()(images(2, 3, 64, 64, dtype=torch.float64))
    assert operations.found["_foreach_copy_"] == 0


def test_without_autocast_nothing_is_cast() -> None:
    net = made("bottleneck")
    with Operations() as operations:
        scalar(net(images(2, 3, 64, 64))).backward()
    assert operations.found["_foreach_copy_"] == 0
    with Operations() as operations, torch.autocast("cpu", dtype=torch.bfloat16):
        with torch.no_grad():
            net.eval()(images(2, 3, 64, 64))
        block = net.train().layer1[1]
        assert isinstance(block, ResidualBlock)
        block(images(2, 256, 8, 8).requires_grad_())  # alone, unit by unit: autocast's own
    assert operations.found["_foreach_copy_"] == 0
