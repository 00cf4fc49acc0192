"""The residual blocks: one op in training where gradients are taken, else unit by unit."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.fx import Proxy
from torch.nn.modules.module import _has_any_global_hook

from fused_resnet import batchnorm, dispatch
from fused_resnet.inference import InferencePlan, PlanCache, Watch
from fused_resnet.modules import Call, FusedModule, Units, as_leaf, has_pairs, is_watched, unfused_reason
from fused_resnet.ops.checks import autocast_dtype, is_channels_last, is_traced, needs_grad
from fused_resnet.ops.residual_block import Plan, Unit, residual_block
from fused_resnet.plans import plan_block
from fused_resnet.sync_batchnorm import SyncBatchNorm


def _unit(conv: nn.Conv2d, bn: nn.BatchNorm2d, scale: Tensor | None = None) -> Unit:
    running_mean, running_var = batchnorm.running(bn)
    gamma, beta = batchnorm.affine(bn, scale)
    stride, padding, dilation = cast("Any", (conv.stride, conv.padding, conv.dilation))
    return Unit(
        weight=conv.weight,
        gamma=gamma,
        beta=beta,
        running_mean=running_mean,
        running_var=running_var,
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=conv.groups,
        momentum=batchnorm.batch_momentum(bn),
        eps=bn.eps,
        training=batchnorm.uses_batch_statistics(bn),
        group=_group(bn),
    )


def _group(bn: nn.Module) -> Any:
    """The processes whose batches this batch norm merges, or None."""
    return bn.group() if isinstance(bn, SyncBatchNorm) else None


def run_blocks(stages: Iterable[nn.Module], x: Tensor, overwrite: bool) -> Tensor:
    """The stages (nn.Sequential of blocks) in a row, in inference; a block may write over what only it can see.

    `overwrite`: whether nobody else reads x.
    """
    for stage in stages:
        if type(stage) is not nn.Sequential or is_watched(stage):
            x, overwrite = stage(x), False
            continue
        for block in stage:
            if (
                isinstance(block, ResidualBlock)
                and type(block).forward is ResidualBlock.forward
                and not is_watched(block)
            ):
                planned, _ = block._inference.get(x)
                if planned is not None:
                    x, overwrite = planned.run(x, overwrite), True
                    continue
                fused = not block.unfused()  # else a hook on a part may keep what it saw
                x, overwrite = block._run(x, overwrite and fused), fused
            else:
                x, overwrite = block(x), False
    return x


class ResidualBlock(FusedModule):
    """A residual block: units in a row, the last one adding the shortcut. Subclasses name them in `_UNITS`.

    `residual_scale`, a parameter of one element or None (1), multiplies the last unit before the addition.
    """

    expansion = 1
    _adds_in_place = True
    memory = "balanced"  # or "low", "fast": see `ResNet`
    _UNITS: tuple[tuple[str, str], ...]
    downsample: nn.Module | None
    relu: nn.Module
    residual_scale: nn.Parameter | None

    def __init__(self) -> None:
        super().__init__()
        self.register_parameter("residual_scale", None)
        self._inference = PlanCache()

    def refresh(self) -> None:
        super().refresh()
        self._inference.clear()

    def units(self) -> Units:
        found: Units = {conv: (getattr(self, conv), getattr(self, bn), self.relu) for conv, bn in self._UNITS}
        path = self.downsample
        if isinstance(path, nn.Sequential) and len(path) == 2:
            found["downsample"] = (path[0], path[1], None)
        return found

    def unfused(self) -> dict[str, str]:
        found = super().unfused()
        if not (self.downsample is None or isinstance(self.downsample, FusedModule) or self._projection()):
            found.setdefault("downsample", "it is not a plain nn.Sequential(conv, bn) without hooks")
        return found

    def _projection(self) -> bool:
        """Whether the shortcut is a plain nn.Sequential(conv, bn) that nobody watches."""
        path = self.downsample
        if type(path) is not nn.Sequential or len(path) != 2 or is_watched(path) or not self._fused:
            return False
        return not _has_any_global_hook()

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to (N, planes * expansion, H', W'), channels_last where x is."""
        if self._fused and isinstance(x, Proxy):
            return as_leaf(self, x)
        return self._run(x)

    def _run(self, x: Tensor, overwrite: bool = False) -> Tensor:
        """`forward`; with `overwrite`, nobody else reads x, so that inference may write the output over it."""
        planned, situation = self._inference.get(x)
        if planned is not None:
            return planned.run(x, overwrite)
        if situation is None or self.unfused() or not (self.downsample is None or self._projection()):
            return self._run_units(x, overwrite)
        watch = Watch(self)
        calls: dict[str, Call] = {}
        out = self._run_units(x, overwrite, calls)
        if calls.keys() == self.units().keys() and watch.sees_writes():
            projection = calls.pop("downsample", None)
            row = tuple(calls[name] for name, _ in self._UNITS)
            self._inference.put(InferencePlan(situation, watch, row, projection))
        return out

    def _run_units(self, x: Tensor, overwrite: bool, calls: dict[str, Call] | None = None) -> Tensor:
        plan = self._plan(x)
        if plan is not None:
            return self._whole(x, plan)
        if self.downsample is None:
            shortcut = x
        elif self._projection():
            conv, bn = cast(nn.Sequential, self.downsample)
            shortcut = self._conv_bn_act("downsample", x, conv, bn, calls=calls)
            overwrite = unfused_reason(conv, bn, None) is None
        else:
            shortcut, overwrite = self.downsample(x), False
        *first, (last_conv, last_bn) = self._UNITS
        for name, norm in first:
            x = self._conv_bn_act(name, x, getattr(self, name), getattr(self, norm), self.relu, calls=calls)
        last = (getattr(self, last_conv), getattr(self, last_bn), self.relu)
        return self._conv_bn_act(last_conv, x, *last, shortcut, self.residual_scale, overwrite, calls)

    def _plan(self, x: Tensor) -> Plan | None:
        """How the block runs as one op: where gradients are taken of channels_last tensors, and nothing is odd.

        Where batch norms merge processes these must agree, for DistributedDataParallel's collectives lie between the
        units' own: nothing here may depend on a batch's size then. (An empty tensor has lost its layout.)
        """
        if not self._fused or self.memory == "fast":
            return None
        if not torch.is_grad_enabled() or not needs_grad(x, *self.parameters()) or is_traced(x):
            return None
        units = self.units()
        merged = any(_group(bn) is not None for _, bn, _ in units.values())
        if not (is_channels_last(x) or (merged and not x.numel() and dispatch.prefers_channels_last(x))):
            return None
        if self.unfused() or not dispatch.is_fused("bn_act", x.device.type):
            return None
        if self.downsample is not None and not self._projection():
            return None
        pairs = [(cast(nn.Conv2d, conv), cast(nn.BatchNorm2d, bn)) for conv, bn, _ in units.values()]
        dtype = x.dtype if autocast_dtype(x) is None else pairs[0][0].weight.dtype
        for conv, bn in pairs:
            if conv.bias is not None or conv.weight.dtype != dtype or conv.weight.device != x.device:
                return None
            if not (has_pairs(conv) and batchnorm.fits(bn, conv.weight)):
                return None
        convs = {name: conv for name, (conv, _) in zip(units, pairs, strict=True)}
        projection = convs.pop("downsample", None)
        return plan_block(x, tuple(convs.values()), projection, self.memory, merged)

    def _whole(self, x: Tensor, plan: Plan) -> Tensor:
        scales = {self._UNITS[-1][0]: self.residual_scale}
        units = {
            name: _unit(cast(nn.Conv2d, conv), cast(nn.BatchNorm2d, bn), scales.get(name))
            for name, (conv, bn, _) in self.units().items()
        }
        projection = units.pop("downsample", None)
        return residual_block(x, tuple(units.values()), projection, plan)


