"""Fused layers: what they do to tokens one by one becomes one kernel, by torch.compile, layer by layer.

All layers have the same code, which is compiled once. Only methods are replaced, so that names stay.
"""

from __future__ import annotations

import shutil

import torch

from litchi.config import BadInput
from litchi.model.network import Expert, Layer, Model


def fuse(model: Model, device: torch.device) -> None:
    """Compile the layers of the trunk; call last, when all else is in its place. oracle: the same layers, not compiled

    On a GPU that is all of a layer. On a CPU attention stays outside: it goes from document to document, and every
    batch has others. Raises BadInput if a CPU has no C++ compiler.
    """
    if device.type == "cpu" and not (shutil.which("g++") or shutil.which("clang++")):
        raise BadInput("train.compile needs a C++ compiler on a CPU: install g++, or set train.compile=false")
    for layer in model.layers:
        assert isinstance(layer, Layer)
        if device.type != "cpu":
            layer.forward = torch.compile(layer.forward)
        elif len(layer.experts) == 1:
            layer.ask, layer.answer = torch.compile(layer.ask), torch.compile(layer.answer)
        else:  # how many tokens each expert has changes with every batch
            for expert in layer.experts:
                assert isinstance(expert, Expert)
                expert.read, expert.write = torch.compile(expert.read), torch.compile(expert.write)
