"""Which backend serves a call: requests, their scope, refusals and their reasons, torch's switches."""

from __future__ import annotations

import asyncio
import os
import re
import subprocess
import sys
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from conftest import backends, needs_cpp
from torch import Tensor

import fused_resnet as fr
from fused_resnet import dispatch
from fused_resnet.backends import cpp, library, reference

X = torch.randn(2, 4, 6, 6)
WEIGHT = torch.randn(8, 4, 3, 3)
CONV = (WEIGHT, None, None, (1, 1), (0, 0), (1, 1), 1, "relu")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """(backend, primitive) of every call of the elementwise primitives from here on."""
    seen: list[tuple[str, str]] = []

    def spy(module: Any, primitive: str) -> None:
        original = getattr(module, primitive)

        def wrapped(*args: Any) -> Any:
            seen.append((module.__name__.rpartition(".")[2], primitive))
            return original(*args)

        monkeypatch.setattr(module, primitive, wrapped)

    for module in (reference, cpp):
        for op in ("add_relu", "bn_act"):
            for primitive in dispatch.OPS[op]:
                spy(module, primitive)
    return seen


def python(code: str, **env: str) -> str:
    """What a fresh interpreter prints; fails with its errors."""
    run = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | env, capture_output=True, text=True, timeout=120, check=False
    )
    assert run.returncode == 0, run.stderr
    return run.stdout.strip()


# --- the request ---


def test_use_backend_nests_and_ends() -> None:
    assert dispatch.requested() == "auto"
    with fr.use_backend("reference"):
        with fr.use_backend("library"):
            assert dispatch.requested() == "library"
            with fr.use_backend("auto"):
                assert dispatch.requested() == "auto"
        assert dispatch.requested() == "reference"
    assert dispatch.requested() == "auto"


def test_use_backend_ends_with_an_exception() -> None:
    with pytest.raises(KeyError), fr.use_backend("reference"):
        raise KeyError
    assert dispatch.requested() == "auto"


def test_set_backend() -> None:
    try:
        fr.set_backend("reference")
        assert dispatch.requested() == "reference"
        assert ThreadPoolExecutor(1).submit(dispatch.requested).result() == "reference"
        with fr.use_backend("library"):
            assert dispatch.requested() == "library"
        with fr.use_backend("auto"):  # an explicit request too
            assert dispatch.requested() == "auto"
    finally:
        fr.set_backend("auto")


@pytest.mark.parametrize("name", ["cuda", "", "Reference", None, 3])
def test_unknown_backend(name: Any) -> None:
    with pytest.raises(ValueError, match=r"unknown backend .*expected 'auto' or one of 'reference', 'library', 'cpp'"):
        fr.set_backend(name)
    with pytest.raises(ValueError, match="unknown backend"), fr.use_backend(name):
        pass
    assert dispatch.requested() == "auto"


def test_environment_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    code = "from fused_resnet import dispatch; print(dispatch.requested())"
    assert python(code, FUSED_RESNET_BACKEND="reference") == "reference"
    monkeypatch.setenv("FUSED_RESNET_BACKEND", "library")
    assert dispatch._initial() == "library"
    monkeypatch.setenv("FUSED_RESNET_BACKEND", "nonsense")
    with pytest.warns(UserWarning, match="FUSED_RESNET_BACKEND ignored: unknown backend 'nonsense'"):
        assert dispatch._initial() == "auto"
    monkeypatch.setenv("FUSED_RESNET_BACKEND", "")  # as good as unset
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert dispatch._initial() == "auto"


def test_threads_are_isolated() -> None:
    """A request holds in its own thread only."""
    inside, done = threading.Event(), threading.Event()
    seen: list[str] = []

    def other() -> None:
        with fr.use_backend("library"):
            inside.set()
            done.wait(10)
            seen.append(dispatch.requested())

    thread = threading.Thread(target=other)
    with fr.use_backend("reference"):
        thread.start()
        assert inside.wait(10)
        assert dispatch.requested() == "reference"
        assert ThreadPoolExecutor(1).submit(dispatch.requested).result() == "auto"
        done.set()
        thread.join()
    assert seen == ["library"]


def test_tasks_are_isolated() -> None:
    async def task(name: str) -> str:
        with fr.use_backend(name):
            await asyncio.sleep(0.001)
            return dispatch.requested()

    async def main() -> list[str]:
        return list(await asyncio.gather(*(task(name) for name in ("reference", "library", "auto"))))

    assert asyncio.run(main()) == ["reference", "library", "auto"]


# --- backward uses what forward used ---


def forward(name: str) -> tuple[Tensor, Tensor]:
    x = X.clone().requires_grad_()
    with fr.use_backend(name):
        return x, fr.ops.add_relu(fr.ops.bn_act(x, None, None, None, None, training=True), X)


