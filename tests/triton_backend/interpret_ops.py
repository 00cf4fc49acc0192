"""The public ops over interpreted kernels: autograd, torch.compile, the self-check, tuning and its cache."""

from __future__ import annotations

import itertools
import json
import multiprocessing

import pytest
import torch
from torch import Tensor

import fused_resnet as fr
from fused_resnet import cli, dispatch, tuning
from fused_resnet.backends import reference
from fused_resnet.backends import triton as backend
from fused_resnet.backends.triton import add_relu, bn_act, configs


def tensors(*shape: int, number: int = 1) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randn(shape, generator=generator) for _ in range(number)]
    return [(t.to(memory_format=torch.channels_last) if t.dim() == 4 else t).requires_grad_() for t in drawn]


def add(x: Tensor, y: Tensor, gamma: Tensor, beta: Tensor, mean: Tensor, var: Tensor) -> Tensor:
    return fr.ops.add_relu(x, y)


def train(x: Tensor, y: Tensor, gamma: Tensor, beta: Tensor, mean: Tensor, var: Tensor) -> Tensor:
    return fr.ops.bn_act(x, gamma, beta, mean, var, y, training=True)


def evaluate(x: Tensor, y: Tensor, gamma: Tensor, beta: Tensor, mean: Tensor, var: Tensor) -> Tensor:
    return fr.ops.bn_act(x, gamma, beta, mean, var)


def pool(x: Tensor, y: Tensor, gamma: Tensor, beta: Tensor, mean: Tensor, var: Tensor) -> Tensor:
    return fr.ops.bn_act_pool(x, gamma, beta, mean, var, training=True)


@pytest.mark.parametrize("op", [add, train, evaluate, pool])
def test_eager_and_compiled_agree_with_reference(op):
    results = {}
    for name, wanted in (("reference", "reference"), ("eager", "triton"), ("compiled", "triton")):
        torch.manual_seed(0)
        x, y = tensors(2, 24, 6, 6, number=2)
        gamma, beta = tensors(24, number=2)
        mean, var = torch.zeros(24), torch.ones(24)
        function = torch.compile(op, backend="aot_eager", fullgraph=True) if name == "compiled" else op
        with fr.use_backend(wanted):
            out = function(x, y, gamma, beta, mean, var)
        (out * torch.linspace(-1, 1, out.numel()).view(out.shape)).sum().backward()
        grads = [t.grad for t in (x, y, gamma, beta) if t.grad is not None]
        results[name] = [out.detach(), mean, var, *grads]
    for name in ("eager", "compiled"):
        for ours, plain in zip(results[name], results["reference"], strict=True):
            torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-5)
    for eager, compiled in zip(results["eager"], results["compiled"], strict=True):
        torch.testing.assert_close(eager, compiled, rtol=1e-6, atol=1e-6)


def test_no_kernels_for_float64():
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    with fr.use_backend("triton"), pytest.raises(fr.BackendUnavailableError, match="float64"):
        fr.ops.add_relu(x, x)


# The self-check before an automatic choice


@pytest.fixture
def automatic(monkeypatch):
    """Triton first in the automatic order, as on CUDA, nothing being tested yet."""
    monkeypatch.setattr(dispatch, "AUTOMATIC", {"cpu": {"add_relu": ("triton", "reference")}})
    monkeypatch.setattr(backend, "_tested", {})


def test_equal_kernels_are_chosen(automatic):
    assert dispatch.choose("add_relu_forward", torch.ones(3)).backend == "triton"
    assert dispatch.choose("add_relu_forward", torch.ones(3, dtype=torch.float16)).backend == "triton"


def test_wrong_kernels_are_not_chosen(automatic, monkeypatch):
    monkeypatch.setattr(backend, "add_relu_backward", lambda grad, out: torch.where(out < 1e-2, 0, grad), raising=False)
    with pytest.warns(UserWarning, match=r"triton will not be used for add_relu.*differ"):
        choice = dispatch.choose("add_relu_forward", torch.ones(3))
    assert choice.backend == "reference"
    assert "differ" in choice.skipped[0][1]
    with fr.use_backend("triton"):  # an explicit request is served
        assert dispatch.choose("add_relu_forward", torch.ones(3)).backend == "triton"


