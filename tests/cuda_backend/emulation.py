"""A pytest plugin: the tests of the `cpp` backend run the CUDA kernels, emulated on the CPU (see emulated.h).

PYTHONPATH=tests/cuda_backend python -m pytest -p emulation tests/test_bn_act.py
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

import builds
import pytest
import torch

from fused_resnet.backends import cpp, cutlass
from fused_resnet.dispatch import BackendUnavailableError

_library = torch.library.Library("fused_resnet_emulated", "FRAGMENT")
for _schema in cpp._SCHEMAS:
    _library.define(_schema)


class _Ops:
    """The emulated kernels, and those of the CPU that have no counterpart; convolutions are another backend's."""

    def __getattr__(self, name: str) -> object:
        if not name.startswith("conv_") and torch._C._dispatch_has_kernel_for_dispatch_key(
            f"fused_resnet_emulated::{name}", "CPU"
        ):
            return getattr(torch.ops.fused_resnet_emulated, name)
        return getattr(torch.ops.fused_resnet_cpp, name)


def pytest_configure() -> None:
    torch.ops.load_library(str(builds.emulated()))
    cpp._ops = _Ops()
    cutlass._ops = torch.ops.fused_resnet_emulated
    cpp._DTYPES["cpu"] = cpp._DTYPES["cuda"]
    cpp.ONLY_ON.clear()
    conftest = sys.modules["conftest"]
    conftest.FLOATS = cpp._DTYPES["cuda"]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """What asks for the `cpp` backend, and what was written for the kernels."""

    def wanted(item: pytest.Item) -> bool:
        values = item.callspec.params if hasattr(item, "callspec") else {}
        return item.path.parent == builds.HERE or "cpp" in (
            values.get("backend"),
            values.get("case", {}).get("backend"),
        )

    config.hook.pytest_deselected(items=[item for item in items if not wanted(item)])
    items[:] = [item for item in items if wanted(item)]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    try:
        return (yield)
    except BackendUnavailableError as error:
        if str(error).endswith("no kernels for torch.float64"):
            pytest.skip("the CUDA kernels have no float64")
        raise
