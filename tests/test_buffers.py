"""Memory that networks keep for outputs: nothing that somebody holds is written over, nothing is kept for long."""

from __future__ import annotations

import contextlib
import copy
import gc
import pickle
import threading
from collections.abc import Callable

import pytest
import torch
from networks import images, randomise
from torch import Tensor, nn

import fused_resnet as fr
from fused_resnet import buffers
from fused_resnet.backends import cpp

pytestmark = pytest.mark.skipif(cpp.conv_unavailable() is not None, reason=str(cpp.conv_unavailable()))


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(buffers, "_LEAST", 0)


def kept(model: nn.Module) -> list[int]:
    """The sizes of what a network keeps and no tensor uses."""
    return model._outputs.kept()


def net(frozen: bool) -> nn.Module:
    model = fr.ResNet(fr.Bottleneck, [1, 1, 1, 1], num_classes=10).eval()
    randomise(model)
    model.eval()
    return fr.freeze(model) if frozen else model


@pytest.mark.parametrize("frozen", [False, True])
@torch.no_grad()
def test_memory_is_used_again(frozen: bool) -> None:
    model, x = net(frozen), images(2, 3, 64, 64)
    first = model(x).clone()  # which packs the weights too
    for _ in range(3):
        model(x)  # two calls do without what the first took besides
    before = sorted(kept(model))
    assert before
    for _ in range(3):
        assert torch.equal(model(x), first)
        assert sorted(kept(model)) == before


@torch.no_grad()
def test_what_somebody_holds_is_not_written_over() -> None:
    """Feature maps, views of them and NumPy arrays, which a model of another's gives out of the middle."""

    class Maps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 32, 3, padding=1), nn.Conv2d(32, 32, 3, padding=1)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            first = self.a(x).relu()
            return first, self.b(first).relu()

    model = fr.freeze(Maps().eval())
    held = []
    for seed in range(4):
        first, second = model(images(2, 3, 16, 16, seed=seed))
        held.append((first[:, 3:5], second.numpy(), first.clone(), second.clone()))
        del first, second
    for view, array, first, second in held:
        assert torch.equal(view, first[:, 3:5])
        assert torch.equal(torch.from_numpy(array), second)


@torch.no_grad()
def test_what_two_calls_do_not_take_is_dropped() -> None:
    model = net(frozen=False)
    model(images(4, 3, 64, 64))
    large = max(kept(model))
    for _ in range(3):
        model(images(1, 3, 64, 64))
    assert 0 < max(kept(model)) < large
    count = len(kept(model))
    for _ in range(20):
        model(images(1, 3, 64, 64))
    assert len(kept(model)) == count


