"""Sizes of well-known models by name, so that one can be counted, planned and sharded before it is there.

Figures are those of the publishers' config.json (Hugging Face).
"""

from __future__ import annotations

from dataclasses import replace

from litchi.config import BadInput
from litchi.model.network import ModelConfig
from litchi.model.rope import Llama3
from litchi.model.vision import Tower
from litchi.schema.sequence import Modality

LLAMA = ModelConfig(vocab_size=32_000, qk_norm=False, tied=False, epsilon=1e-5)
"""What the Llamas share; their sizes replace these."""

YI_34B = replace(
    LLAMA,
    vocab_size=64_000,
    width=7_168,
    num_layers=60,
    num_heads=56,
    num_kv_heads=8,
    head_width=128,
    mlp_width=20_480,
    theta=5_000_000.0,
    max_length=4_096,
)
"""01-ai/Yi-34B; SUS-Chat-34B is the same network, and so is the trunk of LLaVA-1.6-34B with a longer table."""

CLIP_L_336 = Tower(
    channels=14 * 14 * 3,
    width=1_024,
    num_layers=24,
    num_heads=16,
    grid=24,
    mlp_width=4_096,
    activation="quick_gelu",
    table="cells",
    class_token=True,
    patch_bias=False,
    norm_before=True,
)
"""openai/clip-vit-large-patch14-336, as LLaVA takes it; its table of 64,064 rows in LLaVA-1.6-34B is from memory."""

PRESETS: dict[str, ModelConfig] = {
    "gpt2": ModelConfig(
        vocab_size=50_257,
        width=768,
        num_layers=12,
        num_heads=12,
        num_kv_heads=12,
        head_width=64,
        mlp_width=3_072,
        qk_norm=False,
        epsilon=1e-5,
        places=1_024,
        norm="layer",
        activation="gelu",
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
        max_length=1_024,
    ),
    "smollm2-135m": replace(
        LLAMA,
        vocab_size=49_152,
        width=576,
        num_layers=30,
        num_heads=9,
        num_kv_heads=3,
        head_width=64,
        mlp_width=1_536,
        theta=100_000.0,
        tied=True,
        max_length=8_192,
    ),
    "llama3.1-8b": replace(
        LLAMA,
        vocab_size=128_256,
        width=4_096,
        num_layers=32,
        num_heads=32,
        num_kv_heads=8,
        head_width=128,
        mlp_width=14_336,
        theta=500_000.0,
        scaling=Llama3(8.0, 1.0, 4.0, 8_192),
        max_length=131_072,
    ),
    "llama3.1-405b": replace(
        LLAMA,
        vocab_size=128_256,
        width=16_384,
        num_layers=126,
        num_heads=128,
        num_kv_heads=8,
        head_width=128,
        mlp_width=53_248,
        theta=500_000.0,
        scaling=Llama3(8.0, 1.0, 4.0, 8_192),
        max_length=131_072,
    ),
    "qwen2.5-7b": replace(
        LLAMA,
        vocab_size=152_064,
        width=3_584,
        num_layers=28,
        num_heads=28,
        num_kv_heads=4,
        head_width=128,
        mlp_width=18_944,
        theta=1_000_000.0,
        epsilon=1e-6,
        qkv_bias=True,
        max_length=32_768,
    ),
    "yi-34b": YI_34B,
    "sus-chat-34b": YI_34B,
    "llava-1.6-34b": replace(
        YI_34B,
        vocab_size=64_064,
        modalities={str(Modality.VISION): replace(CLIP_L_336, take=23, newline=True)},
    ),
}


def preset(name: str) -> ModelConfig:
    if name not in PRESETS:
        raise BadInput(f"no preset {name!r}; the presets are: {', '.join(PRESETS)}")
    return PRESETS[name]