@pytest.mark.parametrize("name", backends("reference", "cpp"))
def test_backward_outside_the_block(name: str, calls: list[tuple[str, str]]) -> None:
    _, out = forward(name)
    out.sum().backward()
    assert {backend for backend, _ in calls} == {name}
    assert {"add_relu_backward", "bn_act_backward"} <= {primitive for _, primitive in calls}


@pytest.mark.parametrize("name", backends("reference", "cpp"))
def test_backward_in_another_thread(name: str, calls: list[tuple[str, str]]) -> None:
    _, out = forward(name)
    with fr.use_backend("reference" if name == "cpp" else "auto"):
        thread = threading.Thread(target=lambda: out.sum().backward())
        thread.start()
        thread.join()
    assert {backend for backend, _ in calls} == {name}
    assert {"add_relu_backward", "bn_act_backward"} <= {primitive for _, primitive in calls}


@needs_cpp
def test_parallel_forward_and_backward() -> None:
    """Threads that ask for different backends at the same time, with gradients, do not disturb each other."""
    x, out = forward("reference")
    (expected,) = torch.autograd.grad(out.sum(), x)

    def work(i: int) -> bool:
        x, out = forward(("reference", "cpp")[i % 2])
        (grad,) = torch.autograd.grad(out.sum(), x)
        return torch.allclose(grad, expected, atol=1e-5)

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(40)))


def test_checkpoint_recomputes_with_the_same_backend(calls: list[tuple[str, str]]) -> None:
    """torch.utils.checkpoint runs forward again during backward, in the caller's context."""
    x = X.clone().requires_grad_()
    with fr.use_backend("reference"):
        out = torch.utils.checkpoint.checkpoint(lambda t: fr.ops.add_relu(t, X), x, use_reentrant=False)
        out.sum().backward()
    assert {backend for backend, _ in calls} == {"reference"}
    assert torch.equal(x.grad, (out > 0).float())


# --- refusals ---


@pytest.mark.parametrize(
    ("name", "function", "reason"),
    [
        ("library", lambda: fr.ops.add_relu(X, X), "it does not implement add_relu_forward"),
        ("library", lambda: fr.ops.conv_bias_act(X.double(), WEIGHT.double()), "no torch.float64 convolution"),
        ("library", lambda: fr.ops.conv_bias_act(X[:0], WEIGHT), "the input is empty"),
        ("cpp", lambda: fr.ops.add_relu(X.to("meta"), X.to("meta")), "no kernels for device meta"),
        ("library", lambda: fr.ops.conv_bias_act(X.to("meta"), WEIGHT.to("meta")), "no library for device meta"),
    ],
    ids=["primitive", "dtype", "empty", "device", "library device"],
)
def test_an_explicit_request_is_refused_with_the_reason(name: str, function: Any, reason: str) -> None:
    message = rf"backend '{name}' cannot serve \w+ on \w+: .*{re.escape(reason)}"
    with fr.use_backend(name), pytest.raises(fr.BackendUnavailableError, match=message):
        function()
    function()  # the automatic choice finds another


def test_the_error_is_a_runtime_error() -> None:
    assert issubclass(fr.BackendUnavailableError, RuntimeError)


def unavailable(monkeypatch: pytest.MonkeyPatch, reason: str) -> None:
    monkeypatch.setattr(cpp, "unavailable", lambda device_type: reason)
    monkeypatch.setattr(dispatch, "_warned", set())


def test_one_warning_at_the_first_fallback(monkeypatch: pytest.MonkeyPatch) -> None:
    unavailable(monkeypatch, "the extension was not built: no compiler")
    with pytest.warns(
        UserWarning, match=r"'cpp' backend is not available \(the extension was not built: no compiler\)"
    ):
        fr.ops.add_relu(X, X)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fr.ops.add_relu(X, X)
        fr.ops.bn_act(X, None, None, None, None, training=True)
        forward("auto")[1].sum().backward()


def test_an_explicit_request_does_not_warn(monkeypatch: pytest.MonkeyPatch) -> None:
    unavailable(monkeypatch, "not built")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with fr.use_backend("cpp"), pytest.raises(fr.BackendUnavailableError, match="not built"):
            fr.ops.add_relu(X, X)
        forward("reference")[1].sum().backward()


@needs_cpp
def test_nothing_warns_where_everything_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_warned", set())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        forward("auto")[1].sum().backward()
        fr.ops.conv_bias_act(X, WEIGHT)


def test_choose_tells_what_it_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    unavailable(monkeypatch, "not built")
    with pytest.warns(UserWarning, match="not available"):
        choice = dispatch.choose("add_relu_forward", X, X)
    assert choice.backend == "reference"
    assert choice.function is reference.add_relu_forward
    assert choice.skipped == (("cpp", "not built"),)


