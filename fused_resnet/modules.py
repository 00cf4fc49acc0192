"""Drop-in modules. Parameters and buffers live in ordinary nn.Conv2d and nn.BatchNorm2d children."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.fx import Proxy, Tracer
from torch.nn import functional as F
from torch.nn.modules.module import _has_any_global_hook

from fused_resnet import batchnorm, dispatch, foreach, ops
from fused_resnet.folding import FOLDED, FoldCache, fold
from fused_resnet.ops.checks import (
    autocast_dtype,
    check_activation,
    check_channels,
    conv_output_shape,
    is_channels_last,
    is_traced,
    needs_grad,
)
from fused_resnet.ops.conv import conv2d
from fused_resnet.ops.conv_bias_act import conv_layout
from fused_resnet.sync_batchnorm import SyncBatchNorm

Call = Callable[[Tensor, Tensor | None, bool], Tensor]  # (x, residual, whether to write over it) -> output
Units = dict[str, tuple[nn.Module, nn.Module, nn.Module | None]]
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_OVERRIDES = ("forward", "_conv_forward")
_PLAIN = (nn.Parameter, Tensor, type(None))
_AUTOCAST = (torch.float32, torch.float16, torch.bfloat16)  # what autocast casts


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
        for hooks in HOOKS:
            if state[hooks]:
                return f"a hook is set on its {expected.__name__}"
        if any(name in state for name in _OVERRIDES):
            return f"forward is replaced on its {expected.__name__}"
        if type(state["_parameters"].get("weight")) not in _PLAIN and not torch.compiler.is_compiling():
            return f"the weight of its {expected.__name__} is a tensor subclass"
    if conv is not None and (conv.padding_mode != "zeros" or isinstance(conv.padding, str)):
        return f"padding is {conv.padding!r} with mode {conv.padding_mode!r}"
    return None


def is_watched(module: nn.Module) -> bool:
    """Whether a call of the module may show more than its forward: hooks, or a forward of its own."""
    return "forward" in module.__dict__ or any(module.__dict__[hooks] for hooks in HOOKS)


def is_ours(module: nn.Module) -> bool:
    """Whether a call of the module runs no code but this package's and torch's: it is of a class that says so (and has
    a `call_part` for the others), or one of torch's without parts, and nobody watches it."""
    kind = type(module)
    known = "_OURS" in kind.__dict__ or (kind.__module__.startswith("torch.nn.modules.") and not module._modules)
    return known and not is_watched(module)


def call_part(module: nn.Module, x: Tensor) -> Tensor:
    """module(x), while no counter waits where code of others may run."""
    if not foreach.waiting() or is_ours(module):
        return module(x)
    with foreach.apart():
        return module(x)


def _norm(bn: nn.Module | None) -> type[nn.Module]:
    """The type of BN that this unit may have: ours across processes, else torch's."""
    return SyncBatchNorm if type(bn) is SyncBatchNorm else nn.BatchNorm2d


def has_pairs(conv: nn.Conv2d) -> bool:
    """Whether the geometry is as nn.Conv2d makes it, pairs; set by hand it may be ints, which torch takes as well."""
    return type(conv.stride) is type(conv.padding) is type(conv.dilation) is tuple


