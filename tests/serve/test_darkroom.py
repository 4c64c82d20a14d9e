"""Pictures come out of the darkroom bit for bit as they do without it, and one process makes many."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image as Pillow

from litchi.serve import darkroom
from litchi.serve.darkroom import Darkroom
from litchi.serve.run import ServeConfig, run
from tests.serve.test_attacks_by_pictures import saved


def outcome(decode: Callable, raw: bytes, side: int) -> object:
    try:
        pixels, size = decode(raw, side, 1 << 20)
        return pixels.tobytes(), pixels.shape, pixels.dtype, size
    except darkroom.BadInput as error:
        return type(error), str(error)


def test_a_child_decodes_to_the_same_bits_and_refuses_in_the_same_words() -> None:
    rng, room = np.random.default_rng(0), Darkroom(1 << 20)
    exif = Pillow.Exif()
    exif[0x0112] = 6  # turned by a quarter
    noise = Pillow.fromarray(rng.integers(0, 255, (37, 53, 4), np.uint8))
    files = [saved(noise.convert(mode), "PNG") for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")]
    files += [saved(noise.convert(mode), "JPEG", exif=exif) for mode in ("L", "RGB", "CMYK")]
    files += [saved(noise, "WEBP", exif=exif), saved(noise, "WEBP", lossless=True), saved(noise.convert("P"), "GIF")]
    files += [
        saved(noise, "PNG", exif=exif),
        saved(noise.convert("RGB"), "MPO", save_all=True, append_images=[noise.convert("RGB")]),
    ]
    files += [
        saved(noise.convert("P"), "PNG", transparency=bytes(range(256))),
        saved(Pillow.new("L", (2000, 600)), "PNG"),
    ]
    files += [b"", b"GIF89a", b"\xff\xd8" + b"\xff\xda" * 101, saved(Pillow.new("RGB", (9, 9)), "TIFF")]
    for raw in list(files):
        for _ in range(6 if len(raw) > 20 else 0):
            broken = bytearray(raw[: rng.integers(len(raw) // 2, len(raw) + 1)])
            for place in rng.integers(8, len(broken), rng.integers(0, 5)):
                broken[place] = rng.integers(256)
            files.append(bytes(broken))
    try:
        told = [
            [outcome(decode, raw, side) for raw in files for side in (0, 16)]
            for decode in (darkroom.decode, room.decode)
        ]
        assert told[0] == told[1]
        assert len({each[0] for each in told[0] if isinstance(each[0], type)}) == 2, "both errors were met"
    finally:
        room.close()


def test_one_child_serves_one_picture_after_another_until_its_life_is_over(monkeypatch) -> None:
    monkeypatch.setattr(darkroom, "LIFE", 3)
    raw, room, seen = saved(Pillow.new("RGB", (8, 8)), "PNG"), Darkroom(64), []
    try:
        for _ in range(6):
            room.decode(raw, 0, 64)
            seen.append(room.idle[0].process.pid)
        assert [len({*seen[:2]}), len({*seen[2:5]}), len({*seen})] == [1, 1, 3]
    finally:
        room.close()
    with pytest.raises(darkroom.BadInput, match="stopping"):
        room.decode(raw, 0, 64)


@pytest.mark.parametrize(("abilities", "warmed"), [((), 0), (("see",), 1), (("draw", "dream"), 1)])
def test_a_model_that_is_shown_no_pictures_has_nobody_wait_for_them(abilities, warmed, painter, monkeypatch) -> None:
    """At a start of two seconds another process is in the way."""
    asked: list[Darkroom] = []
    monkeypatch.setattr(Darkroom, "warm", lambda darkroom: asked.append(darkroom))
    monkeypatch.setattr("uvicorn.Server.run", lambda server, sockets: sockets[0].close())
    run(ServeConfig(abilities=abilities, port=0), painter(), lambda name, seed: None)
    assert len(asked) == warmed
