"""Parameters and statistics that are not trivial, made without trained weights.

A freshly initialised net has gamma 1, beta 0, mean 0 and variance 1 in each BN: a wrong fold would pass unseen.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

CHUNK = 16


@torch.no_grad()
def make_realistic(net: nn.Module, crops: Tensor, seed: int = 0) -> nn.Module:
    """Give a ResNet, in place, BN as training would leave it; returns it in eval mode.

    Gammas have both signs and betas are not 0 (seeded); the last BN of a block is weaker, as in trained nets. Running
    statistics are averages over the crops, by torch's own BN in training mode. The classifier's bias is centred, so
    that the crops fall into many classes.
    """
    generator = torch.Generator().manual_seed(seed)
    norms = {name: m for name, m in net.named_modules() if isinstance(m, nn.BatchNorm2d)}
    last = {name.rsplit(".", 1)[0]: name for name in norms if ".bn" in name}  # block -> its last BN
    for name, bn in norms.items():
        uniform, sign, normal = torch.rand(3, bn.num_features, generator=generator).unbind()
        scale = 0.25 if name in last.values() else 1.0
        bn.weight.copy_(scale * (0.5 + uniform) * torch.where(sign < 0.25, -1.0, 1.0))
        bn.bias.copy_(0.4 * (normal - 0.5))
        bn.reset_running_stats()

    features: list[Tensor] = []
    hook = net.fc.register_forward_pre_hook(lambda module, args: features.append(args[0]))  # type: ignore[union-attr]
    momenta = {name: bn.momentum for name, bn in norms.items()}
    try:
        net.train()
        for bn in norms.values():
            bn.momentum = None  # a cumulative average
        for chunk in crops.split(CHUNK):
            net(chunk)
    finally:
        hook.remove()
        for name, bn in norms.items():
            bn.momentum = momenta[name]
    fc = net.fc
    fc.bias.copy_(-fc.weight @ torch.cat(features).mean(0))  # type: ignore[union-attr, operator]
    return net.eval()
