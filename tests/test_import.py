"""Importing never fails and never changes anything, whatever is missing; what is missing is told."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import needs_cpp

import fused_resnet
from fused_resnet.backends import cpp

ROOT = Path(fused_resnet.__file__).parents[1]

# Importing torch takes seconds: one process does it and forks a child for each piece of code that it is sent.
SERVER = """
import json, os, sys, tempfile
import torch
for line in sys.stdin:
    request = json.loads(line)
    with tempfile.TemporaryFile() as log:
        pid = os.fork()
        if pid == 0:
            os.dup2(log.fileno(), 1), os.dup2(log.fileno(), 2)
            status = 1
            try:
                sys.path[:0] = request["path"]
                exec(compile(request["code"], "<test>", "exec"), {"__name__": "__main__"})
                status = 0
            except BaseException:
                import traceback
                traceback.print_exc()
            finally:
                sys.stdout.flush(), sys.stderr.flush()
                os._exit(status)
        status = os.waitpid(pid, 0)[1]
        log.seek(0)
        print(json.dumps([status, log.read().decode()]), flush=True)
"""

Run = Callable[..., str]


@pytest.fixture(scope="module")
def run() -> Iterator[Run]:
    """run(code, root=...): what the code prints in a fresh process that has imported torch, and nothing of ours."""
    if not hasattr(os, "fork"):
        pytest.skip("needs os.fork")
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
    server = subprocess.Popen(
        [sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env, cwd="/"
    )
    assert server.stdin is not None
    assert server.stdout is not None

    def ask(code: str, root: Path = ROOT) -> str:
        request = {"code": textwrap.dedent(code), "path": [str(root)]}
        server.stdin.write(json.dumps(request) + "\n")
        server.stdin.flush()
        status, output = json.loads(server.stdout.readline())
        assert status == 0, output
        return output

    yield ask
    server.stdin.close()
    server.wait(30)


# Every op, forward and backward, on whatever backend serves it.
WORKS = """
def works():
    import torch, fused_resnet as fr
    x = torch.randn(2, 4, 6, 6, requires_grad=True)
    weight, vector = torch.randn(4, 4, 3, 3), torch.ones(4)
    fr.ops.add_relu(fr.ops.bn_act(x, vector, vector, None, None, x, training=True), x).sum().backward()
    plain = torch.relu(torch.nn.functional.conv2d(x, weight, None, 1, 1) + x)
    with torch.no_grad():
        assert torch.allclose(fr.ops.conv_bias_act(x, weight, None, x, padding=1), plain, atol=1e-5)
        fr.ops.conv_bn_act(x, weight, vector, vector, vector, vector)
        assert fr.BasicBlock(4, 4).eval()(x).shape == x.shape
    str(fr.backend_table())
"""

HIDE = """
import importlib.abc, sys
class Hide(importlib.abc.MetaPathFinder):
    def __init__(self, *names): self.names = names
    def find_spec(self, name, path=None, target=None):
        if name in self.names or name.partition(".")[0] in self.names:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
"""


def test_importing_changes_nothing(run: Run) -> None:
    run("""
        import os, random, signal, sys, threading, warnings
        import torch
        def state():
            return [
                dict(os.environ), random.getstate(), torch.get_rng_state().tolist(), torch.get_num_threads(),
                torch.get_default_dtype(), torch.is_grad_enabled(), torch.are_deterministic_algorithms_enabled(),
                torch.get_float32_matmul_precision(), torch.backends.mkldnn.enabled, list(warnings.filters),
                threading.active_count(), sys.getrecursionlimit(), signal.getsignal(signal.SIGINT), os.getcwd(),
                sys.excepthook, sys.path, list(sys.meta_path),
            ]
        warnings.simplefilter("error")
        before, modules = state(), set(sys.modules)
        import fused_resnet
        assert state() == before, [pair for pair in zip(before, state()) if pair[0] != pair[1]]
        assert not torch.cuda.is_initialized()

        new = {name for name in set(sys.modules) - modules if name.partition(".")[0] != "fused_resnet"}
        heavy = {"triton", "torchvision", "sklearn", "scipy", "matplotlib", "PIL", "tqdm", "onnx", "timm", "tensorrt"}
        assert not heavy & {name.partition(".")[0] for name in new}
        for name in ("torch._dynamo", "torch._inductor", "torch.utils.cpp_extension", "torch.onnx", "torch.hub"):
            assert name not in new, name
        assert len(new) < 12, sorted(new)  # a few of the standard library's
        # Not even the extension: it is loaded by the first call that wants it.
        assert "fused_resnet._C" not in sys.modules
    """)


def test_public_names(run: Run) -> None:
    run("""
        import fused_resnet
        for name in fused_resnet.__all__:
            assert getattr(fused_resnet, name) is not None
        assert fused_resnet.__version__.count(".") >= 2
        from fused_resnet import *
        # No public name hides a submodule, but the ops.
        import pkgutil
        submodules = {module.name for module in pkgutil.iter_modules(fused_resnet.__path__)}
        assert submodules & set(fused_resnet.__all__) <= {"ops"}
    """)


def test_fork_after_import(run: Run) -> None:
    """What a data loader with workers does."""
    run(
        WORKS
        + """
