"""The traffic model against what interpreted kernels access, and the real ResNet-50 against the counting rules."""

from __future__ import annotations

import contextlib

import pytest
import torch
from harness import guarded, track
from traffic import end_calls, launched, middle_calls, resnet50, stem_calls

from fused_resnet.backends.triton import bn_act, bn_act_pool, configs


def test_resnet50_moves_what_the_rules_say():
    configs.assume("sm_90")
    try:
        for call in resnet50():
            launches = launched(call.run)
            unique = sum(sum(b.unique.values()) for b in launches)
            issued = sum(sum(b.issued.values()) for b in launches)
            assert unique == pytest.approx(call.rule, rel=0.05), call.name
            # The stem's windows overlap: they ask for 9/4 of x forward, for 4 times the pooled tensors backward.
            assert issued < call.rule * (1.75 if "stem" in call.name else 1.05), call.name
    finally:
        configs.assume("tiny")


SMALL = {
    "stem, even": lambda: stem_calls(guarded((2, 64, 8, 10), torch.bfloat16)),
    "stem, odd": lambda: stem_calls(guarded((1, 67, 9, 7), torch.bfloat16)),
    "middle": lambda: middle_calls(guarded((2, 67, 7, 7), torch.bfloat16)),
    "end": lambda: end_calls(guarded((2, 67, 7, 7), torch.bfloat16)),
}


@pytest.mark.parametrize("name", SMALL)
def test_kernels_access_what_the_model_says(name):
    """Every element of every argument once; windows that overlap ask for activations as often as the model says."""
    for call in SMALL[name]():
        model = launched(call.run)
        with track() as launches:
            call.run()
        assert [launch.kernel for launch in launches] == [b.kernel for b in model]
        for launch, expected in zip(launches, model, strict=True):
            accesses = [launch.loads, launch.stores]
            arguments = set().union(*accesses)
            assert arguments == expected.unique.keys(), launch.kernel
            for argument in arguments:
                unique, issued = (
                    sum(getattr(side[argument], kind) for side in accesses if argument in side)
                    for kind in ("unique", "issued")
                )
                assert unique == expected.unique[argument], (launch.kernel, argument)
                if expected.unique[argument] > 10_000:  # activations; vectors are read once or twice per program
                    assert issued == expected.issued[argument], (launch.kernel, argument)


def test_second_passes_walk_the_rows_backward():
    """What the first pass read last is read first by the second: it is still in the L2 cache."""
    x = guarded((2, 64, 16, 16), torch.bfloat16)
    tensors = {"statistics": "x", "backward_reduce": "x", "apply": "out", "backward_apply": "grad_x"}
    seen = set()
    with contextlib.ExitStack() as stack:
        for module in (bn_act, bn_act_pool):
            for kernel in (module.APPLY, module.BACKWARD_REDUCE, module.BACKWARD_APPLY, bn_act.STATISTICS):
                config = {"BLOCK_R": 32, "BLOCK_C": 64, "PROGRAMS": 1, "num_warps": 4}
                config |= {"STAGES": 1} if kernel == bn_act.STATISTICS else {}
                stack.enter_context(configs.override(kernel, config))
        for call in (*middle_calls(x), *stem_calls(x)):
            with track() as launches:
                call.run()
            for launch in launches:
                role = launch.kernel.removeprefix("bn_").removeprefix("pool_").removesuffix("_kernel")
                if role not in tensors:  # what merges parts
                    continue
                starts = launch.starts[tensors[role]]
                backward = role in ("apply", "backward_apply")
                assert len(starts) >= 4
                assert (starts[0] > starts[-1]) == backward, launch.kernel
                if launch.kernel in ("bn_statistics_kernel", "bn_apply_kernel", "bn_backward_apply_kernel"):
                    assert starts == sorted(set(starts), reverse=backward)
                seen.add(launch.kernel)
    assert len(seen) == 7
