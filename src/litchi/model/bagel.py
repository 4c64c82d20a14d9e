"""BAGEL as one of our networks, and back: two experts a layer, a tower that reads pictures, a flow that draws them.

Sources are the published code of ByteDance-Seed/BAGEL (app.py, modeling/bagel) and its folder, BAGEL-7B-MoT: three
configurations, `ema.safetensors` for the network, and `ae.safetensors`, FLUX's autoencoder, which codes its pictures.
How BAGEL lays out a document, all of which our sequences can say:

- a picture to understand (vision) or to draw (image) stands between its two marks, in one span with them;
- all of that span has one position, and what follows has the next;
- noised latents are of time 1 - t, t being BAGEL's share of noise; what is noised is not readable.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from litchi.config import BadInput
from litchi.model import families
from litchi.model.convert import Foreign, check, in_memory, read_json, resolve
from litchi.model.families import Asked, Link, parameters
from litchi.model.latent import KNOWN, LatentCodec, read_codec
from litchi.model.network import Model, ModelConfig, Velocity
from litchi.model.tensorfile import open_tensors
from litchi.model.tensorwriter import TensorWriter
from litchi.model.towers import read_tower, tower_links
from litchi.model.vision import Tower
from litchi.model.weights import to_hugging_face
from litchi.schema.sequence import Modality

Json = Mapping[str, Any]

WEIGHTS, AUTOENCODER = "ema.safetensors", "ae.safetensors"
PARTS = ("llm_config", "vit_config")
"""Configurations that the folder holds as files of these names beside config.json, where it may hold them too."""

DEFAULTS: dict[str, Any] = {
    "visual_gen": True,
    "visual_und": True,
    "latent_patch_size": 2,
    "max_latent_size": 64,
    "vit_max_num_patch_per_side": 70,
    "connector_act": "gelu_pytorch_tanh",
    "interpolate_pos": False,
}
"""What BAGEL's own programs take where config.json is silent."""
FLUX = {"z_channels": 16, "downsample": 8}

CHAT = """\
{% for message in messages %}<|im_start|>{{ message['content'] }}<|im_end|>{% endfor %}
{%- if add_generation_prompt %}<|im_start|>{% endif %}"""
"""A conversation as BAGEL's programs lay it out, whatever template its folder has: nothing says who speaks."""
END = "<|im_end|>"


def read_bagel(config: Json) -> ModelConfig:
    """BAGEL's configurations, the smaller ones inside config.json, as ours. Raises BadInput for what is not computed.

    As BAGEL's programs do, whatever the files say: heads have norms, the head is no table, and the tower lacks the last
    of the layers that its configuration counts.
    """
    try:
        return read_whole(DEFAULTS | dict(config))
    except BadInput:
        raise
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        fault = f"{type(error).__name__}: {str(error)[:120]}"
        raise BadInput(f"bagel: its configurations hold what cannot be read ({fault}): download them again") from error


def read_whole(config: Json) -> ModelConfig:
    asked = Asked(config, "bagel")
    for key, only in (("visual_gen", True), ("visual_und", True), ("interpolate_pos", False)):
        asked.only(key, only, only)
    asked.only("connector_act", None, "gelu_pytorch_tanh")
    llm, vit = (dict(config.get(key) or {}) for key in PARTS)
    Asked(llm, "bagel").only("layer_module", "Qwen2MoTDecoderLayer", "Qwen2MoTDecoderLayer")
    text = families.read_config(llm | {"model_type": "qwen2"})
    vae = FLUX | dict(config.get("vae_config") or {})
    drawn = Velocity(
        channels=asked.number("latent_patch_size") ** 2 * Asked(vae, "bagel").number("z_channels"),
        grid=asked.number("max_latent_size"),
    )
    seen = read_eye(vit, text.width, asked.number("vit_max_num_patch_per_side"))
    if text.width % 4:
        raise BadInput(f"bagel: a width of {text.width} cannot hold sines and cosines of two axes: a multiple of 4 can")
    return replace(
        text,
        modalities={str(Modality.VISION): seen, str(Modality.IMAGE): drawn},
        experts=2,
        own_norms=True,
        qk_norm=True,
        tied=False,
        sections=(0, 0),
    )


def read_eye(vit: Json, width: int, side: int) -> Tower:
    tower = read_tower(vit | {"model_type": "siglip_vision_model"})
    if tower.grid != side:
        raise BadInput(
            f"bagel: the tower's table has {tower.grid} patches a side, vit_max_num_patch_per_side={side}: one number"
            " must place a patch in both"
        )
    if tower.num_layers < 2:
        raise BadInput("bagel: vit_config must count two layers or more: the last is left out")
    return replace(tower, num_layers=tower.num_layers - 1, table="corner", projector="mlp_tanh", sines=side)


