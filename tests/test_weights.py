"""`weights=` in all its forms; nothing that holds code is read, nothing is half-loaded, and no test needs a network."""

from __future__ import annotations

import builtins
import os
import pickle
import sys
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from networks import images, infer, randomise
from torch import Tensor, nn

import fused_resnet as fr

State = dict[str, Tensor]


@pytest.fixture(scope="module")
def state() -> State:
    """A resnet18's state dict, unlike any initialisation."""
    torch.manual_seed(123)
    model = fr.resnet18()
    randomise(model)
    return model.state_dict()


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty hub cache; whoever would go to the network for a file fails."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    folder = tmp_path / "home" / "hub" / "checkpoints"
    folder.mkdir(parents=True)

    def offline(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError(f"a download was tried: {args}")

    monkeypatch.setattr(torch.hub, "urlopen", offline)
    return folder


@pytest.fixture
def file(tmp_path: Path, state: State) -> Path:
    path = tmp_path / "weights.pth"
    torch.save(state, path)
    return path


def assert_loaded(model: nn.Module, state: State) -> None:
    found = model.state_dict()
    assert list(found) == list(state)
    assert all(torch.equal(found[key], state[key]) for key in state)
    assert model.training
    assert all(p.requires_grad and p.is_leaf for p in model.parameters())


# torchvision's names and enums, through its own loader and cache


def place(hub: Path, entry: Any, state: State) -> None:
    torch.save(state, hub / entry.url.rsplit("/", 1)[1])


def test_names_and_enum_members(torchvision: ModuleType, hub: Path, state: State) -> None:
    enum = torchvision.models.ResNet18_Weights
    place(hub, enum.IMAGENET1K_V1, state)
    forms = (enum.IMAGENET1K_V1, enum.DEFAULT, "IMAGENET1K_V1", "ResNet18_Weights.IMAGENET1K_V1", "DEFAULT",
             "ResNet18_Weights.DEFAULT")  # fmt: skip
    for weights in forms:
        assert_loaded(fr.resnet18(weights=weights), state)
    assert_loaded(fr.resnet18("DEFAULT", False), state)
    theirs = torchvision.models.resnet18(weights="DEFAULT").eval()
    ours = fr.resnet18(weights="DEFAULT").eval()
    assert torch.allclose(infer(ours, images()), infer(theirs, images()), atol=1e-5)


def test_versions_are_told_apart(torchvision: ModuleType, hub: Path) -> None:
    """IMAGENET1K_V2 is another file than V1, and DEFAULT is V2 where there is one. On small stand-ins for resnet50."""
    enum = torchvision.models.ResNet50_Weights
    made = {}
    for entry, seed in ((enum.IMAGENET1K_V1, 1), (enum.IMAGENET1K_V2, 2)):
        torch.manual_seed(seed)
        made[entry] = fr.resnet50().state_dict()
        place(hub, entry, made[entry])
    for weights, entry in (
        ("IMAGENET1K_V1", enum.IMAGENET1K_V1),
        ("ResNet50_Weights.IMAGENET1K_V2", enum.IMAGENET1K_V2),
        ("DEFAULT", enum.IMAGENET1K_V2),
    ):
        assert_loaded(fr.resnet50(weights=weights), made[entry])


@pytest.mark.parametrize("name", ["resnext50_32x4d", "wide_resnet50_2", "resnet34"])
def test_each_constructor_asks_for_its_own_file(torchvision: ModuleType, hub: Path, name: str) -> None:
    asked: list[str] = []

    def record(url: str, *args: Any, **kwargs: Any) -> Any:
        asked.append(url)
        assert kwargs["weights_only"] is True
        assert kwargs["check_hash"] is True
        assert kwargs["progress"] is False
        raise RuntimeError("no network")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys.modules["torchvision.models._api"], "load_state_dict_from_url", record)
        with pytest.raises(ValueError, match="no network"):
            getattr(fr, name)(weights="DEFAULT", progress=False)
    assert asked == [torchvision.models.get_model_weights(name).DEFAULT.url]


@pytest.mark.parametrize(
    "weights", ["IMAGENET1K_V9", "ResNet50_Weights.IMAGENET1K_V1", "default", "ResNet18_Weights.V1", ""]
)  # fmt: skip
def test_unknown_names(torchvision: ModuleType, hub: Path, weights: str) -> None:
    with pytest.raises(ValueError, match=r"resnet18.*IMAGENET1K_V1"):
        fr.resnet18(weights=weights)


def test_members_of_another_model(torchvision: ModuleType, hub: Path) -> None:
    with pytest.raises(ValueError, match=r"another model.*ResNet18_Weights"):
        fr.resnet18(weights=torchvision.models.ResNet34_Weights.DEFAULT)
    with pytest.raises(ValueError, match=r"another model.*ResNet18_Weights"):
        fr.resnet18(weights=torchvision.models.ResNet18_Weights)


