"""The chat and drawing endpoints are OpenAI's, as OpenAI's own client sees them, and no input makes a 5xx."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import re
import socket
import struct
import threading
import zlib
from contextlib import ExitStack, suppress
from urllib.parse import urlsplit

import httpx
import numpy as np
import pytest
from PIL import Image as Pillow

from litchi.schema.request import DRAWING, Request
from litchi.schema.sample import Role, Text
from litchi.serve.solo import Solo
from litchi.serve.worker import Job, Worker

openai = pytest.importorskip("openai")


def png(pixels: np.ndarray) -> bytes:
    out = io.BytesIO()
    Pillow.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


def url_of(raw: bytes, kind: str = "png") -> str:
    return f"data:image/{kind};base64,{base64.b64encode(raw).decode()}"


BLUE = url_of(png(np.full((64, 64, 3), (0, 0, 250), np.uint8)))


def user(text: str, *pictures: str) -> dict:
    content = [{"type": "image_url", "image_url": {"url": url}} for url in pictures]
    return {"role": "user", "content": [*content, {"type": "text", "text": text}]}


@pytest.fixture
def client(door):
    with openai.OpenAI(base_url=f"{door.url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture
def post(door):
    def send(body: object, path: str = "/v1/chat/completions", **more: object) -> httpx.Response:
        return httpx.post(door.url + path, json=body, timeout=20, **more)

    return send


def test_the_model_is_listed(client):
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError, match="this server has 'tiny'"):
        client.models.retrieve("gpt-4o")


def test_a_picture_is_seen(client):
    answer = client.chat.completions.create(model="tiny", messages=[user("What is it?", BLUE)])
    assert answer.choices[0].message.content.strip() == "I see mostly blue in turn 1 ."
    assert answer.choices[0].finish_reason == "stop"
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (2, 8, 10)


def test_a_stream_says_what_the_whole_answer_says(client):
    asked = {"model": "tiny", "messages": [user("What is it?", BLUE)]}
    whole = client.chat.completions.create(**asked).choices[0].message.content
    chunks = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == whole
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "stop"
    assert chunks[-1].usage.completion_tokens == 8


def test_a_stream_ends_with_done(post):
    answer = post({"messages": [user("hi")], "stream": True})
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.text.endswith("data: [DONE]\n\n")


def test_a_conversation_has_turns(client):
    said = [user("What is it?", BLUE), {"role": "assistant", "content": "Blue."}, {"role": "user", "content": "Sure?"}]
    answer = client.chat.completions.create(model="tiny", messages=said)
    assert "in turn 2" in answer.choices[0].message.content


def test_limits_and_stops_reach_the_model(client):
    asked = {"model": "tiny", "messages": [user("What is it?", BLUE)]}
    for name in ("max_tokens", "max_completion_tokens"):
        short = client.chat.completions.create(**asked, **{name: 3}).choices[0]
        assert (short.message.content, short.finish_reason) == ("I see mostly ", "length")
    stopped = client.chat.completions.create(**asked, stop=["turn"])
    assert stopped.choices[0].message.content == "I see mostly blue in "


def test_logprobs_belong_to_tokens(client):
    asked = {"model": "tiny", "messages": [user("What?", BLUE)], "logprobs": True}
    rows = client.chat.completions.create(**asked).choices[0].logprobs.content
    assert [row.token for row in rows][:2] == ["I ", "see "] and rows[0].logprob == -0.25
    streamed = [c.choices[0].logprobs for c in client.chat.completions.create(**asked, stream=True)]
    assert [row.token for each in streamed if each for row in each.content] == [row.token for row in rows]


def test_several_answers_count_seeds_up(client, door):
    answer = client.chat.completions.create(model="tiny", messages=[user("hi")], n=3, seed=7, temperature=1)
    assert len(answer.choices) == 3
    assert [r.params.seed for r in door.sampler.requests[-3:]] == [7, 8, 9]


def test_the_seed_is_told(post, door):
    body = post({"messages": [user("hi")], "temperature": 1}).json()
    assert body["seed"] == door.sampler.requests[-1].params.seed


def test_a_drawn_picture_comes_with_the_text(client):
    answer = client.chat.completions.create(model="tiny", messages=[user("Please draw something red", BLUE)])
    content = answer.choices[0].message.content
    assert [part["type"] for part in content] == ["text", "image_url"]
    drawn = answer.choices[0].message.images[0]["image_url"]["url"]
    assert drawn == content[1]["image_url"]["url"]
    assert pixels_of(drawn.partition(",")[2])[5, 5].tolist() == [255, 0, 0]
    chunks = client.chat.completions.create(model="tiny", messages=[user("draw red", BLUE)], stream=True)
    pictures = [c.choices[0].delta.images for c in chunks if getattr(c.choices[0].delta, "images", None)]
    assert len(pictures) == 1


def pixels_of(encoded: str) -> np.ndarray:
    return np.array(Pillow.open(io.BytesIO(base64.b64decode(encoded))))


def test_images_are_generated(client):
    made = client.images.generate(model="tiny", prompt="a green room", n=2, size="64x64", response_format="b64_json")
    assert len(made.data) == 2
    picture = pixels_of(made.data[0].b64_json)
    assert picture.shape == (64, 64, 3) and picture[9, 9].tolist() == [0, 255, 0]
    assert made.data[0].revised_prompt == "All of one colour."


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP"])
def test_any_size_and_format_is_read_and_resizing_is_told(post, kind):
    out = io.BytesIO()
    Pillow.new("RGB", (300, 200), (250, 0, 0)).save(out, kind)
    body = post({"messages": [user("What?", url_of(out.getvalue(), kind.lower()))]}).json()
    assert "mostly red" in body["choices"][0]["message"]["content"]
    assert "resized from 300x200 to 64x64" in body["notes"][0]


def test_an_enlarged_tile_world_is_read_exactly(post, door):
    small = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    post({"messages": [user("What?", url_of(png(small.repeat(4, 0).repeat(4, 1))))]})
    assert np.array_equal(door.sampler.requests[-1].parts[0].pixels, small)


def bomb(side: int) -> bytes:
    """A PNG whose header promises side x side pixels in a few bytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 99)) + chunk(b"IEND", b"")
    )


