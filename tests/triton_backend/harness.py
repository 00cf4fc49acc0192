"""What the tests of Triton kernels share. To add the kernels of fused_resnet/backends/triton/<name>.py:

1. Start them through `runtime.launch` and take their configs from `configs.pick` (register a `configs.Space`).
2. Numerics: `interpret_<name>.py`, ordinary pytest tests that run with TRITON_INTERPRET=1. Make inputs with `guarded`
   (or `like`), call the primitive inside `with track() as launches:`, compare with `assert_close`. Every load and store
   is checked to stay inside the tensors of its launch; `launches` also counts the bytes, see `Launch`.
3. Compilation: `aot_<name>.py` with `cases(full: bool)`, an iterable of `aot.Case`: calls of the primitives on CPU
   tensors, whose launches are compiled instead of run. `full=False` is what `make test` compiles (one config per kernel
   and dtype).
4. Add the name to `SUITES` in records.py. `make test-aot` then writes records/<name>.json; commit it.

    TRITON_INTERPRET=1 pytest tests/triton_backend/interpret_<name>.py      numerics alone
    python tests/triton_backend/aot.py --target sm_90 --suite <name>        compilation alone, one target per process

(The folder is not called tests/triton: pytest puts tests/ on sys.path, where it would pass for the package `triton`.)
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import tolerances
import torch
from torch import Tensor

from fused_resnet.backends.triton import runtime

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
GUARD = 64  # elements on each side: keeps 16-byte alignment


def guarded(
    shape: tuple[int, ...], dtype: torch.dtype, layout: str = "nhwc", *, seed: int = 0, std: float = 1.0
) -> Tensor:
    """A random tensor inside a larger NaN buffer; `layout` "nhwc" (torch's channels_last) or "nchw"."""
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * std
    return like(values.to(dtype), layout)


def like(values: Tensor, layout: str = "nhwc") -> Tensor:
    """A copy of `values` inside a larger NaN buffer."""
    buffer = torch.full((values.numel() + 2 * GUARD,), float("nan"), dtype=values.dtype)
    inner = buffer[GUARD : GUARD + values.numel()]
    if layout == "nhwc" and values.dim() == 4:
        n, c, h, w = values.shape
        view = inner.view(n, h, w, c).permute(0, 3, 1, 2)
    else:
        view = inner.view(values.shape)
    view.copy_(values)
    view.guard = buffer  # type: ignore[attr-defined]
    return view


def assert_guards(*tensors: Tensor) -> None:
    """The NaN around each tensor made by `guarded` or `like` is still there."""
    for tensor in tensors:
        buffer = tensor.guard  # type: ignore[attr-defined]
        around = torch.cat((buffer[:GUARD], buffer[-GUARD:]))
        assert around.isnan().all(), "a kernel wrote outside a tensor"


def assert_close(name: str, ours: Tensor, plain: Tensor, exact: Tensor, scale: float | None = None) -> None:
    """The error budget of tests/tolerances.py, per channel in the max-norm, and the strides of `plain`.

    `scale` is the size of what was added up on the way (default: of the largest result).
    """
    if scale is None:
        scale = exact.abs().max().item() if exact.numel() else 0.0
    tolerances.assert_in_budget(name, ours, plain, exact, scale)
    strides = [(a, b) for a, b, size in zip(ours.stride(), plain.stride(), ours.shape, strict=True) if size > 1]
    assert all(a == b for a, b in strides), f"{name}: strides {ours.stride()}, expected {plain.stride()}"


class Access(NamedTuple):
    """Bytes of one tensor that a launch touched: each once (unique), and as often as it asked for them (issued)."""

    unique: int
    issued: int


class Launch:
    """One launch in the interpreter: its kernel, grid, and per argument name what was loaded and stored."""

    def __init__(self, kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], meta: dict[str, Any]) -> None:
        self.kernel, self.grid, self.meta = kernel.__name__, grid, meta
        names = list(kernel.arg_names)
        self._spans = []
        for name, arg in [*zip(names, args, strict=False), *meta.items()]:
            base = getattr(arg, "base", arg)  # a tensor descriptor
            if isinstance(base, Tensor) and base.numel():
                last = sum((size - 1) * step for size, step in zip(base.shape, base.stride(), strict=True))
                size = base.element_size()
                touched = {kind: np.zeros(last + 1, dtype=bool) for kind in ("load", "store")}
                self._spans.append((name, base.data_ptr(), base.data_ptr() + (last + 1) * size, size, touched))
        self._issued: dict[tuple[str, str], int] = {}
        self.starts: dict[str, list[int]] = {}  # of each access in turn, the first byte touched

    def touch(self, kind: str, pointers: np.ndarray, mask: np.ndarray) -> None:
        mask = np.asarray(mask, dtype=bool)  # a scalar's may come as integers, a descriptor's as memory
        pointers = pointers[np.broadcast_to(mask, pointers.shape)]
        if not pointers.size:
            return
        low, high = int(pointers.min()), int(pointers.max())
        for name, begin, end, size, touched in self._spans:
            if begin <= low and high < end:
                touched[kind][(pointers - np.uint64(begin)) // np.uint64(size)] = True
                self._issued[kind, name] = self._issued.get((kind, name), 0) + pointers.size * size
                self.starts.setdefault(name, []).append(low - begin)
                return
        raise IndexError(f"{self.kernel}: a {kind} outside the tensors of the launch")

    def _accesses(self, kind: str) -> dict[str, Access]:
        return {
            name: Access(int(touched[kind].sum()) * size, self._issued[kind, name])
            for name, _, _, size, touched in self._spans
            if (kind, name) in self._issued
        }

    @property
    def loads(self) -> dict[str, Access]:
        return self._accesses("load")

    @property
    def stores(self) -> dict[str, Access]:
        return self._accesses("store")

    @property
    def total(self) -> Access:
        parts = [*self.loads.values(), *self.stores.values()]
        return Access(sum(p.unique for p in parts), sum(p.issued for p in parts))


_current: list[Launch] = []


@contextlib.contextmanager
def track() -> Iterator[list[Launch]]:
    """Yields the list of launches made inside the block, each with its accesses counted and checked."""
    launches: list[Launch] = []
    before = runtime.launcher

    def launcher(kernel: Any, grid: tuple[int, ...], *args: Any, **meta: Any) -> None:
        launch = Launch(kernel, grid, args, meta)
        launches.append(launch)
        _current.append(launch)
        try:
            before(kernel, grid, *args, **meta)
        finally:
            _current.pop()

    runtime.launcher = launcher
    try:
        yield launches
    finally:
        runtime.launcher = before


def patch_interpreter() -> None:
    """Make Triton's interpreter round to bf16 as the hardware does, count accesses, and start nested calls faster."""
    assert os.environ.get("TRITON_INTERPRET") == "1"
    import triton.language as tl
    from triton.runtime import interpreter
    from triton.runtime.interpreter import InterpretedFunction, InterpreterBuilder, TensorHandle

    def to_bf16(values: np.ndarray) -> np.ndarray:
        bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
        rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
        return np.where(np.isnan(values), np.uint32(0x7FC0), rounded).astype(np.uint16)

    def from_bf16(bits: np.ndarray) -> np.ndarray:
        return (np.ascontiguousarray(bits).astype(np.uint32) << np.uint32(16)).view(np.float32)

    cast, fp_to_fp = InterpreterBuilder.cast_impl, InterpreterBuilder.create_fp_to_fp

    def convert(self: Any, src: Any, dst_type: Any, otherwise: Any) -> Any:
        source, target = src.dtype.scalar, dst_type.scalar
        if source == tl.float32 and target == tl.bfloat16:
            return TensorHandle(to_bf16(src.data), target)
        if source == tl.bfloat16 and target == tl.float32:
            return TensorHandle(from_bf16(src.data), target)
        return otherwise()

    def cast_impl(self: Any, src: Any, dst_type: Any) -> Any:
        return convert(self, src, dst_type, lambda: cast(self, src, dst_type))

    def create_fp_to_fp(self: Any, src: Any, dst_type: Any, rounding: Any) -> Any:
        return convert(self, src, dst_type, lambda: fp_to_fp(self, src, dst_type, rounding))

    dot = InterpreterBuilder.create_dot

    def create_dot(self: Any, a: Any, b: Any, d: Any, *args: Any) -> Any:
        a, b = (TensorHandle(from_bf16(t.data), tl.float32) if t.dtype.scalar == tl.bfloat16 else t for t in (a, b))
        return dot(self, a, b, d, *args)

    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

    def create_masked_load(self: Any, pointers: Any, mask: Any, *args: Any, **options: Any) -> Any:
        if _current:
            _current[-1].touch("load", pointers.data, mask.data)
        return load(self, pointers, mask, *args, **options)

    def create_masked_store(self: Any, pointers: Any, value: Any, mask: Any, *args: Any) -> Any:
        if _current:
            _current[-1].touch("store", pointers.data, mask.data)
        return store(self, pointers, value, mask, *args)

    for function in (cast_impl, create_fp_to_fp, create_dot, create_masked_load, create_masked_store):
        setattr(InterpreterBuilder, function.__name__, function)

    patched: set[int] = set()

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        # The launch has patched triton.language; Triton's own library functions use triton.language.core.
        names = self.fn.__globals__
        if names.get("tl") is not tl and id(names) not in patched:
            patched.add(id(names))
            interpreter._patch_lang(self.fn)
        return self.rewrite()(*args, **kwargs)

    InterpretedFunction.__call__ = call
