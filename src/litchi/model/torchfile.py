"""A file that torch.save wrote is read as named tensors and nothing else, so that nothing in it can run.

torch's restricted reader (`weights_only=True`) builds tensors and plain containers and refuses every other call that a
pickle asks for. Around it stand the checks that it lacks: nothing in the archive may be compressed, so that memory is
bounded by the file, and what comes out must be dense tensors under names. Where there is a choice, take safetensors.
"""

from __future__ import annotations

import zipfile
from pathlib import Path

import torch
from torch import Tensor

from litchi.config import BadInput
from litchi.model.tensorfile import broken, first_bytes, show

WRAPPERS = ("state_dict", "model", "module")
"""Keys under which training scripts put the tensors when they save more than these."""


def read_pickled(path: Path) -> dict[str, Tensor]:
    """The tensors of a .pth, .pt, .bin or .ckpt file, as stored.

    Raises BadInput for a file that is no such archive, is compressed, asks for a call, or holds anything but tensors.
    """
    check_archive(path)
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a hostile stream can make the reader raise anything
        reason = str(error).strip().partition("\n")[0][:200]
        raise BadInput(
            f"{path} holds more than tensors, or is damaged ({reason}): take its safetensors file"
        ) from error
    for key in WRAPPERS:
        if isinstance(found, dict) and isinstance(found.get(key), dict):
            found = found[key]
    if not isinstance(found, dict) or not found:
        raise BadInput(f"{path} holds no dictionary of tensors, but {type(found).__name__}: name a file of weights")
    for name, tensor in found.items():
        check_tensor(path, name, tensor)
    return dict(found)


def check_archive(path: Path) -> None:
    if first_bytes(path)[:4] != b"PK\x03\x04":
        raise BadInput(f"{path} is no archive of torch.save since version 1.6: save it again with a newer torch")
    try:
        with zipfile.ZipFile(path) as archive:
            packed = [info.filename for info in archive.infolist() if info.compress_type != zipfile.ZIP_STORED]
    except (zipfile.BadZipFile, NotImplementedError, UnicodeDecodeError, OSError) as error:
        broken(path, f"its archive cannot be read ({str(error)[:200]})")
    if packed:
        broken(path, f"{show(packed[0])} in it is compressed, which torch.save never does")


def check_tensor(path: Path, name: object, tensor: object) -> None:
    if not isinstance(name, str) or not isinstance(tensor, Tensor):
        raise BadInput(
            f"{path}: {str(name)[:80]!r} is {type(tensor).__name__} and not a tensor: name a file of weights"
        )
    if tensor.layout is not torch.strided or tensor.device.type != "cpu" or tensor.is_quantized:
        raise BadInput(f"{path}: {show(name)} is no dense tensor: save it again as one")
