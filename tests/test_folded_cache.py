"""The folded weights that modules keep for inference: every way in which weights change between two calls is seen.

Each way is applied to our model after it has evaluated (and so has folded), and to torchvision's; outputs must agree.
"""

from __future__ import annotations

import copy
import gc
import io
import pickle
import threading
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from networks import assert_infers_as, images, infer, randomise, twins
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, prune, vector_to_parameters

import fused_resnet as fr
from fused_resnet import dispatch, modules
from fused_resnet.folding import FoldCache
from fused_resnet.modules import FusedModule


@pytest.fixture
def folds(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one with each fold: a hit of the cache is a call that folds nothing."""
    found: list[int] = []
    put = FoldCache.put

    def counted(self: FoldCache, *args: Any) -> None:
        found.append(1)
        put(self, *args)

    monkeypatch.setattr(FoldCache, "put", counted)
    return found


def entries(model: nn.Module) -> int:
    """How many units keep folded weights."""
    modules = [module for module in model.modules() if isinstance(module, FusedModule)]
    return sum(cache._entry is not None for module in modules for cache in module._folded.values())


UNITS = 1 + 4 * 2 + 3  # of "basic": the stem, two per block, three projections


@pytest.fixture
def pair(torchvision: ModuleType) -> tuple[nn.Module, nn.Module]:
    """(ours, torchvision's), both evaluated once, so that ours holds folded weights."""
    ours, theirs = (model.eval() for model in twins(torchvision, "basic"))
    assert_infers_as(ours, theirs)
    assert entries(ours) == UNITS, "otherwise these tests show nothing: is oneDNN off?"
    return ours, theirs


def noise(like: Tensor, seed: int = 1, scale: float = 0.2) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return (torch.randn(like.shape, generator=g) * scale * like.float().std().nan_to_num(1.0).clamp_min(0.05)).to(
        like.dtype
    )


# Ways to change weights: functions of a model


def optimizer_step(kind: Callable[..., torch.optim.Optimizer], **options: Any) -> Callable[[nn.Module], None]:
    """Gradients are set by hand, so that the model never trains: only the optimizer touches it."""

    def change(model: nn.Module) -> None:
        optimizer = kind(model.parameters(), lr=0.05, **options)
        for seed, parameter in enumerate(model.parameters()):
            parameter.grad = noise(parameter, seed)
        optimizer.step()

    return change


def load(model: nn.Module, **options: Any) -> None:
    other = copy.deepcopy(model)
    randomise(other, 5)
    with torch.no_grad():
        other.layer1[0].conv1.weight.mul_(-1)
    model.load_state_dict(other.state_dict(), **options)


def load_one_tensor(model: nn.Module) -> None:
    model.load_state_dict({"layer2.0.bn2.running_var": torch.full((128,), 3.0)}, strict=False)


def load_into_child(model: nn.Module) -> None:
    """Not through the model: the child's own load_state_dict, which our modules do not see."""
    model.layer3[0].conv1.load_state_dict({"weight": noise(model.layer3[0].conv1.weight)})


def average(model: nn.Module) -> None:
    """An exponential moving average, in place."""
    with torch.no_grad():
        for seed, parameter in enumerate(model.parameters()):
            parameter.lerp_(parameter + noise(parameter, seed), 0.5)


def foreach(model: nn.Module) -> None:
    with torch.no_grad():
        torch._foreach_mul_(list(model.parameters()), 0.9)


def copy_into(model: nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter + noise(parameter))


def in_inference_mode(model: nn.Module) -> None:
    with torch.inference_mode():
        model.layer2[0].conv2.weight.mul_(-1.5)


def one_element(model: nn.Module) -> None:
    with torch.no_grad():
        model.layer1[0].conv1.weight[3, 2, 1, 1] = 4.0


def through_a_view(model: nn.Module) -> None:
    view = model.layer1[0].conv1.weight.detach().view(-1)
    view[::3] = 0.1


def new_parameter(model: nn.Module) -> None:
    conv = model.layer1[0].conv1
    conv.weight = nn.Parameter(noise(conv.weight))


def new_parameter_where_the_old_one_was(model: nn.Module) -> None:
    """The old one is deleted first: an allocator likes to give its memory to the new one."""
    conv = model.layer1[0].conv1
    value = noise(conv.weight)
    del conv.weight
    gc.collect()
    conv.weight = nn.Parameter(value.clone())
    del value
    for _ in range(3):
        value = conv.weight.detach() * 1.5
        del conv.weight
        conv.weight = nn.Parameter(value)
        del value


def transposed_view_of_the_same_memory(model: nn.Module) -> None:
    """Same address, same version counter, other strides."""
    conv = model.layer1[0].conv1
    conv.weight = nn.Parameter(conv.weight.detach().transpose(2, 3))


def swapped(model: nn.Module) -> None:
    """torch.utils.swap_tensors, as Module.to does under torch.__future__.set_swap_module_params_on_conversion."""
    model.zero_grad()
    conv = model.layer1[0].conv1
    torch.utils.swap_tensors(conv.weight, nn.Parameter(noise(conv.weight)))


def swap_on_load(model: nn.Module) -> None:
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        load(model)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


def new_module(model: nn.Module) -> None:
    old = model.layer1[0].conv1
    model.layer1[0].conv1 = nn.Conv2d(64, 64, 3, 1, 1, bias=True)
    model.layer1[0].conv1.load_state_dict({"weight": noise(old.weight), "bias": noise(old.weight[:, 0, 0, 0])})


def bias_appears(model: nn.Module) -> None:
    conv = model.layer1[0].conv2
    conv.bias = nn.Parameter(noise(conv.weight[:, 0, 0, 0], 3))


def bn_loses_its_gamma(model: nn.Module) -> None:
    model.layer1[0].bn1.weight = None


def bn_buffers(model: nn.Module) -> None:
    bn = model.layer2[0].bn1
    bn.running_mean.add_(1.0)
    bn.running_var.mul_(2.0)


def bn_buffers_replaced(model: nn.Module) -> None:
    bn = model.layer2[0].bn1
    bn.running_mean = bn.running_mean + 0.5
    bn.running_var = torch.rand_like(bn.running_var).fill_(0.7)


def bn_reset(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()


def bn_affine(model: nn.Module) -> None:
    with torch.no_grad():
        model.layer1[0].bn1.weight.neg_()
        model.layer3[0].downsample[1].bias.sub_(0.5)


def bn_trains_for_a_while(model: nn.Module) -> None:
    """Test-time adaptation: a child gathers statistics while the model stays in evaluation mode."""
    model.layer1[0].bn2.train()
    for seed in range(3):
        infer(model, images(4, 3, 32, 32, seed=seed))
    model.layer1[0].bn2.eval()


def training_attribute(model: nn.Module) -> None:
    model.bn1.training = True
    infer(model, images(4, 3, 32, 32))
    model.bn1.training = False


def eps(model: nn.Module) -> None:
    model.layer1[0].bn1.eps = 0.5


def geometry(model: nn.Module) -> None:
    """As segmentation and re-identification nets do it, with ints too."""
    model.layer4[0].conv1.stride = 1
    model.layer4[0].downsample[0].stride = (1, 1)
    model.layer3[0].conv2.dilation, model.layer3[0].conv2.padding = (2, 2), (2, 2)


def vector(model: nn.Module) -> None:
    flat = parameters_to_vector(model.parameters()).detach()
    vector_to_parameters(flat + noise(flat), model.parameters())


def reset(model: nn.Module) -> None:
    torch.manual_seed(3)
    model.apply(lambda module: module.reset_parameters() if hasattr(module, "reset_parameters") else None)


def initialised(model: nn.Module) -> None:
    torch.manual_seed(3)
    nn.init.normal_(model.layer1[0].conv1.weight, std=0.1)


def data_assigned(model: nn.Module) -> None:
    """`p.data = ...` gives new memory, which is seen; writes through `.data` are not (below)."""
    weight = model.layer1[0].conv1.weight
    weight.data = weight.data * -1


def set_(model: nn.Module) -> None:
    weight = model.layer1[0].conv1.weight
    with torch.no_grad():
        weight.set_(noise(weight))


def to_half_and_back(model: nn.Module) -> None:
    """Rounds the weights, so the old fold is wrong afterwards."""
    model.to(torch.bfloat16).float()


def half_and_back_child(model: nn.Module) -> None:
    """Conversion of children only, which our modules do not see."""
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.BatchNorm2d)):
            module.bfloat16().float()


def channels_last(model: nn.Module) -> None:
    model.to(memory_format=torch.channels_last)
    with torch.no_grad():
        model.layer1[0].conv1.weight.neg_()


def requires_grad(model: nn.Module) -> None:
    model.requires_grad_(False)
    model.layer1[0].conv1.weight.mul_(-1)
    model.requires_grad_(True)


def trained(model: nn.Module) -> None:
    model.double().train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    for seed in range(2):
        optimizer.zero_grad()
        model(images(4, 3, 32, 32, dtype=torch.float64, seed=seed)).square().mean().backward()
        optimizer.step()
    model.float().eval()


def pruned(model: nn.Module) -> None:
    with torch.no_grad():  # else the weight is not a leaf, and torch refuses to deepcopy it
        prune.l1_unstructured(model.layer1[0].conv1, "weight", 0.5)


def pruned_for_good(model: nn.Module) -> None:
    pruned(model)
    prune.remove(model.layer1[0].conv1, "weight")


CHANGES: dict[str, Callable[[nn.Module], Any]] = {
    "sgd for-loop": optimizer_step(torch.optim.SGD, foreach=False),
    "sgd foreach": optimizer_step(torch.optim.SGD, foreach=True),
    "sgd fused": optimizer_step(torch.optim.SGD, fused=True),
    "sgd momentum": optimizer_step(torch.optim.SGD, momentum=0.9, nesterov=True, foreach=True),
    "adamw for-loop": optimizer_step(torch.optim.AdamW, foreach=False),
    "adamw foreach": optimizer_step(torch.optim.AdamW, foreach=True),
    "adamw fused": optimizer_step(torch.optim.AdamW, fused=True),
    "rmsprop": optimizer_step(torch.optim.RMSprop),
    "load_state_dict": load,
    "load_state_dict assign": lambda model: load(model, assign=True),
    "load_state_dict swap": swap_on_load,
    "trained": trained,
}
CHANGES |= {
    function.__name__: function
    for function in (
        load_one_tensor,
        load_into_child,
        average,
        foreach,
        copy_into,
        in_inference_mode,
        one_element,
        through_a_view,
        new_parameter,
        new_parameter_where_the_old_one_was,
        transposed_view_of_the_same_memory,
        swapped,
        new_module,
        bias_appears,
        bn_loses_its_gamma,
        bn_buffers,
        bn_buffers_replaced,
        bn_reset,
        bn_affine,
        bn_trains_for_a_while,
        training_attribute,
        eps,
        geometry,
        vector,
        reset,
        initialised,
        data_assigned,
        set_,
        to_half_and_back,
        half_and_back_child,
        channels_last,
        requires_grad,
        pruned,
        pruned_for_good,
    )
}


@pytest.mark.parametrize("change", CHANGES)
def test_changes_are_seen(pair: tuple[nn.Module, nn.Module], change: str) -> None:
    """Without train(), eval() or anything else of ours in between, but for what the change itself calls."""
    ours, theirs = pair
    before = infer(ours, images())
    for model in pair:
        CHANGES[change](model)
    after = infer(ours, images())
    assert not torch.allclose(before, after, rtol=1e-3, atol=0), "this change shows nothing"
    assert_infers_as(ours, theirs)
    if change != "trained":  # and once more, with the new fold
        CHANGES[change](ours)
        CHANGES[change](theirs)
        assert_infers_as(ours, theirs)


def data_write(model: nn.Module) -> None:
    model.layer1[0].conv1.weight.data.mul_(-1)


def numpy_write(model: nn.Module) -> None:
    model.layer1[0].conv1.weight.detach().numpy()[:] *= -1


def vector_write(model: nn.Module) -> None:
    """After vector_to_parameters, parameters are views of the vector without a common version counter."""
    flat = parameters_to_vector(model.parameters()).detach()
    vector_to_parameters(flat, model.parameters())
    infer(model, images())
    flat.mul_(0.9)


@pytest.mark.parametrize("write", [data_write, numpy_write, vector_write], ids=lambda f: f.__name__)
@pytest.mark.parametrize("how", ["function", "module", "eval"])
def test_writes_that_torch_cannot_see(pair: tuple[nn.Module, nn.Module], write: Any, how: str) -> None:
    """The documented hole: `refresh` closes it, and so do train() and eval(), which most code calls anyway."""
    ours, theirs = pair
    for model in pair:
        write(model)
    if how == "function":
        fr.refresh(ours)
    elif how == "eval":
        ours.eval()
    else:
        for module in ours.modules():
            if isinstance(module, FusedModule):
                module.refresh()
    assert_infers_as(ours, theirs)


def test_the_fold_is_kept(pair: tuple[nn.Module, nn.Module], folds: list[int]) -> None:
    ours, _ = pair
    first = infer(ours, images())
    for _ in range(3):
        assert torch.equal(infer(ours, images()), first)
    assert not folds
    with torch.inference_mode():
        assert torch.equal(ours(images()), first)
    assert not folds
    with torch.no_grad():
        ours.layer1[0].conv1.weight.mul_(2)
    infer(ours, images())
    assert len(folds) == 1, "one unit's weights changed, one unit folds"


@pytest.mark.parametrize(
    "drop",
    [
        lambda model: model.train(),
        lambda model: model.eval(),
        lambda model: model.load_state_dict(model.state_dict()),
        lambda model: model.load_state_dict({}, strict=False),
        lambda model: model.float(),
        lambda model: model.to("cpu"),
        lambda model: model.share_memory(),
        lambda model: model.requires_grad_(False) and fr.refresh(model),
        lambda model: fr.restore(model),
        lambda model: nn.Sequential(model).eval(),
        lambda model: nn.Sequential(model).float(),
        lambda model: nn.Sequential(model).load_state_dict({}, strict=False),
    ],
    ids=[
        "train",
        "eval",
        "load",
        "load nothing",
        "float",
        "to",
        "share",
        "refresh",
        "restore",
        "outer eval",
        "outer to",
        "outer load",
    ],
)
def test_the_fold_is_dropped(pair: tuple[nn.Module, nn.Module], drop: Callable[[nn.Module], Any]) -> None:
    """And its memory with it."""
    ours, _ = pair
    drop(ours)
    assert entries(ours) == 0


def test_not_folded_while_training_or_with_gradients(torchvision: ModuleType) -> None:
    ours, _ = twins(torchvision, "basic")
    ours(images(4, 3, 32, 32))
    infer(ours, images(4, 3, 32, 32))  # batch statistics: nothing to fold
    ours.eval()(images())
    assert entries(ours) == 0
    ours.requires_grad_(False)
    ours(images())
    assert entries(ours) == UNITS


def _size(model: nn.Module) -> int:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    return buffer.tell()


def test_in_no_state_dict_pickle_or_copy(torchvision: ModuleType) -> None:
    ours, theirs = (model.eval() for model in twins(torchvision, "basic"))
    sizes = len(pickle.dumps(ours)), _size(ours)
    keys = list(ours.state_dict())
    infer(ours, images())
    assert entries(ours) == UNITS
    assert list(ours.state_dict()) == keys == list(theirs.state_dict())
    assert not any(
        "fold" in name for name, _ in [*ours.named_buffers(), *ours.named_parameters(), *ours.named_modules()]
    )
    for after, before in zip((len(pickle.dumps(ours)), _size(ours)), sizes, strict=True):
        assert after - before < 8192, "some bytes per module, never weights"
    for other in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert entries(other) == 0
        assert_infers_as(other, theirs)
        assert entries(other) == entries(ours) == UNITS


def test_a_shallow_copy_with_other_weights(pair: tuple[nn.Module, nn.Module]) -> None:
    """copy.copy shares everything, the cache too; replicas do so as well (torch.nn.parallel.replicate)."""
    ours, theirs = pair
    block = copy.copy(ours.layer1[0])
    block._modules = dict(block._modules)
    block.conv1 = copy.deepcopy(block.conv1)
    with torch.no_grad():
        block.conv1.weight.mul_(-1)
    plain = copy.deepcopy(theirs.layer1[0])
    with torch.no_grad():
        plain.conv1.weight.mul_(-1)
    x = images(1, 64, 8, 8)
    for _ in range(2):  # both use one cache in turn
        assert_infers_as(ours.layer1[0], theirs.layer1[0], x)
        assert_infers_as(block, plain, x)


def test_models_sharing_a_module(torchvision: ModuleType) -> None:
    """One conv in two units with different BNs (as in RetinaNet's heads), in one model."""
    conv = nn.Conv2d(8, 8, 3, 1, 1, bias=False)
    blocks = []
    for seed, kind in ((0, fr.BasicBlock), (0, torchvision.models.resnet.BasicBlock)):
        block = kind(8, 8).eval()
        randomise(block, seed)
        block.conv1 = block.conv2 = conv
        blocks.append(block)
    for _ in range(2):
        assert_infers_as(*blocks, images(1, 8, 6, 6))
        with torch.no_grad():
            conv.weight.mul_(1.5)


@pytest.mark.parametrize("how", ["created", "converted", "loaded"])
def test_inference_tensors(torchvision: ModuleType, how: str) -> None:
    """They have no version counter: nothing made of them is kept, so that no write to them can be missed."""
    ours, theirs = (model.eval() for model in twins(torchvision, "basic"))
    infer(ours, images())
    with torch.inference_mode():
        if how == "created":
            made = fr.ResNet(fr.BasicBlock, [1, 1, 1, 1], num_classes=10).eval()
            made.load_state_dict(ours.state_dict())
            ours = made
        elif how == "converted":
            ours.double().float()
        else:
            ours.load_state_dict({k: v.clone() for k, v in ours.state_dict().items()}, assign=True)
        assert ours.layer1[0].conv1.weight.is_inference()
        ours(images())
        assert entries(ours) == 0
    assert_infers_as(ours, theirs)
    with torch.inference_mode():
        ours.layer1[0].conv1.weight.neg_()
        ours.layer2[0].bn1.running_mean.add_(1)
    with torch.no_grad():
        theirs.layer1[0].conv1.weight.neg_()
        theirs.layer2[0].bn1.running_mean.add_(1)
    assert_infers_as(ours, theirs)


def test_channels_cut_away(torchvision: ModuleType) -> None:
    """Structured pruning: slices share address and version counter with what they are cut from."""
    ours, theirs = (model.eval() for model in (fr.BasicBlock(8, 8), torchvision.models.resnet.BasicBlock(8, 8)))
    randomise(theirs)
    ours.load_state_dict(theirs.state_dict())
    x = images(2, 8, 6, 6)
    assert_infers_as(ours, theirs, x)
    for block in (ours, theirs):
        block.conv1.weight = nn.Parameter(block.conv1.weight.detach()[:5])
        block.conv2.weight = nn.Parameter(block.conv2.weight.detach()[:, :5])
        for name in ("weight", "bias"):
            setattr(block.bn1, name, nn.Parameter(getattr(block.bn1, name).detach()[:5]))
        block.bn1.running_mean, block.bn1.running_var = block.bn1.running_mean[:5], block.bn1.running_var[:5]
    assert_infers_as(ours, theirs, x)


@pytest.mark.parametrize("change", ["double bn", "short bn", "short conv", "double conv"])
def test_children_that_do_not_fit(pair: tuple[nn.Module, nn.Module], change: str) -> None:
    """Where torch raises, a fold must not paper over it."""
    for model, errors in zip(pair, ((ValueError, TypeError), RuntimeError), strict=True):
        block = model.layer1[0]
        if change == "double bn":
            block.bn1.double()
        elif change == "short bn":
            block.bn1 = nn.BatchNorm2d(1).eval()
        elif change == "short conv":
            block.conv1.weight = nn.Parameter(torch.randn(64, 32, 3, 3))
        else:
            block.conv1.double()
        with pytest.raises(errors):
            infer(model, images())


def test_sizes_and_layouts_change_between_calls(pair: tuple[nn.Module, nn.Module], folds: list[int]) -> None:
    """Weights are packed for one input size, and serve every other."""
    ours, theirs = pair
    infer(ours, images(1, 3, 72, 72))  # 1x1 feature maps, as of the fixture, are NCHW and channels_last at once
    infer(ours, images(2, 3, 72, 72))  # single images may have another backend
    folds.clear()
    for shape in ((2, 3, 64, 64), (1, 3, 80, 64), (5, 3, 47, 65), (1, 3, 97, 40), (2, 3, 64, 64)):
        assert_infers_as(ours, theirs, images(*shape))
        assert_infers_as(ours, theirs, images(*shape).contiguous(memory_format=torch.channels_last))
    assert not folds
    block, plain = ours.layer2[0], theirs.layer2[0]
    for layout in (torch.contiguous_format, torch.channels_last, torch.contiguous_format):
        x = images(2, 64, 9, 9).contiguous(memory_format=layout)
        assert_infers_as(block, plain, x)
        assert infer(block, x).is_contiguous(memory_format=layout)


def test_dtypes_change_between_calls(pair: tuple[nn.Module, nn.Module]) -> None:
    ours, theirs = pair
    exact = infer(copy.deepcopy(theirs).double(), images().double())
    for enabled in (False, True, False, True):
        with torch.autocast("cpu", enabled=enabled):
            mine, other = infer(ours, images()), infer(theirs, images())
        assert mine.dtype == other.dtype
        budget = 2 * (other.double() - exact).norm() + 1e-6 * exact.norm()
        assert (mine.double() - exact).norm() <= budget


def test_switches_change_between_calls(pair: tuple[nn.Module, nn.Module], monkeypatch: pytest.MonkeyPatch) -> None:
    """mkldnn off, backends by name: never another backend's packed weights."""
    ours, theirs = pair
    with torch.backends.mkldnn.flags(enabled=False):
        assert_infers_as(ours, theirs)
    for backend in ("reference", "library", "auto"):
        with fr.use_backend(backend):
            assert_infers_as(ours, theirs)
    off, refused = (
        torch.backends.mkldnn.flags(enabled=False),
        pytest.raises(fr.BackendUnavailableError, match="disabled"),
    )
    with fr.use_backend("library"), off, refused:
        infer(ours, images())
    assert dispatch.requested() == "auto"
    assert_infers_as(ours, theirs)


def test_threads(torchvision: ModuleType) -> None:
    """Several threads call one model at once: from the first call on (each may fold), and while weights are dropped."""
    ours, theirs = (model.eval() for model in twins(torchvision, "basic"))
    inputs = [images(1 + seed % 2, 3, 32, 32, seed=seed) for seed in range(4)]
    expected = [infer(copy.deepcopy(ours), x) for x in inputs]
    start = threading.Barrier(5)
    failures: list[Any] = []

    def work(index: int) -> None:
        try:
            start.wait(30)
            for turn in range(6):
                with torch.inference_mode(turn % 2 == 0), torch.no_grad():
                    if not torch.equal(ours(inputs[index]), expected[index]):
                        failures.append((index, turn))
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    start.wait(30)
    for _ in range(20):
        fr.refresh(ours)
    for thread in threads:
        thread.join(60)
    assert not failures
    assert not any(thread.is_alive() for thread in threads)
    assert_infers_as(ours, theirs)


def test_a_write_while_folding(pair: tuple[nn.Module, nn.Module], monkeypatch: pytest.MonkeyPatch) -> None:
    """Another thread writes between the reading of the weights and the keeping: that fold must not last."""
    ours, theirs = pair
    fold = modules.fold

    def slow(weight: Tensor, *args: Any) -> Any:
        folded = fold(weight, *args)
        with torch.no_grad():
            weight.mul_(1.5)
        return folded

    fr.refresh(ours)
    with monkeypatch.context() as patch:
        patch.setattr(modules, "fold", slow)
        infer(ours, images())
    theirs.load_state_dict(ours.state_dict())
    assert_infers_as(ours, theirs)


def _tensors() -> tuple[int, int]:
    """(number, bytes) of the CPU tensors alive."""
    gc.collect()
    alive = [t for t in gc.get_objects() if issubclass(type(t), Tensor) and t.layout is torch.strided]
    return len(alive), sum(t.numel() * t.element_size() for t in alive)


@pytest.fixture
def quiet_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("quiet_collector")
def test_many_calls_keep_no_more_memory(pair: tuple[nn.Module, nn.Module]) -> None:
    """Nor do sizes, dtypes and weights that change at every call: one fold per unit and backend is kept, the last."""
    ours, _ = pair
    calls = [images(1 + n % 3, 3, 32 + 8 * (n % 4), 32, seed=n) for n in range(6)]
    counts = []
    for _ in range(3):
        for n, x in enumerate(calls):
            with torch.autocast("cpu", enabled=n % 2 == 1):
                infer(ours, x)
            with torch.no_grad():
                ours.layer1[0].conv1.weight.mul_(1.0)
                ours.layer1[0].conv2.weight = nn.Parameter(ours.layer1[0].conv2.weight.detach().clone())
        infer(ours, calls[0])
        counts.append(_tensors())
    assert counts[0] == counts[1] == counts[2]
    assert UNITS <= entries(ours) <= 2 * UNITS
    ours.eval()
    assert _tensors()[0] < counts[0][0], "eval() gives the memory back"


def test_kept_weights_are_not_used_by_programs(torchvision: ModuleType) -> None:
    """A compiled graph reads the parameters themselves: a change of theirs shows without recompiling."""
    torch._dynamo.reset()
    ours, theirs = (model.eval() for model in twins(torchvision, "basic"))
    block, plain = ours.layer1[0], theirs.layer1[0]
    x = images(1, 64, 8, 8)
    infer(block, x)
    compiled = torch.compile(block, fullgraph=True, backend="eager")
    infer(compiled, x)
    for model in (block, plain):
        with torch.no_grad():
            model.conv1.weight.mul_(-1)
            model.bn2.running_mean.add_(1)
    assert_infers_as(compiled, plain, x)
    torch._dynamo.reset()


def test_optimizer_steps_that_touch_no_version_counter(torchvision: ModuleType, folds: list[int]) -> None:
    """torch's fused optimizers and other packages' kernels; a step that torch counts costs no fold elsewhere."""

    class Foreign(torch.optim.Optimizer):
        def __init__(self, parameters: Any) -> None:
            super().__init__(parameters, {})

        def step(self) -> None:  # type: ignore[override]
            for parameter in self.param_groups[0]["params"]:
                parameter.data.mul_(2)

    ours, theirs = (model.eval() for model in twins(torchvision, "basic"))
    for model in (ours, theirs):
        infer(model, images())
        Foreign(model.parameters()).step()
    assert_infers_as(ours, theirs)
    other = nn.Linear(2, 2)
    other(torch.ones(1, 2)).sum().backward()
    folds.clear()
    torch.optim.SGD(other.parameters(), lr=0.1).step()
    infer(ours, images())
    assert not folds


@pytest.mark.parametrize("fused", [False, True])
def test_compiled_optimizers(fused: bool) -> None:
    """The cache watches the steps of optimizers; that must cause no recompilation, and compiled steps must be seen."""
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    model = fr.ConvBNAct(2, 2, 1).eval()
    infer(model, images(1, 2, 3, 3))  # from now on it watches
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, fused=fused, foreach=not fused)
    counter = CompileCounterWithBackend("aot_eager")
    step = torch.compile(optimizer.step, backend=counter)
    frames = []
    for _ in range(3):
        before = infer(model, images(1, 2, 3, 3))
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        step()
        frames.append(counter.frame_count)
        after = infer(model, images(1, 2, 3, 3))
        assert not torch.equal(before, after)
        assert torch.equal(after, infer(copy.deepcopy(model), images(1, 2, 3, 3)))
    assert frames[0] == frames[2]
    assert fused or frames[0] > 0
    torch._dynamo.reset()


def test_conv_bn_act_keeps_its_fold(folds: list[int]) -> None:
    module = fr.ConvBNAct(4, 6, 3).eval()
    randomise(module)
    x = images(1, 4, 5, 5).contiguous(memory_format=torch.channels_last)
    first = infer(module, x)
    assert torch.equal(infer(module, x), first)
    assert len(folds) == 1
    with torch.no_grad():
        module.bn.bias.add_(1)
    assert not torch.equal(infer(module, x), first)
    assert len(folds) == 2
