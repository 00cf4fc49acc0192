"""What a TensorRT network computes, layer by layer in torch: converters are compared by numbers without a GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import tensorrt as trt
import torch
from torch import Tensor
from torch.nn import functional as F


def evaluate(network: Any, x: Tensor) -> Tensor:
    """The first output for the only input, computed in float64; a kind of layer not known here is an error."""
    values: dict[str, Tensor] = {network.get_input(0).name: x.double()}
    for i in range(network.num_layers):
        layer = network.get_layer(i)
        kind = layer.type.name
        layer.__class__, compute = _LAYERS[kind]
        inputs = [values[layer.get_input(j).name] for j in range(layer.num_inputs) if layer.get_input(j) is not None]
        values[layer.get_output(0).name] = compute(layer, *inputs)
    return values[network.get_output(0).name]


def _weights(array: Any, *shape: int) -> Tensor | None:
    """A layer's weights, which come flat."""
    if isinstance(array, trt.Weights):
        array = array.numpy()
    return torch.from_numpy(np.array(array)).double().reshape(shape) if array.size else None


def _convolution(layer: Any, x: Tensor) -> Tensor:
    maps, groups = layer.num_output_maps, layer.num_groups
    kernel = _weights(layer.kernel, maps, x.shape[1] // groups, *layer.kernel_size_nd)
    geometry = (tuple(layer.stride_nd), tuple(layer.padding_nd), tuple(layer.dilation_nd), groups)
    return F.conv2d(x, kernel, _weights(layer.bias, maps), *geometry)


def _scale(layer: Any, x: Tensor) -> Tensor:
    assert layer.mode == trt.ScaleMode.CHANNEL
    assert not np.size(layer.power)
    channels = (x.shape[1], 1, 1)
    return x * _weights(layer.scale, *channels) + _weights(layer.shift, *channels)


def _activation(layer: Any, x: Tensor) -> Tensor:
    assert layer.type == trt.ActivationType.RELU
    return x.relu()


def _elementwise(layer: Any, a: Tensor, b: Tensor) -> Tensor:
    assert layer.op == trt.ElementWiseOperation.SUM
    return a + b


def _pooling(layer: Any, x: Tensor) -> Tensor:
    assert layer.type == trt.PoolingType.MAX
    return F.max_pool2d(x, tuple(layer.window_size_nd), tuple(layer.stride_nd), tuple(layer.padding_nd))


def _reduce(layer: Any, x: Tensor) -> Tensor:
    assert layer.op == trt.ReduceOperation.AVG
    return x.mean([d for d in range(x.dim()) if layer.axes >> d & 1], keepdim=layer.keep_dims)


def _shuffle(layer: Any, x: Tensor) -> Tensor:
    assert list(layer.first_transpose)[: x.dim()] == list(range(x.dim()))
    x = x.reshape(tuple(layer.reshape_dims))
    return x.permute(*list(layer.second_transpose)[: x.dim()])


def _slice(layer: Any, x: Tensor) -> Tensor:
    """Also how Torch-TensorRT broadcasts: by strides of 0."""
    for d, (start, size, stride) in enumerate(zip(layer.start, layer.shape, layer.stride, strict=True)):
        x = x.index_select(d, start + stride * torch.arange(size))
    return x


def _matrix_multiply(layer: Any, a: Tensor, b: Tensor) -> Tensor:
    a = a.mT if layer.op0 == trt.MatrixOperation.TRANSPOSE else a
    return a @ (b.mT if layer.op1 == trt.MatrixOperation.TRANSPOSE else b)


_LAYERS: dict[str, tuple[type, Callable[..., Tensor]]] = {
    "CONVOLUTION": (trt.IConvolutionLayer, _convolution),
    "SCALE": (trt.IScaleLayer, _scale),
    "ACTIVATION": (trt.IActivationLayer, _activation),
    "ELEMENTWISE": (trt.IElementWiseLayer, _elementwise),
    "POOLING": (trt.IPoolingLayer, _pooling),
    "REDUCE": (trt.IReduceLayer, _reduce),
    "SHUFFLE": (trt.IShuffleLayer, _shuffle),
    "SLICE": (trt.ISliceLayer, _slice),
    "CONSTANT": (trt.IConstantLayer, lambda layer: _weights(layer.weights, *layer.shape)),
    "MATRIX_MULTIPLY": (trt.IMatrixMultiplyLayer, _matrix_multiply),
}
