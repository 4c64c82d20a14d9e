"""What the door says of itself at /openapi.json: every path, the bodies that it takes, the statuses that it answers."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from litchi.serve import bodies
from litchi.serve.bodies import Schema, listed, record
from litchi.serve.guard import is_open
from litchi.serve.limits import Limits
from litchi.serve.models import Models
from litchi.serve.params import MAX_SEED

if TYPE_CHECKING:
    from litchi.serve.run import ServeConfig

JSON, EVENTS = "application/json", "text/event-stream"
TEXT, COUNT, ANYTHING = {"type": "string"}, {"type": "integer", "minimum": 0}, {"type": "object"}

ERROR = record({"message": TEXT, "type": TEXT, "code": TEXT, "param": {"type": "null"}},
               "message", "type", "code", "param")  # fmt: skip
WORDS = {
    400: "Not what is described here, or not what this model can do; the message names the field and the mend.",
    401: "No valid key.",
    403: "From a page of another origin, or to a host name that this server does not answer to.",
    404: "Nothing of that name here.",
    408: "The request came too slowly. No body.",
    409: "Answered by other weights or versions.",
    413: "Larger than this server reads.",
    429: "Too many wait; Retry-After says when to try again.",
    500: "A fault of the server, which its log tells.",
    503: "The server stops, or what answers in it has stopped.",
}
USUAL = (400, 401, 403, 408, 500)
"""What any path may answer."""
ASKED = (404, 413, 429, 503)
"""What a path may that has a question answered: 404 for another model."""


def told(**properties: Schema) -> Schema:
    """A body with at least these fields."""
    return record(properties, *properties, more=True)


def literal(value: str) -> Schema:
    return {"const": value}


ROWS = listed(ANYTHING, 0, 1 << 20)
USAGE = told(prompt_tokens=COUNT, completion_tokens=COUNT, total_tokens=COUNT)
MODEL = told(id=TEXT, object=literal("model"), created=COUNT, owned_by=TEXT)
CHAT = told(id=TEXT, object=literal("chat.completion"), created=COUNT, model=TEXT, choices=ROWS, usage=USAGE)
COMPLETION = told(id=TEXT, object=literal("text_completion"), created=COUNT, model=TEXT, choices=ROWS, usage=USAGE)
VECTORS = told(object=literal("list"), data=ROWS, model=TEXT, usage=told(prompt_tokens=COUNT, total_tokens=COUNT))
PICTURES = told(id=TEXT, created=COUNT, data=listed(told(b64_json=TEXT), 1, 64))
RESPONSE = told(id=TEXT, object=literal("response"), created_at=COUNT, status=TEXT, model=TEXT, output=ROWS)
IDS = told(count=COUNT, tokens=listed(COUNT, 0, 1 << 20))
WEIGHTS = told(object=literal("weights"), checkpoints=listed(TEXT, 0, 1 << 20))
REPLAY = told(id=TEXT, object=literal("receipt.replay"), same={"type": "boolean"}, differs=ROWS)

RECEIPT = ("get /v1/receipts/{name}", "post /v1/receipts/{name}/replay")
LINKS = {
    "/v1/responses": ("get /v1/responses/{name}", "delete /v1/responses/{name}", *RECEIPT),
    "/v1/chat/completions": RECEIPT,
    "/v1/embeddings": RECEIPT,
}
"""What can be asked of an answer's id afterwards."""