import os
import fused_resnet
pid = os.fork()
if pid == 0:
    status = 1
    try:
        works()
        status = 0
    finally:
        os._exit(status)
assert os.waitpid(pid, 0)[1] == 0
works()
"""
    )


def test_reload(run: Run) -> None:
    """As a notebook's autoreload does: module by module, and the whole package anew."""
    run(
        WORKS
        + """
import importlib, sys, torch
works()
import fused_resnet.ops.schemas, fused_resnet.backends.cpp
x = torch.tensor([-1.0, 2.0], requires_grad=True)
for _ in range(2):
    for name in ("fused_resnet.ops.schemas", "fused_resnet.backends.cpp", "fused_resnet.backends.library"):
        importlib.reload(sys.modules[name])
        works()
    x.grad = None
    torch.ops.fused_resnet.add_relu(x, x, "auto").sum().backward()
    assert x.grad.tolist() == [0, 2]
"""
    )


def test_without_the_extension(run: Run) -> None:
    """Falls back with one warning that says why; an explicit request is refused."""
    run(
        WORKS
        + HIDE
        + """
import warnings
sys.meta_path.insert(0, Hide("fused_resnet._C"))
import fused_resnet as fr
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    works()
ours = [str(w.message) for w in caught if "fused_resnet" in str(w.message)]
assert len(ours) == 1, ours
assert "'cpp' backend is not available (the extension was not built" in ours[0], ours
assert "fused-resnet info" in ours[0]
import torch
try:
    with fr.use_backend("cpp"):
        fr.ops.add_relu(torch.ones(2), torch.ones(2))
except fr.BackendUnavailableError as error:
    assert "the extension was not built" in str(error)
else:
    raise AssertionError
row = next(row for row in fr.backend_table() if row.op == "add_relu" and row.backend == "cpp")
assert not row.live and "not built" in row.note
"""
    )


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    """A copy of the package without the extension."""
    shutil.copytree(
        ROOT / "fused_resnet", tmp_path / "fused_resnet", ignore=shutil.ignore_patterns("*.so", "__pycache__")
    )
    return tmp_path


def test_with_a_broken_extension(run: Run, copied: Path) -> None:
    """A file that is no library: the reason is the loader's own sentence."""
    (copied / "fused_resnet" / "_C.abi3.so").write_bytes(b"not a library" * 100)
    code = """
import warnings; warnings.simplefilter("ignore")
import fused_resnet as fr
from fused_resnet.backends import cpp
assert fr.__file__.startswith({root!r}), fr.__file__
works()
reason = cpp.unavailable("cpu")
assert reason.startswith("the extension does not load: "), reason
assert "_C.abi3.so" in reason, reason
"""
    run(WORKS + code.format(root=str(copied)), copied)


