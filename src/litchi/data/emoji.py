"""Emoji as questions about pictures: what is it, which of four is it, of what kind, and of what colour is most of it.

The pictures are Noto Emoji at 64x64 on white, as the npm package emoji-datasource-google 16.0.0 has them, with its
`emoji.json`. Left out are flags, skin tones and signs that are letters or digits. A name of the test split is never
seen in training, so naming it freely asks for what nobody taught, while choosing among four names is fair: chance is
0.25. Kind and colour generalise; always the commonest of train is right for 0.256 and 0.22 of the test (seed 0).
"""

from __future__ import annotations

import json
import re
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import Bool, UInt8
from PIL import Image as Picture
from PIL import UnidentifiedImageError

from litchi.config import BadInput
from litchi.data.ticket import SPLITS, Split
from litchi.data.words import pick
from litchi.schema.sample import Image, Role, Sample, Text

Form = Literal["choice", "name", "category", "colour"]
FORMS: tuple[Form, ...] = ("choice", "name", "category", "colour")

OPTIONS = 4
HELD_OUT = 5
"""One group of emoji in so many is for the test."""

LEFT_OUT = ("Component", "Flags", "keycap", "alphanum")
"""Categories and subcategories."""

CATEGORIES = {
    "Activities": "activities",
    "Animals & Nature": "animals and nature",
    "Food & Drink": "food and drink",
    "Objects": "objects",
    "People & Body": "people and body",
    "Smileys & Emotion": "smileys and emotion",
    "Symbols": "symbols",
    "Travel & Places": "travel and places",
}

WORDS: dict[Form, tuple[str, ...]] = {
    "choice": (
        "Which of these does the picture show: {}?",
        "What is in the picture: {}?",
        "Is this {}?",
    ),
    "name": ("What is this?", "What does the picture show?", "Name what you see."),
    "category": ("Which kind is it: {}?", "To which of these does the picture belong: {}?"),
    "colour": ("What is the main colour?", "Which colour is most of it?", "Of what colour is it mostly?"),
}


@dataclass(frozen=True, slots=True)
class Emoji:
    """One picture and what it is called. Emoji of one `group` are never on both sides of the split."""

    key: str
    name: str
    category: str
    group: str
    colour: str | None
    """The main colour; None where no colour covers half of it."""
    pixels: UInt8[np.ndarray, "h w 3"]


# ---- questions ----------------------------------------------------------------------------------------------------


def emoji_samples(emoji: Sequence[Emoji], form: Form, split: Split, *, seed: int = 0, rounds: int = 1) -> list[Sample]:
    """One question of a form about each emoji of a split, asked `rounds` times in other words and with other names.

    Samples are dialogues of one turn: `meta["turns"]` is what `eval.tasks.talk` reads. The names that a choice offers
    are of one category, one split and four groups; each of the four places holds the answer equally often.
    """
    chosen = [e for e in emoji if split_of(e, seed) == split and (form != "colour" or e.colour)]
    rng = np.random.default_rng([seed, SPLITS.index(split), FORMS.index(form)])
    samples = []
    for number in range(rounds):
        places = rng.permutation(np.arange(len(chosen)) % OPTIONS)
        for e, place in zip(chosen, places, strict=True):
            options = choices(e, chosen, int(place), rng) if form == "choice" else ()
            samples.append(asked(e, form, options, f"emoji-{form}-{split}-{seed}-{e.key}-{number}", rng))
    return samples


def split_of(emoji: Emoji, seed: int = 0) -> Split:
    return "test" if zlib.crc32(f"{seed}/{emoji.group}".encode()) % HELD_OUT == 0 else "train"


