"""One trace under watch: what the model's own code reads is noted, and what a graph cannot stand for stops it."""

from __future__ import annotations

import builtins
import dis
import gc
import inspect
import math
import operator
import os
import sys
import threading
from collections.abc import Callable, Iterator
from types import BuiltinFunctionType, CodeType, FrameType, FunctionType, ModuleType
from typing import Any

import torch
from torch import Tensor, fx, nn

from fused_resnet.fusion.guards import MISSING, CannotFollow, Guard, look_up, observed
from fused_resnet.fusion.inputs import Input

_TORCH = os.path.dirname(torch.__file__) + os.sep
_HERE = os.path.dirname(__file__) + os.sep
_PYTHON = os.path.dirname(os.__file__) + os.sep

_SAFE_BUILTINS = frozenset(
    [
        "isinstance",
        "issubclass",
        "len",
        "getattr",
        "hasattr",
        "range",
        "enumerate",
        "zip",
        "tuple",
        "list",
        "dict",
        "set",
        "frozenset",
        "int",
        "float",
        "bool",
        "str",
        "reversed",
        "sum",
        "max",
        "min",
        "abs",
        "any",
        "all",
        "super",
        "sorted",
        "iter",
        "next",
        "slice",
        "round",
        "callable",
        "map",
        "filter",
        "Exception",
        "ValueError",
        "TypeError",
        "KeyError",
        "IndexError",
        "RuntimeError",
        "AssertionError",
        "NotImplementedError",
    ]
)
_FORBIDDEN = {
    "STORE_ATTR": "sets an attribute",
    "DELETE_ATTR": "deletes an attribute",
    "STORE_GLOBAL": "sets a global",
    "DELETE_GLOBAL": "deletes a global",
    "IMPORT_NAME": "imports",
    "SETUP_FINALLY": "handles exceptions or contexts",
    "SETUP_WITH": "enters a context",
    "BEFORE_WITH": "enters a context",
    "LOAD_SPECIAL": "enters a context",
    "PUSH_EXC_INFO": "handles exceptions or contexts",
    "LOAD_BUILD_CLASS": "defines a class",
    "STORE_DEREF": "sets a variable of an enclosing function",
}
_TORCH_CALLS = {  # file below torch/ -> names of functions there, or None for all
    "nn/modules/module.py": {"__call__", "_wrapped_call_impl", "_call_impl", "__getattr__"},
    "nn/modules/container.py": None,
    "nn/functional.py": None,
    "_jit_internal.py": {"is_scripting", "fn"},
    "jit/_trace.py": {"is_tracing"},
    "__init__.py": {"_assert"},
}
_MUST_RECORD = ("nn/functional.py", "__init__.py")
_PLAIN_OWNERS: tuple[type, ...] = (
    list,
    tuple,
    dict,
    set,
    frozenset,
    str,
    int,
    float,
    range,
    type({}.items()),
    type({}.values()),
)
_NONE_TESTS = ("POP_JUMP_IF_NONE", "POP_JUMP_IF_NOT_NONE", "POP_JUMP_FORWARD_IF_NONE", "POP_JUMP_FORWARD_IF_NOT_NONE")
_NEVER_NONE = ("placeholder", "call_function")
_LOADS_LOCAL = ("LOAD_FAST", "LOAD_FAST_CHECK", "LOAD_FAST_BORROW")
_LOADS_NAME = (*_LOADS_LOCAL, "LOAD_DEREF", "LOAD_CONST", "LOAD_ATTR", "LOAD_GLOBAL", "LOAD_METHOD")


def is_users(code: CodeType) -> bool:
    """Whether this is a model's own code rather than torch's, Python's or ours."""
    file = code.co_filename
    if file.startswith((_TORCH, _HERE, "<fused", "<frozen", "<string>")):
        return False
    return not file.startswith(_PYTHON) or "-packages" in file[len(_PYTHON) :]


class _Value(fx.Proxy):
    """A stand-in that refuses to be taken for, or not for, a type; the scope's inputs are known to be tensors."""

    @property
    def __class__(self) -> type:
        if is_users(sys._getframe(1).f_code):
            if self.node.op == "placeholder":
                return Tensor
            raise CannotFollow("asks for the type of a value that only a run knows")
        return _Value

    @__class__.setter
    def __class__(self, kind: type) -> None:
        raise CannotFollow("sets the class of a value")

    def __len__(self) -> int:
        raise CannotFollow("takes the length of a value that only a run knows")


