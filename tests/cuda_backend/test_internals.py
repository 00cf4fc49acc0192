"""csrc's formulas (math.h) and launch planners (cuda/plan.h, cuda/conv.h), through a module made with pybind11."""

from __future__ import annotations

import importlib.util
import itertools
import math
import random
from collections.abc import Iterator
from types import ModuleType

import builds
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from fused_resnet.backends import cpp

pytestmark = [
    pytest.mark.skipif(builds.missing() is not None, reason=builds.missing() or ""),
    pytest.mark.skipif(importlib.util.find_spec("pybind11") is None, reason="pybind11 is not installed"),
    pytest.mark.xdist_group("csrc"),  # what builds stays in one process
]


@pytest.fixture(scope="module")
def csrc() -> ModuleType:
    return builds.module("internals")


def moments(values: list[float]) -> tuple[float, float, float]:
    mean = math.fsum(values) / len(values)
    return len(values), mean, math.fsum((v - mean) ** 2 for v in values)


FLOATS = st.floats(-1e3, 1e3, width=32)


@settings(deadline=None, max_examples=200)
@given(st.lists(FLOATS, min_size=1, max_size=60), st.data())
@pytest.mark.parametrize("kind", ["float", "double"])
def test_parts_of_any_split_merge_to_the_statistics(csrc, kind, values, data):
    cuts = sorted(data.draw(st.lists(st.integers(0, len(values)), max_size=10)))
    pieces = [values[a:b] for a, b in itertools.pairwise([0, *cuts, len(values)])]
    parts = [getattr(csrc, f"part_{kind}")(piece) for piece in pieces]
    n, mean, m2 = getattr(csrc, f"merged_{kind}")(parts)
    _, exact_mean, exact_m2 = moments(values)
    eps = 2.0 ** (-23 if kind == "float" else -52)
    size = max(2.0**-126, *map(abs, values))  # below, the distances between floats no longer shrink
    assert n == len(values)
    assert abs(mean - exact_mean) <= (len(values) + 8) * eps * size
    spread = math.sqrt(exact_m2 * len(values))  # the mean's own error enters by this
    bound = (len(values) + 8) * eps * (exact_m2 + 2 * size * spread + eps * len(values) * size**2)
    assert abs(m2 - exact_m2) <= bound + len(values) * 2.0**-126  # squares below the smallest float are 0


@pytest.mark.parametrize("kind", ["float", "double"])
def test_infinite_and_missing_values_reach_the_mean(csrc, kind):
    part, merged = getattr(csrc, f"part_{kind}"), getattr(csrc, f"merged_{kind}")
    for values, expected in (
        ([1.0, math.inf, 2.0], math.inf),
        ([-math.inf, -1.0], -math.inf),
        ([math.inf, 3.0, -math.inf], math.nan),
        ([1.0, math.nan, 2.0], math.nan),
    ):
        for cut in range(len(values) + 1):
            _, mean, m2 = merged([part(values[:cut]), part(values[cut:]), part([5.0])])
            assert mean == expected or (math.isnan(mean) and math.isnan(expected))
            assert math.isnan(m2)


@settings(deadline=None)
@given(st.lists(FLOATS, min_size=1, max_size=60), FLOATS)
def test_moments_about_any_pilot(csrc, values, pilot):
    n, exact_mean, exact_m2 = moments(values)
    offsets = [v - pilot for v in values]
    mean, m2 = csrc.moments(n, pilot, math.fsum(offsets), math.fsum(o * o for o in offsets))
    assert mean == pytest.approx(exact_mean, abs=1e-11)
    assert m2 == pytest.approx(exact_m2, abs=1e-9 + 1e-12 * sum(o * o for o in offsets))
    about = csrc.m2_about(n, mean, m2, pilot)
    assert about == pytest.approx(math.fsum(o * o for o in offsets), rel=1e-9, abs=1e-9)


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 2**32), st.integers(2, 40), st.booleans())
def test_backward_coefficients(csrc, seed, count, with_relu):
    """bn, relu and their gradients as the kernels put them together, against autograd."""
    torch.manual_seed(seed)
    x = (torch.randn(count, dtype=torch.float64) * 2 + 3).requires_grad_()
    gamma, beta = (torch.randn((), dtype=torch.float64, requires_grad=True) for _ in range(2))
    grad = torch.randn(count, dtype=torch.float64)
    mean, var, eps = x.mean().item(), x.var(correction=0).item(), 1e-5
    assume(var > 1e-3)
    rstd = csrc.bn_rstd(var, eps)
    scale = gamma.item() * rstd
    y = [csrc.bn(v, mean, scale, beta.item()) for v in x.tolist()]
    g = [csrc.relu_grad(a, b) if with_relu else a for a, b in zip(grad.tolist(), y, strict=True)]
    s1, s2 = math.fsum(g), math.fsum(a * (v - mean) * rstd for a, v in zip(g, x.tolist(), strict=True))
    ours = [csrc.bn_grad(a, v, mean, scale, s1 / count, rstd * s2 / count) for a, v in zip(g, x.tolist(), strict=True)]

    out = torch.nn.functional.batch_norm(x[:, None], None, None, gamma[None], beta[None], True, 0.1, eps)[:, 0]
    out = out.relu() if with_relu else out
    out.backward(grad)
    y = [csrc.relu(v) for v in y] if with_relu else y
    torch.testing.assert_close(torch.tensor(y, dtype=torch.float64), out.detach())
    torch.testing.assert_close(torch.tensor(ours, dtype=torch.float64), x.grad, rtol=1e-7, atol=1e-8)
    torch.testing.assert_close(torch.tensor([s2, s1], dtype=torch.float64), torch.stack([gamma.grad, beta.grad]))


