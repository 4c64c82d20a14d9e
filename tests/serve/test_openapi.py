"""What the door says of itself names every endpoint, and every parameter that is read there."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from litchi.serve.fields import Fields
from litchi.serve.openapi import openapi
from litchi.serve.run import ServeConfig, uvicorn_config

BODIES = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "a"}]},
    "/v1/completions": {"prompt": "a"},
    "/v1/responses": {"input": "a"},
    "/v1/embeddings": {"input": "a"},
    "/v1/images/generations": {"prompt": "red"},
    "/v1/next": {"want": "action", "parts": [{"type": "text", "text": "a"}]},
    "/tokenize": {"prompt": "a"},
    "/detokenize": {"tokens": [1]},
    "/v1/weights": {"checkpoint": "a"},
}


@pytest.fixture(scope="module")
def open_door(served_by) -> Iterator[object]:
    with served_by(api_key="k", checkpoints=("b",)) as served:
        yield served


def test_every_endpoint_is_described(painter, white_tile) -> None:
    app = uvicorn_config(ServeConfig(port=0), painter(), lambda name, seed: white_tile()).app
    left, found = list(app.routes), set()
    while left:
        route = left.pop()
        left += getattr(getattr(route, "original_router", None), "routes", [])
        if getattr(route, "include_in_schema", False):
            found |= {(route.path, method.lower()) for method in route.methods}
    paths = openapi(ServeConfig())["paths"]
    assert found == {(path, verb) for path, verbs in paths.items() for verb in verbs}
    assert {path for path, verbs in paths.items() if "requestBody" in verbs.get("post", {})} == set(BODIES)


@pytest.mark.parametrize("path", BODIES)
def test_what_is_described_is_what_is_read(open_door, monkeypatch, path: str) -> None:
    read: list[set[str]] = []
    known = Fields.known
    monkeypatch.setattr(
        Fields, "known", lambda self, names: read.append(set(names)) if not self.where else known(self, names)
    )
    with httpx.Client(base_url=open_door.url, headers={"Authorization": "Bearer k"}) as client:
        assert client.post(path, json=BODIES[path]).status_code < 500
        schema = client.get("/openapi.json").json()["paths"][path]["post"]["requestBody"]["content"]
    described = schema["application/json"]["schema"]
    assert read[0] == set(described["properties"]) and described["additionalProperties"] is False


def test_a_key_is_described_where_there_is_one() -> None:
    def asked(config: ServeConfig) -> dict[str, Any]:
        return {path: "401" in verb["responses"] for path, verbs in openapi(config)["paths"].items()
                for verb in verbs.values()}  # fmt: skip

    assert not any(asked(ServeConfig()).values())
    assert [path for path, asks in asked(ServeConfig(api_key="k")).items() if not asks] == ["/health"]


def test_a_body_may_name_every_model_that_is_served() -> None:
    paths = openapi(ServeConfig(model="base", adapters=("poet=runs/poet",)))["paths"]
    for path in BODIES:
        named = paths[path]["post"]["requestBody"]["content"]["application/json"]["schema"]["properties"].get("model")
        assert named == (None if path == "/v1/weights" else {"enum": ["base", "poet", None]}), path


def test_a_method_that_is_not_allowed_comes_with_those_that_are(door) -> None:
    answer = httpx.get(f"{door.url}/v1/chat/completions")
    assert answer.status_code == 405 and answer.headers["allow"] == "POST"
