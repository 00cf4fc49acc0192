"""`fused-resnet export`: a network of the family as a file for another runtime, run on photographs before it counts."""

from __future__ import annotations

import copy
import importlib.metadata
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

import fused_resnet
from fused_resnet import tensorrt
from fused_resnet.cli import RequestError, load_benchmarks
from fused_resnet.convert import restore
from fused_resnet.export.writers import replacing, to_onnx, to_pt2
from fused_resnet.parity import FACTOR, compare

DTYPES = {"fp32": torch.float32, "fp16": torch.float16}
CROPS, EXACT = 16, 4  # compared by top-1 class, and by logits in float64
BATCHES = (1, 8, 64)  # smallest, optimal and largest of a TensorRT engine, where the batch is not fixed
Run = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Request:
    """What the user asked for. `batch` None: any size; `dtype` None: the format's own."""

    to: str
    out: Path
    model: str = "resnet50"
    weights: str | None = None
    num_classes: int = 1000
    dtype: str | None = None
    size: int = 224
    batch: int | None = None
    any_size: bool = False
    images: tuple[str, ...] = ()


def export(request: Request) -> int:
    """Write, run and compare; the file appears only where all went well. Returns 0, or 1 where parity failed."""
    try:
        with replacing(request.out) as temporary:
            return _export(request, temporary)
    except _Disagreement:
        print(f"{request.out} was not written")
        return 1
    except OSError as error:
        raise RequestError(f"--out {request.out} cannot be written: {error.strerror or error}") from error


class _Disagreement(Exception):
    """Parity failed: no file may be left."""


def _export(request: Request, path: Path) -> int:
    write, load, runtime = _FORMATS[request.to](request)
    dtype = DTYPES[request.dtype or ("fp16" if request.to == "tensorrt" else "fp32")]
    with tqdm(total=4, desc="export", leave=False, bar_format="{desc} |{bar}| {n_fmt}/{total_fmt} {elapsed}") as bar:

        def stage(what: str) -> None:
            bar.set_description(f"export: {what}")
            bar.update()

        stage("photographs and model")
        photographs, names = _images(request)
        crops = load_benchmarks("photographs").crops(photographs, max(CROPS, request.batch or 0), request.size)
        model = _model(request, crops)
        stage(f"{request.to}, {path.suffix}")
        example = crops[: request.batch or 2]
        write(model, example, path, dtype)
        stage("running the file")
        ours = _in_batches(load(path), crops.to(dtype), request.batch)
        stage("the same by torch, unfused")
        line, good = _agreement(model, crops, ours, dtype)
    sizes = f"{request.batch or 'N'}x3x" + ("HxW" if request.any_size else f"{request.size}x{request.size}")
    print(
        f"{request.model}, {str(dtype).removeprefix('torch.')}, images {sizes}, {runtime}; crops of {', '.join(names)}"
    )
    if request.weights is None:
        print("weights: none were given, so seeded random ones with batch norm's statistics of the photographs")
    print(line)
    if not good:
        raise _Disagreement
    print(f"wrote {request.out}, {path.stat().st_size / 1e6:.1f} MB")
    return 0


def _images(request: Request) -> tuple[list[Any], list[str]]:
    photographs = load_benchmarks("photographs")
    if request.images:
        return [photographs.open_image(path) for path in request.images], [Path(path).name for path in request.images]
    found = photographs.bundled()
    return list(found.values()), list(found)


def _model(request: Request, crops: Tensor) -> nn.Module:
    build = getattr(fused_resnet, request.model)
    torch.manual_seed(0)
    if request.weights is None:
        return load_benchmarks("realistic").make_realistic(build(num_classes=request.num_classes), crops)
    try:
        return build(weights=request.weights, num_classes=request.num_classes).eval()
    except (ValueError, OSError, ModuleNotFoundError) as error:
        raise RequestError(f"--weights: {error}") from error


