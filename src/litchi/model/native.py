"""The trunk of the network in C++ for CPUs: several times faster than torch, and exact whoever is read together.

    trunk = Trunk(model, weights="bfloat16")           # packs the weights once; later changes of the model are not seen
    keys, values = trunk.pages(num_pages=64, page=32)  # opaque: pages may be copied, swapped and shared as a whole
    x_TD = model.embed(batch, model.see(batch))        # the ways in stay in torch
    hidden_TD = trunk.run(x_TD, rotation, keys, values, sequence, slot, end, tables)
    scores = trunk.logits(hidden_TD[rows])             # the last norm and the language head; model.finish is the norm

What is computed for a token depends on its own row, its rotation and the keys and values that it reads, and on nothing
else, bit for bit: not on how many tokens or sequences a call has, how a prompt is cut, where pages lie, how large they
are, or how many threads there are. (With another build or kind of CPU, bits may differ.) Arithmetic: the residual
stream, norms, softmax and sums are fp32; rows are rounded to the weights' format before a product, queries, keys and
softmax weights to that of the pages. oracle: Model.forward

T tokens, S sequences, D width, H query heads, G key-value heads, K head width, P pages, V vocabulary.
"""

from __future__ import annotations

import ctypes
import logging
import math
from collections.abc import Sequence
from ctypes import POINTER, Structure, c_float, c_int32, c_long, c_void_p
from functools import cache
from pathlib import Path

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from litchi.config import BadInput
from litchi.model.compiled import compile_once, compiler
from litchi.model.native_adapters import Chosen
from litchi.model.network import Expert, Model, ModelConfig
from litchi.model.packing import BLOCK, KINDS, Format
from litchi.model.vision import Tower

log = logging.getLogger("litchi.start")

HEADERS = (
    "native_product.h",
    "native_halves.h",
    "native_attention.h",
    "native_eight.h",
    "native_pack.h",
    "native_lora.h",
)
SOURCES = tuple(Path(__file__).with_name(name) for name in ("native.cpp", *HEADERS))
HEADS: dict[Format, Format] = {"int4": "int8", "w4a8": "w8a8"}
"""What the head is kept in, where that is not what the layers are."""
MAX_HEAD_WIDTH = 256
PAGES = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}
"""Types of keys and values, as C++ counts them; those of int8 have a scale of 4 bytes."""


def unsupported(c: ModelConfig) -> str:
    """Why this path cannot run such a network, in one sentence; empty if it can."""
    deep = any(isinstance(kind, Tower) and kind.deep for kind in c.modalities.values())
    reasons = {
        "its layers have two experts": c.experts != 1,
        "its MLPs are mixtures": c.mixture is not None,
        "its norms are LayerNorms": c.norm != "rms",
        "its MLPs are not SwiGLU": c.activation != "silu",
        "its positions are learned": c.places > 0,
        "its tower writes to later layers": deep,
        f"its widths are not multiples of {BLOCK}": any(n % BLOCK for n in (c.width, c.mlp_width, c.head_width)),
        f"its heads are wider than {MAX_HEAD_WIDTH}": c.head_width > MAX_HEAD_WIDTH,
    }
    found = next((reason for reason, holds in reasons.items() if holds), "")
    if found:
        return f"the native path does not know this network: {found}"
    return "" if compiler() else "the native path needs a C++ compiler: install g++ or clang++"


def supports(c: ModelConfig) -> bool:
    """Whether a Trunk can be built here; `unsupported` says why not."""
    return not unsupported(c)


class CMatrix(Structure):
    _fields_ = [("data", c_void_p), ("bias", c_void_p)] + [(n, c_int32) for n in ("kind", "inner", "outputs", "pad")]


class CLayer(Structure):
    _fields_ = [(n, CMatrix) for n in ("qkv", "out", "gate_up", "down")] + [
        (n, c_void_p) for n in ("norm", "late_norm", "q_norm", "k_norm")
    ]


