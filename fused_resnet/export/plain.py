"""A model as torch.nn modules alone, batch norm folded into the convs: what exporters and other runtimes want."""

from __future__ import annotations

import copy
import operator
from collections import Counter
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from fused_resnet.convert import restore
from fused_resnet.folding import FOLDED, fold
from fused_resnet.modules import unfused_reason


class PlainModel(fx.GraphModule):
    """What `to_plain` returns. Its state dict is marked as folded and loads into its like alone."""

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any, **kwargs: Any) -> None:
        if prefix + FOLDED not in state_dict:  # here, since strict=False would pass over it
            raise RuntimeError(
                "this model is folded (fused_resnet.to_plain), but the state dict was saved from an unfolded one: "
                "load it into that model, and fold again"
            )
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


class _Proxy(fx.Proxy):
    """fx.Proxy makes `y += z` a sum that leaves y as it was, which is wrong where y has another name."""

    def _write(self, operation: Any, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", operation, (self, other), {})

    def __iadd__(self, other: Any) -> Any:
        return self._write(operator.iadd, other)

    def __isub__(self, other: Any) -> Any:
        return self._write(operator.isub, other)

    def __imul__(self, other: Any) -> Any:
        return self._write(operator.imul, other)

    def __itruediv__(self, other: Any) -> Any:
        return self._write(operator.itruediv, other)


class _Tracer(fx.Tracer):
    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)


def to_plain(model: nn.Module) -> PlainModel:
    """A copy of the model for inference, of nothing but torch.nn modules, batch norm folded into the convs.

    Each nn.BatchNorm2d (or F.batch_norm) that alone reads an nn.Conv2d's output becomes part of the conv's weight and
    bias, computed in float32 (float64 for float64) and rounded once; `to_plain(model).half()` rounds once as well. A
    conv or BN that is shared, hooked, parametrized or without running statistics stays as it is. Parameters ask for no
    gradient; names, dtypes, devices and memory formats are the model's.

    Args:
        model: a model of this package, a fused one, or any that torch.fx can trace. It is not touched.

    Returns:
        A torch.fx.GraphModule in eval mode, which pickles and loads where fused_resnet is not installed.

    Raises:
        ValueError: torch.fx cannot trace the model, for instance because its code depends on values.
    """
    return folded_copy(model)[0]


def folded_copy(model: nn.Module) -> tuple[PlainModel, list[tuple[str, str]]]:
    """`to_plain`, and the names of the batch norms that it left as they are, each with the reason."""
    copied = restore(copy.deepcopy(model)).eval()
    try:
        graph = _Tracer().trace(copied)
    except Exception as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"torch.fx cannot trace {type(model).__name__}: {reason}") from error
    graph._tracer_cls = fx.Tracer  # the pickle is to load without this package
    for node in graph.nodes:
        node.type = None  # annotations, which do not pickle
    plain = PlainModel(copied, graph, type(model).__name__)
    plain.eval()
    skipped = _fold_convs(plain)
    plain.requires_grad_(False)
    plain.register_buffer(FOLDED, torch.ones((), dtype=torch.bool))
    return plain, skipped


@torch.no_grad()
def _fold_convs(plain: fx.GraphModule) -> list[tuple[str, str]]:
    modules = dict(plain.named_modules(remove_duplicate=False))
    called = [node for node in plain.graph.nodes if node.op == "call_module"]
    calls = Counter(modules[node.target] for node in called)
    for node in called:
        conv = modules[node.target]
        if len(node.users) != 1 or calls[conv] != 1 or type(conv) is not nn.Conv2d:
            continue
        (after,) = node.users
        statistics = _batch_norm(plain, after, modules)
        bn = modules[after.target] if after.op == "call_module" else None
        if statistics is None or unfused_reason(conv, bn, None) is not None:
            continue
        weight, bias = fold(conv.weight, conv.bias, *statistics)
        conv.weight, conv.bias = nn.Parameter(weight), nn.Parameter(bias)
        after.replace_all_uses_with(node)
        plain.graph.erase_node(after)
    for node in reversed(plain.graph.nodes):  # of other nodes without users some write in place
        if node.op == "get_attr" and not node.users:
            plain.graph.erase_node(node)
    plain.delete_all_unused_submodules()
    plain.recompile()
    left = (node for node in plain.graph.nodes if node.op == "call_module")
    norms = [node for node in left if isinstance(modules[node.target], nn.modules.batchnorm._BatchNorm)]
    return [(node.target, _why_left(node, modules, calls)) for node in norms]


def _why_left(node: fx.Node, modules: dict[str, nn.Module], calls: Counter[nn.Module]) -> str:
    """Why the batch norm that a node calls was not folded."""
    bn, before = modules[str(node.target)], node.args[0]
    if getattr(bn, "running_mean", None) is None:
        return "it has no running statistics"
    if not (isinstance(before, fx.Node) and before.op == "call_module"):
        return "it does not follow a conv"
    conv = modules[str(before.target)]
    if type(conv) is not nn.Conv2d:
        return f"it follows {type(conv).__name__}, not Conv2d"
    if calls[conv] != 1:
        return "its conv is called more than once"
    if len(before.users) != 1:
        return "its conv's output is read elsewhere too"
    return unfused_reason(conv, bn, None) or "its kind is not known"


def _batch_norm(
    plain: fx.GraphModule, node: fx.Node, modules: dict[str, nn.Module]
) -> tuple[Tensor | None, Tensor | None, Tensor, Tensor, float] | None:
    """(gamma, beta, mean, var, eps) where the node normalises with given statistics, else None."""
    if node.op == "call_module" and isinstance(bn := modules[node.target], nn.BatchNorm2d):  # type: ignore[index]
        if bn.running_mean is None or bn.running_var is None:
            return None
        return bn.weight, bn.bias, bn.running_mean, bn.running_var, bn.eps
    if node.op != "call_function" or node.target is not F.batch_norm:
        return None
    names = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")
    given = dict(zip(names, node.args, strict=False)) | node.kwargs
    tensors = []
    for name in ("weight", "bias", "running_mean", "running_var"):
        value = given.get(name)
        if isinstance(value, fx.Node):
            if value.op != "get_attr":
                return None
            value = _attribute(plain, str(value.target))
        tensors.append(value)
    gamma, beta, mean, var = tensors
    if mean is None or var is None or given.get("training", False):
        return None
    return gamma, beta, mean, var, given.get("eps", 1e-5)  # type: ignore[return-value]


def _attribute(module: nn.Module, path: str) -> Any:
    *parents, name = path.split(".")
    return getattr(module.get_submodule(".".join(parents)), name)
