"""An autoencoder that others trained becomes a codec: a picture is rows of its latents, which a flow can learn.

    codec = LatentCodec.of(load_autoencoder(folder), pack=2)  # Flow(codec.channels) is its kind of modality

A row is a cell of latents, or a square of `pack` x `pack` cells (2 x 2, as FLUX packs them), shifted and scaled as the
autoencoder's authors say, so that its values are near those of unit noise. Latents are means: nothing is drawn.
What is read remembers how it came (`Origin`), so that it can be given back bit for bit.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, UInt8
from safetensors.torch import save_file
from torch import Tensor, nn

from litchi.config import BadInput
from litchi.model import autoencoder, taesd, wan
from litchi.model.autoencoder import FLUX, SD3, SD15, SDXL, KLAutoencoder, KLConfig, kl_places, read_kl, write_kl
from litchi.model.codec import check_size, to_bytes
from litchi.model.taesd import TinyAutoencoder, TinyConfig, infer_tiny, read_tiny, tiny_places, write_tiny
from litchi.model.tensorfile import open_tensors
from litchi.model.transfer import Place, adopt, export, read_weights
from litchi.model.wan import WAN21, WanAutoencoder, WanConfig, read_wan, wan_places, write_wan

AutoencoderConfig = TinyConfig | KLConfig | WanConfig
Autoencoder = TinyAutoencoder | KLAutoencoder | WanAutoencoder
Naming = Literal["diffusers", "original"]
Stored = Literal["float32", "float16", "bfloat16"]

KNOWN: dict[str, AutoencoderConfig] = {"flux": FLUX, "sd3": SD3, "sdxl": SDXL, "sd15": SD15, "wan21": WAN21}
"""Published autoencoders whose files do not say how their latents are scaled, by short names."""
FILES = {"ae.safetensors": "flux", "Wan2.1_VAE": "wan21"}
"""Names, or their stems, under which the owners publish some of these."""

WEIGHTS = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")
HALVES = ("encoder", "decoder")


@dataclass(frozen=True, slots=True)
class Origin:
    """How an autoencoder came: what is given back is spelled so again. A pickle comes back as safetensors."""

    form: Literal["folder", "file", "halves"] = "folder"
    """A folder of diffusers, one file, or the two files of a TAESD."""
    naming: Naming = "diffusers"
    stored: Stored = "float32"
    """The type of its tensors; it computes in fp32, which holds each of them exactly."""
    stem: str = "diffusion_pytorch_model"
    """The name of its file before the dot; of halves, before _encoder and _decoder."""

    def __post_init__(self) -> None:
        if self.stem in ("", ".", "..") or self.stem != Path(self.stem).name or "\\" in self.stem or "\0" in self.stem:
            raise BadInput(f"{self.stem[:80]!r} is no name of a file")


@dataclass(frozen=True, slots=True)
class LatentCodecConfig:
    """An autoencoder, and how many of its cells along a side are one row."""

    autoencoder: AutoencoderConfig
    pack: int = 1
    fastest: Literal["column", "channel"] = "column"
    """Which runs fastest in the row of a square: FLUX has channels of lines of columns, BAGEL channels last."""
    origin: Origin = Origin()

    def __post_init__(self) -> None:
        if self.pack < 1:
            raise BadInput(f"a row of pack={self.pack} cells a side is none: take 1 or more")


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
        return cls.around(autoencoder, LatentCodecConfig(autoencoder.config, pack))

    @classmethod
    def around(cls, autoencoder: Autoencoder, config: LatentCodecConfig) -> LatentCodec:
        with torch.device("meta"):
            codec = cls(config)
        codec.autoencoder = autoencoder.eval().requires_grad_(False)
        return codec

    @torch.no_grad()
    def encode(self, pixels: UInt8[np.ndarray, "h w 3"]) -> Float[Tensor, "N C"]:
        """Rows in reading order, in fp32 on the CPU. Raises BadInput for a size that `patch` does not divide."""
        check_size(pixels, self.patch)
        picture_3HW = torch.from_numpy(np.array(pixels, order="C")).permute(2, 0, 1).to(self.place.device)
        [latents_Chw] = self.autoencoder.encode((picture_3HW.to(self.place.dtype) / 127.5 - 1)[None])
        shift, scale = self.scales()
        return pack_cells((latents_Chw.float() - shift) * scale, self.config.pack, self.config.fastest).cpu()

    @torch.no_grad()
    def decode(self, rows: Float[Tensor, "N C"], height: int, width: int) -> UInt8[np.ndarray, "h w 3"]:
        """The picture of `height` x `width` pixels that rows stand for."""
        rows = rows.to(self.place.device, torch.float32)
        c = self.config
        latents_Chw = unpack_cells(rows, c.pack, height // self.patch, width // self.patch, c.fastest)
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


def pack_cells(latents_Chw: Float[Tensor, "C h w"], side: int, fastest: str = "column") -> Float[Tensor, "N D"]:
    """Squares of cells in reading order; in a row the channel is slowest, then the line, then the column.

    With `fastest` "channel" the line is slowest, then the column.
    """
    channels, height, width = latents_Chw.shape
    squares = latents_Chw.reshape(channels, height // side, side, width // side, side)
    order = (1, 3, 0, 2, 4) if fastest == "column" else (1, 3, 2, 4, 0)
    return squares.permute(order).reshape(-1, channels * side * side)


def unpack_cells(
    rows_ND: Float[Tensor, "N D"], side: int, height: int, width: int, fastest: str = "column"
) -> Float[Tensor, "C h w"]:
    """The inverse of `pack_cells`; `height` and `width` are those of the grid of squares."""
    if fastest == "column":
        squares = rows_ND.reshape(height, width, -1, side, side).permute(2, 0, 3, 1, 4)
    else:
        squares = rows_ND.reshape(height, width, side, side, -1).permute(4, 0, 2, 1, 3)
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
    return read_codec(path, config).autoencoder


def read_codec(
    path: Path,
    config: AutoencoderConfig | None = None,
    *,
    pack: int = 1,
    fastest: Literal["column", "channel"] = "column",
) -> LatentCodec:
    """What `load_autoencoder` reads, as a codec that remembers how it came."""
    if path.is_dir() and (path / "config.json").is_file():
        from litchi.model.convert import read_json  # late: it knows every family, and a server starts without

        config = config or read_autoencoder(read_json(path / "config.json"))
        file = weights_in(path)
        form, stem, tensors = "folder", WEIGHTS[0].partition(".")[0], read_weights(file)
    elif path.is_dir():
        form, (stem, tensors) = "halves", read_halves(path)
    else:
        form, stem, tensors = "file", path.stem, read_weights(path)
    if config is None:
        try:
            config = infer_tiny(tensors)
        except BadInput as error:
            raise BadInput(f"{path}: {error}, or a folder with config.json") from error
    origin = Origin(form, naming_of(config, tensors), widest(tensors, path), stem)
    built = from_tensors(config, tensors, path)
    return LatentCodec.around(built, LatentCodecConfig(config, pack, fastest, origin))


def from_tensors(config: AutoencoderConfig, tensors: Mapping[str, Tensor], source: Path) -> Autoencoder:
    """An autoencoder whose tensors bear either naming, whichever more of them bear."""
    with torch.device("meta"):
        built = build_autoencoder(config)
    adopt(built, places(config, naming_of(config, tensors)), tensors, source)
    return built.eval()


def naming_of(config: AutoencoderConfig, names: Iterable[str]) -> Naming:
    """Which of the two namings more of the names bear."""
    found = set(names)
    borne = {naming: sum(p.theirs in found for p in places(config, naming)) for naming in ("diffusers", "original")}
    return "diffusers" if borne["diffusers"] >= borne["original"] else "original"


def widest(tensors: Mapping[str, Tensor], source: Path) -> Stored:
    """The narrowest type that holds all tensors exactly."""
    names: dict[torch.dtype, Stored] = {
        torch.float32: "float32",
        torch.float16: "float16",
        torch.bfloat16: "bfloat16",
    }
    kinds = {tensor.dtype for tensor in tensors.values()}
    for kind in kinds - names.keys():
        raise BadInput(f"{source} holds weights of type {kind}: save it as {', '.join(names.values())} first")
    return names[kinds.pop()] if len(kinds) == 1 else "float32"


def weights_in(folder: Path) -> Path:
    for name in WEIGHTS:
        if (folder / name).is_file():
            return folder / name
    raise BadInput(f"{folder} has a config.json but no {WEIGHTS[0]}: copy the folder again, with all files")


def read_halves(folder: Path) -> tuple[str, dict[str, Tensor]]:
    """NAME of NAME_encoder.pth and NAME_decoder.pth, a TAESD's two files; a half's name goes before its tensors."""
    tensors, name = {}, ""
    for half in HALVES:
        files = sorted(p for p in folder.glob(f"*_{half}.*") if p.suffix in (".pth", ".safetensors"))
        if not files:
            raise BadInput(f"{folder} has neither config.json nor NAME_{half}.pth: name a folder of an autoencoder")
        if len({file.stem for file in files}) > 1:
            raise BadInput(f"{folder} has several autoencoders, such as {files[0].name} and {files[-1].name}: keep one")
        name = files[-1].stem.removesuffix(f"_{half}")
        tensors |= {f"{half}.{inner}": tensor for inner, tensor in read_weights(files[-1]).items()}
    return name, tensors


def export_autoencoder(model: Autoencoder, naming: Naming, dtype: torch.dtype) -> dict[str, Tensor]:
    """Its tensors under diffusers' names or their owners', for `save_file`; of a TAESD, halves before the names."""
    return export(model, places(model.config, naming), dtype)


def save_autoencoder(folder: Path, model: Autoencoder, dtype: torch.dtype = torch.float32) -> None:
    """Write a folder that diffusers reads. Raises BadInput if it is not empty, or diffusers has no such class."""
    config = write_autoencoder(model.config)
    if folder.exists() and any(folder.iterdir()):
        raise BadInput(f"{folder} is not empty: name a new folder")
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(folder / WEIGHTS[0], export_autoencoder(model, "diffusers", dtype))
    (folder / "config.json").write_text(json.dumps(config, indent=1))


def write_back(folder: Path, codec: LatentCodec, original: Mapping[str, Any] | None = None) -> None:
    """Write an autoencoder as it came: names, type and files; `original` is the config.json that it came with."""
    origin = codec.config.origin
    tensors = export_autoencoder(codec.autoencoder, origin.naming, getattr(torch, origin.stored))
    folder.mkdir(parents=True, exist_ok=True)
    match origin.form:
        case "folder":
            said = dict(original or write_autoencoder(codec.config.autoencoder))
            write_tensors(folder / WEIGHTS[0], tensors)
            (folder / "config.json").write_text(json.dumps(said, indent=1))
        case "file":
            write_tensors(folder / f"{origin.stem}.safetensors", tensors)
        case "halves":
            for half in HALVES:
                mine = {k.removeprefix(f"{half}."): t for k, t in tensors.items() if k.startswith(f"{half}.")}
                write_tensors(folder / f"{origin.stem}_{half}.safetensors", mine)


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    save_file(dict(tensors), path, metadata={"format": "pt"})


# ---- ours ---------------------------------------------------------------------------------------------------------


def keep_codec(codec: LatentCodec, path: Path) -> None:
    """Write the weights under our names, in the type in which they came."""
    dtype = getattr(torch, codec.config.origin.stored)
    save_file({name: t.detach().to("cpu", dtype).contiguous() for name, t in codec.state_dict().items()}, path)


def kept_codec(config: LatentCodecConfig, path: Path) -> LatentCodec:
    """What `keep_codec` wrote, in fp32. Raises BadInput for a file that is broken or does not fit its configuration."""
    with torch.device("meta"):
        codec = LatentCodec(config)
    with open_tensors(path) as file:
        tensors = {name: file.read(name) for name in file.entries}
    adopt(codec, [Place(name, name) for name, _ in codec.named_parameters()], tensors, path)
    return codec
