"""`prologue_tiles_kernel`: dense products by few programs through tensor descriptors, in the interpreter.

The target has one multiprocessor (conftest.py): each program goes over several tiles.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from harness import DTYPES, guarded, track
from interpret_prologue import TILE, bn_of, check, images, rounded, sums_of
from torch import Tensor

from fused_resnet import tuning
from fused_resnet.backends import selfcheck
from fused_resnet.backends import triton as backend
from fused_resnet.backends.triton import configs, prologue, runtime

PERSISTENT = TILE | {"BM": 32, "PERSISTENT": 2}
# (N, C, H, W), K
SHAPES: dict[str, tuple[tuple[int, ...], int]] = {
    "odd": ((3, 72, 5, 7), 40),
    "one image": ((1, 24, 11, 9), 104),
    "few channels": ((2, 8, 9, 5), 72),
}
CASES = [(shape, dtype) for shape in SHAPES for dtype in DTYPES if dtype == torch.bfloat16 or shape == "odd"]
DENSE: tuple[Any, ...] = ((1, 1), (0, 0), (1, 1))


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """(kernel, programs) of each launch of a convolution."""
    found: list[tuple[str, int]] = []

    def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **meta: Any) -> None:
        found.append((kernel.__name__, grid[0]))
        runtime.launch(kernel, grid, *args, **meta)

    monkeypatch.setattr(prologue, "launch", launch)
    return found


@pytest.fixture
def persistent() -> Iterator[None]:
    with configs.override(prologue.CONV, PERSISTENT):
        yield


def weight_of(shape: str, dtype: torch.dtype) -> Tensor:
    (_, C, *_), K = SHAPES[shape]
    return guarded((K, C, 1, 1), dtype, seed=9, std=C**-0.5)


def output(shape: str, dtype: torch.dtype, seed: int) -> Tensor:
    (N, _, H, W), K = SHAPES[shape]
    return images((N, K, H, W), dtype, seed)


def assert_persistent(launched: list[tuple[str, int]]) -> None:
    """All by two programs, which is fewer than tiles."""
    assert launched
    assert set(launched) == {("prologue_tiles_kernel", 2)}


@pytest.mark.parametrize(("shape", "dtype"), CASES, ids=str)
@pytest.mark.parametrize("normalised", [True, False])
def test_forward(shape, dtype, normalised, persistent, launched):
    x, weight = images(SHAPES[shape][0], dtype, 0), weight_of(shape, dtype)
    bn = bn_of(x, 1) if normalised else None
    for statistics in (True, False):
        given = (x, bn, weight, *DENSE, statistics, None, None, 0.0)
        check("prologue_conv_forward", *given, scale=dict.fromkeys((1, 2), rounded(dtype)))
    assert_persistent(launched)


@pytest.mark.parametrize(("shape", "dtype"), CASES, ids=str)
@pytest.mark.parametrize("kind", ["first, added", "inner", "frozen"])
def test_grad_input(shape, dtype, kind, persistent, launched):
    x, y, g = images(SHAPES[shape][0], dtype, 0), output(shape, dtype, 1), output(shape, dtype, 2)
    add = images(tuple(x.shape), dtype, 3) if "added" in kind else None
    x_bn = None if "first" in kind else bn_of(x, 4)
    sums = None if kind == "frozen" else sums_of(y, 20)
    given = (g, y, bn_of(y, 10), sums, weight_of(shape, dtype), x, x_bn, add, *DENSE)
    check("prologue_conv_grad_input", *given, scale=dict.fromkeys((1, 2), rounded(dtype, x[:, 0].numel())))
    assert_persistent(launched)


def test_a_gradient_added_at_every_other_pixel(persistent, launched):
    x, y, g = (
        images(SHAPES["odd"][0], torch.bfloat16, 0),
        output("odd", torch.bfloat16, 1),
        output("odd", torch.bfloat16, 2),
    )
    add = images(tuple(x[:, :, ::2, ::2].shape), x.dtype, 3)
    check("prologue_conv_grad_input", g, y, bn_of(y, 10), None, weight_of("odd", x.dtype), x, None, add, *DENSE)
    assert_persistent(launched)


@pytest.mark.parametrize(("shape", "dtype"), CASES, ids=str)
@pytest.mark.parametrize("second", ["", "projection", "identity"])
def test_end(shape, dtype, second, persistent, launched):
    """Forward and backward of the products of the Gram form, with one and with two pairs of operands."""
    x, weight, g = images(SHAPES[shape][0], dtype, 0), weight_of(shape, dtype), output(shape, dtype, 3)
    columns, bn = weight.shape[0], bn_of(x, 4) if second else None
    x2 = weight2 = residual = None
    if second == "projection":
        x2 = images((x.shape[0], 48, *x.shape[2:]), dtype, 6)
        weight2 = guarded((columns, 48, 1, 1), dtype, seed=7, std=0.2)
    elif second == "identity":
        residual = output(shape, dtype, 8)
    shift = guarded((columns,), torch.float32, seed=5)
    given = (x, bn, weight, x2, weight2, shift, residual, (1, 1), (1, 1), "relu" if second else None)
    check("prologue_end_forward", *given, scale={0: rounded(dtype)})
    square = guarded((x.shape[1],) * 2, dtype, seed=9, std=0.1) if second else None
    inward = guarded((x.shape[1],), torch.float32, seed=10) if second else None
    scaled = guarded((columns, x.shape[1]), dtype, seed=11, std=0.2)
    scale = dict.fromkeys((1, 2), rounded(dtype, g[:, 0].numel(), 10.0))
    check("prologue_end_backward", g, scaled, x, bn, square, inward, (1, 1), scale=scale)
    assert_persistent(launched)


def test_64_bit_offsets(monkeypatch, persistent, launched):
    monkeypatch.setattr(prologue.conv, "WIDE_FROM", 0)
    x = images(SHAPES["odd"][0], torch.bfloat16, 0)
    given = (x, bn_of(x, 1), weight_of("odd", x.dtype), *DENSE, True, None, None, 0.0)
    check("prologue_conv_forward", *given, scale=dict.fromkeys((1, 2), rounded(x.dtype)))
    assert_persistent(launched)


def test_every_operand_is_read_by_descriptor_and_every_tile_written_once(launched):
    x, weight = images(SHAPES["odd"][0], torch.bfloat16, 0), weight_of("odd", torch.bfloat16)
    with configs.override(prologue.CONV, PERSISTENT), track() as launches:
        out, _, _ = backend.prologue_conv_forward(x, None, weight, *DENSE, False, None, None, 0.0)
    (launch,) = launches
    columns = -(-SHAPES["odd"][1] // PERSISTENT["BN"])
    rows = -(-x[:, 0].numel() // PERSISTENT["BM"])
    assert launch.loads["x"] == (x.nbytes, x.nbytes * columns)
    assert launch.loads["weight"] == (weight.nbytes, weight.nbytes * rows)
    assert launch.stores["out"] == (out.nbytes, out.nbytes)
    with configs.override(prologue.CONV, PERSISTENT), track() as launches:
        backend.prologue_conv_grad_input(out, out, bn_of(out, 1), None, weight, x, None, None, *DENSE)
    assert "y" not in launches[0].loads  # of a BN that took no statistics


def _other(kind: str) -> tuple[str, tuple[Any, ...]]:
    """A call that `prologue_tiles_kernel` cannot serve."""
    dtype = torch.bfloat16
    channels, stride = (67, 1) if kind == "channels" else (64, 2 if kind == "stride" else 1)
    x, weight = images((2, channels, 7, 9), dtype, 0), guarded((40, channels, 1, 1), dtype, seed=9, std=0.1)
    if kind == "columns of the weight":  # of its transpose, which is what a gradient reads
        x, y = images((2, 36, 7, 9), dtype, 0), images((2, 40, 7, 9), dtype, 1)
        weight = guarded((40, 36, 1, 1), dtype, seed=9, std=0.1)
        return "prologue_conv_grad_input", (y, y, bn_of(y, 1), None, weight, x, None, None, *DENSE)
    if kind == "storage":
        buffer = torch.zeros(x.numel() + 1, dtype=dtype)
        x = buffer[1:].view(2, 7, 9, 64).permute(0, 3, 1, 2).copy_(x)
    if kind.startswith("second"):
        step = 2 if "strided" in kind else 1
        x2 = images((2, 48 if step == 2 else 19, 7 * step, 9 * step), dtype, 2)
        weight2 = guarded((40, x2.shape[1], 1, 1), dtype, seed=3, std=0.1)
        shift = guarded((40,), torch.float32, seed=4)
        return "prologue_end_forward", (x, None, weight, x2, weight2, shift, None, (1, 1), (step, step), "relu")
    geometry = ((stride, stride), (1, 1) if kind == "padding" else (0, 0), (1, 1))
    if kind == "taps":
        weight, geometry = guarded((40, channels, 3, 3), dtype, seed=9, std=0.04), ((1, 1), (1, 1), (1, 1))
    return "prologue_conv_forward", (x, None, weight, *geometry, False, None, None, 0.0)


OTHERS = (
    "channels",
    "columns of the weight",
    "storage",
    "stride",
    "padding",
    "taps",
    "second, strided",
    "second, ragged",
)


@pytest.mark.parametrize("kind", OTHERS)
def test_what_tma_cannot_read_goes_to_the_other_kernel(kind, persistent, launched):
    name, given = _other(kind)
    check(name, *given)
    assert {kernel for kernel, _ in launched} == {"prologue_conv_kernel"}


def test_an_empty_batch(persistent):
    x, weight = images((0, 64, 5, 5), torch.bfloat16, 0), guarded((24, 64, 1, 1), torch.bfloat16, seed=1)
    out, _, _ = backend.prologue_conv_forward(x, None, weight, *DENSE, False, None, None, 0.0)
    assert out.shape == (0, 24, 5, 5)


def key_of(**changes: Any) -> prologue.Problem:
    problem = prologue.Problem("bfloat16", "ieee", False, 1, 256, 64, 1 << 18, False, True)
    return problem._replace(**changes)


@pytest.mark.parametrize("arch", configs.TARGETS)
def test_tuning_tries_it_where_it_compiles_without_spills(arch):
    def tried(**changes: Any) -> list[int]:
        return [config["PERSISTENT"] for config in configs.candidates(prologue.CONV, key_of(**changes), target)]

    target = configs.TARGETS[arch]
    assert tried()[0] == 0  # the default
    assert any(tried()) == any(tried(gradient=True)) == (arch in ("sm_90", "sm_100"))
    for changes in ({"dense": False}, {"columns": 100}, {"inner": 36}, {"dtype": "float32", "inner": 6}):
        assert not any(tried(**changes))
    assert any(tried(dtype="float32", precision="tf32", inner=36)) == (arch in ("sm_90", "sm_100"))
    assert not any(tried(dtype="float32"))  # no tensor core


@pytest.fixture
def sm_90(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> Iterator[None]:
    """Problems are tuned as on such a GPU, if it had one multiprocessor."""
    monkeypatch.setitem(configs.TARGETS, "sm_90", configs.TARGETS["sm_90"]._replace(multiprocessors=1))
    monkeypatch.setenv("FUSED_RESNET_CACHE", str(tmp_path))
    monkeypatch.setattr(configs, "_is_tunable", lambda x: True)
    configs._tables.clear()
    configs.assume("sm_90")
    yield
    configs._tables.clear()
    configs.assume("tiny")


def tuned_for_it() -> tuning.Tuned:
    """The outcome of tuning a small 1x1 conv with a clock on which the persistent kernel is the fastest."""
    x, weight = images((2, 64, 12, 12), torch.bfloat16, 0), guarded((64, 64, 1, 1), torch.bfloat16, seed=9, std=0.1)
    rows = prologue.power_of_two(2 * 12 * 12)
    call = tuning.Call(
        "prologue_conv_forward",
        (x, None, weight, *DENSE, True, None, None, 0.0),
        ((prologue.CONV, key_of(columns=64, rows=rows)),),
    )
    before = prologue.launch

    def measure(run: Any) -> float:
        kernels: list[str] = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                prologue,
                "launch",
                lambda kernel, *args, **meta: kernels.append(kernel.__name__) or before(kernel, *args, **meta),
            )
            run()
        return 1.0 if "prologue_tiles_kernel" in kernels else 2.0

    (outcome,) = tuning.tune([call], measure=measure, progress=False)
    return outcome


def test_tuning_keeps_it_where_it_is_the_fastest(sm_90, launched):
    outcome = tuned_for_it()
    assert (outcome.config["PERSISTENT"], outcome.best_ms, outcome.refused) == (2, 1.0, 0)
    x, weight = images((2, 64, 12, 12), torch.bfloat16, 1), guarded((64, 64, 1, 1), torch.bfloat16, seed=9, std=0.1)
    launched.clear()
    check("prologue_conv_forward", x, None, weight, *DENSE, False, None, None, 0.0)
    assert [kernel for kernel, _ in launched] == ["prologue_tiles_kernel"]


def wrong_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel's operands lose their last channels."""
    right = prologue.descriptors

    def narrower(*args: Any) -> Any:
        found = right(*args)
        if found is not None:
            found[0].shape[1] -= 8
        return found

    monkeypatch.setattr(prologue, "descriptors", narrower)


