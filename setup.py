"""Builds the extension `fused_resnet._C` where it can; where it cannot, a pure Python package and the reason.

FUSED_RESNET_NO_EXT=1       builds no extension
FUSED_RESNET_REQUIRE_EXT=1  makes the whole build fail where the extension cannot be built

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
from build_commands import BdistWheel, BuildExt, cpp_extension  # noqa: E402

SOURCES = sorted(glob("csrc/*.cpp", root_dir=ROOT) + glob("csrc/cpu/*.cpp", root_dir=ROOT))
HEADERS = glob("csrc/**/*.h", root_dir=ROOT, recursive=True)
FLAGS = ["-O3", "-g0", "-std=c++17", "-fvisibility=hidden", "-ffp-contract=off"]
# The oldest torch (2.11) and the oldest Python (3.10) that can load the result.
FLAGS += ["-DTORCH_TARGET_VERSION=0x020b000000000000", "-DPy_LIMITED_API=0x030A0000"]
os.environ["PATH"] += os.pathsep + sysconfig.get_path("scripts")  # where the environment's ninja is, activated or not

make_extension = cpp_extension.CppExtension if cpp_extension else Extension
setup(
    packages=[*find_packages(include=["fused_resnet", "fused_resnet.*"]), "fused_resnet.benchmarks"],
    package_dir={"fused_resnet.benchmarks": "benchmarks"},
    ext_modules=[
        make_extension(
            "fused_resnet._C",
            SOURCES,
            include_dirs=[str(ROOT / "csrc")],
            depends=HEADERS,
            extra_compile_args=FLAGS,
            py_limited_api=True,
        )
    ],
    cmdclass={"build_ext": BuildExt, "bdist_wheel": BdistWheel},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