@needs_cpp
def test_choose_by_default() -> None:
    assert dispatch.choose("add_relu_forward", X, X).backend == "cpp"
    assert dispatch.choose("add_relu_forward", X.to("meta"), X.to("meta")).backend == "reference"
    assert dispatch.choose("conv_bias_act_forward", X, *CONV).backend == "library"
    assert dispatch.choose("conv_bias_act_forward", X, *CONV).pack is library.pack
    assert dispatch.choose("conv_bias_act_forward", X.double(), WEIGHT.double(), *CONV[1:]).backend == "cpp"
    assert dispatch.choose("conv_bias_act_forward", X, *CONV, backend="reference").backend == "reference"


@pytest.mark.parametrize("device", dispatch.AUTOMATIC)
def test_the_automatic_order_ends_in_reference(device: str) -> None:
    for op in dispatch.OPS:
        order = dispatch.AUTOMATIC[device].get(op, ("reference",))
        assert order[-1] == "reference"
        assert set(order) <= set(dispatch.BACKENDS)


@pytest.mark.parametrize("name", dispatch.BACKENDS)
def test_backends_keep_the_contract(name: str) -> None:
    """Some of reference's function names, the same signatures, and the two questions that every backend answers."""
    module = dispatch.load(name)
    assert module.unavailable("no such device") is not None or name == "reference"
    assert callable(module.supports)
    shared = [p for primitives in dispatch.OPS.values() for p in primitives if hasattr(module, p)]
    assert shared
    for primitive in shared:
        ours, theirs = (getattr(m, primitive).__code__ for m in (module, reference))
        assert ours.co_varnames[: ours.co_argcount] == theirs.co_varnames[: theirs.co_argcount], primitive


def test_backend_table() -> None:
    table = fr.backend_table()
    assert {row.op for row in table} == set(dispatch.OPS)
    for op in dispatch.OPS:
        rows = [row for row in table if row.op == op and row.device == "cpu"]
        partly = op in ("conv", "conv_bias_act") and cpp.conv_unavailable() is None
        assert [row.live for row in rows].count(True) == 1 + partly
        assert {row.backend for row in rows} == set(dispatch.BACKENDS)
        assert all(row.live or row.note for row in rows), "a reason is missing"
    lines = str(table).splitlines()
    assert len(lines) == len(table) + 1
    assert lines[0].split() == ["op", "device", "backend", "note"]


def test_backend_table_is_what_runs() -> None:
    live = [(row.op, row.backend) for row in fr.backend_table() if row.live and row.device == "cpu"]
    assert ("add_relu", dispatch.choose("add_relu_forward", X, X).backend) in live
    assert (
        dispatch.choose("conv_bias_act_forward", X, *CONV).backend == [b for op, b in live if op == "conv_bias_act"][-1]
    )
    x = torch.randn(1, 8, 9, 9).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(32, 8, 3, 3)
    choice = dispatch.choose("conv_bias_act_forward", x, weight, *CONV[3:])  # to be kept packed
    assert choice.backend == next(b for op, b in live if op == "conv_bias_act")


# --- torch's switches ---


def test_mkldnn_switched_off() -> None:
    """oneDNN's calls in torch would run all the same: the library backend looks at the flag."""
    with torch.backends.mkldnn.flags(enabled=False):
        with fr.use_backend("library"), pytest.raises(fr.BackendUnavailableError, match="mkldnn is disabled"):
            fr.ops.conv_bias_act(X, WEIGHT)
        assert dispatch.choose("conv_bias_act_forward", X, *CONV).backend != "library"
        out = fr.ops.conv_bias_act(X, WEIGHT)
        row = next(r for r in fr.backend_table() if r.op == "conv_bias_act" and r.backend == "library")
        assert not row.live
        assert "disabled" in row.note
        assert not dispatch.prefers_channels_last(X)
    torch.testing.assert_close(out, torch.relu(torch.nn.functional.conv2d(X, WEIGHT)))
    assert dispatch.choose("conv_bias_act_forward", X, *CONV).backend == "library"


@pytest.mark.parametrize("name", backends("auto", "reference", "cpp"))
def test_deterministic_algorithms(name: str) -> None:
    """Everything runs under use_deterministic_algorithms (an op without a deterministic kernel would raise)."""
    torch.use_deterministic_algorithms(True)
    try:
        x = X.clone().requires_grad_()
        with fr.use_backend(name):
            y = fr.ops.conv_bn_act(x, WEIGHT, None, None, torch.zeros(8), torch.ones(8), training=True)
            fr.ops.add_relu(y, y).sum().backward()
            with torch.no_grad():
                fr.ops.conv_bn_act(x, WEIGHT, None, None, torch.zeros(8), torch.ones(8))
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_float32_matmul_precision(precision: str) -> None:
    """The library backend takes torch's own path for fp32 precision: results as torch's under the same setting."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        with fr.use_backend("library"):
            out = fr.ops.conv_bias_act(X, WEIGHT)
        torch.testing.assert_close(out, torch.relu(torch.nn.functional.conv2d(X, WEIGHT)), rtol=1e-5, atol=1e-5)
    finally:
        torch.set_float32_matmul_precision(before)
