"""Configuration is frozen dataclasses; here they become JSON and back, and take dotted overrides.

A field may be bool, int, float, str, None, an Enum, a Literal, a Path, a dataclass, a list or tuple or dict of these,
or a union. Where a union holds dataclasses, the JSON object carries the name of its class under "type". What is read
is checked against the annotations, so that `from_json(type(x), to_json(x)) == x` and nothing else comes through.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import json
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from types import UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

T = TypeVar("T")

PYTHON: dict[str, Any] = {"true": True, "false": False, "none": None}
"""What people write who think in Python and not in JSON."""


class BadInput(ValueError):
    """The one error for input that a person can mend; its message is one line that names the mend."""


# ---- out ----------------------------------------------------------------------------------------------------------


def to_json(obj: Any) -> str:
    """A dataclass as JSON text; equal objects of one class give equal text."""
    return json.dumps(plain(obj, type(obj)), indent=1, ensure_ascii=False)


def plain(value: Any, kind: Any) -> Any:
    """`value`, which stands in a field declared as `kind`, as JSON data."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {name: plain(getattr(value, name), hint) for name, hint in field_kinds(type(value)).items()}
        return {"type": type(value).__name__, **fields} if is_union(kind) else fields
    if is_union(kind):
        kind = next((k for k in get_args(kind) if get_origin(k) is type(value)), Any)
    if isinstance(value, dict):
        inner = get_args(kind)[1] if get_args(kind) else Any
        return {str(plain(k, Any)): plain(v, inner) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v, k) for v, k in zip(value, item_kinds(kind, len(value)), strict=True)]
    if isinstance(value, Enum):
        return value.value
    return str(value) if isinstance(value, Path) else value


# ---- in -----------------------------------------------------------------------------------------------------------


def from_json(cls: type[T], text: str) -> T:
    """The dataclass that `to_json` wrote. Raises BadInput, naming the key, for what does not fit `cls`."""
    try:
        data = json.loads(text)
    except json.JSONDecodeError as error:
        raise BadInput(f"not JSON: {error}") from error
    return parse(cls, data, cls.__name__)


def parse(kind: Any, data: Any, where: str) -> Any:
    """JSON data as a value of `kind`; `where` is the dotted path that an error names."""
    origin, inner = get_origin(kind), get_args(kind)
    if kind is Any:
        return data
    if is_union(kind):
        return parse_union(kind, data, where)
    if origin is Literal:
        expect(any(data == choice and type(data) is type(choice) for choice in inner), where, kind, data)
        return data
    if dataclasses.is_dataclass(kind):
        return parse_fields(kind, data, where)
    if dict in (kind, origin):
        expect(isinstance(data, dict), where, "an object", data)
        key_kind, value_kind = inner or (str, Any)
        return {parse_key(key_kind, k, where): parse(value_kind, v, f"{where}.{k}") for k, v in data.items()}
    if origin in (tuple, list) or kind in (tuple, list):
        expect(isinstance(data, list), where, "a list", data)
        kinds = item_kinds(kind, len(data))
        expect(len(kinds) == len(data), where, f"a list of {len(kinds)}", data)
        return (origin or kind)(parse(k, v, f"{where}.{i}") for i, (k, v) in enumerate(zip(kinds, data, strict=True)))
    return parse_scalar(kind, data, where)


def parse_scalar(kind: Any, data: Any, where: str) -> Any:
    if issubclass(kind, Enum):
        choices = {member.value: member for member in kind}
        expect(isinstance(data, (str, int, float)) and data in choices, where, " or ".join(map(repr, choices)), data)
        return choices[data]
    if kind is Path:
        expect(isinstance(data, str), where, "a path", data)
        return Path(data)
    number = isinstance(data, (int, float)) and not isinstance(data, bool)
    if kind is float and number:
        return float(data)
    if kind is int and number and float(data).is_integer():
        return int(data)  # 1e6 is how people write a million
    expect(isinstance(data, kind) and (kind is bool or not isinstance(data, bool)), where, kind, data)
    return data


