"""What `fused-resnet verify` and `fused-resnet bench` run: a plain rival, real input, parity, then times."""


class RequestError(Exception):
    """What the user asked for cannot be done; the message is one sentence for them."""
