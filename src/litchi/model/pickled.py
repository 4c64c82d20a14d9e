"""A pickle is read as data: what it names stays a name, and what it would call is written down and never called.

    tree = read_pickle(data, path, {"torch.Size", "collections.OrderedDict"})

Nothing is imported and nothing runs, whatever the pickle says; a name that the caller did not admit is an error all
the same. Opcodes are decoded by the standard library's `pickletools`, which only reads; those that today's writers do
not use are refused. Memory stays within a small multiple of the pickle: it is built from what stands there, once.
"""

from __future__ import annotations

import io
import pickletools
import warnings
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from litchi.config import BadInput
from litchi.model.tensorfile import broken, show

NEWEST = 5
"""The latest protocol that Python has."""


@dataclass(frozen=True, slots=True, eq=False)
class Name:
    """A class, function or constant that the pickle names: `torch.float32`."""

    text: str


@dataclass(slots=True, eq=False)
class Made:
    """What would have been called, with what, and what the result would then have been given."""

    name: str
    args: tuple
    state: Any = None
    items: list = field(default_factory=list)
    pairs: dict = field(default_factory=dict)


@dataclass(frozen=True, slots=True, eq=False)
class Outside:
    """What the pickle keeps elsewhere, by the key that finds it."""

    key: Any


def read_pickle(data: bytes, path: Path, admitted: Collection[str] | None) -> Any:
    """The tree of a pickle: numbers, text, lists, tuples and dicts, and `Name`, `Made`, `Outside` for all else.

    `admitted` are the names that may stand in it; None admits any, where what they are does not matter to the caller.
    Raises BadInput for another name, and for a pickle that is cut off or broken.
    """
    machine = Machine(path, admitted)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of backslashes in names, which are refused anyway
            for opcode, argument, _ in pickletools.genops(io.BytesIO(data)):
                machine.step(opcode.name, argument)
    except BadInput:
        raise
    except (ValueError, IndexError, KeyError, TypeError, OverflowError) as error:
        broken(path, f"its pickle cannot be read ({type(error).__name__}: {str(error)[:120]})")
    if len(machine.stack) != 1 or machine.below:
        broken(path, "its pickle ends in the middle")
    return machine.stack[0]


class Machine:
    """The stack machine of pickle without its hands."""

    def __init__(self, path: Path, admitted: Collection[str] | None) -> None:
        self.path, self.admitted = path, admitted
        self.stack: list[Any] = []
        self.below: list[list[Any]] = []
        """Stacks that wait under a mark."""
        self.memo: dict[int, Any] = {}

    def step(self, name: str, argument: Any) -> None:
        if name in VALUES:
            self.stack.append(argument)
        elif name in CONSTANTS:
            self.stack.append(CONSTANTS[name]())
        elif name in TUPLES:
            count = TUPLES[name]
            self.stack[len(self.stack) - count :] = [tuple(self.last(count))]
        elif name in STEPS:
            STEPS[name](self, argument)
        else:
            raise ValueError(f"{name} is no opcode that a writer of today uses")

    def last(self, count: int) -> list[Any]:
        if len(self.stack) < count:
            raise IndexError("it takes more than there is")
        return self.stack[len(self.stack) - count :]

    def marked(self) -> list[Any]:
        """What stands above the last mark, which goes with it."""
        found, self.stack = self.stack, self.below.pop()
        return found

    def refer(self, text: str) -> None:
        if self.admitted is not None and text not in self.admitted:
            raise BadInput(
                f"{self.path} is a pickle that names {show(text)}, which has no place in such a file: nothing of it was"
                " run; take the file from a source that you trust, written by torch or Megatron alone"
            )
        self.stack.append(Name(text))


# ---- steps --------------------------------------------------------------------------------------------------------


def mark(m: Machine, _: Any) -> None:
    m.below.append(m.stack)
    m.stack = []


def remember(m: Machine, index: Any) -> None:
    m.memo[len(m.memo) if index is None else index] = m.stack[-1]


def recall(m: Machine, index: int) -> None:
    m.stack.append(m.memo[index])


def drop(m: Machine, _: Any) -> None:
    m.stack.pop()


def name(m: Machine, both: str) -> None:
    m.refer(both.replace(" ", ".", 1))


