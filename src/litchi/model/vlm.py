"""The models that people already have, those that see included: a tower, what connects it, and a language model.

LLaVA-1.5, LLaVA-NeXT (1.6), SmolVLM, Idefics3 and Qwen3-VL are translations, as the language models of
model/families.py are; `family_of`, `read_config` and `links` here answer for both. Sources are the configurations and
weight names of transformers, and of the folders on the Hub, which are older and spell some names otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch

from litchi.config import BadInput
from litchi.model import families
from litchi.model.families import Asked, Link, Patches, Stacked, llama_name
from litchi.model.network import ModelConfig
from litchi.model.towers import read_tower, tower_links
from litchi.model.vision import Tower
from litchi.schema.sequence import Modality

Json = Mapping[str, Any]

CLASSES = {
    "llava": "LlavaForConditionalGeneration",
    "llava_next": "LlavaNextForConditionalGeneration",
    "smolvlm": "SmolVLMForConditionalGeneration",
    "idefics3": "Idefics3ForConditionalGeneration",
    "qwen3_vl": "Qwen3VLForConditionalGeneration",
    "qwen3_vl_moe": "Qwen3VLMoeForConditionalGeneration",
}
LLAVAS = ("llava", "llava_next")
QWENS = ("qwen3_vl", "qwen3_vl_moe")

LLAMA_7B = {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "vocab_size": 32_000}
SILENT: dict[str, dict[str, Any]] = {
    "llama": LLAMA_7B | {"intermediate_size": 11_008},
    "mistral": LLAMA_7B | {"intermediate_size": 14_336, "num_key_value_heads": 8},
}
"""What transformers takes where the configuration of a language model inside another is silent, as LLaVA's are."""

TOWER, WB = "readers.vision.tower", ("weight", "bias")


def family_of(config: Json) -> str:
    family = config.get("model_type")
    if family in CLASSES:
        return family
    if family not in families.CLASSES:
        known = ", ".join((*families.CLASSES, *CLASSES))
        raise BadInput(f"model_type {family!r} is not one that can be read; these are: {known}")
    return families.family_of(config)


def read_config(config: Json) -> ModelConfig:
    """The `config.json` of transformers as ours. Raises BadInput for what the network cannot compute."""
    family = family_of(config)
    if family not in CLASSES:
        return families.read_config(config)
    try:
        return read_seeing(config, family)
    except BadInput:
        raise
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        fault = f"{type(error).__name__}: {str(error)[:120]}"
        raise BadInput(f"{family}: config.json holds what cannot be read ({fault}): download it again") from error


def read_seeing(config: Json, family: str) -> ModelConfig:
    text, vision = (dict(config.get(key) or {}) for key in ("text_config", "vision_config"))
    text = SILENT.get(text.setdefault("model_type", "llama"), {}) | text
    tied = bool(config.get("tie_word_embeddings", False))
    text["tie_word_embeddings"] = tied or bool(family in LLAVAS and text.get("tie_word_embeddings"))
    sections = None
    if family in QWENS:
        tower, sections = qwen_tower(vision, text), read_sections(text)
        text |= {"model_type": "qwen3"} if family == "qwen3_vl" else {"model_type": "qwen3_moe", "norm_topk_prob": True}
    else:
        tower = llava_tower(config, vision) if family in LLAVAS else smolvlm_tower(config, vision)
    return replace(families.read_config(text), modalities={str(Modality.VISION): tower}, sections=sections)


def llava_tower(config: Json, vision: Json) -> Tower:
    family = config["model_type"]
    asked = Asked(config, family)
    asked.only("projector_hidden_act", "gelu", "gelu")
    asked.only("multimodal_projector_bias", True, True)
    tower = read_tower({"model_type": "clip_vision_model"} | vision)
    if tower.table == "resized":
        raise BadInput(
            f"{family}: a tower of model_type 'siglip2_vision_model' cannot be read here; of one size it can"
        )
    layer = config.get("vision_feature_layer", -2)
    if not isinstance(layer, int) or isinstance(layer, bool) or not -tower.num_layers <= layer <= tower.num_layers:
        raise BadInput(f"{family}: vision_feature_layer={layer!r} cannot be computed here; the number of one layer can")
    take = layer if layer >= 0 else tower.num_layers + 1 + layer
    if take == 0:
        raise BadInput(f"{family}: vision_feature_layer={layer} takes no layer: name one from 1 to {tower.num_layers}")
    whole = config.get("vision_feature_select_strategy", "default") == "full"
    if whole == tower.class_token:
        raise BadInput(f"{family}: a class token is always left out here: vision_feature_select_strategy must say so")
    return replace(tower, take=take, newline=family == "llava_next")


