"""Attacks by pictures and their addresses: nothing is fetched, and what is unpacked is counted and measured before.

Each test is an attack that works on a server written without it in mind; docs/security.md names them one by one.
"""

from __future__ import annotations

import base64
import io
import json
import socket
import struct
import zlib

import numpy as np
import pytest
from PIL import Image as Pillow

from litchi.schema.sample import Image, Role, Text
from litchi.serve.prefix import PageKeys
from tests.laws.documents import processor
from tests.serve.test_attacks import is_well, world_of
from tests.serve.test_attacks_in_bodies import SAID, ask, within, working


def shows(*urls: str) -> dict:
    return {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": u}} for u in urls]}]}


def url_of(raw: bytes, kind: str = "png") -> str:
    return f"data:image/{kind};base64,{base64.b64encode(raw).decode()}"


def saved(picture: Pillow.Image, kind: str, **more: object) -> bytes:
    out = io.BytesIO()
    picture.save(out, kind, **more)
    return out.getvalue()


# ---- addresses ----------------------------------------------------------------------------------------------------


def test_no_address_is_fetched_and_no_file_read(door) -> None:
    """A trap listens on loopback; whoever follows one of the addresses connects to it."""
    with socket.create_server(("127.0.0.1", 0)) as trap:
        trap.setblocking(False)
        port = trap.getsockname()[1]
        hosts = [f"127.0.0.1:{port}", f"localhost:{port}", f"0x7f000001:{port}", f"2130706433:{port}", f"[::1]:{port}"]
        hosts += [f"example.com@127.0.0.1:{port}", f"127.0.0.1:{port}\\@example.com", f"127.0.0.1.nip.io:{port}"]
        urls = [f"{kind}://{host}/a.png" for host in hosts for kind in ("http", "https", "HTTP")]
        urls += ["http://169.254.169.254/latest/meta-data", "file:///etc/passwd", "FILE:/etc/passwd", "/etc/passwd"]
        urls += ["../../etc/passwd", f"ftp://{hosts[0]}/a", f"gopher://{hosts[0]}/a", f" http://{hosts[0]}/a.png"]
        urls += [f"//{hosts[0]}/a.png", f"http:{hosts[0]}/a.png", f"data:,http://{hosts[0]}/a", f"s3://{hosts[0]}/a"]
        urls += [f"data:image/png;base64,x;url=http://{hosts[0]}/a", f"\x00http://{hosts[0]}/", "blob:x", "id:1", ""]
        for url in urls:
            assert ask(door.url, shows(url))[0] == 400, url
        piece = {"type": "image_url", "image_url": {"url": urls[0]}}
        assert ask(door.url, {"want": "frame", "parts": [piece]}, "/v1/next")[0] == 400
        item = {"role": "user", "content": [{"type": "input_image", "image_url": urls[0]}]}
        assert ask(door.url, {"input": [item]}, "/v1/responses")[0] == 400
        assert ask(door.url, {"messages": SAID, "guided_json": {"$ref": urls[0]}})[0] == 400
        with world_of(door.url) as world:
            world.send(json.dumps({"type": "start", "image": urls[0]}))
            assert json.loads(world.recv(timeout=60))["type"] == "error"
        svg = f'<svg xmlns="http://www.w3.org/2000/svg"><image href="{urls[0]}"/></svg>'.encode()
        assert ask(door.url, shows(url_of(svg, "svg+xml")))[0] == 400
        with pytest.raises(BlockingIOError):
            trap.accept()


# ---- pictures -----------------------------------------------------------------------------------------------------


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, rows: bytes, *more: bytes, depth: int = 8, colour: int = 2) -> bytes:
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(more) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def test_pictures_that_promise_more_than_they_hold_are_refused_unread(door) -> None:
    rows = zlib.compress(bytes(99))
    for width, height in (
        (60_000, 60_000),
        (2**31 - 1, 2**31 - 1),
        (2**31 - 1, 1),
        (1 << 25, 1),
        (0, 0),
        (2**32 - 1, 1),
    ):
        with within(100 << 20):
            assert ask(door.url, shows(url_of(png(width, height, rows))))[0] in (400, 413), (width, height)
    for kind, at in (("GIF", 6), ("BMP", 18)):
        raw = bytearray(saved(Pillow.new("P", (8, 8)), kind))
        raw[at : at + 4] = b"\xff\xff\xff\xff"
        assert ask(door.url, shows(url_of(bytes(raw))))[0] in (400, 413)


