"""`freeze`: a copy of a model for inference alone, batch norm folded, each conv and what follows it one packed call."""

from __future__ import annotations

import importlib
import threading
from collections import Counter
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from fused_resnet import dispatch, emulation, ops
from fused_resnet.buffers import Buffers
from fused_resnet.export.plain import PlainModel, folded_copy
from fused_resnet.folding import FOLDED
from fused_resnet.fusion.match import Matcher
from fused_resnet.modules import Call, Stem, folded_call, has_pairs
from fused_resnet.ops.checks import autocast_dtype, is_channels_last, is_traced
from fused_resnet.ops.conv_bias_act import check_conv, conv_layout

ENGINES = (None, "openvino")
_KEPT = 64  # situations of a conv, or shapes of an engine, that are remembered


class FrozenConv(nn.Module):
    """act(conv(x) + bias + residual), and max_pool2d(., 3, 2, 1) where it is `pooled`; the weight is packed once per
    backend and dtype, for inputs of any size.

    Args:
        conv: an nn.Conv2d with zero padding; its parameters become this module's.
        activation: "relu" or None.
        pooled: whether a network's max pool follows.

    Set by `freeze`, False at first: `overwrites`: nobody else reads the residual, so that the result may be written
    over it. `leaves_wide`: none but FrozenConvs read the result, so that it stays in float32 where 16-bit convolutions
    are computed so; `reads_wide`: x may be such a result.
    """

    def __init__(self, conv: nn.Conv2d, activation: str | None = None, pooled: bool = False) -> None:
        super().__init__()
        self.weight, self.bias = conv.weight, conv.bias
        self.geometry = cast("Any", (conv.stride, conv.padding, conv.dilation, conv.groups))
        self.activation, self.pooled = activation, pooled
        self.overwrites = self.reads_wide = self.leaves_wide = False
        self._packed: dict[Any, Call] = {}
        self._calls: dict[Any, Call] = {}

    def extra_repr(self) -> str:
        stride, padding, dilation, groups = self.geometry
        shape = f"{tuple(self.weight.shape)}, stride={stride}, padding={padding}, dilation={dilation}, groups={groups}"
        return f"{shape}, activation={self.activation!r}" + ", pooled" * self.pooled

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_packed": {}, "_calls": {}}

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        self._packed, self._calls = {}, {}
        return super()._apply(*args, **kwargs)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._packed, self._calls = {}, {}

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """(N, C, H, W), and a residual of the output's shape, to (N, K, H', W'), channels_last on the CPU."""
        if is_traced(x):
            stride, padding, dilation, groups = self.geometry
            options = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
            y = ops.conv_bias_act(x, self.weight, self.bias, residual, activation=self.activation, **options)
            return F.max_pool2d(y, 3, 2, 1) if self.pooled else y
        if x.requires_grad and torch.is_grad_enabled():
            raise RuntimeError("a frozen model has no gradients: call it under torch.no_grad(), or keep the model")
        cast = autocast_dtype(x)
        dtype = cast or (self.weight.dtype if self.reads_wide else x.dtype)
        in_float32 = dispatch.in_float32(dtype, x.device.type) and (cast is not None or dtype == self.weight.dtype)
        if cast is not None or in_float32:
            computed = torch.float32 if in_float32 else dtype
            x, residual = x.to(computed), None if residual is None else residual.to(computed)
        key = (x.shape, x.dtype, x.device, dispatch.requested(), torch._C._get_mkldnn_enabled())
        planes = self.pooled and x.is_contiguous()
        call = self._calls.get((*key, planes)) if planes or is_channels_last(x) else None
        if call is None:
            weight, bias = map(emulation.wide, (self.weight, self.bias)) if in_float32 else (self.weight, self.bias)
            check_conv("FrozenConv", x, weight, bias, *self.geometry)
            if dispatch.prefers_channels_last(x):
                x = x.contiguous(memory_format=torch.channels_last)
            x, residual = conv_layout(x, weight, residual)
            call = self._prepare(x)
            planes = planes and isinstance(call, Stem)
            if planes or is_channels_last(x):
                if len(self._calls) >= _KEPT:
                    self._calls = {}
                kept = (*key, planes)
                self._calls[kept] = call
        out = call(x, residual, self.overwrites)
        return out if self.leaves_wide or not in_float32 else out.to(dtype)

    def _prepare(self, x: Tensor) -> Call:
        weight = self.weight.to(x.dtype)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        choice = dispatch.choose("conv_bias_act_forward", x, weight, *self.geometry, self.activation)
        key = (choice.backend, x.dtype, x.device, is_channels_last(x))
        call = self._packed.get(key)
        if call is None:
            call = folded_call(choice, x, weight, bias, self.geometry, self.activation, self.pooled)
            self._packed[key] = call
        return call


class FrozenModel(PlainModel):
    """What `freeze` returns. `fused`: the convs and what they took in; `skipped`: batch norms that stayed, and why."""

    fused: list[tuple[str, str]]
    skipped: list[tuple[str, str]]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return super().__call__(*args, **kwargs)
        outputs: Buffers = self.__dict__.setdefault("_outputs", Buffers())  # torch.fx makes copies its own way
        with outputs.reused():
            return super().__call__(*args, **kwargs)


