"""torch's own fused convs: oneDNN's on the CPU, with weights packed beforehand, and cuDNN's on a GPU. Inference."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from .rivals import Entry, Job, rival

FusedConv = Callable[..., Tensor]  # (x, residual=None, *, relu) -> act(conv(x) + bias + residual)


def fused_conv(weight: Tensor, bias: Tensor, stride: int, shape: tuple[int, ...], groups: int = 1) -> FusedConv:
    """The call for inputs of this shape; `weight` (K, C, k, k) is padded by k // 2."""
    strides, padding, ones = [stride] * 2, [weight.shape[2] // 2] * 2, [1, 1]
    if weight.is_cuda:

        def cudnn(x: Tensor, residual: Tensor | None = None, *, relu: bool) -> Tensor:
            if not relu:
                return torch.conv2d(x, weight, bias, strides, padding, ones, groups)
            if residual is None:
                return torch.cudnn_convolution_relu(x, weight, bias, strides, padding, ones, groups)
            return torch.cudnn_convolution_add_relu(x, weight, residual, 1.0, bias, strides, padding, ones, groups)

        return cudnn
    ops = torch.ops.mkldnn
    packed = ops._reorder_convolution_weight(weight, padding, strides, ones, groups, list(shape))

    def onednn(x: Tensor, residual: Tensor | None = None, *, relu: bool) -> Tensor:
        act = "relu" if relu else "none"
        if residual is None:
            return ops._convolution_pointwise(x, packed, bias, padding, strides, ones, groups, act, [], "")
        args = (packed, bias, padding, strides, ones, groups, "add", 1.0, act if relu else None, [], None)
        return ops._convolution_pointwise.binary(x, residual, *args)

    return onednn


class FoldedNet(nn.Module):
    """A plain ResNet whose convs are fused calls, made at the first input by `make`, which is as `fused_conv`."""

    def __init__(self, net: nn.Module, make: Callable[..., FusedConv] = fused_conv) -> None:
        super().__init__()
        self.net, self.make = net, make
        self.convs: dict[nn.Module, FusedConv] = {}

    def _unit(self, conv: nn.Conv2d, bn: nn.BatchNorm2d, x: Tensor, residual: Tensor | None, relu: bool) -> Tensor:
        run = self.convs.get(conv)
        if run is None:
            bias = torch.zeros_like(bn.running_mean) if conv.bias is None else conv.bias
            statistics = (bn.running_mean, bn.running_var, bn.eps, bn.weight, bn.bias)
            weight, bias = fuse_conv_bn_weights(conv.weight, bias, *statistics)
            weight = weight.detach().to(x.dtype).contiguous(memory_format=torch.channels_last)
            run = self.make(weight, bias.detach().to(x.dtype), conv.stride[0], x.shape, conv.groups)
            self.convs[conv] = run
        return run(x, residual, relu=relu)

    def forward(self, x: Tensor) -> Tensor:
        net = self.net
        x = net.maxpool(self._unit(net.conv1, net.bn1, x, None, True))
        for block in (block for stage in (net.layer1, net.layer2, net.layer3, net.layer4) for block in stage):
            path = block.downsample
            residual = x if path is None else self._unit(path[0], path[1], x, None, False)
            count = 3 if hasattr(block, "conv3") else 2
            for i in range(1, count + 1):
                end = residual if i == count else None
                x = self._unit(getattr(block, f"conv{i}"), getattr(block, f"bn{i}"), x, end, True)
        return net.fc(torch.flatten(net.avgpool(x), 1))


@rival("fused calls", "torch's own fused convs with BN folded, called by hand, channels_last")
def fused_calls(job: Job) -> Entry:
    job.only("infer")
    return Entry(FoldedNet(job.plain().to(memory_format=torch.channels_last)), True)
