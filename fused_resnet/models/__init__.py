"""Architectures: which block is connected to which. Nothing here knows about kernels."""