def test_without_torchvision(monkeypatch: pytest.MonkeyPatch, hub: Path, state: State, file: Path) -> None:
    """Names need it, and the message says what else would do; everything else works."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        monkeypatch.delitem(sys.modules, name)
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.partition(".")[0] == "torchvision":
            raise ModuleNotFoundError("No module named 'torchvision'", name="torchvision")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ModuleNotFoundError, match=r"needs torchvision.*fused_resnet\[vision\].*a path"):
        fr.resnet18(weights="DEFAULT")
    assert_loaded(fr.resnet18(weights=file), state)
    assert_loaded(fr.resnet18(weights=state), state)
    fr.resnet18()


def test_a_broken_torchvision(monkeypatch: pytest.MonkeyPatch) -> None:
    """Built for another torch it raises RuntimeError on import, as it does beside a CPU torch."""
    monkeypatch.setitem(sys.modules, "torchvision", None)
    monkeypatch.setitem(sys.modules, "torchvision.models", None)
    with pytest.raises(ModuleNotFoundError, match="needs torchvision"):
        fr.resnet18(weights="DEFAULT")


# Files, URLs, state dicts


def test_paths(file: Path, state: State, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(file.parent)
    for weights in (file, str(file), Path(file.name), file.name):
        assert_loaded(fr.resnet18(weights=weights), state)
    file.rename("DEFAULT")
    assert_loaded(fr.resnet18(weights="DEFAULT"), state)


def test_file_urls(file: Path, state: State, tmp_path: Path, hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two files of one name in two folders are two files: no cache goes between."""
    assert_loaded(fr.resnet18(weights=file.as_uri()), state)
    other = tmp_path / "with space" / file.name
    other.parent.mkdir()
    changed = {key: value * 2 for key, value in state.items()}
    torch.save(changed, other)
    assert_loaded(fr.resnet18(weights=other.as_uri()), changed)
    assert list(hub.iterdir()) == []
    with pytest.raises(FileNotFoundError, match="no weights file"):
        fr.resnet18(weights=(tmp_path / "absent.pth").as_uri())


def test_web_urls(file: Path, state: State, hub: Path) -> None:
    """Through torch.hub and its cache."""
    url = "https://example.invalid/models/net-18.pth?download=1"
    file.rename(hub / "net-18.pth")
    assert_loaded(fr.resnet18(weights=url), state)


def test_unreachable_urls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One sentence with the URL in it. Port 9 of this machine: nothing listens there, and nothing leaves it."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with pytest.raises(OSError, match=r"resnet18.*http://127.0.0.1:9/net.pth"):
        fr.resnet18(weights="http://127.0.0.1:9/net.pth", progress=False)
    with pytest.raises((OSError, ValueError), match=r"resnet18.*foo://bar/net.pth"):
        fr.resnet18(weights="foo://bar/net.pth", progress=False)


@pytest.mark.parametrize(
    "wrap",
    [
        dict,
        OrderedDict,
        lambda s: {"state_dict": s, "epoch": 3, "arch": "resnet18"},
        lambda s: {"model": s, "optimizer": {"state": {}, "param_groups": []}},
        lambda s: {f"module.{key}": value for key, value in s.items()},
        lambda s: {"state_dict": {f"module.{key}": value for key, value in s.items()}},
        lambda s: {key: nn.Parameter(value, requires_grad=False) for key, value in s.items()},
        lambda s: {key: value for key, value in s.items() if not key.endswith("num_batches_tracked")},
        lambda s: dict(reversed(s.items())),
    ],
    ids=["dict", "ordered", "state_dict", "model", "module.", "both", "parameters", "no counters", "reversed"],
)
@pytest.mark.parametrize("saved", [False, True])
def test_state_dicts(wrap: Callable[[State], Any], saved: bool, state: State, tmp_path: Path) -> None:
    weights: Any = wrap(state)
    if saved:
        torch.save(weights, tmp_path / "net.pt")
        weights = tmp_path / "net.pt"
    copies = {key: value.clone() for key, value in state.items()}
    model = fr.resnet18(weights=weights)
    if saved or "bn1.num_batches_tracked" in str(weights):
        assert_loaded(model, state | {key: v for key, v in model.state_dict().items() if "num_batches" in key})
    with torch.no_grad():
        model.conv1.weight.zero_()
    assert torch.equal(state["conv1.weight"], copies["conv1.weight"]), "the caller's tensors stay the caller's"