def smolvlm_tower(config: Json, vision: Json) -> Tower:
    tower = read_tower(vision | {"model_type": "siglip_vision_model"})
    if (side := tower.grid) > 1 and not bool((fractional_places(side) == torch.arange(side)).all()):
        raise BadInput(f"{config['model_type']}: places in a grid of {side} come out uneven in transformers; not here")
    merge = Asked({"scale_factor": 2} | dict(config), config["model_type"]).number("scale_factor")
    if tower.grid % merge:
        raise BadInput(f"{config['model_type']}: {tower.grid} patches a side do not divide by scale_factor={merge}")
    return replace(tower, merge=merge, projector="linear")


def fractional_places(side: int) -> torch.Tensor:
    """The places that a whole picture's patches get by the fractions of NaViT, in the arithmetic of transformers."""
    fractions = (torch.arange(side, dtype=torch.float32) * (1.0 / torch.tensor(side))).clamp(max=1.0 - 1e-6)
    return torch.bucketize(fractions, torch.arange(1 / side, 1.0, 1 / side), right=True)


def qwen_tower(vision: Json, text: Json) -> Tower:
    asked = Asked(vision, "qwen3_vl")
    asked.only("in_channels", 3, 3)
    asked.only("hidden_act", "gelu_pytorch_tanh", "gelu_pytorch_tanh")
    asked.only("out_hidden_size", text.get("hidden_size"), text.get("hidden_size"))
    patch, width, grid = (
        asked.number("patch_size"),
        asked.number("hidden_size"),
        asked.number("num_position_embeddings"),
    )
    if math.isqrt(grid) ** 2 != grid:
        raise BadInput(f"qwen3_vl: num_position_embeddings={grid} is no square")
    if asked.divided(width, asked.number("num_heads")) % 4:
        raise BadInput(
            f"qwen3_vl: heads of {width // vision['num_heads']} values cannot turn two ways: a multiple of 4"
        )
    deep = tuple(int(index) for index in vision.get("deepstack_visual_indexes", (8, 16, 24)))
    if list(deep) != sorted(set(deep)) or any(not 0 <= index < vision["depth"] for index in deep):
        raise BadInput(f"qwen3_vl: deepstack_visual_indexes={list(deep)} must be layers of the tower, in order")
    return Tower(
        channels=patch * patch * 3 * asked.number("temporal_patch_size"),
        frames=asked.number("temporal_patch_size"),
        width=width,
        num_layers=asked.number("depth"),
        num_heads=asked.number("num_heads"),
        grid=math.isqrt(grid),
        mlp_width=asked.number("intermediate_size"),
        activation="gelu_tanh",
        epsilon=1e-6,
        table="stretched",
        turns=True,
        norm_after=False,
        merge=asked.number("spatial_merge_size"),
        projector="merger",
        deep=deep,
    )


def read_sections(text: Json) -> tuple[int, int]:
    """Rotary pairs of height and width; they are interleaved with those of time."""
    rope = dict(text.get("rope_parameters") or text.get("rope_scaling") or {})
    _, height, width = rope.get("mrope_section", (24, 20, 20))
    if not rope.get("mrope_interleaved", True):
        raise BadInput("qwen3_vl: rotary pairs in blocks (mrope_interleaved=false) cannot be computed; interleaved can")
    return int(height), int(width)


# ---- tensors ------------------------------------------------------------------------------------------------------