def freeze(model: nn.Module, *, engine: str | None = None) -> nn.Module:
    """A copy of the model for inference alone; the model is not touched.

    Batch norm is folded into the convs in float32 and rounded once. Each conv with the addition and the ReLU after it
    is one call with a packed weight; nothing is looked up or checked between them. Inputs may have any batch and image
    size from call to call, NCHW or channels_last, and several threads may call it at once. Parameters are those of the
    folded convs: what is written to them after the first call is seen after `load_state_dict` or `to` alone.

    Args:
        model: a model of this package, a fused one, or any that torch.fx can trace; on any device.
        engine: None: our own calls; "openvino": the folded model run by OpenVINO, on the CPU, which must be installed.

    Returns:
        A FrozenModel, a torch.fx.GraphModule in eval mode; with an engine a module with the same forward.

    Raises:
        ValueError: torch.fx cannot trace the model, or the engine is unknown. ImportError: it is not installed.
    """
    if engine not in ENGINES:
        raise ValueError(f"freeze: unknown engine {engine!r}; expected one of {', '.join(map(repr, ENGINES))}")
    plain, skipped = folded_copy(model)
    if engine == "openvino":
        return OpenVINOModel(plain)
    frozen = FrozenModel(plain, plain.graph, type(model).__name__)
    frozen.eval()
    frozen.register_buffer(FOLDED, torch.ones((), dtype=torch.bool))
    frozen.skipped = skipped
    frozen.fused = _fuse(frozen)
    return frozen


def _fuse(frozen: fx.GraphModule) -> list[tuple[str, str]]:
    """Replace each conv, and the addition and ReLU, or ReLU and max pool, that alone read it, by a FrozenConv."""
    matcher = Matcher(frozen, frozen.graph)
    calls = Counter(matcher.module(node) for node in matcher.nodes)
    chains = []
    for node in matcher.nodes:
        chain, conv = matcher.behind_conv(node), cast(nn.Conv2d, matcher.module(node))
        if chain is not None and calls[conv] == 1 and has_pairs(conv):
            pooled = matcher.with_pool(chain)
            module = FrozenConv(conv, "relu" if chain.relu else None, pooled=pooled is not None)
            chains.append((pooled or chain, module))
            matcher.claimed.update(chains[-1][0].nodes)
    found: list[tuple[str, str]] = []
    renamed: dict[fx.Node, fx.Node] = {}
    for chain, module in chains:
        target, last = str(chain.nodes[0].target), chain.nodes[-1]
        frozen.set_submodule(target, module)
        with frozen.graph.inserting_after(last):
            reads = [renamed.get(node, node) for node in (chain.value, chain.residual) if node is not None]
            new = frozen.graph.call_module(target, tuple(reads))
        last.replace_all_uses_with(new)
        renamed[last] = new
        for old in reversed(chain.nodes):
            frozen.graph.erase_node(old)
        parts = ("conv", *(["add"] if chain.add is not None else []), *(["relu"] if chain.relu else []))
        parts += ("max pool",) if module.pooled else ()
        found.append((target, " + ".join(parts)))
    matcher = Matcher(frozen, frozen.graph, fresh=(FrozenConv,))
    convs = set(renamed.values())
    for node in convs:
        module = cast(FrozenConv, matcher.module(node))
        module.overwrites = len(node.args) == 2 and matcher.is_last_reader(node, cast(fx.Node, node.args[1]))
        module.leaves_wide = all(user in convs for user in node.users)
        for user in node.users if module.leaves_wide else ():
            cast(FrozenConv, matcher.module(user)).reads_wide = True
    frozen.graph.lint()
    frozen.delete_all_unused_submodules()
    frozen.recompile()
    return found


class OpenVINOModel(nn.Module):
    """A folded model run by OpenVINO, compiled for each shape and dtype of the input at its first call."""

    def __init__(self, plain: nn.Module) -> None:
        super().__init__()
        try:
            importlib.import_module("openvino")
        except ImportError as error:
            raise ImportError("freeze: engine='openvino' needs the package openvino") from error
        self.plain = plain
        self._compiled: dict[Any, Any] = {}
        self._requests = threading.local()

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key not in ("_compiled", "_requests")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._compiled, self._requests = {}, threading.local()

    def forward(self, x: Tensor) -> Tensor:
        """One tensor to one tensor, both on the CPU. Under autocast in bfloat16 OpenVINO computes in bfloat16."""
        if x.device.type != "cpu":
            raise ValueError(f"freeze: OpenVINO runs on the CPU, got an input on {x.device}")
        precision = "bf16" if autocast_dtype(x) is torch.bfloat16 or x.dtype is torch.bfloat16 else "f32"
        key = (tuple(x.shape), precision, torch.get_num_threads())
        mine: dict[Any, Any] = self._requests.__dict__.setdefault("kept", {})
        request = mine.get(key)
        if request is None:
            request = mine[key] = self._compile(x, key).create_infer_request()
        (out,) = request.infer([x.detach().float().numpy()], share_inputs=True).values()
        return torch.from_numpy(out.copy())

    def _compile(self, x: Tensor, key: tuple[Any, ...]) -> Any:
        if key not in self._compiled:
            if len(self._compiled) >= _KEPT:
                self._compiled = {}
            self._compiled[key] = compiled_by_openvino(self.plain, x, key[1])
        return self._compiled[key]


def compiled_by_openvino(model: nn.Module, x: Tensor, precision: str) -> Any:
    """The model compiled for inputs like x, tuned for latency, on torch's number of threads; "f32", "bf16" or "f16"."""
    ov = importlib.import_module("openvino")
    with torch.no_grad():
        converted = ov.convert_model(model.float(), example_input=x.float(), input=[list(x.shape)])
    options = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": precision}
    return ov.Core().compile_model(converted, "CPU", options | {"INFERENCE_NUM_THREADS": torch.get_num_threads()})
