"""The command `fused-resnet`: info, verify, bench, bench-ops, bench-models, bench-all, export, tune.

Exit codes: 0 good; 1 a check failed; 2 wrong arguments or a request that cannot be met, with one sentence on standard
error; 130 interrupted (what was measured until then is kept).
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import urlsplit
from urllib.request import url2pathname

import torch

from fused_resnet import __version__, dispatch, emulation
from fused_resnet.backends import cpp
from fused_resnet.plans import MEMORY

MODELS = (
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnet152",
    "resnext50_32x4d",
    "resnext101_32x8d",
    "resnext101_64x4d",
    "wide_resnet50_2",
    "wide_resnet101_2",
)
PACKAGE = Path(__file__).resolve().parent


class RequestError(Exception):
    """What the user asked for cannot be done; the message is one sentence for them."""


def load_benchmarks(name: str) -> Any:
    """A module of `fused_resnet.benchmarks`: the folder beside the package in a source tree, or what is installed."""
    package, init = "fused_resnet.benchmarks", PACKAGE.parent / "benchmarks" / "__init__.py"
    source = init.is_file() and (PACKAGE.parent / "csrc").is_dir()
    if package not in sys.modules and (source or importlib.util.find_spec(package) is None):
        spec = importlib.util.spec_from_file_location(package, init, submodule_search_locations=[str(init.parent)])
        if spec is None or spec.loader is None or not source:
            raise RequestError(f"the benchmarks are neither installed nor at {init.parent}")
        sys.modules[package] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return importlib.import_module(f"{package}.{name}")


# info


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(("model name", "Model")):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _gpus() -> list[dict[str, Any]]:
    found = []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        gpu = torch.cuda.get_device_properties(index)
        capability = f"{gpu.major}.{gpu.minor}"
        found.append({"name": gpu.name, "capability": capability, "memory_gib": round(gpu.total_memory / 2**30, 1)})
    return found


def _extensions_elsewhere() -> list[str]:
    """Folders of other installs of this package that hold an extension; the imported tree shadows them."""
    found = set()
    places = [Path(entry or ".") for entry in sys.path]
    for distribution in importlib.metadata.distributions(name="fused_resnet"):  # editable installs are not on sys.path
        url = json.loads(distribution.read_text("direct_url.json") or "{}").get("url", "")
        if url.startswith("file://"):
            places.append(Path(url2pathname(urlsplit(url).path)))
    for folder in (place.resolve() / "fused_resnet" for place in places):
        if folder != PACKAGE and any(path.suffix in (".so", ".pyd") for path in folder.glob("_C.*")):
            found.add(str(folder))
    return sorted(found)


def environment() -> dict[str, Any]:
    """What `info` tells, as it goes into JSON."""
    missing = cpp.unavailable("cpu")
    info: dict[str, Any] = {
        "versions": {
            "fused_resnet": __version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "triton": _version("triton"),
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version() if torch.cuda.is_available() else None,
        },
        "package": str(PACKAGE),
        "cpu": {
            "name": _cpu_name(),
            "threads": torch.get_num_threads(),
            "capability": torch.backends.cpu.get_cpu_capability(),
            "emulates": [str(dtype)[6:] for dtype in emulation.DTYPES if emulation.emulates(dtype, "cpu")],
        },
        "gpus": _gpus(),
        "extension": {
            "loaded": missing is None,
            "reason": missing,
            "file": getattr(sys.modules.get("fused_resnet._C"), "__file__", None),
            "build": cpp.build_info(),
        },
        "requested_backend": dispatch.requested(),
        "backends": [row._asdict() for row in dispatch.backend_table()],
    }
    if missing is not None:
        info["extension"]["elsewhere"] = _extensions_elsewhere()
    return info


def print_plans(args: argparse.Namespace) -> int:
    """How each block of a network, and each conv of it, runs in training on the CPU, and what is kept."""
    import fused_resnet
    from fused_resnet.blocks import training_plans

    model = getattr(fused_resnet, args.plan)(memory=args.memory)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=args.dtype == "bf16"):
        plans = training_plans(model, args.batch, args.size)
    if args.json:
        rows = [
            {
                "block": name,
                "input": shape,
                "plan": plan and plan._asdict(),
                "layers": {conv: found._asdict() | {"layer": found.layer._asdict()} for conv, found in layers.items()},
            }
            for name, _, shape, plan, layers in plans
        ]
        print(json.dumps(rows, indent=1))
        return 0
    given = f"batch {args.batch}, {args.size}x{args.size}, {args.dtype}, memory={args.memory!r}"
    print(f"{args.plan}, training, {given}, on the CPU")
    forms, kept = ("stored output", "Gram form"), {"balanced": "raw conv outputs", "low": "statistics alone"}
    for name, block, shape, plan, layers in plans:
        how = "unit by unit; keeps raw and rectified conv outputs"
        if plan is not None:
            projected = f", projection: {forms[plan.gram_projection]}" if block.downsample is not None else ""
            read = "; prologues" if plan.prologue else ""
            how = f"one op; last conv: {forms[plan.gram]}{projected}; keeps {kept[plan.memory]}{read}"
        print(f"{name:<10} {'x'.join(map(str, shape)):<16} {how}")
        for conv, (layer, form, reads, by_layer) in layers.items():
            size = f"{layer.in_channels} to {layer.out_channels}, {'x'.join(map(str, layer.kernel))}"
            notes = ", input through a prologue" * (reads == "prologue") + ", by a rule for such layers" * by_layer
            print(f"  {conv:<10} {size:<18} {layer.pixels:>11,} pixels  {form}{notes}")
    return 0


def info(args: argparse.Namespace) -> int:
    if args.plan:
        return print_plans(args)
    found = environment()
    if args.json:
        print(json.dumps(found, indent=1))
        return 0
    cpu, extension = found["cpu"], found["extension"]
    build = extension["build"]
    lines = [(name, version or "not installed") for name, version in found["versions"].items() if name != "cudnn"]
    if found["versions"]["cuda"] is None:
        lines[-1] = ("cuda", "none: this torch is a CPU build")
    lines += [
        ("package", found["package"]),
        ("cpu", f"{cpu['name']}, {cpu['threads']} threads, {cpu['capability']}"),
        *(("", f"no instructions for {name}: its convolutions are computed in float32") for name in cpu["emulates"]),
        *(("gpu", f"{gpu['name']}, capability {gpu['capability']}, {gpu['memory_gib']} GiB") for gpu in found["gpus"]),
    ]
    if not found["gpus"]:
        lines.append(("gpu", "none"))
    loaded = f"loaded from {extension['file']}" if extension["loaded"] else f"not loaded: {extension['reason']}"
    lines.append(("extension", loaded))
    if extension["loaded"] and Path(extension["file"] or "").parent.resolve() != PACKAGE:
        lines.append(("", "which belongs to another install than the package"))
    if build.get("built"):
        lines.append(("", f"built with torch {build.get('torch')}, {build.get('compiler')}"))
        lines.append(("", f"flags {' '.join(build.get('flags') or ())}"))
        for name, key in (("CUDA", "cuda"), ("CUTLASS", "cutlass")):
            lines.append(
                ("", f"{name} {build.get(key) or 'not built: ' + (build.get(f'no_{key}') or 'unknown reason')}")
            )
    for folder in extension.get("elsewhere", ()):
        lines.append(
            ("", f"another install, {folder}, has an extension, but {found['package']} comes first on sys.path")
        )
    if found["requested_backend"] != "auto":
        lines.append(("requested", f"{found['requested_backend']} everywhere, by set_backend or FUSED_RESNET_BACKEND"))
    indent = "\n" + 14 * " "
    print("\n".join(f"{name:<14}{text}".rstrip().replace("\n", indent) for name, text in lines))
    print(f"\n{dispatch.backend_table()}")
    return 0


# verify, bench


def _request(args: argparse.Namespace, **options: Any) -> Any:
    bench = load_benchmarks("bench_resnet")
    return bench.Request(model=args.model, device=args.device, dtype=args.dtype, size=args.size, **options)


def verify(args: argparse.Namespace) -> int:
    if ":" in args.model:
        return verify_foreign(args)
    modes = ("train",) if args.train else ("infer",)
    return load_benchmarks("bench_resnet").verify(_request(args, modes=modes, images=tuple(args.image)))


def verify_foreign(args: argparse.Namespace) -> int:
    from fused_resnet import foreign

    autocast = torch.bfloat16 if args.dtype == "bf16" else None
    try:
        return foreign.check(args.model, train=args.train, size=args.size, device=args.device, autocast=autocast)
    except foreign.ModelNotFoundError as error:
        raise RequestError(str(error)) from error


def bench(args: argparse.Namespace) -> int:
    found = environment()
    del found["package"], found["extension"]["file"]  # results are shared: they name no folder of this machine
    found["device"] = (
        torch.cuda.get_device_name(args.device)
        if args.device.type == "cuda"
        else f"{found['cpu']['name']}, {found['cpu']['threads']} threads"
    )
    request = _request(
        args,
        modes=tuple(dict.fromkeys(mode for modes in args.mode or [("infer", "train")] for mode in modes)),
        batch=args.batch,
        peers=args.peers,
        images=tuple(args.image),
        rounds=args.rounds,
        json=args.json,
        plot=args.plot,
        environment=found,
    )
    print(f"fused_resnet {__version__}, torch {torch.__version__}, {found['device']}", flush=True)
    return load_benchmarks("bench_resnet").bench(request)


def export(args: argparse.Namespace) -> int:
    command = importlib.import_module("fused_resnet.export.command")
    names = ("to", "out", "model", "weights", "num_classes", "dtype", "size", "batch", "any_size")
    return command.export(command.Request(**{name: getattr(args, name) for name in names}, images=tuple(args.image)))


def tune(args: argparse.Namespace) -> int:
    try:
        return importlib.import_module("fused_resnet.tuning").main(args)
    except OSError as error:
        raise RequestError(f"what is measured cannot be kept in {error.filename}: {error.strerror}") from error


def bench_ops(args: argparse.Namespace) -> int:
    module = load_benchmarks("bench_ops")
    return module.run(module.Request(**{name: value for name, value in vars(args).items() if name != "run"}))


def bench_models(args: argparse.Namespace) -> int:
    return load_benchmarks("bench_models").main(args)


def bench_all(args: argparse.Namespace) -> int:
    return load_benchmarks("bench_all").run(**{name: value for name, value in vars(args).items() if name != "run"})


# train


def load_train_arguments(command: argparse.ArgumentParser) -> None:
    from fused_resnet.train.arguments import add_arguments

    add_arguments(command)


def train(args: argparse.Namespace) -> int:
    from fused_resnet.train.arguments import settings
    from fused_resnet.train.loop import train

    train(settings(args))
    return 0


# arguments


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def _device(text: str) -> torch.device:
    try:
        device = torch.device(text)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise argparse.ArgumentTypeError(f"unknown device {text!r}; expected cpu, cuda or cuda:N")
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            why = "this torch is a CPU build" if torch.version.cuda is None else f"torch sees {count} GPUs"
            raise argparse.ArgumentTypeError(f"device {text} is not available: {why}")
        device = torch.device("cuda", device.index or 0)
    return device


def _modes(text: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    for name in names:
        if name not in ("infer", "train"):
            raise argparse.ArgumentTypeError(f"unknown mode {name!r}; expected infer, train or both with a comma")
    return names


def _peers(text: str) -> tuple[str, ...]:
    rivals = load_benchmarks("rivals")
    rivals.discover()
    names = tuple(dict.fromkeys(name.strip() for name in text.split(",")))
    for name in names:
        if name not in rivals.PEERS:
            raise argparse.ArgumentTypeError(f"unknown peer {name!r}; expected some of {', '.join(rivals.PEERS)}")
    return names


def _names(*known: str) -> Any:
    """A list with commas, of `known` names where those are given."""

    def names(text: str) -> tuple[str, ...]:
        found = tuple(dict.fromkeys(name.strip() for name in text.split(",")))
        for name in found:
            if known and name not in known:
                raise argparse.ArgumentTypeError(f"unknown name {name!r}; expected some of {', '.join(known)}")
        return found

    return names


def _batches(text: str) -> tuple[int, ...]:
    return tuple(_at_least(1)(batch) for batch in text.split(","))


def _model(text: str) -> str:
    if text not in MODELS and ":" not in text:
        raise argparse.ArgumentTypeError(
            f"unknown model {text!r}; expected one of {', '.join(MODELS)}, or timm:NAME, torchvision:NAME or "
            "path/to/file.py:FUNCTION"
        )
    return text


def _at_least(least: int) -> Any:
    def number(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if value < least:
            raise argparse.ArgumentTypeError(f"expected a whole number of at least {least}, got {text!r}")
        return value

    return number


def parser() -> argparse.ArgumentParser:
    top = _Parser(prog="fused-resnet", description="Fused kernels for residual networks.")
    top.add_argument("--version", action="version", version=f"fused_resnet {__version__}")
    commands = top.add_subparsers(title="commands", required=True, metavar="command")

    command = commands.add_parser("info", help="versions, devices, per op the live backend and why not the others")
    add = command.add_argument
    add("--json", action="store_true", help="as JSON")
    add("--plan", choices=MODELS, metavar="M", help="instead: how each block of a network runs in training")
    add("--batch", type=_at_least(1), default=32, metavar="N", help="with --plan: images in a batch (32)")
    add("--size", type=_at_least(32), default=224, metavar="N", help="with --plan: pixels of an image's side (224)")
    add("--memory", choices=MEMORY, default="balanced", help="with --plan: as the models' argument (balanced)")
    add("--dtype", choices=("fp32", "bf16"), default="fp32", help="with --plan: fp32, or bf16 by autocast (fp32)")
    command.set_defaults(run=info)

    common = _Parser(add_help=False)
    add = common.add_argument
    add("--device", type=_device, default=torch.device("cpu"), metavar="D", help="cpu, cuda or cuda:N (cpu)")
    add("--dtype", choices=("fp32", "bf16"), default="fp32", help="fp32, or bf16 by autocast (fp32)")
    add("--size", type=_at_least(32), default=224, metavar="N", help="height and width of the images (224)")
    add("--image", nargs="+", default=[], metavar="FILE", help="photographs to use instead of the bundled ones")

    command = commands.add_parser("verify", parents=[common], help="does fused equal unfused? exit code 1 if not")
    listed = f"one of {', '.join(MODELS)} (resnet50)"
    forms = f"{listed}, or timm:NAME, torchvision:NAME, path/to/file.py:FUNCTION, which are fused first"
    command.add_argument("--model", type=_model, default="resnet50", metavar="M", help=forms)
    command.add_argument("--train", action="store_true", help="compare a training step instead of inference")
    command.set_defaults(run=verify)

    command = commands.add_parser("train", help="train a network on a folder of images or a built-in data set")
    load_train_arguments(command)
    command.set_defaults(run=train)

    command = commands.add_parser("bench", parents=[common], help="parity, then the speed beside unfused rivals")
    add = command.add_argument
    add("--model", choices=MODELS, default="resnet50", metavar="M", help=listed)
    add("--mode", type=_modes, action="append", metavar="M", help="infer, train, or both: infer,train (both)")
    add("--batch", type=_at_least(1), metavar="N", help="images in a batch (1 for inference, 4 for training)")
    add(
        "--peers",
        type=_peers,
        default=("eager", "channels_last"),
        metavar="LIST",
        help="rivals: eager, channels_last, compile, onnxruntime, openvino, tensorrt, ... (eager,channels_last)",
    )
    add("--rounds", type=_at_least(10), metavar="N", help="timed runs of each (30 for inference, 10 for training)")
    add("--json", type=Path, metavar="FILE", help="write everything measured")
    add("--plot", type=Path, metavar="FILE", help="write one picture (.png, .svg, .pdf)")
    command.set_defaults(run=bench)

    command = commands.add_parser("export", help="a network as a file for other runtimes, checked on photographs")
    add = command.add_argument
    add("--to", choices=("onnx", "tensorrt", "pt2"), required=True, help="the kind of file")
    add("--out", type=Path, required=True, metavar="FILE", help="the file, written as a whole or not at all")
    add("--model", choices=MODELS, default="resnet50", metavar="M", help=f"one of {', '.join(MODELS)} (resnet50)")
    add("--weights", metavar="W", help="a state dict's path or URL, or a torchvision weights name (random ones)")
    add("--num-classes", type=_at_least(1), default=1000, metavar="N", help="outputs of the classifier (1000)")
    add("--dtype", choices=("fp32", "fp16"), help="of weights, images and logits (fp32; fp16 for tensorrt)")
    add("--size", type=_at_least(32), default=224, metavar="N", help="height and width of the images (224)")
    add("--batch", type=_at_least(1), metavar="N", help="take batches of this size alone (any; tensorrt: 1 to 64)")
    add("--any-size", action="store_true", help="take images of any height and width")
    add("--image", nargs="+", default=[], metavar="FILE", help="photographs to use instead of the bundled ones")
    command.set_defaults(run=export)

    command = commands.add_parser("tune", help="measures which configs of the Triton kernels are best on this GPU")
    add = command.add_argument
    add("--model", choices=MODELS, default="resnet50", metavar="M", help="the network whose layers count (resnet50)")
    add("--mode", type=_modes, default=("infer", "train"), metavar="M", help="infer, train or infer,train (both)")
    add("--batch", type=_at_least(1), default=64, metavar="N", help="images in a batch (64)")
    add("--size", type=_at_least(32), default=224, metavar="N", help="height and width of the images (224)")
    add("--dtype", choices=("bf16", "fp16", "fp32"), default="bf16", help="of weights and images (bf16)")
    add("--device", type=_device, metavar="D", help="cuda or cuda:N (cuda)")
    command.set_defaults(run=tune)

    measured = _Parser(add_help=False)
    add = measured.add_argument
    add("--device", type=_device, default=torch.device("cpu"), metavar="D", help="cpu, cuda or cuda:N (cpu)")
    add("--fresh", action="store_true", help="measure again what the results file has already")
    precisions, directions = ("fp32", "tf32", "bf16", "fp16"), ("infer", "forward", "backward")

    command = commands.add_parser(
        "bench-ops", parents=[measured], help="the kernels alone, beside the machine's ceilings"
    )
    add = command.add_argument
    shapes = ("resnet18", "resnet50", "resnet152")
    add("--ops", type=_names(), default=(), metavar="LIST", help="bn_act, add_relu, ... (all)")
    add("--model", choices=shapes, metavar="M", help=f"the layer shapes of one of {', '.join(shapes)} (all)")
    add("--directions", type=_names(*directions), default=directions, metavar="LIST", help="(infer,forward,backward)")
    add("--dtype", choices=precisions, default="fp32", help="(fp32)")
    add("--batch", type=_at_least(1), metavar="N", help="images in a batch (4 on a CPU, 64 on a GPU)")
    add("--rivals", type=_names(), metavar="LIST", help="beside ours: eager, compile, fused calls (all)")
    add("--backend", choices=("auto", *dispatch.BACKENDS), default="auto", help="which of our backends (auto)")
    add("--rounds", type=_at_least(3), default=7, metavar="N", help="timed rounds of each (7)")
    add("--out", type=Path, metavar="FILE", help=".csv or .json (benchmarks/results/DEVICE/ops.csv)")
    command.set_defaults(run=bench_ops)

    command = commands.add_parser(
        "bench-models", parents=[measured], help="whole networks, each rival in its own process"
    )
    add = command.add_argument
    add("--model", choices=MODELS, default="resnet50", metavar="M", help=f"one of {', '.join(MODELS)} (resnet50)")
    add("--mode", type=_modes, default=("infer", "train"), metavar="M", help="infer, train or infer,train (both)")
    add("--dtypes", type=_names(*precisions), default=("fp32",), metavar="LIST", help=f"{', '.join(precisions)} (fp32)")
    add("--batches", type=_batches, default=(), metavar="LIST", help="images in a batch (1 and 4; on a GPU 1 and 256)")
    add("--size", type=_at_least(32), default=224, metavar="N", help="height and width of the images (224)")
    add("--rivals", type=_names(), default=(), metavar="LIST", help="(all); 'NAME + CUDA graph' replays NAME's step")
    add("--rival-files", nargs="+", default=[], metavar="FILE", help="Python files with rivals of your own")
    add("--rounds", type=_at_least(3), default=10, metavar="N", help="timed rounds of each (10)")
    add("--limit", type=_at_least(1), default=300, dest="limit_s", metavar="S", help="seconds a rival may take (300)")
    add("--out", type=Path, metavar="FILE", help=".csv or .json (benchmarks/results/DEVICE/models.csv)")
    command.set_defaults(run=bench_models)

    command = commands.add_parser("bench-all", parents=[measured], help="all that RESULTS.md is made of; it resumes")
    add = command.add_argument
    parts = ("ops", "models", "layers", "report")
    add("--parts", type=_names(*parts), default=parts, metavar="LIST", help=f"({','.join(parts)})")
    add("--limit", type=_at_least(1), default=300, dest="limit_s", metavar="S", help="seconds a rival may take (300)")
    add("--out", type=Path, metavar="FOLDER", help="(benchmarks/results/DEVICE)")
    command.set_defaults(run=bench_all)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    try:
        return args.run(args)
    except KeyboardInterrupt:
        print("fused-resnet: interrupted", file=sys.stderr)
        return 130
    except (RequestError, dispatch.BackendUnavailableError) as error:
        message = str(error)
    except (MemoryError, torch.OutOfMemoryError):
        message = "out of memory: try a smaller --batch or --size, or another --model"
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the exit's flush fails too
        return 0
    print(f"fused-resnet: error: {message}", file=sys.stderr)
    return 2
