"""Drop-in modules. Parameters and buffers live in ordinary nn.Conv2d and nn.BatchNorm2d children."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.fx import Proxy, Tracer
from torch.nn.modules.module import _has_any_global_hook

from fused_resnet import dispatch, ops
from fused_resnet.folding import FOLDED, FoldCache, accumulate_dtype, fold
from fused_resnet.ops.checks import (
    autocast_dtype,
    check_activation,
    check_channels,
    is_channels_last,
    is_traced,
    needs_grad,
)
from fused_resnet.ops.conv_bias_act import conv_layout, conv_output_shape
from fused_resnet.ops.residual_block import Plan, Unit, residual_block
from fused_resnet.ops.sync_bn_act import sync_bn_act
from fused_resnet.plans import plan_block

Units = dict[str, tuple[nn.Module, nn.Module, nn.Module | None]]
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_OVERRIDES = ("forward", "_conv_forward")
_PLAIN = (nn.Parameter, Tensor, type(None))


def call_reason() -> str | None:
    """Why every module must run unfused now: torch is watching or transforming calls that only torch's ops support."""
    if _has_any_global_hook():
        return "a global module hook is set"
    if torch.compiler.is_compiling():
        return None
    if forward_ad._current_level >= 0:
        return "forward-mode differentiation is active"
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return "a torch.func transform is active"
    return "torch.jit.trace is active" if torch._C._get_tracing_state() else None


def unfused_reason(
    conv: nn.Module | None, bn: nn.Module | None, act: nn.Module | None, norm: type[nn.Module] = nn.BatchNorm2d
) -> str | None:
    """Why a conv, BN, activation unit must run unfused: None where nothing that fusion bypasses would be missed.

    `norm` is the type of BN that the caller knows to run.
    """
    reason = call_reason()
    if reason is not None:
        return reason
    for child, expected in ((conv, nn.Conv2d), (bn, norm), (act, nn.ReLU)):
        if child is None:
            continue
        if type(child) is not expected:  # a subclass, a parametrized or a wrapped module may compute something else
            return f"{type(child).__name__} is not {expected.__name__}"
        state = child.__dict__
        for hooks in _HOOKS:
            if state[hooks]:
                return f"a hook is set on its {expected.__name__}"
        if any(name in state for name in _OVERRIDES):
            return f"forward is replaced on its {expected.__name__}"
        if type(state["_parameters"].get("weight")) not in _PLAIN and not torch.compiler.is_compiling():
            return f"the weight of its {expected.__name__} is a tensor subclass"
    if conv is not None and (conv.padding_mode != "zeros" or isinstance(conv.padding, str)):
        return f"padding is {conv.padding!r} with mode {conv.padding_mode!r}"
    return None


def _norm(bn: nn.Module | None) -> type[nn.Module]:
    """The type of BN that this unit may have: ours across processes, else torch's."""
    return SyncBatchNorm if type(bn) is SyncBatchNorm else nn.BatchNorm2d


