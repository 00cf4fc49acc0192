"""Switching fusion on in models that exist, and off again in any."""

from __future__ import annotations

from torch import nn

from fused_resnet.blocks import ResidualBlock
from fused_resnet.fusion.plan import plan_model
from fused_resnet.fusion.report import FuseReport
from fused_resnet.fusion.scope import FusedScope, Fusion, swap_in, swap_out
from fused_resnet.modules import AddReLU, BNAct, FusedModule
from fused_resnet.plans import MEMORY


def fuse(model: nn.Module, memory: str = "balanced") -> FuseReport:
    """Run the model's conv + BN (+ add) (+ ReLU) chains as fused ops: in place, and in this instance only.

    The forward of each module is followed symbolically. Where a chain is found, and nothing else can see what lies
    within it, the module gets a class of its own (a subclass of the one it had) whose forward runs the chain as one op.
    Parameters, buffers, children, names, state-dict keys and hooks stay where they are. At every call the module's
    own forward runs instead if anything that the analysis rested on has changed, and a chain's own modules run if one
    of them was hooked, parametrized or replaced since.

    Units that make up a residual block, relu(f(x) + shortcut(x)), run in training as one op, as the blocks of
    `fused_resnet`'s own models do: channels_last, where `memory` says so.

    Args:
        model: any module, in any mode. Models of `fused_resnet` are fused already (and, after `restore`, again).
        memory: "balanced", "low" or "fast": what such blocks keep for the backward pass, as for `fused_resnet.ResNet`.
            `fused_resnet`'s own blocks keep to what they were built with.

    Returns:
        A report: what was fused, and each batch norm that was not, with the reason.

    Raises:
        TypeError: the argument is no module. ValueError: `memory` is unknown. After any error the model is as it was.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"fuse: model must be a torch.nn.Module, got {type(model).__name__}")
    if memory not in MEMORY:
        raise ValueError(f"fuse: memory must be one of {', '.join(map(repr, MEMORY))}, got {memory!r}")
    plan = plan_model(model, memory)
    before = {id(m): (m, m.__dict__.get("_fusion")) for m in model.modules() if isinstance(m, FusedScope)}
    try:
        for planned in plan.scopes:
            swap_in(planned.scope, planned.fusion)
    except BaseException:
        _undo([planned.scope for planned in plan.scopes], before)
        raise
    planned_ids = {id(planned.scope) for planned in plan.scopes}
    for module in model.modules():
        if isinstance(module, FusedScope):
            if id(module) not in planned_ids:  # fused before, and no longer to be
                swap_out(module)
        elif isinstance(module, (FusedModule, BNAct, AddReLU)):
            module._fused = True
    fused = [
        (".".join(filter(None, (planned.path, unit.name))), unit.what)
        for planned in plan.scopes
        for unit in planned.units
    ]
    blocks = [(planned.path or type(model).__name__, block.what) for planned in plan.scopes for block in planned.blocks]
    return FuseReport(fused + _own_units(model), plan.skipped, blocks + _own_blocks(model))


def _undo(scopes: list[nn.Module], before: dict[int, tuple[FusedScope, Fusion | None]]) -> None:
    for scope in scopes:
        if isinstance(scope, FusedScope):
            swap_out(scope)
        if id(scope) in before:
            swap_in(scope, before[id(scope)][1])  # type: ignore[arg-type]


def _own_units(model: nn.Module) -> list[tuple[str, str]]:
    """The units of the modules that are `fused_resnet`'s own."""
    found = []
    for path, module in model.named_modules():
        if isinstance(module, FusedModule) and not isinstance(module, FusedScope):
            found += [(f"{path}.{unit}" if path else unit, "fused_resnet's own") for unit in module.units()]
        elif isinstance(module, (BNAct, AddReLU)):
            found.append((path, "fused_resnet's own"))
    return found


def _own_blocks(model: nn.Module) -> list[tuple[str, str]]:
    """The residual blocks that are `fused_resnet`'s own."""
    modules = model.named_modules()
    return [(path, ", ".join(block.units())) for path, block in modules if isinstance(block, ResidualBlock)]


def restore(model: nn.Module) -> nn.Module:
    """Let the model run unfused: each conv, BN, addition and activation by torch's own modules.

    In place; parameters, buffers and state-dict keys are untouched. Modules that `fuse` changed have their own class
    again. Returns the model.
    """
    for module in model.modules():
        if isinstance(module, FusedScope):
            swap_out(module)
        elif isinstance(module, (FusedModule, BNAct, AddReLU)):
            module._fused = False
    refresh(model)
    return model


def refresh(model: nn.Module) -> None:
    """Drop cached folded weights after writes that torch cannot see: through `.data` or a raw pointer.

    Every write that torch counts (optimisers, load_state_dict, copy_, .to, ...) is seen without this.
    """
    for module in model.modules():
        if isinstance(module, FusedModule):
            module.refresh()


def unfused_units(model: nn.Module) -> list[tuple[str, str]]:
    """(name, reason) of each conv + BN unit in the model that would run unfused now."""
    found = []
    for path, module in model.named_modules():
        if isinstance(module, FusedModule):
            found += [(f"{path}.{unit}" if path else unit, reason) for unit, reason in module.unfused().items()]
    return found