def choices(emoji: Emoji, chosen: Sequence[Emoji], place: int, rng: np.random.Generator) -> tuple[str, ...]:
    """Four names with the true one at `place`. Raises BadInput where a category has too few."""
    others: dict[str, str] = {}
    for i in rng.permutation(len(chosen)):
        other = chosen[i]
        if other.category == emoji.category and other.group != emoji.group:
            others.setdefault(other.group, other.name)
        if len(others) == OPTIONS - 1:
            names = list(others.values())
            return (*names[:place], emoji.name, *names[place:])
    raise BadInput(f"{emoji.category!r} has fewer than {OPTIONS} groups of emoji in this split: give all emoji")


def asked(emoji: Emoji, form: Form, options: Sequence[str], key: str, rng: np.random.Generator) -> Sample:
    answer = {"category": emoji.category, "colour": emoji.colour}.get(form, emoji.name)
    assert answer is not None
    shown = options if form == "choice" else tuple(CATEGORIES.values())
    question = pick(rng, WORDS[form]).format(either(shown))
    parts = (
        Image(pixels=emoji.pixels, role=Role.USER),
        Text(text=question, role=Role.USER),
        Text(text=answer, role=Role.ASSISTANT, weight=1.0),
    )
    turn = {"kind": form, "question": question, "answer": answer}
    return Sample(parts, key, "emoji", {"turns": [turn], "options": list(options), "group": emoji.group})


def either(names: Sequence[str]) -> str:
    """ "a, b, c or d"."""
    return f"{', '.join(names[:-1])} or {names[-1]}"


# ---- files --------------------------------------------------------------------------------------------------------


def read_emoji(folder: Path) -> list[Emoji]:
    """Every emoji of a folder that holds `emoji.json` and `images64.zip`. Raises BadInput for what is not there."""
    entries = [entry for entry in read_json(folder / "emoji.json") if wanted(entry)]
    pictures = read_pictures(folder / "images64.zip", [f"64/{entry['image']}" for entry in entries])
    flat = [on_white(rgba) for rgba in pictures]
    groups = group([entry["unified"] for entry in entries], [plain_name(entry) for entry in entries], flat)
    return [
        Emoji(
            key=entry["short_name"],
            name=plain_name(entry),
            category=CATEGORIES[entry["category"]],
            group=entries[first]["short_name"],
            colour=main_colour(rgba),
            pixels=pixels,
        )
        for entry, rgba, pixels, first in zip(entries, pictures, flat, groups, strict=True)
    ]


def read_json(path: Path) -> list[dict]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise BadInput(f"{path} is missing: take it from the npm package emoji-datasource-google") from error
    except ValueError as error:
        raise BadInput(f"{path} is no JSON ({error}): take it from emoji-datasource-google again") from error


def read_pictures(path: Path, names: Sequence[str]) -> list[UInt8[np.ndarray, "h w 4"]]:
    try:
        with zipfile.ZipFile(path) as archive:
            return [np.array(Picture.open(BytesIO(archive.read(name))).convert("RGBA")) for name in names]
    except (OSError, KeyError, zipfile.BadZipFile, UnidentifiedImageError) as error:
        mend = "zip package/img/google/64 of the npm package emoji-datasource-google as 64/"
        raise BadInput(f"{path} cannot be read ({error}): {mend}") from error


def wanted(entry: Mapping) -> bool:
    return not {entry["category"], entry["subcategory"]} & set(LEFT_OUT)


def plain_name(entry: Mapping) -> str:
    """The first short name that is a word, without the number that tells it from a namesake: "tiger2" is a tiger."""
    names = [name for name in entry["short_names"] if re.search(r"[a-z]{2}", name)]
    words = re.split(r"[ _-]+", names[0] if names else entry["name"].lower())
    while len(words) > 1 and words[-1].isdigit():
        words.pop()
    return " ".join([*words[:-1], re.sub(r"(?<=[a-z])\d+$", "", words[-1])])


def on_white(rgba: UInt8[np.ndarray, "h w 4"]) -> UInt8[np.ndarray, "h w 3"]:
    share = rgba[..., 3:].astype(np.float32) / 255
    return (rgba[..., :3] * share + 255 * (1 - share)).round().astype(np.uint8)


