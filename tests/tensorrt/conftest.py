"""The real Torch-TensorRT without a GPU: what it asks CUDA for at import and before building is answered here.

Converters, lowering, partitioner and engine builder are the real ones. Only two things are not done: the finished
engine is not loaded, and not run. `make test-tensorrt` runs this folder in an environment and a process of its own.
"""

from __future__ import annotations

import importlib
from collections import Counter
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

CAPABILITY = (8, 6)


@pytest.fixture(scope="session")
def torch_tensorrt() -> Iterator[ModuleType]:
    if torch.cuda.is_available():
        yield importlib.import_module("torch_tensorrt")
        return
    gpu = SimpleNamespace(
        name="no GPU", major=CAPABILITY[0], minor=CAPABILITY[1], multi_processor_count=80, total_memory=24 << 30
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch._C, "_CudaDeviceProperties", object, raising=False)
        patch.setattr(torch.cuda, "current_device", lambda: 0)
        patch.setattr(torch.cuda, "get_device_capability", lambda device=None: CAPABILITY)
        patch.setattr(torch.cuda, "get_device_properties", lambda device=None: gpu)
        patch.setattr(torch.cuda, "mem_get_info", lambda device=None: (20 << 30, 24 << 30))
        module = importlib.import_module("torch_tensorrt")
        device = importlib.import_module("fused_resnet.tensorrt")
        patch.setattr(device, "gpu", lambda: torch.device("cpu"))
        yield module


class Engine(nn.Module):
    """A finished engine, serialised: what stands in for the module that would load and run it."""

    def __init__(self, serialised: bytes, built: Built, inputs: list[Any]) -> None:
        super().__init__()
        self.serialised, self.layers, self.output, self.inputs = serialised, *built, inputs

    def set_output_tensors_as_unowned(self, _: bool) -> None:
        pass


class Built(NamedTuple):
    """Of the network given to TensorRT's builder: its layers, and what it computes for the builder's `images`."""

    layers: Counter[str]
    output: torch.Tensor | None


class Builder:
    """The engines that the test has built, in order; networks are evaluated for `images` where these are set."""

    def __init__(self) -> None:
        self.engines: list[Engine] = []
        self.images: torch.Tensor | None = None


@pytest.fixture
def builder(torch_tensorrt: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Builder:
    import tensorrt
    from evaluate import evaluate
    from torch_tensorrt.dynamo import _compiler
    from torch_tensorrt.dynamo.conversion import _conversion, _TRTInterpreter

    class Runtime:
        """Hands the serialised engine back instead of loading it into a GPU."""

        def __init__(self, logger: Any) -> None:
            pass

        def deserialize_cuda_engine(self, serialised: Any) -> Any:
            return SimpleNamespace(serialize=lambda: serialised)

    made, networks = Builder(), []
    interpreter = _TRTInterpreter.TRTInterpreter
    configure, run_node = interpreter._populate_trt_builder_config, interpreter.run_node

    def look_at_the_network(self: Any, *args: Any) -> Any:
        network = self.ctx.net
        layers = Counter(network.get_layer(i).type.name for i in range(network.num_layers))
        networks.append(Built(layers, None if made.images is None else evaluate(network, made.images)))
        return configure(self, *args)

    def check_shapes(self: Any, node: torch.fx.Node) -> Any:
        """The builder of TensorRT for RTX takes sums of tensors of different sizes: shapes are compared here."""
        result, expected = run_node(self, node), node.meta.get("val")
        if isinstance(result, tensorrt.ITensor) and isinstance(expected, torch.Tensor):
            shape = tuple(size if isinstance(size, int) else -1 for size in expected.shape)
            assert tuple(result.shape) == shape, f"{node.name}: {tuple(result.shape)}, expected {shape}"
        return result

    def convert(module: Any, inputs: Any, settings: Any, name: str, engine_cache: Any = None) -> Engine:
        result = _conversion.interpret_module_to_result(module, inputs, settings, engine_cache=engine_cache)
        made.engines.append(Engine(result.serialized_engine, networks[-1], inputs))
        return made.engines[-1]

    monkeypatch.setattr(tensorrt, "Runtime", Runtime)
    monkeypatch.setattr(_TRTInterpreter.trt, "Runtime", Runtime)
    monkeypatch.setattr(interpreter, "_populate_trt_builder_config", look_at_the_network)
    monkeypatch.setattr(interpreter, "run_node", check_shapes)
    monkeypatch.setattr(_compiler, "convert_module", convert)
    return made
