"""Who is answered while a server ends, and how long a connection to it is kept."""

from __future__ import annotations

import asyncio
import json
import tempfile
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from lorasb_export.serving.launcher import running_server
from lorasb_export.serving.stopping import STOPPING_VARIABLE, Stopping
from tests import serving
from tests.serving import answered, middlewares_of

folder, started, vllm_for_cpus = serving.folder, serving.started, serving.vllm_for_cpus


@pytest.mark.parametrize("key", ["", "s3cret"])
def test_who_refuses_new_requests_is_asked_first(
    folder: Path, started: Mock, tmp_path: Path, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("VLLM_API_KEY", key)
    extra = ["--middleware", "mine.Middleware"]
    with running_server({"stopping": folder / "a"}, mode="folded", extra=extra):
        command, variables, *_ = started.call_args.args
        flag = Path(variables[STOPPING_VARIABLE])
        assert middlewares_of(command)[-1] == "lorasb_export.serving.stopping.Stopping"
        assert flag.parent.is_dir()
        assert not flag.exists()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("given", [None, "75"])
def test_an_idle_connection_is_kept_for_longer_than_a_balancer_does(
    folder: Path, started: Mock, given: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("VLLM_HTTP_TIMEOUT_KEEP_ALIVE", raising=False)
    if given is not None:
        monkeypatch.setenv("VLLM_HTTP_TIMEOUT_KEEP_ALIVE", given)
    with running_server({"a": folder / "a"}, mode="folded"):
        assert started.call_args.args[1]["VLLM_HTTP_TIMEOUT_KEEP_ALIVE"] == (given or "620")


@pytest.mark.parametrize(
    ("kind", "path", "status"),
    [
        *(("http", path, 503) for path in ("/v1/completions", "/v1/models", "/health", "/", "/v1/load_lora_adapter")),
        ("http", "/metrics", 200),
        ("lifespan", None, 200),
    ],
)
def test_once_it_is_to_end_a_server_refuses_all_but_its_metrics(
    kind: str, path: str | None, status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("starlette")
    from starlette.responses import Response

    monkeypatch.setenv(STOPPING_VARIABLE, str(tmp_path / "flag"))
    app, scope = Stopping(Response()), {"type": kind, "path": path}
    assert answered(app, scope) == 200
    (tmp_path / "flag").touch()
    assert answered(app, scope) == status


def test_who_is_refused_is_told_when_to_ask_again_over_another_connection(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(STOPPING_VARIABLE, str(tmp_path))
    sent: list[dict[str, Any]] = []
    still_sent = [{"type": "http.request", "more_body": more} for more in (False, True, True)]

    async def receive() -> dict[str, Any]:
        return still_sent.pop()

    async def send(message: dict[str, Any]) -> None:
        assert not still_sent  # or the connection would be reset under a client that is still sending
        sent.append(message)

    asyncio.run(Stopping(None)({"type": "http", "path": "/v1/completions"}, receive, send))
    headers, body = dict(sent[0]["headers"]), sent[1]["body"]
    assert (headers[b"retry-after"], headers[b"connection"]) == (b"1", b"close")
    assert int(headers[b"content-length"]) == len(body)
    assert "stopping" in json.loads(body)["error"]
