"""Does fused equal unfused? Measured against float64, by an error budget instead of a tolerance picked by hand.

A tensor passes where |ours - exact| <= 2 |torch - exact| + tiny: fused code may round differently from torch, but not
worse. `exact` is the unfused computation in float64, `torch` the unfused one in the dtype at hand.
"""

from __future__ import annotations

import contextlib
import copy
import math
import statistics
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fused_resnet.convert import restore, unfused_units
from fused_resnet.modules import FusedModule
from fused_resnet.ops.checks import autocast_dtype, is_channels_last

FACTOR = 2.0
TINY = {torch.float64: 1e-10}  # there is no wider type to be exact in; elsewhere 4 units of rounding


class ParityError(AssertionError):
    """Fused and unfused results differ by more than the error budget; `report` holds the comparison."""

    def __init__(self, message: str, report: Report | None = None) -> None:
        super().__init__(message)
        self.report = report


class Comparison(NamedTuple):
    """One tensor: relative errors in the L2 norm against float64, the largest difference, and the verdict."""

    name: str
    ours: float
    torch: float
    budget: float
    max_abs: float
    ok: bool

    @property
    def used(self) -> float:
        """The part of its budget that the error takes."""
        return math.inf if self.budget == 0 and not self.ok else self.ours / (self.budget or 1)


def relative_error(value: Tensor, exact: Tensor, least: float = 0.0) -> float:
    """|value - exact| / max(|exact|, least) in the L2 norm over the finite entries; infinite where NaN or Inf do not
    match."""
    value, exact = value.detach().double().reshape(-1), exact.detach().double().reshape(-1)
    finite = torch.isfinite(exact)
    if not bool(finite.all()):
        special = ~finite
        if not torch.allclose(value[special], exact[special], equal_nan=True):
            return math.inf
        value, exact = value[finite], exact[finite]
    error = torch.linalg.vector_norm(value - exact).item()
    scale = max(torch.linalg.vector_norm(exact).item(), least)
    if not math.isfinite(error):
        return math.inf
    return error / scale if scale else error


def compare(
    name: str, ours: Tensor, plain: Tensor, exact: Tensor, *, granted: float = 0.0, least: float = 0.0
) -> Comparison:
    """Hold `ours` against the budget that `plain`, torch's result in the same dtype, sets around `exact`.

    `granted` is a relative error that torch is known to make elsewhere, if larger than here; `least` the norm that
    errors are relative to where the tensor's own is smaller. Shapes and dtypes must agree; integers must be equal.
    """
    if ours.shape != plain.shape or ours.dtype != plain.dtype:
        return Comparison(name, math.inf, 0.0, 0.0, math.inf, False)
    if not ours.is_floating_point():
        equal = torch.equal(ours, plain)
        return Comparison(name, 0.0 if equal else math.inf, 0.0, 0.0, 0.0 if equal else math.inf, equal)
    error, allowed = relative_error(ours, exact, least), relative_error(plain, exact, least)
    budget = FACTOR * max(allowed, granted) + TINY.get(ours.dtype, 4 * torch.finfo(ours.dtype).eps)
    difference = (ours.detach().double() - plain.detach().double()).abs()
    max_abs = difference.max().item() if difference.numel() else 0.0
    return Comparison(name, error, allowed, budget, max_abs, error <= budget)


