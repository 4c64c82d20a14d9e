"""Every vision tower equals that of transformers on a small random model, and goes back bit for bit."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from litchi.config import BadInput
from litchi.model.codec import PixelCodec, PixelCodecConfig
from litchi.model.towers import BESIDE, load_tower, read_tower, tower_links
from litchi.model.vision import VisionEncoder
from tests.model.table import digit, record

transformers = pytest.importorskip("transformers")

SIZES = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48}
SIZES |= {"image_size": 24, "patch_size": 6}
TOWERS = ("CLIPVision", "SiglipVision", "Dinov2", "ViT")
NAMES = {"CLIPVision": "CLIP", "SiglipVision": "SigLIP", "Dinov2": "DINOv2", "ViT": "ViT"}
TOLERANCE = 1e-4


def build(name: str, folder: Path):
    config = getattr(transformers, f"{name}Config")(**SIZES)
    torch.manual_seed(0)
    net = getattr(transformers, f"{name}Model")(config).eval()
    with torch.no_grad():
        for p in net.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    net.save_pretrained(folder)
    return net


@pytest.mark.parametrize("name", TOWERS)
def test_a_tower_is_that_of_transformers(name: str, tmp_path: Path) -> None:
    theirs = build(name, tmp_path)
    config, saved = json.loads((tmp_path / "config.json").read_text()), load_file(tmp_path / "model.safetensors")
    ours, beside = load_tower(config, saved)
    rng = np.random.default_rng(0)
    pictures = [rng.integers(0, 256, (24, 24, 3), dtype=np.uint8) for _ in range(2)]
    rows = [PixelCodec(PixelCodecConfig(6)).encode(p) for p in pictures]
    place = torch.tensor([(r, c) for r in range(4) for c in range(4)]).repeat(2, 1)
    with torch.no_grad():
        found = ours(torch.cat(rows), torch.arange(2).repeat_interleave(16), place)
        pixels = torch.stack([torch.from_numpy(p).permute(2, 0, 1).float() / 127.5 - 1 for p in pictures])
        told = theirs(pixel_values=pixels).last_hidden_state
        if name == "CLIPVision":  # it leaves the last norm to whoever pools
            told = theirs.post_layernorm(told)
    told = told if name == "SiglipVision" else told[:, 1:]
    gap = float((found.view(2, 16, -1) - told).abs().max())
    assert gap <= TOLERANCE
    written(ours, beside, saved, config["model_type"])
    record("tower", NAMES[name], f"`{type(theirs).__name__}`", digit(gap), "bit for bit")


def test_siglip2_resizes_its_table_to_each_picture(tmp_path: Path) -> None:
    """Larger, smaller and longer pictures than the table, padded there and packed here; square ones too."""
    sizes = {key: value for key, value in SIZES.items() if key != "image_size"}
    torch.manual_seed(0)
    theirs = transformers.Siglip2VisionModel(transformers.Siglip2VisionConfig(**sizes, num_patches=16)).eval()
    with torch.no_grad():
        for p in theirs.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    theirs.save_pretrained(tmp_path)
    config, saved = json.loads((tmp_path / "config.json").read_text()), load_file(tmp_path / "model.safetensors")
    ours, beside = load_tower(config, saved)
    shapes = torch.tensor([(4, 4), (7, 3), (2, 2), (1, 9), (6, 5)])
    counts = shapes.prod(1)
    value = torch.randn(len(shapes), int(counts.max()), 108)
    mask = torch.arange(value.shape[1]) < counts[:, None]
    place = torch.cat([torch.cartesian_prod(torch.arange(h), torch.arange(w)) for h, w in shapes.tolist()])
    with torch.no_grad():
        found = ours(value[mask], torch.arange(len(shapes)).repeat_interleave(counts), place)
        seen = theirs(pixel_values=value, pixel_attention_mask=mask.int(), spatial_shapes=shapes)
    gap = float((found - seen.last_hidden_state[mask]).abs().max())
    assert gap <= TOLERANCE
    written(ours, beside, saved, "siglip2_vision_model")
    record("tower", "SigLIP2, five shapes", "`Siglip2VisionModel`", digit(gap), "bit for bit")


def written(ours: VisionEncoder, beside: dict, saved: dict, family: str) -> None:
    """That every tensor goes back as it came."""
    named = dict(ours.named_parameters())
    back = {link.theirs: link.export([named[n] for n in link.ours]) for link in tower_links(ours.config, family)}
    assert set(back) | set(beside) == set(saved) and all(name.startswith(BESIDE) for name in beside)
    assert all(torch.equal(tensor, saved[n]) for n, tensor in back.items())


WITHIN = {
    "layernorm_before": "norm1",
    "attention.output.dense": "attn.proj",
    "layernorm_after": "norm2",
    "intermediate.dense": "mlp.fc1",
    "output.dense": "mlp.fc2",
}
OUTSIDE = {
    "embeddings.cls_token": "cls_token",
    "embeddings.position_embeddings": "pos_embed",
    "embeddings.patch_embeddings.projection": "patch_embed.proj",
    "layernorm": "norm",
}


def as_timm(saved: dict) -> dict:
    """The tensors of a ViT of transformers as timm saves them: other names, and query, key and value in one."""
    found = {"head.weight": torch.ones(5, 32), "head.bias": torch.ones(5)}
    for name, tensor in saved.items():
        stem, _, kind = name.rpartition(".")
        if name in OUTSIDE:
            found[OUTSIDE[name]] = tensor
        elif stem in OUTSIDE:
            found[f"{OUTSIDE[stem]}.{kind}"] = tensor
        elif stem.startswith("encoder.layer."):
            _, _, layer, within = stem.split(".", 3)
            if within in WITHIN:
                found[f"blocks.{layer}.{WITHIN[within]}.{kind}"] = tensor
            elif within.endswith("query"):
                parts = [saved[name.replace("query", part)] for part in ("query", "key", "value")]
                found[f"blocks.{layer}.attn.qkv.{kind}"] = torch.cat(parts)
    return found


TIMM = {"architecture": "vit_tiny_patch6_24", "num_classes": 5, "model_args": {"num_heads": 4}}


def test_timms_names_are_another_spelling_of_a_vit(tmp_path: Path) -> None:
    build("ViT", tmp_path)
    saved = as_timm(load_file(tmp_path / "model.safetensors"))
    config = json.loads((tmp_path / "config.json").read_text()) | {"layer_norm_eps": 1e-6}
    twin, _ = load_tower(config, load_file(tmp_path / "model.safetensors"))
    ours, beside = load_tower(TIMM, saved)
    assert ours.config == twin.config
    assert all(torch.equal(p, dict(twin.named_parameters())[name]) for name, p in ours.named_parameters())
    written(ours, beside, saved, "timm")


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("vit_base_patch16_224", {}),
        ("vit_base_patch16_clip_quickgelu_224", {}),
        ("vit_base_patch16_siglip_gap_256", {}),
        ("vit_so400m_patch16_siglip_384", {"mlp_ratio": 2.0, "num_heads": 4}),
        ("vit_base_patch14_dinov2", {}),
        ("deit_base_patch16_224", {}),
    ],
)
def test_a_tower_is_that_of_timm(name: str, sizes: dict) -> None:
    pytest.importorskip("torchvision", reason="timm imports it", exc_type=ImportError)
    timm = pytest.importorskip("timm", exc_type=ImportError)
    small = {"embed_dim": 128, "num_heads": 2, "depth": 2, "patch_size": 6, "img_size": 24, "num_classes": 5} | sizes
    torch.manual_seed(0)
    theirs = timm.create_model(name, **small).eval()
    with torch.no_grad():
        for p in theirs.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    saved = theirs.state_dict()
    ours, beside = load_tower({"architecture": name, "model_args": {"num_heads": small["num_heads"]}}, saved)
    rows = torch.randn(2 * 16, 108)
    pixels = rows.view(2, 4, 4, 6, 6, 3).permute(0, 5, 1, 3, 2, 4).reshape(2, 3, 24, 24)
    place = torch.cartesian_prod(torch.arange(4), torch.arange(4)).repeat(2, 1)
    with torch.no_grad():
        found = ours(rows, torch.arange(2).repeat_interleave(16), place)
        told = theirs.forward_features(pixels)[:, theirs.num_prefix_tokens :]
    assert (found.view(2, 16, -1) - told).abs().max() <= TOLERANCE
    written(ours, beside, saved, "timm")


def test_what_of_timm_cannot_be_computed_is_named(tmp_path: Path) -> None:
    build("ViT", tmp_path)
    saved = as_timm(load_file(tmp_path / "model.safetensors"))
    for changed, named in (
        ({"reg_token": torch.zeros(1, 4, 32)}, "register tokens"),
        ({"pos_embed": saved["pos_embed"][:, 1:]}, "class token without a position"),
        ({"blocks.0.mlp.fc2.weight": torch.zeros(32, 24)}, "SwiGLU"),
        ({"dist_token": torch.zeros(1, 1, 32)}, "nothing reads, such as 'dist_token'"),
        ({"pos_embed": saved["pos_embed"][0]}, "pos_embed three"),
        ({"norm.weight": torch.zeros(31)}, "norm.weight has shape"),
    ):
        with pytest.raises(BadInput, match=named):
            load_tower(TIMM, saved | changed)
    for lost in ("pos_embed", "blocks.1.attn.qkv.bias"):
        with pytest.raises(BadInput, match=f"lack '{lost}'"):
            load_tower(TIMM, {name: tensor for name, tensor in saved.items() if name != lost})
    with pytest.raises(BadInput, match="does not divide into 5 heads"):
        load_tower(TIMM | {"model_args": {"num_heads": 5}}, saved)
    with pytest.raises(BadInput, match="no square"):
        read_tower({"model_type": "siglip2_vision_model", "patch_size": 6, "num_patches": 17, "hidden_size": 32})


def test_what_a_tower_lacks_or_has_too_much_is_named(tmp_path: Path) -> None:
    build("ViT", tmp_path)
    config, saved = json.loads((tmp_path / "config.json").read_text()), load_file(tmp_path / "model.safetensors")
    with pytest.raises(BadInput, match="nothing reads, such as 'odd'"):
        load_tower(config, saved | {"odd": torch.zeros(1)})
    saved.pop("layernorm.bias")
    with pytest.raises(BadInput, match="lack 'layernorm.bias'"):
        load_tower(config, saved)
    with pytest.raises(BadInput, match="'resnet'"):
        read_tower({"model_type": "resnet"})
    with pytest.raises(BadInput, match="use_swiglu_ffn"):
        read_tower(config | {"model_type": "dinov2", "use_swiglu_ffn": True})