@settings(deadline=None, max_examples=50)
@given(st.floats(0, 1e6, width=32), st.sampled_from([1e-5, 1e-3, 1.0]))
def test_the_fast_rstd_is_nearly_rounded(csrc, var, eps):
    exact = 1 / math.sqrt(var + eps)
    assert csrc.bn_rstd_fast(var, eps) == pytest.approx(exact, rel=2**-22)


def test_running_statistics(csrc):
    assert csrc.update_running(2.0, 4.0, 0.25) == 2.5
    assert csrc.unbiased(3.0, 4) == 4.0
    assert csrc.unbiased(3.0, 1) == 3.0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bit_storage_is_that_of_torch(csrc, dtype):
    """Every value of the type, their midpoints and what lies just beside those, random floats, and the specials."""
    name = {torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]
    to_bits, to_value = getattr(csrc, f"{name}_bits"), getattr(csrc, f"{name}_value")
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    wide = every.view(dtype).float()
    ours = torch.tensor([to_value(bits & 0xFFFF) for bits in every.tolist()])
    torch.testing.assert_close(ours, wide, rtol=0, atol=0, equal_nan=True)
    finite = wide[wide.isfinite()].sort().values[::37]
    middle = (finite[1:] + finite[:-1]) / 2
    beside = [torch.nextafter(middle, torch.tensor(sign * math.inf)) for sign in (-1, 1)]
    values = torch.cat(
        [finite, middle, *beside, torch.randn(2000) * 1e3, torch.tensor([math.inf, -math.inf, 3.4e38, 7e4])]
    )
    stored = torch.tensor([to_bits(v) for v in values.tolist()], dtype=torch.int32).to(torch.int16).view(dtype)
    assert torch.equal(stored.view(torch.int16), values.to(dtype).view(torch.int16))
    assert torch.tensor([to_bits(math.nan)], dtype=torch.int32).to(torch.int16).view(dtype).isnan().all()


def shapes() -> list[tuple[int, int, int]]:
    """(N, C, S): small ones of every kind and ResNet's."""
    rng = random.Random(0)
    small = [(rng.randint(1, 9), rng.randint(1, 70), rng.randint(1, 50)) for _ in range(1500)]
    wide = [(rng.randint(1, 3), rng.randint(200, 2100), rng.randint(1, 9)) for _ in range(40)]
    large = [(1, 3, 70000), (33, 64, 196), (2, 2048, 49), (1, 8, 12544), (40000, 2, 1), (1, 1, 1), (5000, 24, 1)]
    return small + wide + large


def test_every_element_is_visited_once(csrc):
    rng = random.Random(1)
    for n, c, s in shapes():
        for rows in (True, False):
            for vector in (1, 4, 8):
                if (c if rows else s) % vector:
                    continue
                reverse, multiprocessors = rng.random() < 0.5, rng.choice([1, 2, 13, 132])
                parts, blocks, across, wrong = csrc.visited(n, c, s, rows, vector, multiprocessors, reverse)
                case = (n, c, s, rows, vector, multiprocessors, reverse)
                assert wrong == 0, case
                assert csrc.threads % across == 0, case
                assert parts * blocks <= max(2 * multiprocessors, blocks), case


