"""Films and pictures by address, for those who mean well: what reaches the model is what was sent."""

from __future__ import annotations

import io
from pathlib import Path

import httpx
import numpy as np
import pytest
from PIL import Image as Pillow

from litchi.client import HttpSampler
from litchi.config import BadInput
from litchi.data.ticket import Ticket
from litchi.data.watch import watch
from litchi.schema.request import Request, SamplingParams
from litchi.schema.sample import Image, Role, Text, Video
from litchi.serve.fetch import Fetcher
from litchi.serve.films import unrolled
from litchi.serve.unroll import Wanted, chosen
from tests.serve.test_attacks import CHAT
from tests.serve.test_attacks_by_addresses import NAME, fetching, host, names, picture, says  # noqa: F401 (fixtures)
from tests.serve.test_attacks_by_films import movie, plays
from tests.serve.test_attacks_by_pictures import shows, url_of

TINY = Path(__file__).parents[2] / "checkpoints" / "tiny"


def noise(count: int, size: int = 64) -> list[np.ndarray]:
    return list(np.random.default_rng(0).integers(0, 255, (count, size, size, 3), np.uint8))


def played(frames: list[np.ndarray], kind: str = "PNG", ms: int = 1000, **more: object) -> bytes:
    out, pictures = io.BytesIO(), [Pillow.fromarray(frame) for frame in frames]
    pictures[0].save(out, kind, save_all=True, append_images=pictures[1:], duration=ms, **more)
    return out.getvalue()


def wanted(side: int = 64, most: int = 32, even: bool = True) -> Wanted:
    return Wanted(side=side, most=most, max_pixels=16 << 20, even=even)


# ---- films ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "more"), [("PNG", {}), ("WEBP", {"lossless": True})])
def test_frames_come_to_a_model_that_watches_as_they_were_even_where_writers_joined_them(door, kind, more) -> None:
    """Every writer joins frames that are alike; that nothing happened is what a film may tell."""
    a, b, c, d = noise(4)
    frames = [a, a, b, c, c, c, d, d]
    raw = played(frames, kind, **more)
    answer = httpx.post(door.url + CHAT, json=plays(url_of(raw)))
    assert answer.status_code == 200 and "notes" not in answer.json()
    [film] = door.sampler.requests[-1].parts
    assert isinstance(film, Video) and film.role is Role.USER and film.fps == 1.0
    assert np.array_equal(film.frames, np.stack(frames))


@pytest.mark.parametrize(("fps", "order"), [(1.0, "aabbbc"), (10.0, "aabb"), (24.0, "aaaa"), (30.0, "a")])
def test_our_client_sends_a_film_without_loss_even_where_nothing_happens(door, fps: float, order: str) -> None:
    frames = dict(zip("abc", noise(3), strict=True))
    film = Video(frames=np.stack([frames[name] for name in order]), fps=fps, role=Role.USER)
    HttpSampler(door.url).complete(Request(parts=(film, Text(text="what?", role=Role.USER))))
    arrived = door.sampler.requests[-1].parts[0]
    assert np.array_equal(arrived.frames, film.frames)
    assert len(order) == 1 or arrived.fps == pytest.approx(fps, rel=0.03)


def test_of_a_long_film_frames_are_chosen_evenly_in_time() -> None:
    assert chosen([1.0] * 4, 8) == ([0, 1, 2, 3], 1.0)
    assert chosen([0.1, 0.3], 8)[0] == [0, 1, 1, 1]
    order, fps = chosen([0.5] * 100, 5)
    assert order == [10, 30, 50, 70, 90] and fps == pytest.approx(0.1)
    assert chosen([9.0, 0.001, 9.0], 3)[0] == [0, 1, 2]
    film = unrolled(played(noise(9, 16), ms=200), wanted(side=0, most=3), "film")
    assert np.array_equal(film.frames, np.stack(noise(9, 16)[1::3])) and film.fps == pytest.approx(5 / 3)
    assert film.note == "film: 3 of its 9 frames are shown"


def test_a_model_that_only_sees_is_shown_frames_as_pictures(serve) -> None:
    frames = noise(9)
    film = plays(url_of(played(frames)))
    film["messages"][0]["content"] += shows(url_of(picture()))["messages"][0]["content"]
    with serve(abilities=("see",), max_images=4) as served:
        answer = httpx.post(served.url + CHAT, json=film)
        *shown, last = served.sampler.requests[-1].parts
    assert all(isinstance(part, Image) for part in shown) and len(shown) == 3 and last.pixels[0, 0, 0] == 255
    assert all(np.array_equal(part.pixels, frames[index]) for part, index in zip(shown, (1, 4, 7), strict=True))
    assert answer.json()["notes"] == ["messages[0].content[0].video_url.url: 3 of its 9 frames are shown"]
    with serve(abilities=()) as served:
        answer = httpx.post(served.url + CHAT, json=film)
        assert answer.status_code == 400 and "neither watches films nor sees" in answer.json()["error"]["message"]