@needs_cpp
def test_with_an_extension_that_lacks_an_op(run: Run, copied: Path) -> None:
    """An older build beside newer Python: the schemas are there, the implementation is not. No crash."""
    code = """
import torch, fused_resnet as fr
from fused_resnet.backends import cpp
fr.ops.add_relu(torch.ones(2), torch.ones(2))
cpp._library.define("brand_new(Tensor x) -> Tensor")
try:
    torch.ops.fused_resnet_cpp.brand_new(torch.ones(2))
except NotImplementedError as error:
    assert "brand_new" in str(error)
else:
    raise AssertionError
"""
    run(code)


def test_build_info(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What the build recorded, and clear words where it recorded nothing or nonsense."""
    package = tmp_path / "fused_resnet"
    monkeypatch.setattr(cpp, "__file__", str(package / "backends" / "cpp.py"))
    package.mkdir()
    assert cpp.build_info()["built"] is False
    assert "never installed" in cpp.build_info()["reason"]
    (package / "_build_info.json").write_text('{"built": false, "reason": "no compiler: c++ not found"}')
    assert cpp.build_info()["reason"] == "no compiler: c++ not found"
    (package / "_build_info.json").write_text("{")
    assert "cannot be read" in cpp.build_info()["reason"]


def test_without_onednn(run: Run) -> None:
    """As on a torch built without it: neither the flags nor the ops exist."""
    run(
        WORKS
        + """
import torch
class Missing:
    def __getattr__(self, name):
        raise AttributeError(f"'_OpNamespace' 'mkldnn' object has no attribute {name!r}")
torch.ops.__dict__["mkldnn"] = Missing()
torch.backends.mkldnn.is_available = lambda: False
import fused_resnet as fr
works()
try:
    with fr.use_backend("library"):
        fr.ops.conv_bias_act(torch.randn(1, 1, 3, 3), torch.randn(1, 1, 3, 3))
except fr.BackendUnavailableError as error:
    assert "built without oneDNN" in str(error)
else:
    raise AssertionError
"""
    )


@pytest.mark.parametrize(
    ("platform", "system", "machine"), [("darwin", "Darwin", "arm64"), ("win32", "Windows", "AMD64")]
)
def test_other_platforms(run: Run, platform: str, system: str, machine: str) -> None:
    """As on macOS (no oneDNN, no extension) and on Windows (no extension)."""
    code = """
import platform, torch, warnings
sys.meta_path.insert(0, Hide("fused_resnet._C", "triton"))
sys.platform = {platform!r}
platform.system, platform.machine = (lambda: {system!r}), (lambda: {machine!r})
if sys.platform == "darwin":
    torch.backends.mkldnn.is_available = lambda: False
warnings.simplefilter("ignore")
works()
"""
    run(WORKS + HIDE + code.format(platform=platform, system=system, machine=machine))


def test_without_triton(run: Run) -> None:
    run(
        WORKS
        + HIDE
        + """
import importlib.metadata
original = importlib.metadata.version
def version(name):
    if name == "triton":
        raise importlib.metadata.PackageNotFoundError(name)
    return original(name)
importlib.metadata.version = version
sys.meta_path.insert(0, Hide("triton"))
works()
import torch, fused_resnet as fr
from fused_resnet import dispatch
if "triton" in dispatch.BACKENDS:
    try:
        with fr.use_backend("triton"):
            fr.ops.add_relu(torch.ones(2), torch.ones(2))
    except fr.BackendUnavailableError as error:
        assert "triton is not installed" in str(error)
    else:
        raise AssertionError
"""
    )


def test_without_optional_packages(run: Run) -> None:
    """Only torch is needed for models and ops."""
    names = ("torchvision", "sklearn", "matplotlib", "PIL", "tqdm", "numpy.testing", "timm", "onnx", "tensorboard")
    run(WORKS + HIDE + f"sys.meta_path.insert(0, Hide{names!r})\nworks()\n")


def test_help_of_the_module_runs(run: Run) -> None:
    """`python -m fused_resnet` exists and loads nothing heavy for its help."""
    run("""
        import runpy, sys
        sys.argv = ["fused-resnet", "--help"]
        try:
            runpy.run_module("fused_resnet", run_name="__main__")
        except SystemExit as end:
            assert end.code in (0, None), end.code
        assert not {"torchvision", "sklearn", "matplotlib", "triton"} & set(sys.modules)
    """)
