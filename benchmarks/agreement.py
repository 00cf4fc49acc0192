"""Do the fused nets agree with the plain one? Shown before any time, against float64 and by an error budget.

A result passes where its error is at most twice what torch's own layers make in the same dtype
(`fused_resnet.parity`); the plain net of `plain_resnet` is the reference, so nothing of ours is compared with itself.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fused_resnet.dispatch import BackendUnavailableError
from fused_resnet.parity import (
    FACTOR,
    Comparison,
    compare,
    granted_errors,
    nudged,
    relative_error,
    without_chance,
)

from .harness import one_line
from .rivals import WHAT, Entry, Job, Rival, title

CROPS, CLASSES = 64, 5  # over how many crops the classes are compared, and how many classes must occur there
CHUNK = 16
EXACT = 4  # crops that are also computed in float64
T = TypeVar("T")
Advance = Callable[[str], None]


def _use(row: Comparison) -> float:
    """The part of its budget that a tensor uses."""
    return row.ours / row.budget if row.budget else 0.0 if row.ok else math.inf


@dataclass
class Agreement:
    """What was compared for one of ours; `problems` is empty where all is well."""

    name: str
    mode: str
    rows: list[Comparison] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        return not self.problems

    def hold(self, rows: list[Comparison]) -> None:
        self.rows += rows
        bad = [row for row in rows if not row.ok]
        if bad:
            worst = max(bad, key=_use)
            self.problems.append(
                f"{len(bad)} of {len(rows)} tensors outside the error budget, the worst {worst.name}: relative error "
                f"{worst.ours:.1e}, allowed {worst.budget:.1e}"
            )

    def as_dict(self) -> dict[str, Any]:
        """For JSON: of the tensors the worst of each kind, and those that failed."""
        shown = [worst for _, _, worst in self.kinds()] + [row for row in self.rows if not row.ok]
        tensors = [row._asdict() for row in dict.fromkeys(shown)]
        counts = {"compared": len(self.rows), "within_budget": sum(row.ok for row in self.rows)}
        return {"mode": self.mode, "ok": self.ok, "problems": self.problems, **self.facts, **counts, "tensors": tensors}

    def kinds(self) -> list[tuple[str, list[Comparison], Comparison]]:
        """(kind, its rows, the one that uses the largest part of its budget), for each kind of tensor."""
        groups: dict[str, list[Comparison]] = {}
        for row in self.rows:
            groups.setdefault(row.name.split(" ")[0], []).append(row)
        return [(kind, rows, max(rows, key=_use)) for kind, rows in groups.items()]


def _attempt(result: Agreement, compute: Callable[[], T]) -> T | None:
    """What `compute` gives; None where it raises, which is a problem of the result."""
    try:
        return compute()
    except BackendUnavailableError:  # asked for by the user
        raise
    except Exception as error:
        result.problems.append(f"it fails with {one_line(error)}")
        return None


@torch.no_grad()
def _logits(job: Job, entry: Entry, crops: Tensor) -> Tensor:
    with job.autocast():
        x = crops.to(job.x.device, job.dtype if job.cast else None)
        parts = [entry.net(entry.images(chunk)).float() for chunk in x.split(CHUNK)]
    return torch.cat(parts).cpu()


def _exact_net(job: Job) -> nn.Module:
    return job.plain().double()


def infer_agreement(job: Job, ours: list[Rival], crops: Tensor, advance: Advance) -> list[Agreement]:
    """Logits against float64 on a few crops, and the top-1 class on all of them."""
    job = job.with_mode("infer")
    net = job.plain()
    advance("torch's logits")
    plain = _logits(job, Entry(net), crops)
    advance("logits in float64")
    with torch.no_grad():
        exact = _exact_net(job)(crops[:EXACT].to(job.x.device, torch.float64)).cpu()
    allowed = FACTOR * (plain[:EXACT].double() - exact).abs().max().item()
    top = plain.topk(2).values
    margins, classes = top[:, 0] - top[:, 1], plain.argmax(1)
    occurring = classes.unique().numel()

    found = []
    for one in ours:
        advance(f"logits of {title(one.name, job.model)}")
        result = Agreement(one.name, "infer")
        found.append(result)
        logits = _attempt(result, lambda one=one: _logits(job, one.prepare(job), crops))
        if logits is None:
            continue
        result.hold([compare("logits", logits[:EXACT], plain[:EXACT], exact)])
        differ = logits.argmax(1) != classes
        # Two logits closer than twice the error that torch itself may make have no order.
        close = margins <= 2 * allowed
        wrong, excused = int((differ & ~close).sum()), int((differ & close).sum())
        result.facts = {
            "crops": len(crops),
            "classes": occurring,
            "agree": len(crops) - wrong - excused,
            "near_ties": excused,
            "max_abs": (logits - plain).abs().max().item(),
            "relative": relative_error(logits, plain),
        }
        if wrong:
            result.problems.append(f"the top-1 class differs on {wrong} of {len(crops)} crops")
        if len(crops) < CROPS:
            result.problems.append(f"only {len(crops)} crops, at least {CROPS} are needed")
        if occurring < CLASSES:
            result.problems.append(f"only {occurring} classes occur over the crops, at least {CLASSES} are needed")
    return found


def _training_step(job: Job, entry: Entry, x: Tensor) -> dict[str, Tensor]:
    """Loss, gradients and buffers after one step; the net's parameters stay as they are."""
    assert entry.model is not None
    entry.model.zero_grad(set_to_none=True)
    with job.autocast() if x.dtype != torch.float64 else torch.autocast(x.device.type, enabled=False):
        loss = F.cross_entropy(entry.net(entry.images(x)), job.target[: len(x)])
    loss.backward()
    named = {"loss": loss.detach()}
    named |= {f"gradient {name}": p.grad for name, p in entry.model.named_parameters() if p.grad is not None}
    return named | {f"buffer {name}": b.detach().clone() for name, b in entry.model.named_buffers()}


