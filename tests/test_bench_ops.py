"""The kernel benchmarks: real shapes, counted bytes, a parity gate before each number, files that survive anything.

No test here looks at how long something takes.
"""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import fused_resnet as fr
from fused_resnet import dispatch
from fused_resnet.backends import cpp, reference
from fused_resnet.cli import RequestError, load_benchmarks, main

bench, files, harness, kernels, records, roofline, small = map(
    load_benchmarks, ("bench_ops", "files", "harness", "kernels", "records", "roofline", "small_kernels")
)
CPU = torch.device("cpu")
OPS = bench.ops()


def test_every_op_has_its_file() -> None:
    assert set(OPS) == {"add_relu", "bn_act", "bn_act_pool", "conv_bn_act", "conv_bias_act", "residual_block"}
    assert all({"eager", "fused_resnet"} <= op.rivals.keys() for op in OPS.values())


def test_shapes_are_those_of_the_networks() -> None:
    """Every conv, BN and block end of a ResNet-18, as it runs, is a case; and nothing else is."""
    model = fr.resnet18().eval()
    seen: set[tuple[Any, ...]] = set()

    def hook(module: torch.nn.Module, args: Any, out: torch.Tensor) -> None:
        if isinstance(module, torch.nn.Conv2d):
            seen.add((tuple(args[0].shape[1:]), tuple(out.shape[1:]), module.kernel_size[0], module.stride[0]))

    for name, module in model.named_modules():
        if "downsample" not in name:
            module.register_forward_hook(hook)
    with torch.no_grad():
        model(torch.zeros(1, 3, 224, 224))
    cases = [case for case in OPS["conv_bn_act"].cases() if "resnet18" in case.models]
    assert {case.sizes[:4] for case in cases} == seen
    ends = {case.sizes for case in OPS["add_relu"].cases() if "resnet18" in case.models}
    assert ends == {(64, 56, 56), (128, 28, 28), (256, 14, 14), (512, 7, 7)}


def test_traffic_is_the_rooflines() -> None:
    """The cost of conv_bn_act in training, over ResNet-50's main path, adds up to the scheme bn_act's."""
    net = roofline.network("resnet50")
    op = OPS["conv_bn_act"]
    cases = {case.name: case for case in op.cases()}
    sizes_of = load_benchmarks("bench_conv_bn_act").sizes_of
    for block in net.blocks[:4]:
        if block.projection is not None:
            continue
        found = flops = 0.0
        for conv in block.convs:
            sizes, name = sizes_of(conv, 1 if conv.pointwise else 3, conv is block.convs[-1])
            assert cases[name].sizes == sizes
            for direction in ("forward", "backward"):
                cost = op.cost(sizes, direction)
                found, flops = found + cost.activations, flops + cost.flops
        part = roofline.Network(net.name, net.stem, net.pool_out, (block,), 0, 0)
        empty = roofline.Network(net.name, net.stem, net.pool_out, (), 0, 0)
        wanted = roofline.bn_act(part)[len(roofline.bn_act(empty)) :]
        # The shortcut's gradient joins in conv1's dgrad there: X more.
        assert found == pytest.approx(sum(k.elements for k in wanted) - block.x, rel=1e-6)
        assert flops == pytest.approx(sum(k.flops for k in wanted), rel=1e-6)


def smallest(name: str) -> Any:
    return small.picked(OPS[name], large=False)


