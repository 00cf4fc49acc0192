"""to_tensorrt and the converters through the real Torch-TensorRT and engine builder; engines are not run."""

from __future__ import annotations

import copy
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

sys.path.append(str(Path(__file__).parents[1]))
from conftest import Builder
from networks import randomise

import fused_resnet as fr
from fused_resnet.cli import load_benchmarks
from fused_resnet.export import DECOMPOSITIONS, command, to_plain
from fused_resnet.tensorrt import register_converters, to_tensorrt

X = torch.randn(2, 3, 64, 64)


def network(name: str) -> nn.Module:
    torch.manual_seed(0)
    model = getattr(fr, name)()
    randomise(model)
    return model.eval()


def parts(compiled: nn.Module) -> tuple[list[str], list[str]]:
    """(what runs in TensorRT, what is left to torch): submodules, and ops of the outer graph."""
    inside = [name for name, _ in compiled.named_children() if name.startswith("_run_on_acc")]
    outside = [name for name, _ in compiled.named_children() if not name.startswith("_run_on_acc")]
    outside += [str(node.target) for node in compiled.graph.nodes if node.op == "call_function"]
    return inside, outside


def of(layers: Counter[str], *kinds: str) -> dict[str, int]:
    return {kind: layers[kind] for kind in kinds}


# model: (convs, ReLUs, residual additions)
EXPECTED = {"resnet18": (20, 17, 8), "resnet50": (53, 49, 16)}


def assert_computes(output: Tensor | None, model: nn.Module, x: Tensor, tolerance: float) -> None:
    """The network given to the builder, evaluated in float64, is the model in float64 but for its rounded weights."""
    assert output is not None
    with torch.no_grad():
        exact = copy.deepcopy(model).double()(x.double())
    assert output.shape == exact.shape
    assert ((output - exact).norm() / exact.norm()).item() < tolerance


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("name", EXPECTED)
def test_one_engine_for_the_whole_network(builder: Builder, name: str, dtype: torch.dtype) -> None:
    model = network(name)
    compiled = to_tensorrt(model, X, dtype=dtype, dynamic_batch=(1, 4, 8))
    assert parts(compiled) == (["_run_on_acc_0"], [])
    (engine,) = builder.engines
    convs, relus, additions = EXPECTED[name]
    # One more sum: the classifier's bias. No SCALE or NORMALIZATION: batch norm is in the weights.
    assert of(engine.layers, "CONVOLUTION", "ACTIVATION", "ELEMENTWISE") == {
        "CONVOLUTION": convs,
        "ACTIVATION": relus,
        "ELEMENTWISE": additions + 1,
    }
    assert of(engine.layers, "POOLING", "SCALE", "NORMALIZATION") == {"POOLING": 1, "SCALE": 0, "NORMALIZATION": 0}
    weights = sum(p.numel() for p in model.parameters()) * dtype.itemsize
    assert 0.95 * weights < len(engine.serialised) < 1.2 * weights
    assert engine.inputs[0].shape["max_shape"] == (8, 3, 64, 64)
    assert engine.inputs[0].dtype.to(torch.dtype) == dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
def test_a_fixed_batch(builder: Builder, dtype: torch.dtype) -> None:
    model, builder.images = network("resnet18"), X
    to_tensorrt(model, X, dtype=dtype)
    (engine,) = builder.engines
    assert tuple(engine.inputs[0].shape) == tuple(X.shape)
    # Rounding each weight once; the network itself is evaluated in float64.
    assert_computes(engine.output, model, X, 10 * torch.finfo(dtype).eps)


def test_the_rival_of_the_benchmarks(builder: Builder, monkeypatch: pytest.MonkeyPatch) -> None:
    rivals, plain_resnet = load_benchmarks("rivals"), load_benchmarks("plain_resnet").plain_resnet
    rivals.discover()
    monkeypatch.setattr(rivals.Job, "only", lambda *_: None)  # it asks for a GPU
    model = plain_resnet("resnet18").eval()
    randomise(model)
    builder.images = X
    job = rivals.Job("resnet18", "infer", torch.float16, model.state_dict(), X, torch.zeros(2, dtype=torch.long))
    rivals.PEERS["tensorrt"].prepare(job)
    (engine,) = builder.engines
    assert engine.inputs[0].dtype.to(torch.dtype) == torch.float16
    assert engine.layers["CONVOLUTION"] == 20
    assert_computes(engine.output, model, X, 10 * torch.finfo(torch.float16).eps)