def ask(**changes: object) -> dict:
    return {"model": "tiny", "messages": [user("hi", BLUE)]} | changes


BAD = {
    "not an object": ([1, 2], 400, "JSON object"),
    "unknown model": (ask(model="gpt-4o"), 404, "'tiny'"),
    "model of a wrong type": (ask(model=7), 400, "model must be a string"),
    "no messages": ({"model": "tiny"}, 400, "messages"),
    "empty messages": (ask(messages=[]), 400, "messages"),
    "messages of a wrong type": (ask(messages="hi"), 400, "messages must be a list"),
    "message of a wrong type": (ask(messages=["hi"]), 400, r"messages\[0\] must be an object"),
    "unknown role": (ask(messages=[{"role": "robot", "content": "hi"}]), 400, r"messages\[0\].role"),
    "no content": (ask(messages=[{"role": "user"}]), 400, "content"),
    "unknown content": (ask(messages=[{"role": "user", "content": [{"type": "input_audio"}]}]), 400, "'image_url'"),
    "nothing to answer": (ask(messages=[{"role": "assistant", "content": "hi"}]), 400, "last message"),
    "half a character": (ask(messages=[{"role": "user", "content": "\ud800"}]), 400, "surrogate"),
    "misspelt": (ask(max_token=3), 400, "did you mean 'max_tokens'"),
    "too many tokens": (ask(max_tokens=1025), 400, "from 1 to 1024"),
    "no tokens": (ask(max_tokens=0), 400, "from 1 to 1024"),
    "tokens in words": (ask(max_tokens="ten"), 400, "max_tokens must be an integer"),
    "tokens yes": (ask(max_tokens=True), 400, "max_tokens must be an integer"),
    "hot": (ask(temperature=3), 400, "from 0 to 2"),
    "a very large number": (ask(temperature=10**400), 400, "temperature"),
    "top_p": (ask(top_p=0), 400, "top_p"),
    "nine answers": (ask(n=9), 400, "from 1 to 8"),
    "negative seed": (ask(seed=-1), 400, "seed"),
    "five stops": (ask(stop=["a"] * 5), 400, "stop"),
    "stop of numbers": (ask(stop=[1]), 400, "stop"),
    "tools": (ask(tools=[{"type": "function"}]), 400, r"tools\[0\].name is missing"),
    "stream in words": (ask(stream="yes"), 400, "true or false"),
    "an address": (ask(messages=[user("hi", "https://example.com/a.png")]), 400, "not fetched"),
    "a file": (ask(messages=[user("hi", "file:///etc/passwd")]), 400, "not fetched"),
    "not a URL": (ask(messages=[user("hi", "cat")]), 400, "data URL"),
    "URL of a wrong type": (ask(messages=[user("hi", 7)]), 400, "url must be a string"),  # type: ignore[arg-type]
    "not base64": (ask(messages=[user("hi", "data:image/png;base64,****")]), 400, "base64"),
    "not a picture": (ask(messages=[user("hi", url_of(b"GIF89a but not really"))]), 400, "not a picture"),
    "a broken picture": (ask(messages=[user("hi", url_of(bomb(64)))]), 400, "not a picture"),
    "too many pixels": (ask(messages=[user("hi", url_of(bomb(5000)))]), 413, "send a smaller one"),
    "a bomb": (ask(messages=[user("hi", url_of(bomb(60_000)))]), 413, "pixels"),
    "too many pictures": (ask(messages=[user("hi", *[BLUE] * 9)]), 400, "at most 8 pictures"),
    "too much text": (ask(messages=[user("a" * 40_000)]), 400, "shorten"),
    "what the model refuses": (ask(messages=[user("this is too long")]), 400, "drop the oldest"),
    "what the model refuses, streamed": (ask(messages=[user("this is too long")], stream=True), 400, "drop the oldest"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_answered_with_its_mend(post, name):
    body, status, message = BAD[name]
    answer = post(None, content=json.dumps(body)) if "character" in name else post(body)
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) >= {"message", "type", "code"} and error["type"] == "invalid_request_error"
    assert re.search(message, error["message"]), error["message"]


@pytest.mark.parametrize(
    "raw", [b"", b"{", b"\xff\xfe", b'{"a": NaN}', b"[" * 100_000, b"null", b'{"seed": ' + b"9" * 5000 + b"}"]
)
def test_bytes_that_are_not_json_are_refused(door, raw):
    answer = httpx.post(f"{door.url}/v1/chat/completions", content=raw)
    assert answer.status_code == 400 and "JSON" in answer.json()["error"]["message"]


def test_words_are_greedy_and_drawings_sampled_unless_told(serve, painter):
    """The likeliest tile at any one place is a bare floor, so that a greedy room would be empty."""
    behind = painter()
    with serve(behind) as served:
        httpx.post(f"{served.url}/v1/chat/completions", json={"messages": [user("hi")]})
        for more in ({}, {"temperature": 0.5}):
            httpx.post(f"{served.url}/v1/images/generations", json={"prompt": "a red room", **more})
    assert [request.params.temperature for request in behind.requests] == [0.0, DRAWING.temperature, 0.5]


BAD_DRAWINGS = [{}, {"prompt": 3}, {"prompt": "x", "size": "1024x1024"}, {"prompt": "x", "n": 0}]
BAD_DRAWINGS += [{"prompt": "x", "response_format": "url"}, {"prompt": "x", "pormpt": "y"}]


@pytest.mark.parametrize("body", BAD_DRAWINGS)
def test_bad_drawings_are_refused(post, body):
    answer = post(body, "/v1/images/generations")
    assert answer.status_code == 400 and answer.json()["error"]["code"] == "bad_input"


@pytest.mark.parametrize(
    "path", ["/v1/rooms", "/v1/rooms?seed=x", "/v1/rooms?seed=-1", "/v1/rooms?seed=1&env=os:path-v0"]
)
def test_bad_rooms_are_refused(door, path):
    answer = httpx.get(door.url + path)
    assert answer.status_code == 400 and answer.json()["error"]["message"]


def test_unknown_endpoints_and_methods_are_told_apart(door):
    assert httpx.get(f"{door.url}/v1/nothing").status_code == 404
    assert httpx.get(f"{door.url}/v1/chat/completions").status_code == 405
    assert "error" in httpx.get(f"{door.url}/v1/nothing").json()


def test_a_body_over_the_limit_is_refused_declared_or_not(serve):
    with serve(max_body_bytes=10_000) as served:
        address = f"{served.url}/v1/chat/completions"
        for content in (b" " * 20_000, (b" " * 5000 for _ in range(4))):
            answer = httpx.post(address, content=content)
            assert answer.status_code == 413 and "10000 bytes" in answer.json()["error"]["message"]


def test_a_fault_of_ours_is_one_sentence(post):
    answer = post({"messages": [user("please explode")]})
    assert answer.status_code == 500
    assert "ladder" not in answer.text and answer.json()["error"]["code"] == "server_error"
    assert post({"messages": [user("hi")]}).status_code == 200


def test_leaving_stops_the_work(serve, painter):
    slow = painter(pause=0.01)
    with serve(slow) as served, httpx.Client(base_url=served.url) as client:
        body = {"messages": [user("go on forever")], "stream": True, "max_tokens": 1024}
        with client.stream("POST", "/v1/chat/completions", json=body) as answer:
            next(answer.iter_lines())
        assert slow.closed.wait(30), "the sampler went on after its client had left"
        assert slow.made < 1000
        assert client.post("/v1/chat/completions", json={"messages": [user("hi")]}).status_code == 200


def test_a_full_queue_says_when_to_come_again(serve, painter):
    held = painter()
    held.gate.clear()
    with (
        serve(held, max_queue=1) as served,
        httpx.Client(base_url=served.url, timeout=20) as client,
        ExitStack() as asked,
    ):
        queue = lambda: client.get("/health").json()["queue"]  # noqa: E731
        asked.enter_context(leave_waiting(served.url))
        wait_for(lambda: queue()["running"] == 1)  # only then is it certain which of the two will wait
        second = asked.enter_context(leave_waiting(served.url))
        wait_for(lambda: queue() == {"running": 1, "waiting": 1, "max_waiting": 1, "answered": 0})
        refused = client.post("/v1/chat/completions", json={"messages": [user("hi")]})
        assert refused.status_code == 429 and int(refused.headers["retry-after"]) >= 1
        assert refused.json()["error"]["code"] == "queue_full"
        second.close()  # whoever leaves the queue frees the place
        wait_for(lambda: queue()["waiting"] == 0)
        held.gate.set()
        assert client.post("/v1/chat/completions", json={"messages": [user("hi")]}).status_code == 200


@pytest.mark.parametrize("text", ["hi", "explode"])
def test_a_place_is_free_before_its_client_is_told_the_end(painter, monkeypatch, text):
    """Else who asks one question after another is turned away by his own last one."""
    told: list[int] = []
    worker = Worker(Solo(painter()), max_queue=0)
    put = Job.put

    def heard(job: Job, piece: object) -> None:
        if not isinstance(piece, tuple):  # but the end, or what went wrong
            told.append(worker.load().running)
        put(job, piece)

    async def ask() -> None:
        async for _ in worker.submit([Request(parts=(Text(text=text, role=Role.USER),))], stream=True):
            pass

    monkeypatch.setattr(Job, "put", heard)
    worker.start()
    try:
        with suppress(RuntimeError):
            asyncio.run(ask())
    finally:
        worker.close()
    assert told and not any(told)


def leave_waiting(url: str) -> socket.socket:
    """Ask, and do not wait for the answer."""
    at = urlsplit(url)
    body = json.dumps({"messages": [user("hi")]}).encode()
    asked = socket.create_connection((at.hostname, at.port))
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {at.netloc}\r\nContent-Length: {len(body)}\r\n\r\n"
    asked.sendall(head.encode() + body)
    return asked


def wait_for(condition) -> None:
    """Until another thread's state is as expected; the event only paces the looking."""
    pace = threading.Event()
    for _ in range(3000):
        if condition():
            return
        pace.wait(0.01)
    raise AssertionError("it did not come about within thirty seconds")


def test_a_key_is_asked_for_but_not_by_the_page(serve):
    with serve(api_key="clé secrète") as served:
        address = f"{served.url}/v1/models"
        assert httpx.get(address).status_code == 401
        assert httpx.get(address, headers={"Authorization": "Bearer wrong"}).status_code == 401
        right = {"Authorization": "Bearer clé secrète".encode()}
        assert httpx.get(address, headers=right).status_code == 200
        assert httpx.get(f"{served.url}/").status_code == 200


def test_other_pages_may_not_use_a_visitors_loopback(door):
    stranger = {"Origin": "https://evil.example"}
    assert httpx.get(f"{door.url}/v1/models", headers=stranger).status_code == 403
    assert httpx.get(f"{door.url}/v1/models", headers={"Origin": door.url}).status_code == 200
    assert httpx.get(f"{door.url}/v1/models", headers={"Host": "evil.example"}).status_code == 403


def test_many_at_once_get_their_own_answers(door):
    colours = [("red", (250, 0, 0)), ("green", (0, 250, 0)), ("blue", (0, 0, 250))] * 4
    said: dict[int, str] = {}

    def one(i: int) -> None:
        picture = url_of(png(np.full((64, 64, 3), colours[i][1], np.uint8)))
        answer = httpx.post(f"{door.url}/v1/chat/completions", json={"messages": [user("hi", picture)]}, timeout=20)
        said[i] = answer.json()["choices"][0]["message"]["content"]

    threads = [threading.Thread(target=one, args=(i,)) for i in range(len(colours))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(f"mostly {colours[i][0]}" in said[i] for i in range(len(colours)))
