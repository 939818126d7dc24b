"""What is asked of a request before anything of it is looked at: a key, and a body that has an end."""

from __future__ import annotations

import asyncio
import hmac
import json
from collections.abc import Mapping
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

MOST_BYTES = 1_000_000
BODY_S = 30.0  # within which a body has to be there
WITH_KEY = ("/v1/", "/generate")  # paths that draw, or say what there is to draw with


def problem(message: str, kind: str) -> dict[str, Any]:
    """An answer that is no picture, as OpenAI's API words it."""
    return {"error": {"message": message, "type": kind, "param": None, "code": None}}


class Limits:
    """An ASGI application around another. It answers 401 where `keys` are asked for and none is sent, 413 where a body
    has more than MOST_BYTES, whatever its headers say, and 408 where it takes longer than BODY_S."""

    def __init__(self, app: ASGIApp, keys: tuple[str, ...]) -> None:
        self.app, self.keys = app, [key.encode() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        if self.keys and scope["path"].startswith(WITH_KEY) and not self._has_key(dict(scope["headers"])):
            await _refuse(send, 401, "no API key of this server was sent", [(b"www-authenticate", b"Bearer")])
            return
        body, disconnected = bytearray(), False
        try:
            async with asyncio.timeout(BODY_S):
                while scope["method"] in ("POST", "PUT", "PATCH") and not disconnected:
                    message = await receive()
                    disconnected = message["type"] == "http.disconnect"
                    body += message.get("body", b"")
                    if len(body) > MOST_BYTES:
                        await _refuse(send, 413, f"the request has more than {MOST_BYTES} bytes")
                        return
                    if not message.get("more_body"):
                        break
        except TimeoutError:
            await _refuse(send, 408, "the request did not come to its end")
            return
        if disconnected:
            return
        whole: list[Message] = [{"type": "http.request", "body": bytes(body), "more_body": False}]
        read = scope["method"] in ("POST", "PUT", "PATCH")

        async def again() -> Message:
            return whole.pop() if read and whole else await receive()

        await self.app(scope, again, send)

    def _has_key(self, headers: Mapping[bytes, bytes]) -> bool:
        scheme, _, sent = headers.get(b"authorization", b"").partition(b" ")
        # All are compared, so that time tells nothing.
        fits = [hmac.compare_digest(sent, key) for key in self.keys]
        return scheme.lower() == b"bearer" and any(fits)


async def _refuse(send: Send, status: int, message: str, more: list[tuple[bytes, bytes]] | None = None) -> None:
    body = json.dumps(problem(message, "invalid_request_error")).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode()), *(more or [])]
    await send({"type": "http.response.start", "status": status, "headers": [*headers, (b"connection", b"close")]})
    await send({"type": "http.response.body", "body": body})
