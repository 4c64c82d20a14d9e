"""Where the weights of an engine lie: on a CPU in fp32, on a GPU in what they are multiplied in.

The trunk, what it reads pictures with and the scores of words are on the GPU; sampling, and the heads that say what a
picture's tokens are, stay with the programs on the CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from litchi.config import BadInput
from litchi.model.network import Model
from litchi.model.weights import Place
from litchi.serve.scheduler import EngineConfig


def device_of(c: EngineConfig, number: int = 0) -> torch.device:
    """Where an engine computes; `number` counts those of this machine, which share its GPUs out.

    Raises BadInput for a GPU that is not there, or for weights that none of them computes with here.
    """
    native = c.path == "native" or c.weights not in ("float32", "bfloat16") or c.kv != "auto"
    if c.device == "cpu" or (c.device == "auto" and (native or not torch.cuda.is_available())):
        return torch.device("cpu")
    if native:
        raise BadInput("serve.engine.device=cuda computes in bfloat16 or float32 only: set weights, kv and path so")
    if not torch.cuda.is_available():
        raise BadInput(f"serve.engine.device=cuda: PyTorch {torch.__version__} sees no GPU here: set cpu or auto")
    return torch.device("cuda", number % torch.cuda.device_count())


def placing(c: EngineConfig, number: int = 0) -> Place | None:
    """How `load` places an engine's network; None where it stays on the CPU. Raises as `device_of` does."""
    device = device_of(c, number)
    if device.type == "cpu":
        return None
    torch.cuda.set_device(device)
    return partial(place_of, device=device, dtype=torch.float32 if c.weights == "float32" else torch.bfloat16)


def place_of(model: Model, device: torch.device, dtype: torch.dtype) -> Callable[[str, Tensor], Tensor]:
    """Where a parameter of such a network goes, by its name, and in which type."""
    products = [f"{name}." for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    narrow = {name + of for name in products for of in ("weight", "bias")}

    def place(name: str, value: Tensor) -> Tensor:
        if name.startswith("writers."):
            return value
        return value.to(device, dtype if name in narrow else value.dtype)

    return place


def table_of(model: Model, dtype: torch.dtype) -> Tensor | None:
    """The table of words (V, D) in what scores are multiplied in, if it is needed and is not there."""
    weight = model.embed_tokens.weight
    return weight.detach().to(dtype) if model.config.tied and weight.dtype != dtype else None


def placed(model: Model, device: torch.device, dtype: torch.dtype) -> Model:
    """The network, changed, with each parameter where `place_of` has it."""
    place = place_of(model, device, dtype)
    weights = {name: place(name, value) for name, value in model.state_dict().items()}
    model.load_state_dict(weights, assign=True)
    return model
