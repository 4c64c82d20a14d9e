"""Prometheus reads what was asked and answered, and nothing that a stranger typed."""

from __future__ import annotations

import re

import httpx
from hypothesis import given, settings
from hypothesis import strategies as st

from litchi.serve.metrics import SECONDS, Histogram, Metrics, histogram

LINE = re.compile(r'(# TYPE \w+ (counter|gauge|histogram)|\w+(\{\w+="[^"\n]*"(,\w+="[^"\n]*")*\})? -?[0-9.e+-]+)')


def values(text: str) -> dict[str, float]:
    lines = text.splitlines()
    assert all(LINE.fullmatch(line) for line in lines), text
    return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines if not line.startswith("#")}


def test_requests_tokens_and_refusals_are_counted(serve) -> None:
    said = {"messages": [{"role": "user", "content": "hi"}]}
    with serve() as served, httpx.Client(base_url=served.url, timeout=20) as client:
        assert client.post("/v1/chat/completions", json=said).status_code == 200
        assert client.post("/v1/chat/completions", json=said | {"stream": True}).status_code == 200
        assert client.post("/v1/chat/completions", json={}).status_code == 400
        assert client.get('/v1/"nothing"').status_code == 404
        answer = client.get("/metrics")
        assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
        told = values(answer.text)
    assert told['litchi_requests_total{path="/v1/chat/completions",status="200"}'] == 2
    assert told['litchi_requests_total{path="/v1/chat/completions",status="400"}'] == 1
    assert told['litchi_requests_total{path="other",status="404"}'] == 1
    assert told['litchi_answers_total{finish="stop"}'] == 2
    assert told["litchi_generated_tokens_total"] == 2 * len("I see no picture in turn 1 .".split())
    assert told["litchi_time_to_first_token_seconds_count"] == 1
    assert told["litchi_queue_running"] == 0 and told["litchi_worker_alive"] == 1


def test_what_the_guard_refuses_is_counted(serve) -> None:
    with serve(api_key="k") as served:
        httpx.get(f"{served.url}/v1/models")
        told = values(httpx.get(f"{served.url}/metrics", headers={"Authorization": "Bearer k"}).text)
    assert told['litchi_requests_total{path="other",status="401"}'] == 1


@settings(max_examples=50, derandomize=True)
@given(st.lists(st.floats(0, 200)))
def test_a_bucket_counts_all_up_to_its_bound(seen: list[float]) -> None:
    measured = Histogram()
    for each in seen:
        measured.observe(each)
    told = values("\n".join(histogram("x", measured)))
    for bound in SECONDS:
        assert told[f'x_bucket{{le="{bound:g}"}}'] == sum(each <= bound for each in seen)
    assert told['x_bucket{le="+Inf"}'] == told["x_count"] == len(seen)


def test_an_empty_page_is_a_page() -> None:
    assert values(Metrics().text({}))["litchi_requests_running"] == 0