def name_on_stack(m: Machine, _: Any) -> None:
    inner, outer = m.stack.pop(), m.stack.pop()
    if not isinstance(inner, str) or not isinstance(outer, str):
        raise TypeError("a name in it is no text")
    m.refer(f"{outer}.{inner}")


def make(m: Machine, _: Any) -> None:
    args, called = m.stack.pop(), m.stack.pop()
    if not isinstance(called, Name) or not isinstance(args, tuple):
        raise TypeError("it calls what is no name")
    m.stack.append(Made(called.text, args))


def make_with_names(m: Machine, _: Any) -> None:
    named, args, called = m.stack.pop(), m.stack.pop(), m.stack.pop()
    if not isinstance(called, Name) or not isinstance(args, tuple):
        raise TypeError("it calls what is no name")
    m.stack.append(Made(called.text, (*args, named)))


def give_state(m: Machine, _: Any) -> None:
    state = m.stack.pop()
    if not isinstance(m.stack[-1], Made):
        raise TypeError("it gives a state to what has none")
    m.stack[-1].state = state


def append_all(m: Machine, _: Any) -> None:
    add_items(m, m.marked())


def append_one(m: Machine, _: Any) -> None:
    add_items(m, [m.stack.pop()])


def add_items(m: Machine, found: list[Any]) -> None:
    target = m.stack[-1]
    if not isinstance(target, list | Made):
        raise TypeError("it appends to what is no list")
    (target if isinstance(target, list) else target.items).extend(found)


def set_all(m: Machine, _: Any) -> None:
    add_pairs(m, m.marked())


def set_one(m: Machine, _: Any) -> None:
    value, key = m.stack.pop(), m.stack.pop()
    add_pairs(m, [key, value])


def add_pairs(m: Machine, found: list[Any]) -> None:
    target = m.stack[-1]
    if not isinstance(target, dict | Made) or len(found) % 2:
        raise TypeError("it sets keys in what is no dict")
    pairs = target if isinstance(target, dict) else target.pairs
    for key, value in zip(found[::2], found[1::2], strict=True):
        if not is_key(key) and not (isinstance(key, tuple) and all(map(is_key, key))):
            raise TypeError("a key in it is neither text nor a number")
        pairs[key] = value


def is_key(value: Any) -> bool:
    """Deeper keys are refused: to hash them takes Python's own stack."""
    return value is None or isinstance(value, str | int | float | bytes | Name | Made)


def make_list(m: Machine, _: Any) -> None:
    found = m.marked()
    m.stack.append(found)


def make_tuple(m: Machine, _: Any) -> None:
    found = tuple(m.marked())
    m.stack.append(found)


def make_dict(m: Machine, _: Any) -> None:
    found = m.marked()
    m.stack.append({})
    add_pairs(m, found)


def fetch(m: Machine, _: Any) -> None:
    m.stack.append(Outside(m.stack.pop()))


def check_protocol(_: Machine, version: int) -> None:
    if version > NEWEST:
        raise ValueError(f"protocol {version} is not known")


def nothing(_: Machine, __: Any) -> None:
    """Frames and the stop say nothing that a reader of bytes does not know."""


VALUES = {"BININT", "BININT1", "BININT2", "LONG1", "LONG4", "BINFLOAT"}
VALUES |= {"SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8", "SHORT_BINBYTES", "BINBYTES", "BINBYTES8"}
CONSTANTS: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_TUPLE": tuple,
    "EMPTY_LIST": list,
    "EMPTY_DICT": dict,
    "EMPTY_SET": list,
}
TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
STEPS: dict[str, Callable[[Machine, Any], None]] = {
    "MARK": mark,
    "MEMOIZE": remember,
    "BINPUT": remember,
    "LONG_BINPUT": remember,
    "BINGET": recall,
    "LONG_BINGET": recall,
    "POP": drop,
    "GLOBAL": name,
    "STACK_GLOBAL": name_on_stack,
    "REDUCE": make,
    "NEWOBJ": make,
    "NEWOBJ_EX": make_with_names,
    "BUILD": give_state,
    "APPENDS": append_all,
    "APPEND": append_one,
    "ADDITEMS": append_all,
    "SETITEMS": set_all,
    "SETITEM": set_one,
    "LIST": make_list,
    "TUPLE": make_tuple,
    "FROZENSET": make_list,
    "DICT": make_dict,
    "BINPERSID": fetch,
    "PROTO": check_protocol,
    "FRAME": nothing,
    "STOP": nothing,
}
