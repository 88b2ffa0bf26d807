"""Requests: counted, matched to a route, checked for the token; and made to fail where a test wants that."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Lock, Thread
from typing import Any, ClassVar, Self
from urllib.parse import parse_qs, unquote, urlsplit

from .store import Repo, Store

TOKEN = "hf_loopback_planted_token"  # not a secret: this server's only token
USER = "me"


@dataclass
class Fault:
    """What goes wrong with the next `times` requests whose "METHOD path" `pattern` is found in.

    kind: `status`: answered with `status` and `headers`, nothing done; `cut`: the connection closes in the middle of
        the body; `lost`: the request is carried out and the connection closes without an answer; `damage`: the
        content of an upload, or of a download, is not what was sent.
    """

    pattern: str
    kind: str = "status"
    status: int = 500
    headers: dict[str, str] = field(default_factory=dict)
    times: int = 1


class Answer(Exception):
    """Ends a request with a status other than 200."""

    def __init__(self, status: int, text: str, code: str = "", **body: Any) -> None:
        super().__init__(text)
        self.status, self.body = status, {"error": text, **body}
        self.headers = {"X-Error-Message": text} | ({"X-Error-Code": code} if code else {})


class Violation(Answer):
    """A request that no correct client sends."""


class BaseServer(ThreadingHTTPServer):
    """The server: `url`, `repos`, `requests` ("METHOD path" of every call), `violations`, `faults` to come.

    `moved` maps the old name of a renamed repository to its new one.
    """

    daemon_threads = True

    def __init__(self, root: Path, port: int, handler: type[BaseHTTPRequestHandler]) -> None:
        super().__init__(("127.0.0.1", port), handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.store, self.repos, self.lock = Store(root), dict[str, Repo](), Lock()
        self.moved: dict[str, str] = {}
        self.requests: list[str] = []
        self.violations: list[str] = []
        self.faults: list[Fault] = []
        self._heads = self._bodies = 0

    @contextmanager
    def running(self) -> Iterator[Self]:
        """Serve in a thread. It ends with the block: it would poll the number of the closed socket forever."""
        with self:
            Thread(target=self.serve_forever, daemon=True).start()
            try:
                yield self
            finally:
                self.shutdown()

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # a client that went away, or a connection cut on purpose

    def count(self, head: int, body: int) -> None:
        self._heads += head
        self._bodies += body

    def bytes_received(self) -> int:
        """All bytes that clients sent: request lines, headers, bodies, and what xet wrote."""
        return self._heads + self.bytes_uploaded()

    def bytes_uploaded(self) -> int:
        """Bodies, and what xet wrote: nothing, as long as clients only ask."""
        return self._bodies + self.store.xet_bytes()

    def environment(self, home: Path, **changes: str) -> dict[str, str]:
        """What a client process needs in its environment to talk to this server and to nothing else."""
        fixed = {"HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_HUB_DISABLE_TELEMETRY": "1"}
        return {**fixed, "no_proxy": "127.0.0.1", "NO_PROXY": "127.0.0.1", "HF_TOKEN": TOKEN, **changes}


class BaseHandler(BaseHTTPRequestHandler):
    """Routes a request to the method that `routes` names: (method, path, name, who may call).

    Who: "token", "anyone", "no token", or "reader" (a token if the repository is private).
    """

    server: BaseServer
    protocol_version = "HTTP/1.1"
    routes: ClassVar[list[tuple[str, str, str, str]]]

    def handle_any(self) -> None:
        url = urlsplit(self.path)
        length = int(self.headers.get("Content-Length") or 0)
        self.fault = self._fault()
        kind = self.fault.kind if self.fault else ""
        self.body = self.rfile.read(length // 2 if kind == "cut" else length)
        self.query = parse_qs(url.query)
        with self.server.lock:
            self.server.count(len(self.raw_requestline) + len(bytes(self.headers)), len(self.body))
            self.server.requests.append(f"{self.command} {self.path}")
            if kind == "cut":
                self.close_connection = True
                return
            if kind == "damage" and self.command == "PUT":
                self.body = self.body[:-1] + bytes([self.body[-1] ^ 1])
            try:
                self._route(url.path)
            except Answer as answer:
                if isinstance(answer, Violation) and kind != "damage":
                    self.server.violations.append(f"{self.command} {self.path}: {answer}")
                self.reply(json.dumps(answer.body).encode(), answer.headers, answer.status)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = do_PATCH = handle_any

    def _fault(self) -> Fault | None:
        """The fault that this request meets, counted down."""
        with self.server.lock:
            for fault in self.server.faults:
                if fault.times > 0 and re.search(fault.pattern, f"{self.command} {self.path}"):
                    fault.times -= 1
                    return fault
        return None

    def _route(self, path: str) -> None:
        if self.fault and self.fault.kind == "status":
            raise self._failure(self.fault)
        for method, pattern, handler, who in self.routes:
            match = re.fullmatch(pattern, path)
            if match and re.fullmatch(method, self.command):
                parts = {name: unquote(value) for name, value in match.groupdict().items() if value}
                asked = parts.get("id", "")
                if asked in self.server.moved:
                    self.reply(b"", {"Location": self.path.replace(asked, self.server.moved[asked], 1)}, 307)
                    return
                repo, token = self.server.repos.get(asked), self.headers.get("Authorization")
                if who == "no token" and token:
                    raise Violation(400, "a token was sent to the storage")
                if token and token != f"Bearer {TOKEN}":
                    raise Answer(401, "Invalid credentials in Authorization header")
                if not token and (who == "token" or (who == "reader" and repo is not None and repo.private)):
                    raise Answer(401, "Invalid username or password.")
                if asked and repo is None:
                    raise Answer(404, "Repository not found", "RepoNotFound")
                getattr(self, handler)(**parts)
                return
        raise Violation(501, "this server does not know that request")

    @staticmethod
    def _failure(fault: Fault) -> Answer:
        answer = Answer(fault.status, "Invalid credentials in Authorization header" if fault.status == 401 else "fault")
        answer.headers |= fault.headers
        return answer

    def json(self, value: Any, headers: dict[str, str] | None = None, status: int = 200) -> None:
        self.reply(json.dumps(value).encode(), {"Content-Type": "application/json", **(headers or {})}, status)

    def reply(self, data: bytes, headers: dict[str, str] | None = None, status: int = 200) -> None:
        if self.fault and self.fault.kind == "lost":
            self.close_connection = True
            return
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        pass  # a test prints `requests` when it fails
