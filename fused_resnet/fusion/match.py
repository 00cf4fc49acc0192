"""Chains of conv, batch norm, addition and ReLU in a forward's graph, and the hazards that forbid to run one as an op.

An op runs where the last node of its chain stood. So nothing else may see what lies between the chain's nodes, and
nothing in between may write to what the op reads, use the same batch norm, or see what the chain wrote in place.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import fx, nn
from torch.nn import functional as F

from fused_resnet.fusion.guards import child, has_hooks
from fused_resnet.fusion.norms import looks_like_norm, norm_kind, own_act
from fused_resnet.ops.checks import is_stem_pool

_ADDS = {operator.add, operator.iadd, torch.add}
_RELUS = {F.relu, torch.relu, torch.relu_, F.relu_}
_FRESH_MODULES: tuple[type[nn.Module], ...] = (
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.BatchNorm1d,
    nn.BatchNorm2d,
    nn.BatchNorm3d,
    nn.Linear,
)
_FRESH_MODULES += (nn.ConvTranspose2d, nn.MaxPool2d, nn.AvgPool2d, nn.Sigmoid)
_FRESH_FUNCTIONS = {operator.add, operator.sub, operator.mul, operator.truediv, torch.add, torch.sub, torch.mul}
_FRESH_FUNCTIONS |= {torch.cat, torch.sigmoid, torch.relu, F.max_pool2d, F.avg_pool2d}
_IN_PLACE = {
    getattr(operator, f"i{name}")
    for name in ["add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "and", "or", "xor"]
}
_IN_PLACE |= {operator.ilshift, operator.irshift, operator.iconcat, operator.setitem, operator.delitem}


class Chain(NamedTuple):
    """Nodes that one op can run, in order; `value` is what they start from, `residual` what is added."""

    nodes: tuple[fx.Node, ...]
    value: fx.Node
    residual: fx.Node | None
    conv: fx.Node | None
    norm: fx.Node | None
    add: fx.Node | None
    relu: bool
    tail: bool = False  # the norm's own drop and act follow the op


class Matched(NamedTuple):
    chains: list[Chain]
    skipped: dict[str, str]  # norm's path -> why no op runs it


def module_reason(module: nn.Module, what: str) -> str | None:
    """Why a module that an op would bypass must be called itself."""
    if has_hooks(module):
        return f"a hook is set on its {what}"
    if "forward" in module.__dict__:
        return f"forward is replaced on its {what}"
    return None


def conv_reason(conv: nn.Module) -> str | None:
    if type(conv) is not nn.Conv2d:
        return f"{type(conv).__name__} is not nn.Conv2d"
    if conv.padding_mode != "zeros" or isinstance(conv.padding, str):
        return f"its conv's padding is {conv.padding!r} with mode {conv.padding_mode!r}"
    return module_reason(conv, "conv")


def norm_reason(norm: nn.Module) -> str | None:
    kind = norm_kind(norm)
    if kind is None:
        if isinstance(norm, nn.SyncBatchNorm):
            return "SyncBatchNorm takes its statistics across processes"
        return f"{type(norm).__name__} is not a batch norm that fusion knows"
    if kind.with_act and own_act(norm) is None:
        return "its drop or act is hooked, replaced or gone"
    return module_reason(norm, "batch norm")


class Matcher:
    """Finds the chains of one graph. Nothing is changed. `fresh`: more modules whose output is memory of its own."""

    def __init__(self, scope: nn.Module, graph: fx.Graph, fresh: tuple[type[nn.Module], ...] = ()) -> None:
        self.scope = scope
        self.fresh = _FRESH_MODULES + fresh
        self.nodes = list(graph.nodes)
        self.position = {node: index for index, node in enumerate(self.nodes)}
        self.claimed: set[fx.Node] = set()

    def module(self, node: Any) -> nn.Module | None:
        if isinstance(node, fx.Node) and node.op == "call_module":
            return child(self.scope, str(node.target))
        return None

    def match(self) -> Matched:
        chains: list[Chain] = []
        skipped: dict[str, str] = {}
        norms = [node for node in self.nodes if (m := self.module(node)) is not None and looks_like_norm(m)]
        # The value that an addition adds to goes first; the shortcut's own norm then ends before the addition.
        norms.sort(key=lambda node: (not self._leads(node), self.position[node]))
        for node in norms:
            norm = self.module(node)
            assert norm is not None
            reason = norm_reason(norm) or self._call_reason(node)
            if reason is None:
                chain = None
                for candidate in self._candidates(node):
                    problem = self.hazard(candidate)
                    if problem is None:
                        chain = candidate
                        break
                    reason = reason or problem
                if chain is not None:
                    chains.append(chain)
                    self.claimed.update(chain.nodes)
                    continue
            skipped.setdefault(str(node.target), reason or self._alone(node))
        for node in self.nodes:
            chain = self._add_relu(node)
            if chain is not None and self.hazard(chain) is None:
                chains.append(chain)
                self.claimed.update(chain.nodes)
        return Matched(sorted(chains, key=lambda c: self.position[c.nodes[-1]]), skipped)

    def behind_conv(self, conv: fx.Node) -> Chain | None:
        """The longest chain of a conv with the ReLU, or the addition and ReLU, behind it; None for what is no conv."""
        if not self._is_conv(conv):
            return None
        ends: list[tuple[tuple[fx.Node, ...], fx.Node | None, fx.Node | None]] = []
        user = self._sole_user(conv)
        if user is not None and self._is_relu(user):
            ends.append(((user,), None, None))
        elif user is not None and (residual := self._added(user, conv)) is not None:
            relu = self._sole_user(user)
            if relu is not None and self._is_relu(relu):
                ends.append(((user, relu), residual, user))
        for nodes, residual, add in ends:
            chain = Chain((conv, *nodes), conv.args[0], residual, conv, None, add, True)  # type: ignore[arg-type]
            if self.hazard(chain) is None:
                return chain
        return Chain((conv,), conv.args[0], None, conv, None, None, False)  # type: ignore[arg-type]

    def with_pool(self, chain: Chain) -> Chain | None:
        """A chain that ends in a ReLU and adds nothing, and a max pool (3x3, stride 2, padding 1) behind it."""
        pool = self._sole_user(chain.nodes[-1]) if chain.relu and chain.add is None else None
        module = self.module(pool)
        if pool is None or type(module) is not nn.MaxPool2d or module_reason(module, "") or self._call_reason(pool):
            return None
        longer = chain._replace(nodes=(*chain.nodes, pool))
        return longer if is_stem_pool(module) and self.hazard(longer) is None else None

    def is_last_reader(self, node: fx.Node, value: fx.Node) -> bool:
        """Whether a value surely has memory of its own, which nothing behind a node reads."""
        users = {user for alias in self._aliases(value) for user in alias.users}
        return self._is_fresh(value) and all(self.position[user] <= self.position[node] for user in users)

    # chains

    def _candidates(self, norm: fx.Node) -> Iterator[Chain]:
        """The chains around a norm, the longest first."""
        module = self.module(norm)
        assert module is not None
        kind = norm_kind(module)
        assert kind is not None
        before: Any = norm.args[0]
        conv: Any = norm.args[0] if self._is_conv(norm.args[0]) and self._sole_user(norm.args[0]) is norm else None
        ends: list[tuple[tuple[fx.Node, ...], fx.Node | None, fx.Node | None, bool]] = []
        nodes: tuple[fx.Node, ...] = (norm,)
        act = own_act(module) if kind.with_act else "none"
        if act == "relu":
            ends.append((nodes, None, None, True))
        elif act == "other":
            if conv is not None:
                yield Chain((conv, norm), conv.args[0], None, conv, norm, None, False, True)
        else:
            if conv is not None:
                ends.append((nodes, None, None, False))
            last, nodes = self._past_identities(norm, nodes)
            following = self._sole_user(last)
            if following is not None and self._is_relu(following):
                ends.append(((*nodes, following), None, None, True))
            elif following is not None and following not in self.claimed:
                residual = self._added(following, last)
                if residual is not None:
                    nodes = (*nodes, following)
                    if conv is not None:
                        ends.append((nodes, residual, following, False))
                    last, nodes = self._past_identities(following, nodes)
                    relu = self._sole_user(last)
                    if relu is not None and self._is_relu(relu):
                        ends.append(((*nodes, relu), residual, following, True))
        for nodes, residual, add, relu_ in reversed(ends):
            if conv is not None:
                yield Chain((conv, *nodes), conv.args[0], residual, conv, norm, add, relu_)
        for nodes, residual, add, relu_ in reversed(ends):
            if relu_:
                yield Chain(nodes, before, residual, None, norm, add, relu_)

    def _add_relu(self, node: fx.Node) -> Chain | None:
        if not self._is_relu(node) or node in self.claimed:
            return None
        add = node.args[0]
        if not isinstance(add, fx.Node) or add in self.claimed or self._sole_user(add) is not node:
            return None
        value = add.args[0] if add.args else None
        if not isinstance(value, fx.Node):
            return None
        residual = self._added(add, value)
        return None if residual is None else Chain((add, node), value, residual, None, None, add, True)

    def _alone(self, node: fx.Node) -> str:
        """Why a norm is in no chain, where nothing is wrong with it."""
        module, before = self.module(node), self.module(node.args[0])
        assert module is not None
        kind = norm_kind(module)
        if before is not None and "Conv" in type(before).__name__:
            reason = conv_reason(before) or f"the output of `{node.args[0]}` is used elsewhere too"
        else:
            reason = "no conv stands before it"
        if kind is not None and kind.with_act and own_act(module) == "other":
            return f"{reason}, and its activation is {type(module._modules['act']).__name__}"
        return f"{reason}, and no ReLU after it"

    def _leads(self, node: fx.Node) -> bool:
        last, _ = self._past_identities(node, ())
        user = self._sole_user(last)
        return user is None or not user.args or user.args[0] is last

    def _past_identities(self, node: fx.Node, nodes: tuple[fx.Node, ...]) -> tuple[fx.Node, tuple[fx.Node, ...]]:
        user = self._sole_user(node)
        while user is not None and type(m := self.module(user)) is nn.Identity and module_reason(m, "") is None:
            if self._call_reason(user) is not None:
                break
            node, nodes = user, (*nodes, user)
            user = self._sole_user(node)
        return node, nodes

    def _sole_user(self, node: Any) -> fx.Node | None:
        """The one node that uses the value, once; None where several do, or the forward returns it."""
        if len(node.users) != 1:
            return None
        user = next(iter(node.users))
        uses = [n for n in user.all_input_nodes if n is node]
        if user.op == "output" or len(uses) != 1 or sum(arg is node for arg in user.args) != 1:
            return None
        return user

    @staticmethod
    def _call_reason(node: fx.Node) -> str | None:
        if len(node.args) == 1 and not node.kwargs and isinstance(node.args[0], fx.Node):
            return None
        return "it is called with more than one tensor"

    def _is_conv(self, node: Any) -> bool:
        module = self.module(node)
        return module is not None and self._call_reason(node) is None and conv_reason(module) is None

    def _is_relu(self, node: fx.Node) -> bool:
        if node.op == "call_module":
            module = self.module(node)
            return type(module) is nn.ReLU and module_reason(module, "") is None and self._call_reason(node) is None
        plain = len(node.args) == 1 or (len(node.args) == 2 and isinstance(node.args[1], bool))
        if not plain or not isinstance(node.args[0], fx.Node):
            return False
        if node.op == "call_method":
            return node.target in ("relu", "relu_") and len(node.args) == 1 and not node.kwargs
        return node.op == "call_function" and node.target in _RELUS and set(node.kwargs) <= {"inplace"}

    def _added(self, node: fx.Node, value: fx.Node) -> fx.Node | None:
        """What the node adds to `value`, if it is an addition of two tensors."""
        adds = node.op == "call_function" and node.target in _ADDS
        adds = adds or (node.op == "call_method" and node.target in ("add", "add_"))
        if not adds or node.kwargs or len(node.args) != 2:
            return None
        others = [arg for arg in node.args if arg is not value]
        return others[0] if len(others) == 1 and isinstance(others[0], fx.Node) else None

    # hazards

    def hazard(self, chain: Chain) -> str | None:
        """Why running the chain as one op, where its last node stands, could be seen; None where it cannot."""
        if any(node in self.claimed for node in chain.nodes):
            return "another op takes a part of it"
        if chain.residual is not None and chain.residual in chain.nodes:
            return "it is added to itself"
        first, last = self.position[chain.nodes[0]], self.position[chain.nodes[-1]]
        inside = set(chain.nodes)
        between = [n for n in self.nodes[first + 1 : last] if n not in inside]
        reads = [(chain.value, first)]
        if chain.residual is not None:
            reads.append((chain.residual, self.position[chain.add]))
        for value, position in reads:
            group = self._aliases(value)
            for node in between:
                if self.position[node] > position and any(w in group for w in self._writes(node)):
                    return f"`{node.name}` may write in between to what it reads"
        own = {id(self.module(n)) for n in (chain.conv, chain.norm) if n is not None}
        for node in between:
            module = self.module(node)
            if module is not None and any(id(m) in own for m in module.modules()):
                return f"`{node.name}` uses a part of it in between"
            if node.op == "get_attr" and any(str(node.target).startswith(f"{n.target}.") for n in chain.nodes):
                return f"`{node.name}` is read in between"
        for node in chain.nodes:
            for written in self._writes(node):
                if written not in inside:
                    reason = self._seen_later(written, self.position[node], inside)
                    if reason is not None:
                        return reason
        return None

    def _seen_later(self, written: fx.Node, position: int, inside: set[fx.Node]) -> str | None:
        """Why a write to a value that comes from outside a chain may be seen."""
        for alias in self._aliases(written) - inside:
            if alias.op in ("placeholder", "get_attr"):
                return f"it writes in place to `{alias.name}`, which it does not own"
            for user in alias.users:
                if self.position[user] > position and user not in inside:
                    return f"it writes in place to `{alias.name}`, which is used later"
        return None

    def _aliases(self, node: fx.Node) -> set[fx.Node]:
        """Every node whose value may share memory with the node's."""
        roots, todo = set(), [node]
        seen = set(todo)
        while todo:
            current = todo.pop()
            inputs = [] if self._is_fresh(current) else current.all_input_nodes
            if not inputs:
                roots.add(current)
            for upper in inputs:
                if upper not in seen:
                    seen.add(upper)
                    todo.append(upper)
        if any(root.op == "placeholder" for root in roots):  # callers may pass one tensor twice
            roots.update(n for n in self.nodes if n.op == "placeholder")
        group, todo = set(roots), list(roots)
        while todo:
            for user in todo.pop().users:
                if user not in group and user.op != "output" and not self._is_fresh(user):
                    group.add(user)
                    todo.append(user)
        return group

    def _is_fresh(self, node: fx.Node) -> bool:
        """Whether the value surely has memory of its own."""
        if node.op == "call_module":
            return type(self.module(node)) in self.fresh
        return node.op == "call_function" and node.target in _FRESH_FUNCTIONS and "out" not in node.kwargs

    def _writes(self, node: fx.Node) -> list[fx.Node]:
        """The inputs that a node may write to."""
        inputs = node.all_input_nodes
        if node.op == "call_module":
            module = self.module(node)
            if type(module) in self.fresh or type(module) is nn.Identity:
                return []
            if module is None:
                return inputs
            if type(module).__module__.startswith("torch.nn.modules") and not module._modules:
                return inputs if getattr(module, "inplace", False) else []
            return [] if norm_kind(module) is not None and not has_hooks(module) else inputs
        if node.op == "call_method":
            name = str(node.target)
            return inputs[:1] if name.endswith("_") else []  # x.add_(...), x.__setitem__(...)
        if node.op == "call_function":
            target = node.target
            name, home = getattr(target, "__name__", ""), getattr(target, "__module__", None) or ""
            if "out" in node.kwargs:
                return inputs
            in_place = target in _IN_PLACE or (name.endswith("_") and not name.endswith("__"))
            if in_place or any(arg is True for arg in node.args[1:]) or node.kwargs.get("inplace", False) is not False:
                return [n for n in inputs if n is node.args[0]] or inputs
            known = home.startswith(("torch", "_operator", "builtins", "math")) or getattr(torch, name, None) is target
            return [] if known else inputs
        return []