@pytest.mark.parametrize("name", OPS)
def test_parity_holds(name: str) -> None:
    op = OPS[name]
    for direction in op.directions:
        inputs = op.inputs(smallest(name).sizes, kernels.Maker(2, torch.float32, CPU))
        gate = kernels.Parity(op, inputs, direction, torch.float32)
        assert all(row.ok for row in gate.check("fused_resnet"))
        if direction == "infer" and "fused calls" in op.rivals:
            gate.check("fused calls")


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_parity_catches_a_wrong_kernel(direction: str, monkeypatch: pytest.MonkeyPatch) -> None:
    op = OPS["bn_act"]
    name, index = {"forward": ("bn_act_train_forward", 0), "backward": ("bn_act_backward", 1)}[direction]
    for backend in (cpp, reference):
        right = getattr(backend, name)

        def wrong(*args: Any, right: Callable[..., Any] = right) -> Any:
            return tuple(t * 1.01 if i == index else t for i, t in enumerate(right(*args)))

        monkeypatch.setattr(backend, name, wrong)
    inputs = op.inputs(smallest("bn_act").sizes, kernels.Maker(2, torch.float32, CPU))
    gate = kernels.Parity(op, inputs, direction, torch.float32)
    with pytest.raises(load_benchmarks("rivals").WrongResultError, match="relative error"):
        gate.check("fused_resnet")


def test_a_rotation_moves_more_than_the_cache_holds() -> None:
    op, make = OPS["add_relu"], kernels.Maker(1, torch.float32, CPU)
    case = smallest("add_relu")
    sets = bench.input_sets(op, case, "forward", make, 10 << 20)
    per_call = 3 * sets[0]["x"].nbytes
    assert per_call * len(sets) >= 10 << 20 > per_call * (len(sets) - 1)
    assert len({value["x"].data_ptr() for value in sets}) == len(sets)


