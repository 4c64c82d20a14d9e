"""How a model that others trained looks at a picture: resized, cut into tiles and patches, and laid out as tokens.

What each family does is read in transformers' image processors (their Pillow form) and written anew. A tile is what the
vision tower reads at once, `side` pixels square; a token shows `merge` x `merge` patches of one tile.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, Literal, Protocol

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from PIL import Image as Picture
from torch import Tensor

from litchi.config import BadInput

Resample = Literal["bilinear", "bicubic", "lanczos"]

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True, slots=True)
class Crop:
    """LLaVA-1.5: the shorter side becomes `side` pixels, and the middle is cut out."""


@dataclass(frozen=True, slots=True)
class Resize:
    """The picture becomes one tile, whatever its shape was."""


@dataclass(frozen=True, slots=True)
class AnyShape:
    """LLaVA-NeXT: the whole picture as one tile, then larger in the shape (height, width) that wastes least.

    Tokens that show nothing but the border are left out, and a token of its own ends each line.
    """

    shapes: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class Split:
    """SmolVLM: the longer side becomes `longest` pixels; tiles are named by row and column, the whole comes last."""

    longest: int


@dataclass(frozen=True, slots=True)
class Native:
    """Qwen-VL: the picture keeps its shape, and has from `smallest` to `largest` pixels in whole tokens."""

    smallest: int
    largest: int


@dataclass(frozen=True, slots=True)
class SightConfig:
    """All that decides how pixels become patches and where the tokens that show them stand."""

    layout: Crop | Resize | AnyShape | Split | Native
    side: int
    """Pixels of a tile; of a token where there are no tiles."""
    patch: int
    merge: int = 1
    mean: tuple[float, float, float] = CLIP_MEAN
    std: tuple[float, float, float] = CLIP_STD
    resample: Resample = "bicubic"
    token: str = "<image>"
    """The control token that stands for a picture in a template, and under each of its tokens."""
    around: tuple[str, str] = ("", "")
    """The control tokens before a tile and before the whole picture (SmolVLM)."""
    frames: int = 1
    """How many times a patch is repeated: a picture is a film that stands still (Qwen-VL)."""


@dataclass(frozen=True, slots=True)
class Seen:
    """Patches, and the tokens that show them."""

    value: Float[Tensor, "N C"]
    place: Int[Tensor, "N 3"]
    """Tile, row and column of each, counted from the middle of the tile; tile -1 ends a line."""
    index: Int[Tensor, "N"]
    """Which token shows it, from 0; -1 for a patch that only the tower reads."""
    steps: Int[Tensor, "n 3"]
    """How far the position of each token is from where the picture begins, in time, rows and columns."""


class Marked(Protocol):
    """What a way of looking is configured by, as far as a processor must know it."""

    @property
    def token(self) -> str: ...


class Eye(Protocol):
    """Anything that looks at pictures for a model that others trained."""

    @property
    def config(self) -> Marked: ...

    def look(self, pixels: UInt8[np.ndarray, "h w 3"]) -> list[str | Seen]: ...


class Sight:
    """Pictures to patches. What `look` gives is in order: words of the model's own, and what is seen between them."""

    def __init__(self, config: SightConfig) -> None:
        if config.side % (config.patch * config.merge):
            raise BadInput(
                f"a tile of {config.side} pixels does not divide into tokens of {config.patch}x{config.merge}"
            )
        self.config = config
        self.patch = config.patch

    def look(self, pixels: UInt8[np.ndarray, "h w 3"]) -> list[str | Seen]:
        h, w = pixels.shape[:2]
        if max(h, w) > LONGEST * min(h, w):  # brought to size, a line of pixels would fill the memory
            raise BadInput(f"a picture of {h}x{w} pixels is too narrow: at most {LONGEST} times as long as wide")
        match self.config.layout:
            case Crop():
                return [seen_in_order([self.tile(crop(pixels, self.config.side, self.resample))])]
            case Resize():
                return [seen_in_order([self.tile(self.resized(pixels, self.config.side, self.config.side))])]
            case AnyShape(shapes):
                return [self.any_shape(pixels, shapes)]
            case Split(longest):
                return list(self.split(pixels, longest))
            case Native(smallest, largest):
                return [self.native(pixels, smallest, largest)]

    # ---- layouts ----

    def any_shape(self, pixels: np.ndarray, shapes: Sequence[tuple[int, int]]) -> Seen:
        side, (h, w) = self.config.side, pixels.shape[:2]
        height, width = best_shape((h, w), shapes)
        fitted = self.resized(pixels, *fit((h, w), (height, width)))
        top, left = (height - fitted.shape[0]) // 2, (width - fitted.shape[1]) // 2
        canvas = np.zeros((height, width, 3), np.uint8)
        canvas[top : top + fitted.shape[0], left : left + fitted.shape[1]] = fitted
        tiles = [self.tile(self.resized(pixels, side, side))]
        for i, j in product(range(0, height, side), range(0, width, side)):
            tiles.append(self.tile(canvas[i : i + side, j : j + side]))
        return self.lines(tiles, (height // side, width // side), (h, w))

    def lines(self, tiles: Sequence[Tensor], shape: tuple[int, int], size: tuple[int, int]) -> Seen:
        """The whole picture's tokens, then those of all tiles line by line, without the border, each line ended."""
        n = self.config.side // self.config.patch
        rows, columns = shape[0] * n, shape[1] * n
        top, left = border((rows, columns), size)
        index = torch.full((len(tiles), n, n), -1)
        index[0] = torch.arange(n * n).view(n, n)
        per_line = columns - 2 * left + 1
        for i, j in product(range(top, rows - top), range(left, columns - left)):
            tile = 1 + (i // n) * shape[1] + j // n
            index[tile, i % n, j % n] = n * n + (i - top) * per_line + j - left
        whole = seen_in_order(tiles)
        tokens = torch.arange(n * n + per_line * (rows - 2 * top))
        ends = n * n + torch.arange(1, rows - 2 * top + 1) * per_line - 1
        return Seen(
            value=torch.cat([whole.value, whole.value.new_zeros(len(ends), whole.value.shape[1])]),
            place=torch.cat([whole.place, torch.tensor([-1, 0, 0]).expand(len(ends), -1)]),
            index=torch.cat([index.flatten(), ends]),
            steps=tokens[:, None].expand(-1, 3),
        )

    def split(self, pixels: np.ndarray, longest: int) -> Iterator[str | Seen]:
        side, (tile, whole) = self.config.side, self.config.around
        pixels = self.resized(pixels, *to_longest(pixels.shape[:2], longest))
        pixels = self.resized(pixels, *to_multiples(pixels.shape[:2], side))
        rows, columns = pixels.shape[0] // side, pixels.shape[1] // side
        between = ""
        if rows > 1 or columns > 1:
            for i, j in product(range(rows), range(columns)):
                yield between * (j == 0) + f"{tile}<row_{i + 1}_col_{j + 1}>"
                yield seen_in_order([self.tile(pixels[i * side : (i + 1) * side, j * side : (j + 1) * side])])
                between = "\n"
            pixels, between = self.resized(pixels, side, side), "\n\n"
        yield between + tile + whole
        yield seen_in_order([self.tile(pixels)])
        yield tile

    def native(self, pixels: np.ndarray, smallest: int, largest: int) -> Seen:
        seen = seen_in_order(
            [self.tile(self.resized(pixels, *whole_tokens(pixels, self.config.side, smallest, largest)))]
        )
        rows, columns = seen.place[:, 1], seen.place[:, 2]
        return replace(seen, steps=torch.stack([0 * rows, rows - rows.min(), columns - columns.min()], 1))

    # ---- pixels ----

    @property
    def resample(self) -> Picture.Resampling:
        return Picture.Resampling[self.config.resample.upper()]

    def resized(self, pixels: np.ndarray, height: int, width: int) -> np.ndarray:
        return np.asarray(Picture.fromarray(pixels).resize((width, height), self.resample))

    def tile(self, pixels: UInt8[np.ndarray, "h w 3"]) -> Float[Tensor, "rows columns C"]:
        """One tile as tokens in rows and columns, the patches of a token one after another, channels last."""
        c = self.config
        mean, std = np.array(c.mean, np.float32), np.array(c.std, np.float32)
        scaled = (pixels.astype(np.float32) * np.float32(1 / 255) - mean) / std
        rows, columns = (length // (c.patch * c.merge) for length in pixels.shape[:2])
        cut = torch.from_numpy(scaled).view(rows, c.merge, c.patch, columns, c.merge, c.patch, 3)
        patches = cut.permute(0, 3, 1, 4, 2, 5, 6).flatten(4).flatten(2, 3)
        return patches.repeat(1, 1, 1, c.frames).flatten(2)


def seen_in_order(tiles: Sequence[Float[Tensor, "rows columns C"]]) -> Seen:
    """Tiles token by token in reading order, at positions that count on like those of words."""
    rows, columns, _ = tiles[0].shape
    place = torch.cartesian_prod(
        torch.arange(len(tiles)), torch.arange(rows) - rows // 2, torch.arange(columns) - columns // 2
    )
    tokens = torch.arange(len(place))
    return Seen(torch.cat([t.flatten(0, 1) for t in tiles]), place, tokens, tokens[:, None].expand(-1, 3))


def crop(pixels: np.ndarray, side: int, resample: Picture.Resampling) -> np.ndarray:
    h, w = pixels.shape[:2]
    height, width = (int(side * h / w), side) if w < h else (side, int(side * w / h))
    fitted = np.asarray(Picture.fromarray(pixels).resize((width, height), resample))
    top, left = (height - side) // 2, (width - side) // 2
    return fitted[top : top + side, left : left + side]


# ---- sizes --------------------------------------------------------------------------------------------------------


def best_shape(size: tuple[int, int], shapes: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """The shape in which most of a picture's pixels are kept, and of those the one with least border."""

    def merit(shape: tuple[int, int]) -> tuple[int, int]:
        scale = min(shape[1] / size[1], shape[0] / size[0])
        kept = min(int(size[1] * scale) * int(size[0] * scale), size[0] * size[1])
        return kept, kept - shape[0] * shape[1]

    return max(shapes, key=merit)


def fit(size: tuple[int, int], shape: tuple[int, int]) -> tuple[int, int]:
    """The size at which a picture fills a shape one way and does not cross it the other."""
    down, across = shape[0] / size[0], shape[1] / size[1]
    if across < down:
        return min(math.ceil(size[0] * across), shape[0]), shape[1]
    return shape[0], min(math.ceil(size[1] * down), shape[1])


def border(grid: tuple[int, int], size: tuple[int, int]) -> tuple[int, int]:
    """How many rows above and below, and columns left and right, of a grid of tokens show nothing but the border."""
    rows, columns = grid
    if size[1] / size[0] > columns / rows:
        return (rows - int(round(size[0] * (columns / size[1]), 7))) // 2, 0
    return 0, (columns - int(round(size[1] * (rows / size[0]), 7))) // 2


LARGEST = 4096
"""No side is made larger by SmolVLM's first step."""


def to_longest(size: tuple[int, int], longest: int) -> tuple[int, int]:
    h, w = size
    ratio = w / h
    if w >= h:
        w, h = longest, int(longest / ratio)
        h += h % 2
    else:
        h, w = longest, int(longest * ratio)
        w += w % 2
    h, w = max(h, 1), max(w, 1)
    if max(h, w) > LARGEST:
        ratio = w / h
        h, w = (int(LARGEST / ratio), LARGEST) if w >= h else (LARGEST, int(LARGEST * ratio))
    return max(h, 1), max(w, 1)


def to_multiples(size: tuple[int, int], side: int) -> tuple[int, int]:
    h, w = size
    ratio = w / h
    if w >= h:
        w = math.ceil(w / side) * side
        return math.ceil(int(w / ratio) / side) * side, w
    h = math.ceil(h / side) * side
    return h, math.ceil(int(h * ratio) / side) * side


LONGEST = 200
"""Times its shorter side that a picture may be long."""


def whole_tokens(pixels: np.ndarray, side: int, smallest: int, largest: int) -> tuple[int, int]:
    """The size nearest to a picture's in whole tokens, within the bounds."""
    h, w = pixels.shape[:2]
    down, across = round(h / side), round(w / side)
    if down * across * side * side > largest:
        shrink = math.sqrt(h * w / largest)
        down, across = (max(1, math.floor(length / shrink / side)) for length in (h, w))
    elif down * across * side * side < smallest:
        grow = math.sqrt(smallest / (h * w))
        down, across = (math.ceil(length * grow / side) for length in (h, w))
    return down * side, across * side


# ---- configurations of theirs -------------------------------------------------------------------------------------

PILLOW: dict[int, Resample] = {1: "lanczos", 2: "bilinear", 3: "bicubic"}


def read_sight(config: Mapping[str, Any], said: Mapping[str, Any], token: str) -> SightConfig:
    """How a family looks, from its `config.json` and `preprocessor_config.json`. Raises BadInput for what it cannot.

    `token` is the text of the id that the configuration gives to pictures.
    """
    try:
        return looking(config, said, token)
    except BadInput:
        raise
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        fault = f"{type(error).__name__}: {str(error)[:120]}"
        raise BadInput(f"preprocessor_config.json holds what cannot be read ({fault}): download it again") from error


def looking(config: Mapping[str, Any], said: Mapping[str, Any], token: str) -> SightConfig:
    family, vision = config["model_type"], config["vision_config"]
    for step in ("do_resize", "do_rescale", "do_normalize"):
        if not said.get(step, True):
            raise BadInput(f"{family}: preprocessor_config.json says {step}=false: pictures are always brought to size")
    match family:
        case "smolvlm" | "idefics3":
            usual, looks = (HALF, HALF, 1), read_smolvlm(config, said)
        case "qwen3_vl" | "qwen3_vl_moe":
            usual, looks = (CLIP_MEAN, CLIP_STD, 3), read_qwen(vision, said)
        case _:
            usual, looks = (CLIP_MEAN, CLIP_STD, 3), read_llava(config, said)
    mean, std = (said.get(key) or silent for key, silent in zip(("image_mean", "image_std"), usual, strict=False))
    resample = PILLOW.get(said.get("resample", usual[2]))
    if resample is None:
        raise BadInput(f"{family}: resample={said.get('resample')!r} cannot be done here; 1, 2 and 3 of Pillow can")
    means, stds = (tuple(float(x) for x in each) for each in (mean, std))
    if len(means) != 3 or len(stds) != 3:
        raise BadInput(f"{family}: image_mean and image_std must have three values each")
    return replace(looks, patch=int(vision["patch_size"]), mean=means, std=stds, resample=resample, token=token)


HALF = (0.5, 0.5, 0.5)


def read_llava(config: Mapping[str, Any], said: Mapping[str, Any]) -> SightConfig:
    family, side = config["model_type"], int(config["vision_config"]["image_size"])
    one_size(family, side, [*lengths(said.get("size")), *lengths(said.get("crop_size"))])
    if family == "llava_next":
        shapes = tuple((int(h), int(w)) for h, w in said.get("image_grid_pinpoints") or config["image_grid_pinpoints"])
        if any(h % side or w % side for h, w in shapes):
            raise BadInput(f"{family}: image_grid_pinpoints must be multiples of {side} pixels")
        return SightConfig(AnyShape(shapes), side, side)
    middle = said.get("do_center_crop", True) and "height" not in keys(said.get("size"))
    return SightConfig(Crop() if middle else Resize(), side, side)


def read_smolvlm(config: Mapping[str, Any], said: Mapping[str, Any]) -> SightConfig:
    side = int(config["vision_config"]["image_size"])
    one_size(config["model_type"], side, (said.get("max_image_size") or {}).values())
    longest = int((said.get("size") or {}).get("longest_edge", 4 * side))
    layout = Split(longest) if said.get("do_image_splitting", True) else Resize()
    around = ("<fake_token_around_image>", "<global-img>")
    return SightConfig(layout, side, side, merge=int(config.get("scale_factor", 2)), around=around)


def read_qwen(vision: Mapping[str, Any], said: Mapping[str, Any]) -> SightConfig:
    size, merge = said.get("size") or {}, int(vision.get("spatial_merge_size", 2))
    smallest = said.get("min_pixels") or size.get("shortest_edge", 56 * 56)
    largest = said.get("max_pixels") or size.get("longest_edge", 28 * 28 * 1280)
    side = int(vision["patch_size"]) * merge
    frames = int(vision.get("temporal_patch_size", 2))
    return SightConfig(Native(int(smallest), int(largest)), side, side, merge=merge, frames=frames)


def lengths(size: Any) -> list[Any]:
    """The sides that a size gives: one number in old files, a number by name in new ones."""
    return [] if size is None else list(size.values()) if isinstance(size, Mapping) else [size]


def keys(size: Any) -> Iterable[str]:
    return size if isinstance(size, Mapping) else ()


def one_size(family: str, side: int, asked: Iterable[Any]) -> None:
    if odd := {int(length) for length in asked} - {side}:
        raise BadInput(f"{family}: pictures of {max(odd)} pixels for a tower of {side}: name one size")
