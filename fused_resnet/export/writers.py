"""Folded models as files: ONNX, and torch's own exported programs (.pt2)."""

from __future__ import annotations

import contextlib
import errno
import importlib.util
import io
import json
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx.experimental import _config

from fused_resnet._version import __version__
from fused_resnet.export.plain import to_plain


def to_program(
    name: str,
    model: nn.Module,
    example: Tensor,
    dynamic_batch: bool,
    dynamic_size: bool,
    dtype: torch.dtype | None,
    device: torch.device | None = None,
    batches: tuple[int, int | None] = (1, None),
) -> ExportedProgram:
    """The folded model as an exported program for batches of `batches` sizes (from, to) where they may change.

    `name` is the caller's, for errors; a dtype or device of None is the model's.
    """
    if not isinstance(example, Tensor) or example.dim() < 2 or not example.numel():
        got = f"shape {tuple(example.shape)}" if isinstance(example, Tensor) else type(example).__name__
        raise ValueError(f"{name}: example must be a batch of images, (N, C, H, W), got {got}")
    plain = to_plain(model).to(device=device, dtype=dtype)
    parameter = next(plain.parameters(), example)
    example = example.detach().to(parameter.device, parameter.dtype)
    if dynamic_batch and len(example) == 1:
        example = torch.cat([example, example])  # a size of 1 would become a constant
    dynamic = {}
    for d, axis in _dynamic(example, dynamic_batch, dynamic_size).items():
        least, most = batches if d == 0 else (1, None)
        dynamic[d] = torch.export.Dim(axis, min=least, max=most)
    # Else 1x1 feature maps, which torch treats apart, would be excluded.
    oblivious = _config.patch(backed_size_oblivious=True)  # type: ignore[attr-defined]
    with torch.no_grad(), oblivious, warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of torch about itself
        try:
            return torch.export.export(plain, (example,), dynamic_shapes=(dynamic or None,))
        except Exception as error:
            reason = str(error).strip().partition("\n")[0]
            if "Constraints violated" in reason:
                reason = f"not every {' and '.join(axis.__name__ for axis in dynamic.values())} will do; fix the sizes"
            raise ValueError(f"{name}: {type(model).__name__} cannot be exported: {reason}") from error


def _dynamic(example: Tensor, batch: bool, size: bool) -> dict[int, str]:
    """dimension -> its name, of those that may change."""
    names = {0: "batch"} if batch else {}
    if size:
        spatial = ("depth", "height", "width")[max(0, 5 - example.dim()) :]
        names |= {d: spatial[d - 2] for d in range(2, example.dim())}
    return names


def to_onnx(
    model: nn.Module,
    example: Tensor,
    path: str | os.PathLike[str],
    *,
    dynamic_batch: bool = True,
    dynamic_size: bool = False,
    dtype: torch.dtype | None = None,
) -> Path:
    """Write the model, folded (`to_plain`), as one ONNX file with input "images" and output "logits".

    Args:
        model: as in `to_plain`; it is not touched.
        example: a batch of images, (N, C, H, W), on the model's device; only its shape matters.
        path: the file, replaced as a whole: a failure leaves what was there.
        dynamic_batch: whether any batch size will do, or the example's alone.
        dynamic_size: whether any height and width will do, or the example's alone.
        dtype: of weights, images and logits, for instance torch.float16; None keeps the model's.

    Returns:
        The path.

    Raises:
        ValueError: the model cannot be traced or exported, or `example` is no batch. ModuleNotFoundError: onnx or
        onnxscript is missing. OSError: the file cannot be written.
    """
    missing = [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]
    if missing:
        raise ModuleNotFoundError(f"to_onnx needs {' and '.join(missing)}: pip install 'fused_resnet[onnx]'")
    with replacing(path) as temporary:
        program = to_program("to_onnx", model, example, dynamic_batch, dynamic_size, dtype)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            warnings.simplefilter("ignore", DeprecationWarning)
            exported: Any = torch.onnx.export(
                program,
                dynamo=True,
                verbose=False,
                input_names=["images"],
                output_names=["logits"],
                dynamic_shapes=(_dynamic(example, dynamic_batch, dynamic_size),),
            )
        exported.model.metadata_props.update(_mark(model))
        exported.save(temporary, external_data=False)
    return Path(path)


def to_pt2(
    model: nn.Module,
    example: Tensor,
    path: str | os.PathLike[str],
    *,
    dynamic_batch: bool = True,
    dynamic_size: bool = False,
    dtype: torch.dtype | None = None,
) -> Path:
    """Write the model, folded (`to_plain`), as an exported program of ATen ops alone.

    `torch.export.load(path).module()` runs it where fused_resnet is not installed. Arguments, result and errors as in
    `to_onnx`, which alone needs other packages.
    """
    with replacing(path) as temporary:
        program = to_program("to_pt2", model, example, dynamic_batch, dynamic_size, dtype)
        buffer = io.BytesIO()
        torch.export.save(program, buffer, extra_files={"fused_resnet.json": json.dumps(_mark(model))})
        temporary.write_bytes(buffer.getbuffer())
    return Path(path)


def _mark(model: nn.Module) -> dict[str, str]:
    return {"producer": f"fused_resnet {__version__}", "model": type(model).__name__, "batch_norm": "folded"}


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary path beside `path`, renamed to it at the end of the block, and removed if the block fails.

    Raises:
        OSError: there is no such folder, or nothing can be written there; before the block runs.
    """
    target = Path(os.path.realpath(path))  # a link stays one
    if target.is_dir():
        raise IsADirectoryError(errno.EISDIR, "it is a folder", str(path))
    if not target.parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, "there is no such folder", str(target.parent))
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp{target.suffix}")
    try:
        temporary.touch()
        yield temporary
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
