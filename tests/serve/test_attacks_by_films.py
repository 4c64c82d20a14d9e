"""Attacks by films: what a few kilobytes unroll to is counted, measured and timed, in a child that may die of it.

Each test is an attack that works on a server written without it in mind; docs/security.md names them one by one.
"""

from __future__ import annotations

import io
import struct
import time

import numpy as np
import pytest
from PIL import Image as Pillow

from litchi.serve import films
from tests.serve.test_attacks import is_well
from tests.serve.test_attacks_by_pictures import chunk, saved, url_of
from tests.serve.test_attacks_in_bodies import ask, within, working


def plays(*urls: str) -> dict:
    return {"messages": [{"role": "user", "content": [{"type": "video_url", "video_url": {"url": u}} for u in urls]}]}


def gif(*frames: tuple[int, int]) -> bytes:
    """A GIF of 8 by 8 whose frames say that they are so large; each holds 64 pixels."""
    one = saved(Pillow.new("P", (8, 8)), "GIF")
    at = one.index(b",")
    said = [b"," + bytes(4) + struct.pack("<HH", *size) + one[at + 9 : -1] for size in frames]
    return one[:at] + b"".join(b"\x21\xf9\x04\x08\x0a\0\0\0" + each for each in said) + b";"


def animated(kind: str, count: int = 4, size: int = 32, **more: object) -> bytes:
    shades = [Pillow.new("RGB", (size, size), (9 * i % 256, i % 256, 0)) for i in range(count)]
    return saved(shades[0], kind, save_all=True, append_images=shades[1:], duration=100, **more)


def repeated(size: int, times: int) -> bytes:
    """A GIF that shows one square again and again."""
    one = saved(Pillow.new("P", (size, size)), "GIF")
    at = one.index(b",")
    return one[:at] + (b"\x21\xf9\x04\x08\x0a\0\0\0" + one[at:-1]) * times + b";"


def test_a_film_of_ten_thousand_frames_is_not_unrolled(door) -> None:
    """Half a kilobyte for a hundred frames, and each of sixteen million pixels if it likes."""
    tiny, wide = repeated(8, 10_000), repeated(4000, 40)
    apng = animated("PNG")
    at = apng.index(b"acTL") + 4
    promise = struct.pack(">II", 2**31 - 1, 0)
    endless = apng[: at - 8] + chunk(b"acTL", promise) + apng[at + 12 :]
    with within(100 << 20), working(20):
        assert ask(door.url, plays(url_of(endless, "gif")))[0] in (200, 400)
        status, told = ask(door.url, plays(url_of(tiny, "gif")))
        assert status == 400 and "frames or" in told, told
        status, told = ask(door.url, plays(url_of(wide, "gif")))
        assert status == 400 and "pixels in all" in told, told
    assert is_well(door.url)


def test_a_film_whose_frames_grow_is_refused_before_they_are_drawn(door) -> None:
    large = [(60_000, 60_000), (65_535, 65_535), (13_000, 13_000), (9_000, 9_000)]
    for sizes in [[(8, 8), each] for each in large] + [[large[1]]]:
        with within(100 << 20):
            status, told = ask(door.url, plays(url_of(gif(*sizes), "gif")))
        assert status == 400 and ("00 pixels" in told or "DecompressionBombError" in told), (sizes, told)


def webp(width: int, height: int, *chunks: bytes) -> bytes:
    size = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    body = b"WEBPVP8X" + struct.pack("<I", 10) + b"\x02\0\0\0" + size + b"".join(chunks)
    return b"RIFF" + struct.pack("<I", len(body)) + body