def training_plans(
    model: nn.Module, batch: int, size: int
) -> list[tuple[str, ResidualBlock, tuple[int, ...], Plan | None]]:
    """(name, block, input shape, plan) of each residual block, training on square images; None: unit by unit.

    The shapes come from a forward of one image, in inference.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    blocks = {name: module for name, module in model.named_modules() if isinstance(module, ResidualBlock)}
    handles = [
        block.register_forward_pre_hook(lambda _, args, name=name: shapes.update({name: tuple(args[0].shape)}))
        for name, block in blocks.items()
    ]
    training, conv = model.training, next(module for module in model.modules() if isinstance(module, nn.Conv2d))
    try:
        with torch.no_grad():
            model.eval()(conv.weight.new_zeros(1, conv.in_channels, size, size))
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()
    found = []
    for name, block in blocks.items():
        shape = (batch, *shapes[name][1:])
        weight = next(block.parameters())
        x = torch.empty(shape, dtype=weight.dtype, device=weight.device, memory_format=torch.channels_last)
        with torch.enable_grad():
            found.append((name, block, shape, block.train()._plan(x)))
        block.train(training)
    return found


class BasicBlock(ResidualBlock):
    """relu(bn2(conv2(relu(bn1(conv1(x))))) + shortcut): two 3x3 convs, He et al. 2015, fig. 5 left.

    Signature, attribute names and state dict as torchvision's BasicBlock.
    """

    _UNITS = (("conv1", "bn1"), ("conv2", "bn2"))

    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int = 1,
        downsample: nn.Module | None = None,
        groups: int = 1,
        base_width: int = 64,
        dilation: int = 1,
        norm_layer: Callable[..., nn.Module] | None = None,
    ) -> None:
        super().__init__()
        if groups != 1 or base_width != 64:
            raise ValueError(f"BasicBlock: expected groups=1 and base_width=64, got {groups} and {base_width}")
        if dilation > 1:
            raise NotImplementedError(f"BasicBlock: expected dilation 1, got {dilation}")
        norm_layer = norm_layer or nn.BatchNorm2d
        self.conv1 = nn.Conv2d(inplanes, planes, 3, stride, 1, bias=False)
        self.bn1 = norm_layer(planes)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(planes, planes, 3, 1, 1, bias=False)
        self.bn2 = norm_layer(planes)
        self.downsample = downsample
        self.stride = stride


class Bottleneck(ResidualBlock):
    """1x1, 3x3, 1x1 convs around a narrow middle, He et al. 2015, fig. 5 right, with the stride on the 3x3 ("v1.5").

    Signature, attribute names and state dict as torchvision's Bottleneck.
    """

    expansion = 4
    _UNITS = (("conv1", "bn1"), ("conv2", "bn2"), ("conv3", "bn3"))

    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int = 1,
        downsample: nn.Module | None = None,
        groups: int = 1,
        base_width: int = 64,
        dilation: int = 1,
        norm_layer: Callable[..., nn.Module] | None = None,
    ) -> None:
        super().__init__()
        norm_layer = norm_layer or nn.BatchNorm2d
        width = int(planes * (base_width / 64.0)) * groups
        self.conv1 = nn.Conv2d(inplanes, width, 1, bias=False)
        self.bn1 = norm_layer(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, dilation, dilation, groups, bias=False)
        self.bn2 = norm_layer(width)
        self.conv3 = nn.Conv2d(width, planes * self.expansion, 1, bias=False)
        self.bn3 = norm_layer(planes * self.expansion)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample
        self.stride = stride