def test_a_few_bytes_that_unpack_to_gigabytes_are_not_unpacked(door) -> None:
    zeros = zlib.compressobj(9)
    bomb = b"".join(zeros.compress(bytes(1 << 20)) for _ in range(400)) + zeros.flush()
    note, profile = chunk(b"zTXt", b"a\0\0" + bomb), chunk(b"iCCP", b"a\0\0" + bomb)
    for more in ([note], [profile], [chunk(b"iTXt", b"a\0\1\0\0\0" + bomb)], [note] * 4):
        with within(150 << 20):
            assert ask(door.url, shows(url_of(png(8, 8, zlib.compress(bytes(8 * 25)), *more))))[0] in (200, 400)
    with within(150 << 20):
        assert ask(door.url, shows(url_of(png(8, 8, bomb))))[0] in (200, 400)
    assert is_well(door.url)


def test_pictures_are_counted_before_they_are_decoded(door) -> None:
    """Four thousand files of two kilobytes, each of sixteen million pixels, fit into one body."""
    raw = png(4096, 4096, zlib.compress(bytes(4096 * 513), 9), depth=1, colour=0)
    one = url_of(raw)
    many = min(4000, (15 << 20) // (len(one) + 60))
    assert many > 1000
    turns = [shows(one)["messages"][0]] * many
    piece = {"type": "image_url", "image_url": {"url": one}}
    item = {"role": "user", "content": [{"type": "input_image", "image_url": one}] * many}
    with working(8):
        with within(300 << 20):
            assert ask(door.url, shows(*[one] * many))[0] == 400
        assert ask(door.url, {"messages": turns})[0] == 400
        assert ask(door.url, {"want": "frame", "parts": [piece] * many}, "/v1/next")[0] == 400
        assert ask(door.url, {"input": [item]}, "/v1/responses")[0] == 400


def test_a_jpeg_of_endless_passes_is_refused(door) -> None:
    """Each pass of thirty bytes goes over sixteen million pixels again."""
    raw = saved(Pillow.new("L", (4000, 4000), 90), "JPEG", progressive=True)
    assert ask(door.url, shows(url_of(raw, "jpeg")))[0] == 200
    at = raw.rindex(b"\xff\xda")
    assert ask(door.url, shows(url_of(raw[:at] + raw[at:-2] * 20_000 + b"\xff\xd9", "jpeg")))[0] == 413


def test_of_a_film_only_the_first_frame_is_decoded(door) -> None:
    frames = [Pillow.new("L", (1200, 1200), shade * 9) for shade in range(20)]
    for kind in ("GIF", "WEBP", "PNG"):
        raw = saved(
            frames[0], kind, save_all=True, append_images=frames[1:], **({"method": 0} if kind == "WEBP" else {})
        )
        with working(3):
            assert ask(door.url, shows(url_of(raw)))[0] == 200, kind


def test_only_four_formats_reach_a_decoder(door) -> None:
    kinds = "JPEG2000 TIFF BMP ICO PPM TGA DDS PCX SGI SPIDER MSP XBM PDF EPS AVIF".split()
    tried = 0
    for kind in kinds:
        mode = {"SPIDER": "F", "MSP": "1", "XBM": "1"}.get(kind, "RGB")
        try:
            raw = saved(Pillow.new(mode, (16, 16)), kind)
        except (OSError, KeyError):
            continue  # this build of Pillow does not write it
        tried += 1
        for said in ("png", kind.lower()):
            assert ask(door.url, shows(url_of(raw, said)))[0] == 400, kind
    assert tried > 8


def test_broken_pictures_tell_nothing_of_the_decoder(door) -> None:
    whole = {kind: saved(Pillow.new("RGB", (40, 40), "red"), kind) for kind in ("PNG", "JPEG", "GIF", "WEBP")}
    rng = np.random.default_rng(0)
    for raw in whole.values():
        for _ in range(25):
            broken = bytearray(raw[: rng.integers(4, len(raw) + 1)])
            for place in rng.integers(4, len(broken), 6) if len(broken) > 4 else ():
                broken[place] = rng.integers(256)
            assert ask(door.url, shows(url_of(bytes(broken))))[0] in (200, 400, 413)


def test_a_picture_over_the_limit_is_refused_before_it_is_decoded(door) -> None:
    assert ask(door.url, shows("data:image/png;base64," + "A" * (12 << 20)))[0] == 413
    assert ask(door.url, shows("data:image/png;base64," + "A" * (17 << 20)))[0] == 413
    assert ask(door.url, shows("data:" + ";a=b" * 2_000_000 + ",x"))[0] == 400
    assert ask(door.url, shows("data:image/png" + ";" * 3_000_000))[0] == 400


def test_pictures_of_the_same_bytes_in_another_shape_share_no_memory() -> None:
    """A key that hashes bytes alone answers one client with what another has shown."""
    p, pixels, keys = processor(), np.arange(8 * 16 * 3, dtype=np.uint8), set()
    for shape in ((8, 16, 3), (16, 8, 3)):
        builder = p.prompt((Image(pixels=pixels.reshape(shape), role=Role.USER), Text(text="a " * 30, role=Role.USER)))
        keys.add(PageKeys(8, "w").upto(builder, 16, len(builder.tokens))[-1])
    assert len(keys) == 2