@pytest.mark.parametrize("batch", [None, 2], ids=["any batch", "batch 2"])
def test_the_command_saves_an_engine_for_the_batches_that_it_was_built_for(
    torch_tensorrt: ModuleType, builder: Builder, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, batch: int | None
) -> None:
    saved: list[Any] = []
    monkeypatch.setattr(torch_tensorrt, "save", lambda *args, **options: saved.append((args, options)))
    write, _, _ = command._tensorrt(command.Request("tensorrt", tmp_path / "net.ep", batch=batch))
    model = network("resnet18")
    write(model, X, tmp_path / "net.ep", torch.float16)
    ((engine, path), options) = saved.pop()
    assert parts(engine) == (["_run_on_acc_0"], [])
    assert path == str(tmp_path / "net.ep")
    # What torch.export, by which Torch-TensorRT saves, makes of these options.
    (x,) = options["arg_inputs"]
    with torch.no_grad():
        program = torch.export.export(to_plain(model).half(), (x,), dynamic_shapes=options["dynamic_shapes"])
    sizes = [(limits.lower, limits.upper) for limits in program.range_constraints.values()]
    assert sizes == ([(1, 64)] if batch is None else [])
    (built,) = builder.engines[0].inputs
    if batch is None:
        assert (built.shape["min_shape"][0], built.shape["max_shape"][0]) == sizes[0]
    else:
        assert tuple(built.shape) == tuple(x.shape) == tuple(X.shape)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="an engine runs on a GPU alone")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
def test_an_engine_runs(torch_tensorrt: ModuleType, dtype: torch.dtype) -> None:
    model = network("resnet18")
    engine = to_tensorrt(model, X, dtype=dtype, dynamic_batch=(1, 2, 8))
    for batch in (1, 2, 5):
        x = torch.randn(batch, 3, 64, 64)
        with torch.no_grad():
            assert_computes(engine(x.to("cuda", dtype)).cpu().double(), model, x, 100 * torch.finfo(dtype).eps)


def fused_program(model: nn.Module, x: Tensor = X) -> torch.export.ExportedProgram:
    with torch.no_grad():
        return torch.export.export(model, (x,))


def ours(program: torch.export.ExportedProgram) -> Counter[str]:
    names = (str(node.target) for node in program.graph.nodes if node.op == "call_function")
    return Counter(name.split(".")[1] for name in names if name.startswith("fused_resnet."))


def compile_whole(torch_tensorrt: ModuleType, program: Any, x: Tensor = X, **options: Any) -> nn.Module:
    return torch_tensorrt.dynamo.compile(
        program, arg_inputs=[x], min_block_size=1, require_full_compilation=True, **options
    )


def test_without_converters_a_program_with_our_ops_is_refused(torch_tensorrt: ModuleType) -> None:
    from torch_tensorrt.dynamo.conversion._ConverterRegistry import DYNAMO_ATEN_CONVERTERS

    op = torch.ops.fused_resnet.conv_bn_act.default
    known = DYNAMO_ATEN_CONVERTERS.pop(op, None)
    try:
        with pytest.raises(Exception, match="not fully supported"):
            compile_whole(torch_tensorrt, fused_program(network("resnet18")))
    finally:
        if known:
            DYNAMO_ATEN_CONVERTERS[op] = known


def test_a_decomposed_program_needs_no_converters(torch_tensorrt: ModuleType, builder: Builder) -> None:
    model, builder.images = network("resnet18"), X
    program = fused_program(model).run_decompositions(DECOMPOSITIONS)
    assert not ours(program)
    assert parts(compile_whole(torch_tensorrt, program)) == (["_run_on_acc_0"], [])
    assert_computes(builder.engines[0].output, model, X, 1e-6)


