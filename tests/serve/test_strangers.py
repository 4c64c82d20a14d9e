"""Whatever stands in whichever field, the answer is an answer or a refusal in one line, and never a fault of ours."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator

import httpx
import pytest

from litchi.cli import load_sampler
from litchi.serve.grammars import GUIDED
from litchi.serve.params import CHOOSING, SAMPLING
from litchi.serve.replies import OWN
from litchi.serve.wire import TOOLS

TURN = {"role": "user", "content": "a"}
STARTS = {
    "/v1/chat/completions": (
        {"messages": [TURN]},
        ("messages", "n", "top_logprobs", "stream_options", *GUIDED, *TOOLS),
    ),
    "/v1/completions": ({"prompt": "a"}, ("prompt", "n", "logprobs", "echo", "stream", "suffix", *GUIDED)),
    "/v1/responses": ({"input": "a"}, (*OWN, *TOOLS)),
    "/v1/embeddings": ({"input": "a"}, ("input", "encoding_format", "dimensions", "pooling")),
    "/tokenize": ({"prompt": "a"}, ("prompt", "messages", "add_special_tokens", "return_token_strs")),
    "/detokenize": ({"tokens": [1]}, ("tokens", "model")),
}
ODD = [
    None,
    True,
    False,
    0,
    1,
    -1,
    2,
    671,
    672,
    10**30,
    0.5,
    -0.0,
    1e308,
    "",
    "a",
    "\ud800",
    "荔枝",
    "none",
    "required",
    [],
    {},
    [[]],
    [{}],
    {"a": 1},
    {"type": "json_object"},
    {"type": "json_schema"},
    {"1": 1},
    {"type": "function"},
    ["a"],
    [1],
    [[1], [2]],
    [None],
    [True],
    [TURN],
    [{"role": "tool", "content": [{"type": "text", "text": "a"}]}],
    [{"role": "assistant", "tool_calls": [{"function": None}]}, TURN],
    [{"type": "function_call_output"}],
    {"format": {}},
    [{"type": "function", "function": {"name": "a", "parameters": True}}],
    {"json": "{"},
    {"regex": "a"},
    {"choice": []},
]


@pytest.fixture(scope="module")
def tiny(served_by) -> Iterator[object]:
    with served_by(load_sampler("tiny"), max_tokens=4) as served:
        yield served


@pytest.mark.slow
@pytest.mark.parametrize("path", STARTS)
def test_odd_values_are_answered_or_refused(tiny, path: str) -> None:
    start, own = STARTS[path]
    draw = random.Random(path)
    names = [*own, *(() if path in ("/v1/embeddings", "/tokenize", "/detokenize") else (*SAMPLING, *CHOOSING))]
    bodies = [start | {name: value} for name in own for value in ODD]
    bodies += [start | {name: draw.choice(ODD) for name in draw.sample(names, min(3, len(names)))} for _ in range(100)]
    seen: set[int] = set()
    with httpx.Client(base_url=tiny.url, timeout=60) as client:
        for body in draw.sample(bodies, min(120, len(bodies))):
            answer = client.post(path, content=json.dumps(body))
            assert answer.status_code in (200, 400, 404), (body, answer.text)
            seen.add(answer.status_code)
            if answer.status_code >= 400:
                message = answer.json()["error"]["message"]
                assert message and "\n" not in message, body
            else:
                assert '"server_error"' not in answer.text, body
    assert {200, 400} <= seen