def test_a_canvas_of_webp_that_is_mostly_promise_is_refused(door) -> None:
    """One pixel on a canvas of 16 384 squared: a decoder lays the canvas out first, a gigabyte twice."""
    frame = saved(Pillow.new("RGB", (1, 1)), "WEBP", lossless=True)[12:]
    head = bytes(6) + bytes(6) + (100).to_bytes(3, "little") + b"\0"
    played = b"ANMF" + struct.pack("<I", len(head + frame)) + head + frame
    loop = b"ANIM" + struct.pack("<I", 6) + bytes(6)
    assert ask(door.url, plays(url_of(webp(64, 64, loop, played, played), "webp")))[0] == 200
    for width, height in ((16_384, 16_384), (16_384, 8_192), (1 << 24, 1), (5_000, 5_000)):
        with within(100 << 20):
            raw = webp(width, height, loop, played, played)
            assert ask(door.url, plays(url_of(raw, "webp")))[0] == 400, (width, height)
            shown = [{"type": "image_url", "image_url": {"url": url_of(raw, "webp")}}]
            status, told = ask(door.url, {"messages": [{"role": "user", "content": shown}]})
            assert status in (400, 413), told


def test_broken_films_tell_nothing_of_the_decoder(door) -> None:
    pytest.importorskip("av")
    rng = np.random.default_rng(0)
    whole = [animated(kind) for kind in ("GIF", "PNG", "WEBP")] + [movie("mp4", "libx264"), movie("webm", "libvpx")]
    for raw in whole:
        assert ask(door.url, plays(url_of(raw, "mp4")))[0] == 200
        cuts = [raw[: len(raw) // 2], raw[:-9], raw[:12]]
        for _ in range(2):
            broken = bytearray(raw)
            for place in rng.integers(12, len(broken), 9):
                broken[place] = rng.integers(256)
            cuts.append(bytes(broken))
        for cut in cuts[:: 1 if raw is whole[0] else 3]:
            assert ask(door.url, plays(url_of(cut, "mp4")))[0] in (200, 400)
    assert is_well(door.url)


def movie(
    kind: str, codec: str, frames: int = 5, size: tuple[int, int] = (64, 64), picture: Pillow.Image | None = None
) -> bytes:
    av = pytest.importorskip("av")
    out = io.BytesIO()
    with av.open(out, "w", format=kind) as container:
        stream = container.add_stream(codec, rate=10)
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        for shade in range(frames):
            shown = picture or Pillow.new("RGB", size, (shade * 40, 0, 0))
            for packet in stream.encode(av.VideoFrame.from_image(shown)):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    return out.getvalue()


def test_no_list_is_played_for_a_film(door, tmp_path) -> None:
    """FFmpeg reads lists that name files and addresses, and finds out by itself that something is one."""
    secret = tmp_path / "secret.gif"
    secret.write_bytes(animated("GIF"))
    lists = [f"#EXTM3U\n#EXTINF:1,\nfile://{secret}\n#EXT-X-ENDLIST\n", f"ffconcat version 1.0\nfile '{secret}'\n"]
    lists += [
        f'<?xml version="1.0"?><MPD><BaseURL>file://{secret}</BaseURL></MPD>',
        f"v=0\nc=IN IP4 127.0.0.1\n{secret}",
    ]
    head, webm = struct.pack(">I", 24) + b"ftypmp42" + bytes(12), b"\x1aE\xdf\xa3"
    for text in lists:
        for before in (head, webm):
            assert ask(door.url, plays(url_of(before + text.encode(), "mp4")))[0] == 400, text
    for url in (
        f"file://{secret}",
        str(secret),
        "concat:a|b",
        "subfile,,start,0,end,9,,:/etc/passwd",
        "http://127.1/a.mp4",
    ):
        assert ask(door.url, plays(url))[0] == 400, url
    pytest.importorskip("av")
    raw = movie("mp4", "libx264")
    at = raw.index(b"url ")
    assert raw[at - 8 : at - 4] == struct.pack(">I", 1), "one reference, to the file itself"
    away = raw[: at + 7] + b"\0" + raw[at + 8 :]  # elsewhere, and does not say where
    assert ask(door.url, plays(url_of(away, "mp4")))[0] in (200, 400)


def test_a_movie_that_grows_is_refused(door) -> None:
    """What the container says of its size and what the stream holds need not agree."""
    pytest.importorskip("av")
    small, large = movie("mp4", "libx264"), movie("mp4", "libx264", 2, (4608, 4096))
    with within(100 << 20):
        status, told = ask(door.url, plays(url_of(large, "mp4")))
    assert status == 400, told
    box = large.rindex(b"avc1") + 28  # width and height in the sample entry, behind it
    assert struct.unpack(">HH", large[box : box + 4]) == (4608, 4096)
    liar = large[:box] + struct.pack(">HH", 64, 64) + large[box + 4 :]
    with within(100 << 20):
        assert ask(door.url, plays(url_of(liar, "mp4")))[0] == 400
    box = small.rindex(b"avc1") + 28
    with within(100 << 20):
        raw = small[:box] + struct.pack(">HH", 65_535, 65_535) + small[box + 4 :]
        assert ask(door.url, plays(url_of(raw, "mp4")))[0] in (200, 400)


def test_films_are_counted_before_they_are_unrolled(serve) -> None:
    one = url_of(animated("GIF"), "gif")
    with serve() as served, working(2):
        assert ask(served.url, plays(*[one] * 5))[0] == 400
        assert ask(served.url, plays(*[one] * 1000))[0] == 400
    with serve(abilities=("see",), max_images=3) as served, working(1):
        assert ask(served.url, plays(*[one] * 4))[0] == 400


def test_a_decoder_that_hangs_swells_or_dies_takes_nobody_with_it(serve, monkeypatch) -> None:
    """What a fault in a decoder does; whoever comes meanwhile is told to come again."""
    one = plays(url_of(animated("GIF"), "gif"))
    start = "from litchi.serve import unroll; unroll.unroll = lambda *a: {}; unroll.main()"
    faults = {
        "hangs": "__import__('time').sleep(60)",
        "swells": "bytes(8 << 30)",
        "spins": "[None for _ in iter(int, 1)]",
        "dies": "__import__('os').kill(__import__('os').getpid(), 11)",
        "tells": "print('x' * (1 << 20), flush=True) or __import__('os')._exit(0)",
    }
    monkeypatch.setattr(films, "SECONDS", 1.0)
    with serve() as served:
        for kind, fault in faults.items():
            monkeypatch.setattr(films, "COMMAND", ["-c", start.format(fault)])
            with within(300 << 20):
                began = time.monotonic()
                assert ask(served.url, one)[0] == 400, kind
            assert time.monotonic() - began < 15 and is_well(served.url), kind
        monkeypatch.setattr(films, "WAIT", 0.2)
        for _ in range(films.MAX_AT_ONCE):
            films.PLACES.acquire()
        try:
            assert ask(served.url, one)[0] == 429
        finally:
            for _ in range(films.MAX_AT_ONCE):
                films.PLACES.release()


def test_a_decoder_knows_no_keys(monkeypatch) -> None:
    """Whoever takes it over reads its environment first."""
    monkeypatch.setenv("LITCHI_SECRET", "swordfish")
    told = "import os, json; print(json.dumps({'fault': ' '.join(os.environ) + ' '.join(os.environ.values())}))"
    monkeypatch.setattr(films, "COMMAND", ["-c", told])
    with pytest.raises(films.BadInput) as error:
        films.unrolled(b"", films.Wanted(side=8, most=1, max_pixels=64, even=True), "url")
    assert "PATH" in str(error.value) and "swordfish" not in str(error.value) and "LITCHI" not in str(error.value)


def test_a_decoder_of_films_that_was_taken_over_opens_no_file_and_no_socket(monkeypatch) -> None:
    """Of those that Pillow reads."""
    for attempt in ("open('/etc/passwd')", "__import__('socket').socket()", "__import__('os').pipe()"):
        code = f"def taken(*a):\n try: told = {attempt}\n except OSError as e: told = e.strerror\n"
        code += " raise unroll.BadInput(str(told))\n"
        start = f"from litchi.serve import unroll\n{code}unroll.unroll = taken\nunroll.main()"
        monkeypatch.setattr(films, "COMMAND", ["-c", start])
        with pytest.raises(films.BadInput, match="Too many open files"):
            films.unrolled(animated("GIF"), films.Wanted(side=8, most=1, max_pixels=64, even=True), "url")