# ---- tensors ------------------------------------------------------------------------------------------------------

OUTSIDE = {
    "vae2llm": "readers.image.value",
    "time_embedder.mlp.0": "readers.image.time.fc1",
    "time_embedder.mlp.2": "readers.image.time.fc2",
    "llm2vae": "writers.image.value",
    "connector.fc1": "readers.vision.tower.project.0",
    "connector.fc2": "readers.vision.tower.project.2",
}


def bagel_links(c: ModelConfig) -> list[Link]:
    """Every tensor of `ema.safetensors`."""
    tower = c.modalities[Modality.VISION]
    assert isinstance(tower, Tower)
    trunk = families.parameters(replace(c, modalities={}))
    found = [Link(f"language_model.{to_hugging_face(name)}", (name,)) for name in trunk]
    for theirs, ours in OUTSIDE.items():
        found += [Link(f"{theirs}.{kind}", (f"{ours}.{kind}",)) for kind in ("weight", "bias")]
    found.append(Link("latent_pos_embed.pos_embed", ("readers.image.place.weight",)))
    found.append(Link("vit_pos_embed.pos_embed", ("readers.vision.tower.sines.weight",)))
    for link in tower_links(tower, "siglip_vision_model"):
        ours = tuple(f"readers.vision.tower.encoder.{name}" for name in link.ours)
        found.append(Link(f"vit_model.vision_model.{link.theirs}", ours))  # its convolution is saved as our matrix
    return found


# ---- folders ------------------------------------------------------------------------------------------------------


def is_bagel(said: Json) -> bool:
    """Whether this is BAGEL's configuration, whole."""
    return all(isinstance(said.get(key), dict) and said[key] for key in PARTS)


def holds_bagel(folder: Path) -> bool:
    return (folder / WEIGHTS).is_file() and not (folder / "model.safetensors").is_file()


def open_bagel(folder: Path) -> Foreign:
    """BAGEL's folder, its weights checked by name and shape. Raises BadInput for what is missing, over or unknown."""
    original = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    for key in PARTS:
        if (folder / f"{key}.json").is_file() or not original.get(key):
            original[key] = read_json(folder / f"{key}.json")
        if not isinstance(original[key], dict):
            raise BadInput(f"{folder / 'config.json'}: {key} is no JSON object: download it again")
    config, tensors = read_bagel(original), open_tensors(folder / WEIGHTS)
    links = tuple(resolve(link, tensors) for link in bagel_links(config))
    check(links, config, tensors)
    return Foreign(config, "bagel", links, tensors, original)


def open_codec(folder: Path, config: ModelConfig, original: Json) -> LatentCodec | None:
    """The autoencoder with which BAGEL codes what it draws, if the folder has it, in rows as BAGEL lays them out."""
    if not (folder / AUTOENCODER).is_file():
        return None
    said = DEFAULTS | dict(original)
    vae, drawn = FLUX | dict(said.get("vae_config") or {}), config.modalities[Modality.IMAGE]
    assert isinstance(drawn, Velocity)
    autoencoder = replace(KNOWN["flux"], channels=vae["z_channels"])
    codec = read_codec(folder / AUTOENCODER, autoencoder, pack=said["latent_patch_size"], fastest="channel")
    if vae["downsample"] != autoencoder.factor or codec.channels != drawn.channels:
        raise BadInput(
            f"{folder / AUTOENCODER} makes cells of {autoencoder.factor} pixels, config.json asks for"
            f" {vae['downsample']!r}: download both again"
        )
    return codec


def load_bagel(folder: Path) -> tuple[Model, Json]:
    """The network in fp32, in memory, and BAGEL's configurations, which `save_bagel` gives back."""
    foreign = open_bagel(folder)
    return in_memory(foreign), foreign.original


def save_bagel(
    folder: Path,
    config: ModelConfig,
    read: Callable[[str], Tensor],
    original: Json,
    *,
    dtype: torch.dtype = torch.bfloat16,
) -> None:
    """Weights and configurations as BAGEL's own programs read them; tokenizer and autoencoder are to be put beside.

    `read` gives a tensor of ours by name.
    """
    links, shapes = bagel_links(config), parameters(config)
    meta = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    announced = {link.theirs: link.export([meta[name] for name in link.ours]).shape for link in links}
    writer = TensorWriter(folder, announced, dtype, shard_bytes=1 << 62)  # they load one file
    for link in links:
        writer.put(link.theirs, link.export([read(name) for name in link.ours]))
    writer.finish()
    (folder / "model.safetensors").rename(folder / WEIGHTS)
    for key in PARTS:
        (folder / f"{key}.json").write_text(json.dumps(original[key], indent=1))
    (folder / "config.json").write_text(json.dumps(dict(original), indent=1))
