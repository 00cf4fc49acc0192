"""The command line: what it prints and writes, its exit codes, and one sentence for whatever a user can get wrong."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import fused_resnet
from fused_resnet import cli, dispatch, emulation, use_plan
from fused_resnet.backends import cpp, library
from fused_resnet.blocks import training_plans

bench, harness, photographs, plain, rivals = map(
    cli.load_benchmarks, ("bench_resnet", "harness", "photographs", "plain_resnet", "rivals")
)
TINY = ["--model", "tiny", "--size", "32"]


@pytest.fixture(autouse=True, scope="module")
def tiny() -> Iterator[None]:
    """A net of four basic blocks, by the name "tiny"."""
    with pytest.MonkeyPatch.context() as patch:
        build = lambda: fused_resnet.ResNet(fused_resnet.BasicBlock, (1, 1, 1, 1))  # noqa: E731
        patch.setattr(fused_resnet, "tiny", build, raising=False)
        patch.setitem(plain.FAMILY, "tiny", (plain.PlainBasicBlock, (1, 1, 1, 1)))
        patch.setattr(cli, "MODELS", (*cli.MODELS, "tiny"))
        yield


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """One warm-up and two timed rounds, whatever is asked for."""
    measure = harness.measure
    monkeypatch.setattr(harness, "measure", lambda steps, rounds, warmup, *rest: measure(steps, 2, 1, *rest))


class Result:
    """Exit code and output of one command, run in this process."""

    def __init__(self, capsys: pytest.CaptureFixture[str], *argv: str) -> None:
        capsys.readouterr()
        try:
            self.code: Any = cli.main(list(map(str, argv)))
        except SystemExit as exit:
            self.code = exit.code
        self.out, err = capsys.readouterr()
        # Progress bars return to the start of the line; what remains is what the user reads.
        self.err = [shown for line in err.split("\n") if (shown := line.rpartition("\r")[2].strip())]


def assert_refused(result: Result, *words: str) -> None:
    assert result.code == 2, (result.out, result.err)
    assert len(result.err) == 1, result.err
    assert "Traceback" not in result.err[0]
    assert "error: " in result.err[0]
    for word in words:
        assert word in result.err[0]


# info


def test_info(capsys: pytest.CaptureFixture[str]) -> None:
    result = Result(capsys, "info")
    assert result.code == 0
    assert not result.err
    for word in (fused_resnet.__version__, torch.__version__, "threads", "extension", "bn_act", "live"):
        assert word in result.out


@pytest.mark.parametrize("native", [True, False])
def test_info_says_what_is_computed_in_float32(native: bool, capsys, monkeypatch) -> None:
    monkeypatch.setattr(emulation, "_has_instructions", lambda dtype: native or dtype == torch.float16)
    lines = [line.strip() for line in Result(capsys, "info").out.splitlines()]
    said = [line for line in lines if line.endswith("its convolutions are computed in float32")]
    assert said == ([] if native else ["no instructions for bfloat16: its convolutions are computed in float32"])


def test_info_json(capsys: pytest.CaptureFixture[str]) -> None:
    found = json.loads(Result(capsys, "info", "--json").out)
    assert found["versions"]["torch"] == torch.__version__
    assert found["cpu"]["threads"] == torch.get_num_threads()
    assert found["extension"]["loaded"] == (cpp.unavailable("cpu") is None)
    assert found["extension"]["build"] == cpp.build_info()
    assert found["backends"] == [row._asdict() for row in dispatch.backend_table()]
    assert len(found["gpus"]) == torch.cuda.device_count()


@pytest.mark.skipif(cpp.unavailable("cpu") is not None, reason="the extension was not built")
@pytest.mark.parametrize(
    ("build", "line"),
    [
        ({"cutlass": "4.2.0, for 8.0 9.0a"}, "CUTLASS 4.2.0, for 8.0 9.0a"),
        ({"no_cutlass": "FUSED_RESNET_CUTLASS=1 was not set"}, "CUTLASS not built: FUSED_RESNET_CUTLASS=1 was not set"),
    ],
)
def test_info_says_whether_there_are_convolutions_from_cutlass(build, line, capsys, monkeypatch) -> None:
    monkeypatch.setattr(cpp, "build_info", lambda: {"built": True} | build)
    assert line in map(str.strip, Result(capsys, "info").out.splitlines())


def test_info_plan(capsys: pytest.CaptureFixture[str]) -> None:
    """What is printed is what runs: the blocks that run as one op, and their Gram forms."""
    options = ["--batch", "16", "--size", "64"]
    assert cli.main(["info", "--plan", "resnet50", *options]) == 0
    printed = capsys.readouterr().out.splitlines()[1:]
    lines = [line for line in printed if not line.startswith(" ")]
    assert len(lines) == 16
    assert len(printed) - len(lines) == 52, "a line for each conv but the stem's"
    assert cli.main(["info", "--plan", "resnet50", *options, "--json", "--memory", "low"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["block"] for row in rows] == [line.split()[0] for line in lines]
    assert rows[4]["input"] == [16, 512, 8, 8]
    assert all(row["plan"]["memory"] == "low" for row in rows)
    model = fused_resnet.resnet50(num_classes=3)
    plans = training_plans(model, 16, 64)
    assert [row.plan is None for row in plans] == ["unit by unit" in line for line in lines]
    assert model.training
    ran = []
    for name, block, *_ in plans:
        whole = block._whole
        block._whole = lambda x, plan, name=name, whole=whole: (ran.append((name, plan)), whole(x, plan))[1]
    model(torch.randn(16, 3, 64, 64))
    assert ran == [(row.name, row.plan) for row in plans if row.plan is not None]
    grams = sum(plan.gram + plan.gram_projection for _, plan in ran)
    assert 0 < grams == sum("Gram form" in line for line in printed if line.startswith(" "))
    assert sum(layer["form"] == "Gram form" for row in rows for layer in row["layers"].values()) >= grams
    assert rows[4]["layers"]["conv3"]["layer"] | {"stride": [1, 1], "padding": [0, 0]} == {
        "in_channels": 128,
        "out_channels": 512,
        "kernel": [1, 1],
        "stride": [1, 1],
        "padding": [0, 0],
        "groups": 1,
        "pixels": 16 * 8 * 8,
        "dtype": "float32",
    }


def test_info_plan_under_autocast(capsys: pytest.CaptureFixture[str]) -> None:
    """Rules may name a dtype: that of the convs."""
    options = ["info", "--plan", "resnet18", "--batch", "2", "--size", "64", "--json"]
    for dtype, expected in (("fp32", "float32"), ("bf16", "bfloat16")):
        with use_plan(stored=False, layers=[{"dtype": "bfloat16", "stored": True}]):
            assert cli.main([*options, "--dtype", dtype]) == 0
        rows = json.loads(capsys.readouterr().out)
        assert {layer["layer"]["dtype"] for row in rows for layer in row["layers"].values()} == {expected}
        assert [row["plan"] is None for row in rows] == [dtype == "fp32"] * 8


def test_info_says_why_triton_is_not_live(capsys: pytest.CaptureFixture[str]) -> None:
    lines = Result(capsys, "info").out.splitlines()
    reason = dispatch.load("triton").unavailable("cpu")
    assert reason in ("it needs a GPU", "triton is not installed")
    for op in dispatch.OPS:
        (line,) = (line for line in lines if line.split()[:3] == [op, "cpu", "triton"])
        assert line.endswith(reason)


def test_info_is_truthful_where_the_extension_is_missing(tmp_path: Path) -> None:
    """The package without its extension, as in a fresh clone, while an installed one elsewhere has it."""
    root = Path(fused_resnet.__file__).parents[1]
    ignore = shutil.ignore_patterns("_C*", "_build_info.json", "__pycache__")
    shutil.copytree(root / "fused_resnet", tmp_path / "clone" / "fused_resnet", ignore=ignore)
    installed = tmp_path / "site" / "fused_resnet"
    installed.mkdir(parents=True)
    (installed / "_C.abi3.so").touch()
    env = os.environ | {"PYTHONPATH": str(tmp_path / "site")}
    # An editable install of the real tree would lend its extension to any other tree.
    code = (
        "import sys; sys.meta_path = [f for f in sys.meta_path if 'editable' not in repr(f).lower()];"
        "from fused_resnet.cli import main; main(['info', '--json'])"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tmp_path / "clone", env=env, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    assert found["package"] == str(tmp_path / "clone" / "fused_resnet")
    assert found["extension"]["loaded"] is False
    assert found["extension"]["build"]["built"] is False
    assert str(installed) in found["extension"]["elsewhere"]
    rows = {(row["op"], row["backend"]): row for row in found["backends"] if row["device"] == "cpu"}
    assert not rows["bn_act", "cpp"]["live"]
    assert "not built" in rows["bn_act", "cpp"]["note"]
    assert rows["bn_act", "reference"]["live"]


def test_importing_the_package_loads_nothing_of_this() -> None:
    code = (
        "import sys, fused_resnet; heavy = {'fused_resnet.cli', 'fused_resnet.benchmarks', 'sklearn', 'matplotlib',"
        " 'PIL', 'tqdm.auto'} & set(sys.modules); sys.exit(repr(heavy) if heavy else 0)"
    )
    root = Path(fused_resnet.__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# verify, bench


def test_verify(capsys: pytest.CaptureFixture[str]) -> None:
    for argv in ([], ["--train"], ["--dtype", "bf16"]):
        result = Result(capsys, "verify", *TINY, *argv)
        assert result.code == 0, result.out
        assert result.out.count("parity ok") == len(rivals.OURS)
        assert not result.err


def _check_row(row: dict[str, Any], result: dict[str, Any], ours: list[str]) -> None:
    assert len(row["runs_ms"]) == result["rounds"] >= 10
    assert row["quartiles_ms"][0] <= row["median_ms"] <= row["quartiles_ms"][1]
    assert row["images_per_s"] == pytest.approx(result["batch"] / row["median_ms"] * 1e3)
    assert set(row["speedup"]) == set(ours) - {row["name"]}
    for speedup in row["speedup"].values():
        assert speedup["low"] <= speedup["median"] <= speedup["high"]


def test_bench_prints_parity_then_times_and_writes_both_files(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    report, picture = tmp_path / "bench.json", tmp_path / "bench.png"
    result = Result(capsys, "bench", *TINY, "--rounds", "10", "--json", report, "--plot", picture)
    assert result.code == 0, (result.out, result.err)
    assert 0 < result.out.rindex("parity ok") < result.out.index("median ms")
    assert result.out.count("parity ok") == 4
    for word in ("eager", "channels_last", "fused_resnet", "fused_resnet.tiny()", "batch 1", "batch 4", "speed-up"):
        assert word in result.out
    assert sorted(tmp_path.iterdir()) == [report, picture]

    document = json.loads(report.read_text())
    assert document["schema"] == 1
    assert document["complete"] is True
    assert document["request"]["model"] == "tiny"
    assert document["environment"]["versions"]["torch"] == torch.__version__
    assert "china.jpg" in document["input"]
    ours = ["fused_resnet", "fused_resnet.tiny()"]
    assert [(p["name"], p["mode"], p["ok"]) for p in document["parity"]] == [
        (name, mode, True) for mode in ("infer", "train") for name in ours
    ]
    assert [(r["mode"], r["batch"]) for r in document["results"]] == [("infer", 1), ("train", 4)]
    for part in document["results"]:
        assert part["complete"] is True
        assert [row["name"] for row in part["rows"]] == ["eager", "channels_last", *ours]
        for row in part["rows"]:
            _check_row(row, part, ours)
            assert ("backends" in row) == row["ours"]
    from PIL import Image

    with Image.open(picture) as image:
        image.load()
        assert min(image.size) > 300


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_bench_on_a_gpu(dtype: str, capsys: pytest.CaptureFixture[str]) -> None:
    peers = "eager,channels_last,compile"
    result = Result(capsys, "bench", *TINY, "--device", "cuda", "--dtype", dtype, "--batch", "16", "--peers", peers)
    assert result.code == 0, (result.out, result.err)
    assert "not available" not in result.out


def _raise(error: BaseException) -> Any:
    raise error


def test_rivals_that_fail_are_shown_with_their_reason(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, quick: None
) -> None:
    absent = rivals.Rival("absent", "", lambda job: _raise(ImportError("no such engine")))
    inference_only = rivals.Rival("engine", "", lambda job: rivals.Entry(job.plain()))
    wrong = rivals.Rival("wrong", "", lambda job: rivals.Entry(lambda x: job.plain()(x) * 2))
    for one in (absent, inference_only, wrong):
        monkeypatch.setitem(rivals.PEERS, one.name, one)
    peers = "absent,engine,wrong,channels_last"
    result = Result(capsys, "bench", *TINY, "--peers", peers)
    assert result.code == 0, (result.out, result.err)
    rows = [line for line in result.out.splitlines() if line.startswith(("absent", "engine", "wrong", "channels_last"))]
    assert len(rows) == 8
    assert "not available: no such engine" in rows[0]
    assert "not available" not in rows[1]
    assert "not available: WrongResultError: its result differs" in rows[2]
    assert "not available" not in rows[3]
    assert "not available: it does inference only" in rows[5]


def test_engines_are_timed_or_say_why_not(capsys: pytest.CaptureFixture[str], quick: None) -> None:
    """Those that run on a CPU where they are installed; TensorRT needs a GPU."""
    needs = {"onnxruntime": ("onnxruntime", "onnx", "onnxscript"), "openvino": ("openvino",), "tensorrt": ()}
    result = Result(capsys, "bench", *TINY, "--mode", "infer", "--peers", ",".join(needs))
    assert result.code == 0, (result.out, result.err)
    rows = dict(line.split(maxsplit=1) for line in result.out.splitlines() if line.startswith(tuple(needs)))
    assert list(rows) == list(needs)
    assert rows.pop("tensorrt") == "not available: it runs on a GPU only"
    for name, row in rows.items():
        if all(importlib.util.find_spec(package) for package in needs[name]):
            assert float(row.split()[0]) > 0, row
        else:
            assert row.startswith("not available: "), row


def break_inference(monkeypatch: pytest.MonkeyPatch) -> None:
    for backend in (dispatch.load("cpp"), library):
        wrong = lambda *args, right=backend.conv_bias_act_forward: right(*args) * 1.001  # noqa: E731
        monkeypatch.setattr(backend, "conv_bias_act_forward", wrong)


@pytest.mark.parametrize("mode", ["infer", "train"])
def test_failed_parity_prints_no_speed_up(
    mode: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    if mode == "infer":
        break_inference(monkeypatch)
    else:
        for backend in (dispatch.load("cpp"), dispatch.load("reference")):
            wrong = lambda *args, right=backend.bn_act_backward: (right(*args)[0] * 1.01, *right(*args)[1:])  # noqa: E731
            monkeypatch.setattr(backend, "bn_act_backward", wrong)
    report, picture = tmp_path / "bench.json", tmp_path / "bench.png"
    argv = ("bench", *TINY, "--mode", mode, "--json", report, "--plot", picture)
    result = Result(capsys, *argv)
    assert result.code == 1
    assert result.out.count("parity FAILED") == 2
    assert "problem" in result.out
    assert "speed-up" not in result.out
    assert "images/s" not in result.out
    document = json.loads(report.read_text())
    assert document["results"] == []
    assert not any(entry["ok"] for entry in document["parity"])
    assert not picture.exists()
    assert Result(capsys, "verify", *TINY, *(["--train"] if mode == "train" else [])).code == 1


def test_one_failed_mode_keeps_the_other(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, quick: None
) -> None:
    break_inference(monkeypatch)
    result = Result(capsys, "bench", *TINY)
    assert result.code == 1
    assert "training, batch 4" in result.out
    assert "inference, batch 1" not in result.out


def test_interrupting_keeps_what_was_measured(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def timer(device: torch.device) -> Any:
        left = [1.0] * 22

        def run(step: Any) -> float:
            step()
            return left.pop() if left else _raise(KeyboardInterrupt())

        return run

    monkeypatch.setattr(harness, "timer", timer)
    report, picture = tmp_path / "bench.json", tmp_path / "bench.png"
    result = Result(capsys, "bench", *TINY, "--json", report, "--plot", picture)
    assert result.code == 130
    assert "INCOMPLETE: interrupted in round 4 of 30" in result.out
    assert "speed-up" in result.out
    assert "training, batch 4" not in result.out
    document = json.loads(report.read_text())
    assert document["complete"] is False
    assert [len(row["runs_ms"]) for row in document["results"][0]["rows"]] == [4, 4, 3, 3]
    assert picture.exists()


def test_interrupting_before_any_time(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(photographs, "crops", lambda *args: _raise(KeyboardInterrupt()))
    result = Result(capsys, "bench", *TINY)
    assert result.code == 130
    assert "INCOMPLETE" in result.out
    assert Result(capsys, "verify", *TINY).code == 130


# what a user can get wrong


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], ["command"]),
        (["nonsense"], ["nonsense"]),
        (["bench", "--model", "resnet51"], ["resnet51", "resnet50"]),
        (["verify", "--model", "resnet51"], ["resnet51"]),
        (["bench", "--mode", "infer,sleep"], ["sleep", "train"]),
        (["bench", "--batch", "0"], ["--batch", "1"]),
        (["bench", "--batch", "many"], ["--batch", "many"]),
        (["bench", "--rounds", "3"], ["--rounds", "10"]),
        (["bench", "--dtype", "int8"], ["int8"]),
        (["bench", "--device", "tpu:0"], ["tpu", "cuda"]),
        (["bench", "--device", "cuda:99"], ["cuda:99", "not available"]),
        (["bench", "--peers", "eager,jax"], ["jax", "channels_last", "openvino"]),
        (["bench", "--peers", "eager,,"], ["''", "channels_last"]),
        (["bench", "--json", "/no/such/folder/x.json"], ["/no/such/folder/x.json", "No such file"]),
        (["bench", "--json", "/proc/x.json"], ["/proc/x.json"]),
        (["bench", "--json", "/"], ["directory"]),
        (["bench", "--json", "/dev/null"], ["regular file"]),
        (["bench", "--plot", "picture.txt"], ["picture.txt", ".png"]),
        (["bench", "--plot", "x.png", "--json", "./x.png"], ["same file"]),
        (["bench", "--image", "/no/such.jpg"], ["/no/such.jpg", "No such file"]),
        (["verify", "--image", __file__], ["test_cli.py", "not an image"]),
    ],
)
def test_wrong_arguments(
    argv: list[str],
    words: list[str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setattr(bench, "make_realistic", lambda *args: pytest.fail("work began"))
    monkeypatch.chdir(tmp_path)
    assert_refused(Result(capsys, *argv), *words)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("module", "argv", "package"),
    [
        ("sklearn.datasets", ["bench"], "scikit-learn"),
        ("PIL", ["verify"], "pillow"),
        ("matplotlib", ["bench", "--plot", "x.png"], "matplotlib"),
    ],
)
def test_a_missing_extra_is_named(
    module: str,
    argv: list[str],
    package: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, module, None)
    assert_refused(Result(capsys, *argv), package, "fused_resnet[bench]")


def test_a_backend_that_cannot_serve_is_an_unmet_request(capsys: pytest.CaptureFixture[str]) -> None:
    with fused_resnet.use_backend("library"):
        assert_refused(Result(capsys, "verify", *TINY, "--train"), "library", "bn_act")


def test_out_of_memory_is_one_sentence(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "agree", lambda *args: _raise(torch.OutOfMemoryError("CUDA out of memory")))
    assert_refused(Result(capsys, "bench", *TINY), "memory", "--batch")


# tune


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to tune on")
def test_tune_without_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert_refused(Result(capsys, "tune"), "nothing to tune on cuda")
    assert_refused(Result(capsys, "tune", "--device", "cpu"), "nothing to tune on cpu")
    assert_refused(Result(capsys, "tune", "--device", "cuda:1"), "cuda:1 is not available")
    assert_refused(Result(capsys, "tune", "--batch", "0"), "at least 1")
