"""What the door counts, in Prometheus' text format: requests, tokens, how long, and who waits."""

from __future__ import annotations

import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import accumulate

from starlette.types import ASGIApp, Message, Receive, Scope, Send

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)


@dataclass(slots=True)
class Histogram:
    """How many observations lie up to each bound."""

    counts: list[int] = field(default_factory=lambda: [0] * (len(SECONDS) + 1))
    total: float = 0.0

    def observe(self, seconds: float) -> None:
        self.counts[bisect_left(SECONDS, seconds)] += 1
        self.total += seconds


@dataclass
class Metrics:
    """All that is counted, since the start. Only the event loop writes."""

    requests: Counter[tuple[str, int]] = field(default_factory=Counter)
    """By route, never by what a stranger typed, and status."""
    running: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    finished: Counter[str] = field(default_factory=Counter)
    seconds: Histogram = field(default_factory=Histogram)
    first_token: Histogram = field(default_factory=Histogram)

    def answered(self, prompt_tokens: int, tokens: int, finish: str) -> None:
        self.prompt_tokens += prompt_tokens
        self.generated_tokens += tokens
        self.finished[finish] += 1

    def text(self, gauges: Mapping[str, float]) -> str:
        """The page that Prometheus reads; `gauges` are measured now."""
        return "".join(f"{line}\n" for line in self.lines(gauges))

    def lines(self, gauges: Mapping[str, float]) -> Iterator[str]:
        yield "# TYPE litchi_requests_total counter"
        for (path, status), count in sorted(self.requests.items()):
            yield f'litchi_requests_total{{path="{path}",status="{status}"}} {count}'
        yield "# TYPE litchi_answers_total counter"
        for finish, count in sorted(self.finished.items()):
            yield f'litchi_answers_total{{finish="{finish}"}} {count}'
        for name, count in (("prompt", self.prompt_tokens), ("generated", self.generated_tokens)):
            yield f"# TYPE litchi_{name}_tokens_total counter"
            yield f"litchi_{name}_tokens_total {count}"
        for name, value in {**gauges, "requests_running": self.running}.items():
            yield f"# TYPE litchi_{name} gauge"
            yield f"litchi_{name} {value}"
        yield from histogram("litchi_request_seconds", self.seconds)
        yield from histogram("litchi_time_to_first_token_seconds", self.first_token)


def histogram(name: str, seen: Histogram) -> Iterator[str]:
    yield f"# TYPE {name} histogram"
    bounds = [*(f"{bound:g}" for bound in SECONDS), "+Inf"]
    totals = list(accumulate(seen.counts))
    for bound, total in zip(bounds, totals, strict=True):
        yield f'{name}_bucket{{le="{bound}"}} {total}'
    yield f"{name}_sum {seen.total}"
    yield f"{name}_count {totals[-1]}"


class Meter:
    """ASGI middleware that counts every HTTP request, refused ones too."""

    def __init__(self, app: ASGIApp, metrics: Metrics):
        self.app, self.metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        began, status = time.monotonic(), 499  # what a client gets that leaves before it is answered

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        self.metrics.running += 1
        try:
            await self.app(scope, receive, watched)
        finally:
            self.metrics.running -= 1
            route = getattr(scope.get("route"), "path", "other")
            self.metrics.requests[route, status] += 1
            self.metrics.seconds.observe(time.monotonic() - began)
