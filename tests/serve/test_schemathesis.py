"""A stranger's tool reads what the door says of itself, and finds no fault, no lie and nothing taken that is not said.

Schemathesis makes bodies that a schema allows and bodies that it forbids: the former are answered or refused for what
no schema can say, the latter are refused; every status, type and body of an answer is one that is described.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count

import pytest

from litchi.cli import find_checkpoint
from litchi.serve.loading import load_engine
from litchi.serve.openapi import openapi
from litchi.serve.run import ServeConfig

schemathesis = pytest.importorskip("schemathesis")
requests = pytest.importorskip("requests")
hypothesis = pytest.importorskip("hypothesis")

KEY = "open sesame"
SETTINGS = {"model": "tiny", "api_key": KEY, "max_tokens": 1}
schema = schemathesis.openapi.from_dict(
    openapi(ServeConfig(**SETTINGS)), config=schemathesis.Config.from_dict({"seed": 1})
)
UNSAYABLE = [schemathesis.checks.positive_data_acceptance]
"""Whether a pattern is a regular expression, or a text short enough in tokens, no schema can say."""
SHARE, NUMBERS = 5, count()
"""Of the 3700 cases at the bounds of the fields every fifth is tried; `bench/conformance.py` tries them all."""


@pytest.fixture(scope="module")
def tiny(served_by) -> Iterator[dict]:
    config = ServeConfig(**SETTINGS)
    with served_by(load_engine(find_checkpoint("tiny"), config), **SETTINGS) as served, requests.Session() as session:
        yield {"base_url": served.url, "session": session, "headers": {"Authorization": f"Bearer {KEY}"}}


@pytest.mark.slow
@schema.parametrize()
@hypothesis.settings(
    max_examples=5, deadline=None, database=None, derandomize=True, suppress_health_check=list(hypothesis.HealthCheck)
)
def test_the_door_does_as_it_says(tiny, case) -> None:
    if next(NUMBERS) % SHARE:
        return
    answer = case.call(**tiny, timeout=30)
    case.validate_response(answer, excluded_checks=UNSAYABLE)