def _affine(bn: nn.BatchNorm2d, scale: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """BN's gamma and beta, times a residual branch's scale: scale * bn(y) is a BN itself, so kernels need not know."""
    if scale is None:
        return bn.weight, bn.bias
    gamma = scale.repeat(bn.num_features) if bn.weight is None else bn.weight * scale
    return gamma, None if bn.bias is None else bn.bias * scale


def _batch_momentum(bn: nn.BatchNorm2d) -> float | Tensor:
    """Count the batch as nn.BatchNorm2d does; the weight of its statistics, on the device where it is an average."""
    if bn.training and bn.track_running_stats and bn.num_batches_tracked is not None:
        bn.num_batches_tracked.add_(1)
        if bn.momentum is None:
            dtype = torch.float32 if bn.running_mean is None else accumulate_dtype(bn.running_mean.dtype)
            return bn.num_batches_tracked.to(dtype).reciprocal()
    return 0.0 if bn.momentum is None else bn.momentum


def _uses_batch_statistics(bn: nn.BatchNorm2d) -> bool:
    return bn.training or (bn.running_mean is None and bn.running_var is None)


def _running(bn: nn.BatchNorm2d) -> tuple[Tensor | None, Tensor | None]:
    """The running statistics as nn.BatchNorm2d hands them on: not where it trains without tracking."""
    return (bn.running_mean, bn.running_var) if not bn.training or bn.track_running_stats else (None, None)


def _has_pairs(conv: nn.Conv2d) -> bool:
    """Whether the geometry is as nn.Conv2d makes it, pairs; set by hand it may be ints, which torch takes as well."""
    return type(conv.stride) is type(conv.padding) is type(conv.dilation) is tuple


def _fits(bn: nn.BatchNorm2d, weight: Tensor) -> bool:
    """Whether BN's vectors are of the size and of a type that go with a conv's weight; where not, ops refuse them."""
    shape, dtypes = weight.shape[:1], (weight.dtype, torch.float32 if weight.dtype.itemsize == 2 else weight.dtype)
    vectors = (bn.weight, bn.bias, bn.running_mean, bn.running_var)
    return all(v is None or (v.shape == shape and v.dtype in dtypes) for v in vectors)


class FusedModule(nn.Module):
    """Base of the modules that run conv, BN, residual and activation fused.

    A unit is fused only while each child it bypasses is exactly the torch module of its kind, without hooks; checked
    at every call. `fused_resnet.restore` switches fusion off.
    """

    _adds_in_place = False  # the sum has the conv's dtype, not the promoted one, where autocast makes them differ

    def __init__(self) -> None:
        super().__init__()
        self._fused = True
        self._folded: dict[str, FoldCache] = {}

    def units(self) -> Units:
        """name -> (conv, bn, activation) of what this module itself runs as one op."""
        return {}

    def unfused(self) -> dict[str, str]:
        """unit -> why it would run unfused now."""
        if not self._fused:
            return dict.fromkeys(self.units(), "restored")
        units = self.units().items()
        reasons = {name: unfused_reason(conv, bn, act, _norm(bn)) for name, (conv, bn, act) in units}
        return {name: reason for name, reason in reasons.items() if reason is not None}

    def refresh(self) -> None:
        """Drop the folded weights, after a write that torch cannot see (through `.data` or a raw pointer)."""
        for cache in self._folded.values():
            cache.clear()

    def train(self, mode: bool = True) -> Any:
        self.refresh()
        return super().train(mode)

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        self.refresh()
        return super()._apply(*args, **kwargs)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any, **kwargs: Any) -> None:
        if prefix + FOLDED in state_dict:  # here, since strict=False would pass over it
            raise RuntimeError(
                f"{type(self).__name__} has batch norm, but the state dict was saved from a folded model "
                "(fused_resnet.to_plain): load the state dict of the model before folding"
            )
        self.refresh()
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def _conv_bn_act(
        self,
        name: str,
        x: Tensor,
        conv: nn.Module,
        bn: nn.Module,
        act: nn.Module | None = None,
        residual: Tensor | None = None,
        scale: Tensor | None = None,
        overwrite: bool = False,
    ) -> Tensor:
        """act(scale * bn(conv(x)) + residual), fused where it may be. `name` is the unit's key in the cache.

        `overwrite`: nobody else reads the residual, so that inference may write the result over it.
        """
        if not self._fused or isinstance(x, Proxy) or unfused_reason(conv, bn, act, _norm(bn)) is not None:
            return self._unfused(x, conv, bn, act, residual, scale)
        conv, bn = cast(nn.Conv2d, conv), cast(nn.BatchNorm2d, bn)
        activation = None if act is None else "relu"
        training = _uses_batch_statistics(bn)
        if residual is not None and self._adds_in_place:
            residual = residual.to(autocast_dtype(x) or residual.dtype)
        if training and isinstance(bn, SyncBatchNorm) and bn.merges():
            return bn.bn_act(conv(x), *_affine(bn, scale), residual, activation)
        inference = not training and not needs_grad(x, conv.weight, conv.bias, bn.weight, bn.bias, residual, scale)
        if inference and not is_traced(x):
            y = self._infer(name, x, conv, bn, activation, residual, scale, overwrite)
            if y is not None:
                return y
        if not dispatch.is_fused("conv_bn_act" if inference else "bn_act", x.device.type):
            return self._unfused(x, conv, bn, act, residual, scale)
        return ops.conv_bn_act(
            x,
            conv.weight,
            *_affine(bn, scale),
            *_running(bn),
            residual,
            bias=conv.bias,
            stride=conv.stride,  # type: ignore[arg-type]
            padding=conv.padding,  # type: ignore[arg-type]
            dilation=conv.dilation,  # type: ignore[arg-type]
            groups=conv.groups,
            training=training,
            momentum=_batch_momentum(bn),
            eps=bn.eps,
            activation=activation,
        )

    @staticmethod
    def _unfused(
        x: Tensor,
        conv: nn.Module,
        bn: nn.Module,
        act: nn.Module | None,
        residual: Tensor | None,
        scale: Tensor | None = None,
    ) -> Tensor:
        y = bn(conv(x))
        if scale is not None:
            y = y * scale
        if residual is not None:
            y += residual
        return y if act is None else act(y)

    def _infer(
        self,
        name: str,
        x: Tensor,
        conv: nn.Conv2d,
        bn: nn.BatchNorm2d,
        activation: str | None,
        residual: Tensor | None,
        scale: Tensor | None = None,
        overwrite: bool = False,
    ) -> Tensor | None:
        """The unit with kept folded weights; None where the backend does not fold, or for the op to refuse."""
        weight = conv.weight
        if not x.dim() == weight.dim() == 4 or x.shape[1] != weight.shape[1] * conv.groups or x.device != weight.device:
            return None
        dtype = autocast_dtype(x)
        if dtype is not None:
            x = x.to(dtype)
        elif x.dtype != weight.dtype:
            return None
        geometry = (conv.stride, conv.padding, conv.dilation, conv.groups)
        if not _has_pairs(conv):
            return None
        out_shape = conv_output_shape(x, weight, conv.stride, cast("tuple[int, ...]", conv.padding), conv.dilation)
        if min(out_shape[2:]) < 1:
            return None
        if residual is not None and (residual.shape, residual.dtype, residual.device) != (out_shape, x.dtype, x.device):
            return None
        choice = dispatch.choose("conv_bias_act_forward", x, weight, activation)
        if choice.pack is None:
            return None
        x, residual = conv_layout(x, weight, residual)
        channels_last = is_channels_last(x)
        cache = self._folded.get(name)
        if cache is None:
            cache = self._folded[name] = FoldCache()
        tensors = (weight, conv.bias, bn.weight, bn.bias, bn.running_mean, bn.running_var, scale)
        key = (x.dtype, channels_last, bn.eps, geometry)
        folded = cache.get(tensors, key)
        if folded is None:
            stamp = cache.stamp(tensors)
            names = ("bias", "gamma", "beta", "running_mean", "running_var")
            check_channels("conv_bn_act", x, weight.shape[0], zip(names, tensors[1:-1], strict=True))
            gamma, beta = _affine(bn, scale)
            mean, var = cast("tuple[Tensor, Tensor]", (bn.running_mean, bn.running_var))
            w, b = fold(weight, conv.bias, gamma, beta, mean, var, bn.eps, x.dtype)
            folded = (choice.pack(w, tuple(x.shape), *geometry) if channels_last else w, b)
            cache.put(stamp, key, folded)
        function = choice.onto_residual if overwrite and choice.onto_residual is not None else choice.function
        return function(x, *folded, residual, *geometry, activation)


