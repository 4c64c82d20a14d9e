"""Small autoencoders of diffusers with random weights, and what both test files ask of them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from litchi.model.latent import Autoencoder

TINY = {"encoder_block_out_channels": (8, 8, 8), "decoder_block_out_channels": (8, 8, 8)}
TINY |= {"num_encoder_blocks": (1, 2, 1), "num_decoder_blocks": (2, 1, 1), "scaling_factor": 0.5, "shift_factor": 0.25}

KL = {"block_out_channels": (8, 16, 16), "layers_per_block": 1, "norm_num_groups": 4}
KL |= {"down_block_types": ("DownEncoderBlock2D",) * 3, "up_block_types": ("UpDecoderBlock2D",) * 3}
FLUX_LIKE = KL | {"latent_channels": 16, "use_quant_conv": False, "use_post_quant_conv": False}
FLUX_LIKE |= {"scaling_factor": 0.3611, "shift_factor": 0.1159}

WAN = {"base_dim": 4, "z_dim": 4, "dim_mult": [1, 2, 4, 4], "num_res_blocks": 1}
WAN |= {"latents_mean": [0.1, -0.2, 0.3, 0.0], "latents_std": [1.0, 2.0, 0.5, 1.5]}


def their_model(name: str, options: dict, folder: Path, spread: float = 0.05) -> nn.Module:
    """A class of diffusers, every weight moved away from where it begins, and saved."""
    diffusers = pytest.importorskip("diffusers", reason="pip install diffusers, the oracle of these tests")
    torch.manual_seed(0)
    net = getattr(diffusers, name)(**options).eval()
    with torch.no_grad():
        for p in net.parameters():
            p.add_(torch.randn_like(p) * spread)
    net.save_pretrained(folder)
    return net


def their_config(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())


def random_weights(model: Autoencoder, seed: int = 0) -> Autoencoder:
    """All weights small and random: what begins at one or zero would hide mistakes."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.2 + (p.dim() == 1))
    return model.eval()


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def signals(*shape: int, seed: int = 0) -> Tensor:
    """Values in [-1, 1], as pixels are."""
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def gap(a: Tensor, b: Tensor) -> float:
    assert a.shape == b.shape
    return float((a - b).detach().abs().max())
