"""Four ranks on this machine for all tests of this folder, started when the first test asks, ended with the last."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from litchi.parallel.crew import Crew


@pytest.fixture(scope="package")
def crew() -> Iterator[Crew]:
    with Crew(4) as crew:
        yield crew