def _in_place(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda self, other: self.tracer.create_proxy("call_function", function, (self, other), {})


for _name in [
    "add",
    "sub",
    "mul",
    "truediv",
    "floordiv",
    "mod",
    "pow",
    "matmul",
    "and",
    "or",
    "xor",
    "lshift",
    "rshift",
]:
    # fx takes `x += y` for `x = x + y`, which is another thing where x has another name.
    setattr(_Value, f"__i{_name}__", _in_place(getattr(operator, f"i{_name}")))


class Tracer(fx.Tracer):
    def __init__(self, inline: frozenset[nn.Module], inputs: tuple[Input, ...], defaults: dict[str, Any]) -> None:
        super().__init__(autowrap_modules=(math,))
        self.inline, self.inputs, self.defaults = inline, inputs, defaults
        self.inlined: dict[str, None] = {}
        self.proxy_buffer_attributes = True

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> tuple[Any, list[Any]]:
        given = {
            input.name: input.of([self.create_proxy("placeholder", name, (), {}) for name in input.names])
            for input in self.inputs
        }
        function = lambda: root_fn(self.root, **given, **self.defaults)  # noqa: E731
        return function, []

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Value(node, self)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if m in self.inline:
            self.inlined[module_qualified_name] = None
            return False
        return True

    def create_arg(self, a: Any) -> Any:
        if isinstance(a, Tensor) and not isinstance(a, nn.Parameter):
            raise CannotFollow("uses a tensor that is neither a parameter nor a buffer of the model")
        return super().create_arg(a)

    def to_bool(self, obj: fx.Proxy) -> bool:
        raise CannotFollow("decides by a value that only a run knows")

    def iter(self, obj: fx.Proxy) -> Iterator[Any]:
        frame = sys._getframe(2)
        names = [i.opname for i in dis.get_instructions(frame.f_code) if i.offset == frame.f_lasti]
        if names and names[0].startswith("UNPACK_"):
            return super().iter(obj)
        raise CannotFollow("iterates over a value that only a run knows")

    def keys(self, obj: fx.Proxy) -> Any:
        raise CannotFollow("takes the keys of a value that only a run knows")


class Watch:
    """Watches one trace: notes what the model's own code reads, and stops at what a graph cannot stand for."""

    def __init__(self, scope: nn.Module, tracer: Tracer) -> None:
        self.scope, self.tracer = scope, tracer
        self.thread = threading.get_ident()
        self.reads: dict[tuple[int, str], tuple[Any, Any]] = {}  # (holder, snapshot or MISSING where it is no value)
        self.holders: dict[int, Any] = {}
        self.containers: list[tuple[Any, list[Any]]] = []  # (list, dict or set that was read, what it held)
        self.seen: set[CodeType] = set()
        self.none_tests: dict[CodeType, dict[int, set[str]]] = {}
        self.pending: list[tuple[FrameType, bool, str, int]] = []  # (frame, a C function, name, nodes before)
        self.reason: str | None = None

    def refuse(self, reason: str) -> None:
        self.reason = self.reason or reason
        raise CannotFollow(reason)

    def read(self, holder: Any, name: str, value: Any) -> None:
        key = (id(holder), name)
        if name == "__dict__":
            self.refuse("reads attributes past its class")
        if isinstance(value, Tensor):
            self.refuse(f"reads `{name}`, a tensor that is neither a parameter nor a buffer")
        if key in self.reads or (name.startswith("__") and name.endswith("__")):
            return
        self.holders[id(holder)] = holder
        snapshot: Any = MISSING
        if value is not MISSING:
            try:
                kind, expected = observed(value)
            except CannotFollow:
                self.refuse(f"reads `{name}`, a {type(value).__name__}, which may change unseen")
            snapshot = expected if kind == "value" else MISSING
            self.keep(value)
        self.reads[key] = (holder, snapshot)

    def keep(self, value: Any) -> None:
        if isinstance(value, (list, dict, set)):
            self.containers.append((value, list(value.items()) if isinstance(value, dict) else list(value)))
        for part in value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ():
            self.keep(part)

    def put_back(self) -> bool:
        """Undo what the forward did to the containers that it read; whether it did anything."""
        changed = False
        for value, held in self.containers:
            now = list(value.items()) if isinstance(value, dict) else list(value)
            flat, kept = ([x for pair in p for x in pair] if isinstance(value, dict) else p for p in (now, held))
            if len(flat) == len(kept) and all(a is b for a, b in zip(flat, kept, strict=True)):
                continue
            changed = True
            value.clear()
            value.extend(held) if isinstance(value, list) else value.update(held)
        return changed

    def guards(self) -> Iterator[Guard]:
        paths = {id(module): path for path, module in self.scope.named_modules()}
        for (_, name), (holder, snapshot) in self.reads.items():
            value = look_up(holder, name)
            if value is MISSING and not isinstance(holder, nn.Module):
                raise CannotFollow(f"reads `{name}`, which is gone")
            kind, expected = observed(value)
            if snapshot is not MISSING and (kind, expected) != ("value", snapshot):
                raise CannotFollow(f"changes `{name}`")
            if not isinstance(holder, nn.Module):
                yield Guard("", holder, name, kind, expected)
            elif id(holder) in paths:
                yield Guard(paths[id(holder)], None, name, kind, expected)
            else:
                raise CannotFollow(f"reads `{name}` of a module that is no part of it")

    # sys.setprofile

    def profile(self, frame: FrameType, event: str, arg: Any) -> None:
        code = frame.f_code
        if event == "call":
            if is_users(code):
                self.scan(frame)
            elif frame.f_back is not None and is_users(frame.f_back.f_code):
                self.torch_call(code, frame)
        elif event == "return":
            if self.pending and self.pending[-1][:2] == (frame, False):
                self.recorded(arg is None)
        elif event == "c_call":
            if is_users(code):
                self.c_call(frame, arg)
        elif event in ("c_return", "c_exception") and self.pending and self.pending[-1][:2] == (frame, True):
            self.recorded(event == "c_exception")

    def recorded(self, failed: bool) -> None:
        *_, name, before = self.pending.pop()
        if not failed and len(self.tracer.graph.nodes) == before:
            self.refuse(f"calls {name} on something else than its inputs")

    def torch_call(self, code: CodeType, frame: FrameType) -> None:
        file = code.co_filename
        if file.startswith((_TORCH + "fx", _HERE)):
            return
        if not file.startswith(_TORCH):
            made = str(frame.f_globals.get("__name__")).startswith("namedtuple_")
            if not made and os.path.basename(file) not in ("typing.py", "enum.py"):
                self.refuse(f"calls {code.co_name} of {os.path.basename(file)}")
            return
        file = file.removeprefix(_TORCH).replace(os.sep, "/")
        if code.co_name in ("children", "named_children") and frame.f_locals.get("self") is self.scope:
            return  # the names of its children are guarded
        names: Any = _TORCH_CALLS.get(file, frozenset())
        if names is not None and code.co_name not in names:
            self.refuse(f"calls torch's {code.co_name}, which a graph cannot stand for")
        if file in _MUST_RECORD:
            self.pending.append((frame, False, code.co_name, len(self.tracer.graph.nodes)))

    def c_call(self, frame: FrameType, function: Any) -> None:
        name, owner = getattr(function, "__name__", "?"), getattr(function, "__self__", None)
        if owner is builtins and name in _SAFE_BUILTINS:
            return
        if isinstance(owner, _PLAIN_OWNERS) or owner is math or getattr(owner, "__name__", "") == "_operator":
            return
        if getattr(torch, name, None) is function or (isinstance(owner, ModuleType) and "torch._C" in owner.__name__):
            self.pending.append((frame, True, f"torch's {name}", len(self.tracer.graph.nodes)))
            return
        self.refuse(f"calls {name}")

    def scan(self, frame: FrameType) -> None:
        """Read the bytecode of a function of the model before it runs."""
        code = frame.f_code
        if code in self.seen:
            return
        self.seen.add(code)
        if code.co_flags & (inspect.CO_COROUTINE | inspect.CO_ASYNC_GENERATOR):
            self.refuse("is asynchronous")
        line, tests = code.co_firstlineno, self.none_tests.setdefault(code, {})
        instructions = [i for i in dis.get_instructions(code) if i.opname not in ("CACHE", "EXTENDED_ARG")]
        for index, instruction in enumerate(instructions):
            opname = instruction.opname
            start = instruction.starts_line
            if start is not None and start is not False:
                line = getattr(instruction, "line_number", None) or (start if start is not True else line)
            if opname in _FORBIDDEN and not (opname == "STORE_DEREF" and instruction.argval in code.co_cellvars):
                self.refuse(_FORBIDDEN[opname])
            elif opname in ("LOAD_GLOBAL", "LOAD_NAME", "LOAD_DEREF", "LOAD_CLASSDEREF"):
                self.outer_name(frame, instructions, index)
            elif opname in _NONE_TESTS:
                self.none_test(instructions[index - 1], line, tests)
            elif opname in ("IS_OP", "CONTAINS_OP"):
                before, last = instructions[max(index - 2, 0)], instructions[index - 1]
                if opname == "IS_OP" and last.opname == "LOAD_CONST" and last.argval is None:
                    self.none_test(before, line, tests)
                else:  # is it the same tensor? No stand-in can tell
                    for operand in (before, last):
                        if operand.opname in _LOADS_LOCAL:
                            tests.setdefault(line, set()).add(f"={operand.argval}")
        if tests:
            frame.f_trace = self.trace
            frame.f_trace_lines = True

    def none_test(self, operand: Any, line: int, tests: dict[int, set[str]]) -> None:
        if operand.opname in _LOADS_LOCAL:
            tests.setdefault(line, set()).add(operand.argval)
        elif operand.opname not in _LOADS_NAME:
            self.refuse("tests for None what only a run knows")

    def outer_name(self, frame: FrameType, instructions: list[Any], index: int) -> None:
        """A global or closure variable, and the attributes that are read off it if it is a namespace."""
        name, code = instructions[index].argval, frame.f_code
        if instructions[index].opname == "LOAD_DEREF" or name in code.co_freevars:
            if name in code.co_cellvars or name == "__class__":
                return
            holder: Any = None
            value = frame.f_locals.get(name, MISSING)
            if isinstance(value, fx.Proxy) or value is self.scope:
                return
        elif name in frame.f_globals:
            holder, value = frame.f_globals, frame.f_globals[name]
        else:
            value = getattr(builtins, name, MISSING)
            if name not in _SAFE_BUILTINS:
                self.refuse(f"uses `{name}`")
            return
        for following in instructions[index + 1 :]:
            if following.opname not in ("LOAD_ATTR", "LOAD_METHOD") or not isinstance(value, (ModuleType, type)):
                break
            holder, name = value, following.argval
            value = getattr(value, name, MISSING)
        plain = isinstance(value, (FunctionType, BuiltinFunctionType, type))  # calls of these are seen
        if plain or (callable(value) and type(value).__module__.startswith("torch.")):
            return
        if callable(value) and not isinstance(value, nn.Module):
            self.refuse(f"uses `{name}`, which nothing can watch")
        if isinstance(value, ModuleType):
            return
        if holder is None:
            self.refuse(f"uses `{name}` of an enclosing function")
        if isinstance(value, (nn.Module, Tensor)):
            self.refuse(f"uses the global `{name}`")
        if isinstance(holder, dict):
            holder = sys.modules.get(holder.get("__name__", "")) if holder.get("__name__") in sys.modules else None
            if holder is None or holder.__dict__ is not frame.f_globals:
                self.refuse(f"uses the global `{name}`")
        self.read(holder, name, value)

    # sys.settrace: only functions that test local variables for None

    def trace_call(self, frame: FrameType, event: str, arg: Any) -> Any:
        code = frame.f_code
        if event != "call" or not is_users(code):
            return None
        self.scan(frame)
        return self.trace if self.none_tests.get(code) else None

    def trace(self, frame: FrameType, event: str, arg: Any) -> Any:
        if event == "line":
            for name in self.none_tests.get(frame.f_code, {}).get(frame.f_lineno, ()):
                value = frame.f_locals.get(name.removeprefix("="))
                known = name[0] != "=" and isinstance(value, fx.Proxy) and value.node.op in _NEVER_NONE
                if isinstance(value, fx.Proxy) and not known:
                    self.refuse(f"tests what `{name.removeprefix('=')}` is, which only a run knows")
        return self.trace

    def run(self) -> fx.Graph:
        """Trace under watch."""
        watch = self

        def read(module: nn.Module, name: str) -> Any:
            users = threading.get_ident() == watch.thread and is_users(sys._getframe(1).f_code)
            try:
                value = object.__getattribute__(module, name)
            except AttributeError:
                if users:
                    watch.read(module, name, MISSING)
                raise
            if users:
                watch.read(module, name, value)
            return value

        collects = gc.isenabled()
        gc.disable()  # finalizers would be taken for the model's own code
        profile, trace = sys.getprofile(), sys.gettrace()
        nn.Module.__getattribute__ = read  # type: ignore[method-assign, assignment]
        try:
            if trace is None:  # a debugger or a coverage tool is at work
                sys.settrace(self.trace_call)
            sys.setprofile(self.profile)
            return self.tracer.trace(self.scope)
        finally:
            sys.setprofile(profile)
            sys.settrace(trace)
            del nn.Module.__getattribute__
            if collects:
                gc.enable()
            if self.put_back():
                self.reason = self.reason or "changes what it reads"
