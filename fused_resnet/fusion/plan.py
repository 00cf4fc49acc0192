"""From a model to the scopes that will be fused: nothing is changed here."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import fx, nn

from fused_resnet.fusion.blocks import Block, find_blocks
from fused_resnet.fusion.guards import CannotFollow, child, has_hooks, is_sequential, origin_of
from fused_resnet.fusion.inputs import Input
from fused_resnet.fusion.match import Matched, Matcher
from fused_resnet.fusion.norms import looks_like_norm, norm_kind
from fused_resnet.fusion.scope import FusedScope, Fusion, Variant, function_of, make_variant
from fused_resnet.fusion.trace import Traced, follow
from fused_resnet.fusion.units import Unit, make_unit
from fused_resnet.modules import AddReLU, BNAct, FusedModule

_COPIES = ("__deepcopy__", "__copy__", "__reduce__", "__reduce_ex__")


class Planned(NamedTuple):
    """A module at `path` whose forward holds `units`."""

    path: str
    scope: nn.Module
    fusion: Fusion
    units: tuple[Unit, ...]
    blocks: tuple[Block, ...]


class Plan(NamedTuple):
    """What to swap in, and each batch norm of no unit with the reason."""

    scopes: list[Planned]
    skipped: list[tuple[str, str]]


def plan_model(model: nn.Module, memory: str) -> Plan:
    """Analyse the model as it stands: its structure, hooks and modes. `memory` is that of whole blocks."""
    scopes: list[Planned] = []
    reasons: dict[int, str] = {}
    taken: set[int] = set()  # ids of norms in units, and of containers that a parent runs through
    ours: set[int] = set()
    calls: dict[int, dict[tuple[Input, ...] | None, None]] = {}  # how the graphs above call a module
    for path, module in model.named_modules():
        if isinstance(module, (FusedModule, BNAct, AddReLU)) and not isinstance(module, FusedScope):
            ours.update(id(m) for m in module.modules() if m is module or looks_like_norm(m))
            # A projection is the block's own: it runs it, or part by part calls it as it is.
            taken.update(id(m) for m in module.children() if any(looks_like_norm(part) for part in m.children()))
        if id(module) in taken or not _may_be_a_scope(module):
            continue
        try:
            planned, traced, matched = _plan_scope(path, module, list(calls.get(id(module), {None: None})), memory)
        except CannotFollow as error:
            for norm in _norms_of(module):
                reasons.setdefault(id(norm), f"{path or type(module).__name__}'s forward {error}")
            continue
        for called, signature in traced.calls:
            calls.setdefault(id(child(module, called)), {})[signature] = None
        for name, reason in matched.skipped.items():
            reasons[id(child(module, name))] = reason
        if planned is not None:
            scopes.append(planned)
            taken.update(id(child(module, name)) for name in traced.inlined)
            taken.update(id(child(module, unit.norm)) for unit in planned.units if unit.norm is not None)
    skipped = [
        (path, reasons.get(id(module), "no forward that could be followed calls it"))
        for path, module in model.named_modules()
        if looks_like_norm(module) and id(module) not in taken and id(module) not in ours
    ]
    return Plan(scopes, skipped)


def _may_be_a_scope(module: nn.Module) -> bool:
    if not module._modules or norm_kind(module) is not None or isinstance(module, torch.jit.ScriptModule):
        return False
    if isinstance(module, (FusedModule, BNAct, AddReLU)) and not isinstance(module, FusedScope):
        return False
    kind: Any = origin_of(type(module))
    return kind.forward is nn.Sequential.forward or not kind.__module__.startswith("torch.")


def _norms_of(module: nn.Module) -> Iterator[nn.Module]:
    """The norms that a module calls itself, or through containers."""
    for part in module._modules.values():
        if part is None:
            continue
        if looks_like_norm(part):
            yield part
        elif isinstance(part, (nn.Sequential, nn.ModuleList, nn.ModuleDict)):
            yield from _norms_of(part)


def _inlines(module: nn.Module) -> bool:
    """Whether a parent's graph runs through a container: its last part may join what follows, or it has no parts."""
    if not is_sequential(module) or has_hooks(module):
        return False
    if not module._modules:
        return True
    last = list(module._modules.values())[-1]
    return last is not None and (type(last) is nn.Conv2d or norm_kind(last) is not None or _inlines(last))


def _plan_scope(
    path: str, module: nn.Module, signatures: list[tuple[Input, ...] | None], memory: str
) -> tuple[Planned | None, Traced, Matched]:
    kind = origin_of(type(module))
    own = [name for name in _COPIES if getattr(kind, name, None) is not getattr(nn.Module, name, None)]
    if own:
        raise CannotFollow(f"belongs to a class with a {own[0]} of its own")
    if "forward" in module.__dict__:
        raise CannotFollow("is replaced on the instance")
    variants, first = [], None
    for signature in signatures[:_MOST_SIGNATURES]:
        traced = follow(module, _inlines, signature)
        variant, matched = _variant(module, traced, memory)
        variants.append(variant)
        first = first or (traced, variant, matched)
        flipped = _other_mode(module, traced, signature)
        if flipped is not None:
            variants.append(_variant(module, flipped, memory)[0])
    assert first is not None
    traced, variant, matched = first
    if not any(variant.units for variant in variants):
        return None, traced, matched
    return Planned(path, module, Fusion(tuple(variants)), variant.units, variant.blocks), traced, matched


_MOST_SIGNATURES = 4


def _other_mode(module: nn.Module, traced: Traced, signature: tuple[Input, ...] | None) -> Traced | None:
    """The forward in the other of training and evaluation, where it reads which it is."""
    modules = [child(module, guard.path) for guard in traced.guards if guard.name == "training"]
    if not modules:
        return None
    try:
        for m in modules:
            m.__dict__["training"] = not m.training
        return follow(module, _inlines, signature)
    except CannotFollow:
        return None
    finally:
        for m in modules:
            m.__dict__["training"] = not m.training


def _variant(module: nn.Module, traced: Traced, memory: str) -> tuple[Variant, Matched]:
    """(generated forward, what was matched)."""
    graph = traced.graph
    matched = Matcher(module, graph).match()
    functions: dict[str, Unit | Block] = {}
    units: dict[fx.Node, Unit] = {}
    with graph.inserting_before(next(iter(graph.nodes))):
        scope = graph.placeholder("scope")

    def replace(nodes: Sequence[fx.Node], stands_for: Unit | Block, *values: fx.Node) -> fx.Node:
        function = function_of(stands_for)
        function.__name__ = f"{function.__name__}_{len(functions)}"
        function.__module__ = "fused_resnet.fusion.units"
        functions[function.__name__] = stands_for
        last = nodes[-1]
        with graph.inserting_before(last):
            fused = graph.call_function(function, (scope, *values))
        last.replace_all_uses_with(fused)
        for node in reversed(nodes):
            graph.erase_node(node)
        return fused

    made = [make_unit(chain, module) for chain in matched.chains]
    replaced: dict[fx.Node, fx.Node] = {}
    for chain, unit in zip(matched.chains, made, strict=True):
        values = [replaced.get(v, v) for v in (chain.value, chain.residual) if v is not None]
        replaced[chain.nodes[-1]] = fused = replace(chain.nodes, unit, *values)
        units[fused] = unit
    for found in find_blocks(module, graph, units, memory):
        replaced[found.nodes[-1]] = replace(found.nodes, found.block, replaced.get(found.value, found.value))
    graph.lint()
    return make_variant(traced, graph, functions), matched
