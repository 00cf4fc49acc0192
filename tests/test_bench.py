"""The benchmark's parts: real input, non-trivial statistics, parity that catches mistakes, honest bookkeeping of times.

No test here looks at how long something takes.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

import fused_resnet
from fused_resnet import batchnorm, dispatch, modules
from fused_resnet.backends import cpp, library, reference
from fused_resnet.cli import RequestError, load_benchmarks

agreement, bench, files, harness, photographs, plain, realistic, rivals, timing = map(
    load_benchmarks,
    ("agreement", "bench_resnet", "files", "harness", "photographs", "plain_resnet", "realistic", "rivals", "timing"),
)
Image = pytest.importorskip("PIL.Image", reason="pillow is not installed")


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a net of four basic blocks, known to both sides."""
    monkeypatch.setitem(plain.FAMILY, "tiny", (plain.PlainBasicBlock, (1, 1, 1, 1)))
    build = lambda: fused_resnet.ResNet(fused_resnet.BasicBlock, (1, 1, 1, 1))  # noqa: E731
    monkeypatch.setattr(fused_resnet, "tiny", build, raising=False)
    return "tiny"


# input


def test_preprocessing_is_that_of_imagenets_evaluation(torchvision: ModuleType) -> None:
    T = importlib.import_module("torchvision.transforms")
    theirs = T.Compose([T.Resize(256), T.CenterCrop(224), T.ToTensor(), T.Normalize(photographs.MEAN, photographs.STD)])
    for image in photographs.bundled().values():
        for box in (None, (10, 20, 157, 321), (0, 0, 99, 100)):
            part = image.crop(box) if box else image
            torch.testing.assert_close(photographs.preprocess(part), theirs(part), rtol=0, atol=1e-6)


def test_crops_are_seeded_and_differ() -> None:
    images = list(photographs.bundled().values())
    first, again, other = (photographs.crops(images, 12, 64, seed) for seed in (0, 0, 1))
    assert first.shape == (12, 3, 64, 64)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert len({tuple(crop.flatten()[:500].tolist()) for crop in first}) == 12


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK", "I;16", "1", "LA"])
def test_any_kind_of_image_becomes_rgb(mode: str, tmp_path: Path) -> None:
    path = tmp_path / ("image.tiff" if mode == "CMYK" else "image.png")
    Image.new(mode, (30, 40)).save(path)
    assert photographs.preprocess(photographs.open_image(path), 32).shape == (3, 32, 32)


def _damage(path: Path, kind: str) -> None:
    if kind == "a directory":
        path.mkdir()
    elif kind == "text":
        path.write_text("no picture")
    elif kind == "empty":
        path.touch()
    elif kind == "truncated":
        Image.effect_noise((200, 200), 50).save(path, "JPEG")
        path.write_bytes(path.read_bytes()[:900])
    elif kind == "too narrow":
        Image.new("RGB", (2000, 3)).save(path, "PNG")