def _as_leaf(module: nn.Module, x: Proxy, *args: Any) -> Proxy:
    """Under torch.fx our modules are leaves, as torch.nn's are; restored, they show their parts."""
    return x.tracer.create_proxy("call_module", cast(Tracer, x.tracer).path_of_module(module), (x, *args), {})


class ConvBNAct(FusedModule):
    """activation(bn(conv(x)) + residual): an nn.Conv2d without bias and an nn.BatchNorm2d, `conv` and `bn`.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups: as torch.nn.Conv2d; padding None
            keeps the spatial size at stride 1 (odd kernels).
        activation: "relu" or None.
        bias: whether the conv has a bias.
        eps, momentum: as torch.nn.BatchNorm2d.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 3,
        stride: int = 1,
        padding: int | None = None,
        dilation: int = 1,
        groups: int = 1,
        *,
        activation: str | None = "relu",
        bias: bool = False,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
    ) -> None:
        super().__init__()
        check_activation("ConvBNAct", activation)
        if padding is None:
            padding = dilation * (kernel_size - 1) // 2
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias=bias)
        self.bn = nn.BatchNorm2d(out_channels, eps=eps, momentum=momentum)
        self.act = nn.ReLU(inplace=True) if activation == "relu" else None

    def units(self) -> Units:
        return {"conv": (self.conv, self.bn, self.act)}

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """(N, C, H, W), and a residual of the output's shape, to (N, K, H', W')."""
        if self._fused and isinstance(x, Proxy):
            return _as_leaf(self, x, residual)
        return self._conv_bn_act("conv", x, self.conv, self.bn, self.act, residual)


