"""A model that others trained becomes one of our checkpoints: weights, configuration, tokenizer, template, codec."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer as Backend
from tokenizers.processors import TemplateProcessing

from litchi.config import BadInput, to_json
from litchi.model.bagel import CHAT, END, holds_bagel, is_bagel, open_bagel, open_codec, save_bagel
from litchi.model.convert import Foreign, export, open_foreign, read_json, stream
from litchi.model.families import parameters
from litchi.model.latent import LatentCodec, write_back
from litchi.model.tensorfile import open_tensors
from litchi.model.tensorwriter import TensorWriter
from litchi.model.vlm import CLASSES as VLMS
from litchi.model.weights import (
    ORIGINAL,
    PREPROCESSOR,
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
from litchi.schema.sentencepiece import backend_of, from_model
from litchi.schema.sight import Sight, read_sight

CHECKED_PARAMETERS = 2_000_000_000
"""Models up to this size are loaded once more for golden logits; of larger ones only the files are sealed."""


def adopt(source: Path, folder: Path, *, dtype: torch.dtype = torch.bfloat16) -> Foreign:
    """Write what `open_foreign` reads, or BAGEL's folder, as a checkpoint.

    No more than one tensor is in memory at a time, and the autoencoder of a model that draws.
    """
    foreign = open_bagel(source) if holds_bagel(source) else open_foreign(source)
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
    if isinstance(processor.eye, Sight):
        (draft / "processor" / PREPROCESSOR).write_text(json.dumps(optional(source / PREPROCESSOR), indent=1))
    small = sum(shape.numel() for shape in shapes.values()) <= CHECKED_PARAMETERS
    publish(draft, folder, meta={"from": source.name, "family": foreign.family}, check=small)
    return foreign


def give_back(checkpoint: Path, folder: Path, *, dtype: torch.dtype = torch.float32) -> str:
    """Write a checkpoint as a Hugging Face folder; returns its family.

    Of a model of ours what reads and draws pictures stays behind; one that others trained goes back whole. The folder
    is written beside its place and renamed into it.
    """
    config, original = load_config(checkpoint), checkpoint / "model" / ORIGINAL
    if not original.is_file():
        config = replace(config, modalities={})
    if folder.exists() and any(folder.iterdir()):
        raise BadInput(f"{folder} is not empty: name a new folder")
    place, folder = folder, folder.with_name(f".{folder.name}.writing")
    shutil.rmtree(folder, ignore_errors=True)
    with open_tensors(checkpoint / "model") as tensors:
        known = {from_hugging_face(name): name for name in tensors.entries}
        said = read_json(original) if original.is_file() else None
        if said is not None and is_bagel(said):
            family = "bagel"
            save_bagel(folder, config, lambda name: tensors.read(known[name]), said, dtype=dtype)
        else:
            family = export(folder, config, lambda name: tensors.read(known[name]), dtype=dtype, original=said)
    processor = load_processor(checkpoint / "processor")
    if isinstance(processor, ForeignProcessor) and isinstance(processor.codec, LatentCodec):
        write_back(folder, processor.codec)
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
    if (looks := checkpoint / "processor" / PREPROCESSOR).is_file():
        shutil.copy(looks, folder / PREPROCESSOR)
    (folder / "tokenizer_config.json").write_text(json.dumps(said, indent=1))
    replace_folder(folder, place)
    return family


# ---- tokenizer and template ---------------------------------------------------------------------------------------


def processor_of(source: Path, foreign: Foreign) -> ForeignProcessor:
    if source.is_dir():
        home = tokenizer_home(source, foreign.tensors.path)
        said = optional(home / "special_tokens_map.json") | optional(home / "tokenizer_config.json")
        alone = (home / "tokenizer.model").is_file() and not (home / "tokenizer.json").is_file()
        ends = end_ids(home, foreign.original)
        backend = from_pieces(home, said, ends) if alone else from_file(home / "tokenizer.json")
        config = folder_config(home, said, ends, backend)
        if foreign.family == "bagel":
            config = replace(config, template=CHAT, ends=tuple(dict.fromkeys((END, *config.ends))))
    else:
        backend, config = from_gguf(foreign.tensors.metadata), gguf_config(foreign.tensors.metadata)
    tokenizer = ForeignTokenizer(backend, config)
    if len(tokenizer) > foreign.config.vocab_size:
        raise BadInput(f"{source}: the tokenizer has {len(tokenizer)} ids, the model {foreign.config.vocab_size}")
    codec = open_codec(source, foreign.config, foreign.original) if foreign.family == "bagel" else None
    return ForeignProcessor(tokenizer, eye_of(source, foreign, tokenizer), codec=codec)


def tokenizer_home(source: Path, place: Path) -> Path:
    """Where the tokenizer is: in the folder that was named, or where Megatron puts it beside the weights."""
    for home in (source, place, place / "tokenizer"):
        if (home / "tokenizer.json").is_file() or (home / "tokenizer.model").is_file():
            return home
    return source


def eye_of(source: Path, foreign: Foreign, tokenizer: ForeignTokenizer) -> Sight | None:
    """How the model looks at pictures, if it sees."""
    if foreign.family not in VLMS:
        return None
    index = foreign.original.get("image_token_id", foreign.original.get("image_token_index"))
    token = tokenizer.backend.id_to_token(index) if isinstance(index, int) and index >= 0 else None
    if token is None:
        raise BadInput(f"{source}: config.json gives image_token_id={index!r}, which the tokenizer does not know")
    return Sight(read_sight(foreign.original, optional(source / PREPROCESSOR), token))


def from_pieces(source: Path, said: Mapping[str, Any], ends: Sequence[int]) -> Backend:
    """The sentencepiece model of a folder, with the tokens that its configuration adds, and names as control tokens."""
    pieces = from_model(source / "tokenizer.model")
    known = said.get("added_tokens_decoder")
    tokens = {index: token for index, token in known.items() if index.isdecimal()} if isinstance(known, dict) else {}
    added = {int(index): text_of(token) for index, token in tokens.items()}
    added |= {index: text for text, index in optional(source / "added_tokens.json").items() if isinstance(index, int)}
    special = {text_of(token) for token in tokens.values() if isinstance(token, dict) and token.get("special")}
    special |= {text_of(said.get(f"{name}_token")) for name in ("bos", "eos", "pad", "unk")}
    for key in ("additional_special_tokens", "extra_special_tokens"):
        found = said.get(key)
        special |= {text_of(token) for token in found} if isinstance(found, list) else set()
    special |= {added.get(index, pieces.texts[index] if index < len(pieces.texts) else "") for index in ends}
    if said.get("add_prefix_space") is False:
        pieces = replace(pieces, prefix="never")
    elif said.get("legacy") is True and pieces.prefix == "first":
        pieces = replace(pieces, prefix="always")  # as transformers did before it knew better, and models were tuned so
    backend = backend_of(pieces.extended(added, special))
    bos = text_of(said.get("bos_token")) or pieces.bos
    if said.get("add_bos_token", True) and (index := backend.token_to_id(bos)) is not None:
        backend.post_processor = TemplateProcessing(single=[bos, "$A"], special_tokens=[(bos, index)])
    return backend


def end_ids(source: Path, config: Mapping[str, Any]) -> list[int]:
    """The ids that end a text, by generation_config.json and config.json."""
    ids: list[int] = []
    for place in (optional(source / "generation_config.json"), config):
        found = place.get("eos_token_id")
        found = found if isinstance(found, list) else [found]
        ids += [index for index in found if isinstance(index, int) and not isinstance(index, bool) and index >= 0]
    return ids


def folder_config(source: Path, said: Mapping[str, Any], ends: Sequence[int], backend: Backend) -> ChatConfig:
    """What tokenizer_config.json and the template's own file say."""
    names = [text_of(said.get("eos_token")), *map(backend.id_to_token, ends)]
    begun = backend.encode("").ids
    first = backend.id_to_token(begun[0]) if begun else None
    bos = text_of(said.get("bos_token")) or first or ""
    file = source / "chat_template.jinja"
    template = file.read_text(encoding="utf-8") if file.is_file() else template_of(said.get("chat_template"))
    return ChatConfig(
        template, bos, tuple(dict.fromkeys(filter(None, names))), text_of(said.get("pad_token")), bool(begun)
    )


def gguf_config(metadata: Mapping[str, Any]) -> ChatConfig:
    """What the metadata say; llama.cpp begins a text of sentencepiece with its first token unless they forbid it."""
    tokens = metadata["tokenizer.ggml.tokens"]

    def token(which: str) -> str:
        index = metadata.get(f"tokenizer.ggml.{which}_token_id")
        return tokens[index] if isinstance(index, int) and 0 <= index < len(tokens) else ""

    ends = tuple(dict.fromkeys(filter(None, [token("eos"), token("eot")])))
    begins = bool(metadata.get("tokenizer.ggml.add_bos_token", metadata.get("tokenizer.ggml.model") == "llama"))
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