# ---- which are trivially the same ---------------------------------------------------------------------------------

PEOPLE = {"1F468", "1F469", "1F9D1", "1F466", "1F467", "1F9D2"}
BESIDE = {"2640", "2642", "27A1", "200D", "FE0F"}
"""Code points of men, women, persons and children, and those that give a sex or a direction, or join the others."""

NEAR = 10.0
"""Root mean square of the difference of two pictures, of 255, at 16x16. Below it lie a figure and its mirror image, the
same trade of a man and of a person, and hands of a clock; above it, the first things that are not of one kind."""


def group(codes: Sequence[str], names: Sequence[str], pictures: Sequence[np.ndarray]) -> list[int]:
    """For each emoji the first of those that it must share a split with: by name, by code points, or by sight."""
    first = list(range(len(codes)))

    def root(i: int) -> int:
        while first[i] != i:
            i = first[i]
        return i

    def join(i: int, j: int) -> None:
        low, high = sorted((root(i), root(j)))
        first[high] = low

    seen: dict[object, int] = {}
    for i, (code, name) in enumerate(zip(codes, names, strict=True)):
        join(i, seen.setdefault(name, i))
        join(i, seen.setdefault(shown_in(code), i))
    for i, j in np.argwhere(distances(pictures) < NEAR):
        join(int(i), int(j))
    return [root(i) for i in range(len(codes))]


def shown_in(code: str) -> frozenset[str]:
    """What is shown whoever does it: a man and a woman who run are one, families are one."""
    points = frozenset(code.split("-"))
    return points - PEOPLE - BESIDE or (frozenset({"people"}) if points & PEOPLE else points)


def distances(pictures: Sequence[np.ndarray]) -> np.ndarray:
    """The distance of every two pictures, or of one and the other's mirror image where that is nearer."""
    small = [np.array(Picture.fromarray(p).resize((16, 16), Picture.Resampling.BOX), np.float32) for p in pictures]
    rows = np.stack(small)
    plain, turned = rows.reshape(len(rows), -1), rows[:, :, ::-1].reshape(len(rows), -1)
    squares = (plain**2).sum(1)
    nearest = squares[:, None] + squares - 2 * np.maximum(plain @ plain.T, plain @ turned.T)
    return np.sqrt(np.maximum(nearest, 0) / plain.shape[1])


# ---- colour -------------------------------------------------------------------------------------------------------

HUES = ((15, "red"), (38, "orange"), (66, "yellow"), (170, "green"), (255, "blue"), (295, "purple"), (345, "pink"))
"""Where on the circle of 360 degrees a hue ends; beyond the last is red again."""


def main_colour(rgba: UInt8[np.ndarray, "h w 4"]) -> str | None:
    """The colour of at least half of what is not transparent."""
    solid = rgba[rgba[..., 3] >= 128][:, :3]
    found, counts = np.unique(colours(solid), return_counts=True)
    return str(found[counts.argmax()]) if len(solid) and counts.max() * 2 >= len(solid) else None


def colours(rgb: UInt8[np.ndarray, "n 3"]) -> np.ndarray:
    """The name of each pixel's colour, by hue, saturation and value."""
    hsv = np.array(Picture.fromarray(rgb[None]).convert("HSV"))[0].astype(np.float32) if len(rgb) else np.zeros((0, 3))
    hue, saturation, value = hsv[:, 0] * 360 / 255, hsv[:, 1] / 255, hsv[:, 2] / 255
    names = np.full(len(rgb), "red", dtype="<U6")
    for end, name in reversed(HUES):
        names[hue < end] = name
    where: dict[str, Bool[np.ndarray, "n"]] = {
        "brown": (names == "orange") & (value < 0.7),
        "pink": (names == "red") & (saturation < 0.5) & (value > 0.8),
        "grey": saturation < 0.15,
        "white": (saturation < 0.15) & (value > 0.85),
        "black": value < 0.25,
    }
    for name, mask in where.items():
        names[mask] = name
    return names