class CNetwork(Structure):
    _fields_ = [
        (n, c_int32) for n in ("width", "layers", "heads", "kv_heads", "head_width", "mlp_width", "kv_kind")
    ] + [("epsilon", c_float), ("layer", POINTER(CLayer)), ("norm", c_void_p), ("head", CMatrix)]


class CCall(Structure):
    _fields_ = [
        (n, c_int32) for n in ("tokens", "sequences", "max_pages", "num_pages", "page", "threads", "widest")
    ] + [
        (n, c_void_p)
        for n in (
            *("x", "cos", "sin", "hidden", "keys", "values"),
            *("sequence", "slot", "end", "tables", "adapters", "room"),
        )
    ]


@cache
def library(flags: tuple[str, ...] = ()) -> ctypes.CDLL:
    """The compiled source. Raises BadInput without a compiler."""
    lib = compile_once(SOURCES, flags)
    lib.litchi_room.argtypes, lib.litchi_room.restype = [c_void_p, c_void_p], c_long
    lib.litchi_run.argtypes = [c_void_p, c_void_p]
    lib.litchi_head_room.argtypes, lib.litchi_head_room.restype = [c_void_p, c_int32], c_long
    lib.litchi_head.argtypes = [c_void_p, c_void_p, c_int32, c_int32, c_void_p, c_int32, c_void_p]
    lib.litchi_packed.argtypes, lib.litchi_packed.restype = [c_int32, c_int32, c_int32], c_long
    lib.litchi_pack.argtypes = [c_void_p, c_int32, c_int32, c_int32, c_void_p, c_int32, c_int32]
    lib.litchi_fit.argtypes = [c_void_p, c_void_p, c_long, c_void_p, c_void_p, c_int32]
    lib.litchi_settle.argtypes = [c_void_p, c_long]
    return lib


class Arena:
    """Memory in large pages where the system has them, so that fewer addresses must be looked up."""

    PAGE, CHUNK = 2**21, 2**26

    def __init__(self, lib: ctypes.CDLL, chunk: int = CHUNK) -> None:
        self.lib, self.chunk, self.left = lib, chunk, torch.empty(0, dtype=torch.uint8)

    def take(self, size: int) -> UInt8[Tensor, "size"]:
        """Bytes that begin at a cache line."""
        if len(self.left) < size:
            room = torch.empty(max(size, self.chunk) + self.PAGE, dtype=torch.uint8)
            self.left = room[-room.data_ptr() % self.PAGE :]
            self.lib.litchi_settle(self.left.data_ptr(), len(self.left))
        taken, self.left = self.left[:size], self.left[size + -size % 64 :]
        return taken