def test_failing_kernels_are_not_chosen(automatic, monkeypatch):
    def broken(x: Tensor, residual: Tensor) -> Tensor:
        raise RuntimeError("no such instruction")

    monkeypatch.setattr(backend, "add_relu_forward", broken, raising=False)
    with pytest.warns(UserWarning, match="no such instruction"):
        assert dispatch.choose("add_relu_backward", torch.ones(3)).backend == "reference"


def test_the_table_says_what_the_self_check_found(automatic, monkeypatch):
    def row() -> dispatch.Row:
        return next(r for r in dispatch.backend_table() if (r.op, r.backend) == ("add_relu", "triton"))

    assert row().live
    assert "self-check passed" in row().note
    monkeypatch.setattr(backend, "_tested", {})
    monkeypatch.setattr(backend, "add_relu_backward", lambda grad, out: grad.clone(), raising=False)
    with pytest.warns(UserWarning, match="differ"):
        refused = row()
    assert not refused.live
    assert "differ" in refused.note


def test_bn_act_passes_its_self_check(monkeypatch):
    monkeypatch.setattr(backend, "_tested", {})
    assert backend.untested("bn_act", torch.ones(1, dtype=torch.bfloat16)) is None


# Tuning


@pytest.fixture
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("FUSED_RESNET_CACHE", str(tmp_path))
    monkeypatch.setattr(configs, "_is_tunable", lambda x: True)
    monkeypatch.setattr(configs, "_tables", {})
    monkeypatch.setattr(configs, "_picked", {})
    return tmp_path


KEY = (4,)
BEST = {"BLOCK": 2048, "num_warps": 8}


def test_a_stored_config_is_picked(cache):
    x = torch.ones(3)
    default = configs.pick(add_relu.FORWARD, KEY, x)
    configs.store(x, add_relu.FORWARD, KEY, BEST)
    assert configs.pick(add_relu.FORWARD, KEY, x) == BEST != default
    assert configs.pick(add_relu.FORWARD, (2,), x) != BEST
    configs.store(x, add_relu.BACKWARD, KEY, default)
    assert configs.pick(add_relu.FORWARD, KEY, x) == BEST
    assert [path.suffix for path in cache.iterdir()] == [".json"]


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "null", '{"source": 3}', '{"configs": {"add_relu_forward": {"[4]": {"BLOCK": 64}}}}'],
)
def test_a_corrupted_cache_is_harmless(cache, content):
    x = torch.ones(3)
    default = configs.pick(add_relu.FORWARD, KEY, x)
    configs.cache_file(x).write_text(content)
    configs._tables.clear()
    configs._picked.clear()
    assert configs.pick(add_relu.FORWARD, KEY, x) == default
    configs.store(x, add_relu.FORWARD, KEY, BEST)
    assert configs.pick(add_relu.FORWARD, KEY, x) == BEST


@pytest.mark.parametrize(
    "config", [{"BLOCK": 64}, {"BLOCK": "64", "num_warps": 4}, {"BLOCK": 0, "num_warps": 4}, 7, None, BEST | {"X": 1}]
)
def test_a_config_that_does_not_fit_is_ignored(cache, config):
    x = torch.ones(3)
    default = configs.pick(add_relu.FORWARD, KEY, x)
    configs.store(x, add_relu.FORWARD, KEY, config)
    assert configs.pick(add_relu.FORWARD, KEY, x) == default


def test_configs_of_other_kernels_are_ignored(cache, monkeypatch):
    x = torch.ones(3)
    configs.store(x, add_relu.FORWARD, KEY, BEST)
    content = json.loads(configs.cache_file(x).read_text())
    content["source"]["kernels"] = "changed"
    configs.cache_file(x).write_text(json.dumps(content))
    configs._tables.clear()
    assert configs.pick(add_relu.FORWARD, KEY, x) != BEST


def _store(key: tuple[int, ...]) -> None:
    for _ in range(20):
        configs.store(torch.ones(3), add_relu.FORWARD, key, BEST)


