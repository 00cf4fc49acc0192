"""`python -m fused_resnet.models`: parameters and multiply-adds of every network, beside the published figures."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

import fused_resnet as fr

# name -> (parameters in millions, multiply-adds in billions) as published, None where not: He et al. 2015, table 6 and
# section 4; He et al. 2016, table 4; torchvision's documentation, whose bottlenecks have their stride on the 3x3 conv.
PUBLISHED: dict[str, tuple[float | None, float | None]] = {
    "plain_net18": (None, 1.8),
    "plain_net34": (None, 3.6),
    "resnet18": (11.69, 1.81),
    "resnet34": (21.80, 3.66),
    "resnet50": (25.56, 4.09),
    "resnet101": (44.55, 7.80),
    "resnet152": (60.19, 11.51),
    "resnext50_32x4d": (25.03, 4.23),
    "resnext101_32x8d": (88.79, 16.41),
    "resnext101_64x4d": (83.46, 15.46),
    "wide_resnet50_2": (68.88, 11.40),
    "wide_resnet101_2": (126.89, 22.75),
    "resnet50d": (25.58, None),
    "cifar_resnet20": (0.27, None),
    "cifar_resnet32": (0.46, None),
    "cifar_resnet44": (0.66, None),
    "cifar_resnet56": (0.85, None),
    "cifar_resnet110": (1.7, None),
    "cifar_resnet1202": (19.4, None),
    "cifar_preact_resnet110": (1.7, None),
    "cifar_preact_resnet164": (1.7, None),
    "cifar_preact_resnet1001": (10.2, None),
    **{f"preact_resnet{depth}": (None, None) for depth in (18, 34, 50, 101, 152)},
    **{f"plain_cifar_net{depth}": (None, None) for depth in (20, 32, 44, 56, 110)},
}


def counts(model: torch.nn.Module, *shape: int) -> tuple[int, int]:
    """(parameters, multiply-adds of convs and classifier) for this input; the model is on the meta device."""
    fr.restore(model).eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.empty(*shape, device="meta"))
    return sum(p.numel() for p in model.parameters()), counter.get_total_flops() // 2


def image(name: str) -> tuple[int, int, int, int]:
    size = 32 if "cifar" in name else 224
    return 1, 3, size, size


def row(name: str, model: Any) -> str:
    published = PUBLISHED[name]
    cells = [
        f"{value / scale:10.2f} {'' if known is None else known:>10}"
        for value, scale, known in zip(counts(model, *image(name)), (1e6, 1e9), published, strict=True)
    ]
    return f"{name:<25} {' '.join(cells)}"


def main() -> None:
    print(f"{'network':<25} {'M params':>10} {'published':>10} {'G mul-adds':>10} {'published':>10}")
    for name in PUBLISHED:
        with torch.device("meta"):
            model = getattr(fr, name)()
        print(row(name, model), flush=True)


if __name__ == "__main__":
    main()
