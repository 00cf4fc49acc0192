"""Switching fusion off and on again in models of `fused_resnet`."""

from __future__ import annotations

from torch import nn

from fused_resnet.modules import AddReLU, BNAct, FusedModule


def restore(model: nn.Module) -> nn.Module:
    """Let the model run unfused: each conv, BN, addition and activation by torch's own modules.

    In place; parameters, buffers and state-dict keys are untouched. Returns the model.
    """
    for module in model.modules():
        if isinstance(module, (FusedModule, BNAct, AddReLU)):
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
