"""The key that clients have to give, asked for at every path: an ASGI middleware, by vLLM's own flag `--middleware`.

vLLM itself asks for it under `/v1` and few other paths; at `/invocations`, for one, it generates for everybody.
"""

from __future__ import annotations

import hmac
import os
from typing import Any

from starlette.datastructures import Headers
from starlette.responses import JSONResponse

_OPEN = ("/health", "/metrics")  # to be read by what watches the server


class AsksForKey:
    """Answers 401 to whoever does not give the key of `VLLM_API_KEY`. vLLM asks the last middleware first."""

    def __init__(self, app: Any) -> None:
        self.app = app
        self.key = os.environ["VLLM_API_KEY"].encode()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if _is_head_of_open(scope):  # a load balancer's; vLLM knows only GET there, and uvicorn leaves out the body
            scope = {**scope, "method": "GET"}
        allowed = _is_open(scope) or self._has_key(Headers(scope=scope))
        answer = self.app if allowed else JSONResponse({"error": "Unauthorized"}, 401)
        await answer(scope, receive, send)

    def _has_key(self, headers: Headers) -> bool:
        scheme, _, given = headers.get("authorization", "").partition(" ")
        return scheme.lower() == "bearer" and hmac.compare_digest(given.encode(), self.key)


def _is_head_of_open(scope: Any) -> bool:
    return scope["type"] == "http" and scope["method"] == "HEAD" and scope["path"] in _OPEN


def _is_open(scope: Any) -> bool:
    if scope["type"] == "websocket":
        return False
    if scope["type"] != "http":  # the start and the end of the server
        return True
    # A browser asks by OPTIONS what it may send, and cannot give a key then; nothing is generated or loaded for it.
    return scope["method"] == "OPTIONS" or (scope["method"] == "GET" and scope["path"] in _OPEN)