def test_vectors_only_where_lengths_and_addresses_allow(csrc):
    for itemsize, most in ((2, 8), (4, 4), (2, 4)):
        aligned = 0x7FF0 | most * itemsize
        assert csrc.vector_size(itemsize, most, 64, aligned) == most
        assert csrc.vector_size(itemsize, most, 64, aligned | most * itemsize // 2) == 1
        assert csrc.vector_size(itemsize, most, 64 + most // 2, aligned) == 1
        assert csrc.vector_size(itemsize, most, 7, aligned) == 1


@given(st.integers(1, 2**40), st.sampled_from([1, 4, 8]))
def test_blocks_of_flat_kernels_cover_all_vectors(csrc, n, vector):
    blocks, vectors = csrc.flat_blocks(n, vector), n // vector
    assert blocks * csrc.flat >= vectors
    assert (blocks - 1) * csrc.flat < max(vectors, 1)
    assert n - vectors * vector < csrc.threads  # the first block's threads take the rest


@pytest.mark.parametrize("width", [1, 63, 64, 65, 128, 200, 512, 2048])
@pytest.mark.parametrize("rows", [1, 15, 16, 17, 1000, 12544, 802816])
@pytest.mark.parametrize("multiprocessors", [1, 132])
def test_tiles_and_parts_of_second_moments(csrc, rows, width, multiprocessors):
    pairs, first = csrc.tiles(rows, width, multiprocessors)
    tiles = -(-width // csrc.tile)
    assert pairs == [(i, j) for j in range(tiles) for i in range(j + 1)]
    assert first[0] == 0
    assert first[-1] == rows
    assert all(a < b for a, b in itertools.pairwise(first)), "an empty part"


def test_python_knows_the_limit(csrc):
    assert csrc.most_positions == cpp._MOST_VALUES


# Convolutions (cuda/conv.h)


def convolutions(count: int) -> Iterator[tuple[int, ...]]:
    """(n, c, h, w, k, r, s, strides, paddings, dilations) of convolutions that fit their input."""
    rng = random.Random(2)
    while count:
        n, c, k = rng.randint(1, 4), 8 * rng.randint(1, 40), 8 * rng.randint(1, 40)
        h, w, r, s = rng.randint(1, 60), rng.randint(1, 60), rng.choice([1, 3, 5, 7]), rng.choice([1, 2, 3, 7])
        stride, dilation = [rng.randint(1, 4) for _ in range(2)], [rng.randint(1, 4) for _ in range(2)]
        padding = [rng.randint(0, 8) for _ in range(2)]
        if h + 2 * padding[0] > dilation[0] * (r - 1) and w + 2 * padding[1] > dilation[1] * (s - 1):
            count -= 1
            yield n, c, h, w, k, r, s, *stride, *padding, *dilation


def output_shape(n, c, h, w, k, r, s, *geometry) -> torch.Size:
    """What torch's own convolution gives."""
    x, weight = torch.empty(n, c, h, w, device="meta"), torch.empty(k, c, r, s, device="meta")
    return torch.nn.functional.conv2d(x, weight, None, *(geometry[i : i + 2] for i in (0, 2, 4))).shape


def test_sizes_of_outputs_are_those_of_torch(csrc):
    for conv in convolutions(3000):
        _, _, h, w, _, r, s, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w = conv
        size = [
            csrc.conv_extent(h, pad_h, dilation_h, r, stride_h),
            csrc.conv_extent(w, pad_w, dilation_w, s, stride_w),
        ]
        assert size == list(output_shape(*conv)[2:]), conv


needs_cutlass = pytest.mark.skipif(builds.no_cutlass() is not None, reason=builds.no_cutlass() or "")


@pytest.fixture(scope="module")
def cutlass_host() -> ModuleType:
    return builds.module("cutlass_host", builds.cutlass_flags())


@needs_cutlass
def test_the_products_for_sm_80_are_the_convolution(cutlass_host):
    for conv in convolutions(3000):
        n, c, _, _, k, r, s, *_ = conv
        _, _, p, q = output_shape(*conv)
        size, members = cutlass_host.sm80(conv)
        assert size == [n * p * q, k, c * r * s], conv
        assert tuple(members) == conv


@needs_cutlass
def test_the_tensor_maps_for_sm_90_are_the_convolution(csrc, cutlass_host):
    """What the driver is asked for: sizes, strides in bytes, and the pixels that im2col mode visits: those of the first
    tap, one for each output."""
    for conv in convolutions(3000):
        n, c, h, w, k, r, s, *geometry = conv
        (*_, p, q), (strides, paddings, dilations) = output_shape(*conv), (geometry[i : i + 2] for i in (0, 2, 4))
        assert csrc.conv_refusal(conv, 9, 0) is None
        served, (x, weight, *outs) = cutlass_host.tensor_maps(conv)
        assert served
        addresses, sizes, steps = zip(*(m[:3] for m in (x, weight, *outs)), strict=True)
        assert addresses == (16, 32, 48, 64)
        assert sizes == ([c, w, h, n], [c, k, s, r], [k, q, p, n], [k, q, p, n]), conv
        out = [2 * k, 2 * k * q, 2 * k * q * p]
        assert steps == ([2 * c, 2 * c * w, 2 * c * w * h], [2 * c * s * r, 2 * c, 2 * c * s], out, out), conv
        lower, upper, box, steps = x[3:]
        assert (box, steps) == ([64, 128], [1, strides[1], strides[0], 1])
        for d, (extent, size, taps) in enumerate(((h, p, r), (w, q, s))):
            visited = range(lower[1 - d], extent + upper[1 - d], strides[d])
            assert list(visited) == [i * strides[d] - paddings[d] for i in range(size)], conv
            assert visited[-1] + (taps - 1) * dilations[d] < extent + paddings[d], conv
        assert all(m[3:] == ([0, 0], [0, 0], [32, 64], [1, 1, 1, 1]) for m in outs)  # every pixel, by pieces of a tile


@needs_cutlass
@pytest.mark.parametrize("change", [{9: 129}, {10: 129, 12: 2}, {11: 65}, {12: 128}, {1: 4}, {4: 4}], ids=str)
def test_what_cutlass_refuses_is_refused(csrc, cutlass_host, change):
    sizes = [change.get(i, size) for i, size in enumerate((2, 64, 300, 300, 64, 3, 3, 1, 1, 1, 1, 1, 1))]
    served, maps = cutlass_host.tensor_maps(sizes)
    assert not served
    assert not maps
    assert csrc.conv_refusal(sizes, 9, 0) is not None


@needs_cutlass
@pytest.mark.parametrize("columns", [64, 128])
@pytest.mark.parametrize("kind", ["bf16", "fp16"])
@pytest.mark.parametrize("channels", [8, 64, 128, 152, 256])
@pytest.mark.parametrize("with_residual", [True, False])
@pytest.mark.parametrize("with_relu", [True, False])
def test_each_thread_of_sm_90_finishes_its_part_of_a_tile(
    cutlass_host, columns, kind, channels, with_residual, with_relu
):
    """By the layouts of CUTLASS's epilogue: each element once, with its own channel and its own residual."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[kind]
    first = (channels - 1) // columns * columns  # the last tile, ragged or not
    width = min(columns, channels - first)
    sums, mean, var = torch.randn(128, columns), torch.randn(channels), torch.rand(channels) + 0.5
    residual = torch.randn(128, columns).to(dtype).float() if with_residual else torch.empty(0)
    vectors = (t.flatten().tolist() for t in (sums, mean, var, residual))
    ours = torch.tensor(getattr(cutlass_host, f"end_{kind}_{columns}")(*vectors, first, channels, with_relu))
    inside = slice(first, first + width)
    y = (sums[:, :width] - mean[inside]) * var[inside].rsqrt()
    y = y + residual[:, :width] if with_residual else y
    torch.testing.assert_close(ours.view(128, columns)[:, :width], y.relu() if with_relu else y)


VECTOR = st.none() | st.tuples(st.lists(st.floats(-4, 4, width=16), min_size=5, max_size=5), st.booleans())


@settings(deadline=None, max_examples=300)
@given(
    st.lists(FLOATS, min_size=5, max_size=5),
    st.tuples(VECTOR, VECTOR, VECTOR),
    st.none() | st.lists(st.floats(0, 4, width=16), min_size=10, max_size=10),
    st.lists(FLOATS, min_size=5, max_size=5),
    st.booleans(),
    st.sampled_from(["bf16", "fp16"]),
)
def test_the_end_of_a_convolution(csrc, sums, vectors, statistics, residual, with_relu, kind):
    """act(bn(sum + bias) + residual), the vectors in float32 or the tensors' type, each there or not."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[kind]
    bias, gamma, beta = vectors
    mean, var = ((statistics[:5], True), (statistics[5:], False)) if statistics else (None, None)
    ours = getattr(csrc, f"conv_end_{kind}")(sums, bias, mean, var, gamma, beta, 0.5, residual, with_relu)

    def exact(vector, absent):
        if vector is None:
            return torch.full((5,), absent, dtype=torch.float64)
        values = torch.tensor(vector[0], dtype=torch.float64)
        return values if vector[1] else values.to(dtype).double()

    y = torch.tensor(sums, dtype=torch.float64) + exact(bias, 0.0)
    if statistics:
        y = (y - exact(mean, 0.0)) / (exact(var, 1.0) + 0.5).sqrt() * exact(gamma, 1.0) + exact(beta, 0.0)
    y += torch.tensor(residual, dtype=torch.float64)
    y = y.relu() if with_relu else y
    torch.testing.assert_close(torch.tensor(ours, dtype=torch.float64), y, rtol=1e-5, atol=2e-3)


def test_nan_passes_the_end_of_a_convolution(csrc):
    ours = csrc.conv_end_bf16([math.nan, -math.inf, 1.0], None, None, None, None, None, 0.0, [0.0, 0.0, math.nan], True)
    assert [math.isnan(v) for v in ours] == [True, False, True]
    assert ours[1] == 0.0


SERVED = (8, 64, 56, 56, 64, 3, 3, 1, 1, 1, 1, 1, 1)
MULTIPLES, ELEMENTS = "input and output channels must be multiples of 8", "a tensor has 2**31 elements or more"
MAPS = "the padding, dilation or stride is larger than the GPU's tensor maps allow"


@pytest.mark.parametrize(
    ("changes", "sm80", "sm90"),
    [
        ({}, None, None),
        ({1: 3}, MULTIPLES, MULTIPLES),
        ({4: 12}, MULTIPLES, MULTIPLES),
        ({0: 10700}, ELEMENTS, ELEMENTS),
        ({0: 10699}, None, None),
        ({0: 10000, 4: 128}, ELEMENTS, ELEMENTS),
        ({5: 33, 9: 16}, "the kernel is larger than 32", None),
        ({6: 33, 10: 16}, "the kernel is larger than 32", None),
        ({7: 9}, None, MAPS),
        ({8: 8}, None, None),
        ({9: 128, 11: 2}, None, None),
        ({9: 129, 11: 2}, None, MAPS),
        ({10: 128}, None, None),
        ({10: 130}, None, MAPS),
        ({2: 400, 11: 64}, None, None),
        ({2: 400, 11: 65}, None, MAPS),
        ({3: 400, 12: 65}, None, MAPS),
        ({2: 600, 9: 126, 11: 127}, None, None),
        ({2: 600, 9: 127, 11: 128}, None, MAPS),
    ],
)
def test_why_the_convolutions_of_cutlass_do_not_serve(csrc, changes, sm80, sm90):
    sizes = [changes.get(i, size) for i, size in enumerate(SERVED)]
    assert csrc.conv_refusal(sizes, 8, 6) == sm80
    assert csrc.conv_refusal(sizes, 9, 0) == sm90


def test_the_gpus_that_convolutions_are_compiled_for(csrc):
    kernels = {(major, minor): csrc.conv_kernels(major, minor) for major in range(7, 14) for minor in range(10)}
    none, sm80, sm90 = 0, 1, 2
    assert all(kernels[8, minor] == sm80 for minor in range(10))
    assert [key for key, value in kernels.items() if value == sm90] == [(9, 0)]
    assert kernels[7, 5] == kernels[9, 1] == kernels[10, 0] == kernels[12, 0] == none


def test_tiles_of_convolutions(csrc):
    """Wide where there is work for all multiprocessors and no channels are wasted."""
    for conv in convolutions(2000):
        k = conv[4]
        rows = math.prod(output_shape(*conv)) // k
        for multiprocessors in (1, 13, 132):
            tile, tiles, wide = csrc.conv_tile(conv, multiprocessors)
            assert tiles == -(-rows // 128) * -(-k // tile)
            assert wide == -(-rows // 128) * -(-k // 128)
            if tile == 128:
                assert wide >= multiprocessors
            else:
                assert wide < multiprocessors or 0 < k % 128 <= 64
    assert csrc.conv_tile(SERVED, 132)[0] == 64
    assert csrc.conv_tile((64, 256, 14, 14, 1024, 1, 1, 1, 1, 0, 0, 1, 1), 132)[0] == 128