@pytest.mark.parametrize("name", EXPECTED)
def test_a_program_with_fused_convs(torch_tensorrt: ModuleType, builder: Builder, name: str) -> None:
    register_converters()
    register_converters()  # once is enough, twice is harmless
    model, builder.images = network(name), X
    program = fused_program(model)
    convs, relus, additions = EXPECTED[name]
    assert ours(program) == {"conv_bn_act": convs}
    assert parts(compile_whole(torch_tensorrt, program)) == (["_run_on_acc_0"], [])
    (engine,) = builder.engines
    assert of(engine.layers, "CONVOLUTION", "ACTIVATION", "ELEMENTWISE", "SCALE") == {
        "CONVOLUTION": convs,
        "ACTIVATION": relus,
        "ELEMENTWISE": additions + 1,
        "SCALE": 0,
    }
    assert_computes(engine.output, model, X, 1e-6)


class Small(nn.Module):
    """One of each op that has a converter."""

    def __init__(self, channels: int = 8) -> None:
        super().__init__()
        self.unit, self.bn, self.last = fr.ConvBNAct(3, channels), fr.BNAct(channels), fr.AddReLU()
        self.stem = nn.BatchNorm2d(channels)
        self.weight = nn.Parameter(torch.randn(channels, channels, 3, 3))
        self.beta = nn.Parameter(torch.randn(channels))

    def forward(self, x: Tensor) -> Tensor:
        x = self.unit(x)
        x = self.bn(x, x)
        stem = self.stem
        x = torch.ops.fused_resnet.bn_act_pool_eval(
            x, stem.weight, stem.bias, stem.running_mean, stem.running_var, 1e-5, "relu", False, "auto"
        )[0]
        y = fr.ops.conv_bias_act(x, self.weight, self.beta, x, padding=1)
        return self.last(x, y)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
def test_every_converter(torch_tensorrt: ModuleType, builder: Builder, dtype: torch.dtype) -> None:
    register_converters()
    model = Small().eval()
    randomise(model)
    model, x = model.to(dtype), X.to(dtype)
    builder.images = x
    program = fused_program(model, x)
    names = ("conv_bn_act", "bn_act_eval", "bn_act_pool_eval", "conv_bias_act", "add_relu")
    assert ours(program) == dict.fromkeys(names, 1)
    assert parts(compile_whole(torch_tensorrt, program, x)) == (["_run_on_acc_0"], [])
    (engine,) = builder.engines
    assert of(engine.layers, "CONVOLUTION", "SCALE", "ACTIVATION", "ELEMENTWISE", "POOLING") == {
        "CONVOLUTION": 2,
        "SCALE": 2,
        "ACTIVATION": 5,
        "ELEMENTWISE": 3,
        "POOLING": 1,
    }
    assert_computes(engine.output, model, x, 4 * torch.finfo(dtype).eps)


def without_padding(convolve: Any) -> Any:
    return lambda *args: convolve(*args[:9], 0, *args[10:])


def with_fewer_biases(convolve: Any) -> Any:
    return lambda *args: convolve(*args[:7], args[7][:-1], *args[8:])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (without_padding, r"\(2, 64, 29, 29\), expected \(2, 64, 32, 32\)"),
        (with_fewer_biases, r"__len__\(\) should return >= 0"),
    ],
)
def test_a_wrong_converter_is_rejected(
    torch_tensorrt: ModuleType, builder: Builder, monkeypatch: pytest.MonkeyPatch, wrong: Any, message: str
) -> None:
    """By the sizes that torch expects, and by TensorRT, which gives a layer with wrong weights no shape at all."""
    from torch_tensorrt.dynamo.conversion import impl

    register_converters()
    monkeypatch.setattr(impl.conv, "convNd", wrong(impl.conv.convNd))
    with pytest.raises(Exception, match=message):
        compile_whole(torch_tensorrt, fused_program(network("resnet18")))
    assert not builder.engines
