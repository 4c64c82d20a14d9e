"""A checkpoint whose layers lie on the grid of four bits, rounded by what they read of some documents.

One layer after another is read from the file, fed, rounded and written: of the network no more is in memory than a
layer, and beside it what the documents have become so far and the products of one matrix's inputs. A layer reads what
the layers before it say once they are rounded, and within a layer the same holds: first queries, keys and values, then
what reads the heads, then gate and up, then down. Norms, tables, readers and writers stay as they were.

T tokens of all documents, D width, I inner values of a matrix.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path

import torch
from jaxtyping import Float, Int
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from litchi.config import BadInput, to_json
from litchi.model.adopt import CHECKED_PARAMETERS
from litchi.model.families import parameters
from litchi.model.feedback import feed_back
from litchi.model.network import MLP, Attention, Model, PlainMLP
from litchi.model.packing import BLOCK
from litchi.model.tensorfile import TensorFile, check_finite, open_tensors
from litchi.model.tensorwriter import TensorWriter
from litchi.model.weights import ORIGINAL, Unset, check_files, flush, from_hugging_face, load_config, publish, read_meta
from litchi.schema.processor import Builder, Processor
from litchi.schema.sequence import Batch, TokenSequence, pack

TOKENS, WINDOW = 32_768, 512
"""Read in all if nobody says otherwise, and read at once: a document of text, or several that are shorter."""
KEPT = ("step", "seconds", "torch", "from", "family")
"""Of what a checkpoint says of itself, what also holds for the rounded one."""

Seen = Sequence[tuple[Int[Tensor, "N"], Float[Tensor, "N X D"]]]


@dataclass(slots=True)
class Reading:
    """Some documents, and what the layers so far have made of them."""

    batch: Batch
    seen: Seen
    x_TD: Tensor


# ---- documents ----------------------------------------------------------------------------------------------------


def text_windows(path: Path, processor: Processor, tokens: int) -> list[TokenSequence]:
    """The first tokens of a file of plain text, cut into documents. Raises BadInput if it has not enough."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"{path} cannot be read as text ({error}): name a file of plain text in UTF-8") from error
    tokenizer = processor.tokenizer
    begin: list[int] = getattr(tokenizer, "bos", [])
    size = WINDOW - len(begin)
    ids = tokenizer.encode(text[: tokens * 16])[:tokens]
    if len(ids) < size:
        raise BadInput(f"{path} has {len(ids)} tokens: name a text of at least {size}, better of {TOKENS}")
    found = []
    for start in range(0, len(ids) // size * size, size):
        builder = Builder()
        for index in begin + ids[start : start + size]:
            builder.token(index)
        found.append(builder.build())
    return found


def batches(documents: Iterable[TokenSequence], tokens: int) -> Iterator[Batch]:
    """Documents laid together while they fit into `WINDOW` tokens, until there are so many tokens in all."""
    waiting: list[TokenSequence] = []
    for document in documents:
        if waiting and sum(map(len, waiting)) + len(document) > WINDOW:
            yield pack(waiting)
            waiting = []
        waiting.append(document)
        tokens -= len(document)
        if tokens <= 0:
            break
    if waiting:
        yield pack(waiting)


# ---- a checkpoint -------------------------------------------------------------------------------------------------


def calibrate(
    source: Path,
    folder: Path,
    documents: Iterable[Batch],
    *,
    dtype: torch.dtype = torch.float32,
    told: Callable[[], object] = lambda: None,
) -> int:
    """Write the rounded checkpoint beside `folder` and rename it there; returns how many weights were rounded.

    The same call after a kill goes on behind the last layer that was done. fp32 keeps the grid to the bit; bfloat16
    moves weights by a rounding, which packing finds again all but that. `told` is called after each layer.
    Raises BadInput for a folder that is not whole, and for weights that are no numbers.
    """
    meta = read_meta(source)
    check_files(source, meta)
    config, draft = load_config(source), folder.with_name(f".{folder.name}.writing")
    with torch.device("meta"), Unset():
        model = Model(config).eval().requires_grad_(False)
    with open_tensors(source / "model") as tensors, torch.inference_mode():
        names = {from_hugging_face(name): name for name in tensors.entries}
        shapes, layers = parameters(config), [*model.layers]
        around = read(tensors, {name: names[name] for name in shapes if not name.startswith("layers.")})
        model.load_state_dict(around, assign=True, strict=False)
        readings = [Reading(b, s := model.see(b), model.embed(b, s)) for b in documents]
        half = Halfway.found(draft, {"source": meta, "dtype": str(dtype)}, readings)
        own = [{n: names[n] for n in shapes if n.startswith(f"layers.{i}.")} for i in range(len(layers))]
        written = [name for index in range(half.done) for name in own[index].values()]
        writer = TensorWriter(draft / "model", {names[n]: s for n, s in shapes.items()}, dtype, written=written)
        for name, tensor in around.items():
            writer.put(names[name], tensor)
        nn.ModuleDict({n: m for n, m in model.named_children() if n != "layers"}).to("meta")
        del around
        for index in range(half.done, len(layers)):
            model.layers._modules = {str(index): layers[index]}
            model.load_state_dict(read(tensors, own[index]), assign=True, strict=False)
            count = round_layer(model, readings)
            for name, theirs in own[index].items():
                writer.put(theirs, model.get_parameter(name))
            layers[index].to("meta")
            half = half.after(count, readings)
            told()
        writer.finish()
    tokens = sum(len(r.x_TD) for r in readings)
    seal(source, draft, folder, meta, {"format": "int4", "weights": half.rounded, "tokens": tokens})
    half.path.unlink(missing_ok=True)
    return half.rounded


def read(tensors: TensorFile, wanted: Mapping[str, str]) -> dict[str, Tensor]:
    """By our names, of which each has its name in the file."""
    found = {name: tensors.read(theirs, torch.float32) for name, theirs in wanted.items()}
    for name, tensor in found.items():
        check_finite(tensor, name, tensors.path)
    return found


@dataclass(frozen=True, slots=True)
class Halfway:
    """How many layers a draft has, how many weights were rounded in them, and what they made of the documents."""

    path: Path
    claim: str
    """What is read and what is written: a draft of anything else is thrown away."""
    done: int = 0
    rounded: int = 0

    @classmethod
    def found(cls, draft: Path, said: Mapping[str, object], readings: Sequence[Reading]) -> Halfway:
        """Where an earlier call was killed, with readings set to that; or the beginning."""
        digest = sha256(json.dumps(said, sort_keys=True).encode())
        for r in readings:
            for column in (r.x_TD, r.batch.positions, r.batch.spans, r.batch.docs, r.batch.readable):
                digest.update(column.contiguous().numpy().data)
        fresh = cls(draft.with_suffix(".halfway"), digest.hexdigest())
        if fresh.path.is_file() and draft.is_dir():
            with safe_open(fresh.path, "pt") as file:
                known = file.metadata()
                if known["claim"] == fresh.claim:
                    for index, reading in enumerate(readings):
                        reading.x_TD = file.get_tensor(str(index))
                    return replace(fresh, done=int(known["done"]), rounded=int(known["rounded"]))
        shutil.rmtree(draft, ignore_errors=True)
        return fresh

    def after(self, count: int, readings: Sequence[Reading]) -> Halfway:
        """One layer further, on disk before it is said."""
        now, part = replace(self, done=self.done + 1, rounded=self.rounded + count), self.path.with_suffix(".part")
        for path in (self.path.with_suffix(".writing") / "model").iterdir():
            flush(path)
        known = {"claim": now.claim, "done": str(now.done), "rounded": str(now.rounded)}
        save_file({str(i): r.x_TD.contiguous() for i, r in enumerate(readings)}, part, metadata=known)
        flush(part)
        part.replace(self.path)
        return now


def seal(source: Path, draft: Path, folder: Path, meta: Mapping, said: Mapping[str, object]) -> None:
    """All that is no weight is as it was; then the draft takes its place."""
    config = load_config(source)
    (draft / "model" / "config.json").write_text(to_json(config))
    for name in (f"model/{ORIGINAL}", "run.json"):
        if (source / name).is_file():
            shutil.copy(source / name, draft / name)
    shutil.rmtree(draft / "processor", ignore_errors=True)
    shutil.copytree(source / "processor", draft / "processor")
    small = sum(shape.numel() for shape in parameters(config).values()) <= CHECKED_PARAMETERS
    publish(draft, folder, meta={k: meta[k] for k in KEPT if k in meta} | {"rounded": said}, check=small)


# ---- a layer ------------------------------------------------------------------------------------------------------


def round_layer(model: Model, readings: Sequence[Reading]) -> int:
    """Round the one layer that a model has here, and read on through it; returns how many weights were rounded."""
    [layer] = model.layers.children()
    count = 0
    for sets in steps(layer):
        for products, matrices in zip(inputs_of(model, readings, [s[0] for s in sets]), sets, strict=True):
            rows = [len(m.weight) for m in matrices]
            found = feed_back(torch.cat([m.weight for m in matrices]), products)
            for matrix, weight in zip(matrices, found.split(rows), strict=True):
                matrix.weight = nn.Parameter(weight.contiguous(), requires_grad=False)
            count += found.numel()
    for reading in readings:
        reading.x_TD = model.think(reading.x_TD, reading.batch, reading.seen, None)
        if not bool(reading.x_TD.isfinite().all()):
            raise BadInput("a layer makes infinity or NaN of these documents: convert the checkpoint again")
    return count


def steps(layer: nn.Module) -> Iterator[list[list[nn.Linear]]]:
    """What is rounded together, one step after another: sets of matrices that read the same."""
    heads = [m for m in layer.modules() if isinstance(m, Attention)]
    mlps = [m for m in layer.modules() if isinstance(m, MLP | PlainMLP)]
    yield of_blocks([a.q_proj, a.k_proj, a.v_proj] for a in heads)
    yield of_blocks([a.o_proj] for a in heads)
    yield of_blocks([m.gate_proj, m.up_proj] if isinstance(m, MLP) else [m.up_proj] for m in mlps)
    yield of_blocks([m.down_proj] for m in mlps)


def of_blocks(sets: Iterable[list[nn.Linear]]) -> list[list[nn.Linear]]:
    """Those that can be packed: others, of a width that is no multiple of 32, stay as they are."""
    return [s for s in sets if s[0].in_features % BLOCK == 0]


class Enough(Exception):  # noqa: N818
    """All that was looked for has been read."""


def inputs_of(model: Model, readings: Sequence[Reading], matrices: Sequence[nn.Linear]) -> list[Float[Tensor, "I I"]]:
    """The products of what each reads, over all documents: zero where an expert reads nothing."""
    found = [torch.zeros(m.in_features, m.in_features) for m in matrices]
    missing: set[int] = set()

    def look(index: int, x: Tensor) -> None:
        rows = x.flatten(0, -2)
        found[index].addmm_(rows.T, rows)
        missing.discard(index)
        if not missing:
            raise Enough

    handles = [m.register_forward_pre_hook(lambda _, x, i=i: look(i, x[0])) for i, m in enumerate(matrices)]
    for reading in readings if matrices else ():
        missing.update(range(len(matrices)))
        try:
            model.think(reading.x_TD, reading.batch, reading.seen, None)
        except Enough:
            continue
    for handle in handles:
        handle.remove()
    return found
