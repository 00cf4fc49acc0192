"""Memory that networks keep for outputs: nothing that somebody holds is written over, nothing is kept for long."""

from __future__ import annotations

import copy
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


def kept(model: nn.Module) -> list[torch.UntypedStorage]:
    pool = model._outputs._threads.__dict__.get("pool")
    return [] if pool is None else [storage for storage, _ in pool.taken]


def net(frozen: bool) -> nn.Module:
    model = fr.ResNet(fr.Bottleneck, [1, 1, 1, 1], num_classes=10).eval()
    randomise(model)
    model.eval()
    return fr.freeze(model) if frozen else model


@pytest.mark.parametrize("frozen", [False, True])
@torch.no_grad()
def test_storages_are_used_again(frozen: bool) -> None:
    model, x = net(frozen), images(2, 3, 64, 64)
    first = model(x)
    addresses = {storage.data_ptr() for storage in kept(model)}
    assert addresses
    assert torch.equal(model(x), first)
    assert {storage.data_ptr() for storage in kept(model)} == addresses


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
    large = max(storage.nbytes() for storage in kept(model))
    for _ in range(3):
        model(images(1, 3, 64, 64))
    assert 0 < max(storage.nbytes() for storage in kept(model)) < large
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


def test_threads_have_their_own() -> None:
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


def test_training_keeps_nothing() -> None:
    model = net(frozen=False)
    model(images(2, 3, 64, 64)).sum().backward()
    assert not kept(model)


def test_outside_of_a_network_tensors_are_new() -> None:
    x = images(1, 32, 8, 8)
    one, two = (buffers.empty(x, 1, 32, 8, 8) for _ in range(2))
    assert one.data_ptr() != two.data_ptr()
    assert one.is_contiguous(memory_format=torch.channels_last)