def test_two_processes_may_write_at_once(cache):
    writers = [multiprocessing.get_context("fork").Process(target=_store, args=((size,),)) for size in (2, 4)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    table = json.loads(configs.cache_file(torch.ones(3)).read_text())["configs"]
    assert table[add_relu.FORWARD]
    assert all(config == BEST for config in table[add_relu.FORWARD].values())


def test_tuning_keeps_the_fastest_right_config(cache):
    x, y = (t.detach() for t in tensors(2, 16, 5, 5, number=2))
    calls = tuning.record(lambda: (fr.ops.add_relu(x[:1], y[:1]), fr.ops.add_relu(x, y)))
    assert [(call.primitive, call.problems) for call in calls] == [("add_relu_forward", ((add_relu.FORWARD, KEY),))]
    assert calls[0].args[0].shape == x.shape
    seen = []

    def measure(run):
        run()
        seen.append(configs.pick(add_relu.FORWARD, KEY, x))
        return 1.0 if seen[-1] == BEST else 2.0

    outcomes = list(tuning.tune(calls, measure=measure, progress=False))
    assert [(o.config, o.default_ms, o.best_ms, o.refused) for o in outcomes] == [(BEST, 2.0, 1.0, 0)]
    assert len(seen) == len(configs.candidates(add_relu.FORWARD, KEY, configs.target(x)))
    assert configs.pick(add_relu.FORWARD, KEY, x) == BEST


def test_tuning_refuses_wrong_results_and_small_gains(cache, monkeypatch):
    x, y = (t.detach() for t in tensors(2, 16, 5, 5, number=2))
    calls = tuning.record(lambda: fr.ops.add_relu(x, y))
    default = configs.pick(add_relu.FORWARD, KEY, x)

    def right_by_default(x, residual):
        config = configs.pick(add_relu.FORWARD, KEY, x)
        return reference.add_relu_forward(x, residual) + (0 if config["num_warps"] == default["num_warps"] else 1)

    monkeypatch.setattr(backend, "add_relu_forward", right_by_default)
    times = iter([1.0, 0.99, 0.99])
    (outcome,) = tuning.tune(calls, measure=lambda run: next(times), progress=False)
    assert outcome.config == default
    assert outcome.refused == 2


def test_recording_a_step_finds_every_problem_once(cache):
    model = torch.nn.Sequential(fr.BNAct(16), fr.BNAct(16), fr.BNAct(16, activation=None))
    x = torch.randn(2, 16, 5, 5).to(memory_format=torch.channels_last)
    calls = tuning.record(tuning.workload(model, x))
    problems = [problem for call in calls for problem in call.problems]
    key = (True, 4, 16)
    kernels = (bn_act.APPLY, bn_act.BACKWARD_APPLY, bn_act.BACKWARD_REDUCE, bn_act.STATISTICS)
    assert sorted(problems) == [(kernel, key) for kernel in kernels]
    assert dispatch.choose("bn_act_eval_forward", x).backend != "triton"  # all is as before


@pytest.fixture
def command(cache, monkeypatch):
    """`fused-resnet tune` of a model that is one BNAct, with a clock on which the second config is the fastest."""
    monkeypatch.setattr(fr, "tiny", lambda: fr.BNAct(3), raising=False)
    monkeypatch.setattr(cli, "MODELS", ("tiny",))
    clock = itertools.cycle([2.0, 1.0, 3.0])
    monkeypatch.setattr(tuning.tune, "__kwdefaults__", {"measure": lambda run: next(clock), "progress": True})
    return ["tune", "--device", "cpu", "--model", "tiny", "--batch", "2", "--size", "32", "--dtype", "fp32"]


def test_the_command_tune(command, cache, capsys):
    assert cli.main(command) == 0
    out, err = capsys.readouterr()
    kernels = ("bn_statistics", "bn_apply", "bn_backward_reduce", "bn_backward_apply")
    for kernel in kernels:
        assert f"{kernel} (False, 4, 3)" in out or f"{kernel} (True, 4, 3)" in out
    assert "config/s" in err  # the progress bar
    (file,) = cache.glob("*.json")
    assert str(file) in out
    assert sorted(json.loads(file.read_text())["configs"]) == sorted(kernels)


def test_the_command_tune_where_nothing_can_be_kept(command, monkeypatch, tmp_path, capsys):
    (tmp_path / "file").touch()
    monkeypatch.setenv("FUSED_RESNET_CACHE", str(tmp_path / "file" / "folder"))
    assert cli.main(command) == 2
    assert "cannot be kept in" in capsys.readouterr().err
