"""Other weights behind the same door: who is being answered ends with what he began, whoever comes asks the new.

Only folders that the server was started with may be swapped in, and only behind a key.
"""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import TYPE_CHECKING

from anyio import to_thread
from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from litchi.config import BadInput
from litchi.schema.foreign import ForeignProcessor
from litchi.serve.exchange import Desk
from litchi.serve.fields import Fields
from litchi.serve.fleet import Fleet
from litchi.serve.limits import read_body, read_json
from litchi.serve.loading import load_answerer
from litchi.serve.wire import Missing

if TYPE_CHECKING:
    from litchi.schema.processor import Processor
    from litchi.serve.worker import Answerer


class Swaps:
    """The endpoints."""

    def __init__(self, desk: Desk) -> None:
        self.desk = desk
        self.turn = asyncio.Lock()
        self.shown = ""
        """The folder that was swapped in last."""

    def router(self) -> APIRouter:
        router = APIRouter()
        # One route, so that whoever uses another method is told of both.
        router.add_api_route("/v1/weights", self.weights, methods=["GET", "POST"])
        return router

    async def weights(self, request: Request) -> Response:
        return await self.swap(request) if request.method == "POST" else JSONResponse(self.state())

    async def swap(self, request: Request) -> Response:
        """Load a folder beside what answers now, and let it answer from then on; the reply comes when it does.

        Both are in memory until the last answer of the old weights has ended. Raises Missing for a folder that is not
        on the list, BadInput for one that is not whole or has other words.
        """
        desk, config = self.desk, self.desk.config
        if not config.checkpoints:
            raise Missing("this server swaps no weights: start it with serve.checkpoints and serve.api_key")
        body = await read_body(request.stream(), request.headers.get("content-length"), desk.limits)
        fields = Fields(read_json(body))
        fields.known(("checkpoint",))
        name = fields.choice("checkpoint", None, config.checkpoints)
        async with self.turn:
            began = time.monotonic()
            fresh = await to_thread.run_sync(load_answerer, Path(name), config)
            if fault := differs(desk.worker.sampler, fresh):
                await to_thread.run_sync(fresh.close)
                raise BadInput(f"{name} {fault}: start another server for it")
            if isinstance(fresh, Fleet) and isinstance(old := desk.worker.answerer, Fleet):
                fresh.ended = old.ended
            desk.worker.swap(fresh)
            self.shown = name
        return JSONResponse(self.state() | {"seconds": round(time.monotonic() - began, 3)})

    def state(self) -> dict:
        origin = self.desk.worker.origin
        told = {"checkpoint": self.shown or None, "digest": origin and origin.weights}
        return {"object": "weights", **told, "checkpoints": list(self.desk.config.checkpoints)}


def differs(old: object, fresh: Answerer) -> str:
    """Why clients would not read the new weights' ids as they did; "" if they would."""
    before, after = words(getattr(old, "processor", None)), words(fresh.sampler.processor)
    return "" if before == after else "has another tokenizer or chat template than the weights that answer now"


def words(processor: Processor | None) -> tuple | None:
    if processor is None:
        return None
    template = processor.tokenizer.config.template if isinstance(processor, ForeignProcessor) else ""
    return type(processor), processor.tokenizer.backend.to_str(), template
