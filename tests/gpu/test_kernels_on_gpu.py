"""The Triton and the CUDA kernels on a GPU: parity, determinism, streams, graphs, 64-bit offsets; Triton's configs."""

from __future__ import annotations

import json
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import tolerances
import torch
from torch import Tensor
from torch.nn import functional as F

import fused_resnet as fr
from fused_resnet import dispatch, tuning
from fused_resnet.backends import cpp, reference, triton
from fused_resnet.backends.triton import configs

DEVICE = torch.device("cuda")
pytestmark = pytest.mark.gpu


def name_of(backend: ModuleType) -> str:
    return backend.__name__.rpartition(".")[2]


def needs(module: ModuleType) -> pytest.MarkDecorator:
    reason = module.unavailable("cuda")
    return pytest.mark.skipif(reason is not None, reason=f"{name_of(module)}: {reason}")


@pytest.fixture(params=[pytest.param(module, marks=needs(module)) for module in (triton, cpp)], ids=["triton", "cpp"])
def backend(request: pytest.FixtureRequest) -> ModuleType:
    return request.param


EPS = 1e-5
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FORMATS = {"nhwc": torch.channels_last, "nchw": torch.contiguous_format}
SHAPES = [
    pytest.param((32, 64, 56, 56), id="many rows"),
    pytest.param((16, 2048, 7, 7), id="many channels"),
    pytest.param((5, 67, 13, 9), id="ragged"),
]
Results = dict[str, Tensor]


def draw(shape: tuple[int, ...], dtype: torch.dtype, layout: str, seed: int = 0) -> Tensor:
    generator = torch.Generator(DEVICE).manual_seed(seed)
    values = torch.randn(shape, generator=generator, device=DEVICE, dtype=torch.float32)
    return values.to(dtype).contiguous(memory_format=FORMATS[layout])