def parse_union(kind: Any, data: Any, where: str) -> Any:
    """A dataclass by its tag; otherwise the member of exactly this type, or else the first that takes it."""
    kinds = get_args(kind)
    classes = {k.__name__: k for k in kinds if dataclasses.is_dataclass(k)}
    if classes and isinstance(data, dict) and ("type" in data or dict not in map(get_origin, kinds)):
        name = data.get("type", next(iter(classes)) if len(classes) == 1 else None)
        if name not in classes:
            raise BadInput(f"{where}.type: expected {' or '.join(classes)}, found {name!r}{nearest(name, classes)}")
        return parse_fields(classes[name], {k: v for k, v in data.items() if k != "type"}, where)
    for member in sorted(kinds, key=lambda k: k is not type(data)):
        try:
            return parse(member, data, where)
        except BadInput:
            continue
    raise BadInput(f"{where}: expected {spell(kind)}, found {data!r}")


def parse_fields(cls: Any, data: Any, where: str) -> Any:
    expect(isinstance(data, dict), where, f"an object of {cls.__name__}", data)
    kinds = field_kinds(cls)
    for key in data:
        if key not in kinds:
            raise BadInput(f"unknown key {key!r} in {where}{nearest(key, kinds)}; it has: {', '.join(kinds)}")
    return build(cls, {k: parse(kinds[k], v, f"{where}.{k}") for k, v in data.items()}, where)


def build(cls: Any, fields: dict[str, Any], where: str) -> Any:
    """An instance of `cls`; what it refuses itself becomes BadInput that says where."""
    required = [f.name for f in dataclasses.fields(cls) if f.init and is_required(f)]
    if missing := [name for name in required if name not in fields]:
        raise BadInput(f"{where}: {', '.join(missing)} must be given")
    try:
        return cls(**fields)
    except ValueError as error:
        raise BadInput(f"{where}: {error}") from error


def parse_key(kind: Any, key: str, where: str) -> Any:
    """Keys of JSON objects are strings; those of ours may also be numbers and enums."""
    return parse(kind, int(key) if kind is int and key.lstrip("-").isdigit() else key, where)


# ---- overrides ----------------------------------------------------------------------------------------------------


def override(obj: T, setting: str) -> T:
    """A copy with one dotted key changed, as `override(run, "train.optimizer.lr=1e-3")`.

    The text is read by the type of the field: JSON or a bare string, "a,b" for a list, and the name of a class alone
    where a union of dataclasses stands. Raises BadInput, naming the nearest key, for one that does not exist.
    """
    path, sign, text = setting.partition("=")
    if not sign or not path:
        raise BadInput(f"--set {setting!r}: expected key=value, as train.num_steps=100")
    try:
        return replace(obj, type(obj), path.split("."), text, "")
    except UnknownKey as error:
        close = sorted(paths(obj), key=lambda p: -similarity(p, path))[:1]
        others = [p for p in paths(obj) if p.split(".")[-1] == path.split(".")[-1]] or close
        raise BadInput(f"--set {setting}: {error}; did you mean {' or '.join(others[:3])}?") from None


class UnknownKey(BadInput):
    """Raised inside `override`, which knows the whole tree and so names the nearest key."""


