"""The wheel with the CUDA kernels for every architecture: what is in it, and that it loads beside a CPU build of torch.

Run by `make cuda-check`, which makes the wheel first and runs test_abi.py with it, under other versions of torch.
"""

from __future__ import annotations

import json
import os
import re
import runpy
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests" / "cuda_backend"))

import builds  # noqa: E402
import cubins  # noqa: E402

COMMANDS = runpy.run_path(str(ROOT / "csrc" / "build_commands.py"))
LISTED = os.environ.get("TORCH_CUDA_ARCH_LIST") or COMMANDS["ARCHITECTURES"]
NAMES = LISTED.split()
# By source: where its code is, what is found in each kernel's name, and the instructions that make it what it is:
# products of tensor cores, and copies to shared memory that bypass registers.
CONVS = {
    "conv_sm80": ("sm_80", "conv_kernel", ("HMMA.16816.F32", "LDGSTS.E", "LDSM.16.M88.4", "STG.E.128")),
    "conv_sm90": ("sm_90a", "cutlass.*device_kernel", ("HGMMA.64x", "UTMALDG.4D.IM2COL", "UTMASTG.4D.IM2COL")),
}
CONVS = {source: CONVS[source] for source in COMMANDS["cutlass_sources"](LISTED)}
CONV_KERNEL = re.compile("conv_kernel|device_kernel")
MOST_SECONDS, MOST_MEBIBYTES = 20 * 60, 6 * 1024  # of one core for all of CUTLASS's files; of memory for each
# Loaded from the unpacked wheel: the kernels are registered, and cannot run, for a reason that says what is missing.
PROBE = """
import json, fused_resnet, torch
from fused_resnet.backends import cpp
has = lambda op: torch._C._dispatch_has_kernel_for_dispatch_key(f"fused_resnet_cpp::{op}", "CUDA")
report = {"cpu": cpp.unavailable("cpu"), "cuda": cpp.unavailable("cuda"), "folder": fused_resnet.__path__[0]}
report["registered"] = [op for op in ("bn_act_backward", "second_moments", "conv_bias_act", "conv_bn_act") if has(op)]
report["cutlass"] = cpp.cutlass_unavailable()
try:
    torch.ops.fused_resnet_cpp.cuda_check()
except RuntimeError as error:
    report["check"] = str(error)
print(json.dumps(report))
"""


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The unpacked wheel."""
    (wheel,) = (ROOT / "dist").glob("*.whl")
    folder = tmp_path_factory.mktemp("wheel")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


@pytest.fixture(scope="module")
def library(package: Path) -> Path:
    return package / "fused_resnet" / "_C.abi3.so"


def test_code_for_every_architecture(library: Path) -> None:
    found = cubins.kernels(library)
    assert set(found) == {f"sm_{name.partition('+')[0].replace('.', '')}" for name in NAMES}
    names = {
        frozenset(kernel.name for kernel in kernels if not CONV_KERNEL.search(kernel.name))
        for kernels in found.values()
    }
    assert len(names) == 1, "a kernel is missing for an architecture"
    print(
        f"\n{len(next(iter(names)))} kernels for {len(found)} architectures, {library.stat().st_size / 2**20:.1f} MiB"
    )
    convs = {
        architecture: sum(bool(CONV_KERNEL.search(kernel.name)) for kernel in kernels)
        for architecture, kernels in found.items()
    }
    assert convs == dict.fromkeys(found, 0) | {architecture: 4 for architecture, _, _ in CONVS.values()}
    listing = subprocess.check_output([str(cubins.tool("cuobjdump")), "--list-ptx", str(library)], text=True)
    wanted = {f"sm_{name.removesuffix('+PTX').replace('.', '')}" for name in NAMES if name.endswith("+PTX")}
    assert set(re.findall(r"\.(sm_\w+)\.ptx", listing)) == wanted


def test_no_stack_and_no_spills(library: Path) -> None:
    assert not cubins.faults(library)


@pytest.mark.parametrize("architecture", ["sm_" + name.partition("+")[0].replace(".", "") for name in NAMES])
def test_accesses_of_16_bytes(library: Path, architecture: str) -> None:
    """Channels in 16 bits come and go by eights. (Kernels for single elements carry another number in their names.)"""
    for kernel in ("apply_kernel", "backward_reduce_kernel", "backward_apply_kernel", "statistics_kernel"):
        found = cubins.instructions(library, rf"{kernel}.*(?:Li8ELb|fLi4ELb)", architecture)
        assert any(i.startswith("LDG.E.128") for i in found), kernel
        assert not any(i.startswith("LDG.E.U16") for i in found), kernel


@pytest.mark.parametrize("source", CONVS)
def test_instructions_of_the_convolutions(library: Path, source: str) -> None:
    architecture, kernel, wanted = CONVS[source]
    found = cubins.instructions(library, kernel, architecture)
    for instruction in wanted:
        assert any(i.startswith(instruction) for i in found), instruction
    products = {i for i in found if re.match("HG?MMA", i)}
    assert {"BF16" in i for i in products} == {True, False}
    assert all(".F32" in i for i in products), "sums in float32"


def test_what_compiling_cutlass_took() -> None:
    """Each file once, one after another."""
    folder = ROOT / "build" / "objects" / "csrc" / "cuda"
    costs = {source: json.loads((folder / f"{source}.json").read_text()) for source in (*CONVS, "conv")}
    for source, cost in costs.items():
        print(f"\n{source}: {cost['seconds']:.0f} s, {cost['mebibytes'] / 1024:.1f} GiB", end="")
        assert len([flag for flag in cost["command"] if flag.startswith("-gencode")]) == 1
    assert sum(cost["seconds"] for cost in costs.values()) < MOST_SECONDS
    assert max(cost["mebibytes"] for cost in costs.values()) < MOST_MEBIBYTES


def test_it_loads_beside_this_torch(package: Path) -> None:
    command = [sys.executable, "-c", PROBE]
    output = subprocess.check_output(command, text=True, cwd=package, env=os.environ | {"PYTHONPATH": str(package)})
    report = json.loads(output.splitlines()[-1])
    assert Path(report["folder"]) == package / "fused_resnet"
    assert report["cpu"] is None
    assert len(report["registered"]) == 4
    assert report["cutlass"] is None
    if report["cuda"] is not None:  # no GPU here
        assert report["cuda"] == "no GPU is available" or "cannot run" in report["cuda"]
        assert re.search(r"driver is too old|no kernel can be loaded", report["check"])


def test_no_access_outside_a_tensor() -> None:
    """The emulated kernels under the address sanitizer: each of torch's allocations has guarded edges then."""
    tests = str(builds.HERE / "emulated_kernels.py")
    done = builds.run_emulated(tests, "-k", "(any_grid and 7) or second_moments or conv_b", sanitizer="address")
    assert done.returncode == 0, done.stdout[-10000:] + done.stderr[-10000:]
    assert " passed" in done.stdout
