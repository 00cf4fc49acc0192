"""One wheel for every torch and Python: made with one torch, used under others, on a machine with no compiler.

Run by `make test-abi`, which makes the wheel first. Each torch is installed with all that it requires, several GB, and
removed at the end. TORCH_VERSIONS="2.11.0 2.14.1" names them; 2.11.0:/path/to/python3.12 asks for another Python.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from environments import ROOT, Environment, assert_built, copy_checkout, path_without

VERSIONS = os.environ.get("TORCH_VERSIONS", "2.11.0 2.14.1").split()
# Outputs, gradients and running statistics of each op, csrc against plain torch, in both layouts.
COMPARE = """
import fused_resnet, torch
from fused_resnet import ops, use_backend
def run(backend, layout, dtype, training):
    g = torch.Generator().manual_seed(0)
    make = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)
    x, residual = (make(3, 16, 7, 9).contiguous(memory_format=layout).requires_grad_() for _ in range(2))
    gamma, beta = (make(16).requires_grad_() for _ in range(2))
    mean, var = make(16), make(16).abs() + 0.5
    with use_backend(backend):
        out = ops.bn_act(x, gamma, beta, mean, var, residual, training=training)
        out = out + ops.add_relu(out, residual)
        out.backward(make(3, 16, 7, 9))
    return [t.detach() for t in (out, x.grad, residual.grad, gamma.grad, beta.grad, mean, var)]
for layout in (torch.contiguous_format, torch.channels_last):
    for dtype in (torch.float32, torch.float64):
        for training in (True, False):
            for ours, theirs in zip(run("cpp", layout, dtype, training), run("reference", layout, dtype, training)):
                torch.testing.assert_close(ours, theirs)
print("agrees")
"""


@pytest.fixture(scope="module")
def wheel() -> Path:
    (found,) = (ROOT / "dist").glob("*.whl")
    return found


@pytest.fixture(scope="module", params=VERSIONS)
def environment(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Environment]:
    version, _, interpreter = request.param.partition(":")
    environment = Environment(tmp_path_factory.mktemp("torch") / "venv", interpreter=interpreter or sys.executable)
    environment.pip_install("--no-cache-dir", f"torch=={version}", "tqdm")
    yield environment
    shutil.rmtree(environment.folder)
    print()


def test_the_wheel_is_the_only_one_that_is_needed(wheel: Path) -> None:
    assert re.fullmatch(r"fused_resnet-[\d.]+-cp310-abi3-\w+\.whl", wheel.name)
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert [name for name in names if name.endswith(".so")] == ["fused_resnet/_C.abi3.so"]
    assert {name.partition("/")[0] for name in names if ".dist-info/" not in name} == {"fused_resnet"}
    listing = ["git", "-C", str(ROOT), "ls-files", "fused_resnet", "benchmarks/*.py"]
    tracked = subprocess.check_output(listing, text=True).split()
    assert not {re.sub("^benchmarks", "fused_resnet/benchmarks", name) for name in tracked} - set(names)


def test_the_library_needs_no_symbol_outside_the_stable_abi(wheel: Path, tmp_path: Path) -> None:
    """Only C symbols of torch, which are its stable ABI; no libtorch_python and no library of CUDA."""
    with zipfile.ZipFile(wheel) as archive:
        library = archive.extract("fused_resnet/_C.abi3.so", tmp_path)
    symbols = subprocess.check_output(["nm", "-D", "--undefined-only", "--demangle", library], text=True)
    assert not re.findall(r" (?:at|c10|torch)::.*", symbols)
    needed = re.findall(r"NEEDED.*\[(.*)\]", subprocess.check_output(["readelf", "-d", library], text=True))
    assert not [name for name in needed if re.search("python|cuda|cublas|cudnn", name)], needed


def test_the_wheel_under_another_torch(environment: Environment, wheel: Path, tmp_path: Path) -> None:
    path = path_without(tmp_path / "bin", "c++", "g++", "gcc", "cc", "as", "ld", "ninja")
    environment.pip_install("--no-deps", "--force-reinstall", str(wheel), PATH=path)
    report = environment.probe()
    assert_built(report)
    assert report["torch"].partition("+")[0] != report["info"]["torch"].partition("+")[0]
    assert environment.run("-c", COMPARE, PATH=path).splitlines()[-1] == "agrees"


def test_it_builds_against_that_torch(environment: Environment, tmp_path: Path) -> None:
    """Built by `pip install .`, as a user of that torch would. Where the index serves CUDA builds, it is one."""
    # A CUDA build of torch gets CUDA kernels where there is an nvcc for it: one architecture is enough here.
    source = copy_checkout(tmp_path / "source")
    environment.pip_install("--no-deps", "--force-reinstall", ".", cwd=source, TORCH_CUDA_ARCH_LIST="8.0")
    report = environment.probe()
    assert_built(report)
    assert report["info"]["torch"] == report["torch"]
    assert environment.run("-c", COMPARE).splitlines()[-1] == "agrees"
