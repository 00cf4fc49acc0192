"""From trained to deployed: folded models of torch.nn alone, ONNX and .pt2 files, and every op of ours in ATen.

For TensorRT see `fused_resnet.tensorrt`.
"""

from fused_resnet.export.decompositions import DECOMPOSITIONS
from fused_resnet.export.plain import PlainModel, to_plain
from fused_resnet.export.writers import to_onnx, to_pt2

__all__ = ["DECOMPOSITIONS", "PlainModel", "to_onnx", "to_plain", "to_pt2"]
