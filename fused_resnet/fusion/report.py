"""What `fused_resnet.fuse` did, in full."""

from __future__ import annotations

from collections import Counter


class FuseReport:
    """The result of `fused_resnet.fuse`: prints as a table.

    Attributes:
        fused: (name, what) of each fused unit; the name is its batch norm's, or the scope's and the node's.
        skipped: (name, why) of each batch norm that is in no unit.
        blocks: (name of the module, its units) of each residual block that may run as one op in training.
    """

    def __init__(
        self, fused: list[tuple[str, str]], skipped: list[tuple[str, str]], blocks: list[tuple[str, str]] | None = None
    ) -> None:
        self.fused = fused
        self.skipped = skipped
        self.blocks = blocks or []

    def __repr__(self) -> str:
        return f"FuseReport({len(self.fused)} fused, {len(self.skipped)} skipped, {len(self.blocks)} whole blocks)"

    def __str__(self) -> str:
        counts = ", ".join(f"{n} x {what}" for what, n in Counter(what for _, what in self.fused).most_common())
        lines = [f"{len(self.fused)} fused{': ' * bool(counts)}{counts}; {len(self.skipped)} batch norms skipped"]
        if self.blocks:
            lines[0] += f"; {len(self.blocks)} residual blocks whole"
        width = max((len(name) for name, _ in (*self.fused, *self.skipped, *self.blocks)), default=0)
        lines += [f"  {name:<{width}}  {what}" for name, what in self.fused]
        lines += [f"  {name:<{width}}  one op in training: {units}" for name, units in self.blocks]
        lines += [f"  {name:<{width}}  skipped: {why}" for name, why in self.skipped]
        return "\n".join(lines)
