"""Bodies of requests have an end."""

from __future__ import annotations

import json

from starlette.types import ASGIApp, Message, Receive, Scope, Send

MOST_BYTES = 1_000_000
TOO_LARGE = {"error": {"message": "the request is too large", "type": "invalid_request_error"}}


class LimitBody:
    """An ASGI application around another, which answers 413 where a body has more than MOST_BYTES, whatever its headers
    say."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        body, messages = 0, list[Message]()
        while scope["method"] in ("POST", "PUT", "PATCH"):  # read before the application sees any of it
            message = await receive()
            messages.append(message)
            body += len(message.get("body", b""))
            if body > MOST_BYTES:
                headers = [(b"content-type", b"application/json"), (b"connection", b"close")]
                await send({"type": "http.response.start", "status": 413, "headers": headers})
                await send({"type": "http.response.body", "body": json.dumps(TOO_LARGE).encode()})
                return
            if message["type"] == "http.disconnect" or not message.get("more_body"):
                break

        async def again() -> Message:
            return messages.pop(0) if messages else await receive()

        await self.app(scope, again, send)