def _in_batches(run: Run, crops: Tensor, batch: int | None) -> Tensor:
    """The logits of all crops, in batches as the file takes them: of any size (two are tried), or of its own."""
    sizes = [batch] * (len(crops) // batch) if batch else [1, len(crops) - 1]
    taken = crops[: sum(sizes)]
    return torch.cat([run(part).float() for part in taken.split(sizes)])


@torch.no_grad()
def _agreement(model: nn.Module, crops: Tensor, ours: Tensor, dtype: torch.dtype) -> tuple[str, bool]:
    """One line about parity, and whether it holds: logits by the error budget, classes but for near ties."""
    net = restore(copy.deepcopy(model))
    crops = crops[: len(ours)]
    plain = torch.cat([net(part) for part in crops.split(4)])
    few = crops[: EXACT if dtype == torch.float32 else 1]  # torch takes seconds for an image in float16 on a CPU
    same = plain[: len(few)] if dtype == torch.float32 else net.to(dtype)(few.to(dtype)).float()
    exact = net.double()(few.double())
    row = compare("logits", ours[: len(few)], same, exact, granted=torch.finfo(dtype).eps)
    allowed = FACTOR * max((same - exact).abs().max().item(), torch.finfo(dtype).eps * exact.abs().max().item())
    top = plain.topk(2).values
    differ = ours.argmax(1) != plain.argmax(1)
    close = top[:, 0] - top[:, 1] <= 2 * allowed  # such logits have no order
    wrong = int((differ & ~close).sum())
    good = row.ok and not wrong
    line = (
        f"parity {'ok' if good else 'FAILED'}: logits within {row.ours:.1e} of float64 (torch {row.torch:.1e}, allowed "
        f"{row.budget:.1e}); the top-1 class agrees on {len(ours) - wrong} of {len(ours)} crops"
    )
    near = int((differ & close).sum())
    return line + (f", {near} of them near ties" if near else ""), good


Format = tuple[Callable[[nn.Module, Tensor, Path, torch.dtype], Any], Callable[[Path], Run], str]


def _onnx(request: Request) -> Format:
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(name) is None]
    if missing:
        raise RequestError(f"--to onnx needs {', '.join(missing)}: pip install 'fused_resnet[onnx]'")

    def write(model: nn.Module, example: Tensor, path: Path, dtype: torch.dtype) -> None:
        to_onnx(model, example, path, dynamic_batch=not request.batch, dynamic_size=request.any_size, dtype=dtype)

    def load(path: Path) -> Run:
        import onnxruntime

        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        return lambda x: torch.from_numpy(session.run(None, {"images": x.numpy()})[0])

    return write, load, f"run by ONNX Runtime {importlib.metadata.version('onnxruntime')} on the CPU"


def _pt2(request: Request) -> Format:
    def write(model: nn.Module, example: Tensor, path: Path, dtype: torch.dtype) -> None:
        to_pt2(model, example, path, dynamic_batch=not request.batch, dynamic_size=request.any_size, dtype=dtype)

    def load(path: Path) -> Run:
        module = torch.export.load(path).module()
        return lambda x: module(x).detach()

    return write, load, f"run by torch {torch.__version__} on the CPU"


def _tensorrt(request: Request) -> Format:
    if request.any_size:
        raise RequestError("--any-size: a TensorRT engine is built for one height and width")
    if (reason := tensorrt.unavailable()) is not None:
        raise RequestError(f"--to tensorrt needs {reason}")
    import torch_tensorrt

    def write(model: nn.Module, example: Tensor, path: Path, dtype: torch.dtype) -> None:
        engine = tensorrt.to_tensorrt(model, example, dtype=dtype, dynamic_batch=None if request.batch else BATCHES)
        least, _, most = BATCHES
        dynamic = None if request.batch else ({0: torch.export.Dim("batch", min=least, max=most)},)
        torch_tensorrt.save(engine, str(path), arg_inputs=[example.to(tensorrt.gpu(), dtype)], dynamic_shapes=dynamic)

    def load(path: Path) -> Run:
        module = torch_tensorrt.load(str(path)).module()
        return lambda x: module(x.to(tensorrt.gpu())).cpu()

    return write, load, "run by TensorRT on the GPU"


_FORMATS: dict[str, Callable[[Request], Format]] = {"onnx": _onnx, "tensorrt": _tensorrt, "pt2": _pt2}
