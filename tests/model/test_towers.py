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

transformers = pytest.importorskip("transformers")

SIZES = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48}
SIZES |= {"image_size": 24, "patch_size": 6}
TOWERS = ("CLIPVision", "SiglipVision", "Dinov2", "ViT")
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
    assert (found.view(2, 16, -1) - told).abs().max() <= TOLERANCE
    named = dict(ours.named_parameters())
    back = {
        link.theirs: link.export([named[n] for n in link.ours])
        for link in tower_links(ours.config, config["model_type"])
    }
    assert set(back) | set(beside) == set(saved) and all(name.startswith(BESIDE) for name in beside)
    assert all(torch.equal(tensor, saved[n]) for n, tensor in back.items())


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
