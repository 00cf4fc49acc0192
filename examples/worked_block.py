"""One small residual block by hand: 3 channels, 64x64 pixels, two 3x3 convs with bias, no batch norm.

    y = relu( relu(conv2( relu(conv1(x)) )) + x )

python examples/worked_block.py

The numbers, checked by tests/test_examples.py:

- parameters: 2 convs of 3 x 3 x 3 x 3 weights and 3 biases = 168.
- multiply-adds: 2 convs x 3 x 64 x 64 outputs x 27 = 663,552.
- a tensor has 3 x 64 x 64 float32 = 49,152 bytes. torch's six calls (conv, ReLU, conv, ReLU, add, ReLU) move 13;
  fused, three calls move 7 of them (weights apart): 2 for each conv, its ReLU included, and 3 for the addition.
- the ReLU before the addition is why the addition stays a call of its own here: in He et al. 2015 conv2 has none, and
  the whole end of the block belongs to it: relu(conv2(...) + x), two calls and 5 tensors.
- with x = 1, all weights 1/27 and biases 0 a conv averages its window, zeros outside the image: 1 inside, 18/27 beside
  an edge, 12/27 in a corner. So y = 2 inside, and in a corner, where conv2 sees 1 corner, 2 edges and 1 pixel inside
  for each of 3 channels, y = 1 + 3 (12/27 + 2 * 18/27 + 1) / 27 = 1 + 25/81 = 1.3086.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

import fused_resnet as fr


class Block(nn.Module):
    """As above, by three fused calls."""

    def __init__(self, channels: int = 3) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to the same shape."""
        a = fr.ops.conv_bias_act(x, self.conv1.weight, self.conv1.bias, padding=1)
        b = fr.ops.conv_bias_act(a, self.conv2.weight, self.conv2.bias, padding=1)
        return fr.ops.add_relu(b, x)

    def unfused(self, x: Tensor) -> Tensor:
        """The same by torch's own calls."""
        return torch.relu(torch.relu(self.conv2(torch.relu(self.conv1(x)))) + x)


def averaging() -> tuple[Block, Tensor]:
    """The block whose convs average, and its image of ones."""
    block = Block()
    with torch.no_grad():
        for conv in (block.conv1, block.conv2):
            conv.weight.fill_(1 / 27)
            conv.bias.zero_()
    return block, torch.ones(1, 3, 64, 64)


def main() -> None:
    torch.manual_seed(0)
    block, x = Block(), torch.randn(8, 3, 64, 64)
    print(f"parameters: {sum(p.numel() for p in block.parameters())}")
    print(f"fused against unfused: largest difference {(block(x) - block.unfused(x)).abs().max().item():.1e}")
    block, x = averaging()
    y = block(x)
    print(f"averaging block: {y[0, 0, 32, 32].item():.4f} inside, {y[0, 0, 0, 0].item():.4f} in a corner")


if __name__ == "__main__":
    main()