class Report:
    """What `verify` found: a list of `Comparison` in `rows`; prints as a few lines, the worst first.

    `layers` compares, in the forward pass and in its order, the output of each module that holds fused units.
    """

    def __init__(
        self,
        rows: list[Comparison],
        unfused: list[tuple[str, str]],
        train: bool,
        layers: list[Comparison] | None = None,
    ) -> None:
        self.rows = rows
        self.layers = layers or []
        self.unfused = unfused
        self.train = train

    @property
    def ok(self) -> bool:
        return all(row.ok for row in self.rows)

    @property
    def worst(self) -> Comparison:
        """The tensor that uses the largest part of its budget."""
        return max(self.rows, key=lambda row: row.used)

    @property
    def worst_layer(self) -> Comparison | None:
        """The first module whose output is outside its budget, or else the one that uses the largest part of it."""
        failed = [row for row in self.layers if not row.ok]
        if failed or not self.layers:
            return failed[0] if failed else None
        return max(self.layers, key=lambda row: row.used)

    @property
    def outputs(self) -> list[Comparison]:
        return [row for row in self.rows if row.name.startswith("output")]

    def __str__(self) -> str:
        worst = self.worst
        lines = [
            f"parity {'ok' if self.ok else 'FAILED'} ({'training' if self.train else 'inference'}): "
            f"{sum(row.ok for row in self.rows)} of {len(self.rows)} tensors within the error budget; worst "
            f"{worst.name}: relative error {worst.ours:.2e}, torch's own {worst.torch:.2e}, allowed {worst.budget:.2e}"
        ]
        layer = self.worst_layer
        if layer is not None:
            which = "worst" if self.ok or layer.ok else "first wrong"
            lines.append(
                f"  {which} layer {layer.name}: relative error {layer.ours:.2e}, "
                f"torch's own {layer.torch:.2e}, allowed {layer.budget:.2e}"
            )
        lines += [f"  {name} runs unfused: {reason}" for name, reason in self.unfused]
        return "\n".join(lines)


@torch.inference_mode(False)
def verify(model: nn.Module, x: Tensor, *, train: bool = False, seed: int = 0) -> Report:
    """Compare the fused model with itself unfused, on deep copies; the model is not touched.

    In inference the outputs are compared; in training the outputs, every gradient and every buffer (running
    statistics) after one step. Runs under the autocast mode that is active; the exact reference is float64.

    A ReLU whose input is near 0 may open in one computation and stay shut in the other, so gradients of deep networks
    scatter far more than rounding alone. In training the budget is therefore set by the largest of torch's errors over
    three equally good computations: as given, in the other memory layout, and with the input changed by one rounding.
    And where nothing but gradients is outside it, all is computed anew, up to three times, on inputs that differ in the
    lower half of their digits: what is wrong stays wrong there, while another ReLU is near 0. Only gradients that are
    outside their budget each time fail.

    Args:
        model: any module built of `fused_resnet`'s blocks.
        x: an input batch.
        train: compare a training step instead of inference.
        seed: of the random cotangent that stands for a loss, and of dropout and the like.

    Returns:
        A `Report`.

    Raises:
        ParityError: a tensor is outside its error budget; names the worst. ValueError: no tensor came out.
    """
    x = x.clone() if x.is_inference() else x
    report = _compared(model, x, train, seed)
    if x.is_floating_point():
        again = lambda attempt: _compared(model, nudged(x, seed + attempt, 0.5), train, seed).rows  # noqa: E731
        report = Report(without_chance(report.rows, again), report.unfused, report.train, report.layers)
    if not report.ok:
        raise ParityError(str(report), report)
    return report


_AGAIN = 3


def without_chance(rows: list[Comparison], again: Callable[[int], list[Comparison]]) -> list[Comparison]:
    """The rows; where none but gradients fail, joined with those of attempts 1, 2 and 3 until none fails."""
    for attempt in range(1, 1 + _AGAIN):
        failed = [row for row in rows if not row.ok]
        if not failed or any(not row.name.startswith("gradient") for row in failed):
            break
        rows = _joined(rows, again(attempt))
    return rows


def _joined(first: list[Comparison], second: list[Comparison]) -> list[Comparison]:
    """Of two comparisons of one model the better row of each gradient, and the worse of what is continuous."""
    rows = []
    for pair in zip(first, second, strict=True):
        pick = min if pair[0].name.startswith("gradient") else max
        rows.append(pick(pair, key=lambda row: row.used))
    return rows


def _compared(model: nn.Module, x: Tensor, train: bool, seed: int) -> Report:
    """All tensors of one pass, ours and torch's, against float64."""
    fused = copy.deepcopy(model)
    plain = restore(copy.deepcopy(model))
    exact = restore(copy.deepcopy(model)).double()
    device = x.device.type
    names = [name for name, module in fused.named_modules() if isinstance(module, FusedModule)]
    with _outputs(fused, names) as our_layers, _outputs(plain, names) as their_layers:
        ours, theirs = _run(fused, x, train, seed), _run(plain, x, train, seed)
    with torch.autocast(device, enabled=False), _outputs(exact, names) as true_layers:
        truth = _run(exact, x.double(), train, seed)
    if not truth:
        raise ValueError("verify: the model's output holds no tensor to compare")
    granted = granted_errors(_equally_good(model, x, seed) if train else (), truth)
    rows = [
        compare(name, ours[name], theirs[name], truth[name], granted=granted[name], least=_least(name, truth))
        for name in truth
    ]
    layers = [
        compare(name, our_layers[name], their_layers[name], true_layers[name])
        for name in true_layers
        if name in our_layers and name in their_layers
    ]
    return Report(rows, unfused_units(fused.train(train)), train, layers)


