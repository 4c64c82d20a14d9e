"""A response can be made again from its id, to the bit, beside other requests, after a restart, and not by others."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import httpx
import numpy as np
import pytest

from litchi.cli import find_checkpoint
from litchi.config import BadInput
from litchi.schema.digest import told
from litchi.schema.request import Completion, Grammar, Request, SamplingParams, Scored
from litchi.schema.sample import Action, Image, Role, Text, Video
from litchi.serve import receipts
from litchi.serve.engine import Engine, EngineConfig
from litchi.serve.loading import load_engine
from litchi.serve.receipts import Origin, Receipt, Receipts, receipt_of, shown, written
from litchi.serve.run import ServeConfig
from tests.serve.test_chat import BLUE, leave_waiting, user
from tests.serve.test_engine_faults import Gate, until

HOT = {"temperature": 1.0, "max_tokens": 16}
SEE = {"messages": [user("what do you see", BLUE)], **HOT}
ROOM = [{"type": "image_url", "image_url": {"url": BLUE}}]
FORWARD = {"type": "action", "values": [[2]], "space": "minigrid"}
ASKED = {
    "two words": ("chat/completions", SEE | {"n": 2, "seed": 5}),
    "words with likelihoods": ("chat/completions", SEE | {"logprobs": True, "top_logprobs": 2}),
    "words as they come": ("chat/completions", SEE | {"n": 2, "stream": True}),
    "a text": ("completions", {"prompt": ["where is", "the red ball"], "logprobs": 1, "echo": True, **HOT}),
    "a text as it comes": ("completions", {"prompt": "where is", "logprobs": 2, "stream": True, **HOT}),
    "a reply": ("responses", {"input": "what do you see", "temperature": 1.0, "max_output_tokens": 16}),
    "a reply as it comes": ("responses", {"input": "hello", "stream": True, "max_output_tokens": 16}),
    "a picture": ("images/generations", {"prompt": "a red ball", "seed": 3, "temperature": 1.0}),
    "a frame": ("next", {"want": "frame", "parts": [*ROOM, FORWARD], "space": "minigrid", "temperature": 1.0}),
    "an action": (
        "next",
        {
            "want": "action",
            "parts": [{"type": "text", "text": "go to the red ball"}, *ROOM],
            "space": "minigrid",
            "temperature": 1.0,
        },
    ),
    "a vector": ("embeddings", {"input": "where is the red ball"}),
}


def engine_of(name: str = "", **settings: object) -> Engine:
    """What `litchi serve tiny` answers with, or the same under another name of its weights."""
    found = load_engine(find_checkpoint("tiny"), ServeConfig(engine=EngineConfig(**settings)))
    found.weights = name or found.weights
    return found


SMALL = {
    "as served": {"page": 32, "cache_tokens": 256},
    "float32": {"page": 16, "cache_tokens": 192, "path": "torch", "weights": "float32"},
}
"""Room for few documents, so that those that are asked at once take each other's pages. In float32 nothing is rounded
away: there an engine that is not exact fails here."""


@pytest.fixture(scope="module", params=SMALL)
def tiny(served_by, request) -> Iterator[str]:
    with served_by(engine_of(max_running=8, **SMALL[request.param])) as served:
        yield f"{served.url}/v1"


def ask(url: str, path: str, body: dict) -> str:
    """The id of the answer, which is whole."""
    answer = httpx.post(f"{url}/{path}", json=body, timeout=120)
    assert answer.status_code == 200, answer.text
    if not body.get("stream"):
        return answer.json()["id"]
    said = [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: {")]
    [name] = {each["id"] if "id" in each else each["response"]["id"] for each in said if {"id", "response"} & {*each}}
    return name


def replay(url: str, name: str) -> httpx.Response:
    return httpx.post(f"{url}/receipts/{name}/replay", timeout=120)


@contextmanager
def crowd(url: str) -> Iterator[None]:
    """Others ask all the while, of other lengths and kinds."""
    over = threading.Event()
    answered: list[int] = []

    def work(index: int) -> None:
        path, body = list(ASKED.values())[index % len(ASKED)]
        while not over.is_set():
            answered.append(httpx.post(f"{url}/{path}", json=body, timeout=120).status_code)

    threads = [threading.Thread(target=work, args=(index,)) for index in (0, 1, 3, 8)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        over.set()
        for thread in threads:
            thread.join()
    assert set(answered) == {200}


def test_whatever_was_answered_is_answered_again_beside_others(tiny: str) -> None:
    names = {kind: ask(tiny, path, body) for kind, (path, body) in ASKED.items()}
    with crowd(tiny):
        for kind, name in names.items():
            again = replay(tiny, name)
            assert again.status_code == 200, again.text
            assert again.json() == {"id": name, "object": "receipt.replay", "same": True, "differs": []}, kind


def test_a_receipt_says_what_was_asked_without_the_bytes_of_pictures(tiny: str) -> None:
    name = ask(tiny, "chat/completions", SEE | {"n": 2, "seed": 5})
    answer = httpx.get(f"{tiny}/receipts/{name}")
    told = answer.json()
    assert (told["id"], told["object"], told["model"]) == (name, "receipt", "tiny")
    assert told["origin"].pop("adapters") == {} and all(told["origin"].values())
    assert set(told["origin"]) == {"weights", "runner", "torch"}
    assert [request["params"]["seed"] for request in told["requests"]] == [5, 6]
    [picture, text] = told["requests"][0]["parts"]
    assert set(picture["pixels"]) == {"picture"} and text["text"] == "what do you see"
    assert all({"text", "tokens", "finish", "parts"} <= set(each) for each in told["answers"])
    assert "pictures" not in told and "iVBOR" not in answer.text, "no PNG"


def test_an_answer_that_differs_is_told_by_its_fields(served_by, tmp_path: Path) -> None:
    path = tmp_path / "receipts.jsonl"
    engine = engine_of()
    with served_by(engine, receipts=str(path)) as served:
        name = ask(f"{served.url}/v1", "chat/completions", SEE | {"n": 2, "logprobs": True})
    row = json.loads(path.read_text())
    row["answers"][1]["logprobs"] = row["answers"][1]["scored"] = "0" * 64
    path.write_text(json.dumps(row) + "\n")
    with served_by(engine_of(), receipts=str(path)) as served:
        told = replay(f"{served.url}/v1", name).json()
    assert (told["same"], told["differs"]) == (False, [{"index": 1, "fields": ["logprobs", "scored"]}])


OTHER_PROCESS = """
import sys
from litchi.cli import main
sys.exit(main(["serve", "tiny", "--set", "serve.port=0", "--set", f"serve.receipts={sys.argv[1]}"]))
"""


def test_a_receipt_outlives_the_server_and_replays_in_another_process(served_by, tmp_path: Path) -> None:
    path = tmp_path / "receipts.jsonl"
    with served_by(engine_of(), receipts=str(path)) as served:
        names = [ask(f"{served.url}/v1", *ASKED[kind]) for kind in ("two words", "a picture", "an action")]
        httpx.delete(f"{served.url}/v1/responses/{ask(f'{served.url}/v1', *ASKED['a reply'])}").raise_for_status()
    assert path.stat().st_mode & 0o077 == 0, "others on the machine cannot read what was asked"
    with path.open("ab") as file:
        file.write(b'{"id": "torn')  # as a kill leaves it
    command = [sys.executable, "-c", OTHER_PROCESS, str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            url = server.stdout.readline().split("API: ")[1].strip()
            httpx.get(f"{url}/models", timeout=120).raise_for_status()  # at once: it listens where it says so
            assert all(replay(url, name).json()["same"] for name in names)
            assert sum(json.loads(line).get("dropped", False) for line in path.read_text().splitlines()) == 1
        finally:
            server.terminate()


def test_other_weights_replay_nothing(served_by, tmp_path: Path) -> None:
    path = str(tmp_path / "receipts.jsonl")
    with served_by(engine_of(), receipts=path) as served:
        name = ask(f"{served.url}/v1", *ASKED["two words"])
    with served_by(engine_of(name="others"), receipts=path) as served:
        refused = replay(f"{served.url}/v1", name)
        assert refused.status_code == 409 and refused.json()["error"]["code"] == "other_origin"
        assert "weights" in refused.json()["error"]["message"] and "not others" in refused.json()["error"]["message"]
        assert httpx.get(f"{served.url}/v1/receipts/{name}").status_code == 200, "it can be read all the same"


@pytest.mark.parametrize("field", ["weights", "runner", "torch"])
def test_each_field_of_an_origin_tells_others(field: str) -> None:
    mine = Origin("a", "b", "c")
    assert mine.differs(mine) == []
    assert mine.differs(replace(mine, **{field: "x"})) == [f"{field} {getattr(mine, field)}, not x"]


def test_nothing_is_kept_of_who_says_so_or_leaves(served_by, painter) -> None:
    engine = engine_of()
    with served_by(engine, api_key="k") as served:
        with httpx.Client(base_url=served.url, headers={"Authorization": "Bearer k"}, timeout=120) as client:
            for path, body in ASKED.values():
                if not body.get("stream"):
                    name = client.post(f"/v1/{path}", json=body | {"store": False}).json()["id"]
                    lost = client.get(f"/v1/receipts/{name}")
                    assert lost.status_code == 404 and "store=false" in lost.json()["error"]["message"], path
            long, gate = {"prompt": "where", "stream": True, "ignore_eos": True, "max_tokens": 1024}, Gate(engine)
            gate.let(8)  # a chat would end with its turn
            with client.stream("POST", "/v1/completions", json=long) as answer:
                lines = answer.iter_lines()  # whose end is the connection's
                name = json.loads(next(lines)[6:])["id"]
                until(lambda: gate.held)
            until(lambda: engine.running[0].cancelled)
            gate.open.set()
            kept = client.post("/v1/chat/completions", json=SEE).json()["id"]
            assert client.get(f"/v1/receipts/{kept}").status_code == 200
            assert client.post(f"/v1/receipts/{name}/replay").status_code == 404, "the client left"
        for method, path in (("GET", kept), ("POST", f"{kept}/replay")):
            assert httpx.request(method, f"{served.url}/v1/receipts/{path}").status_code == 401
    with served_by(painter()) as served:
        name = ask(f"{served.url}/v1", *ASKED["two words"])
        refused = replay(f"{served.url}/v1", name)
        assert refused.status_code == 404 and "receipts need the engine" in refused.json()["error"]["message"]


def test_a_client_that_does_not_wait_leaves_no_receipt(served_by, tmp_path: Path) -> None:
    path = tmp_path / "receipts.jsonl"
    with served_by(engine_of(), receipts=str(path)) as served:
        gate = Gate(served.sampler)
        gate.open.clear()
        with leave_waiting(served.url):
            until(lambda: gate.held)
        until(lambda: served.sampler.running[0].cancelled)
        gate.open.set()
        name = ask(f"{served.url}/v1", *ASKED["a vector"])
    assert [json.loads(line)["id"] for line in path.read_text().splitlines()] == [name]


def test_an_engine_that_is_not_exact_promises_nothing() -> None:
    engine = engine_of(path="torch", exact=False)
    assert engine.weights and engine.origin is None


# ---- without a server -----------------------------------------------------------------------------------------------


def receipt(name: str, *parts: Text | Image | Video | Action, **params: object) -> Receipt:
    request = Request(parts=parts, params=SamplingParams(**params))
    answers = (told(Completion(parts=(), text=name, finish="stop", prompt_tokens=1, tokens=())),)
    origin = Origin("w", "r", "t")
    return Receipt(id=name, created=1, model="m", origin=origin, requests=(request,), answers=answers)


PIXELS = np.random.default_rng(0).integers(0, 256, (2, 5, 3, 3), np.uint8)
EVERYTHING = (
    Text(text='{"picture": "é\u2028"}', role=Role.USER),
    Image(pixels=PIXELS[0], role=Role.WORLD),
    Video(frames=PIXELS, fps=1 / 3),
    Action(values=np.array([[0.1, -0.0], [1e-30, 3.0]], np.float32), space="arm", hz=0.1),
)
PARAMS = {"temperature": 0.1, "logit_bias": ((3, -0.7),), "stop": ("a",), "grammar": Grammar("regex", "a+")}


def test_a_receipt_is_read_as_it_was_written() -> None:
    mine = receipt("a", *EVERYTHING, **PARAMS)
    text = written(mine)
    again = receipt_of(text)
    assert "\n" not in text and text.isascii() and written(again) == text
    for part, other in zip(mine.requests[0].parts, again.requests[0].parts, strict=True):
        for field in type(part).__slots__:
            here, there = getattr(part, field), getattr(other, field)
            assert type(here) is type(there) and np.array_equal(here, there)
            assert not isinstance(here, np.ndarray) or here.tobytes() == there.tobytes() and here.dtype == there.dtype
    assert replace(again.requests[0], parts=()) == replace(mine.requests[0], parts=())
    assert len(json.loads(text)["pictures"]) == 2, "a picture that comes twice is kept once"
    assert "pictures" not in shown(text)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"temperature":0.1', '"temperature":0.2'),
        ('"picture":"', '"picture":"0'),
        ('"seed":0', '"seeds":0'),
        ('"answers":[', '"answers":[{},'),
        ('"digests":', '"digest":'),
        ('"pictures":', '"picture":'),
    ],
)
def test_a_receipt_that_was_changed_is_not_replayed(old: str, new: str) -> None:
    text = written(receipt("a", *EVERYTHING, **PARAMS))
    assert old in text
    with pytest.raises(BadInput, match="delete its line"):
        receipt_of(text.replace(old, new))


ANSWER = Completion(
    parts=(Image(pixels=PIXELS[0]),),
    text="a",
    finish="stop",
    prompt_tokens=3,
    tokens=(1, 2),
    logprobs=(-0.5, -1.5),
    scored=(Scored(1, b"a", -0.5, top=(Scored(2, b"b", -0.7),)),),
    vector=(0.0,),
)
CHANGES = {
    "parts": (Image(pixels=PIXELS[0] ^ (np.arange(45).reshape(5, 3, 3) == 44)),),
    "text": "b",
    "finish": "length",
    "prompt_tokens": 4,
    "tokens": (1, 3),
    "logprobs": (-0.5, float(np.nextafter(-1.5, 0))),
    "scored": (Scored(1, b"a", -0.5, top=(Scored(2, b"c", -0.7),)),),
    "prompt": (Scored(1, b"a", None),),
    "vector": (-0.0,),
    "matched": 0,
    "ended": Scored(0, b"", -0.1),
}


@pytest.mark.parametrize("field", CHANGES)
def test_one_bit_of_one_field_is_seen_in_that_field(field: str) -> None:
    mine = replace(receipt("a"), answers=(told(ANSWER),))
    assert mine.differs((told(replace(ANSWER)),)) == []
    assert mine.differs((told(replace(ANSWER, **{field: CHANGES[field]})),)) == [{"index": 0, "fields": [field]}]
    assert set(CHANGES) == {name for name in Completion.__slots__}


def test_the_store_forgets_the_oldest_by_number_and_by_size() -> None:
    store = Receipts(most=3)
    for name in "abcd":
        store.keep(receipt(name))
    assert list(store.kept) == ["b", "c", "d"] and store.get("a") is None
    each = len(written(receipt("a")))
    small = Receipts(most_bytes=5 * each)
    for name in "abcdefgh":
        small.keep(receipt(name))
    assert list(small.kept) == ["d", "e", "f", "g", "h"]
    assert small.bytes == sum(map(len, small.kept.values())) <= small.most_bytes
    small.keep(receipt("i", Text(text="x" * 5 * each)))
    assert small.get("i") is None and small.get("d"), "one does not push out all others"
    small.drop("d")
    assert small.get("d") is None and small.bytes == 4 * each


def test_the_file_is_bounded_and_holds_what_is_remembered(tmp_path: Path) -> None:
    path, each = tmp_path / "r.jsonl", len(written(receipt("00")))
    store = Receipts(str(path), most_bytes=5 * each)
    for index in range(33):
        store.keep(receipt(f"{index:02}"))
        assert list(Receipts(str(path), most_bytes=5 * each).kept) == list(store.kept)
    store.drop("31")
    assert list(Receipts(str(path), most_bytes=5 * each).kept) == [n for n in store.kept if n != "31"]
    sizes = [file.stat().st_size for file in tmp_path.iterdir()]
    assert len(sizes) == 2 and max(sizes) <= 5 * each


def test_a_file_that_cannot_be_is_refused_at_the_start(tmp_path: Path) -> None:
    for path in (tmp_path / "nowhere" / "r.jsonl", tmp_path):
        with pytest.raises(BadInput, match="serve.receipts=.*: give a file"):
            Receipts(str(path))
    path = tmp_path / "r.jsonl"
    for line in ("[1]", "nothing", '{"name": 1}'):
        path.write_text(f'{{"id": "a"}}\n{line}\n')
        with pytest.raises(BadInput, match="r.jsonl:2.*delete the line"):
            Receipts(str(path))


def test_a_file_that_is_lost_costs_no_answer(tmp_path: Path, caplog) -> None:
    folder = tmp_path / "f"
    folder.mkdir()
    store = Receipts(str(folder / "r.jsonl"))
    (folder / "r.jsonl").unlink()
    folder.rmdir()
    store.keep(receipt("a"))
    assert store.get("a") and "could not be written" in caplog.text
    assert receipts.MAX_BYTES >= store.bytes
