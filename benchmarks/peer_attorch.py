"""attorch's Triton BN with its ReLU and the residual fused into it, in the plain net's blocks."""

from __future__ import annotations

import importlib
from typing import Any

from torch import Tensor, nn

from .rivals import Entry, Job, rival


class FusedNorms(nn.Module):
    """A plain ResNet whose BNs compute act(bn(x) + residual) themselves. `norms`: nn.BatchNorm2d -> norm(x, residual);
    each BN is asked for with a ReLU or without one."""

    def __init__(self, net: nn.Module, convert: Any) -> None:
        super().__init__()
        self.net = net
        net.bn1 = convert(net.bn1, True)
        for stage in (net.layer1, net.layer2, net.layer3, net.layer4):
            for block in stage:
                for i in range(1, 4 if hasattr(block, "conv3") else 3):
                    setattr(block, f"bn{i}", convert(getattr(block, f"bn{i}"), True))
                if block.downsample is not None:
                    block.downsample[1] = convert(block.downsample[1], False)

    def forward(self, x: Tensor) -> Tensor:
        net = self.net
        x = net.maxpool(net.bn1(net.conv1(x)))
        for block in (block for stage in (net.layer1, net.layer2, net.layer3, net.layer4) for block in stage):
            shortcut = x if block.downsample is None else block.downsample(x)
            x = block.bn1(block.conv1(x))
            if hasattr(block, "conv3"):
                x = block.bn3(block.conv3(block.bn2(block.conv2(x))), shortcut)
            else:
                x = block.bn2(block.conv2(x), shortcut)
        return net.fc(net.avgpool(x).flatten(1))


@rival("attorch", "attorch's Triton BN + residual + ReLU, NCHW")
def attorch(job: Job) -> Entry:
    job.only(device="cuda")
    library = importlib.import_module("attorch")

    def convert(bn: nn.BatchNorm2d, relu: bool) -> nn.Module:
        norm = library.BatchNorm2d(bn.num_features, eps=bn.eps, momentum=bn.momentum, act_func="relu" if relu else None)
        norm.load_state_dict(bn.state_dict(), strict=False)
        return norm.train(bn.training).to(bn.weight)

    net = FusedNorms(job.plain(), convert)
    return Entry(net, False, net)  # its backward pass flattens gradients as NCHW