def _least(name: str, truth: dict[str, Tensor]) -> float:
    """Running means matter beside standard deviations: behind a centred input they are nothing but rounding."""
    var = truth.get(f"{name.removesuffix('mean')}var") if name.endswith("running_mean") else None
    return 0.0 if var is None else torch.linalg.vector_norm(var.double().sqrt()).item()


@contextlib.contextmanager
def _outputs(model: nn.Module, names: list[str]) -> Iterator[dict[str, Tensor]]:
    """The outputs of the named modules, by their last call, in the order of the calls."""
    found: dict[str, Tensor] = {}

    def keep(name: str, out: Any) -> None:
        if isinstance(out, Tensor):
            found.pop(name, None)
            found[name] = out.detach().clone()

    modules = dict(model.named_modules())
    handles = [
        modules[name].register_forward_hook(lambda module, args, out, name=name: keep(name or "the model", out))
        for name in names
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def granted_errors(alternatives: Iterable[dict[str, Tensor]], truth: dict[str, Tensor]) -> dict[str, float]:
    """Per name ("kind rest"), the largest relative error of equally good computations: of this tensor, or the median
    of its kind where that is larger."""
    granted = dict.fromkeys(truth, 0.0)
    for others in alternatives:
        errors = {
            n: relative_error(others[n], truth[n], _least(n, truth)) for n in truth if truth[n].is_floating_point()
        }
        for name, error in errors.items():
            kind = name.split(" ")[0]
            typical = statistics.median(e for n, e in errors.items() if n.split(" ")[0] == kind)
            granted[name] = max(granted[name], error, typical)
    return granted


def _equally_good(model: nn.Module, x: Tensor, seed: int) -> Iterator[dict[str, Tensor]]:
    """Unfused training steps that differ from the given one by the order of sums, or by one rounding of the input."""
    plain = restore(copy.deepcopy(model))
    if x.dim() == 4:
        other = torch.contiguous_format if is_channels_last(x) else torch.channels_last
        yield _run(plain, x.contiguous(memory_format=other), True, seed)
    if x.is_floating_point():
        yield _run(restore(copy.deepcopy(model)), nudged(x, seed, 1.0), True, seed)


def nudged(x: Tensor, seed: int, digits: float) -> Tensor:
    """x changed in the last of the digits that the model computes in, 1.0, or in the lower half of them, 0.5."""
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed)).to(x)
    return x + x * noise * torch.finfo(autocast_dtype(x) or x.dtype).eps ** digits


def _run(model: nn.Module, x: Tensor, train: bool, seed: int) -> dict[str, Tensor]:
    """The named results of one pass: outputs, and in training gradients and buffers."""
    model.train(train)
    with torch.random.fork_rng(devices=[x.device] if x.is_cuda else []), torch.set_grad_enabled(train):
        torch.manual_seed(seed)
        if train and x.is_floating_point():
            x = x.detach().requires_grad_()
        outputs = [leaf for leaf in pytree.tree_leaves(model(x)) if isinstance(leaf, Tensor)]
        named: dict[str, Tensor] = {f"output {i}": out.detach() for i, out in enumerate(outputs)}
        if not train:
            return named
        torch.manual_seed(seed)
        loss: Any = sum(
            (out * torch.randn(out.shape, dtype=torch.float64).to(out)).sum() for out in outputs if out.requires_grad
        )
        loss.backward()
    if x.grad is not None:
        named["gradient input"] = x.grad
    named |= {f"gradient {name}": p.grad for name, p in model.named_parameters() if p.grad is not None}
    return named | {f"buffer {name}": buffer.detach() for name, buffer in model.named_buffers()}
