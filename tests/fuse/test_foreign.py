"""`fused-resnet verify --model` with models of other packages and files."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest

from fused_resnet import foreign

SOURCE = """
import torch
from torch import nn

def net():
    return nn.Sequential(nn.Conv2d(2, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1))

def nothing():
    return 3
"""


def test_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "mine_for_foreign.py"
    path.write_text(SOURCE)
    for train in (False, True):
        assert foreign.check(f"{path}:net", train=train, size=32) == 0
        out = capsys.readouterr().out
        assert "1 fused: 1 x conv + BN + ReLU; 0 batch norms skipped" in out
        assert "parity ok" in out


def test_torchvision_by_name(torchvision: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert foreign.check("torchvision:resnet18", size=32) == 0
    assert "20 fused" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("torchvision:resnet17", "torchvision has no model 'resnet17'"),
        ("nowhere.py:net", "no Python file 'nowhere.py'"),
        ("{tmp}/mine.py:other", "has no function 'other'"),
        ("{tmp}/mine.py:nothing", "returned a int"),
    ],
)
def test_what_is_not_there(name: str, message: str, tmp_path: Path, torchvision: ModuleType) -> None:
    (tmp_path / "mine.py").write_text(SOURCE)
    with pytest.raises(foreign.ModelNotFoundError, match=message):
        foreign.load(name.format(tmp=tmp_path))