def _equally_good(job: Job, x: Tensor) -> Iterator[dict[str, Tensor]]:
    """torch's own step in another layout, and with the input changed by one rounding: what chance does to gradients."""
    for change in (False, True):
        net = job.plain().to(memory_format=torch.channels_last)
        noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0)).to(x) * torch.finfo(job.dtype).eps
        yield _training_step(job, Entry(net, True, net), x + x * noise if change else x)


def train_agreement(job: Job, ours: list[Rival], advance: Advance) -> list[Agreement]:
    """Loss, every gradient and every running statistic of one training step on (some of) the job's batch."""
    job = job.with_mode("train")
    x = job.x[: EXACT if job.x.device.type == "cpu" else 32]

    @functools.cache
    def truth(attempt: int) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor], dict[str, float]]:
        """(the input, torch's step, the exact one, the errors that chance makes); see `parity.verify` on attempts."""
        given = nudged(x, attempt, 0.5) if attempt else x
        advance("torch's training step")
        net = job.plain()
        plain = _training_step(job, Entry(net, False, net), given)
        advance("training step in float64")
        net = _exact_net(job)
        exact = _training_step(job, Entry(net, False, net), given.double())
        advance("torch's training step in other ways")
        return given, plain, exact, granted_errors(_equally_good(job, given), exact)

    def compared(one: Rival, attempt: int, result: Agreement) -> list[Comparison]:
        given, plain, exact, granted = truth(attempt)
        results = _training_step(job, one.prepare(job), given)
        if results.keys() != exact.keys() and not attempt:
            missing = sorted(results.keys() ^ exact.keys())
            result.problems.append(f"{len(missing)} gradients or buffers are missing or too many, first {missing[0]}")
        return [compare(n, results[n], plain[n], exact[n], granted=granted[n]) for n in exact if n in results]

    def settled(one: Rival, result: Agreement) -> list[Comparison]:
        return without_chance(compared(one, 0, result), lambda attempt: compared(one, attempt, result))

    truth(0)
    found = []
    for one in ours:
        advance(f"training step of {title(one.name, job.model)}")
        result = Agreement(one.name, "train")
        found.append(result)
        rows = _attempt(result, lambda one=one, result=result: settled(one, result))
        if rows is not None:
            result.facts = {"crops": len(x)}
            result.hold(rows)
    return found


def lines(result: Agreement, model: str) -> list[str]:
    """The comparison in words, one fact a line."""
    verdict = "ok" if result.ok else "FAILED"
    out = [f"parity {verdict}: {title(result.name, model)}, {WHAT[result.mode]} (errors against float64)"]
    facts = result.facts
    if "max_abs" in facts:
        out += [
            f"  top-1       {facts['agree']} of {facts['crops']} crops agree; {facts['classes']} classes occur"
            + (f"; {facts['near_ties']} differ within torch's own error" if facts["near_ties"] else ""),
            f"  all logits  differ from torch's by up to {facts['max_abs']:.1e}, relative {facts['relative']:.1e}",
        ]
    labels = {"logits": "logits", "loss": "loss", "gradient": "gradients", "buffer": "statistics"}
    for kind, rows, worst in result.kinds():
        text = f"{worst.ours:.1e} (torch {worst.torch:.1e}, allowed {worst.budget:.1e})"
        if kind in ("gradient", "buffer"):
            good, largest = sum(row.ok for row in rows), max(row.max_abs for row in rows)
            text = f"{good} of {len(rows)} in budget, worst {worst.name.removeprefix(kind + ' ')} {text}"
            text += f"; up to {largest:.1e} from torch's"
        out.append(f"  {labels[kind]:<11} {text}")
    return out + [f"  problem     {problem}" for problem in result.problems]
