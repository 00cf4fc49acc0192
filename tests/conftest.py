"""What every test shares: seeds, backends as parameters, poisoned memory, torchvision, small grids."""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import importlib.util
import itertools
import os
import random
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch.utils import deterministic

if "PYTEST_XDIST_WORKER_COUNT" in os.environ:  # share the processors; what needs threads sets their number
    torch.set_num_threads(max(1, torch.get_num_threads() // int(os.environ["PYTEST_XDIST_WORKER_COUNT"])))
os.environ.pop("FUSED_RESNET_BACKEND", None)  # tests ask for backends themselves

from fused_resnet import dispatch
from fused_resnet.backends import cpp

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def _no_extension() -> str | None:
    """Why the `cpp` tests cannot run here; a missing extension where it could be built is a failure, not a skip."""
    if cpp.unavailable("cpu") is None:
        return None
    if os.environ.get("FUSED_RESNET_NO_EXT", "0") not in ("", "0"):
        return "FUSED_RESNET_NO_EXT is set: no extension is wanted"
    if shutil.which(os.environ.get("CXX", "c++").split()[0]) is None:
        return "no C++ compiler on this machine, so no extension"
    return None


needs_cpp = pytest.mark.skipif(_no_extension() is not None, reason=_no_extension() or "")


def backends(*names: str) -> list[Any]:
    """Parameters for `pytest.mark.parametrize("backend", ...)`; "cpp" is skipped only where nothing can build it."""
    return [pytest.param(name, marks=needs_cpp if name == "cpp" else (), id=name) for name in names]


def pairwise(factors: Mapping[str, Sequence[Any]], impossible: Any = lambda case: False) -> list[dict[str, Any]]:
    """Cases in which every pair of values of two factors occurs together at least once, unless `impossible(case)`.

    A full cross product costs minutes and finds no more: bugs sit in one option or in the meeting of two.
    """
    rng = random.Random(0)
    names = list(factors)

    def pairs_of(case: Mapping[str, int]) -> set[tuple[str, int, str, int]]:
        return {(a, case[a], b, case[b]) for a, b in itertools.combinations(names, 2)}

    def values(case: Mapping[str, int]) -> dict[str, Any]:
        return {name: factors[name][i] for name, i in case.items()}

    missing = {
        (a, i, b, j)
        for a, b in itertools.combinations(names, 2)
        for i in range(len(factors[a]))
        for j in range(len(factors[b]))
    }
    cases = []
    while missing:
        a, i, b, j = min(missing)
        best: dict[str, int] | None = None
        for _ in range(30):
            case = {name: rng.randrange(len(factors[name])) for name in names} | {a: i, b: j}
            if impossible(values(case)):
                continue
            if best is None or len(pairs_of(case) & missing) > len(pairs_of(best) & missing):
                best = case
        if best is None:  # the pair itself is impossible
            missing.discard((a, i, b, j))
            continue
        missing -= pairs_of(best)
        cases.append(values(best))
    return cases


def case_id(case: Mapping[str, Any]) -> str:
    """A readable test id: float32-2x3x5x7-channels_last-..."""

    def text(name: str, value: Any) -> str:
        if isinstance(value, torch.dtype):
            return str(value).removeprefix("torch.")
        if isinstance(value, tuple):
            return "x".join(map(str, value))
        return value if isinstance(value, str) else f"{name}={value}"

    return "-".join(text(name, value) for name, value in case.items() if name != "backend")


def grid(factors: Mapping[str, Sequence[Any]], impossible: Any = lambda case: False) -> list[Any]:
    """`pairwise` as parameters for `pytest.mark.parametrize("case", ...)`; a case's `backend` is marked as needed."""
    return [
        pytest.param(
            case,
            marks=needs_cpp if case.get("backend") == "cpp" else (),
            id="-".join(filter(None, (case.get("backend"), case_id(case)))),
        )
        for case in pairwise(factors, impossible)
    ]


@pytest.fixture(autouse=True)
def _clean_state() -> Iterator[None]:
    """The same random numbers for every test, alone or in the suite; no test may leave a switch behind it."""
    torch.manual_seed(0)
    random.seed(0)
    threads = torch.get_num_threads()
    yield
    assert dispatch.requested() == "auto", "a test left a backend request behind"
    assert torch.is_grad_enabled()
    assert not torch.is_autocast_enabled("cpu")
    assert torch.get_num_threads() == threads


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    """A `with` block in which torch uses `count` threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _junk_fill_flag() -> ctypes.c_bool | None:
    """c10's own switch that fills each CPU allocation with 0x7fedbeef, NaN in float32; the extension's too."""
    pattern = {"linux": "libc10.so", "darwin": "libc10.dylib", "win32": "c10.dll"}.get(sys.platform, "libc10.so")
    try:
        library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / pattern))
        return ctypes.c_bool.in_dll(library, "FLAGS_caffe2_cpu_allocator_do_junk_fill")
    except (OSError, ValueError):
        return None


@pytest.fixture
def poison() -> Iterator[None]:
    """New memory holds NaN or huge values, so that a read before a write, or an element never written, shows.

    torch fills what `torch.empty` and its kin return under use_deterministic_algorithms. The stable ABI's allocations
    go past that (aoti_torch_empty_strided calls the allocator's own function), hence the allocator's junk fill as well.
    """
    before = torch.are_deterministic_algorithms_enabled(), deterministic.fill_uninitialized_memory
    flag = _junk_fill_flag()
    torch.use_deterministic_algorithms(True)
    deterministic.fill_uninitialized_memory = True
    if flag is not None:
        flag.value = True
    yield
    if flag is not None:
        flag.value = False
    torch.use_deterministic_algorithms(before[0])
    deterministic.fill_uninitialized_memory = before[1]


_kept: list[Any] = []  # a torch.library.Library unregisters its ops when it is collected


@pytest.fixture(scope="session")
def torchvision() -> ModuleType:
    """torchvision itself, as the oracle for models.

    The package index has CUDA builds only; beside a CPU torch their extension does not load, and torchvision then
    misses the schemas of `nms` and `qnms`, which nothing here calls.
    """
    if importlib.util.find_spec("torchvision") is None:
        pytest.fail("torchvision is not installed: pip install --no-deps torchvision (see constraints.txt)")
    try:
        return importlib.import_module("torchvision")
    except RuntimeError as error:
        if "nms" not in str(error):
            raise
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        del sys.modules[name]
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        if not hasattr(torch.ops.torchvision, name):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _kept.append(library)
    return importlib.import_module("torchvision")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest group first, so that no process is left alone with it."""
    items.sort(key=lambda item: "triton_backend" not in item.path.parts)
