"""Whole residual blocks whose batch norms merge processes, against one process that sees the whole batch."""

from __future__ import annotations

import contextlib
import copy
import itertools
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from networks import randomise
from processes import on_processes
from torch import Tensor, nn

import fused_resnet as fr
from fused_resnet import dispatch
from fused_resnet.blocks import ResidualBlock
from fused_resnet.ops import block_units
from fused_resnet.ops.residual_block import Plan
from fused_resnet.parity import compare
from fused_resnet.plans import MERGED_GRAM_CHANNELS, plan_block, plan_layers


def _projection(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))


def _scaled() -> ResidualBlock:
    block = fr.Bottleneck(12, 3)
    block.residual_scale = nn.Parameter(torch.tensor(0.7))
    return block


def _frozen() -> ResidualBlock:
    block = fr.Bottleneck(6, 3, 2, _projection(6, 12, 2))
    block.bn2.eval()
    return block


# name -> (block, its input's channels)
BLOCKS: dict[str, tuple[Callable[[], ResidualBlock], int]] = {
    "basic": (partial(fr.BasicBlock, 6, 6), 6),
    "basic, projection": (lambda: fr.BasicBlock(5, 6, 2, _projection(5, 6, 2)), 5),
    "bottleneck, scaled": (_scaled, 12),
    "bottleneck, no gamma": (partial(fr.Bottleneck, 12, 3, norm_layer=partial(nn.BatchNorm2d, affine=False)), 12),
    "bottleneck, projection": (lambda: fr.Bottleneck(6, 3, 2, _projection(6, 12, 2)), 6),
    "bottleneck, groups": (lambda: fr.Bottleneck(12, 4, 2, _projection(12, 16, 2), groups=2, base_width=64), 12),
    "bottleneck, frozen": (_frozen, 6),
    "wide": (lambda: fr.Bottleneck(24, 8, 2, _projection(24, 32, 2)), 24),
}
FORMS = ("stored", "gram", "fallback")  # "fallback": odd processes lose their variances' digits, and store outputs
MEMORY = ("balanced", "low")
SIZES = {2: ((3, 1), (0, 4)), 4: ((2, 0, 1, 3),)}
Case = tuple[str, str, str, torch.dtype, tuple[int, ...]]


def _cases(world: int) -> list[Case]:
    exact = itertools.product([name for name in BLOCKS if name != "wide"], FORMS, MEMORY, [torch.float64], SIZES[world])
    rounded = itertools.product(["wide"], FORMS, MEMORY, [torch.float32, torch.bfloat16], SIZES[world])
    forms = [f"{form}, prologue" for form in FORMS]  # a process whose batch is empty does not take it
    prologue = itertools.product(BLOCKS, forms, MEMORY[-1:], [torch.float64], SIZES[world][:1])
    return [*exact, *rounded, *prologue]


def _inputs(case: Case) -> tuple[ResidualBlock, Tensor, Tensor]:
    """The block, and the whole batch and cotangent."""
    name, _, _, dtype, sizes = case
    torch.manual_seed(5)
    make, channels = BLOCKS[name]
    block = make().to(dtype)
    randomise(block)
    for module in block.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.to(torch.promote_types(dtype, torch.float32))
    x = torch.randn(sum(sizes), channels, 7, 9, dtype=torch.float64)
    x += torch.arange(sum(sizes)).view(-1, 1, 1, 1)  # so that the means of the processes differ
    with torch.no_grad():
        shape = fr.restore(copy.deepcopy(block).double().eval())(x).shape
    cotangent = torch.randn(shape, dtype=torch.float64)
    return block, *(t.to(dtype).contiguous(memory_format=torch.channels_last) for t in (x, cotangent))