def replace(value: Any, kind: Any, keys: list[str], text: str, where: str) -> Any:
    """`value` with what lies at `keys` below it read anew from `text`."""
    if not keys:
        return read(kind, text, where)
    (key, *rest), place = keys, where or "the top"
    below = f"{where}.{key}" if where else key
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        kinds = field_kinds(type(value))
        if key not in kinds:
            raise UnknownKey(f"unknown key {key!r} at {place}, which has: {', '.join(kinds)}")
        fields = {name: getattr(value, name) for name in kinds}
        return build(type(value), fields | {key: replace(fields[key], kinds[key], rest, text, below)}, place)
    if is_union(kind):
        kind = next((k for k in get_args(kind) if get_origin(k) is type(value)), Any)
    if isinstance(value, dict):
        inner = get_args(kind) or (str, Any)
        name = parse_key(inner[0], key, where)
        if rest and name not in value:
            raise UnknownKey(f"unknown key {key!r} at {place}, which has: {', '.join(map(str, value))}")
        return value | {name: replace(value.get(name), inner[1], rest, text, below)}
    if isinstance(value, (list, tuple)):
        if not key.isdigit() or int(key) >= len(value):
            raise UnknownKey(f"{place} has {len(value)} items and none at {key!r}")
        kinds, i = item_kinds(kind, len(value)), int(key)
        return type(value)([*value[:i], replace(value[i], kinds[i], rest, text, below), *value[i + 1 :]])
    raise UnknownKey(f"{place} is {value!r} and has no key {key!r}")


def read(kind: Any, text: str, where: str) -> Any:
    """The first reading of `text` that is a `kind`."""
    if text in (k.__name__ for k in get_args(kind) if is_union(kind) and dataclasses.is_dataclass(k)):
        return parse(kind, {"type": text}, where)
    for data in readings(text):
        try:
            return parse(kind, data, where)
        except BadInput:
            if isinstance(data, dict):  # no other reading is meant, and its own error says more
                raise
    raise BadInput(f"{where}: expected {spell(kind)}, found {text!r}")


def readings(text: str) -> Iterator[Any]:
    """What a person may mean by the right side of --set."""
    yield from as_json(text)
    if text.lower() in PYTHON:
        yield PYTHON[text.lower()]
    yield text
    items = text.strip().removeprefix("(").removesuffix(")").strip().rstrip(",")
    yield from as_json(f"[{items}]")
    words = [item.strip() for item in items.split(",")]
    yield [next(as_json(word), word) for word in words]
    yield words


def as_json(text: str) -> Iterator[Any]:
    try:
        yield json.loads(text)
    except json.JSONDecodeError:
        return


def paths(value: Any, root: str = "") -> Iterator[str]:
    """Every dotted key below `value`."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        children = {name: getattr(value, name) for name in field_kinds(type(value))}
    else:
        children = {str(k): v for k, v in value.items()} if isinstance(value, dict) else {}
    for name, child in children.items():
        yield root + name
        yield from paths(child, f"{root}{name}.")


# ---- annotations --------------------------------------------------------------------------------------------------


@functools.cache
def field_kinds(cls: Any) -> dict[str, Any]:
    """The fields that make an instance, with their annotations resolved."""
    hints = get_type_hints(cls)
    return {f.name: hints[f.name] for f in dataclasses.fields(cls) if f.init}


def is_required(field: dataclasses.Field) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def is_union(kind: Any) -> bool:
    return get_origin(kind) in (Union, UnionType)


def item_kinds(kind: Any, count: int) -> list[Any]:
    """The annotation of each of `count` items; of a tuple of fixed length, of each that it has."""
    inner = get_args(kind)
    if not inner:
        return [Any] * count
    if get_origin(kind) is tuple and not (len(inner) == 2 and inner[1] is Ellipsis):
        return list(inner)
    return [inner[0]] * count


def spell(kind: Any) -> str:
    if is_union(kind):
        return " or ".join(map(spell, get_args(kind)))
    return kind.__name__ if isinstance(kind, type) and not get_args(kind) else str(kind)


def expect(holds: bool, where: str, wanted: Any, found: Any) -> None:
    if not holds:
        wanted = wanted if isinstance(wanted, str) else spell(wanted)
        raise BadInput(f"{where}: expected {wanted}, found {found!r}")


def nearest(key: Any, known: Any) -> str:
    """ ": did you mean 'lr'?", or nothing if nothing is near."""
    close = difflib.get_close_matches(str(key), list(known), 1)
    return f": did you mean {close[0]!r}?" if close else ""


def similarity(a: str, b: str) -> float:
    return difflib.SequenceMatcher(None, a, b).ratio()
