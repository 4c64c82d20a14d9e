"""A `Sampler` at the other end of HTTP, without torch: what drives a robot needs no CUDA.

"chat" and "image" go to the OpenAI endpoints, "frame" and "action" to /v1/next. Only the standard library and numpy;
Pillow is imported when a picture is sent or received.
"""

from __future__ import annotations

import base64
import http.client
import io
import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from litchi.config import BadInput
from litchi.schema.request import Completion, Delta, Request, SamplingParams
from litchi.schema.sample import Action, Image, Part, Role, Text, Video

USUAL = SamplingParams()
CHOOSING = (
    "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty", "stop_token_ids", "min_tokens",
    "ignore_eos",
)  # fmt: skip
"""What is said only where it is not as usual: older servers do not know it, and drawings have no use for it."""


class ServerError(RuntimeError):
    """The server could not answer. `status` is HTTP's; `retry_after` is in seconds, None where it did not say."""

    def __init__(self, status: int, message: str, retry_after: float | None = None):
        super().__init__(f"{message} (HTTP {status})")
        self.status, self.retry_after = status, retry_after


class HttpSampler:
    """Answers requests by asking the server at `base_url`, say http://127.0.0.1:8000.

    Raises BadInput for what the server calls a bad request, ServerError for its own faults and a full queue, OSError if
    it cannot be reached. Not for several threads at once on one stream; each call has a connection of its own.
    """

    def __init__(self, base_url: str, *, model: str = "", api_key: str = "", timeout: float = 120.0):
        parts = urlsplit(base_url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise BadInput(f"base_url must look like http://127.0.0.1:8000, got {base_url!r}")
        self._secure, self._host, self._port = parts.scheme == "https", parts.hostname, parts.port
        self._root, self._timeout = parts.path.rstrip("/").removesuffix("/v1"), timeout
        self._headers = {"Content-Type": "application/json"} | (
            {"Authorization": f"Bearer {api_key}"} if api_key else {}
        )
        self._model = model

    @property
    def model(self) -> str:
        """The name of the model that is asked; the server's first unless one was given."""
        if not self._model:
            self._model = self._json("GET", "/v1/models")["data"][0]["id"]
        return self._model

    def stream(self, request: Request) -> Iterator[Delta]:
        """Deltas as they are made. Dropping the iterator closes the connection, which stops the server's work."""
        if request.want != "chat":
            answer = self.complete(request)
            if answer.text:
                yield Delta(text=answer.text)
            yield Delta(part=answer.parts[0], tokens=answer.tokens, finish=answer.finish)
            return
        with self._open("POST", "/v1/chat/completions", self._chat_body(request) | {"stream": True}) as answer:
            for line in answer:
                data = line.decode().strip().removeprefix("data: ")
                if data and data != "[DONE]":
                    yield from _deltas(json.loads(data))

    def complete(self, request: Request) -> Completion:
        match request.want:
            case "chat":
                return _chat_completion(self._json("POST", "/v1/chat/completions", self._chat_body(request)))
            case "image":
                prompt = "".join(part.text for part in request.parts if isinstance(part, Text))
                size = f"{request.width}x{request.height}"
                body = {"model": request.adapter or self.model, "prompt": prompt, "size": size} | _sampling(request)
                drawn = self._json("POST", "/v1/images/generations", body)
                [made], read = drawn["data"], drawn["usage"]["input_tokens"]
                picture = Image(pixels=_pixels(made["b64_json"]), role=Role.ASSISTANT)
                text = made.get("revised_prompt", "")
                return Completion(parts=(picture,), text=text, finish="stop", prompt_tokens=read, tokens=())
            case _:
                parts = [_part_body(part) for part in request.parts]
                body = {"model": request.adapter or self.model, "want": request.want, "parts": parts}
                made = self._json("POST", "/v1/next", body | {"space": request.space} | _sampling(request))
                read, tokens = made["prompt_tokens"], tuple(made["token_ids"])
                part = _part(made["part"])
                return Completion(
                    parts=(part,), text="", finish=made["finish_reason"], prompt_tokens=read, tokens=tokens
                )

    def _chat_body(self, request: Request) -> dict[str, Any]:
        model = request.adapter or self.model
        body = {"model": model, "messages": _messages(request.parts), "return_token_ids": True}
        return body | {"logprobs": request.params.logprobs} | _sampling(request)

    def _json(self, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        with self._open(method, path, body) as answer:
            return json.loads(answer.read())

    @contextmanager
    def _open(self, method: str, path: str, body: dict[str, Any] | None = None) -> Iterator[http.client.HTTPResponse]:
        kind = http.client.HTTPSConnection if self._secure else http.client.HTTPConnection
        connection = kind(self._host, self._port, timeout=self._timeout)
        try:
            connection.request(method, self._root + path, json.dumps(body) if body is not None else None, self._headers)
            answer = connection.getresponse()
            if answer.status >= 400:
                raise _refusal(answer)
            yield answer
        finally:
            connection.close()


def _refusal(answer: http.client.HTTPResponse) -> Exception:
    raw = answer.read()
    try:
        message = str(json.loads(raw)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        message = raw[:200].decode("utf-8", "replace")
    if answer.status < 500 and answer.status != 429:
        return BadInput(message)
    after = answer.headers.get("Retry-After")
    return ServerError(answer.status, message, float(after) if after else None)


def _sampling(request: Request) -> dict[str, Any]:
    p = request.params
    shape = {"temperature": p.temperature, "top_p": p.top_p, "top_k": p.top_k, "seed": p.seed, "steps": p.steps}
    other = {name: getattr(p, name) for name in CHOOSING if getattr(p, name) != getattr(USUAL, name)}
    if p.logit_bias:
        other["logit_bias"] = {str(index): bias for index, bias in p.logit_bias}
    return {"max_tokens": p.max_tokens, "stop": list(p.stop)} | shape | other


def _messages(parts: tuple[Part, ...]) -> list[dict[str, Any]]:
    """Consecutive parts of one role are one message. Raises BadInput for parts that a chat cannot carry."""
    messages: list[dict[str, Any]] = []
    for part in parts:
        role = part.role.value or "user"
        if role not in ("system", "user", "assistant"):
            raise BadInput(f"a chat over HTTP carries system, user and assistant parts, not {role!r}")
        if not messages or messages[-1]["role"] != role:
            messages.append({"role": role, "content": []})
        content = _part_body(part)
        content.pop("role", None)
        messages[-1]["content"].append(content)
    return messages


def _part_body(part: Part) -> dict[str, Any]:
    match part:
        case Text():
            return {"type": "text", "text": part.text, "role": part.role.value}
        case Image():
            return {"type": "image_url", "image_url": {"url": _data_url(part.pixels)}}
        case Action():
            return {"type": "action", "values": part.values.tolist(), "space": part.space, "hz": part.hz}
        case Video():
            return {"type": "video_url", "video_url": {"url": _film_url(part)}}


def _part(body: dict[str, Any]) -> Part:
    match body["type"]:
        case "text":
            return Text(text=body["text"], role=Role.ASSISTANT)
        case "image_url":
            return Image(pixels=_pixels(body["image_url"]["url"].partition(",")[2]), role=Role.ASSISTANT)
        case "action":
            return Action(values=np.array(body["values"], np.float32), space=body["space"], hz=body["hz"])
        case kind:
            raise ServerError(200, f"the server sent a part of type {kind!r}, which this client does not know")


def _chat_completion(body: dict[str, Any]) -> Completion:
    choice = body["choices"][0]
    content = choice["message"]["content"]
    spoken = [{"type": "text", "text": content}] if isinstance(content, str) else content
    parts = [_part(each) for each in spoken]
    rows = (choice.get("logprobs") or {}).get("content") or []
    return Completion(
        parts=tuple(part for part in parts if not isinstance(part, Text)),
        text="".join(part.text for part in parts if isinstance(part, Text)),
        finish=choice["finish_reason"],
        prompt_tokens=body["usage"]["prompt_tokens"] or 0,
        tokens=tuple(choice.get("token_ids", ())),
        logprobs=tuple(row["logprob"] for row in rows),
    )


def _deltas(body: dict[str, Any]) -> Iterator[Delta]:
    if "error" in body:
        raise ServerError(200, body["error"]["message"])
    for choice in body["choices"]:
        said, rows = choice["delta"], (choice.get("logprobs") or {}).get("content") or []
        pictures = [_part(each) for each in said.get("images", ())]
        text, tokens, finish = said.get("content") or "", tuple(choice.get("token_ids", ())), choice["finish_reason"]
        if text or tokens or finish or pictures:
            picture = pictures[0] if pictures else None
            logprobs = tuple(row["logprob"] for row in rows)
            yield Delta(text=text, part=picture, tokens=tokens, logprobs=logprobs, finish=finish)


def _data_url(pixels: np.ndarray) -> str:
    from PIL import Image as Pillow

    out = io.BytesIO()
    Pillow.fromarray(np.ascontiguousarray(pixels)).save(out, "PNG")
    return "data:image/png;base64," + base64.b64encode(out.getvalue()).decode()


def _film_url(film: Video) -> str:
    """An animated PNG, in which nothing is lost."""
    from PIL import Image as Pillow

    out, frames = io.BytesIO(), [Pillow.fromarray(np.ascontiguousarray(frame)) for frame in film.frames]
    more = {"append_images": frames[1:], "duration": 1000 / film.fps}
    # Pillow joins frames that are alike unless they are laid on in different ways: on paper there is no difference.
    frames[0].save(out, "PNG", save_all=True, blend=[i % 2 for i in range(len(frames))], **more)
    return "data:image/png;base64," + base64.b64encode(out.getvalue()).decode()


def _pixels(encoded: str) -> np.ndarray:
    from PIL import Image as Pillow

    with Pillow.open(io.BytesIO(base64.b64decode(encoded))) as picture:
        return np.array(picture.convert("RGB"))