def _step(block: nn.Module, x: Tensor, cotangent: Tensor, forward: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    x = x.clone(memory_format=torch.preserve_format).requires_grad_()
    out = forward(x)
    out.backward(cotangent)
    named = {"out": out.detach(), "x": x.grad}
    named |= {name: p.grad for name, p in block.named_parameters() if p.grad is not None}
    return named | dict(block.named_buffers())


@contextlib.contextmanager
def _recorded() -> Iterator[tuple[list[Any], list[Any]]]:
    """(primitive, channels) of each call of a backend, (name, numbers sent) of each collective."""
    primitives: list[Any] = []
    collectives: list[Any] = []
    choose, gather, reduce = dispatch.choose, dist.all_gather, dist.all_reduce

    def choosing(primitive: str, x: Tensor, *args: Any, **kwargs: Any) -> dispatch.Choice:
        primitives.append((primitive, x.shape[1]))
        return choose(primitive, x, *args, **kwargs)

    def gathering(received: list[Tensor], sent: Tensor, **kwargs: Any) -> Any:
        collectives.append(("all_gather", sent.numel()))
        return gather(received, sent, **kwargs)

    def reducing(sent: Tensor, **kwargs: Any) -> Any:
        collectives.append(("all_reduce", sent.numel()))
        return reduce(sent, **kwargs)

    dispatch.choose, dist.all_gather, dist.all_reduce = choosing, gathering, reducing
    try:
        yield primitives, collectives
    finally:
        dispatch.choose, dist.all_gather, dist.all_reduce = choose, gather, reduce


def _part(rank: int, world: int, case: Case) -> dict[str, Any]:
    _, form, memory, _, sizes = case
    form, _, prologue = form.partition(", ")
    block, x, cotangent = _inputs(case)
    block = fr.convert_sync_batchnorm(block)
    gram = form != "stored"
    plan = Plan(gram and not isinstance(block, fr.BasicBlock), gram, memory, bool(prologue))
    with pytest.MonkeyPatch.context() as patch, _recorded() as (primitives, collectives):
        if form == "fallback" and rank % 2:
            patch.setattr(block_units, "_CANCELLED", -1.0)
        x, cotangent = (t.split(sizes)[rank] for t in (x, cotangent))
        results = _step(block, x, cotangent, lambda x: block._whole(x, plan))
    return {"results": results, "primitives": primitives, "collectives": collectives}


def _mixed(rank: int, world: int) -> list[dict[str, Tensor]]:
    """A block with a batch norm of this process alone among others that merge: as one op, and unit by unit."""
    case: Case = ("bottleneck, projection", "gram", "low", torch.float64, tuple(range(1, world + 1)))
    block, x, cotangent = _inputs(case)
    alone = block.bn2
    block = fr.convert_sync_batchnorm(block)
    block.bn2 = alone
    blocks = [copy.deepcopy(block), block]
    blocks[1].memory = "fast"
    x, cotangent = (t.split(case[-1])[rank] for t in (x, cotangent))
    results = []
    for block in blocks:
        with _recorded() as (primitives, _):
            results.append(_step(block, x, cotangent, block))
        assert ("second_moments" in dict(primitives)) == (block is blocks[0])
    return results


def _all_parts(rank: int, world: int) -> dict[str, Any]:
    return {"cases": [_part(rank, world, case) for case in _cases(world)], "mixed": _mixed(rank, world)}


@pytest.fixture(scope="module", params=[2, 4], ids="{}-processes".format)
def parts(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return on_processes(request.param, tmp_path_factory.mktemp("parts"), _all_parts)


def _merged(parts: list[dict[str, Tensor]], names: dict[str, Any]) -> dict[str, Tensor]:
    """Outputs and their like of the whole batch; gradients of parameters are sums over the processes."""
    merged = {}
    for name in names:
        values = [part[name] for part in parts]
        if name in ("out", "x"):
            merged[name] = torch.cat(values)
        elif "running" in name or "num_batches" in name:
            assert all(torch.equal(values[0], value) for value in values), f"{name} differs between processes"
            merged[name] = values[0]
        else:
            merged[name] = torch.stack(values).double().sum(0).to(values[0].dtype)
    return merged


def test_blocks_are_those_of_the_whole_batch(parts: list[dict[str, Any]]) -> None:
    for index, case in enumerate(_cases(len(parts))):
        block, x, cotangent = _inputs(case)
        plain = fr.restore(block)
        exact = copy.deepcopy(plain).double()
        theirs = _step(plain, x, cotangent, plain)
        truth = _step(exact, x.double(), cotangent.double(), exact)
        ours = _merged([part["cases"][index]["results"] for part in parts], theirs)
        floats = [name for name, value in truth.items() if value.is_floating_point()]
        worst = max(compare(name, theirs[name], theirs[name], truth[name]).torch for name in floats)
        for name in truth:
            row = compare(name, ours[name], theirs[name], truth[name], granted=worst)
            assert row.ok, (case, row)


def test_collectives_do_not_depend_on_form_or_batch(parts: list[dict[str, Any]]) -> None:
    """One all_gather forward and one all_reduce backward per batch norm that merges: 2 numbers per channel (+ 1)."""
    for index, case in enumerate(_cases(len(parts))):
        block = BLOCKS[case[0]][0]()
        merging = [m for m in block.modules() if isinstance(m, nn.BatchNorm2d) and m.training]
        channels = sorted(m.num_features for m in merging)
        found = [part["cases"][index]["collectives"] for part in parts]
        assert all(collectives == found[0] for collectives in found), case
        half = len(channels)
        assert sorted(found[0][:half]) == [("all_gather", 2 * c + 1) for c in channels], case
        assert sorted(found[0][half:]) == [("all_reduce", 2 * c) for c in channels], case


def test_gram_form_is_what_ran(parts: list[dict[str, Any]]) -> None:
    """Where it was planned nothing reads or writes the wide raw output, but on a process that fell back."""
    for index, case in enumerate(_cases(len(parts))):
        name, form, _, _, sizes = case
        form, _, prologue = form.partition(", ")
        block = BLOCKS[name][0]()
        last = 0 if isinstance(block, fr.BasicBlock) else 1
        wide = block.conv3.out_channels if last else 0
        for rank, part in enumerate(parts):
            primitives = part["cases"][index]["primitives"]
            planned = form != "stored" and sizes[rank] > 0
            kernel = "prologue_moments" if prologue else "second_moments"
            moments = sum(primitive == kernel for primitive, _ in primitives)
            assert moments == (last + (block.downsample is not None) if planned else 0), case
            if last:
                stored = [p for p in primitives if p[0].startswith("bn_act") and p[1] == wide]
                assert bool(stored) != (planned and not (form == "fallback" and rank % 2)), case


def test_a_norm_of_this_process_among_others_that_merge(parts: list[dict[str, Any]]) -> None:
    for part in parts:
        whole, units = part["mixed"]
        assert whole.keys() == units.keys()
        for name, value in units.items():
            torch.testing.assert_close(whole[name], value, rtol=1e-9, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")


def test_prologues_are_for_blocks_with_groups_and_merged_statistics_too() -> None:
    block = fr.Bottleneck(64, 16, groups=4, base_width=64)
    convs = (block.conv1, block.conv2, block.conv3)
    with fr.use_plan(prologue=True):
        for merged in (False, True):
            plan = plan_block(torch.empty(2, 64, 2, 2), convs, None, "balanced", merged)
            assert plan is not None
            assert plan.prologue
        reads = [row.input for row in plan_layers(torch.empty(2, 64, 2, 2), convs, None, plan)]
        assert reads == ["materialised", "materialised", "prologue"]


def test_plans_of_merging_blocks_do_not_depend_on_the_batch() -> None:
    for width in (16, MERGED_GRAM_CHANNELS, 2 * MERGED_GRAM_CHANNELS):
        block = fr.Bottleneck(4 * width, width)
        convs = (block.conv1, block.conv2, block.conv3)
        plans = {
            plan_block(torch.empty(n, 4 * width, 2, 2, device="cpu"), convs, None, "balanced", merged=True)
            for n in (0, 1, 1000)
        }
        assert plans == ({Plan(True, False)} if width <= MERGED_GRAM_CHANNELS else {None})
