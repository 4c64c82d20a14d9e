"""The vision towers that people already have: CLIP, SigLIP, SigLIP2, DINOv2 and ViT as our encoder, and back.

Sources are the configurations and weight names of transformers, and of timm, whose vision transformers go by the family
"timm". What a tower has beyond its rows of patches (a pooler, an attention head, a mask token) is no part of
understanding: it is named in `BESIDE` and kept aside, so that what is written back is whole.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from litchi.config import BadInput
from litchi.model.families import Asked, Cells, Link, Patches, Row
from litchi.model.vision import Activation, Tower, VisionEncoder

Json = Mapping[str, Any]

TOWERS = ("clip_vision_model", "siglip_vision_model", "siglip2_vision_model", "dinov2", "vit")
CLIPS = ("clip_vision_model", "siglip_vision_model", "siglip2_vision_model")
"""Families that share CLIP's names."""

BESIDE = ("pooler.", "head.", "embeddings.mask_token", "classifier.", "attn_pool.", "fc_norm.")
"""Beginnings of names of tensors that no row of a patch depends on."""

DEFAULTS: dict[str, dict[str, Any]] = {
    "clip_vision_model": {"hidden_act": "quick_gelu", "layer_norm_eps": 1e-5},
    "siglip_vision_model": {"hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6},
    "siglip2_vision_model": {"hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6, "num_patches": 256},
    "dinov2": {"hidden_act": "gelu", "layer_norm_eps": 1e-6},
    "vit": {"hidden_act": "gelu", "layer_norm_eps": 1e-12},
}
"""What transformers takes where a configuration is silent."""

ACTIVATIONS: dict[str, Activation] = {"gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "quick_gelu": "quick_gelu"}


def read_tower(config: Json) -> Tower:
    """The `config.json` of a tower as ours. Raises BadInput for one that the encoder cannot compute."""
    family = config.get("model_type")
    if family not in TOWERS:
        raise BadInput(f"a tower of model_type {family!r} cannot be read; these can: {', '.join(TOWERS)}")
    config = DEFAULTS[family] | config
    asked = Asked(config, family)
    asked.only("num_channels", 3, 3)
    asked.only("qkv_bias", True, True)
    asked.only("use_swiglu_ffn", False, False)
    asked.only("hidden_act", None, *ACTIVATIONS)
    patch, width, ratio = asked.number("patch_size"), asked.number("hidden_size"), config.get("mlp_ratio", 4)
    resized = family == "siglip2_vision_model"
    grid = square(asked.number("num_patches"), family) if resized else asked.number("image_size") // patch
    asked.divided(width, asked.number("num_attention_heads"))
    return Tower(
        channels=patch * patch * 3,
        width=width,
        num_layers=asked.number("num_hidden_layers"),
        num_heads=asked.number("num_attention_heads"),
        grid=grid,
        mlp_width=int(width * ratio) if family == "dinov2" else asked.number("intermediate_size"),
        activation=ACTIVATIONS[config["hidden_act"]],
        epsilon=config["layer_norm_eps"],
        table="resized" if resized else "cells",
        class_token=family not in ("siglip_vision_model", "siglip2_vision_model"),
        patch_bias=family != "clip_vision_model",
        norm_before=family == "clip_vision_model",
        norm_after=True,
        scales=family == "dinov2",
    )


def square(count: int, family: str) -> int:
    """The side of a grid of so many places."""
    if math.isqrt(count) ** 2 != count:
        raise BadInput(f"{family}: a table of {count} positions is no square: its pictures cannot be placed")
    return math.isqrt(count)


HEADS = {1152: 16, 1280: 16, 1408: 16, 1536: 16, 1664: 16}
"""Heads of timm's wide transformers, by their width; the others have heads of 64 values."""

TANH = re.compile(r"(base_patch32|so400m_patch16|giantopt_patch16)_siglip|large_patch16_siglip(_gap)?_512")
"""Architectures of timm whose activation is GELU in its tanh form: those made for SigLIP2."""


def timm_tower(config: Json, tensors: Mapping[str, Tensor]) -> Tower:
    """timm's `config.json` as ours: most of it is told by shapes, and the rest by the architecture's name.

    Raises BadInput for what the encoder cannot compute: register tokens, a class token without a position, SwiGLU.
    """
    name, said = str(config["architecture"]), dict(config.get("model_args") or {})
    asked = Asked(said, name)
    asked.only("act_layer", None, "gelu", "gelu_tanh", "quick_gelu", None)
    shapes = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    if lacking := {"patch_embed.proj.weight", "pos_embed", "blocks.0.mlp.fc1.weight"} - set(shapes):
        raise BadInput(f"{name}: the weights lack {min(lacking)!r}: of timm, only its vision transformers can be read")
    if len(shapes["patch_embed.proj.weight"]) != 4 or len(shapes["pos_embed"]) != 3:
        raise BadInput(
            f"{name}: patch_embed.proj.weight must have four dimensions and pos_embed three, as timm has them"
        )
    width, channels, patch, _ = shapes["patch_embed.proj.weight"]
    mlp_width, class_token = shapes["blocks.0.mlp.fc1.weight"][0], "cls_token" in shapes
    usual_heads = HEADS.get(width, 16 if name.startswith("vit_base_patch16_gap_224") else width // 64)
    heads = said.get("num_heads", usual_heads)
    asked.divided(width, heads)
    if channels != 3 or "reg_token" in shapes or shapes.get("blocks.0.mlp.fc2.weight") != (width, mlp_width):
        raise BadInput(f"{name}: other channels than three, register tokens and SwiGLU cannot be computed here")
    if class_token and math.isqrt(shapes["pos_embed"][1]) ** 2 == shapes["pos_embed"][1]:
        raise BadInput(f"{name}: a class token without a position of its own cannot be computed here")
    usual_activation: Activation = "quick_gelu" if "quickgelu" in name else "gelu_tanh" if TANH.search(name) else "gelu"
    return Tower(
        channels=patch * patch * 3,
        width=width,
        num_layers=1 + max(int(key.split(".")[1]) for key in shapes if key.startswith("blocks.")),
        num_heads=heads,
        grid=square(shapes["pos_embed"][1] - class_token, name),
        mlp_width=mlp_width,
        activation=said.get("act_layer") or usual_activation,
        epsilon=1e-5 if "_clip_" in name else 1e-6,
        table="cells",
        class_token=class_token,
        patch_bias="patch_embed.proj.bias" in shapes,
        norm_before="norm_pre.weight" in shapes,
        norm_after="norm.weight" in shapes,
        scales="blocks.0.ls1.gamma" in shapes,
    )


LAYERS = {
    "clip": {name: name for name in ("layer_norm1", "layer_norm2", "mlp.fc1", "mlp.fc2")}
    | {f"self_attn.{p}_proj": f"self_attn.{p}_proj" for p in ("q", "k", "v", "out")},
    "dinov2": {
        "layer_norm1": "norm1",
        "self_attn.q_proj": "attention.attention.query",
        "self_attn.k_proj": "attention.attention.key",
        "self_attn.v_proj": "attention.attention.value",
        "self_attn.out_proj": "attention.output.dense",
        "layer_norm2": "norm2",
        "mlp.fc1": "mlp.fc1",
        "mlp.fc2": "mlp.fc2",
    },
    "vit": {
        "layer_norm1": "layernorm_before",
        "self_attn.q_proj": "attention.attention.query",
        "self_attn.k_proj": "attention.attention.key",
        "self_attn.v_proj": "attention.attention.value",
        "self_attn.out_proj": "attention.output.dense",
        "layer_norm2": "layernorm_after",
        "mlp.fc1": "intermediate.dense",
        "mlp.fc2": "output.dense",
    },
}


def tower_links(t: Tower, family: str) -> list[Link]:
    """Every tensor of ours under the family's name."""
    if family == "timm":
        return timm_links(t)
    clip = family in CLIPS
    names = LAYERS["clip" if clip else family]
    stem = "encoder.layers" if clip else "encoder.layer"
    projection = "embeddings.patch_embedding" if clip else "embeddings.patch_embeddings.projection"
    found = [Link(f"{projection}.weight", ("patch_embedding.weight",), None if t.table == "resized" else Patches())]
    if t.patch_bias:
        found.append(Link(f"{projection}.bias", ("patch_embedding.bias",)))
    if clip:
        found.append(Link("embeddings.position_embedding.weight", ("position_embedding.weight",)))
        found += [Link("embeddings.class_embedding", ("class_embedding",))] if t.class_token else []
    else:
        found.append(Link("embeddings.position_embeddings", ("position_embedding.weight",), Cells()))
        found.append(Link("embeddings.cls_token", ("class_embedding",), Row()))
    for i in range(t.num_layers):
        for ours, theirs in names.items():
            for kind in ("weight", "bias"):
                found.append(Link(f"{stem}.{i}.{theirs}.{kind}", (f"layers.{i}.{ours}.{kind}",)))
        if t.scales:
            found += [Link(f"{stem}.{i}.layer_scale{n}.lambda1", (f"layers.{i}.scale{n}",)) for n in (1, 2)]
    ends = {"pre_layernorm": "pre_layrnorm"} if t.norm_before else {}
    ends |= {"post_layernorm": "post_layernorm" if clip else "layernorm"}
    return found + [Link(f"{b}.{kind}", (f"{a}.{kind}",)) for a, b in ends.items() for kind in ("weight", "bias")]


TIMM_LAYER = {
    "layer_norm1": "norm1",
    "self_attn.out_proj": "attn.proj",
    "layer_norm2": "norm2",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}


def timm_links(t: Tower) -> list[Link]:
    found = [Link("patch_embed.proj.weight", ("patch_embedding.weight",), Patches())]
    found += [Link("patch_embed.proj.bias", ("patch_embedding.bias",))] if t.patch_bias else []
    found += [Link("cls_token", ("class_embedding",), Row())] if t.class_token else []
    found.append(Link("pos_embed", ("position_embedding.weight",), Cells()))
    for i in range(t.num_layers):
        for kind in ("weight", "bias"):
            fused = tuple(f"layers.{i}.self_attn.{p}_proj.{kind}" for p in "qkv")
            found.append(Link(f"blocks.{i}.attn.qkv.{kind}", fused))
            found += [Link(f"blocks.{i}.{b}.{kind}", (f"layers.{i}.{a}.{kind}",)) for a, b in TIMM_LAYER.items()]
        if t.scales:
            found += [Link(f"blocks.{i}.ls{n}.gamma", (f"layers.{i}.scale{n}",)) for n in (1, 2)]
    ends = {"norm_pre": "pre_layernorm"} if t.norm_before else {}
    ends |= {"norm": "post_layernorm"} if t.norm_after else {}
    return found + [Link(f"{a}.{kind}", (f"{b}.{kind}",)) for a, b in ends.items() for kind in ("weight", "bias")]


def tower_family(config: Json) -> str:
    """Whose names the weights have: a `model_type` of transformers, or "timm"."""
    return "timm" if "architecture" in config else str(config.get("model_type"))


def load_tower(config: Json, tensors: Mapping[str, Tensor]) -> tuple[VisionEncoder, dict[str, Tensor]]:
    """A tower of theirs as ours in fp32, and what stands beside it. Raises BadInput for what is missing or over."""
    family = tower_family(config)
    tower = VisionEncoder(timm_tower(config, tensors) if family == "timm" else read_tower(config))
    named, left = dict(tower.named_parameters()), dict(tensors)
    for link in tower_links(tower.config, family):
        if link.theirs not in left:
            raise BadInput(f"{family}: the weights lack {link.theirs!r}: name a folder of this family")
        found, asked = left.pop(link.theirs), [named[name] for name in link.ours]
        if found.shape != (shape := link.export([p.detach() for p in asked]).shape):
            raise BadInput(f"{family}: {link.theirs} has shape {list(found.shape)}, its configuration {list(shape)}")
        for parameter, ours in zip(asked, link.adopt(found, [len(p) for p in asked]), strict=True):
            parameter.data.copy_(ours)
    if odd := [name for name in left if not name.startswith(BESIDE)]:
        raise BadInput(f"{family}: {len(odd)} tensors that nothing reads, such as {min(odd)!r}")
    return tower.eval(), left
