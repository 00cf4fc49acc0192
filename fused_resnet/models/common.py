"""What the families share: the shortcut options of He et al. 2015, initialisation, residual scales."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Proxy
from torch.nn import functional as F

from fused_resnet.blocks import BasicBlock, ResidualBlock
from fused_resnet.buffers import Buffers
from fused_resnet.foreach import Together
from fused_resnet.modules import FusedModule, Units, as_leaf, call_part, call_reason, is_ours, is_watched
from fused_resnet.ops.checks import autocast_dtype, is_traced
from fused_resnet.plans import MEMORY

SHORTCUTS = ("A", "B", "C", "none")


class Network(FusedModule):
    """Base of the networks: what the layers between the images and the last feature map do together in a forward."""

    def __init__(self) -> None:
        super().__init__()
        self._together = Together()
        self._outputs = Buffers()

    def train(self, mode: bool = True) -> Any:
        if mode != self.training:
            self._outputs.clear()
        return super().train(mode)

    @contextlib.contextmanager
    def _at_once(self, x: Tensor) -> Iterator[None]:
        """For the layers of a forward of x: batches are counted, and weights cast for autocast, all at once; large
        tensors take memory that the network keeps. Not where torch records each operation."""
        if not self._fused or isinstance(x, Proxy) or is_traced(x) or call_reason() is not None:
            yield
            return
        keeps = x.device.type == "cpu"
        with self._outputs.reused() if keeps else contextlib.nullcontext(), self._together_in(x):
            yield

    def _together_in(self, x: Tensor) -> AbstractContextManager[None]:
        """Not where code of others may run between the layers."""
        differentiates = torch.is_grad_enabled()
        if not (differentiates or self.training):
            return contextlib.nullcontext()
        for name, child in self._modules.items():
            if name.startswith("layer"):
                ours = type(child) is nn.Sequential and not is_watched(child) and all(map(is_ours, child))
            else:  # conv1, bn1 and relu are units, what follows the blocks comes later
                ours = name != "maxpool" or (child is not None and is_ours(child))
            if not ours:
                return contextlib.nullcontext()
        return self._together.forward(x.device, autocast_dtype(x) if differentiates else None)


class PadShortcut(FusedModule):
    """Option A: every `stride`-th pixel, and zeros for the channels that are new. No parameters."""

    _OURS = True

    def __init__(self, inplanes: int, planes: int, stride: int) -> None:
        super().__init__()
        self.inplanes, self.planes, self.stride = inplanes, planes, stride

    def extra_repr(self) -> str:
        return f"{self.inplanes}, {self.planes}, stride={self.stride}"

    def forward(self, x: Tensor) -> Tensor:
        """(N, inplanes, H, W) to (N, planes, ceil(H / stride), ceil(W / stride))."""
        if self._fused and isinstance(x, Proxy):
            return as_leaf(self, x)
        # The same pixels by a pool: exporters can prove that its sizes are the convs', and a slice's they cannot.
        x = F.max_pool2d(x, 1, self.stride) if isinstance(x, Proxy) else x[:, :, :: self.stride, :: self.stride]
        return F.pad(x, (0, 0, 0, 0, 0, self.planes - self.inplanes))


class PooledShortcut(FusedModule, nn.Sequential):
    """The projection of ResNet-D (He et al. 2018, "Bag of Tricks", fig. 2c): average pool, 1x1 conv without stride, BN.

    Keys as timm's: 0 the pool (identity at stride 1), 1 the conv, 2 the BN.
    """

    _OURS = True

    def __init__(self, inplanes: int, planes: int, stride: int, norm_layer: Callable[..., nn.Module]) -> None:
        super().__init__()
        pool = nn.AvgPool2d(2, stride, ceil_mode=True, count_include_pad=False) if stride > 1 else nn.Identity()
        for module in (pool, nn.Conv2d(inplanes, planes, 1, bias=False), norm_layer(planes)):
            self.append(module)

    def units(self) -> Units:
        return {"1": (self[1], self[2], None)}

    def forward(self, x: Tensor) -> Tensor:
        """(N, inplanes, H, W) to (N, planes, ceil(H / stride), ceil(W / stride))."""
        if self._fused and isinstance(x, Proxy):
            return as_leaf(self, x)
        return self._conv_bn_act("1", call_part(self[0], x), self[1], self[2])


def make_shortcut(
    option: str,
    inplanes: int,
    planes: int,
    stride: int,
    norm_layer: Callable[..., nn.Module],
    pooled: bool = False,
) -> nn.Module | None:
    """A block's shortcut, None for the identity: A pads, B projects where the shape changes, C projects everywhere."""
    changes = stride != 1 or inplanes != planes
    if option == "A" and changes:
        return PadShortcut(inplanes, planes, stride)
    if option == "C" or (option == "B" and changes):
        if pooled:
            return PooledShortcut(inplanes, planes, stride, norm_layer)
        return nn.Sequential(nn.Conv2d(inplanes, planes, 1, stride, bias=False), norm_layer(planes))
    return None


