"""A server that is about to end says so to whoever asks it then, and vLLM does not get the request.

vLLM, while it lets running requests finish, answers some new ones with 200 and an empty text, and others with errors
that blame the client.
"""

from __future__ import annotations

import os
from typing import Any

STOPPING_VARIABLE = "LORASB_STOPPING"  # the file that is there once the server is to end
FILE = ".stopping"  # in the server's temporary folder, where no served name begins with a dot
_OPEN = "/metrics"  # what watches the server counts to the end
_BODY = b'{"error": "This server is stopping: ask again, and another will answer"}'
_START = {
    "type": "http.response.start",
    "status": 503,
    "headers": [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(_BODY)).encode()),
        (b"retry-after", b"1"),
        (b"connection", b"close"),  # the next request over it would come here too
    ],
}


class Stopping:
    """An ASGI middleware, by vLLM's own flag `--middleware`: the last one, which is asked first."""

    def __init__(self, app: Any) -> None:
        self.app = app
        self.file = os.environ[STOPPING_VARIABLE]

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http" and scope["path"] != _OPEN and os.path.exists(self.file):
            while (await receive()).get("more_body"):  # or who is still sending it meets a reset, and no answer
                pass
            await send(_START)
            await send({"type": "http.response.body", "body": _BODY})
        else:
            await self.app(scope, receive, send)
