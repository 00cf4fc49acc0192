"""Fused kernels for residual networks: drop-in ResNets, fused ops, and the proof that they match torch."""

from fused_resnet import ops
from fused_resnet._version import __version__
from fused_resnet.convert import refresh, restore
from fused_resnet.dispatch import BackendUnavailableError, backend_table, set_backend, use_backend
from fused_resnet.export import to_onnx, to_plain, to_pt2
from fused_resnet.models.resnet import (
    ResNet,
    resnet18,
    resnet34,
    resnet50,
    resnet101,
    resnet152,
    resnext50_32x4d,
    resnext101_32x8d,
    resnext101_64x4d,
    wide_resnet50_2,
    wide_resnet101_2,
)
from fused_resnet.modules import AddReLU, BasicBlock, BNAct, Bottleneck, ConvBNAct
from fused_resnet.parity import ParityError, verify
from fused_resnet.sync_batchnorm import convert_sync_batchnorm
from fused_resnet.tensorrt import to_tensorrt

__all__ = [
    "AddReLU",
    "BNAct",
    "BackendUnavailableError",
    "BasicBlock",
    "Bottleneck",
    "ConvBNAct",
    "ParityError",
    "ResNet",
    "__version__",
    "backend_table",
    "convert_sync_batchnorm",
    "ops",
    "refresh",
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnet152",
    "resnext50_32x4d",
    "resnext101_32x8d",
    "resnext101_64x4d",
    "restore",
    "set_backend",
    "to_onnx",
    "to_plain",
    "to_pt2",
    "to_tensorrt",
    "use_backend",
    "verify",
    "wide_resnet50_2",
    "wide_resnet101_2",
]
