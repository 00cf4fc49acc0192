"""csrc's formulas (math.h) and launch planners (cuda/plan.h), through a module made with pybind11."""

from __future__ import annotations

import importlib.util
import itertools
import math
import random
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
    spec = importlib.util.spec_from_file_location("internals", builds.internals())
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


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
    size = max(abs(v) for v in values)
    assert n == len(values)
    assert abs(mean - exact_mean) <= (len(values) + 8) * eps * size
    spread = math.sqrt(exact_m2 * len(values))  # the mean's own error enters by this
    assert abs(m2 - exact_m2) <= (len(values) + 8) * eps * (exact_m2 + 2 * size * spread + eps * len(values) * size**2)


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
