"""Folders as PEFT's save_pretrained writes them, with weights drawn by a seed, for a network of ours."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from litchi.model.adapters import PREFIX, matrices_of
from litchi.model.network import Model

ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def lora_folder(
    folder: Path, model: Model, *, rank: int = 4, seed: int = 0, targets: Sequence[str] = ALL, **said: object
) -> Path:
    """An adapter that changes what the network says by a lot; `said` stands in its configuration."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(lora_tensors(model, rank=rank, seed=seed, targets=targets), folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": 2 * rank,
        "target_modules": list(targets),
        "bias": "none",
        "use_dora": False,
        "use_rslora": False,
        "modules_to_save": None,
        "rank_pattern": {},
        "alpha_pattern": {},
        "lora_dropout": 0.05,
        "task_type": "CAUSAL_LM",
        "inference_mode": True,
    }
    (folder / "adapter_config.json").write_text(json.dumps(config | said))
    return folder


def lora_tensors(model: Model, *, rank: int = 4, seed: int = 0, targets: Sequence[str] = ALL) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, (_, matrix) in matrices_of(model).items():
        if name.split(".")[-1] in targets:
            down = torch.randn(rank, matrix.in_features, generator=generator) / matrix.in_features**0.5
            up = torch.randn(matrix.out_features, rank, generator=generator) * 0.3 / rank
            found[f"{PREFIX}{name}.lora_A.weight"] = down
            found[f"{PREFIX}{name}.lora_B.weight"] = up
    return found
