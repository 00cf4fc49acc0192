"""Heads on a backbone's feature maps: an FPN finds handwritten digits of three sizes, a U-Net colours photographs.

The images are real: scikit-learn's digits, pasted into scenes, and its two photographs.

pip install 'fused_resnet[bench]'
python examples/fpn_unet.py
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from sklearn.datasets import load_digits, load_sample_images
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm

import fused_resnet as fr


class FPN(nn.Module):
    """Lin et al. 2017, "Feature Pyramid Networks": maps of strides 4, 8, 16, each given what the coarser ones know; a
    head, shared by the levels, that names the digit (or 0: none) in each cell."""

    def __init__(self, classes: int = 11, width: int = 64) -> None:
        super().__init__()
        self.backbone = fr.resnet18(in_channels=1, features_only=True, out_indices=(1, 2, 3))
        self.lateral = nn.ModuleList(fr.ConvBNAct(c, width, 1, activation=None) for c in self.backbone.channels)
        self.smooth = nn.ModuleList(fr.ConvBNAct(width, width, 3) for _ in self.backbone.channels)
        self.head = nn.Conv2d(width, classes, 1)

    def forward(self, x: Tensor) -> list[Tensor]:
        """(N, 1, H, W) to logits (N, classes, H / s, W / s) for s = 4, 8, 16."""
        maps = self.backbone(x)
        top: Tensor | None = None
        found = []
        for y, lateral, smooth in reversed(list(zip(maps, self.lateral, self.smooth, strict=True))):
            above = None if top is None else F.interpolate(top, size=y.shape[2:], mode="nearest")
            top = lateral(y, above)  # conv + BN + addition in one
            found.append(self.head(smooth(top)))
        return found[::-1]


class UNet(nn.Module):
    """Ronneberger et al. 2015: an encoder, and a decoder that reads each of its maps again. It gives what is to be
    added to the grey image."""

    def __init__(self, outputs: int = 3) -> None:
        super().__init__()
        self.encoder = fr.resnet18(in_channels=1, features_only=True, out_indices=(0, 1, 2, 3))
        *skips, inner = self.encoder.channels
        self.up = nn.ModuleList()
        for skip in reversed(skips):
            self.up.append(fr.ConvBNAct(inner + skip, skip, 3))
            inner = skip
        self.head = nn.Conv2d(inner, outputs, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 1, H, W) to (N, outputs, H, W)."""
        *skips, y = self.encoder(x)
        for skip, up in zip(reversed(skips), self.up, strict=True):
            y = up(torch.cat([F.interpolate(y, size=skip.shape[2:], mode="nearest"), skip], 1))
        return x + self.head(F.interpolate(y, size=x.shape[2:], mode="bilinear"))


STRIDES, HEIGHTS = (4, 8, 16), (8, 16, 32)  # of the levels, and of the digits that they find