@pytest.mark.parametrize(("kind", "codec"), [("mp4", "libx264"), ("mp4", "mpeg4"), ("webm", "libvpx-vp9")])
def test_movies_are_unrolled_by_the_extra(kind: str, codec: str) -> None:
    raw = movie(kind, codec, 5, (96, 64))
    film = unrolled(raw, wanted(side=0), "film")
    assert film.frames.shape == (5, 64, 96, 3) and film.fps == pytest.approx(10) and not film.note
    assert np.abs(film.frames[..., 0].mean((1, 2)) - np.arange(5) * 40).max() < 8
    assert "resized from 96x64 to 32x32" in unrolled(raw, wanted(side=32), "film").note


def test_a_movie_stands_as_its_telephone_was_held() -> None:
    """The matrix in the track's head turns every frame by a quarter, clockwise where b is 1."""
    pytest.importorskip("av")
    picture = Pillow.new("RGB", (96, 64))
    picture.paste((255, 255, 255), (0, 0, 48, 64))  # the left half, which comes to stand above
    raw = bytearray(movie("mp4", "libx264", 2, (96, 64), picture))
    at = raw.index(b"tkhd") + 4 + 40
    one = (1 << 16).to_bytes(4, "big")
    assert raw[at : at + 4] == one
    raw[at : at + 20] = bytes(4) + one + bytes(4) + (2**32 - (1 << 16)).to_bytes(4, "big") + bytes(4)
    frames = unrolled(bytes(raw), wanted(side=0), "film").frames
    assert frames.shape == (2, 96, 64, 3) and frames[:, :40].min() > 200 and frames[:, 56:].max() < 50


def test_a_movie_without_the_extra_names_it(monkeypatch) -> None:
    from litchi.serve import unroll

    def absent(extra: str, module: str) -> None:
        raise BadInput(f"{module} needs the extra {extra!r}")

    monkeypatch.setattr(unroll, "need", absent)
    with pytest.raises(BadInput, match="'films'"):
        unroll.unroll(b"\0\0\0\x18ftypmp42", wanted())


def test_the_tiny_model_watches_a_film_through_the_door_and_says_what_happened(served_folder) -> None:
    """The answer has the bits of the sampler that is given the frames, and tells the film's actions."""
    pytest.importorskip("minigrid")
    sample = watch(Ticket("watch", "test", 3))
    film, question, *_ = sample.parts
    body = plays(url_of(played(list(film.frames))))
    body["messages"][0]["content"].append({"type": "text", "text": question.text})
    with served_folder(TINY) as served:
        answer = httpx.post(served.url + CHAT, json=body | {"max_tokens": 96}, timeout=60)
        again = httpx.post(f"{served.url}/v1/receipts/{answer.json()['id']}/replay", timeout=60).json()
        params = SamplingParams(max_tokens=96)
        expected = served.sampler.complete(
            Request(parts=(film, Text(text=question.text, role=Role.USER)), params=params)
        )
    said = answer.json()["choices"][0]["message"]["content"]
    assert again["same"] is True, again
    assert said == expected.text and said == ", ".join(sample.meta["answer"])


# ---- addresses ------------------------------------------------------------------------------------------------------


def test_a_picture_and_a_film_are_fetched_from_a_listed_host(serve, host, names) -> None:  # noqa: F811
    host.paths["/film.png"] = says(played(noise(3)), "200 OK", "Content-Type: text/plain")
    chunks = b"".join(b"%x\r\n%s\r\n" % (len(p), p) for p in (picture()[:50], picture()[50:])) + b"0\r\n\r\n"
    host.paths["/chunks?a=1"] = lambda line: line.sendall(
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + chunks
    )
    with fetching(serve, host) as served:
        body = shows(host.url(), host.url("/chunks?a=1"))
        body["messages"][0]["content"] += plays(host.url("/film.png"))["messages"][0]["content"]
        assert httpx.post(served.url + CHAT, json=body).status_code == 200
        first, second, film = served.sampler.requests[-1].parts
        assert first.pixels.shape == (64, 64, 3) and np.array_equal(first.pixels, second.pixels)
        assert np.array_equal(film.frames, np.stack(noise(3)))
        item = {"role": "user", "content": [{"type": "input_image", "image_url": host.url()}]}
        assert httpx.post(f"{served.url}/v1/responses", json={"input": [item]}).status_code == 200
        assert np.array_equal(served.sampler.requests[-1].parts[0].pixels, first.pixels)


def test_a_list_of_hosts_that_cannot_be_meant_is_refused_at_the_start() -> None:
    for entry in ("", "https://", "a/b", "ftp://a", "user@a", "a:b", "*.a", "http://a/", "a b", "https://a?b"):
        with pytest.raises(BadInput, match="serve.fetch_hosts"):
            Fetcher([entry])
    hosts = Fetcher(
        ["Images.Example.com", "a:8443", "http://b", "https://[2001:db9::1]"], ["http://10.0.0.1:9000"]
    ).hosts
    assert {str(each) for each in hosts} == {
        "https://images.example.com:443", "https://a:8443", "http://b:80", "https://2001:db9::1:443",
        "http://10.0.0.1:9000",
    }  # fmt: skip
