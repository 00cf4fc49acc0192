"""What is compiled of bn_act_pool."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from aot import Case
from harness import DTYPES
from torch import Tensor

from fused_resnet.backends.triton import bn_act_pool, configs

FORMATS = {"nhwc": torch.channels_last, "nchw": torch.contiguous_format}
PASSES = (bn_act_pool.APPLY, bn_act_pool.BACKWARD_REDUCE, bn_act_pool.BACKWARD_APPLY)


def training(x: Tensor) -> Any:
    v = torch.empty(x.shape[1])
    out, offsets, mean, var = bn_act_pool.bn_act_pool_train_forward(x, v, v, v, v, 0.1, 1e-5, "relu", True)
    return bn_act_pool.bn_act_pool_backward(out, offsets, x, v, v, mean, var, 1e-5, "relu", True)


def frozen(x: Tensor) -> Any:
    v = torch.empty(x.shape[1])
    bn_act_pool.bn_act_pool_eval_forward(x, v, v, v, v, 1e-5, "relu", False)
    out, offsets = bn_act_pool.bn_act_pool_eval_forward(x, v, v, v, v, 1e-5, "relu", True)
    return bn_act_pool.bn_act_pool_backward(out, offsets, x, v, v, v, v, 1e-5, "relu", False)


def cases(full: bool) -> Iterator[Case]:
    only = tuple(f"{kernel}_kernel" for kernel in PASSES)  # the others are bn_act's
    for dtype in DTYPES:
        for layout in FORMATS if full else ("nhwc",):
            x = torch.empty((2, 64, 112, 112), dtype=dtype, memory_format=FORMATS[layout])
            name = f"{str(dtype)[6:]}-{layout}"
            vector = only if layout == "nhwc" else ()
            yield Case(f"{name}-training", lambda x=x: training(x), vector=vector, only=only)
            if not full or dtype == torch.float16:  # the same tiles as bfloat16
                continue
            yield Case(f"{name}-frozen", lambda x=x: frozen(x), vector=vector, only=only)
            key = (layout == "nhwc", x.element_size(), x.shape[1])
            tuned = {kernel: configs.candidates(kernel, key, configs.target(x))[1:] for kernel in PASSES}
            for index in range(max(map(len, tuned.values()))):
                config = {kernel: found[index % len(found)] for kernel, found in tuned.items()}
                yield Case(f"{name}-training-{index}", lambda x=x: training(x), config, only=only)
    if full:
        one = torch.empty((2, 1, 1, 1), dtype=torch.bfloat16)  # arguments that are 1 are constants for the compiler
        yield Case("1", lambda: training(one), only=only)
