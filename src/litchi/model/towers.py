"""The vision towers that people already have: CLIP, SigLIP, DINOv2 and ViT as our encoder, and back.

Sources are the configurations and weight names of transformers. What a tower has beyond its rows of patches (a pooler,
an attention head, a mask token) is no part of understanding: it is named in `BESIDE` and kept aside, so that what is
written back is whole.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from litchi.config import BadInput
from litchi.model.families import Asked, Cells, Link, Patches, Row
from litchi.model.vision import Activation, Tower, VisionEncoder

Json = Mapping[str, Any]

TOWERS = ("clip_vision_model", "siglip_vision_model", "dinov2", "vit")

BESIDE = ("pooler.", "head.", "embeddings.mask_token", "classifier.")
"""Beginnings of names of tensors that no row of a patch depends on."""

DEFAULTS: dict[str, dict[str, Any]] = {
    "clip_vision_model": {"hidden_act": "quick_gelu", "layer_norm_eps": 1e-5},
    "siglip_vision_model": {"hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6},
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
    patch, side, width = asked.number("patch_size"), asked.number("image_size"), asked.number("hidden_size")
    ratio = config.get("mlp_ratio", 4)
    asked.divided(width, asked.number("num_attention_heads"))
    return Tower(
        channels=patch * patch * 3,
        width=width,
        num_layers=asked.number("num_hidden_layers"),
        num_heads=asked.number("num_attention_heads"),
        grid=side // patch,
        mlp_width=int(width * ratio) if family == "dinov2" else asked.number("intermediate_size"),
        activation=ACTIVATIONS[config["hidden_act"]],
        epsilon=config["layer_norm_eps"],
        table="cells",
        class_token=family != "siglip_vision_model",
        patch_bias=family != "clip_vision_model",
        norm_before=family == "clip_vision_model",
        norm_after=True,
        scales=family == "dinov2",
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
    clip = family in ("clip_vision_model", "siglip_vision_model")
    names = LAYERS["clip" if clip else family]
    stem = "encoder.layers" if clip else "encoder.layer"
    projection = "embeddings.patch_embedding" if clip else "embeddings.patch_embeddings.projection"
    found = [Link(f"{projection}.weight", ("patch_embedding.weight",), Patches())]
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


def load_tower(config: Json, tensors: Mapping[str, Tensor]) -> tuple[VisionEncoder, dict[str, Tensor]]:
    """A tower of theirs as ours in fp32, and what stands beside it. Raises BadInput for what is missing or over."""
    tower = VisionEncoder(read_tower(config))
    named, left = dict(tower.named_parameters()), dict(tensors)
    with torch.no_grad():
        for link in tower_links(tower.config, config["model_type"]):
            if link.theirs not in left:
                raise BadInput(
                    f"{config['model_type']}: the weights lack {link.theirs!r}: name a folder of this family"
                )
            [ours] = link.adopt(left.pop(link.theirs), [named[link.ours[0]].shape[0]])
            named[link.ours[0]].copy_(ours)
    if odd := [name for name in left if not name.startswith(BESIDE)]:
        raise BadInput(f"{config['model_type']}: {len(odd)} tensors that nothing reads, such as {min(odd)!r}")
    return tower.eval(), left