class PlainBlock(BasicBlock):
    """The two convs of a basic block without its shortcut: relu(bn2(conv2(relu(bn1(conv1(x))))))."""

    _OURS = True

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to (N, planes, H', W')."""
        if self._fused and isinstance(x, Proxy):
            return as_leaf(self, x)
        x = self._conv_bn_act("conv1", x, self.conv1, self.bn1, self.relu)
        return self._conv_bn_act("conv2", x, self.conv2, self.bn2, self.relu)


def check_options(shortcut: str, memory: str, residual_scale: float | None, zero_init_residual: bool = False) -> None:
    if shortcut not in SHORTCUTS:
        raise ValueError(f"shortcut must be one of {', '.join(map(repr, SHORTCUTS))}, got {shortcut!r}")
    if memory not in MEMORY:
        raise ValueError(f"memory must be one of {', '.join(map(repr, MEMORY))}, got {memory!r}")
    if residual_scale is not None and not isinstance(residual_scale, (int, float)):
        raise TypeError(f"residual_scale must be None or the number to start from, got {residual_scale!r}")
    if residual_scale is not None and shortcut == "none":
        raise ValueError("residual_scale scales what is added to the shortcut; without shortcuts there is none")
    if zero_init_residual and shortcut == "none":
        raise ValueError("zero_init_residual lets blocks start as their shortcuts; without shortcuts there are none")


def prepare_blocks(modules: Iterable[nn.Module], memory: str, residual_scale: float | None) -> None:
    """Tell the blocks among the modules what to keep for backward, and give them their learnable scale."""
    for module in modules:
        if isinstance(module, ResidualBlock):
            module.memory = memory
            if residual_scale is not None:
                module.residual_scale = nn.Parameter(torch.tensor(float(residual_scale)))


def initialise(model: nn.Module, zero_init_residual: bool = False) -> None:
    """He et al. 2015, "Delving Deep into Rectifiers", fan out; BN starts as the identity, or, last in a block, at 0."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, (nn.BatchNorm2d, nn.GroupNorm)) and module.weight is not None:
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
    for module in model.modules() if zero_init_residual else ():
        if isinstance(module, ResidualBlock):
            last = getattr(module, module._UNITS[-1][1])
            if isinstance(last.weight, Tensor):
                nn.init.zeros_(last.weight)


def constructor(name: str, title: str, options: str, build: Callable[..., Any]) -> Callable[..., Any]:
    """`name(weights=None, progress=True, **kwargs)`, as torchvision's constructors are called."""
    from fused_resnet.models.weights import load_weights

    def make(weights: Any = None, progress: bool = True, **kwargs: Any) -> Any:
        return build(**kwargs) if weights is None else load_weights(name, lambda: build(**kwargs), weights, progress)

    make.__name__ = make.__qualname__ = name
    make.__module__ = build.__module__
    make.__doc__ = f"""{title}

    Args:
        weights: None, the path or URL of a state dict, or a state dict. Files are read with weights_only=True.
        progress: show a progress bar while downloading.
        kwargs: {options}.

    Raises:
        ValueError: the weights do not fit the model; the message names both sides.
    """
    return make


class DeepStem(FusedModule, nn.Sequential):
    """The stem of ResNet-C and -D ("Bag of Tricks", fig. 2b) up to its last conv: three 3x3 convs, one with stride 2.

    Keys as timm's: convs 0, 3, 6 and BNs 1, 4.
    """

    def __init__(self, in_channels: int, planes: int, norm_layer: Callable[..., nn.Module]) -> None:
        super().__init__()
        middle = planes // 2
        for inputs, outputs, stride in ((in_channels, middle, 2), (middle, middle, 1)):
            self.append(nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False))
            self.append(norm_layer(outputs))
            self.append(nn.ReLU(inplace=True))
        self.append(nn.Conv2d(middle, planes, 3, 1, 1, bias=False))

    def units(self) -> Units:
        return {"0": (self[0], self[1], self[2]), "3": (self[3], self[4], self[5])}

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_channels, H, W) to (N, planes, ceil(H / 2), ceil(W / 2)), before BN and ReLU."""
        if self._fused and isinstance(x, Proxy):
            return as_leaf(self, x)
        return self[6](self.before_last(x))

    def before_last(self, x: Tensor) -> Tensor:
        """What the last conv reads, for whoever fuses that conv with the BN behind the stem."""
        x = self._conv_bn_act("0", x, self[0], self[1], self[2])
        return self._conv_bn_act("3", x, self[3], self[4], self[5])


def dilations(output_stride: int | None, replace_stride_with_dilation: Any) -> tuple[bool, ...]:
    """For stages 2 to 4, whether a dilation takes the stride's place."""
    if output_stride is None:
        return tuple(replace_stride_with_dilation or (False, False, False))
    known = {32: (False, False, False), 16: (False, False, True), 8: (False, True, True)}
    if output_stride not in known:
        raise ValueError(f"output_stride must be 8, 16 or 32, got {output_stride!r}")
    if replace_stride_with_dilation is not None:
        raise ValueError("give output_stride or replace_stride_with_dilation, not both")
    return known[output_stride]