class Trunk:
    """The layers and the language head of a model, packed. Not for two threads at once: it keeps its working memory."""

    def __init__(
        self,
        model: Model,
        dtype: torch.dtype = torch.bfloat16,
        weights: Format = "bfloat16",
        *,
        threads: int = 0,
        flags: tuple[str, ...] = (),
        take: bool = False,
    ) -> None:
        """`take` leaves the matrices of the model's layers empty once they are packed: nobody else may need them.

        `dtype` (bfloat16, float32 or int8) is that of the pages. Of 4 bits the head keeps 8, as peers do.

        `threads` 0 is torch's number of them. Raises BadInput for a network that the path does not know.
        """
        c = model.config
        if why := unsupported(c):
            raise BadInput(why)
        if dtype not in PAGES:
            raise BadInput(f"pages are bfloat16, float32 or int8, not {dtype}")
        self.config, self.dtype, self.weights = c, dtype, weights
        self.threads = threads or torch.get_num_threads()
        self.lib = library(flags)
        self.arena = Arena(self.lib)
        self.adapters: Chosen | None = None
        """Those of the sequences of the next call, if any has one."""
        self.held: list[Tensor] = []
        """What the pointers below point to."""
        self.layers = (CLayer * c.num_layers)()
        for index in range(c.num_layers):
            expert = model.get_submodule(f"layers.{index}.experts.0")
            assert isinstance(expert, Expert)
            self.layers[index] = self.layer(expert)
            log.debug("packed layer %d", index)
            if take:
                for weight in expert.parameters():
                    weight.data = weight.new_empty(0) if weight.dim() == 2 else weight.data
        if take:
            self.lib.litchi_trim()
        head = model.embed_tokens.weight if c.tied else model.lm_head.weight
        self.network = CNetwork(
            *(c.width, c.num_layers, c.num_heads, c.num_kv_heads, c.head_width, c.mlp_width),
            PAGES[dtype],
            *(c.epsilon, self.layers, self.hold(model.get_parameter("norm.weight"))),
            self.matrix([head], None, HEADS.get(weights, weights)),
        )
        self.call, self.room = CCall(threads=self.threads), torch.empty(0, dtype=torch.uint8)
        self.at_network, self.at_call = ctypes.addressof(self.network), ctypes.addressof(self.call)

    def pages(self, num_pages: int, page: int = BLOCK) -> tuple[Tensor, Tensor]:
        """Room for keys and values, each (num_layers, num_pages, G, page, K); `page` is a multiple of 32 tokens.

        int8 has K + 4 bytes a token, of which the last are its scale as fp32.
        Every key is written before it is read, so that nothing need be cleared. Within a page values do not lie in the
        order of the shape: `packing.logical_keys` and `logical_values` give that.
        """
        if page % BLOCK or page <= 0:
            raise BadInput(f"a page has a multiple of {BLOCK} tokens, not {page}")
        c = self.config
        shape = (c.num_layers, num_pages, c.num_kv_heads, page, c.head_width + 4 * (self.dtype == torch.int8))
        size = math.prod(shape) * self.dtype.itemsize
        keys, values = (Arena(self.lib, size).take(size).view(self.dtype).view(shape) for _ in range(2))
        return keys, values

    def run(
        self,
        x_TD: Float[Tensor, "T D"],
        rotation: tuple[Float[Tensor, "T 1 K/2"], Float[Tensor, "T 1 K/2"]],
        keys: Float[Tensor, "num_layers P G page K"],
        values: Float[Tensor, "num_layers P G page K"],
        sequence: Int[Tensor, "T"],
        slot: Int[Tensor, "T"],
        end: Int[Tensor, "T"],
        tables: Int[Tensor, "S max_pages"],
    ) -> Float[Tensor, "T D"]:
        """Hidden states before the last norm, fp32. Keys and values of all tokens are written to their pages.

        Token t is number `slot[t]` of sequence `sequence[t]`, whose pages `tables` names, and reads its keys
        [0, end[t]); end > slot, and beyond slot + 1 where tokens of a span read each other: a layer writes the keys of
        all tokens of the call before any is read. All is contiguous; x and rotation fp32, indices int32.
        `self.adapters` says which sequence reads with which.
        Raises BadInput if an index lies outside of what it indexes.
        """
        cos, sin = rotation
        hidden_TD, call = torch.empty_like(x_TD), self.call
        assert x_TD.dtype == cos.dtype == torch.float32 and keys.dtype == values.dtype == self.dtype
        assert sequence.dtype == slot.dtype == end.dtype == tables.dtype == torch.int32
        assert all(t.is_contiguous() for t in (x_TD, cos, sin, keys, values, sequence, slot, end, tables))
        call.tokens = len(x_TD)
        if not call.tokens:
            return hidden_TD
        call.sequences, call.max_pages = tables.shape
        call.num_pages, call.page, call.threads = keys.shape[1], keys.shape[3], self.threads
        call.x, call.cos, call.sin, call.hidden = x_TD.data_ptr(), cos.data_ptr(), sin.data_ptr(), hidden_TD.data_ptr()
        call.keys, call.values, call.tables = keys.data_ptr(), values.data_ptr(), tables.data_ptr()
        call.adapters, call.widest = (None, 0) if self.adapters is None else self.adapters.given
        call.sequence, call.slot, call.end = sequence.data_ptr(), slot.data_ptr(), end.data_ptr()
        self.reserve(self.lib.litchi_room(self.at_network, self.at_call))
        call.room = self.room.data_ptr()
        if self.lib.litchi_run(self.at_network, self.at_call):
            raise BadInput("a sequence, slot, end or page lies outside of the tables: see Trunk.run for their meaning")
        return hidden_TD

    def logits(
        self, hidden_ND: Float[Tensor, "N D"], out: Float[Tensor, "N V"] | None = None, *, normed: bool = False
    ) -> Float[Tensor, "N V"]:
        """The last norm, unless rows are `normed`, and the language head on rows that `run` gave; fp32.

        Into `out` if given, contiguous fp32: fresh memory of this size costs a page fault every 4 KB.
        """
        hidden_ND, shape = hidden_ND.contiguous(), (len(hidden_ND), self.config.vocab_size)
        logits_NV = torch.empty(shape) if out is None else out
        assert hidden_ND.dtype == logits_NV.dtype == torch.float32
        assert logits_NV.shape == shape and logits_NV.is_contiguous()
        self.reserve(self.lib.litchi_head_room(self.at_network, len(hidden_ND)))
        arguments = (
            hidden_ND.data_ptr(),
            len(hidden_ND),
            int(normed),
            logits_NV.data_ptr(),
            self.threads,
            self.room.data_ptr(),
        )
        self.lib.litchi_head(self.at_network, *arguments)
        return logits_NV

    def reserve(self, size: int) -> None:
        if len(self.room) < size:
            self.room = torch.empty(size + size // 4, dtype=torch.uint8)

    # ---- packing ----

    def layer(self, expert: Expert) -> CLayer:
        a, m = expert.self_attn, expert.mlp
        heads = (a.q_proj, a.k_proj, a.v_proj)
        biases = [torch.cat([p.bias for p in heads]) if self.config.qkv_bias else None]
        biases += [interleave(m.gate_proj.bias, m.up_proj.bias) if self.config.mlp_bias else None]
        return CLayer(
            self.matrix([p.weight for p in heads], biases[0], self.weights),
            self.matrix([a.o_proj.weight], a.o_proj.bias, self.weights),
            self.matrix([m.gate_proj.weight, m.up_proj.weight], biases[1], self.weights, turns=True),
            self.matrix([m.down_proj.weight], m.down_proj.bias, self.weights),
            *(self.hold(expert.get_parameter(f"{n}.weight")) for n in ("input_layernorm", "post_attention_layernorm")),
            *(self.hold(a.get_parameter(f"{n}.weight")) for n in ("q_norm", "k_norm") if self.config.qk_norm),
        )

    def matrix(self, parts: Sequence[Tensor], bias: Tensor | None, form: Format, *, turns: bool = False) -> CMatrix:
        """Matrices below one another, or a panel of each by turns, as `interleave` lays out their biases.

        oracle: packing.pack
        """
        kind, inner, outputs = KINDS[form], parts[0].shape[1], sum(map(len, parts))
        room, panel = (
            self.arena.take(self.lib.litchi_packed(outputs, inner, kind)),
            self.lib.litchi_packed(1, inner, kind),
        )
        at = room.data_ptr()
        for index, part in enumerate(parts):
            weight = part.detach().float().contiguous()
            to, step = (room.data_ptr() + index * panel, len(parts)) if turns else (at, 1)
            self.lib.litchi_pack(weight.data_ptr(), len(weight), inner, kind, to, step, self.threads)
            at += len(weight) // BLOCK * panel
        self.held.append(room)
        return CMatrix(room.data_ptr(), None if bias is None else self.hold(bias), kind, inner, outputs, 0)

    def hold(self, vector: Tensor) -> int:
        self.held.append(vector.detach().float().clone().contiguous())
        return self.held[-1].data_ptr()


def interleave(gate: Tensor, up: Tensor) -> Tensor:
    """Blocks of 32 rows by turns, so that one thread has a gate and what it lets through."""
    return torch.stack([gate.unflatten(0, (-1, BLOCK)), up.unflatten(0, (-1, BLOCK))], 1).flatten(0, 2)
