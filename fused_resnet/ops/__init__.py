"""Functional ops: differentiable, safe under torch.compile(fullgraph=True), the same on every device."""

from fused_resnet.ops import schemas as schemas
from fused_resnet.ops.add_relu import add_relu
from fused_resnet.ops.bn_act import bn_act
from fused_resnet.ops.bn_act_pool import bn_act_pool
from fused_resnet.ops.conv_bias_act import conv_bias_act
from fused_resnet.ops.conv_bn_act import conv_bn_act
from fused_resnet.ops.sync_bn_act import sync_bn_act

__all__ = ["add_relu", "bn_act", "bn_act_pool", "conv_bias_act", "conv_bn_act", "sync_bn_act"]
