"""Batch norm over several processes, against one process that sees the whole batch."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from networks import images, randomise
from processes import on_processes
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import fused_resnet as fr
from fused_resnet import dispatch
from fused_resnet.convert import unfused_units
from fused_resnet.sync_batchnorm import SyncBatchNorm

# The op

CASES = [  # dtype, layout, residual, activation, gamma, sizes of the parts
    (torch.float64, "nchw", True, "relu", True, (3, 1)),
    (torch.float64, "channels_last", True, None, True, (1, 4)),
    (torch.float32, "channels_last", True, "relu", False, (2, 2)),
    (torch.float32, "nchw", False, "relu", True, (0, 3)),
    (torch.bfloat16, "channels_last", False, "relu", True, (2, 3)),
    (torch.float16, "nchw", True, "relu", True, (5, 2)),
]
Case = tuple[torch.dtype, str, bool, "str | None", bool, tuple[int, int]]


def _op_inputs(case: Case) -> dict[str, Any]:
    dtype, layout, residual, _, affine, sizes = case
    g = torch.Generator().manual_seed(7)
    shape = (sum(sizes), 5, 7, 9)
    form = torch.channels_last if layout == "channels_last" else torch.contiguous_format

    def tensor() -> Tensor:
        return (torch.randn(shape, generator=g, dtype=torch.float64) * 2 + 3).to(dtype).contiguous(memory_format=form)

    def vector() -> Tensor:
        value = torch.randn(5, generator=g, dtype=torch.float64)
        return value.to(dtype if dtype == torch.float64 else torch.float32)

    return {
        "x": tensor(),
        "residual": tensor() if residual else None,
        "cotangent": tensor(),
        "gamma": vector() if affine else None,
        "beta": vector() if affine else None,
        "mean": vector(),
        "var": vector().abs() + 0.5,
    }


def _step(run: Callable[..., Tensor], t: dict[str, Any], part: slice = slice(None)) -> dict[str, Tensor]:
    """Results and gradients of one call on a part of the batch."""
    leaves = {k: v[part] if k in ("x", "residual") else v for k, v in t.items() if v is not None}
    for name in ("x", "residual", "gamma", "beta"):
        if name in leaves:
            leaves[name] = leaves[name].detach().clone(memory_format=torch.preserve_format).requires_grad_()
    mean, var = t["mean"].clone(), t["var"].clone()
    out = run(leaves["x"], leaves.get("gamma"), leaves.get("beta"), mean, var, leaves.get("residual"))
    out.backward(t["cotangent"][part])
    grads = {f"grad {n}": leaves[n].grad for n in ("x", "residual", "gamma", "beta") if n in leaves}
    return {"out": out.detach(), "mean": mean, "var": var} | grads


def _op_part(rank: int, world: int, case: Case) -> dict[str, Tensor]:
    sizes = case[-1]
    start = sum(sizes[:rank])

    def run(*args: Any) -> Tensor:
        return fr.ops.sync_bn_act(*args, activation=case[3], momentum=0.3)

    return _step(run, _op_inputs(case), slice(start, start + sizes[rank]))


def _all_parts(rank: int, world: int) -> dict[str, Any]:
    """One start of two processes for every test that needs two."""
    return {"op": [_op_part(rank, world, case) for case in CASES], "network": _train_part(rank, world)}


def _whole(case: Case, dtype: torch.dtype | None) -> dict[str, Tensor]:
    """By torch alone in one process; in another dtype where one is given."""
    t = {k: v if v is None or dtype is None else v.to(dtype) for k, v in _op_inputs(case).items()}

    def run(x: Tensor, gamma: Any, beta: Any, mean: Tensor, var: Tensor, residual: Any) -> Tensor:
        y = torch.nn.functional.batch_norm(x, mean, var, gamma, beta, True, 0.3)
        y = y if residual is None else y + residual
        return torch.relu(y) if case[3] == "relu" else y

    return _step(run, t)


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return on_processes(2, tmp_path_factory.mktemp("two"), _all_parts)


@pytest.fixture(scope="module")
def op_parts(two_processes: list[dict[str, Any]]) -> list[list[dict[str, Tensor]]]:
    return [part["op"] for part in two_processes]


@pytest.mark.parametrize("index", range(len(CASES)))
def test_op_is_batch_norm_of_the_whole_batch(op_parts: list[list[dict[str, Tensor]]], index: int) -> None:
    case = CASES[index]
    parts = [rank[index] for rank in op_parts]
    exact, plain = _whole(case, torch.float64), _whole(case, None)
    for name, truth in exact.items():
        if name in ("out", "grad x", "grad residual"):
            ours = torch.cat([part[name] for part in parts])
        elif name.startswith("grad"):
            ours = parts[0][name].double() + parts[1][name].double()  # each process has its part
        else:
            assert torch.equal(parts[0][name], parts[1][name]), f"{name} differs between processes"
            ours = parts[0][name]
        scale = truth.abs().max()
        error, torchs = ((value.double() - truth).abs().max() / scale for value in (ours, plain[name]))
        tiny = 1e-12 if case[0] == torch.float64 else 4 * torch.finfo(plain[name].dtype).eps
        assert error <= 2 * torchs + tiny, f"{name}: {error:.2e}, torch {torchs:.2e}"


def test_layout_is_kept(op_parts: list[list[dict[str, Tensor]]]) -> None:
    for case, part in zip(CASES, op_parts[1], strict=True):
        last = case[1] == "channels_last"
        for name in ("out", "grad x"):
            assert part[name].is_contiguous(memory_format=torch.channels_last) == last, (case, name)


def test_without_torch_distributed() -> None:
    with pytest.raises(RuntimeError, match="init_process_group"):
        fr.ops.sync_bn_act(torch.randn(2, 3, 4, 4), None, None, None, None)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.zeros(3)}, ValueError, "at least 2-d"),
        ({"eps": 0.0}, ValueError, "eps must be positive"),
        ({"activation": "gelu"}, ValueError, "activation"),
        ({"gamma": torch.ones(4)}, ValueError, "gamma"),
    ],
)
def test_bad_arguments(change: dict[str, Any], error: type[Exception], message: str) -> None:
    given: dict[str, Any] = {"x": torch.zeros(2, 3), "gamma": None, "eps": 1e-5, "activation": "relu"} | change
    with pytest.raises(error, match=message):
        fr.ops.sync_bn_act(given.pop("x"), given.pop("gamma"), None, None, None, **given)


# Networks


def _network(memory: str = "balanced") -> nn.Module:
    torch.manual_seed(3)
    model = fr.ResNet(fr.Bottleneck, (1, 1, 1, 1), width_per_group=16, num_classes=5, memory=memory)
    randomise(model)
    model.layer1[0].residual_scale = nn.Parameter(torch.tensor(0.7))
    return model.double()


def _gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


PARTS = {2: (3, 5), 4: (2, 0, 5, 1)}


def _train_part(rank: int, world: int) -> dict[str, Any]:
    import warnings

    model = fr.convert_sync_batchnorm(_network("balanced" if world == 2 else "low"))
    x = images(8, 3, 32, 32).double().split(PARTS[world])[rank]
    calls: dict[str, int] = {}
    choose = dispatch.choose

    def counted(primitive: str, *args: Any, **kwargs: Any) -> dispatch.Choice:
        calls[primitive] = calls.get(primitive, 0) + 1
        return choose(primitive, *args, **kwargs)

    dispatch.choose = counted
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        parallel = DistributedDataParallel(model)
        for _ in range(2):
            model.zero_grad()
            out = parallel(x)
            (out.square().sum() * world).backward()  # DDP averages: the sum over the whole batch
    dispatch.choose = choose
    return {
        "out": out.detach(),
        "calls": calls,
        "warnings": [str(w.message) for w in caught],
        "gradients": _gradients(model),
        "buffers": dict(model.named_buffers()),
    }


@pytest.mark.parametrize("world", [2, 4])
def test_ddp_trains_as_one_process_with_the_whole_batch(
    tmp_path: Path, request: pytest.FixtureRequest, world: int
) -> None:
    """Gradients and running statistics of DDP with our SyncBatchNorm are those of the whole batch by torch."""
    if world == 2:
        parts = [part["network"] for part in request.getfixturevalue("two_processes")]
    else:
        parts = on_processes(world, tmp_path, _train_part)
    plain = fr.restore(_network())
    for _ in range(2):
        plain.zero_grad()
        out = plain(images(8, 3, 32, 32).double())
        out.square().sum().backward()
    torch.testing.assert_close(torch.cat([part["out"] for part in parts]), out.detach(), rtol=1e-9, atol=1e-9)
    for part, size in zip(parts, PARTS[world], strict=True):
        assert not [w for w in part["warnings"] if "stride" in w], "DDP copies gradients whose strides differ"
        for name, value in _gradients(plain).items():
            error = (part["gradients"][name] - value).norm() / value.norm()
            assert error < 1e-8, f"{name}: {error:.1e}"
        for name, value in plain.named_buffers():
            torch.testing.assert_close(part["buffers"][name], value, rtol=1e-9, atol=1e-9)
        gram = 5 if size else 0  # the last conv of each of the four blocks, and the first projection
        units = sum(isinstance(m, nn.BatchNorm2d) for m in plain.modules())
        assert part["calls"].get("second_moments", 0) == 2 * gram
        assert part["calls"]["bn_act_backward"] == 2 * (units - gram), "every other unit is one fused op"


def test_conversion_keeps_the_model() -> None:
    model = _network().eval()
    x = images(2, 3, 32, 32).double()
    with torch.no_grad():
        before = model(x)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    parameters = list(model.parameters())
    converted = fr.convert_sync_batchnorm(model)
    assert converted is model
    assert not [m for m in model.modules() if type(m) is nn.BatchNorm2d]
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True)), "optimizers keep what they hold"
    assert list(model.state_dict()) == list(state)
    with torch.no_grad():
        torch.testing.assert_close(model(x), before)
    assert unfused_units(model) == []
    fr.verify(model, x)
    fr.verify(model, x, train=True)  # one process: nn.BatchNorm2d's results
    assert isinstance(copy.deepcopy(model).bn1, SyncBatchNorm)


def test_conversion_of_other_norms() -> None:
    class Mine(nn.BatchNorm2d):
        pass

    model = nn.Sequential(nn.BatchNorm1d(3), Mine(3), nn.BatchNorm2d(3), nn.GroupNorm(1, 3))
    converted = fr.convert_sync_batchnorm(model)
    assert [type(m) for m in converted] == [nn.SyncBatchNorm, nn.SyncBatchNorm, SyncBatchNorm, nn.GroupNorm]
    assert type(fr.convert_sync_batchnorm(nn.BatchNorm2d(2))) is SyncBatchNorm
    before = list(converted)
    assert all(a is b for a, b in zip(before, fr.convert_sync_batchnorm(converted), strict=True)), "once is enough"


def test_a_hook_on_the_norm_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a hook watches the BN, the unit runs unfused through its forward, whatever the group."""
    model = fr.convert_sync_batchnorm(fr.ConvBNAct(3, 4))
    seen: list[tuple[int, ...]] = []
    model.bn.register_forward_hook(lambda module, args, out: seen.append(tuple(out.shape)))
    model(torch.randn(2, 3, 5, 5))
    assert seen == [(2, 4, 5, 5)]
    assert "hook" in model.unfused()["conv"]