def test_tuning_refuses_it_where_it_is_wrong(sm_90, monkeypatch):
    wrong_tiles(monkeypatch)
    outcome = tuned_for_it()
    assert outcome.config["PERSISTENT"] == 0
    assert outcome.refused == len(
        [c for c in configs.candidates(*outcome[:2], configs.TARGETS["sm_90"]) if c["PERSISTENT"]]
    )


@pytest.mark.filterwarnings("ignore:fused_resnet")
def test_the_self_check_tries_what_tuning_chose(sm_90, monkeypatch, launched):
    small = [images((2, 16, 5, 6), torch.bfloat16, seed) for seed in range(3)]
    monkeypatch.setattr(selfcheck, "_inputs", lambda *args: iter([small]))
    monkeypatch.setattr(selfcheck, "COPIES", 2)
    case = selfcheck.Case("prologue", torch.device("cpu"), torch.bfloat16, False)
    x = images((1, 8, 2, 2), torch.bfloat16, 0)
    assert not [*backend.variants("prologue", x)]
    tuned_for_it()
    assert len([*backend.variants("prologue", x)]) == 1
    assert not [*backend.variants("prologue", x.half()), *backend.variants("bn_act", x)]
    launched.clear()
    assert selfcheck.run(backend, case) is None
    assert "prologue_tiles_kernel" in {kernel for kernel, _ in launched}
    wrong_tiles(monkeypatch)
    assert "differ" in str(selfcheck.run(backend, case))