class BNAct(nn.BatchNorm2d):
    """activation(batch_norm(x) + residual) for (N, C, ...) inputs of 2 to 5 dimensions.

    It is an nn.BatchNorm2d (same arguments, parameters, buffers and state dict) with an `activation`.
    """

    _fused = True

    def __init__(self, num_features: int, *args: Any, activation: str | None = "relu", **kwargs: Any) -> None:
        super().__init__(num_features, *args, **kwargs)
        check_activation("BNAct", activation)
        self.activation = activation

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, activation={self.activation!r}"

    def _check_input_dim(self, input: Tensor) -> None:
        if not isinstance(input, Proxy) and not 2 <= input.dim() <= 5:
            raise ValueError(f"BNAct: x must be (N, C, ...) of 2 to 5 dimensions, got shape {tuple(input.shape)}")

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """(N, C, ...), and a residual of the same shape, to the same shape."""
        if self._fused and isinstance(x, Proxy):
            return _as_leaf(self, x, residual)
        if not self._fused or call_reason() is not None:
            y = super().forward(x)
            if residual is not None:
                y = y + residual
            return y if self.activation is None else torch.relu(y)
        return ops.bn_act(
            x,
            self.weight,
            self.bias,
            *_running(self),
            residual,
            training=_uses_batch_statistics(self),
            momentum=_batch_momentum(self),
            eps=self.eps,
            activation=self.activation,
        )


