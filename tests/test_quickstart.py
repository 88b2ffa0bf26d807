"""How the quickstart asks the server that it has started."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest

from lorasb_export.data.task import task_of
from lorasb_export.errors import ServerError
from lorasb_export.quickstart import line

ANSWER = b'{"id": "1", "object": "chat.completion", "created": 1, "model": "a", "choices": [{"index": 0, "message": \
{"role": "assistant", "content": "2"}, "finish_reason": "stop"}]}'


class Completions(BaseHTTPRequestHandler):
    status = 200

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(self.status)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(ANSWER)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Iterator[line._Line]:
    """Of a task of one row, what would be asked; its server is there."""
    pytest.importorskip("openai")
    with HTTPServer(("127.0.0.1", 0), Completions) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()

        @contextmanager
        def running(*_: Any, **__: Any) -> Iterator[SimpleNamespace]:
            yield SimpleNamespace(url=f"http://127.0.0.1:{server.server_port}")

        monkeypatch.setattr(line, "running_server", running)
        row = {"prompt": "1+1=", "completion": "2"}
        found = line._Line({"a": task_of("a", {"train": [row], "test": [row]})}, Mock())
        monkeypatch.setattr(found, "limit", lambda *_: 4)
        yield found
        server.shutdown()


def test_no_proxy_is_asked_for_the_way_to_this_machine(asked: line._Line, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    line._ask_server(asked, {}, Mock())
    assert asked.answers["a"]["served"] == ["2"]


def test_what_the_server_refuses_is_our_error(asked: line._Line, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Completions, "status", 400)
    with pytest.raises(ServerError, match=r"vLLM did not answer: Error code: 400.*--no-serve"):
        line._ask_server(asked, {}, Mock())