def test_half_precision_checkpoints(state: State) -> None:
    """The model keeps its own dtype, as with load_state_dict."""
    half = {key: value.half() if value.is_floating_point() else value for key, value in state.items()}
    model = fr.resnet18(weights=half)
    assert model.conv1.weight.dtype == torch.float32
    assert torch.equal(model.conv1.weight, half["conv1.weight"].float())


def test_options_go_with_weights(state: State) -> None:
    small = {key: value for key, value in state.items() if not key.startswith("fc.")}
    small |= {"fc.weight": torch.randn(7, 512), "fc.bias": torch.randn(7)}
    assert_loaded(fr.resnet18(weights=small, num_classes=7), small)
    gray = state | {"conv1.weight": torch.randn(64, 1, 7, 7)}
    assert_loaded(fr.resnet18(weights=gray, in_channels=1), gray)


def test_nothing_draws_random_numbers_twice(state: State) -> None:
    """Weights or none, the generator ends where torchvision's would: the model is initialised once."""
    torch.manual_seed(0)
    fr.resnet18()
    plain = torch.get_rng_state()
    torch.manual_seed(0)
    fr.resnet18(weights=state)
    assert torch.equal(torch.get_rng_state(), plain)


# What does not fit


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_classes": 10}, r"num_classes=1000.*num_classes=10\b"),
        ({"in_channels": 1}, r"in_channels=3.*in_channels=1\b"),
        ({"in_channels": 4, "num_classes": 5}, r"(num_classes=1000.*num_classes=5|in_channels=3.*in_channels=4)"),
    ],
    ids=str,
)
def test_other_numbers(state: State, file: Path, options: dict[str, Any], message: str) -> None:
    for weights in (state, file):
        with pytest.raises(ValueError, match=message):
            fr.resnet18(weights=weights, **options)