# the command


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., int]:
    """Runs bench-ops on one case of one op, in a blink."""
    monkeypatch.setattr(bench, "ceilings", lambda *args: (1e10, 1e11))
    monkeypatch.setattr(bench, "cache_bytes", lambda device: 1)
    case = smallest("add_relu")
    op = OPS["add_relu"]
    tiny = kernels.Op(**(op.__dict__ | {"cases": lambda: [case._replace(sizes=(4, 5, 6))]}))
    monkeypatch.setattr(bench, "ops", lambda: {"add_relu": tiny})

    def run(*argv: str) -> int:
        return main(["bench-ops", "--rivals", "eager", "--rounds", "3", "--out", str(tmp_path / "ops.csv"), *argv])

    return run


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_bench_ops(quick: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert quick() == 0
    out = capsys.readouterr().out
    assert "GB/s" in out
    assert "%" in out
    rows = rows_of(tmp_path / "ops.csv")
    assert set(rows[0]) == set(records.COLUMNS)
    times = {(row["direction"], row["rival"]): float(row["value"]) for row in rows if row["metric"] == "ms"}
    assert set(times) == {(d, r) for d in ("forward", "backward") for r in ("eager", "fused_resnet")}
    assert {row["value"] for row in rows if row["metric"] == "bytes"} == {str(3 * 4 * 4 * 5 * 6 * 4)}
    assert all(row["torch"] == torch.__version__ and row["date"] for row in rows)
    assert any("add_relu: " in row["note"] for row in rows if row["rival"] == "fused_resnet")


def test_it_resumes(quick: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Interrupted in the second case, it keeps the first and goes on with the second alone."""
    done: list[str] = []
    measure = bench.measure

    def counting(op: Any, case: Any, direction: str, *rest: Any) -> Any:
        if len(done) == 1:
            done.append("interrupted")
            raise KeyboardInterrupt
        done.append(direction)
        return measure(op, case, direction, *rest)

    monkeypatch.setattr(bench, "measure", counting)
    assert quick() == 130
    kept = {row["direction"] for row in rows_of(tmp_path / "ops.csv") if row["metric"] == "ms"}
    assert kept == {"forward"}
    assert quick() == 0
    assert done == ["forward", "interrupted", "backward"]
    assert quick() == 0
    assert len(done) == 3
    monkeypatch.setattr(records, "commit", lambda: "another")
    records.place.cache_clear()
    assert quick() == 0
    assert len(done) == 5, "other code is measured anew"
    assert {row["commit"] for row in rows_of(tmp_path / "ops.csv")} == {"another"}
    records.place.cache_clear()


def test_ctrl_c_within_the_rounds_loses_no_other_case(quick: Any, tmp_path: Path, monkeypatch: Any) -> None:
    calls: list[str] = []
    case_rows = bench.case_rows

    def noting(*args: Any) -> Any:
        calls.append("stored")
        return case_rows(*args)

    monkeypatch.setattr(bench, "case_rows", noting)
    measure = harness.measure
    monkeypatch.setattr(harness, "measure", lambda *args: (*measure(*args)[:1], not calls))
    assert quick() == 130
    assert calls == ["stored"]
    assert {row["direction"] for row in rows_of(tmp_path / "ops.csv") if row["metric"] == "ms"} == {"forward"}


def test_a_parity_failure_has_no_number_and_is_red(quick: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for backend in (cpp, reference):
        right = backend.add_relu_forward
        monkeypatch.setattr(backend, "add_relu_forward", lambda *args, right=right: right(*args) * 1.001)
    assert quick("--directions", "forward") == 1
    (row,) = (r for r in rows_of(tmp_path / "ops.csv") if r["rival"] == "fused_resnet")
    assert row["value"] == ""
    assert "not available: WrongResultError: output: relative error" in row["note"]


def test_a_full_disk_is_one_sentence_and_keeps_the_old_file(
    quick: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert quick() == 0
    before = (tmp_path / "ops.csv").read_bytes()
    capsys.readouterr()

    def full(self: Path, content: bytes) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        assert quick("--fresh") == 2
    error = capsys.readouterr().err.strip()
    assert "No space left on device" in error
    assert "\n" not in error
    assert (tmp_path / "ops.csv").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["ops.csv"]


@pytest.mark.parametrize(
    ("content", "words"),
    [(b"a,b\n1,2\n", "columns"), (b"\xff\xfe\x00bad", "cannot be read")],
    ids=["other columns", "no text"],
)
def test_a_foreign_file_is_refused_and_kept(
    quick: Any, tmp_path: Path, content: bytes, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "ops.csv").write_bytes(content)
    assert quick() == 2
    assert words in capsys.readouterr().err
    assert (tmp_path / "ops.csv").read_bytes() == content


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--ops", "softmax"], ["softmax", "bn_act"]),
        (["--out", "results.txt"], ["results.txt", ".csv"]),
        (["--rounds", "1"], ["at least 3"]),
        (["--directions", "sideways"], ["sideways", "backward"]),
    ],
)
def test_bad_requests(argv: list[str], words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    try:
        code: Any = main(["bench-ops", *argv])
    except SystemExit as exit:
        code = exit.code
    assert code == 2
    error = capsys.readouterr().err
    assert all(word in error for word in words)


def test_json_has_the_same_rows(tmp_path: Path) -> None:
    row = dict.fromkeys(records.KEY, "x") | {"value": 0.125, "metric": "ms"}
    for name in ("a.csv", "a.json"):
        records.Store(tmp_path / name, CPU).put([row])
    one, two = (records.read(tmp_path / name) for name in ("a.csv", "a.json"))
    assert [r | {"date": ""} for r in one] == [r | {"date": ""} for r in two]
    with pytest.raises(RequestError, match="cannot be read"):
        records.read(tmp_path / "missing.csv")


def test_launch_overhead(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    module = load_benchmarks("launch_overhead")
    monkeypatch.setattr(module, "CALLS", 1)
    monkeypatch.setattr(module, "ROUNDS", 1)
    monkeypatch.setattr("sys.argv", ["launch_overhead"])
    assert module.main() == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("triton     not measured: ")
    assert [line.split()[1] for line in lines if line.startswith("reference")] == [
        *dispatch.OPS["add_relu"],
        *dispatch.OPS["bn_act"],
    ]


def test_small_kernels(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """What a sanitizer watches on a GPU, here on the CPU: every op, every direction."""
    monkeypatch.setattr("sys.argv", ["small_kernels", "--dtype", "fp32"])
    assert small.main() == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == sum(len(op.directions) for op in OPS.values())
    assert all('"call"' in line for line in lines)
