"""What `fused-resnet verify` and `fused-resnet bench` run: a plain rival, real input, parity, then times."""

from fused_resnet.cli import RequestError

__all__ = ["RequestError"]
