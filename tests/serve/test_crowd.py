"""A crowd counts what the server counts, times what was waited, and tells apart what went wrong."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest

from litchi.cli import find_checkpoint, main
from litchi.config import BadInput
from litchi.serve.crowd import Plan, Spread, Visit, crowd, percentiles, read_bodies, report, said, visit
from litchi.serve.loading import load_engine
from litchi.serve.run import ServeConfig

KEY = "open sesame"


@pytest.fixture(scope="module")
def tiny(served_by) -> Iterator[object]:
    with served_by(load_engine(find_checkpoint("tiny"), ServeConfig()), api_key=KEY) as served:
        yield served


def counted(served, name: str) -> int:
    told = httpx.get(f"{served.url}/metrics", headers={"Authorization": f"Bearer {KEY}"}).text
    return sum(int(line.split()[1]) for line in told.splitlines() if line.startswith(f"litchi_{name}_tokens_total "))


@pytest.mark.parametrize("rate", [0.0, 40.0])
def test_the_crowd_counts_the_tokens_that_the_server_counts(tiny, rate: float) -> None:
    before = [counted(tiny, name) for name in ("prompt", "generated")]
    found = crowd(Plan(url=tiny.url, key=KEY, requests=12, concurrency=5, rate=rate, max_tokens=6, prompt_tokens=30))
    read, made = (counted(tiny, name) - was for name, was in zip(("prompt", "generated"), before, strict=True))
    assert found.counted and found.answered == found.requests == 12 and not found.errors
    [(probe_read, probe_made)] = [(read - found.prompt_tokens, made - found.tokens)]
    assert 0 < found.tokens <= 12 * 6 and probe_made in (0, 1) and probe_read > 0, (
        "all but the first visit's, of 1 token"
    )
    assert 12 * 15 < found.prompt_tokens < 12 * 60, "about as long as was asked"
    assert found.tokens_per_second == pytest.approx(found.tokens / found.seconds)


def test_what_is_waited_is_what_the_server_takes(serve, painter) -> None:
    with serve(painter(pause=0.02)) as served:
        found = crowd(Plan(url=f"{served.url}/v1/", requests=6, concurrency=1))
    pauses = len("I see no picture in turn 1 .".split())
    assert found.tokens == 6 * pauses
    assert found.first["p50"].value >= 0.02 and 0.02 * pauses <= found.whole["p50"].value <= found.seconds
    for spread in (found.first, found.between, found.per_token, found.whole):
        assert (
            spread["p50"].low <= spread["p50"].value <= spread["p50"].high
            and spread["p50"].value <= spread["p99"].value
        )


def test_every_wait_is_measured_from_the_moment_before_it(monkeypatch) -> None:
    """By a clock that the server winds: three words after 5, 1 and 3 seconds, and the end 2 seconds later."""
    now = [100.0]
    monkeypatch.setattr("litchi.serve.crowd.time", SimpleNamespace(perf_counter=lambda: now[0]))
    word = json.dumps({"choices": [{"delta": {"content": "a"}}]})
    usage = json.dumps({"usage": {"prompt_tokens": 7, "completion_tokens": 3}, "choices": []})

    class Wound:
        status_code = 200

        @asynccontextmanager
        async def stream(self, *_: object, **__: object) -> AsyncIterator[Wound]:
            yield self

        async def aiter_lines(self) -> AsyncIterator[str]:
            for pause, data in ((5, word), (1, word), (3, word), (0, usage), (2, "[DONE]")):
                now[0] += pause
                yield f"data: {data}"

    made = asyncio.run(visit(Wound(), {}, 0.0, httpx))
    assert (made.pieces, made.total, made.tokens, made.error) == ([5, 6, 9], 11, 3, "")
    found = report(Plan(), "m", [made], 11.0)
    told = (found.first, found.between, found.per_token, found.whole)
    assert [each["p50"].value for each in told] == [5, 2, 2, 11] and found.between["p99"].value > 2.9


def test_who_comes_while_others_are_answered_is_timed_from_when_he_came(serve, painter) -> None:
    with serve(painter(pause=0.005)) as served:
        rushed = crowd(Plan(url=served.url, requests=12, rate=1000.0)).whole["p99"].value
        made = asyncio.run(late_by(5.0, served.url))
    assert rushed > 0.3, "this server answers one at a time, and takes 40 ms for each of the twelve"
    assert made.pieces[0] > 5 and made.total > 5, "a crowd that is late itself does not spare the server"


async def late_by(seconds: float, url: str) -> Visit:
    async with httpx.AsyncClient(base_url=f"{url}/v1") as client:
        return await visit(client, said("a") | {"stream": True}, 0.0, httpx, seconds)


def test_who_is_turned_away_is_counted_by_kind(serve, painter) -> None:
    with serve(painter(pause=0.01), max_queue=1) as served:
        found = crowd(Plan(url=served.url, requests=30, concurrency=8))
    assert found.errors["HTTP 429"] + found.answered == 30 and found.answered >= 2
    assert found.tokens == 8 * found.answered


def test_a_fault_in_the_middle_of_a_stream_is_an_error(serve, painter) -> None:
    class Falling(painter):
        def _chat(self, request, images, last):
            for count, delta in enumerate(super()._chat(request, images, last)):
                if count == 2 and request.params.max_tokens > 1:
                    raise RuntimeError
                yield delta

    with serve(Falling()) as served:
        found = crowd(Plan(url=served.url, requests=3))
    assert found.errors == {"an error in the stream (server_error)": 3} and found.whole["p50"] is None


def test_visits_that_agree_leave_no_doubt_and_those_that_do_not_leave_some() -> None:
    assert percentiles([[2.0], [], [2.0, 2.0]])["p99"] == Spread(2.0, 2.0, 2.0)
    doubt = percentiles([[float(n)] for n in range(20)])["p50"]
    assert doubt.low < doubt.value < doubt.high
    assert percentiles([[]]) == {"p50": None, "p99": None}


def test_questions_of_a_file_are_asked_in_turn(serve, tmp_path: Path, capsys) -> None:
    file, out = tmp_path / "asked.jsonl", tmp_path / "rows.jsonl"
    file.write_text('{"prompt": "one", "max_tokens": 3}\n\n{"messages": [{"role": "user", "content": "two"}]}\n')
    with serve() as served:
        asked = ["bench", "serve", "--url", served.url, "--requests", "4", "--concurrency", "1", "--prompts", str(file)]
        assert main([*asked, "--out", str(out), "--json", "--key", "secret"]) == 0
        texts = [request.parts[-1].text for request in served.sampler.requests[1:]]
        assert main([*asked, "--seed", "1"]) == 0
    assert texts == ["one", "two", "one", "two"]
    row = json.loads(out.read_text())
    said = capsys.readouterr().out
    assert said.startswith(json.dumps(row)) and row["tokens"] == 2 * (3 + 8) and "secret" not in said
    assert "4 of 4 answered" in said and "22 tokens" in said


def test_what_cannot_be_asked_is_said_in_one_line(serve, tmp_path: Path, capsys) -> None:
    with serve(api_key="k") as served:
        with pytest.raises(BadInput, match="401"):
            crowd(Plan(url=served.url))
        with pytest.raises(BadInput, match="HTTP 404"):
            crowd(Plan(url=served.url, key="k", model="another"))
    assert main(["bench", "serve", "--url", served.url]) == 2 and main(["bench", "serve", "--requests", "0"]) == 2
    for text in ("", "[]", '{"prompt": 3}', '{"max_tokens": 3}', "{"):
        (tmp_path / "bad.jsonl").write_text(text)
        with pytest.raises(BadInput, match=r"bad\.jsonl"):
            read_bodies(tmp_path / "bad.jsonl")
    assert all(len(line) < 300 for line in capsys.readouterr().err.splitlines())