def conv_of(conv: nn.Conv2d, x: Tensor, weight: Tensor) -> Tensor:
    """What an nn.Conv2d makes of x with that weight."""
    if not has_pairs(conv):
        return conv._conv_forward(x, weight, conv.bias)
    return conv2d(x, weight, conv.bias, conv.stride, conv.padding, conv.dilation, conv.groups)


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
        calls: dict[str, Call] | None = None,
        weight: Tensor | None = None,
    ) -> Tensor:
        """act(scale * bn(conv(x)) + residual), fused where it may be. `name` is the unit's key in the cache.

        `overwrite`: nobody else reads the residual, so that inference may write the result over it. `calls` receives,
        under the unit's name, the convolution with folded weights where it came to that. `weight`: the conv's, as
        `_autocast_weights` cast it with others.
        """
        if not self._fused or isinstance(x, Proxy) or unfused_reason(conv, bn, act, _norm(bn)) is not None:
            return self._unfused(x, conv, bn, act, residual, scale)
        conv, bn = cast(nn.Conv2d, conv), cast(nn.BatchNorm2d, bn)
        if weight is None:
            weight = self._autocast_weights(x, {name: conv}).get(name, conv.weight)
        activation = None if act is None else "relu"
        training = batchnorm.uses_batch_statistics(bn)
        if residual is not None and self._adds_in_place:
            residual = residual.to(autocast_dtype(x) or residual.dtype)
        if training and isinstance(bn, SyncBatchNorm) and bn.merges():
            out = conv_of(conv, x, weight)
            return bn.bn_act(out, *batchnorm.affine(bn, scale), residual, activation)
        inference = not training and not needs_grad(x, conv.weight, conv.bias, bn.weight, bn.bias, residual, scale)
        if inference and not is_traced(x):
            y = self._infer(name, x, conv, bn, activation, residual, scale, overwrite, calls)
            if y is not None:
                return y
        if not dispatch.is_fused("conv_bn_act" if inference else "bn_act", x.device.type):
            return self._unfused(x, conv, bn, act, residual, scale)
        return ops.conv_bn_act(
            x,
            weight,
            *batchnorm.affine(bn, scale),
            *batchnorm.running(bn),
            residual,
            bias=conv.bias,
            stride=conv.stride,  # type: ignore[arg-type]
            padding=conv.padding,  # type: ignore[arg-type]
            dilation=conv.dilation,  # type: ignore[arg-type]
            groups=conv.groups,
            training=training,
            momentum=batchnorm.batch_momentum(bn),
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
        with foreach.apart():
            y = bn(conv(x))
            if scale is not None:
                y = y * scale
            if residual is not None:
                y += residual
            return y if act is None else act(y)

    def _autocast_weights(self, x: Tensor, convs: Mapping[str, nn.Module]) -> dict[str, Tensor]:
        """What autocast makes of the convs' weights, by name, at once; only where the network casts all at once."""
        dtype = autocast_dtype(x) if foreach.casting() else None
        weights = {name: conv.weight for name, conv in convs.items() if type(conv) is nn.Conv2d}
        if dtype is None or not needs_grad(x, *weights.values()):
            return {}
        if not all(type(w) in _PLAIN and w.dtype in _AUTOCAST and w.device == x.device for w in weights.values()):
            return {}
        return dict(zip(weights, foreach.cast(list(weights.values()), dtype), strict=True))

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
        calls: dict[str, Call] | None = None,
        pooled: bool = False,
    ) -> Tensor | None:
        """The unit with kept folded weights; None where the backend does not fold, or for the op to refuse. `pooled`:
        and max_pool2d(., 3, 2, 1) behind it."""
        weight = conv.weight
        if not x.dim() == weight.dim() == 4 or x.shape[1] != weight.shape[1] * conv.groups or x.device != weight.device:
            return None
        dtype = autocast_dtype(x)
        if dtype is not None:
            x = x.to(dtype)
        elif x.dtype != weight.dtype:
            return None
        geometry = (conv.stride, conv.padding, conv.dilation, conv.groups)
        if not has_pairs(conv):
            return None
        out_shape = conv_output_shape(x, weight, conv.stride, cast("tuple[int, ...]", conv.padding), conv.dilation)
        if min(out_shape[2:]) < 1:
            return None
        if residual is not None and (residual.shape, residual.dtype, residual.device) != (out_shape, x.dtype, x.device):
            return None
        x, residual = conv_layout(x, weight, residual)
        choice = dispatch.choose("conv_bias_act_forward", x, weight, *geometry, activation)
        if choice.pack is None:
            return None
        kept = f"{name}{', pooled' * pooled}, {choice.backend}"  # shapes may have their own
        cache = self._folded.get(kept)
        if cache is None:
            cache = self._folded[kept] = FoldCache()
        tensors = (weight, conv.bias, bn.weight, bn.bias, bn.running_mean, bn.running_var, scale)
        key = (x.dtype, is_channels_last(x), bn.eps, geometry, activation)
        call = cache.get(tensors, key)
        if call is None:
            stamp = cache.stamp(tensors)
            names = ("bias", "gamma", "beta", "running_mean", "running_var")
            check_channels("conv_bn_act", x, weight.shape[0], zip(names, tensors[1:-1], strict=True))
            gamma, beta = batchnorm.affine(bn, scale)
            mean, var = cast("tuple[Tensor, Tensor]", (bn.running_mean, bn.running_var))
            w, b = fold(weight, conv.bias, gamma, beta, mean, var, bn.eps, x.dtype)
            call = folded_call(choice, x, w, b, geometry, activation, pooled)
            cache.put(stamp, key, call)
        if calls is not None:
            calls[name] = call
        return call(x, residual, overwrite)


class Stem:
    """A call of a `Choice.relu_pool`: x may be NCHW as well as channels_last."""

    def __init__(self, run: Callable[[Tensor], Tensor]) -> None:
        self._run = run

    def __call__(self, x: Tensor, residual: Tensor | None, overwrite: bool) -> Tensor:
        return self._run(x)


def folded_call(
    choice: dispatch.Choice,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    geometry: tuple[Any, ...],
    activation: str | None,
    pooled: bool = False,
) -> Call:
    """The chosen backend's convolution of one weight, packed for tensors like x, and max_pool2d(., 3, 2, 1) if it is
    pooled: (x, residual, may it write over the residual) to the output."""
    function, onto_residual, options = choice.function, choice.onto_residual, (*geometry, activation)
    channels_last = is_channels_last(x)
    if pooled:
        make = choice.relu_pool if channels_last and activation == "relu" else None
        at_once = None if make is None else make(x, weight, bias, *geometry)
        if at_once is not None:
            return Stem(at_once)
        conv = folded_call(choice, x, weight, bias, geometry, activation)
        return lambda x, residual, overwrite: F.max_pool2d(conv(x, residual, overwrite), 3, 2, 1)
    if choice.pack is not None and channels_last:
        bias = x.new_zeros(weight.shape[0]) if bias is None else bias
        weight = choice.pack(weight, tuple(x.shape), *geometry)

    def call(x: Tensor, residual: Tensor | None, overwrite: bool) -> Tensor:
        if overwrite and residual is not None and onto_residual is not None:
            return onto_residual(x, weight, bias, residual, *options)
        return function(x, weight, bias, residual, *options)

    return call


def as_leaf(module: nn.Module, x: Proxy, *args: Any) -> Proxy:
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
            return as_leaf(self, x, residual)
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
            return as_leaf(self, x, residual)
        if not self._fused or call_reason() is not None:
            y = super().forward(x)
            if residual is not None:
                y = y + residual
            return y if self.activation is None else torch.relu(y)
        return ops.bn_act(
            x,
            self.weight,
            self.bias,
            *batchnorm.running(self),
            residual,
            training=batchnorm.uses_batch_statistics(self),
            momentum=batchnorm.batch_momentum(self),
            eps=self.eps,
            activation=self.activation,
        )


class AddReLU(nn.Module):
    """relu(x + residual) for tensors of one shape and dtype."""

    _fused = True

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        if self._fused and isinstance(x, Proxy):
            return as_leaf(self, x, residual)
        if not self._fused or call_reason() is not None:
            return torch.relu(x + residual)
        return ops.add_relu(x, residual)