@pytest.mark.parametrize("kind", ["missing", "a directory", "text", "empty", "truncated", "too narrow"])
def test_a_bad_image_is_named_in_one_sentence(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "photo.jpg"
    _damage(path, kind)
    with pytest.raises(RequestError, match=r"photo\.jpg") as caught:
        photographs.open_image(path)
    assert "\n" not in str(caught.value)


def test_realistic_batch_norm(tiny: str) -> None:
    torch.manual_seed(0)
    crops = torch.randn(32, 3, 32, 32)
    net = realistic.make_realistic(plain.plain_resnet(tiny), crops)
    assert not net.training
    for name, bn in net.named_modules():
        if isinstance(bn, nn.BatchNorm2d):
            assert bn.weight.min() < 0 < bn.weight.max(), name
            assert bn.bias.std() > 0.05, name
            assert bn.momentum == 0.1
            assert bn.num_batches_tracked == 2
    with torch.no_grad():
        y = net.conv1(crops)
        means = [part.mean((0, 2, 3)) for part in y.split(16)]
        torch.testing.assert_close(net.bn1.running_mean, torch.stack(means).mean(0), rtol=1e-4, atol=1e-5)
        assert net(crops).argmax(1).unique().numel() >= agreement.CLASSES


# parity


@pytest.fixture
def job(tiny: str) -> Callable[..., tuple[Any, torch.Tensor]]:
    """dtype -> (a job for the tiny net, its crops)."""

    def make(dtype: str = "fp32") -> tuple[Any, torch.Tensor]:
        request = bench.Request(model=tiny, size=32, dtype=dtype)
        crops, state, _ = bench.prepare(request)
        return bench.make_job(request, "train", crops, state), crops

    return make


def _agree(job: Any, crops: torch.Tensor, mode: str) -> list[Any]:
    ours = list(rivals.OURS.values())
    if mode == "infer":
        return agreement.infer_agreement(job, ours, crops, lambda stage: None)
    return agreement.train_agreement(job, ours, lambda stage: None)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("mode", ["infer", "train"])
def test_parity_holds(job: Callable[..., Any], mode: str, dtype: str) -> None:
    results = _agree(*job(dtype), mode)
    assert [result.name for result in results] == list(rivals.OURS)
    for result in results:
        assert result.ok, agreement.lines(result, "tiny")
        assert len(result.rows) == (1 if mode == "infer" else 1 + 38 + 36)
        if mode == "infer":
            assert result.facts["crops"] == 64
            assert result.facts["classes"] >= 5


def _scaled(function: Callable[..., Any], factor: float, index: int | None = None) -> Callable[..., Any]:
    """The function with its result, or one of its results, wrong by a factor."""

    def wrong(*args: Any, **kwargs: Any) -> Any:
        result = function(*args, **kwargs)
        if index is None:
            return result * factor
        return tuple(value * factor if i == index else value for i, value in enumerate(result))

    return wrong


def _break(monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    if what == "abs(gamma) in the fold":
        monkeypatch.setattr(modules, "fold", lambda w, b, gamma, *rest: reference_fold(w, b, gamma.abs(), *rest))
    elif what == "no beta in the fold":
        monkeypatch.setattr(modules, "fold", lambda w, b, gamma, beta, *rest: reference_fold(w, b, gamma, None, *rest))
    elif what == "conv":
        for backend in (cpp, library):
            monkeypatch.setattr(backend, "conv_bias_act_forward", _scaled(backend.conv_bias_act_forward, 1.0001))
    else:
        name, index = {
            "out": ("bn_act_train_forward", 0),
            "gradient of x": ("bn_act_backward", 0),
            "gradient of gamma": ("bn_act_backward", 1),
            "gradient of beta": ("bn_act_backward", 2),
        }[what]
        for backend in (cpp, reference):
            monkeypatch.setattr(backend, name, _scaled(getattr(backend, name), 1.001, index))


reference_fold = modules.fold


@pytest.mark.parametrize("what", ["abs(gamma) in the fold", "no beta in the fold", "conv"])
def test_parity_catches_wrong_inference(job: Callable[..., Any], what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _break(monkeypatch, what)
    assert all("error budget" in result.problems[0] for result in _agree(*job(), "infer"))


@pytest.mark.parametrize("what", ["out", "gradient of x", "gradient of gamma", "gradient of beta"])
def test_parity_catches_wrong_training(job: Callable[..., Any], what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _break(monkeypatch, what)
    assert all("error budget" in result.problems[0] for result in _agree(*job(), "train"))


def test_parity_catches_wrong_running_statistics(job: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    running = batchnorm.running
    monkeypatch.setattr(batchnorm, "running", lambda bn: (running(bn)[0], None) if bn.training else running(bn))
    for result in _agree(*job(), "train"):
        assert "running_var" in result.problems[0]


def test_one_class_proves_nothing(job: Callable[..., Any]) -> None:
    one, crops = job()
    results = _agree(one, crops[:1].repeat(64, 1, 1, 1), "infer")
    assert all("classes occur" in result.problems[-1] for result in results)


def test_wrong_classes_are_counted(job: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    one, crops = job()
    prepare = rivals.OURS["fused_resnet"].prepare

    def later(j: Any) -> Any:  # right on the crops that float64 sees, wrong on others
        net = prepare(j).net
        calls: list[int] = []

        def wrong(x: torch.Tensor) -> torch.Tensor:
            calls.append(1)
            return net(x) if len(calls) == 1 else net(x).roll(1, 1)

        return rivals.Entry(wrong, True)

    liar = rivals.Rival("liar", "", later)
    (result,) = agreement.infer_agreement(one, [liar], crops, lambda stage: None)
    assert result.rows[0].ok
    assert result.problems == ["the top-1 class differs on 48 of 64 crops"]


def test_a_net_of_ours_that_raises_is_a_failed_check(job: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def crash(*args: Any) -> None:
        raise RuntimeError("no such kernel")

    for backend in (cpp, library):
        monkeypatch.setattr(backend, "conv_bias_act_forward", crash)
    assert all(result.problems == ["it fails with RuntimeError: no such kernel"] for result in _agree(*job(), "infer"))


# times


def test_rounds_are_interleaved_and_ratios_are_paired() -> None:
    calls: list[str] = []

    def prepare(name: str, times: list[float]) -> Callable[[], Callable[[], float]]:
        def step() -> float:
            calls.append(name)
            return times[(calls.count(name) - 1) % len(times)]

        return lambda: step

    # One slow rival whose times swing with ours: the medians alone would say 3 / 2 = 1.5, the pairs say 3.
    steps = {"slow": prepare("slow", [3.0, 30.0, 3.0, 60.0]), "ours": prepare("ours", [1.0, 10.0, 1.0, 20.0])}
    times, complete = harness.measure(steps, rounds=4, warmup=4, run=lambda step: step())
    assert complete
    assert calls == ["slow", "ours"] * 8
    assert times["slow"].ms == [3.0, 30.0, 3.0, 60.0]
    assert harness.ratio(times["slow"], times["ours"]) == (3.0, 3.0, 3.0)
    assert harness.spread([4.0, 1.0, 2.0, 3.0, 5.0]) == (3.0, 2.0, 4.0)


def test_a_failing_rival_does_not_stop_the_others() -> None:
    def unprepared() -> Any:
        raise ImportError("no engine here")

    def failing_later() -> Any:
        left = [1.0, 1.0, 1.0]
        return lambda: left.pop()

    steps = {"absent": unprepared, "late": failing_later, "wrong": lambda: lambda: 7.0, "good": lambda: lambda: 2.0}

    def check(name: str, result: float) -> None:
        if result == 7.0:
            raise rivals.WrongResultError("its result differs")

    times, complete = harness.measure(steps, rounds=10, warmup=1, run=lambda step: step(), check=check)
    assert complete
    assert times["absent"].reason == "no engine here"
    assert times["late"].reason == "IndexError: pop from empty list"
    assert times["late"].ms == []
    assert "its result differs" in str(times["wrong"].reason)
    assert times["good"].ms == [2.0] * 10


def test_interrupted_rounds_are_kept() -> None:
    left = list(range(7))

    def step() -> float:
        if not left:
            raise KeyboardInterrupt
        return float(left.pop())

    times, complete = harness.measure({"a": lambda: step, "b": lambda: step}, 10, 1, lambda s: s())
    assert not complete
    assert [len(times[name].ms) for name in "ab"] == [3, 2]
    assert harness.ratio(times["a"], times["b"]) is not None


def test_rows_say_what_really_ran(job: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpp, "unavailable", lambda device_type: "hidden by this test")
    monkeypatch.setattr(dispatch, "_warned", {"cpp on cpu"})
    one, _ = job()
    backends: dict[str, list[str]] = {}
    step = timing.watched(rivals.OURS["fused_resnet"], one, backends)
    step()
    (line,) = backends["fused_resnet"]
    assert line.startswith("torch's own modules throughout: ")
    assert "cpp: hidden by this test" in line
    assert dispatch.choose.__name__ == "choose"
    infer = one.with_mode("infer")
    backends.clear()
    with fused_resnet.use_backend("reference"):
        timing.watched(rivals.OURS["fused_resnet"], infer, backends)()
    assert all(line.endswith(": reference") for line in backends["fused_resnet"])


@pytest.mark.slow
def test_torch_compile_is_a_rival(job: Callable[..., Any]) -> None:
    one, _ = job()
    infer = one.with_mode("infer")
    expected = rivals.PEERS["eager"].step_for(infer)()()
    torch.testing.assert_close(rivals.PEERS["compile"].step_for(infer)()(), expected, rtol=1e-3, atol=1e-4)
    torch.compiler.reset()


def test_files_are_whole_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "out.json"
    target.write_text("old")

    def full(self: Path, content: bytes) -> int:
        self.touch()
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        with pytest.raises(RequestError, match="No space left"):
            files.write(target, b"new")
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]
    files.write(target, b"new")
    assert target.read_text() == "new"


# the example


@pytest.mark.slow
def test_train_digits(tmp_path: Path) -> None:
    path = Path(__file__).parents[1] / "examples" / "train_digits.py"
    spec = importlib.util.spec_from_file_location("train_digits", path)
    assert spec is not None
    assert spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    runs = example.compare(epochs=5)
    assert all(run.accuracy > 0.97 for run in runs.values())
    fused, unfused = (torch.tensor(runs[name].losses) for name in ("fused", "unfused"))
    torch.testing.assert_close(fused[:10], unfused[:10], rtol=1e-3, atol=1e-4)
    assert (fused - unfused).abs().mean() < 0.05  # rounding grows from step to step, the curves stay together
    example.draw(runs, tmp_path / "losses.png")
    assert Image.open(tmp_path / "losses.png").size == (1050, 600)
