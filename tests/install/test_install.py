"""`pip install .` in fresh environments: it never fails for want of a compiler or of torch, and says what it built.

Run by `make test-install`. torch, where a scenario wants it, is linked from this environment; one scenario installs it.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import pytest
from environments import ROOT, Environment, assert_built, assert_pure, copy_checkout, link_packages, path_without

ISOLATION = pytest.mark.parametrize("flags", [(), ("--no-build-isolation",)], ids=["isolated", "not isolated"])
TORCH = f"torch=={version('torch').partition('+')[0]}"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copy_checkout(tmp_path_factory.mktemp("source"))


@pytest.fixture
def broken_source(tmp_path: Path) -> Path:
    tree = copy_checkout(tmp_path / "broken")
    break_source(tree)
    return tree


@pytest.fixture
def environment(tmp_path: Path) -> Iterator[Environment]:
    yield Environment(tmp_path / "venv")
    print()


def break_source(tree: Path) -> None:
    with (tree / "csrc/cpu/add_relu.cpp").open("a") as file:
        file.write("\nint broken = no_such_name;\n")


def wheel_tag(environment: Environment) -> str:
    (record,) = environment.site_packages.glob("fused_resnet-*.dist-info/WHEEL")
    return next(line for line in record.read_text().splitlines() if line.startswith("Tag")).partition(": ")[2]


@ISOLATION
def test_torch_is_there(environment: Environment, source: Path, flags: tuple[str, ...]) -> None:
    environment.link("torch", "tqdm", "setuptools")
    environment.pip_install(*flags, ".", cwd=source, **({"PIP_NO_INDEX": "1"} if flags else {}))
    assert_built(environment.probe())
    assert wheel_tag(environment).startswith("cp310-abi3-")
    assert "fused_resnet/benchmarks" in environment.run("-c", "import fused_resnet.benchmarks as b; print(b.__file__)")
    assert not list((environment.site_packages / "fused_resnet").rglob("results")), "results/ is in the wheel"


def test_torch_is_installed_first(environment: Environment, source: Path) -> None:
    environment.pip_install(TORCH)
    environment.pip_install(".", cwd=source)
    report = environment.probe()
    assert_built(report)
    assert report["torch"].partition("+")[0] == TORCH.partition("==")[2]


def test_without_ninja(environment: Environment, source: Path, tmp_path: Path) -> None:
    environment.link("torch", "tqdm", "setuptools")
    environment.pip_install(
        "--no-build-isolation",
        ".",
        cwd=source,
        PATH=path_without(tmp_path / "bin", "ninja"),
        FUSED_RESNET_REQUIRE_EXT="1",
    )
    assert_built(environment.probe())


@ISOLATION
def test_torch_is_not_there_yet(environment: Environment, source: Path, flags: tuple[str, ...]) -> None:
    environment.link("setuptools")
    environment.pip_install(*flags, "--no-deps", ".", cwd=source)  # --no-deps: the newest torch is not for this test
    assert wheel_tag(environment) == "py3-none-any"
    environment.link("torch", "tqdm")
    assert_pure(environment.probe(), "torch could not be imported when this was built: No module named 'torch'")
    environment.pip_install(*flags, "--no-deps", "--force-reinstall", ".", cwd=source)
    assert_built(environment.probe())


def test_torch_in_the_system_site_packages(source: Path, tmp_path: Path) -> None:
    """A virtual environment that sees a torch outside itself, as over a Python that has one."""
    user_base = {"PYTHONUSERBASE": str(tmp_path / "base")}
    environment = Environment(tmp_path / "venv", user_base, ("--system-site-packages",))
    outside = Path(environment.run("-c", "import site; print(site.getusersitepackages())").strip())
    outside.mkdir(parents=True)
    link_packages(outside, "torch", "tqdm")
    environment.pip_install(".", cwd=source)
    assert_built(environment.probe())


@ISOLATION
def test_no_compiler(environment: Environment, source: Path, tmp_path: Path, flags: tuple[str, ...]) -> None:
    environment.link("torch", "tqdm", "setuptools")
    path = path_without(tmp_path / "bin", "c++", "g++", "gcc", "cc")
    environment.pip_install(*flags, ".", cwd=source, PATH=path)
    assert wheel_tag(environment) == "py3-none-any"
    assert_pure(environment.probe(), "c++")


@ISOLATION
def test_compile_error(environment: Environment, broken_source: Path, flags: tuple[str, ...]) -> None:
    environment.link("torch", "tqdm", "setuptools")
    environment.pip_install(*flags, ".", cwd=broken_source)
    assert wheel_tag(environment) == "py3-none-any"
    report = environment.probe()
    assert_pure(report, "no_such_name")
    assert str(broken_source) not in report["info"]["reason"]


def test_switches(environment: Environment, broken_source: Path) -> None:
    environment.link("torch", "tqdm", "setuptools")
    environment.pip_install("--no-build-isolation", ".", cwd=broken_source, FUSED_RESNET_NO_EXT="1")
    assert_pure(environment.probe(), "FUSED_RESNET_NO_EXT was set")
    output = environment.pip_install(
        "--no-build-isolation", ".", cwd=broken_source, succeeds=False, FUSED_RESNET_REQUIRE_EXT="1"
    )
    assert "FUSED_RESNET_REQUIRE_EXT is set" in output
    assert "no_such_name" in output


def test_nothing_of_an_earlier_build_is_in_the_wheel(environment: Environment, tmp_path: Path) -> None:
    tree = copy_checkout(tmp_path / "source")
    environment.link("torch", "tqdm", "setuptools")
    environment.pip_install("--no-build-isolation", ".", cwd=tree)
    assert_built(environment.probe())
    break_source(tree)
    environment.pip_install("--no-build-isolation", "--force-reinstall", "--no-deps", ".", cwd=tree)
    assert_pure(environment.probe(), "no_such_name")


def test_editable(environment: Environment, tmp_path: Path) -> None:
    tree = copy_checkout(tmp_path / "source")
    environment.link("torch", "tqdm", "setuptools")
    environment.pip_install("--no-build-isolation", "--editable", ".", cwd=tree)
    report = environment.probe()
    assert_built(report)
    assert report["package"] == str(tree / "fused_resnet")
    for cwd in (tree, environment.folder):
        found = environment.run("-c", "import fused_resnet.benchmarks as b; print(b.__file__)", cwd=cwd)
        assert found.strip() == str(tree / "benchmarks/__init__.py")
    # An extension that can no longer be built does not survive as the current one.
    good = (tree / "csrc/cpu/add_relu.cpp").read_text()
    break_source(tree)
    environment.pip_install("--no-build-isolation", "--no-deps", "--editable", ".", cwd=tree)
    assert_pure(environment.probe(), "no_such_name")
    (tree / "csrc/cpu/add_relu.cpp").write_text(good)
    environment.pip_install("--no-deps", "--editable", ".", cwd=tree)
    assert_built(environment.probe())


def test_source_distribution(environment: Environment, source: Path, tmp_path: Path) -> None:
    environment.link("torch", "tqdm", "setuptools")
    make_sdist = "import setuptools.build_meta as backend, sys; print(backend.build_sdist(sys.argv[1]))"
    name = environment.run("-c", make_sdist, str(tmp_path), cwd=source).splitlines()[-1]
    environment.pip_install(str(tmp_path / name))
    assert_built(environment.probe())


def test_a_torch_that_says_cuda(environment: Environment, source: Path) -> None:
    """A simulation: CPU binaries whose torch.version.cuda is set. test_abi.py builds against a real CUDA torch."""
    environment.link("torch", "tqdm", "setuptools")
    torch = environment.site_packages / "torch"
    real = torch.resolve()
    torch.unlink()
    torch.mkdir()
    for entry in real.iterdir():
        if entry.name not in ("version.py", "__pycache__"):
            (torch / entry.name).symlink_to(entry)
    text = (real / "version.py").read_text()
    (torch / "version.py").write_text(text + "\ncuda = '13.0'\n")
    environment.pip_install(".", cwd=source)
    assert environment.run("-c", "import torch; print(torch.version.cuda)").strip() == "13.0"
    assert_built(environment.probe())
    needed = subprocess.check_output(
        ["readelf", "-d", str(environment.site_packages / "fused_resnet/_C.abi3.so")], text=True
    )
    assert "cuda" not in needed


def test_setup_needs_no_network_and_no_gpu() -> None:
    text = (ROOT / "setup.py").read_text() + (ROOT / "csrc/build_commands.py").read_text()
    assert not any(word in text for word in ("nvidia-smi", "urllib", "requests", "socket", "http"))