def scenes(count: int, generator: torch.Generator, size: int = 64) -> tuple[Tensor, list[Tensor]]:
    """Scenes of three digits, 8, 16 and 32 pixels high, apart from each other; per level the label of each cell, 0 but
    for the digit's own."""
    found = load_digits()
    scans = torch.from_numpy(found.images).float() / 16
    x = torch.zeros(count, 1, size, size)
    labels = [torch.zeros(count, size // s, size // s, dtype=torch.long) for s in STRIDES]
    for n in range(count):
        taken = torch.zeros(size, size, dtype=torch.bool)
        for level, height in reversed(list(enumerate(HEIGHTS))):
            which = int(torch.randint(len(scans), (), generator=generator))
            digit = F.interpolate(scans[None, None, which], size=(height, height), mode="bilinear")[0, 0]
            while True:
                top, left = (int(v) for v in torch.randint(size - height + 1, (2,), generator=generator))
                window = (slice(top, top + height), slice(left, left + height))
                if not taken[window].any():
                    break
            taken[window] = True
            x[n, 0][window] = digit
            cell = ((top + height // 2) // STRIDES[level], (left + height // 2) // STRIDES[level])
            labels[level][(n, *cell)] = int(found.target[which]) + 1
    return x, labels


def find_digits(net: nn.Module, generator: torch.Generator) -> Tensor:
    x, labels = scenes(16, generator)
    weight = torch.tensor([0.05] + [1.0] * 10)  # most cells are empty
    return sum(F.cross_entropy(y, t, weight) for y, t in zip(net(x), labels, strict=True))  # type: ignore[return-value]


def crops(count: int, generator: torch.Generator, size: int = 64) -> Tensor:
    """(count, 3, size, size) of the photographs, 0 to 1."""
    photographs = [torch.from_numpy(image.copy()).permute(2, 0, 1) / 255 for image in load_sample_images().images]
    taken = []
    for i in range(count):
        image = photographs[i % 2]
        top, left = (int(torch.randint(limit - size, (), generator=generator)) for limit in image.shape[1:])
        taken.append(image[:, top : top + size, left : left + size])
    return torch.stack(taken)


def colour(net: nn.Module, generator: torch.Generator) -> Tensor:
    x = crops(8, generator)
    return F.mse_loss(net(x.mean(1, keepdim=True)), x)


def train(net: nn.Module, loss_of: Callable[..., Tensor], steps: int, name: str) -> list[float]:
    """The loss of each step."""
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(net.parameters(), 2e-3)
    rate = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, 3 * (1 - step / steps)))
    losses = []
    with tqdm(range(steps), name, unit="step") as bar:
        for _ in bar:
            loss = loss_of(net.train(), generator)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            rate.step()
            losses.append(loss.item())
            bar.set_postfix(loss=f"{losses[-1]:.4f}")
    return losses


@torch.no_grad()
def draw(fpn: nn.Module, unet: nn.Module, path: Path) -> None:
    """What both make of scenes and crops that they have not seen."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    generator = torch.Generator().manual_seed(1)
    figure = Figure(figsize=(10, 5.4), layout="constrained")
    axes = figure.subplots(2, 4)
    x, labels = scenes(4, generator)
    maps = fpn.eval()(x)
    for n, axis in enumerate(axes[0]):
        axis.imshow(x[n, 0], cmap="gray")
        for logits, truth, stride, height in zip(maps, labels, STRIDES, HEIGHTS, strict=True):
            score = logits[n].softmax(0)[1:]
            row, column = divmod(int(score.max(0).values.argmax()), score.shape[2])
            digit = int(score[:, row, column].argmax())
            color = "#6fb7f2" if int(truth[n, row, column]) == digit + 1 else "#f08a3c"
            left, top = ((cell + 0.5) * stride - height / 2 - 0.5 for cell in (column, row))
            axis.add_patch(Rectangle((left, top), height, height, fill=False, color=color, lw=1.5))
            axis.annotate(str(digit), (left, top), color=color, fontsize=11, weight="bold", ha="right", va="bottom")
    photographs = crops(2, generator.manual_seed(4), 128)
    coloured = unet.eval()(photographs.mean(1, keepdim=True)).clamp(0, 1)
    for i in range(2):
        for axis, image in zip(axes[1, 2 * i :], (photographs[i], coloured[i]), strict=False):
            axis.imshow(image.permute(1, 2, 0))
    for axis, title in zip(axes[1], ("photograph", "the U-Net, from its grey") * 2, strict=True):
        axis.set_title(title, fontsize=10)
    figure.suptitle("digits as the FPN finds and names them: blue where both are right, orange where not", fontsize=10)
    for axis in axes.flat:
        axis.axis("off")
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--plot", type=Path, default=Path("fpn_unet.png"), help="the picture (fpn_unet.png)")
    args = parser.parse_args()
    torch.manual_seed(0)
    fpn, unet = FPN(), UNet()
    for net, loss_of, name in ((fpn, find_digits, "FPN"), (unet, colour, "U-Net")):
        losses = train(net, loss_of, args.steps, name)
        print(f"{name}: loss {losses[0]:.4f} at first, {losses[-1]:.4f} after {args.steps} steps")
    draw(fpn, unet, args.plot)
    print(f"the picture: {args.plot}")


if __name__ == "__main__":
    main()
