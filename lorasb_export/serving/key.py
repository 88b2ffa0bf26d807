"""Who is answered: whoever gives the key; without one, on loopback, who asks for this machine by a name of its own.

Two ASGI middlewares, by vLLM's own flag `--middleware`. vLLM itself asks for the key under `/v1` and few other paths;
at `/invocations`, for one, it generates for everybody.
"""

from __future__ import annotations

import hmac
import os
from typing import Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.responses import JSONResponse

from .api_keys import keys_in
from .listening import is_loopback

_OPEN = ("/health", "/metrics")  # to be read by what watches the server
_NOT_LOOPBACK = (
    "Without an API key this server answers only as localhost, 127.0.0.1 or [::1] (the Host header). "
    "Set a key, or have the proxy send Host: 127.0.0.1"
)


class AsksForKey:
    """Answers 401 to whoever gives none of the server's keys. vLLM asks the last middleware first."""

    def __init__(self, app: Any) -> None:
        self.app = app
        self.keys = [key.encode() for key in keys_in(os.environ)]

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if _is_head_of_open(scope):  # a load balancer's; vLLM knows only GET there, and uvicorn leaves out the body
            scope = {**scope, "method": "GET"}
        allowed = _is_open(scope) or self._has_key(Headers(scope=scope))
        answer = self.app if allowed else JSONResponse({"error": "Unauthorized"}, 401)
        await answer(scope, receive, send)

    def _has_key(self, headers: Headers) -> bool:
        scheme, _, given = headers.get("authorization", "").partition(" ")
        are_given = [hmac.compare_digest(given.encode(), key) for key in self.keys]  # all: the time tells nothing
        return scheme.lower() == "bearer" and any(are_given)


class AsksForLoopback:
    """Answers 403 to whoever calls this server by another name than loopback has.

    A browser sends the name in the address bar: that of a page which has its own name point to 127.0.0.1, and so may
    read what it asks there (DNS rebinding).
    """

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":  # the start and the end of the server: nobody asks, and there are no headers
            await self.app(scope, receive, send)
            return
        host = _host(Headers(scope=scope))  # None of a health check: a browser sends it
        allowed = host is None or _is_of_this_machine(host)
        await (self.app if allowed else JSONResponse({"error": _NOT_LOOPBACK}, 403))(scope, receive, send)


def _host(headers: Headers) -> str | None:
    """Without its port; None where the client names none."""
    given = headers.get("host")
    if not given:
        return None
    try:
        return urlsplit(f"//{given}").hostname or given
    except ValueError:
        return given


def _is_of_this_machine(host: str) -> bool:
    """Whether no page can have it for a name: an address of loopback, or what no server of names is asked for."""
    return is_loopback(host) or host in ("0.0.0.0", "::", "localhost.") or host.endswith(".localhost")


def _is_head_of_open(scope: Any) -> bool:
    return scope["type"] == "http" and scope["method"] == "HEAD" and scope["path"] in _OPEN


def _is_open(scope: Any) -> bool:
    if scope["type"] == "websocket":
        return False
    if scope["type"] != "http":  # the start and the end of the server
        return True
    # A browser asks by OPTIONS what it may send, and cannot give a key then; nothing is generated or loaded for it.
    return scope["method"] == "OPTIONS" or (scope["method"] == "GET" and scope["path"] in _OPEN)
