"""The residual blocks: one op in training where gradients are taken, else unit by unit."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.fx import Proxy
from torch.nn.modules.module import _has_any_global_hook

from fused_resnet import dispatch
from fused_resnet.inference import InferencePlan, PlanCache, Watch
from fused_resnet.modules import Call, FusedModule, Units, as_leaf, call_part, is_watched, unfused_reason
from fused_resnet.ops.residual_block import Plan
from fused_resnet.plans import LayerPlan, plan_layers
from fused_resnet.whole import Part, may_be_whole, plan_whole, run_whole


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
            made = InferencePlan(situation, watch, row, projection)
            self._inference.put(made)
            if dispatch.in_float32(x.dtype, x.device.type):  # the same digits from the first call on
                return made.run(x, overwrite)
        return out

    def _run_units(self, x: Tensor, overwrite: bool, calls: dict[str, Call] | None = None) -> Tensor:
        plan = self._plan(x)
        if plan is not None:
            return self._whole(x, plan)
        units = self.units()
        weight = self._autocast_weights(x, {name: conv for name, (conv, *_) in units.items()}).get
        if self.downsample is None:
            shortcut = x
        elif self._projection():
            conv, bn, _ = units["downsample"]
            shortcut = self._conv_bn_act("downsample", x, conv, bn, calls=calls, weight=weight("downsample"))
            overwrite = unfused_reason(conv, bn, None) is None
        else:
            shortcut, overwrite = call_part(self.downsample, x), False
        *first, last = (name for name, _ in self._UNITS)
        for name in first:
            x = self._conv_bn_act(name, x, *units[name], calls=calls, weight=weight(name))
        scale = self.residual_scale
        return self._conv_bn_act(last, x, *units[last], shortcut, scale, overwrite, calls, weight(last))

    def _plan(self, x: Tensor) -> Plan | None:
        """How the block runs as one op; None: unit by unit."""
        if not self._fused or not may_be_whole(x, self.memory) or self.unfused():
            return None
        if self.downsample is not None and not self._projection():
            return None
        return plan_whole(x, *self._parts(), self.memory)

    def _whole(self, x: Tensor, plan: Plan) -> Tensor:
        return run_whole(x, *self._parts(), plan)

    def _parts(self) -> tuple[tuple[Part, ...], Part | None]:
        """(the main path's, the projection's or None)."""
        scales = {self._UNITS[-1][0]: self.residual_scale}
        parts = {
            name: Part(cast(nn.Conv2d, conv), bn, scales.get(name)) for name, (conv, bn, _) in self.units().items()
        }
        projection = parts.pop("downsample", None)
        return tuple(parts.values()), projection


class TrainingPlan(NamedTuple):
    """How a residual block trains on inputs of a shape; plan None: unit by unit. `layers`: its convs', by name."""

    name: str
    block: ResidualBlock
    shape: tuple[int, ...]
    plan: Plan | None
    layers: dict[str, LayerPlan]


def training_plans(model: nn.Module, batch: int, size: int) -> list[TrainingPlan]:
    """The plan of each residual block, training on square images.

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
            plan = block.train()._plan(x)
        parts, projection = block._parts()
        beside = None if projection is None else projection.conv
        layers = plan_layers(x, [part.conv for part in parts], beside, plan)
        found.append(TrainingPlan(name, block, shape, plan, dict(zip(block.units(), layers, strict=True))))
        block.train(training)
    return found


class BasicBlock(ResidualBlock):
    """relu(bn2(conv2(relu(bn1(conv1(x))))) + shortcut): two 3x3 convs, He et al. 2015, fig. 5 left.

    Signature, attribute names and state dict as torchvision's BasicBlock.
    """

    _OURS = True
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
    _OURS = True
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
