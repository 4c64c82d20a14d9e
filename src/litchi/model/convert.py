"""Other people's folders become our weights, and ours become theirs, one tensor at a time.

Tensors are read from a map and written at their place, so that a model passes through that the machine could not
hold. Nothing is guessed: a tensor that is missing, left over or of another shape is an error that names it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from litchi.config import BadInput, nearest
from litchi.model.families import Link, Stacked, fitting_family, parameters, read_gguf, write_config
from litchi.model.frameworks import open_trained
from litchi.model.network import Model, ModelConfig
from litchi.model.tensorfile import TensorFile, check_finite, open_tensors
from litchi.model.tensorwriter import TensorWriter
from litchi.model.vlm import family_of, links, read_config, spellings

LEFT_OVER = ("rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias", "rope_freqs.weight")
"""Ends of names of tensors that are no weights: tables that old versions saved and anyone can compute."""

HEADS = {"lm_head.weight", "output.weight", "output_layer.weight"}
"""Names of the head: where it is the table, some save it again."""


@dataclass(frozen=True, slots=True)
class Foreign:
    """A folder or file of theirs, opened: its configuration as ours, and where each of its tensors goes."""

    config: ModelConfig
    family: str
    links: tuple[Link, ...]
    tensors: TensorFile
    original: Mapping[str, Any]
    """Their own configuration, whole: what of it says nothing to us is given back on the way out."""


def open_foreign(path: Path) -> Foreign:
    """A Hugging Face folder, a GGUF file, or a folder that Megatron-core, DeepSpeed or torch.distributed wrote.

    Raises BadInput for what is broken, unknown, or does not fit itself.
    """
    said = read_json(path / "config.json") if (path / "config.json").is_file() else None
    trained = open_trained(path, said) if path.is_dir() else None
    if trained is not None:
        config, family, original, tensors = trained.config, trained.family, trained.original, trained.tensors
        wanted = trained.links
    elif path.is_dir():
        original = read_json(path / "config.json")
        config, family = read_config(original), family_of(original)
        tensors, wanted = open_tensors(path), links(config, family)
    else:
        tensors = open_tensors(path)
        if "general.architecture" not in tensors.metadata:
            raise BadInput(f"{path} has no configuration in it: name the folder that also holds config.json")
        original, family = {}, "gguf"
        config = read_gguf(tensors.metadata, tensors.entries)
        wanted = links(config, family)
    known = tuple(resolve(link, tensors) for link in wanted)
    check(known, config, tensors)
    return Foreign(config, family, known, tensors, original)


def resolve(link: Link, tensors: TensorFile) -> Link:
    """The link under the name, and in the form, that this file has."""
    for name in spellings(link.theirs):
        if name in tensors.entries:
            form = link.form
            return Link(name, link.ours, form.found(tensors.entries[name].shape) if isinstance(form, Stacked) else form)
    head = "lm_head" in link.theirs or "output_layer" in link.theirs
    hint = " (config.json says that the head is not the table: tie_word_embeddings)" if head else ""
    raise BadInput(f"{tensors.path} has no {link.theirs!r}{hint}{nearest(link.theirs, tensors.entries)}")


def check(known: tuple[Link, ...], config: ModelConfig, tensors: TensorFile) -> None:
    """That every tensor is read once and has the shape that the configuration gives it."""
    shapes = parameters(config)
    for link in known:
        expected = link.export([torch.empty(shapes[name], device="meta") for name in link.ours]).shape
        found = tensors.entries[link.theirs].shape
        if tuple(found) != tuple(expected):
            raise BadInput(
                f"{tensors.path}: {link.theirs} has shape {list(found)}, config.json asks for {list(expected)}"
            )
    left = [name for name in tensors.entries if not name.endswith(LEFT_OVER)]
    over = set(left) - {link.theirs for link in known}
    if config.tied and (heads := {name for name in over if name in HEADS or name.endswith("lm_head.weight")}):
        check_tied(tensors, min(heads), known)
        over -= heads
    if over:
        raise BadInput(f"{tensors.path} holds {len(over)} tensors that nothing reads, such as {min(over)!r}")


def check_tied(tensors: TensorFile, head: str, known: tuple[Link, ...]) -> None:
    [table] = [link.theirs for link in known if link.ours == ("embed_tokens.weight",)]
    if not torch.equal(tensors.read(head), tensors.read(table)):
        raise BadInput(f"{tensors.path}: {head} differs from {table}, but config.json ties them (tie_word_embeddings)")


def stream(foreign: Foreign, put: Callable[[str, Tensor], None], dtype: torch.dtype) -> None:
    """Hand over every tensor of ours, once, in their order; NaN and infinity are refused."""
    shapes = parameters(foreign.config)
    for link in foreign.links:
        theirs = foreign.tensors.read(link.theirs, dtype)
        check_finite(theirs, link.theirs, foreign.tensors.path)
        for name, ours in zip(link.ours, link.adopt(theirs, [shapes[n][0] for n in link.ours]), strict=True):
            put(name, ours)


def load_foreign(path: Path) -> Model:
    """Their model as ours, in fp32, in memory."""
    return in_memory(open_foreign(path))


def in_memory(foreign: Foreign) -> Model:
    with torch.device("meta"):
        model = Model(foreign.config)
    model.to_empty(device="cpu")
    named = dict(model.named_parameters())

    def put(name: str, tensor: Tensor) -> None:
        named[name].copy_(tensor)

    with torch.no_grad():
        stream(foreign, put, torch.float32)
    return model.eval()


def export(
    folder: Path,
    config: ModelConfig,
    read: Callable[[str], Tensor],
    *,
    dtype: torch.dtype = torch.float32,
    original: Mapping[str, Any] | None = None,
) -> str:
    """Write a folder that transformers, vLLM and llama.cpp's converter read; returns its family.

    `read` gives a tensor of ours by name. `original` is the configuration that the weights came with, if they did.
    """
    family = family_of(original) if original else fitting_family(config)
    known, shapes = links(config, family), parameters(config)
    meta = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    writer = TensorWriter(
        folder, {link.theirs: link.export([meta[n] for n in link.ours]).shape for link in known}, dtype
    )
    for link in known:
        writer.put(link.theirs, link.export([read(name) for name in link.ours]))
    writer.finish()
    said = dict(original or {}) or write_config(config, family)
    said |= {"dtype": str(dtype).removeprefix("torch."), "torch_dtype": str(dtype).removeprefix("torch.")}
    (folder / "config.json").write_text(json.dumps(said, indent=1))
    return family


def read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise BadInput(f"{path} is missing: name a folder that Hugging Face transformers saved, or a GGUF file")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{path} is not JSON ({str(error)[:200]}): download it again") from error
    if not isinstance(found, dict):
        raise BadInput(f"{path} holds no JSON object: download it again")
    return found
