"""What a kernel benchmark is made of. One file for each op, bench_<op>.py, holds its `OP`; `bench_ops` runs them.

An op's traffic is the least that it needs when each of its passes reads its inputs and writes its outputs once, by the
counting rules of `roofline`; its floor is the larger of bytes / copy bandwidth and FLOPs / matmul rate.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fused_resnet.parity import Comparison, compare, relative_error

from .rivals import WRONG, WrongResultError
from .roofline import Conv, network

MODELS = ("resnet18", "resnet50", "resnet152")
DIRECTIONS = {"infer": "inference", "forward": "forward in training", "backward": "backward"}
ROUNDINGS = 16  # by how many of them the input is changed to see what chance does to gradients
EPS = 1e-5


class Cost(NamedTuple):
    """Of one call: elements of activations, elements of weights, FLOPs."""

    activations: float
    weights: float = 0
    flops: float = 0


class Case(NamedTuple):
    """One shape. `sizes` is what the op's `inputs` and `cost` need to know; all per image."""

    name: str
    models: tuple[str, ...]
    sizes: Any


Inputs = dict[str, Any]  # name -> tensor, or None


@dataclass
class Maker:
    """Draws the inputs of one call; image tensors are channels_last."""

    batch: int
    dtype: torch.dtype
    device: torch.device
    random: torch.Generator = field(init=False)

    def __post_init__(self) -> None:
        self.random = torch.Generator(self.device).manual_seed(0)

    def _normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.random, device=self.device)

    def image(self, channels: int, height: int, width: int) -> Tensor:
        x = self._normal(self.batch, height, width, channels).to(self.dtype)
        return x.permute(0, 3, 1, 2)

    def weight(self, *shape: int) -> Tensor:
        fan_in = shape[1] * shape[2] * shape[3]
        w = (self._normal(*shape) * (2 / fan_in) ** 0.5).to(self.dtype)
        return w.contiguous(memory_format=torch.channels_last)

    def bn(self, channels: int) -> Inputs:
        """gamma of both signs, beta, running statistics, in float32."""
        return {
            "gamma": self._normal(channels),
            "beta": self._normal(channels),
            "running_mean": 0.1 * self._normal(channels),
            "running_var": 0.5 + self._normal(channels).abs(),
        }


Prepare = Callable[[Inputs, bool], Callable[[], Tensor]]  # (inputs, training) -> the call


@dataclass(frozen=True)
class Op:
    """One op's benchmark.

    Args:
        about: what it computes.
        cases: the shapes.
        inputs: (sizes, maker) -> the inputs of one call.
        cost: (sizes, direction) -> `Cost` per image, weights apart.
        rivals: name -> how that rival computes it; "eager" (torch's own layers, one after the other) is the measure of
            parity and must run in float64; "fused_resnet" is ours. A rival raises what is missing.
        leaves: the inputs that get gradients, by the last part of their names.
        directions: what is measured, of `DIRECTIONS`.
    """

    name: str
    about: str
    cases: Callable[[], list[Case]]
    inputs: Callable[[Any, Maker], Inputs]
    cost: Callable[[Any, str], Cost]
    rivals: dict[str, Prepare]
    leaves: tuple[str, ...]
    directions: tuple[str, ...] = tuple(DIRECTIONS)


def function(op: Callable[..., Tensor]) -> Prepare:
    """A rival that is a function of (training, **inputs)."""
    return lambda inputs, training: lambda: op(training, **inputs)


def compiled(op: Callable[..., Tensor]) -> Prepare:
    """torch.compile of such a function."""

    def prepare(inputs: Inputs, training: bool) -> Callable[[], Tensor]:
        import torch._functorch.config as functorch

        functorch.donated_buffer = False  # each forward's graph serves several backward runs
        return function(_compiled(op))(inputs, training)

    return prepare


_kept: dict[Any, Callable[..., Tensor]] = {}


def _compiled(op: Callable[..., Tensor]) -> Callable[..., Tensor]:
    if op not in _kept:
        torch._dynamo.config.cache_size_limit = 256  # a graph for each shape
        _kept[op] = torch.compile(op, dynamic=False)
    return _kept[op]


def merged(found: dict[Any, tuple[str, set[str]]]) -> list[Case]:
    """`sizes -> (name, models)` as cases."""
    return [Case(name, tuple(m for m in MODELS if m in models), sizes) for sizes, (name, models) in found.items()]


def shape_of(conv: Conv) -> tuple[int, int, int]:
    """(K, P, Q) of a conv's square output."""
    side = round(conv.positions**0.5)
    return conv.output // conv.positions, side, side


