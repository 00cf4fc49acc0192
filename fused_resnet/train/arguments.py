"""The arguments of `fused-resnet train`."""

from __future__ import annotations

import argparse
import ast
from pathlib import Path
from typing import Any

MODELS = "any constructor of fused_resnet: cifar_resnet20, preact_resnet18, plain_cifar_net20, resnet50, ..."


def _positive(kind: type, zero: bool = False) -> Any:
    def number(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = -1
        if not (value > 0 or (zero and value == 0)) or value == float("inf"):
            what = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"expected {what} {'of at least' if zero else 'above'} 0, got {text!r}")
        return value

    return number


def _model(text: str) -> str:
    import fused_resnet as fr

    found = getattr(fr, text, None) if text in fr.__all__ else None
    if not callable(found) or isinstance(found, type) or not found.__module__.startswith("fused_resnet.models."):
        raise argparse.ArgumentTypeError(f"unknown model {text!r}; expected {MODELS}")
    return text


def _share(text: str) -> float:
    value = _positive(float, zero=True)(text)
    if value >= 1:
        raise argparse.ArgumentTypeError(f"expected a number from 0 up to 1, got {text!r}")
    return value


def _option(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        raise argparse.ArgumentTypeError(f"expected NAME=VALUE, got {text!r}")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value


def add_arguments(command: argparse.ArgumentParser) -> None:
    command.description = "Train a network. Under torchrun each process takes its part of the data (DDP or FSDP2)."
    add = command.add_argument
    add("--data", required=True, help="a folder of classes, one of CIFAR's binary files, or digits")
    add("--model", type=_model, default="cifar_resnet20", metavar="M", help=f"{MODELS} (cifar_resnet20)")
    add("--out", type=Path, required=True, metavar="DIR", help="where checkpoints, logs and the picture go")
    add("--option", type=_option, action="append", default=[], metavar="NAME=VALUE", help="of the model's constructor")
    add("--epochs", type=_positive(int), default=30, help="(30)")
    add("--batch", type=_positive(int), default=128, help="images of a process in a step (128)")
    add("--accumulate", type=_positive(int), default=1, metavar="N", help="parts that a batch runs in (1)")
    add("--size", type=_positive(int), default=224, help="height and width of images from a folder (224)")
    add("--lr", type=_positive(float), default=0.1, help="the highest learning rate (0.1)")
    add("--momentum", type=_share, default=0.9, help="(0.9)")
    add("--weight-decay", type=_positive(float, zero=True), default=1e-4, help="not of BN and biases (1e-4)")
    add("--schedule", choices=("cosine", "step"), default="cosine", help="to 0; or a tenth at 1/2 and 3/4 (cosine)")
    add("--warmup", type=_positive(float, zero=True), default=1.0, metavar="EPOCHS", help="linear, from 1%% (1)")
    add("--label-smoothing", type=_share, default=0.0, help="(0)")
    add("--amp", choices=("off", "bf16", "fp16"), default="off", help="autocast; fp16 with a gradient scaler (off)")
    add("--ema", type=_share, default=0.0, metavar="DECAY", help="test and keep an average of the weights (0: no)")
    add("--sync-bn", action="store_true", help="batch norm over all processes")
    add("--parallel", choices=("ddp", "fsdp"), default="ddp", help="under torchrun (ddp)")
    add("--unfused", action="store_true", help="torch's own modules, to compare with")
    add("--compile", action="store_true", help="torch.compile")
    add("--cuda-graph", action="store_true", help="capture forward and backward")
    add("--seed", type=_positive(int, zero=True), default=0, help="(0)")
    add("--workers", type=_positive(int, zero=True), default=0, help="processes that load images (0)")
    add("--save-every", type=_positive(int, zero=True), default=0, metavar="STEPS", help="besides after each epoch")
    add("--resume", action="store_true", help="go on with the checkpoint in --out, exactly")
    add("--tensorboard", action="store_true", help="TensorBoard's files too")
    add("--device", default="cpu", choices=("cpu", "cuda"), help="(cpu)")
    add("--timeout", type=_positive(float), default=600.0, metavar="S", help="to wait for another process (600)")


def settings(args: argparse.Namespace) -> Any:
    """The `Settings` of the arguments."""
    import torch

    from fused_resnet.cli import RequestError
    from fused_resnet.train.loop import Settings

    if args.device == "cuda" and not torch.cuda.is_available():
        raise RequestError("--device cuda: torch sees no GPU")
    given = {name: getattr(args, name) for name in Settings._fields if hasattr(args, name)}
    return Settings(**given | {"options": tuple(sorted(dict(args.option).items()))})
