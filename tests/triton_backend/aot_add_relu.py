"""What is compiled of add_relu."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from aot import Case
from harness import DTYPES

from fused_resnet.backends.triton import add_relu, configs


def cases(full: bool) -> Iterator[Case]:
    for dtype in DTYPES:
        x = torch.empty((2, 64, 56, 56), dtype=dtype)
        for name, function in (
            (add_relu.FORWARD, add_relu.add_relu_forward),
            (add_relu.BACKWARD, add_relu.add_relu_backward),
        ):
            every = full and dtype != torch.float16  # the same configs as bfloat16
            found = configs.candidates(name, (x.element_size(),), configs.target(x)) if every else [{}]
            for index, config in enumerate(found):
                yield Case(
                    f"{name}-{dtype}-{index}",
                    lambda x=x, function=function: function(x, x),
                    {name: config} if config else {},
                    vector=(f"{name}_kernel",),
                )