def across_models(pick: Callable[[Any], Iterator[tuple[Any, str]]]) -> list[Case]:
    """The distinct sizes that `pick(network)` yields as (sizes, name), over the models."""
    found: dict[Any, tuple[str, set[str]]] = {}
    for model in MODELS:
        for sizes, name in pick(network(model)):
            found.setdefault(sizes, (name, set()))[1].add(model)
    return merged(found)


# Running one call


def _is_leaf(op: Op, name: str) -> bool:
    return name.rpartition(".")[2] in op.leaves


def leaf_inputs(op: Op, inputs: Inputs, training: bool) -> Inputs:
    """The inputs, those of `op.leaves` as leaves that want gradients in training; running statistics are a copy."""
    out = copy.copy(inputs)
    for name, value in inputs.items():
        if isinstance(value, Tensor):
            if "running" in name:
                out[name] = value.clone()
            elif _is_leaf(op, name):
                # torch.compile compiles anew for each nn.Parameter, so only modules' tensors are such.
                own = value.detach().requires_grad_(training)
                out[name] = nn.Parameter(own, requires_grad=training) if "." in name else own
    return out


def _grads(op: Op, out: Tensor, inputs: Inputs, cotangent: Tensor) -> dict[str, Tensor]:
    leaves = {name: value for name, value in inputs.items() if _is_leaf(op, name) and value is not None}
    found = torch.autograd.grad(out, list(leaves.values()), cotangent, retain_graph=True)
    return {f"gradient {name}": grad for name, grad in zip(leaves, found, strict=True)}


def results(op: Op, rival: str, inputs: Inputs, direction: str, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """The named results of one call, in another dtype on request."""
    training = direction != "infer"
    if dtype is not None:
        inputs = {name: v.to(dtype) if isinstance(v, Tensor) else v for name, v in inputs.items()}
    inputs = leaf_inputs(op, inputs, training)
    with torch.set_grad_enabled(training):
        out = op.rivals[rival](inputs, training)()
    if direction != "backward":
        return {"output": out.detach()}
    return _grads(op, out, inputs, cotangent_of(out))


def cotangent_of(out: Tensor) -> Tensor:
    random = torch.Generator(out.device).manual_seed(1)
    values = torch.randn(out.shape, generator=random, device=out.device)
    return torch.empty_like(out).copy_(values)


class Parity:
    """Holds rivals to the exact results of one case: ours by the error budget, others to `WRONG`."""

    def __init__(self, op: Op, inputs: Inputs, direction: str, dtype: torch.dtype) -> None:
        self._op, self._inputs, self._direction, self._dtype = op, inputs, direction, dtype
        self._exact = results(op, "eager", inputs, direction, torch.float64)
        self._plain = results(op, "eager", inputs, direction)
        self._granted = dict.fromkeys(self._exact, 0.0)
        if direction == "backward":
            # A ReLU whose input is near 0 opens in one computation and stays shut in another, equally good one.
            noise = 1 + ROUNDINGS * torch.finfo(dtype).eps * cotangent_of(inputs["x"])
            noisy = results(op, "eager", inputs | {"x": inputs["x"] * noise}, direction)
            self._granted = {n: relative_error(noisy[n], self._exact[n]) for n in noisy}

    def check(self, rival: str) -> list[Comparison]:
        """Raises `WrongResultError` where a rival computes something else; returns the comparisons."""
        found = results(self._op, rival, self._inputs, self._direction)
        rows = []
        for name, exact in self._exact.items():
            row = compare(name, found[name], self._plain[name], exact, granted=self._granted[name])
            bad = not row.ok if rival == "fused_resnet" else not row.ours < WRONG[self._dtype]
            if bad:
                raise WrongResultError(f"{name}: relative error {row.ours:.1e}, allowed {row.budget:.1e}")
            rows.append(row)
        return rows


def calls(op: Op, rival: str, sets: list[Inputs], direction: str) -> list[Callable[[], Any]]:
    """One call for each set of inputs; for the backward direction the forward pass is done here."""
    training = direction != "infer"
    made: list[Callable[[], Any]] = []
    for inputs in sets:
        ready = leaf_inputs(op, inputs, training)
        call = op.rivals[rival](ready, training)
        if direction == "backward":
            out = call()
            cotangent = cotangent_of(out)
            call = lambda out=out, ready=ready, cotangent=cotangent: _grads(op, out, ready, cotangent)  # noqa: E731
        made.append(call)
    return made
