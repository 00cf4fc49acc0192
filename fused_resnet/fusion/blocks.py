"""Whole residual blocks among a graph's units: found by structure, run as one op where our own blocks would be."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, cast

from torch import Tensor, fx, nn

from fused_resnet.fusion.guards import child
from fused_resnet.fusion.match import module_reason
from fused_resnet.fusion.norms import norm_kind
from fused_resnet.fusion.units import Unit, call, is_plain, output_shape, passed_reason, static_reason
from fused_resnet.ops.checks import autocast_dtype, is_autocast
from fused_resnet.whole import Part, may_be_whole, plan_whole, run_whole


class Block(NamedTuple):
    """relu(f(x) + shortcut(x)): f a row of conv + BN (+ ReLU) units, the shortcut x itself or one conv + BN of it.

    `sequence` holds units, and paths of identities, in the model's order, each with whether it stands beside the row;
    the last one makes the addition. `memory`: see `fused_resnet.fuse`.
    """

    sequence: tuple[tuple[Unit | str, bool], ...]
    memory: str

    @property
    def units(self) -> tuple[Unit, ...]:
        return tuple(step for step, _ in self.sequence if isinstance(step, Unit))

    @property
    def row(self) -> tuple[Unit, ...]:
        return tuple(step for step, aside in self.sequence if isinstance(step, Unit) and not aside)

    @property
    def projection(self) -> Unit | None:
        return next((step for step, aside in self.sequence if isinstance(step, Unit) and aside), None)

    @property
    def what(self) -> str:
        names = ", ".join(unit.name for unit in self.row)
        return names if self.projection is None else f"{names}; projection {self.projection.name}"


class Found(NamedTuple):
    """The nodes of a block in a graph of units, in order, and what it reads."""

    nodes: tuple[fx.Node, ...]
    value: fx.Node
    block: Block


def find_blocks(scope: nn.Module, graph: fx.Graph, units: Mapping[fx.Node, Unit], memory: str) -> list[Found]:
    """Blocks of at least two units in a row; nothing else may stand between the first of their nodes and the last."""
    position = {node: index for index, node in enumerate(graph.nodes)}
    found = []
    for last, unit in units.items():
        if not (unit.adds and unit.relu and _may_join(scope, unit)):
            continue
        _, value, residual = last.args
        row, start = _back(scope, value, units, True)
        beside, other = _back(scope, residual, units, False)
        if start is not other:
            continue
        in_row, in_beside = (sum(node in units for node in path) for path in (row, beside))
        if in_row >= 1 and in_beside <= 1:
            aside = {*beside}
        elif in_row == 0 and in_beside >= 2:  # the projection's unit makes the addition
            aside = {*row, last}
        else:
            continue
        nodes = sorted((*row, *beside, last), key=position.__getitem__)
        if position[last] - position[nodes[0]] != len(nodes) - 1:
            continue
        sequence = tuple((units.get(node) or str(node.target), node in aside) for node in nodes)
        found.append(Found(tuple(nodes), start, Block(sequence, memory)))
    return found


def _may_join(scope: nn.Module, unit: Unit) -> bool:
    if unit.conv is None or unit.norm is None or unit.own == "other":
        return False
    return child(scope, unit.conv).bias is None


def _back(scope: nn.Module, node: Any, units: Mapping[fx.Node, Unit], relu: bool) -> tuple[list[fx.Node], fx.Node]:
    """The units and identities that lead to a node and to nothing else, and where they start; `relu`: whether the last
    unit of these ends in one, as all before it do."""
    path: list[fx.Node] = []
    while len(node.users) == 1:
        unit = units.get(node)
        if unit is not None:
            if not _may_join(scope, unit) or unit.adds or unit.relu is not relu:
                break
            before, relu = node.args[1], True
        elif node.op == "call_module" and _is_identity(child(scope, node.target)) and len(node.args) == 1:
            before = node.args[0]
        else:
            break
        if not isinstance(before, fx.Node):
            break
        path.append(node)
        node = before
    return path, node


def _is_identity(module: nn.Module) -> bool:
    return type(module) is nn.Identity and module_reason(module, "") is None


def run(scope: Any, block: Block, x: Any) -> Any:
    """The block's output: by one op, or step by step."""
    whole = _whole(scope, block, x)
    if whole is not None:
        for unit in block.units:
            scope._refused.pop(unit.name, None)
        return whole
    row = shortcut = x
    for step, aside in block.sequence[:-1]:
        value = shortcut if aside else row
        value = call(scope, step, value) if isinstance(step, Unit) else child(scope, step)(value)
        row, shortcut = (row, value) if aside else (value, shortcut)
    last, aside = block.sequence[-1]
    return call(scope, cast(Unit, last), *((shortcut, row) if aside else (row, shortcut)))


def _whole(scope: Any, block: Block, x: Any) -> Tensor | None:
    """The block as one op; None where our own blocks would not run so either, or a unit would not be fused."""
    if not isinstance(x, Tensor) or not may_be_whole(x, block.memory) or not is_plain(x) or x.dim() != 4:
        return None
    if any(static_reason(scope, unit) is not None for unit in block.units):
        return None
    if passed_reason(scope, tuple(step for step, _ in block.sequence if isinstance(step, str))) is not None:
        return None
    row = tuple(_part(scope, unit) for unit in block.row)
    projection = None if block.projection is None else _part(scope, block.projection)
    every = row if projection is None else (*row, projection)
    if len({id(part.bn) for part in every}) != len(every):
        return None  # the order of its two updates of the running statistics would be the op's
    autocast = autocast_dtype(x)
    if is_autocast(x) and any(part.frozen for part in every):
        return None
    if projection is None and autocast not in (None, x.dtype):
        return None  # the addition takes x as it is, and promotes
    shape: tuple[int, ...] | None = tuple(x.shape)
    for part in row:
        if shape is not None:
            shape = output_shape(part.conv, part.bn, shape, x.dtype, x.device, autocast)
    beside = tuple(x.shape)
    if projection is not None:
        beside = output_shape(projection.conv, projection.bn, beside, x.dtype, x.device, autocast)  # type: ignore[assignment]
    if shape is None or shape != beside:
        return None
    plan = plan_whole(x, row, projection, block.memory)
    return None if plan is None else run_whole(x, row, projection, plan)


def _part(scope: nn.Module, unit: Unit) -> Part:
    norm = child(scope, cast(str, unit.norm))
    kind = norm_kind(norm)
    assert kind is not None
    return Part(cast(nn.Conv2d, child(scope, cast(str, unit.conv))), norm, frozen=kind.frozen)


def function_of(block: Block) -> Callable[..., Any]:
    """The block as a function of (scope, value) for generated code."""

    def fused(scope: Any, x: Any) -> Any:
        return run(scope, block, x)

    fused.__name__ = fused.__qualname__ = "fused_residual_block"
    return fused