def test_published_weights_with_other_numbers(torchvision: ModuleType, hub: Path, state: State) -> None:
    place(hub, torchvision.models.ResNet18_Weights.DEFAULT, state)
    with pytest.raises(ValueError, match=r"num_classes=1000.*num_classes=10\b"):
        fr.resnet18(weights="DEFAULT", num_classes=10)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: {k: v for k, v in s.items() if k != "layer1.0.conv1.weight"}, r"lack layer1\.0\.conv1\.weight"),
        (lambda s: {k: v for k, v in s.items() if "bn" not in k}, r"lack .* and \d+ more"),
        (lambda s: {k: v for k, v in s.items() if "fc" not in k}, r"lack fc\.weight, fc\.bias"),
        (lambda s: s | {"extra.weight": torch.ones(1)}, r"unknown extra\.weight"),
        (lambda s: {f"net.{k}": v for k, v in s.items()}, "lack"),
        (lambda s: s | {"bn1.weight": torch.ones(3)}, r"bn1\.weight \(3,\) for \(64,\)"),
        (lambda s: s | {"bn1.weight": torch.ones(64, 1)}, r"bn1\.weight \(64, 1\) for \(64,\)"),
        (lambda s: s | {"fc.weight": torch.ones(1000)}, r"fc\.weight \(1000,\) for \(1000, 512\)"),
        (lambda s: s | {"fc.weight": torch.tensor(1.0)}, r"fc\.weight"),
        (lambda s: {}, "lack"),
        (lambda s: {"state_dict": {}}, "lack"),
        (lambda s: {"epoch": 3}, "state dict"),
        (lambda s: {"state_dict": [1, 2]}, "state dict"),
        (lambda s: {"state_dict": {"conv1.weight": "text"}}, "state dict"),
        (lambda s: {1: torch.ones(1)}, "state dict"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("saved", [False, True])
def test_state_dicts_that_do_not_fit(
    change: Callable[[State], Any], message: str, saved: bool, state: State, tmp_path: Path
) -> None:
    weights = change(dict(state))
    if saved:
        torch.save(weights, tmp_path / "net.pt")
        weights = tmp_path / "net.pt"
    with pytest.raises(ValueError, match=message) as caught:
        fr.resnet18(weights=weights)
    assert str(caught.value).startswith("resnet18: ")
    assert len(str(caught.value)) < 400, "one clear sentence"


def test_weights_of_another_architecture(state: State) -> None:
    for name in ("resnet34", "resnet50"):
        with pytest.raises(ValueError, match=f"{name}: the weights"):
            getattr(fr, name)(weights=state)
    with pytest.raises(ValueError, match="unknown"):
        fr.resnet18(weights=state, norm_layer=lambda c: nn.BatchNorm2d(c, track_running_stats=False))


@pytest.mark.parametrize(
    "weights", [3, 1.5, [1], object(), b"IMAGENET1K_V1", torch.ones(2), nn.Linear(1, 1)], ids=lambda w: type(w).__name__
)
def test_other_types(weights: Any) -> None:
    with pytest.raises(TypeError, match="weights must be"):
        fr.resnet18(weights=weights)


@pytest.mark.parametrize(
    "path", ["absent.pth", "a/b/absent", "./absent", Path("absent"), Path("DEFAULT"), "C:\\absent.pt"]
)
def test_missing_files(path: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"absent|DEFAULT"):
        fr.resnet18(weights=path)


def test_a_folder(tmp_path: Path) -> None:
    for weights in (tmp_path, str(tmp_path)):
        with pytest.raises(OSError, match=r"resnet18"):
            fr.resnet18(weights=weights)


# Files that hold code, or are no checkpoints


class Bomb:
    """Unpickling it calls os.mkdir: the folder tells whether the code ran."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("form", ["zip", "legacy", "plain pickle", "inside a state dict", "a whole model", "hub"])
def test_code_is_refused_and_does_not_run(
    torchvision: ModuleType, form: str, tmp_path: Path, hub: Path, state: State
) -> None:
    fired, path = tmp_path / "fired", tmp_path / "net.pth"
    weights: Any = path
    if form == "plain pickle":
        path.write_bytes(pickle.dumps(Bomb(fired)))
    elif form == "a whole model":
        torch.save(fr.BasicBlock(2, 2), path)
    elif form == "inside a state dict":
        torch.save({"state_dict": state, "args": Bomb(fired)}, path)
    elif form == "hub":
        place(hub, torchvision.models.ResNet18_Weights.DEFAULT, Bomb(fired))  # type: ignore[arg-type]
        weights = "DEFAULT"
    else:
        torch.save(Bomb(fired), path, _use_new_zipfile_serialization=form == "zip")
    with pytest.raises(ValueError, match="refused"):
        fr.resnet18(weights=weights)
    if form != "hub":
        with pytest.raises(ValueError, match="refused"):
            fr.resnet18(weights=path.as_uri())
    assert not fired.exists()


@pytest.mark.filterwarnings("ignore:.*TorchScript archive:UserWarning")
@pytest.mark.parametrize("content", ["empty", "text", "cut", "zip", "torchscript"])
def test_files_that_are_no_checkpoints(content: str, tmp_path: Path, file: Path) -> None:
    path = tmp_path / "net.pth"
    if content == "cut":
        path.write_bytes(file.read_bytes()[:50_000])
    elif content == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("readme.txt", "no weights")
    elif content == "torchscript":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            torch.jit.save(torch.jit.trace(nn.Linear(1, 1), torch.ones(1, 1)), path)
    else:
        path.write_bytes(b"" if content == "empty" else b"<html>not found</html>")
    with pytest.raises(ValueError, match=r"resnet18: .*net\.pth"):
        fr.resnet18(weights=path)


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="needs a user whom file permissions bind")
def test_a_file_that_may_not_be_read(file: Path) -> None:
    file.chmod(0)
    with pytest.raises(PermissionError):
        fr.resnet18(weights=file)


# The old arguments


@pytest.mark.parametrize(
    ("args", "kwargs", "loads"),
    [
        ((), {"pretrained": True}, True),
        ((), {"pretrained": False}, False),
        ((True,), {}, True),
        ((False,), {}, False),
        ((True, False), {}, True),
        ((), {"weights": True}, True),
        ((), {"pretrained": False, "num_classes": 5}, False),
    ],
)
def test_pretrained(
    torchvision: ModuleType, hub: Path, state: State, args: tuple[Any, ...], kwargs: dict[str, Any], loads: bool
) -> None:
    """One DeprecationWarning that points at the caller, then torchvision's meaning: IMAGENET1K_V1 or nothing."""
    place(hub, torchvision.models.ResNet18_Weights.IMAGENET1K_V1, state)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = fr.resnet18(*args, **kwargs)
    assert [w.category for w in caught] == [DeprecationWarning]
    assert "pretrained" in str(caught[0].message)
    assert caught[0].filename == __file__
    assert torch.equal(model.conv1.weight, state["conv1.weight"]) is loads
    assert model.fc.out_features == kwargs.get("num_classes", 1000)


def test_no_warning_otherwise(state: State, file: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fr.resnet18()
        fr.resnet18(None, False)
        fr.resnet18(weights=state)
        fr.resnet18(weights=file, progress=False)


@pytest.mark.filterwarnings("ignore:.*pretrained:DeprecationWarning")
def test_weights_beside_pretrained(torchvision: ModuleType, state: State) -> None:
    for pretrained in (False, True):
        with pytest.raises(TypeError, match="pretrained"):
            fr.resnet18(weights=state, pretrained=pretrained)
        with pytest.raises(TypeError, match="pretrained"):
            torchvision.models.resnet18(weights="DEFAULT", pretrained=pretrained)
