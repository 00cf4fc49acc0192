"""Whole networks on a GPU: 50 training steps beside torchvision, poisoned memory, two streams, captured steps, another
device. The bodies take a device, so that the CPU can hold their logic to the same expectations."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fused_resnet as fr

GPU = torch.device("cuda")
gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU is available")]
on_gpu = lambda test: pytest.mark.gpu(gpu[1](test))  # noqa: E731


def batch(device: torch.device, count: int, size: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Images whose class shows in their mean colour, so that there is something to learn."""
    random = torch.Generator().manual_seed(seed)
    target = torch.randint(0, 8, (count,), generator=random)
    x = torch.randn(count, 3, size, size, generator=random)
    x += torch.stack([target % 2, target // 2 % 2, target // 4], 1).float().view(-1, 3, 1, 1)
    return x.to(device, memory_format=torch.channels_last), target.to(device)


def losses(net: nn.Module, device: torch.device, steps: int, dtype: torch.dtype, size: int, count: int) -> list[float]:
    net = net.to(device, memory_format=torch.channels_last).train()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.005, momentum=0.9)
    found = []
    for step in range(steps):
        x, target = batch(device, count, size, step)
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
            loss = F.cross_entropy(net(x), target)
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found


def check_training(
    torchvision: ModuleType, device: torch.device, model: str, dtype: torch.dtype, steps: int, size: int, count: int
) -> None:
    """The first loss shows the forward, the second the gradients; then curves are compared, not numbers, since rounding
    grows tenfold or more with each step, in torch's own run beside float64 too."""
    torch.manual_seed(0)
    theirs = getattr(torchvision.models, model)(num_classes=8)
    ours = getattr(fr, model)(num_classes=8)
    ours.load_state_dict(theirs.state_dict())
    one, two = (torch.tensor(losses(net, device, steps, dtype, size, count)) for net in (ours, theirs))
    for index, bound in enumerate((1e-5, 5e-3) if dtype == torch.float32 else (2e-2, 5e-2)):
        torch.testing.assert_close(one[index], two[index], rtol=bound, atol=0)
    tail = max(1, steps // 5)
    assert one.isfinite().all()
    assert (one[-tail:].mean() - two[-tail:].mean()).abs() < 0.25 * two[0]
    assert one[-tail:].mean() < 0.7 * one[0], "it learns"


@on_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("model", ["resnet18", "resnet50"])
def test_fifty_steps_beside_torchvision(torchvision: ModuleType, model: str, dtype: torch.dtype) -> None:
    check_training(torchvision, GPU, model, dtype, steps=50, size=96, count=64)


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fresh memory holds NaN: the caching allocator's free blocks are filled, and torch fills what it allocates."""
    before = torch.are_deterministic_algorithms_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    if torch.cuda.is_available():
        free, _ = torch.cuda.mem_get_info()
        junk = [
            torch.full((n,), torch.nan, device=GPU)
            for n in (1 << 8, 1 << 16, 1 << 20, 1 << 24, min(1 << 28, free // 16))
        ]
        del junk
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before)
    torch.utils.deterministic.fill_uninitialized_memory = fill


def step(net: nn.Module, x: Tensor, target: Tensor, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    net.zero_grad(set_to_none=True)
    with torch.autocast(x.device.type, dtype=dtype, enabled=dtype != torch.float32):
        loss = F.cross_entropy(net(x), target)
    loss.backward()
    return {"loss": loss.detach()} | {name: p.grad for name, p in net.named_parameters() if p.grad is not None}


def check_poisoned(device: torch.device, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    net = fr.resnet18(num_classes=8).to(device, memory_format=torch.channels_last)
    x, target = batch(device, 3, 75)  # odd sizes all the way down
    found = step(net, x, target, dtype)
    assert len(found) == 1 + len(list(net.parameters()))
    assert all(value.isfinite().all() for value in found.values())
    assert all(buffer.isfinite().all() for buffer in net.buffers())
    with torch.no_grad():
        assert net.eval()(x).isfinite().all()


@on_gpu
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_poisoned_memory(dtype: torch.dtype) -> None:
    check_poisoned(GPU, dtype)


@on_gpu
def test_two_streams_at_once() -> None:
    """Two networks train on streams of their own at the same time; each gets what it gets alone."""
    torch.manual_seed(0)
    nets = [fr.resnet18(num_classes=8).to(GPU, memory_format=torch.channels_last) for _ in range(2)]
    inputs = [batch(GPU, 16, 64, seed) for seed in (0, 1)]
    alone = [step(copy.deepcopy(net), *given) for net, given in zip(nets, inputs, strict=True)]
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    together: list[dict[str, Tensor]] = []
    for net, given, stream in zip(nets, inputs, streams, strict=True):
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            torch.cuda._sleep(20_000_000)  # both queues are full before either runs
            together.append(step(net, *given))
    torch.cuda.synchronize()
    assert_close_each(together, alone)


def assert_close_each(found: list[dict[str, Tensor]], expected: list[dict[str, Tensor]]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert one.keys() == other.keys()
        for name, value in one.items():
            error = torch.linalg.vector_norm(value - other[name]) / torch.linalg.vector_norm(other[name])
            assert error < 1e-3, f"{name}: {error:.1e}"


@on_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_captured_training_step(dtype: torch.dtype) -> None:
    """Captured once and replayed on new images, a step gives the losses that eager steps give."""
    torch.manual_seed(0)
    net = fr.resnet18(num_classes=8).to(GPU, memory_format=torch.channels_last).train()
    eager = copy.deepcopy(net)
    x, target = batch(GPU, 16, 64)
    optimizers = [torch.optim.SGD(one.parameters(), lr=0.01, momentum=0.9) for one in (net, eager)]

    def run(one: nn.Module, optimizer: Any) -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cuda", dtype=dtype, enabled=dtype != torch.float32):
            loss = F.cross_entropy(one(x), target)
        loss.backward()
        optimizer.step()
        return loss.detach()

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run(net, optimizers[0])
    torch.cuda.current_stream().wait_stream(stream)
    for _ in range(3):
        run(eager, optimizers[1])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = run(net, optimizers[0])
    for seed in range(1, 6):
        for to, new in zip((x, target), batch(GPU, 16, 64, seed), strict=True):
            to.copy_(new)
        graph.replay()
        expected = run(eager, optimizers[1])
        torch.testing.assert_close(loss, expected, rtol=1e-2 if dtype == torch.float32 else 5e-2, atol=1e-3)
    for name, buffer in net.named_buffers():
        if name.endswith("num_batches_tracked"):
            assert int(buffer) == int(eager.get_buffer(name)) == 3 + 5, name


@on_gpu
def test_a_captured_inference_reads_new_images() -> None:
    net = fr.resnet50(num_classes=8).to(GPU, torch.float16, memory_format=torch.channels_last).eval()
    x = batch(GPU, 4, 96)[0].half()
    with torch.no_grad():
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                net(x)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = net(x)
        x.copy_(batch(GPU, 4, 96, seed=7)[0])
        graph.replay()
        torch.testing.assert_close(out, net(x), rtol=1e-2, atol=1e-2)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason=f"needs two GPUs, {torch.cuda.device_count()} are there")
def test_the_second_device() -> None:
    """While the first is current, a step on the second is the step on the first."""
    torch.manual_seed(0)
    net = fr.resnet18(num_classes=8)
    found = []
    for index in (0, 1):
        device = torch.device("cuda", index)
        given = [t.to(device) for t in batch(torch.device("cpu"), 8, 64)]
        result = step(copy.deepcopy(net).to(device, memory_format=torch.channels_last), *given)
        assert all(value.device == device for value in result.values())
        found.append({name: value.cpu() for name, value in result.items()})
    assert torch.cuda.current_device() == 0
    assert_close_each(found[1:], found[:1])


@on_gpu
def test_more_than_2_31_elements_in_a_training_step() -> None:
    """One BN + residual + ReLU over 2.2e9 elements, forward and backward: the last image as if it were alone."""
    shape = (43, 64, 900, 900)
    need = 8 * 2 * 43 * 64 * 900 * 900
    free, _ = torch.cuda.mem_get_info()
    if free < need:
        pytest.skip(f"needs {need / 2**30:.0f} GiB of free GPU memory, {free / 2**30:.0f} are there")
    x = torch.zeros(shape, dtype=torch.float16, device=GPU).contiguous(memory_format=torch.channels_last)
    x[-1].normal_()
    bn = [torch.rand(64, device=GPU) + 0.5 for _ in range(4)]
    last = x[-1:].clone(memory_format=torch.channels_last)
    results = []
    for images in (x, last):
        images.requires_grad_()
        out = fr.ops.bn_act(images, *bn, images.detach(), training=False)
        out[-1:].float().sum().backward()
        assert images.grad is not None
        results.append((out[-1:].detach(), images.grad[-1:].clone()))
        images.grad = None
        del out
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)


def test_bodies_on_the_cpu(torchvision: ModuleType, poison: None) -> None:
    """What the GPU tests check holds on the CPU too: their expectations are right."""
    cpu = torch.device("cpu")
    check_poisoned(cpu, torch.float32)
    torch.manual_seed(0)
    net = fr.resnet18(num_classes=8)
    given = batch(cpu, 8, 64)
    found = [step(copy.deepcopy(net), *given) for _ in range(2)]
    assert_close_each(found[1:], found[:1])
    with pytest.raises(AssertionError, match="loss"):
        assert_close_each([{"loss": torch.tensor(1.0)}], [{"loss": torch.tensor(1.1)}])


@pytest.mark.slow
def test_training_body_on_the_cpu(torchvision: ModuleType) -> None:
    check_training(torchvision, torch.device("cpu"), "resnet18", torch.float32, steps=25, size=32, count=32)
