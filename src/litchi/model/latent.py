"""An autoencoder that others trained becomes a codec: a picture is rows of its latents, which a flow can learn.

    codec = LatentCodec.of(load_autoencoder(folder), pack=2)  # Flow(codec.channels) is its kind of modality

A row is a cell of latents, or a square of `pack` x `pack` cells (2 x 2, as FLUX packs them), shifted and scaled as the
autoencoder's authors say, so that its values are near those of unit noise. Latents are means: nothing is drawn.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, UInt8
from safetensors.torch import save_file
from torch import Tensor, nn

from litchi.config import BadInput
from litchi.model import autoencoder, taesd, wan
from litchi.model.autoencoder import KLAutoencoder, KLConfig, kl_places, read_kl, write_kl
from litchi.model.codec import check_size, to_bytes
from litchi.model.convert import read_json
from litchi.model.taesd import TinyAutoencoder, TinyConfig, infer_tiny, read_tiny, tiny_places, write_tiny
from litchi.model.transfer import Place, adopt, export, read_weights
from litchi.model.wan import WanAutoencoder, WanConfig, read_wan, wan_places, write_wan

AutoencoderConfig = TinyConfig | KLConfig | WanConfig
Autoencoder = TinyAutoencoder | KLAutoencoder | WanAutoencoder
Naming = Literal["diffusers", "original"]

WEIGHTS = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")
HALVES = ("encoder", "decoder")


@dataclass(frozen=True, slots=True)
class LatentCodecConfig:
    """An autoencoder, and how many of its cells along a side are one row."""

    autoencoder: AutoencoderConfig
    pack: int = 1


class LatentCodec(nn.Module):
    """Pictures to rows of latents and back; a `Codec`. Its weights stay as they were trained."""

    def __init__(self, config: LatentCodecConfig) -> None:
        super().__init__()
        self.config, c = config, config.autoencoder
        self.autoencoder = build_autoencoder(c).eval().requires_grad_(False)
        self.patch, self.channels = c.factor * config.pack, c.channels * config.pack**2

    @classmethod
    def of(cls, autoencoder: Autoencoder, *, pack: int = 1) -> LatentCodec:
        """Around an autoencoder that is loaded."""
        with torch.device("meta"):
            codec = cls(LatentCodecConfig(autoencoder.config, pack))
        codec.autoencoder = autoencoder.eval().requires_grad_(False)
        return codec

    @torch.no_grad()
    def encode(self, pixels: UInt8[np.ndarray, "h w 3"]) -> Float[Tensor, "N C"]:
        """Rows in reading order, in fp32 on the CPU. Raises BadInput for a size that `patch` does not divide."""
        check_size(pixels, self.patch)
        picture_3HW = torch.from_numpy(np.array(pixels, order="C")).permute(2, 0, 1).to(self.place.device)
        [latents_Chw] = self.autoencoder.encode((picture_3HW.to(self.place.dtype) / 127.5 - 1)[None])
        shift, scale = self.scales()
        return pack_cells((latents_Chw.float() - shift) * scale, self.config.pack).cpu()

    @torch.no_grad()
    def decode(self, rows: Float[Tensor, "N C"], height: int, width: int) -> UInt8[np.ndarray, "h w 3"]:
        """The picture of `height` x `width` pixels that rows stand for."""
        rows = rows.to(self.place.device, torch.float32)
        latents_Chw = unpack_cells(rows, self.config.pack, height // self.patch, width // self.patch)
        shift, scale = self.scales()
        [picture_3HW] = self.autoencoder.decode((latents_Chw / scale + shift).to(self.place.dtype)[None])
        return to_bytes(picture_3HW.float().permute(1, 2, 0)).cpu().numpy()

    def scales(self) -> tuple[Tensor, Tensor]:
        """Shift and scale as (C or 1, 1, 1)."""
        c = self.config.autoencoder
        shift, scale = (torch.tensor(v, device=self.place.device)[:, None, None] for v in (c.shift, c.scale))
        return shift, scale

    @property
    def place(self) -> Tensor:
        """A weight: pictures go where it is, in its type."""
        return next(self.autoencoder.parameters())


def pack_cells(latents_Chw: Float[Tensor, "C h w"], side: int) -> Float[Tensor, "N D"]:
    """Squares of cells in reading order; in a row the channel is slowest, then the line, then the column."""
    channels, height, width = latents_Chw.shape
    squares = latents_Chw.reshape(channels, height // side, side, width // side, side)
    return squares.permute(1, 3, 0, 2, 4).reshape(-1, channels * side * side)


def unpack_cells(rows_ND: Float[Tensor, "N D"], side: int, height: int, width: int) -> Float[Tensor, "C h w"]:
    """The inverse of `pack_cells`; `height` and `width` are those of the grid of squares."""
    squares = rows_ND.reshape(height, width, -1, side, side).permute(2, 0, 3, 1, 4)
    return squares.reshape(len(squares), height * side, width * side)


# ---- the three families -------------------------------------------------------------------------------------------


def build_autoencoder(config: AutoencoderConfig) -> Autoencoder:
    match config:
        case TinyConfig():
            return TinyAutoencoder(config)
        case KLConfig():
            return KLAutoencoder(config)
        case WanConfig():
            return WanAutoencoder(config)


def read_autoencoder(config: Mapping) -> AutoencoderConfig:
    """The `config.json` of a diffusers folder as ours. Raises BadInput for a class that no family computes."""
    match config.get("_class_name"):
        case taesd.CLASS:
            return read_tiny(config)
        case autoencoder.CLASS:
            return read_kl(config)
        case name if name in wan.CLASSES:
            return read_wan(config)
        case name:
            known = ", ".join((taesd.CLASS, autoencoder.CLASS, *wan.CLASSES))
            raise BadInput(f"an autoencoder of class {name!r} cannot be read; these can: {known}")


def write_autoencoder(config: AutoencoderConfig) -> dict:
    match config:
        case TinyConfig():
            return write_tiny(config)
        case KLConfig():
            return write_kl(config)
        case WanConfig():
            return write_wan(config)


def places(config: AutoencoderConfig, naming: Naming) -> list[Place]:
    match config:
        case TinyConfig():
            return tiny_places(config, naming)
        case KLConfig():
            return kl_places(config, naming)
        case WanConfig():
            return wan_places(config, naming)


# ---- files --------------------------------------------------------------------------------------------------------


def load_autoencoder(path: Path, config: AutoencoderConfig | None = None) -> Autoencoder:
    """What others trained as ours, in fp32, from a folder of diffusers, the two files of a TAESD, or one file.

    One file (FLUX's `ae.safetensors`, Wan's `Wan2.1_VAE.pth`, `taef2.safetensors`) does not say how its latents are
    scaled, and so needs its `config`: `FLUX`, `SD3`, `SDXL`, `SD15`, `WAN21`, or one of your own; TAESDs need none.
    Raises BadInput, saying what is wrong, for a file that is broken, does not fit, holds NaN or could run code.
    """
    if path.is_dir() and (path / "config.json").is_file():
        config = config or read_autoencoder(read_json(path / "config.json"))
        return from_tensors(config, read_weights(weights_in(path)), path)
    tensors = read_halves(path) if path.is_dir() else read_weights(path)
    if config is None:
        try:
            config = infer_tiny(tensors)
        except BadInput as error:
            raise BadInput(f"{path}: {error}, or a folder with config.json") from error
    return from_tensors(config, tensors, path)


def from_tensors(config: AutoencoderConfig, tensors: Mapping[str, Tensor], source: Path) -> Autoencoder:
    """An autoencoder whose tensors bear either naming, whichever more of them bear."""
    with torch.device("meta"):
        built = build_autoencoder(config)
    namings = (places(config, "diffusers"), places(config, "original"))
    adopt(built, max(namings, key=lambda known: sum(place.theirs in tensors for place in known)), tensors, source)
    return built.eval()


def weights_in(folder: Path) -> Path:
    for name in WEIGHTS:
        if (folder / name).is_file():
            return folder / name
    raise BadInput(f"{folder} has a config.json but no {WEIGHTS[0]}: copy the folder again, with all files")


def read_halves(folder: Path) -> dict[str, Tensor]:
    """The two files of a TAESD, as NAME_encoder.pth and NAME_decoder.pth; a half's name goes before its tensors."""
    tensors = {}
    for half in HALVES:
        files = sorted(p for p in folder.glob(f"*_{half}.*") if p.suffix in (".pth", ".safetensors"))
        if not files:
            raise BadInput(f"{folder} has neither config.json nor NAME_{half}.pth: name a folder of an autoencoder")
        if len({file.stem for file in files}) > 1:
            raise BadInput(f"{folder} has several autoencoders, such as {files[0].name} and {files[-1].name}: keep one")
        tensors |= {f"{half}.{name}": tensor for name, tensor in read_weights(files[-1]).items()}
    return tensors


def export_autoencoder(model: Autoencoder, naming: Naming, dtype: torch.dtype) -> dict[str, Tensor]:
    """Its tensors under diffusers' names or their owners', for `save_file`; of a TAESD, halves before the names."""
    return export(model, places(model.config, naming), dtype)


def save_autoencoder(folder: Path, model: Autoencoder, dtype: torch.dtype = torch.float32) -> None:
    """Write a folder that diffusers reads. Raises BadInput if it is not empty, or diffusers has no such class."""
    config = write_autoencoder(model.config)
    if folder.exists() and any(folder.iterdir()):
        raise BadInput(f"{folder} is not empty: name a new folder")
    folder.mkdir(parents=True, exist_ok=True)
    save_file(export_autoencoder(model, "diffusers", dtype), folder / WEIGHTS[0], metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=1))
