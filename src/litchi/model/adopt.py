"""A language model that others trained becomes one of our checkpoints: weights, configuration, tokenizer, template."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from litchi.config import BadInput, to_json
from litchi.model.convert import Foreign, export, open_foreign, read_json, stream
from litchi.model.families import parameters
from litchi.model.tensorfile import open_tensors
from litchi.model.tensorwriter import TensorWriter
from litchi.model.weights import (
    ORIGINAL,
    from_hugging_face,
    load_config,
    load_processor,
    publish,
    replace_folder,
    save_processor,
    to_hugging_face,
)
from litchi.schema.backends import from_file, from_gguf
from litchi.schema.foreign import ChatConfig, ForeignProcessor, ForeignTokenizer

CHECKED_PARAMETERS = 2_000_000_000
"""Models up to this size are loaded once more for golden logits; of larger ones only the files are sealed."""


def adopt(source: Path, folder: Path, *, dtype: torch.dtype = torch.bfloat16) -> Foreign:
    """Write what `open_foreign` reads as a checkpoint; no more than one tensor is in memory at a time."""
    foreign = open_foreign(source)
    processor = processor_of(source, foreign)
    draft = folder.with_name(f".{folder.name}.writing")
    shutil.rmtree(draft, ignore_errors=True)
    shapes = parameters(foreign.config)
    writer = TensorWriter(draft / "model", {to_hugging_face(name): shape for name, shape in shapes.items()}, dtype)
    stream(foreign, lambda name, tensor: writer.put(to_hugging_face(name), tensor), dtype)
    writer.finish()
    (draft / "model" / "config.json").write_text(to_json(foreign.config))
    if foreign.original:
        (draft / "model" / ORIGINAL).write_text(json.dumps(foreign.original, indent=1))
    save_processor(draft / "processor", processor)
    small = sum(shape.numel() for shape in shapes.values()) <= CHECKED_PARAMETERS
    publish(draft, folder, meta={"from": source.name, "family": foreign.family}, check=small)
    return foreign


def give_back(checkpoint: Path, folder: Path, *, dtype: torch.dtype = torch.float32) -> str:
    """Write a checkpoint's language model as a Hugging Face folder; returns its family.

    What reads and draws pictures stays behind. The folder is written beside its place and renamed into it.
    """
    config = replace(load_config(checkpoint), modalities={})
    original = checkpoint / "model" / ORIGINAL
    if folder.exists() and any(folder.iterdir()):
        raise BadInput(f"{folder} is not empty: name a new folder")
    place, folder = folder, folder.with_name(f".{folder.name}.writing")
    shutil.rmtree(folder, ignore_errors=True)
    with open_tensors(checkpoint / "model") as tensors:
        known = {from_hugging_face(name): name for name in tensors.entries}
        said = read_json(original) if original.is_file() else None
        family = export(folder, config, lambda name: tensors.read(known[name]), dtype=dtype, original=said)
    processor = load_processor(checkpoint / "processor")
    shutil.copy(checkpoint / "processor" / "tokenizer.json", folder / "tokenizer.json")
    said = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    if isinstance(processor, ForeignProcessor):
        c = processor.tokenizer.config
        named = {
            "bos_token": c.bos,
            "eos_token": next(iter(c.ends), ""),
            "pad_token": c.pad,
            "chat_template": c.template,
        }
        said |= {key: value for key, value in named.items() if value}
        ends = [processor.tokenizer.control(name) for name in c.ends]
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ends} if ends else {}))
    (folder / "tokenizer_config.json").write_text(json.dumps(said, indent=1))
    replace_folder(folder, place)
    return family


# ---- tokenizer and template ---------------------------------------------------------------------------------------


def processor_of(source: Path, foreign: Foreign) -> ForeignProcessor:
    if source.is_dir():
        home = tokenizer_home(source, foreign.tensors.path)
        backend = from_file(home / "tokenizer.json")
        config = folder_config(home, foreign.original, backend)
    else:
        backend, config = from_gguf(foreign.tensors.metadata), gguf_config(foreign.tensors.metadata)
    tokenizer = ForeignTokenizer(backend, config)
    if len(tokenizer) > foreign.config.vocab_size:
        raise BadInput(f"{source}: the tokenizer has {len(tokenizer)} ids, the model {foreign.config.vocab_size}")
    return ForeignProcessor(tokenizer)


def tokenizer_home(source: Path, place: Path) -> Path:
    """Where the tokenizer is: in the folder that was named, or where Megatron puts it beside the weights."""
    for home in (source, place, place / "tokenizer"):
        if (home / "tokenizer.json").is_file():
            return home
    return source


def folder_config(source: Path, config: Mapping[str, Any], backend) -> ChatConfig:
    """What tokenizer_config.json, generation_config.json and the template's own file say."""
    said = optional(source / "tokenizer_config.json")
    ends = [text_of(said.get("eos_token"))]
    for place in (optional(source / "generation_config.json"), config):
        found = place.get("eos_token_id")
        ids = found if isinstance(found, list) else [found]
        ends += [backend.id_to_token(i) for i in ids if isinstance(i, int) and not isinstance(i, bool) and i >= 0]
    begun = backend.encode("").ids
    bos = text_of(said.get("bos_token")) or (backend.id_to_token(begun[0]) if begun else "")
    file = source / "chat_template.jinja"
    template = file.read_text(encoding="utf-8") if file.is_file() else template_of(said.get("chat_template"))
    return ChatConfig(
        template, bos, tuple(dict.fromkeys(filter(None, ends))), text_of(said.get("pad_token")), bool(begun)
    )


def gguf_config(metadata: Mapping[str, Any]) -> ChatConfig:
    tokens = metadata["tokenizer.ggml.tokens"]

    def token(which: str) -> str:
        index = metadata.get(f"tokenizer.ggml.{which}_token_id")
        return tokens[index] if isinstance(index, int) and 0 <= index < len(tokens) else ""

    ends = tuple(filter(None, [token("eos")]))
    begins = bool(metadata.get("tokenizer.ggml.add_bos_token", False))
    return ChatConfig(metadata.get("tokenizer.chat_template", ""), token("bos"), ends, token("padding"), begins)


def optional(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def text_of(token: Any) -> str:
    """A token is written as text, or as an object with its text."""
    return token if isinstance(token, str) else token.get("content", "") if isinstance(token, dict) else ""


def template_of(said: Any) -> str:
    """One template, or several by name of which one is the default."""
    if isinstance(said, list):
        named = {each.get("name"): each.get("template") for each in said if isinstance(each, dict)}
        said = named.get("default")
    return said if isinstance(said, str) else ""