def openapi(config: ServeConfig) -> dict[str, Any]:
    """OpenAPI 3.1 of a door. World sessions speak over a WebSocket, which OpenAPI has no words for."""
    page = Page(config)
    ask, name = page.ask, path_of("name")
    paths = {
        "/health": {"get": page.get("Whether the worker lives, and its queue", told(status=TEXT, queue=ANYTHING), 503)},
        "/metrics": {"get": page.get("Prometheus", None, kind="text/plain")},
        "/v1/models": {"get": page.get("The one model", told(object=literal("list"), data=listed(MODEL, 1, 64)))},
        "/v1/models/{name}": {"get": page.get("One model", MODEL, 404, parameters=name)},
        "/v1/rooms": {"get": page.get("A room's first frame", None, kind="image/png", parameters=rooms(config))},
        "/v1/chat/completions": {"post": ask("A conversation goes on", bodies.chat, CHAT, streams=True)},
        "/v1/completions": {"post": ask("A text goes on", bodies.completion, COMPLETION, streams=True)},
        "/v1/responses": {"post": ask("A remembered conversation", bodies.response, RESPONSE, streams=True)},
        "/v1/responses/{name}": {
            "get": page.get("What was answered", RESPONSE, 404, parameters=name),
            "delete": page.get("Forget it", told(id=TEXT, deleted={"type": "boolean"}), 404, parameters=name),
        },
        "/v1/embeddings": {"post": ask("One vector for each text", bodies.embedding, VECTORS)},
        "/v1/images/generations": {"post": ask("Pictures from words", bodies.drawing, PICTURES)},
        "/v1/next": {"post": ask("The next frame or action", bodies.following, told(id=TEXT, part=ANYTHING))},
        "/tokenize": {"post": ask("Ids of a text", bodies.tokenizing, IDS, 404, 413)},
        "/detokenize": {"post": ask("The text of ids", bodies.detokenizing, told(prompt=TEXT), 404, 413)},
        "/tokenizer_info": {"get": page.get("Names of control tokens", told(tokenizer_class=TEXT))},
        "/v1/receipts/{name}": {"get": page.get("What an answer was made of", told(id=TEXT), 404, parameters=name)},
        "/v1/receipts/{name}/replay": {
            "post": page.get("Whether it comes again", REPLAY, 404, 409, 429, 503, parameters=name)
        },
        "/v1/weights": {
            "get": page.get("Which weights answer", WEIGHTS),
            "post": ask("Other weights take their place", partial(bodies.swap, config.checkpoints), WEIGHTS, 404, 413),
        },
    }
    for path, verbs in paths.items():
        for method, verb in verbs.items():
            verb["operationId"] = f"{method} {path}"
    for path, later in LINKS.items():
        answer = paths[path]["post"]["responses"]["200"]
        answer["links"] = {each: {"operationId": each, "parameters": {"name": "$response.body#/id"}} for each in later}
    for verb in (verb for path, verbs in paths.items() if is_open(path) for verb in verbs.values()):
        verb["responses"].pop("401", None)
        verb["security"] = []
    health = paths["/health"]["get"]["responses"]
    health["503"]["content"] = health["200"]["content"]
    scheme = {"key": {"type": "http", "scheme": "bearer"}}
    body = {"openapi": "3.1.0", "info": {"title": "Litchi", "version": "1"}, "paths": paths}
    body["components"] = {"schemas": {"Error": record({"error": ERROR}, "error")}, "securitySchemes": scheme}
    return body | {"security": [{"key": []}] if config.api_key else []}


class Page:
    """Writes one path after another."""

    def __init__(self, config: ServeConfig):
        self.config, self.models = config, Models.of(config.model, config.adapters)
        self.usual = USUAL if config.api_key else tuple(status for status in USUAL if status != 401)

    def get(
        self, words: str, body: Schema | None, *statuses: int, kind: str = JSON, parameters: Any = ()
    ) -> dict[str, Any]:
        """A path that takes no body; `body` describes what it answers."""
        content = {kind: {"schema": body} if body else {}}
        return {"summary": words, "parameters": list(parameters), "responses": self.answers(content, statuses)}

    def ask(
        self,
        words: str,
        takes: Callable[[Models, Limits], Schema],
        gives: Schema,
        *statuses: int,
        streams: bool = False,
    ) -> dict[str, Any]:
        """A path that takes a body."""
        schema = takes(self.models, self.config.limits)
        content: dict[str, Any] = {JSON: {"schema": gives}} | ({EVENTS: {}} if streams else {})
        asked = {"required": True, "content": {JSON: {"schema": schema}}}
        return {"summary": words, "requestBody": asked, "responses": self.answers(content, statuses or ASKED)}

    def answers(self, content: dict[str, Any], statuses: tuple[int, ...]) -> dict[str, Any]:
        refusal = {JSON: {"schema": {"$ref": "#/components/schemas/Error"}}}
        found: dict[str, Any] = {"200": {"description": "The answer", "content": content}}
        for status in sorted({*self.usual, *statuses}):
            found[str(status)] = {"description": WORDS[status]} | ({"content": refusal} if status != 408 else {})
        return found


def path_of(name: str) -> list[dict[str, Any]]:
    return [{"name": name, "in": "path", "required": True, "schema": TEXT}]


def rooms(config: ServeConfig) -> list[dict[str, Any]]:
    seed = {"type": "integer", "minimum": 0, "maximum": MAX_SEED}
    env = {"enum": ["", *config.envs]}
    return [
        {"name": "seed", "in": "query", "required": True, "schema": seed},
        {"name": "env", "in": "query", "required": False, "schema": env},
    ]
