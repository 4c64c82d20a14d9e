"""A receipt is shown, or replayed: its requests are asked again, and every bit of the answers is compared."""

from __future__ import annotations

import json

from anyio import to_thread
from fastapi import APIRouter, Request, Response

from litchi.schema.digest import told
from litchi.serve.exchange import Desk, Stopped
from litchi.serve.receipts import Origin, OtherOrigin, Receipt, receipt_of, shown
from litchi.serve.wire import Missing


class Replays:
    """The endpoints."""

    def __init__(self, desk: Desk):
        self.desk = desk

    def router(self) -> APIRouter:
        router = APIRouter()
        router.add_api_route("/v1/receipts/{name}", self.show, methods=["GET"])
        router.add_api_route("/v1/receipts/{name}/replay", self.replay, methods=["POST"])
        return router

    async def show(self, name: str) -> Response:
        self.origin()
        return body_of(await to_thread.run_sync(shown, self.text(name)))

    async def replay(self, request: Request, name: str) -> Response:
        """Ask again beside whatever else is asked. Raises Missing, OtherOrigin, Busy."""
        origin, receipt = self.origin(), await to_thread.run_sync(receipt_of, self.text(name))
        compare(receipt, origin)
        heard = await self.desk.hear(request, receipt.requests)
        if heard is None:
            return Stopped()
        compare(receipt, heard.origin or origin)  # weights may have been swapped meanwhile
        differs = receipt.differs(tuple(told(each) for each in heard.completions))
        return body_of({"id": name, "object": "receipt.replay", "same": not differs, "differs": differs})

    def origin(self) -> Origin:
        if (origin := self.desk.worker.origin) is None:
            mend = "serve a checkpoint with serve.engine.exact=true"
            raise Missing(f"receipts need the engine, exact and with weights that it knows: {mend}")
        return origin

    def text(self, name: str) -> str:
        if (text := self.desk.receipts.get(name)) is None:
            kept = f"the newest {self.desk.receipts.most} are kept, but for those of store=false"
            raise Missing(f"no receipt {name[:80]!r} here, or no longer: {kept}")
        return text


def compare(receipt: Receipt, origin: Origin) -> None:
    """Raises OtherOrigin."""
    if differs := receipt.origin.differs(origin):
        mend = "replay it on a server that has those"
        raise OtherOrigin(f"{receipt.id[:80]} was answered by {' and by '.join(differs)}: {mend}")


def body_of(data: dict) -> Response:
    return Response(json.dumps(data), media_type="application/json")
