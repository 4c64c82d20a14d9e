"""Every operation of a stretch of program and every byte it keeps alive, of real tensors or of fake ones.

What is alive is counted by storage: an operation may give back what it was given. Work of kernels that they do not
hand out is not seen.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

VIEWS = ("view", "_unsafe_view", "reshape", "transpose", "t", "permute", "expand", "slice", "select", "unsqueeze")
MORE_VIEWS = ("squeeze", "detach", "alias", "split", "unbind", "as_strided", "chunk", "split_with_sizes", "narrow")
SMOOTH = ("exp", "silu", "gelu", "softmax", "log", "tanh", "sigmoid", "cos", "sin", "sqrt", "pow", "logsumexp")
"""Parts of the names of operations that cost more than to read and write their values."""

Kind = str
"""What a price list tells apart: "product", "attention", "smooth", "plain", "view", or a collective's name."""


@dataclass(frozen=True, slots=True)
class Op:
    """One operation: what it is, the multiply-adds times two that it makes, and the bytes that it reads and writes."""

    name: str
    kind: Kind
    dtype: str
    flops: float
    num_bytes: int
    shape: tuple[int, ...] = ()
    """Of a product: rows, columns, depth."""
    group: tuple[int, ...] = ()
    """Of a collective: the ranks that take part."""


class Meter(TorchDispatchMode):
    """While it is entered, notes operations, bytes alive, and their peak. `known` are alive already."""

    def __init__(self, known: Iterable[Tensor] = (), *, listing: bool = False) -> None:
        super().__init__()
        self.alive = self.peak = 0
        self.ops: list[Op] = []
        self.listing = listing
        self.held: dict[int, tuple[weakref.ref, int]] = {}
        for tensor in known:
            self.see(tensor)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = self.call(func, args, kwargs or {})
        if func.namespace in ("prim", "profiler"):
            return out
        found = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        for tensor in found:
            self.see(tensor)
        if self.listing:
            self.ops.append(describe(func, args, kwargs or {}, out))
        return out

    def call(self, func: Any, args: Any, kwargs: Any) -> Any:
        return func(*args, **kwargs)

    def see(self, tensor: Tensor) -> None:
        """Count the storage of a tensor, if it is new."""
        self.count(getattr(tensor, "_local_tensor", tensor).untyped_storage())

    def count(self, storage: Any) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self.held:
            return
        self.held[key] = weakref.ref(storage, lambda _: self.forget(key)), size
        self.add(size)

    def forget(self, key: int) -> None:
        if key in self.held:
            self.alive -= self.held.pop(key)[1]

    def resized(self, storage: Any) -> None:
        """A storage has become larger or smaller, which no operation tells."""
        self.forget(storage._cdata)
        self.count(storage)

    def add(self, size: int) -> None:
        self.alive += size
        self.peak = max(self.peak, self.alive)

    @contextmanager
    def lasting(self) -> Iterator[Meter]:
        """As entering it, and FSDP2's storages, which are emptied and filled in place, are followed as well."""
        resize = torch.UntypedStorage.resize_

        def followed(storage: Any, size: int) -> Any:
            answer = resize(storage, size)
            self.resized(storage)
            return answer

        with patch.object(torch.UntypedStorage, "resize_", followed), self:
            yield self

    def mark(self) -> int:
        """Begin a new peak; gives what is alive."""
        self.peak = self.alive
        return self.alive

    def take(self) -> list[Op]:
        """The operations since the last call."""
        taken, self.ops = self.ops, []
        return taken


# ---- what an operation is -----------------------------------------------------------------------------------------


def describe(func: Any, args: Any, kwargs: Any, out: Any) -> Op:
    """What a price list needs to know of an operation that has run."""
    space, name = func.namespace, func._schema.name.split("::")[-1]
    read = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
    made = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
    first = made[0] if made else read[0] if read else None
    dtype = str(first.dtype).removeprefix("torch.") if first is not None else ""
    if space == "c10d":
        group = next((g for g in map(group_of, tree_leaves((args, kwargs))) if g), ())
        return Op(name, "collective", dtype, 0.0, max([size(t) for t in [*read, *made]], default=0), (), group)
    if name.strip("_") in VIEWS + MORE_VIEWS or name.startswith(("sym_", "is_", "_local_scalar")):
        return Op(name, "view", dtype, 0.0, 0)
    num_bytes = sum({t.untyped_storage()._cdata: size(t) for t in [*read, *made]}.values())
    if "scaled_dot_product" in name:
        q, k = read[:2] if "backward" not in name else read[1:3]
        flops = 4.0 * q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2] * q.shape[3]
        return Op(name, "attention", dtype, flops * (2.5 if "backward" in name else 1), num_bytes)
    if func.overloadpacket in flop_registry and made:
        a, b = read[-2:]
        shape = (a.numel() // a.shape[-1], b.shape[-1], a.shape[-1])
        return Op(name, "product", str(a.dtype).removeprefix("torch."), 2.0 * prod(shape), num_bytes, shape)
    kind = "smooth" if any(part in name for part in SMOOTH) else "plain"
    return Op(name, kind, dtype, 0.0, num_bytes)


def group_of(value: Any) -> tuple[int, ...]:
    """The ranks of a process group, as it stands among the arguments of a collective."""
    if not isinstance(value, torch.ScriptObject):
        return ()
    try:
        return tuple(dist.get_process_group_ranks(dist.ProcessGroup.unbox(value)))
    except (RuntimeError, KeyError, ValueError):
        return ()


def size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def prod(numbers: Iterable[int]) -> int:
    result = 1
    for number in numbers:
        result *= number
    return result