def bn(channels: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> list[Tensor]:
    """gamma, beta, mean, var."""
    generator = torch.Generator(DEVICE).manual_seed(seed)
    drawn = [torch.randn(channels, generator=generator, device=DEVICE, dtype=torch.float64) for _ in range(4)]
    return [t.to(dtype) for t in (*drawn[:3], drawn[3].abs() + 0.5)]


def _named(**results: Any) -> Results:
    return {name: t for name, t in results.items() if isinstance(t, Tensor)}


def add_relu(module: Any, x: Tensor, y: Tensor, grad: Tensor) -> Results:
    return _named(out=module.add_relu_forward(x, y), grad=module.add_relu_backward(grad, y))


def bn_act(module: Any, x: Tensor, y: Tensor, grad: Tensor) -> Results:
    results: Results = {}
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    for name, shortcut in (("plain", None), ("residual", y)):
        gamma, beta, running_mean, running_var = bn(x.shape[1], wide)
        forward = (gamma, beta, running_mean, running_var, shortcut, 0.1, EPS, "relu")
        out, mean, var = module.bn_act_train_forward(x, *forward)
        # The same statistics and mask for every module.
        backward = (gamma, beta, *bn(x.shape[1], wide)[2:], EPS, "relu", name == "plain", shortcut is not None)
        gx, gg, gb, gr = module.bn_act_backward(grad, x, shortcut, *backward)
        found = _named(out=out, mean=mean, var=var, rm=running_mean, rv=running_var, gx=gx, gg=gg, gb=gb, gr=gr)
        results |= {f"{name} {key}": t for key, t in found.items()}
    return results | {"eval": module.bn_act_eval_forward(x, *bn(x.shape[1], wide), y, EPS, "relu")}


def bn_bn_act(module: Any, x: Tensor, y: Tensor, grad: Tensor) -> Results:
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    one, two = (bn(x.shape[1], wide, seed) for seed in (0, 1))
    forward = module.bn_bn_act_train_forward(x, *one, 0.1, EPS, y, *two, 0.1, EPS, "relu")
    one, two = (bn(x.shape[1], wide, seed) for seed in (0, 1))
    backward = module.bn_bn_act_backward(grad, x, *one, EPS, y, *two, EPS, "relu")
    return {str(i): t for i, t in enumerate((*forward, *backward))}


def bn_act_pool(module: Any, x: Tensor, y: Tensor, grad: Tensor) -> Results:
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    out, offsets, mean, var = module.bn_act_pool_train_forward(x, *bn(x.shape[1], wide), 0.1, EPS, "relu", True)
    given = bn(x.shape[1], wide)
    y = reference.bn_act_eval_forward(x, *given[:2], mean, var, None, EPS, "relu")
    chosen = y.flatten(2).gather(2, reference.pool_indices(offsets, x.shape[3]).flatten(2)).view(out.shape)
    windows = grad[:, :, : out.shape[2], : out.shape[3]].contiguous(
        memory_format=torch.contiguous_format if x.is_contiguous() else torch.channels_last
    )
    middle = torch.full_like(windows, 4, dtype=torch.uint8)
    middle[:, :, 1:, 1:] = 0
    gx, gg, gb = module.bn_act_pool_backward(windows, middle, x, *given, EPS, "relu", True)
    return _named(out=out, chosen=chosen, mean=mean, var=var, gx=gx, gg=gg, gb=gb)


OPS = [add_relu, bn_act, bn_bn_act, bn_act_pool]


def run(op: Callable[..., Results], module: Any, tensors: list[Tensor]) -> Results:
    with torch.no_grad():
        return op(module, *(t.clone() for t in tensors))


def assert_in_budget(op: Callable[..., Results], backend: Any, tensors: list[Tensor]) -> None:
    ours, plain = run(op, backend, tensors), run(op, reference, tensors)
    exact = run(op, reference, [t.double() for t in tensors])
    rows = tensors[0].numel() // tensors[0].shape[1]
    for name, value in ours.items():
        # Sums over rows pass through values that grow with the root of the number of rows.
        scale = 40.0 if value.dim() == 4 else 40.0 * rows**0.5
        tolerances.assert_in_budget(f"{op.__name__} {name}", value, plain[name], exact[name], scale)


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", OPS)
def test_parity(op, dtype, shape, layout, backend):
    assert_in_budget(op, backend, [draw(shape, dtype, layout, seed) for seed in range(3)])


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", OPS)
@needs(triton)
def test_every_config(op, dtype, layout):
    """A config may be chosen by tuning: each must be right."""
    tensors = [draw((8, 64, 28, 28), dtype, layout, seed) for seed in range(3)]
    problems: dict[str, configs.Key] = {}
    pick = configs.pick

    def noting(kernel: str, key: configs.Key, x: Tensor) -> configs.Config:
        problems[kernel] = key
        return pick(kernel, key, x)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(configs, "pick", noting)
        run(op, triton, tensors)
    for kernel, key in problems.items():
        for config in configs.candidates(kernel, key, configs.target(tensors[0])):
            with configs.override(kernel, config):
                assert_in_budget(op, triton, tensors)


@pytest.mark.parametrize("op", OPS)
def test_results_repeat_bit_for_bit(op, backend):
    tensors = [draw((64, 64, 56, 56), torch.bfloat16, "nhwc", seed) for seed in range(3)]
    first = run(op, backend, tensors)
    for _ in range(3):
        for name, value in run(op, backend, tensors).items():
            assert torch.equal(value, first[name]), name


@pytest.mark.parametrize("op", OPS)
def test_nothing_waits_for_the_device(op, backend):
    tensors = [draw((4, 64, 28, 28), torch.float32, "nhwc", seed) for seed in range(3)]
    run(op, backend, tensors)  # compiles
    torch.cuda.synchronize()
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        x = tensors[0]
        vectors = bn(64)
        momentum = torch.full((), 0.1, device=DEVICE)
        backend.bn_act_train_forward(x, *vectors, None, momentum, EPS, "relu")
        backend.add_relu_backward(x, backend.add_relu_forward(x, x))
    finally:
        torch.cuda.set_sync_debug_mode(before)


def test_other_streams(backend):
    x = draw((16, 64, 56, 56), torch.bfloat16, "nhwc")
    expected = run(bn_act, backend, [x, x, x])
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        late = x + 0  # made on this stream: a kernel on another would come too early
        torch.cuda._sleep(10_000_000)
        late = late * 1
        got = run(bn_act, backend, [late, late, late])
    torch.cuda.current_stream().wait_stream(stream)
    for name, value in got.items():
        assert torch.equal(value, expected[name]), name


@needs(cpp)
@pytest.mark.parametrize("shape", [(1000, 72), (50000, 64), (12544, 512)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_second_moments(dtype, shape):
    rows = (torch.randn(shape, device=DEVICE) * 2 + 30).to(dtype)
    (mean, moments), (_, plain) = cpp.second_moments(rows), reference.second_moments(rows)
    exact_mean, exact = reference.second_moments(rows.double())
    torch.testing.assert_close(mean.double(), exact_mean, rtol=4e-7, atol=0)
    size = exact.diagonal().sqrt() * exact.diagonal().sqrt()[:, None]
    error, allowed = (((t - exact).abs() / size).max() for t in (moments, plain))
    assert error <= 2 * allowed + 4e-7
    assert torch.equal(moments, moments.t())
    assert torch.equal(moments, cpp.second_moments(rows)[1])


@needs(cpp)
def test_the_kernels_of_csrc_run():
    x = draw((4, 64, 28, 28), torch.float32, "nhwc")
    run(bn_act, cpp, [x, x, x])
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        cpp.bn_act_train_forward(x, *bn(64), x, 0.1, EPS, "relu")
        torch.cuda.synchronize()
    names = [event.key for event in profile.key_averages() if "_kernel" in event.key]
    for kernel in ("statistics_kernel", "statistics_finish_kernel", "apply_kernel"):
        assert any(kernel in name for name in names), names


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_other_devices(backend):
    x = draw((4, 64, 28, 28), torch.float32, "nhwc")
    other = x.to("cuda:1")
    assert torch.equal(backend.add_relu_forward(other, other).cpu(), backend.add_relu_forward(x, x).cpu())
    assert torch.cuda.current_device() == 0


def test_cuda_graphs(backend):
    x = draw((16, 64, 28, 28), torch.bfloat16, "nhwc")
    gamma, beta, mean, var = bn(64)

    def step() -> tuple[Tensor, ...]:
        return backend.bn_act_train_forward(x, gamma, beta, mean, var, None, 0.1, EPS, "relu")

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, *_ = step()
    x.copy_(draw(tuple(x.shape), torch.bfloat16, "nhwc", seed=5))
    before = mean.clone()
    graph.replay()
    assert torch.equal(out, backend.bn_act_train_forward(x, gamma, beta, None, None, None, 0.1, EPS, "relu")[0])
    assert not torch.equal(mean, before)


def test_nothing_is_checked_during_capture(backend, monkeypatch):
    monkeypatch.setattr(backend, "_tested", {})
    monkeypatch.setitem(dispatch.AUTOMATIC["cuda"], "add_relu", (name_of(backend), "reference"))
    x = draw((4, 64, 8, 8), torch.float32, "nhwc")
    chosen = []
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        chosen.append(dispatch.choose("add_relu_forward", x))
        x + x
    assert chosen[0].backend == "reference"
    assert "captured" in chosen[0].skipped[0][1]
    assert dispatch.choose("add_relu_forward", x).backend == name_of(backend)


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", ["add_relu", "bn_act", "bn_bn_act", "bn_act_pool"])
def test_the_self_check_passes(op, dtype, layout, backend, monkeypatch):
    monkeypatch.setattr(backend, "_tested", {})
    assert backend.untested(op, draw((2, 2, 2, 2), dtype, layout)) is None


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compiled_equals_eager(compiler, backend):
    x = draw((8, 64, 28, 28), torch.float32, "nhwc").requires_grad_()
    gamma, beta, _, _ = bn(64)

    def stem(x: Tensor) -> Tensor:
        y = fr.ops.bn_act(x, gamma, beta, None, None, training=True)
        y = fr.ops.add_relu(y, x)
        return fr.ops.bn_act_pool(y, gamma, beta, None, None, training=True)

    with fr.use_backend(name_of(backend)):
        eager = stem(x)
        compiled = torch.compile(stem, backend=compiler, fullgraph=True)(x)
    torch.testing.assert_close(compiled, eager)
    grads = [torch.autograd.grad(out.square().sum(), x)[0] for out in (eager, compiled)]
    torch.testing.assert_close(grads[1], grads[0])


def test_more_than_2_31_elements(backend):
    """Offsets are 64-bit: NHWC and NCHW, at the far end of the tensor."""
    need = 5 * (2**31 + 2**27) * 2
    free, _ = torch.cuda.mem_get_info()
    if free < 1.2 * need:
        pytest.skip(f"needs {need / 2**30:.0f} GiB of free GPU memory, {free / 2**30:.0f} are there")
    for layout in FORMATS:
        shape = (43, 64, 900, 900)  # 2.2e9 elements
        x = torch.zeros(shape, dtype=torch.float16, device=DEVICE).contiguous(memory_format=FORMATS[layout])
        x[-1] = torch.randn(shape[1:], device=DEVICE).half()
        last = x[-1:].contiguous(memory_format=FORMATS[layout])
        gamma, beta, mean, var = bn(64)
        args = (gamma, beta, mean, var)
        out = backend.bn_act_eval_forward(x, *args, None, EPS, "relu")
        expected = backend.bn_act_eval_forward(last, *args, None, EPS, "relu")
        assert torch.equal(out[-1:], expected)
        del out
        pooled, offsets = backend.bn_act_pool_eval_forward(x, *args, EPS, "relu", True)
        expected, expected_offsets = backend.bn_act_pool_eval_forward(last, *args, EPS, "relu", True)
        assert torch.equal(pooled[-1:], expected)
        assert torch.equal(offsets[-1:], expected_offsets)
        mean_of_all = backend.bn_act_train_forward(x, None, None, None, None, None, 0.1, EPS, None)[1]
        torch.testing.assert_close(mean_of_all * 43, last.float().mean((0, 2, 3)), rtol=1e-3, atol=1e-4)
        del x, last, pooled, offsets
        torch.cuda.empty_cache()


def test_the_stem_keeps_no_rectified_tensor(backend):
    x = draw((32, 64, 112, 112), torch.bfloat16, "nhwc").requires_grad_()
    gamma, beta, mean, var = bn(64)
    with fr.use_backend(name_of(backend)):
        fr.ops.bn_act_pool(x, gamma, beta, mean, var, training=True)  # compiles
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        out = fr.ops.bn_act_pool(x, gamma, beta, mean, var, training=True)
    kept = torch.cuda.max_memory_allocated() - before
    assert kept < out.nbytes + out.numel() + 4 * 2**20  # the pooled output, a byte beside each value, vectors
    plain = F.max_pool2d(F.relu(F.batch_norm(x, None, None, gamma.to(x), beta.to(x), True)), 3, 2, 1)
    torch.testing.assert_close(out, plain, rtol=2e-2, atol=2e-2)


@needs(triton)
def test_tuning_on_this_device(tmp_path, monkeypatch):
    monkeypatch.setenv("FUSED_RESNET_CACHE", str(tmp_path))
    monkeypatch.setattr(configs, "_tables", {})
    monkeypatch.setattr(configs, "_picked", {})
    x = draw((8, 64, 28, 28), torch.bfloat16, "nhwc")
    model = torch.nn.Sequential(fr.BNAct(64), fr.BNAct(64, activation=None)).to(DEVICE, torch.bfloat16)
    outcomes = list(tuning.tune(tuning.record(tuning.workload(model, x)), progress=False))
    assert {outcome.kernel for outcome in outcomes} >= {"bn_statistics", "bn_apply", "bn_backward_apply"}
    assert all(outcome.best_ms <= outcome.default_ms < float("inf") for outcome in outcomes)
    (path,) = tmp_path.glob("*.json")
    assert json.loads(path.read_text())["device"] == torch.cuda.get_device_name()
    for outcome in outcomes:
        assert configs.pick(outcome.kernel, outcome.key, x) == outcome.config
