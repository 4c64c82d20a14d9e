"""Configuration is frozen dataclasses; here they become JSON and back, and take dotted overrides."""

from __future__ import annotations

import dataclasses
import difflib
import json
import types
import typing
from enum import Enum
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

T = TypeVar("T")


class BadInput(ValueError):
    """The one error for input that a person can mend; its message is one line that names the mend."""


def to_json(obj: Any) -> str:
    """A dataclass as JSON text; a member of a union of dataclasses carries its name under "type"."""
    return json.dumps(plain(obj, type(obj)), indent=1, ensure_ascii=False)


def from_json(cls: type[T], text: str) -> T:
    """The dataclass that `to_json` wrote. Raises BadInput for what does not fit."""
    try:
        data = json.loads(text)
    except json.JSONDecodeError as error:
        raise BadInput(f"not JSON: {error}") from error
    return parse(cls, data, cls.__name__)


def plain(value: Any, kind: Any) -> Any:
    if dataclasses.is_dataclass(value):
        hints = get_type_hints(type(value))
        fields = {f.name: plain(getattr(value, f.name), hints[f.name]) for f in dataclasses.fields(value)}
        return {"type": type(value).__name__, **fields} if get_origin(kind) in (Union, types.UnionType) else fields
    args = get_args(kind)
    if isinstance(value, dict):
        return {k: plain(v, args[1] if args else Any) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v, args[0] if args else Any) for v in value]
    return value.value if isinstance(value, Enum) else value


def parse(kind: Any, data: Any, where: str) -> Any:
    origin, args = get_origin(kind), get_args(kind)
    if kind is Any:
        return data
    if origin in (Union, types.UnionType):
        return parse_union(args, data, where)
    if dataclasses.is_dataclass(kind):
        return parse_fields(kind, data, where)
    if origin is dict:
        expect(isinstance(data, dict), where, "an object", data)
        return {k: parse(args[1], v, f"{where}.{k}") for k, v in data.items()}
    if origin in (tuple, list):
        expect(isinstance(data, list), where, "a list", data)
        fixed = origin is tuple and not (len(args) == 2 and args[1] is Ellipsis)
        kinds = args if fixed else [args[0]] * len(data)
        return origin(parse(k, v, f"{where}[{i}]") for i, (k, v) in enumerate(zip(kinds, data, strict=True)))
    if isinstance(kind, type) and issubclass(kind, Enum):
        return kind(data)
    if kind is float and isinstance(data, int) and not isinstance(data, bool):
        return float(data)
    expect(isinstance(data, kind) and (kind is bool or not isinstance(data, bool)), where, kind.__name__, data)
    return data


def parse_union(kinds: tuple, data: Any, where: str) -> Any:
    if data is None and type(None) in kinds:
        return None
    classes = {k.__name__: k for k in kinds if dataclasses.is_dataclass(k)}
    if classes and isinstance(data, dict):
        name = data.get("type")
        expect(name in classes, f"{where}.type", " or ".join(classes), name)
        return parse_fields(classes[name], {k: v for k, v in data.items() if k != "type"}, where)
    for kind in kinds:
        try:
            return parse(kind, data, where)
        except BadInput:
            continue
    raise BadInput(f"{where}: {data!r} is none of {', '.join(str(k) for k in kinds)}")


def parse_fields(cls: type, data: Any, where: str) -> Any:
    expect(isinstance(data, dict), where, "an object", data)
    hints = get_type_hints(cls)
    names = [f.name for f in dataclasses.fields(cls)]
    for key in data:
        if key not in names:
            near = difflib.get_close_matches(key, names, 1)
            raise BadInput(f"unknown key {where}.{key}" + (f": did you mean {near[0]!r}?" if near else f"; known: {', '.join(names)}"))
    try:
        return cls(**{k: parse(hints[k], v, f"{where}.{k}") for k, v in data.items()})
    except TypeError as error:
        raise BadInput(f"{where}: {error}") from error


def expect(holds: bool, where: str, wanted: str, found: Any) -> None:
    if not holds:
        raise BadInput(f"{where}: expected {wanted}, found {found!r}")


def override(obj: T, setting: str) -> T:
    """A copy with one dotted key changed: "train.optimizer.lr=1e-3". The value is JSON, or else a bare string."""
    path, sign, text = setting.partition("=")
    if not sign:
        raise BadInput(f"--set {setting!r}: expected key=value")
    data = plain(obj, type(obj))
    *parents, last = path.split(".")
    node = data
    for i, key in enumerate([*parents, last]):
        if not isinstance(node, dict) or key not in node:
            names = list(node) if isinstance(node, dict) else []
            near = difflib.get_close_matches(key, names, 1)
            raise BadInput(f"unknown key {'.'.join(path.split('.')[: i + 1])}" + (f": did you mean {near[0]!r}?" if near else f"; known: {', '.join(names)}"))
        if i < len(parents):
            node = node[key]
    try:
        node[last] = json.loads(text)
    except json.JSONDecodeError:
        node[last] = text
    return parse(type(obj), data, type(obj).__name__)