class SyncBatchNorm(nn.BatchNorm2d):
    """batch_norm(x) over the batches of all processes of a group; see `fused_resnet.convert_sync_batchnorm`.

    As torch.nn.SyncBatchNorm, on any device, and in our blocks with the residual and the ReLU fused. (No subclass of
    it: DistributedDataParallel refuses those on the CPU.)
    """

    process_group: Any = None

    @classmethod
    def of(cls, bn: nn.BatchNorm2d, process_group: Any = None) -> SyncBatchNorm:
        """What takes the place of `bn`: the same parameters, buffers, hooks and mode."""
        new = cls(0)
        new.__dict__.update(bn.__dict__)
        new.process_group = process_group
        return new

    def merges(self) -> bool:
        """Whether there are other processes to take statistics with."""
        return dist.is_available() and dist.is_initialized() and dist.get_world_size(self.process_group) > 1

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to the same shape."""
        if not isinstance(x, Proxy) and _uses_batch_statistics(self) and self.merges():
            self._check_input_dim(x)
            return self.bn_act(x, self.weight, self.bias)
        return super().forward(x)

    def bn_act(
        self,
        x: Tensor,
        gamma: Tensor | None,
        beta: Tensor | None,
        residual: Tensor | None = None,
        activation: str | None = None,
    ) -> Tensor:
        """activation(batch_norm(x) + residual) with the statistics of all processes."""
        return sync_bn_act(
            x,
            gamma,
            beta,
            *_running(self),
            residual,
            momentum=_batch_momentum(self),
            eps=self.eps,
            activation=activation,
            process_group=self.process_group,
        )


class AddReLU(nn.Module):
    """relu(x + residual) for tensors of one shape and dtype."""

    _fused = True

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        if self._fused and isinstance(x, Proxy):
            return _as_leaf(self, x, residual)
        if not self._fused or call_reason() is not None:
            return torch.relu(x + residual)
        return ops.add_relu(x, residual)


def _unit(conv: nn.Conv2d, bn: nn.BatchNorm2d, scale: Tensor | None = None) -> Unit:
    running_mean, running_var = _running(bn)
    gamma, beta = _affine(bn, scale)
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
        momentum=_batch_momentum(bn),
        eps=bn.eps,
        training=_uses_batch_statistics(bn),
    )


def is_watched(module: nn.Module) -> bool:
    """Whether a call of the module may show more than its forward: hooks, or a forward of its own."""
    return "forward" in module.__dict__ or any(module.__dict__[hooks] for hooks in _HOOKS)


def run_blocks(stages: Iterable[nn.Module], x: Tensor, overwrite: bool) -> Tensor:
    """The stages (nn.Sequential of blocks) in a row, in inference; a block may write over what only it can see.

    `overwrite`: whether nobody else reads x.
    """
    for stage in stages:
        if type(stage) is not nn.Sequential or is_watched(stage):
            x, overwrite = stage(x), False
            continue
        for block in stage:
            if isinstance(block, _Block) and type(block).forward is _Block.forward and not is_watched(block):
                fused = not block.unfused()  # else a hook on a part may keep what it saw
                x, overwrite = block._run(x, overwrite and fused), fused
            else:
                x, overwrite = block(x), False
    return x


class _Block(FusedModule):
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
            return _as_leaf(self, x)
        return self._run(x)

    def _run(self, x: Tensor, overwrite: bool = False) -> Tensor:
        """`forward`; with `overwrite`, nobody else reads x, so that inference may write the output over it."""
        plan = self._plan(x)
        if plan is not None:
            return self._whole(x, plan)
        if self.downsample is None:
            shortcut = x
        elif self._projection():
            conv, bn = cast(nn.Sequential, self.downsample)
            shortcut = self._conv_bn_act("downsample", x, conv, bn)
            overwrite = unfused_reason(conv, bn, None) is None
        else:
            shortcut, overwrite = self.downsample(x), False
        *first, (last_conv, last_bn) = self._UNITS
        for name, norm in first:
            x = self._conv_bn_act(name, x, getattr(self, name), getattr(self, norm), self.relu)
        last = (getattr(self, last_conv), getattr(self, last_bn), self.relu)
        return self._conv_bn_act(last_conv, x, *last, shortcut, self.residual_scale, overwrite)

    def _plan(self, x: Tensor) -> Plan | None:
        """How the block runs as one op: where gradients are taken of channels_last tensors, and nothing is odd."""
        if not self._fused or self.memory == "fast":
            return None
        if not needs_grad(x, *self.parameters()) or is_traced(x) or not is_channels_last(x):
            return None
        if self.unfused() or not dispatch.is_fused("bn_act", x.device.type):
            return None
        if self.downsample is not None and not self._projection():
            return None
        units = self.units()
        pairs = [(cast(nn.Conv2d, conv), cast(nn.BatchNorm2d, bn)) for conv, bn, _ in units.values()]
        dtype = x.dtype if autocast_dtype(x) is None else pairs[0][0].weight.dtype
        for conv, bn in pairs:
            if conv.bias is not None or conv.weight.dtype != dtype or conv.weight.device != x.device:
                return None
            if isinstance(bn, SyncBatchNorm) or not (_has_pairs(conv) and _fits(bn, conv.weight)):
                return None
        convs = {name: conv for name, (conv, _) in zip(units, pairs, strict=True)}
        projection = convs.pop("downsample", None)
        return plan_block(x, tuple(convs.values()), projection, self.memory)

    def _whole(self, x: Tensor, plan: Plan) -> Tensor:
        scales = {self._UNITS[-1][0]: self.residual_scale}
        units = {
            name: _unit(cast(nn.Conv2d, conv), cast(nn.BatchNorm2d, bn), scales.get(name))
            for name, (conv, bn, _) in self.units().items()
        }
        projection = units.pop("downsample", None)
        return residual_block(x, tuple(units.values()), projection, plan)


class BasicBlock(_Block):
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


class Bottleneck(_Block):
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