def links(c: ModelConfig, family: str) -> list[Link]:
    """Every tensor of a checkpoint in the family's own names."""
    if family not in CLASSES:
        return families.links(c, family)
    tower = c.modalities[Modality.VISION]
    assert isinstance(tower, Tower)
    if family in QWENS:
        return qwen_links(c, tower)
    text = [name for name in families.parameters(replace(c, modalities={})) if name != "lm_head.weight"]
    if family in LLAVAS:
        found = [Link(f"language_model.{llama_name(name)}", (name,)) for name in text]
        head, eye = "language_model.lm_head.weight", "vision_tower.vision_model."
        joins = {f"multi_modal_projector.linear_{n}.{k}": f"project.{2 * n - 2}.{k}" for n in (1, 2) for k in WB}
        joins |= {"image_newline": "newline"} if tower.newline else {}
        kind = "clip_vision_model" if tower.class_token else "siglip_vision_model"
    else:
        found = [Link(llama_name(name).replace("model.", "model.text_model.", 1), (name,)) for name in text]
        head, eye, kind = "lm_head.weight", "model.vision_model.", "siglip_vision_model"
        joins = {"model.connector.modality_projection.proj.weight": "project.weight"}
    found += [] if c.tied else [Link(head, ("lm_head.weight",))]
    for link in tower_links(tower, kind):
        found.append(Link(eye + link.theirs, tuple(f"{TOWER}.encoder.{name}" for name in link.ours), link.form))
    return found + [Link(theirs, (f"{TOWER}.{ours}",)) for theirs, ours in joins.items()]


QWEN_LAYER = {
    "layer_norm1": "norm1",
    "layer_norm2": "norm2",
    "self_attn.out_proj": "attn.proj",
    "mlp.fc1": "mlp.linear_fc1",
    "mlp.fc2": "mlp.linear_fc2",
}


def qwen_links(c: ModelConfig, tower: Tower) -> list[Link]:
    text = [name for name in families.parameters(replace(c, modalities={})) if name != "lm_head.weight"]
    plain = [name for name in text if ".mlp.experts." not in name]
    found = [Link(llama_name(name).replace("model.", "model.language_model.", 1), (name,)) for name in plain]
    found += [link for i in range(c.num_layers if c.mixture else 0) for link in stacked_links(c, i)]
    found += [] if c.tied else [Link("lm_head.weight", ("lm_head.weight",))]
    patch, eye = f"{TOWER}.encoder.patch_embedding", "model.visual"
    found.append(Link(f"{eye}.patch_embed.proj.weight", (f"{patch}.weight",), Patches(tower.frames)))
    found.append(Link(f"{eye}.patch_embed.proj.bias", (f"{patch}.bias",)))
    found.append(Link(f"{eye}.pos_embed.weight", (f"{TOWER}.encoder.position_embedding.weight",)))
    for i in range(tower.num_layers):
        theirs, ours = f"{eye}.blocks.{i}", f"{TOWER}.encoder.layers.{i}"
        for kind in WB:
            found.append(Link(f"{theirs}.attn.qkv.{kind}", tuple(f"{ours}.self_attn.{p}_proj.{kind}" for p in "qkv")))
            found += [Link(f"{theirs}.{b}.{kind}", (f"{ours}.{a}.{kind}",)) for a, b in QWEN_LAYER.items()]
    mergers = {"merger": "project"} | {f"deepstack_merger_list.{i}": f"deep.{i}" for i in range(len(tower.deep))}
    for theirs, ours in mergers.items():
        for part in ("norm", "linear_fc1", "linear_fc2"):
            found += [Link(f"{eye}.{theirs}.{part}.{kind}", (f"{TOWER}.{ours}.{part}.{kind}",)) for kind in WB]
    return found


def stacked_links(c: ModelConfig, layer: int) -> Iterator[Link]:
    """The experts of a layer, all of them in two tensors."""
    assert c.mixture is not None
    count, inner = c.mixture.num_experts, c.mixture.width
    for theirs, parts, shape in (
        ("gate_up_proj", ("gate_proj", "up_proj"), (2 * inner, c.width)),
        ("down_proj", ("down_proj",), (c.width, inner)),
    ):
        ours = [f"layers.{layer}.experts.0.mlp.experts.{e}.{part}.weight" for e in range(count) for part in parts]
        form = Stacked(count, shape[0], turned=shape[0] != shape[1])
        yield Link(f"model.language_model.layers.{layer}.mlp.experts.{theirs}", tuple(ours), form)


def spellings(name: str) -> Iterator[str]:
    """Under which names a tensor may stand in a file: the Hub's, transformers 5's, and those of a body saved alone."""
    yield name
    yield name.replace("vision_tower.vision_model.", "vision_tower.", 1)
    if name.startswith("language_model.model."):
        yield name.replace("language_model.model.", "model.language_model.", 1)
    elif name.startswith("language_model."):
        yield name.removeprefix("language_model.")
    elif name.startswith(("vision_tower.", "multi_modal_projector.", "image_newline")):
        yield f"model.{name}"
        yield f"model.{name}".replace("vision_tower.vision_model.", "vision_tower.", 1)
    else:
        yield name.partition(".")[2]