@pytest.mark.parametrize("again", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
@torch.no_grad()
def test_copies_and_files_have_none(again: Callable[[nn.Module], nn.Module]) -> None:
    model, x = net(frozen=False), images(1, 3, 64, 64)
    out = model(x)
    assert kept(model)
    twin = again(model)
    assert not kept(twin)
    assert torch.equal(twin(x), out)


def test_threads_at_once() -> None:
    model = net(frozen=True)
    inputs = [images(2, 3, 64, 64, seed=seed) for seed in range(3)]
    with torch.no_grad():
        expected = [model(x) for x in inputs]
    wrong: list[int] = []

    def run(index: int) -> None:
        with torch.no_grad():
            wrong.extend(index for _ in range(10) if not torch.equal(model(inputs[index]), expected[index]))

    threads = [threading.Thread(target=run, args=(index,)) for index in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def step(model: nn.Module, x: Tensor) -> list[Tensor]:
    model.zero_grad()
    model(x).square().sum().backward()
    return [p.grad.clone() for p in model.parameters()]


def test_training_takes_the_same_memory_at_each_step() -> None:
    """Forward and backward; what is kept between steps does not grow, and gradients are those of new memory."""
    model, x = net(frozen=False).train(), images(2, 3, 64, 64)
    plain = copy.deepcopy(model)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(buffers.Buffers, "active", lambda self: contextlib.nullcontext())
        expected = [step(plain, x) for _ in range(4)]
    assert not kept(plain)
    sizes = []
    for i in range(4):
        assert all(map(torch.equal, step(model, x), expected[i]))
        sizes.append(sorted(kept(model)))
    assert sizes[1]
    assert sizes[1] == sizes[2] == sizes[3]


def test_saved_tensors_outlive_the_forward() -> None:
    """Two graphs at once, a second backward of a kept one, and a graph whose network is gone."""
    model, inputs = net(frozen=False).train(), [images(2, 3, 64, 64, seed=seed) for seed in range(3)]
    expected = [step(copy.deepcopy(model), x) for x in inputs]
    losses = [model(x).square().sum() for x in inputs]
    parameters = list(model.parameters())
    for loss, grads in zip(losses[:2], expected, strict=False):
        for _ in range(2):
            found = torch.autograd.grad(loss, parameters, retain_graph=True)
            assert all(map(torch.equal, found, grads))
    del model
    found = torch.autograd.grad(losses[2], parameters)
    assert all(map(torch.equal, found, expected[2]))


def test_a_change_of_mode_gives_it_back() -> None:
    model = net(frozen=False).train()
    step(model, images(2, 3, 64, 64))
    assert kept(model)
    model.eval()
    assert not kept(model)


def test_outside_of_a_network_tensors_are_new() -> None:
    x = images(1, 32, 8, 8)
    one, two = (cpp._ops.new_images(x, 1, 32, 8, 8) for _ in range(2))
    assert one.data_ptr() != two.data_ptr()
    assert one.is_contiguous(memory_format=torch.channels_last)


def test_pools_within_pools() -> None:
    """The inner one serves, then the outer one again; each gets back what it gave."""
    x, (outer, inner) = images(1, 32, 8, 8), (buffers.Buffers(), buffers.Buffers())
    with outer.reused():
        first = cpp._ops.new_images(x, 1, 32, 8, 8)
        with inner.reused():
            second = cpp._ops.new_images(x, 2, 32, 8, 8)
        third = cpp._ops.new_images(x, 3, 32, 8, 8)
        assert buffers.current() is outer
    assert buffers.current() is None
    del first, third
    assert outer.kept() == [32768]
    assert not inner.kept()
    del second
    assert inner.kept() == [16384]
    inner.clear()
    assert not inner.kept()


def test_memory_serves_tensors_of_any_size() -> None:
    """Blocks that come and go in any order never overlap, and what they leave grows together again."""
    pool, x, random = buffers.Buffers(), torch.empty(0), torch.Generator().manual_seed(7)
    held: dict[int, Tensor] = {}
    with pool.reused():
        large = cpp._ops.new_images(x, 1, 64, 64, 64).fill_(1)  # 1 MiB
        del large
        for i in range(300):
            if len(held) == 8:
                del held[list(held)[int(torch.randint(8, (), generator=random))]]
            height = int(torch.randint(1, 33, (), generator=random))  # up to 128 KiB each
            held[i] = cpp._ops.new_images(x, 1, 32, height, 32).fill_(i)
            assert all(torch.all(tensor == number) for number, tensor in held.items())
        held.clear()
    assert pool.kept() == [1 << 20]


def test_a_tensor_outlives_its_pool() -> None:
    pool = buffers.Buffers()
    with pool.reused():
        held = cpp._ops.new_images(images(1, 32, 8, 8), 1, 32, 8, 8).fill_(3)
    del pool
    gc.collect()
    assert torch.all(held == 3)


def test_pooled_memory_is_like_any_other() -> None:
    """Views, NumPy, in-place operations, pickles, sharing with processes."""
    pool, x = buffers.Buffers(), images(1, 32, 8, 8)
    with pool.reused():
        y = cpp._ops.new_images(x, 1, 32, 8, 8).fill_(2)
    array, view = y.numpy(), y[:, 4:6]
    y.add_(1)
    assert (array == 3).all()
    assert torch.equal(pickle.loads(pickle.dumps(y)), y)
    assert torch.equal(copy.deepcopy(y), y)
    y.share_memory_()
    del y
    assert torch.all(view == 3)


def test_unknown_pools_are_refused() -> None:
    with pytest.raises(RuntimeError, match="no memory pool 123456"):
        cpp._ops.pool_activate(123456)
