"""Builds the extension `fused_resnet._C` where it can; where it cannot, a pure Python package and the reason.

FUSED_RESNET_NO_EXT=1       builds no extension
FUSED_RESNET_REQUIRE_EXT=1  makes the whole build fail where the extension cannot be built
FUSED_RESNET_CUDA=auto|0|1  the CUDA kernels: where torch is a CUDA build and nvcc is of its major version (auto),
                            never, or with any nvcc; 1 makes the whole build fail where they cannot be built
FUSED_RESNET_CUTLASS=0|1    beside the CUDA kernels convolutions from CUTLASS, for sm_80 to sm_89 and sm_90a: with 1
                            alone, which makes the whole build fail where they cannot be built. The headers are those
                            of the package nvidia-cutlass, or of CUTLASS_PATH; it takes two minutes and 4 GB of memory
TORCH_CUDA_ARCH_LIST        for which GPUs, as in "9.0a 12.0+PTX"
MAX_JOBS                    files that are compiled at the same time

The metadata stands in pyproject.toml. What happened is recorded in `fused_resnet/_build_info.json`.
"""

import os
import sys
import sysconfig
from glob import glob
from pathlib import Path

from setuptools import Extension, find_packages, setup

ROOT = Path(__file__).parent.resolve()
sys.path.insert(0, str(ROOT / "csrc"))
from build_commands import NVCC_FLAGS, BdistWheel, BuildExt, cpp_extension  # noqa: E402

SOURCES = sorted(glob("csrc/*.cpp", root_dir=ROOT) + glob("csrc/cpu/*.cpp", root_dir=ROOT))
HEADERS = glob("csrc/**/*.h", root_dir=ROOT, recursive=True)
# The oldest torch (2.11) and the oldest Python (3.10) that can load the result.
TARGETS = ["-DTORCH_TARGET_VERSION=0x020b000000000000", "-DPy_LIMITED_API=0x030A0000"]
FLAGS = ["-O3", "-g0", "-std=c++17", "-fvisibility=hidden", "-ffp-contract=off", *TARGETS]
os.environ["PATH"] += os.pathsep + sysconfig.get_path("scripts")  # where the environment's ninja is, activated or not

make_extension = cpp_extension.CppExtension if cpp_extension else Extension
setup(
    packages=[*find_packages(include=["fused_resnet", "fused_resnet.*"]), "fused_resnet.benchmarks"],
    package_dir={"fused_resnet.benchmarks": "benchmarks"},
    ext_modules=[
        make_extension(
            "fused_resnet._C",
            SOURCES,
            depends=HEADERS,
            extra_compile_args={"cxx": FLAGS, "nvcc": [*NVCC_FLAGS, *TARGETS]},
            py_limited_api=True,
        )
    ],
    cmdclass={"build_ext": BuildExt, "bdist_wheel": BdistWheel},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
