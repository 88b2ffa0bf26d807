"""The API key: where it is read, whom it is handed to, and what is open without it."""

from __future__ import annotations

import asyncio
import logging
import os
import tempfile
from pathlib import Path
from typing import Any
from unittest.mock import AsyncMock, Mock

import pytest

from lorasb_export.errors import ArtifactError, SettingsError
from lorasb_export.serving import launcher, shared
from lorasb_export.serving.api_keys import api_key, as_variables, keys_in
from lorasb_export.serving.launcher import running_server, serve
from tests import serving
from tests.serving import answered, dry_run, middlewares_of

folder, started, vllm_for_cpus = serving.folder, serving.started, serving.vllm_for_cpus


@pytest.mark.parametrize("content", [None, b"", b"\n", b"two\nlines", b"\xff"])
def test_a_file_without_a_key_is_refused(folder: Path, tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "key").write_bytes(content)
    with pytest.raises(SettingsError, match="API key"):
        dry_run({"a": folder / "a"}, api_key_file=tmp_path / "key")


@pytest.mark.parametrize("key", ["\n", "two\nlines", "ключ", "\udcff"])
def test_a_key_of_the_environment_is_read_as_one_of_a_file(
    folder: Path, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_API_KEY", key)
    with pytest.raises(SettingsError, match=r"the API key is not one line.*\(VLLM_API_KEY\)"):
        dry_run({"a": folder / "a"})


def test_a_key_is_handed_on_without_the_end_of_its_line(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("vllm")
    handed: dict[str, str] = {}

    def start(command: list[str], variables: dict[str, str], url: str, **options: Any) -> Mock:
        handed.update(variables)
        return Mock()

    monkeypatch.setattr(launcher, "RunningServer", start)
    monkeypatch.setenv("VLLM_API_KEY", "s3cret\n")
    with running_server({"a": folder / "a"}, mode="folded"):
        assert handed["VLLM_API_KEY"] == "s3cret"


NEW, OLD = "n" * 32, "o" * 32


@pytest.mark.parametrize("content", [f"{NEW}\n{OLD}\n", f"\r\n{NEW}\r\n\r\n  {OLD}"])
def test_a_file_may_hold_several_keys(
    folder: Path, started: Mock, tmp_path: Path, content: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While clients change from one to the next. vLLM's own check, which knows one and no more, is left out then."""
    from starlette.responses import Response

    from lorasb_export.serving.key import AsksForKey

    monkeypatch.setenv("VLLM_API_KEY", "of-the-environment")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    (tmp_path / "keys").write_bytes(content.encode())
    with running_server({"a": folder / "a"}, mode="folded", api_key_file=tmp_path / "keys"):
        command, variables, *_ = started.call_args.args
    assert not any(key in word for key in (NEW, OLD) for word in command)
    assert "lorasb_export.serving.key.AsksForKey" in middlewares_of(command)
    assert variables["VLLM_API_KEY"] == ""
    assert keys_in(variables) == [NEW, OLD]
    monkeypatch.setattr(os, "environ", variables)
    app = AsksForKey(Response())
    scope: dict[str, Any] = {"type": "http", "method": "POST", "path": "/v1/completions"}
    for given in (NEW, OLD, f"{NEW}\n{OLD}", "of-the-environment", "", NEW[:-1]):
        scope["headers"] = [(b"authorization", f"Bearer {given}".encode())]
        assert answered(app, scope) == (200 if given in (NEW, OLD) else 401)


def test_one_key_is_vllms_whatever_was_exported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORASB_API_KEYS", f"{NEW}\n{OLD}")
    (tmp_path / "key").write_text("s3cret\n")
    assert keys_in(os.environ | as_variables(api_key(tmp_path / "key"))) == ["s3cret"]


@pytest.mark.parametrize(
    "other", ["# of production", "n" * 15, "ключ" * 4, "n" * 16 + "\t" + "n" * 16, "n" * 16 + " n"]
)
def test_what_is_no_key_among_several_is_refused_and_not_told(tmp_path: Path, other: str) -> None:
    """A comment, and a key that an editor has wrapped."""
    (tmp_path / "keys").write_text(f"{NEW}\n{other}\n", encoding="utf-8")
    with pytest.raises(SettingsError, match="API key") as caught:
        api_key(tmp_path / "keys")
    assert NEW not in str(caught.value)
    assert other not in str(caught.value)


def test_an_open_address_without_a_key_is_warned_about(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("vllm")
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    with caplog.at_level(logging.WARNING), pytest.raises(ArtifactError):
        serve({"a": "no/such/folder"}, host="0.0.0.0", port=0)
    assert "VLLM_API_KEY" in caplog.text
    caplog.clear()
    monkeypatch.setenv("VLLM_API_KEY", "s3cret")
    with caplog.at_level(logging.WARNING), pytest.raises(ArtifactError):
        serve({"a": "no/such/folder"}, host="0.0.0.0", port=0)
    assert not caplog.text


def test_the_key_is_asked_for_in_every_mode(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    assert middlewares_of(dry_run({"a": folder / "a"}, mode="folded")["command"]) == []
    monkeypatch.setenv("VLLM_API_KEY", "s3cret")
    for options in ({"adapters": {"a": folder / "a"}, "mode": "folded"}, {"adapters": (), "model": folder / "base"}):
        assert middlewares_of(dry_run(**options)["command"]) == ["lorasb_export.serving.key.AsksForKey"]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("kind", "method", "path", "status"),
    [
        ("http", "GET", "/health", 200),
        ("http", "GET", "/metrics", 200),
        ("http", "HEAD", "/health", 200),
        ("http", "HEAD", "/metrics", 200),
        ("http", "HEAD", "/v1/models", 401),
        ("http", "OPTIONS", "/v1/completions", 200),
        ("http", "POST", "/v1/completions", 401),
        ("http", "POST", "/invocations", 401),
        ("http", "POST", "/health", 401),
        ("http", "GET", "/health/", 401),
        ("http", "GET", "/", 401),
        ("websocket", None, "/health", 401),
    ],
)
def test_what_is_open_without_the_key(
    kind: str, method: str | None, path: str, status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("starlette")
    from starlette.responses import Response

    from lorasb_export.serving.key import AsksForKey

    monkeypatch.setenv("VLLM_API_KEY", "s3cret")
    scope: dict[str, Any] = {"type": kind, "method": method, "path": path, "headers": []}
    assert answered(AsksForKey(Response()), scope) == status
    scope["headers"] = [(b"authorization", b"Bearer s3cret")]
    assert answered(AsksForKey(Response()), scope) == 200


def test_a_load_balancer_may_ask_for_the_head_where_only_get_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """As of vLLM's /health: FastAPI gives a route the methods that it names, and 405 for HEAD."""
    fastapi = pytest.importorskip("fastapi")
    from lorasb_export.serving.key import AsksForKey

    monkeypatch.setenv("VLLM_API_KEY", "s3cret")
    app = fastapi.FastAPI()
    app.get("/health")(lambda: fastapi.Response())
    scope: dict[str, Any] = {"type": "http", "method": "HEAD", "path": "/health", "headers": [], "query_string": b""}
    assert answered(app, dict(scope)) == 405
    assert answered(AsksForKey(app), scope) == 200
    assert scope["method"] == "HEAD"  # by which uvicorn knows to send no body


@pytest.mark.parametrize(
    ("host", "key", "asks"),
    [("127.0.0.1", "", True), ("localhost", "", True), ("127.0.0.1", "s3cret", False), ("0.0.0.0", "", False)],
)
@pytest.mark.parametrize("options", [{"adapters": ("a",), "mode": "folded"}, {"adapters": (), "model": "base"}])
def test_without_a_key_loopback_is_asked_for(
    folder: Path, host: str, key: str, asks: bool, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("vllm")
    started = Mock()
    monkeypatch.setattr(launcher, "RunningServer", started)
    monkeypatch.setenv("VLLM_API_KEY", key)
    model = str(folder / options["model"]) if "model" in options else None
    adapters = {name: folder / name for name in options["adapters"]}
    with running_server(adapters, model=model, mode=options.get("mode", "auto"), host=host):
        command = started.call_args.args[0]
    assert ("lorasb_export.serving.key.AsksForLoopback" in middlewares_of(command)) == asks


@pytest.mark.parametrize(
    ("host", "status"),
    [
        *(
            (host, 200)
            for host in ("localhost", "LOCALHOST:8000", "127.0.0.1:8000", "[::1]:8000", "[::1]", "127.0.0.2")
        ),
        *((host, 200) for host in ("0.0.0.0:8000", "[::]:8000", "app.localhost:8000", "localhost.:8000", "")),
        *((host, 403) for host in ("evil.example:8000", "127.0.0.1.evil.example", "a@127.0.0.1.example", ":80", "[")),
        *((host, 403) for host in ("10.0.0.7:8000", "localhost.evil.example", "127.0.0.1, evil.example")),
    ],
)
def test_without_a_key_a_page_that_has_its_name_point_to_this_machine_is_refused(host: str, status: int) -> None:
    pytest.importorskip("starlette")
    from starlette.responses import Response

    from lorasb_export.serving.key import AsksForLoopback

    scope: dict[str, Any] = {"type": "http", "method": "POST", "path": "/v1/completions"}
    scope["headers"] = [(b"host", host.encode())]
    assert answered(AsksForLoopback(Response()), scope) == status
    assert answered(AsksForLoopback(Response()), {**scope, "headers": []}) == 200  # of HTTP/1.0, as health checks send
    assert answered(AsksForLoopback(Response()), {**scope, "type": "websocket"}) == status


def test_what_runs_when_a_server_starts_and_ends_is_let_through(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where one raises, uvicorn says that there is no such thing, and goes on without vLLM's."""
    pytest.importorskip("starlette")
    from lorasb_export.serving.key import AsksForKey, AsksForLoopback
    from lorasb_export.serving.shared.updates import Updates

    monkeypatch.setenv("VLLM_API_KEY", "s3cret")
    variables = (shared.BASIS_VARIABLE, shared.UPDATES_VARIABLE, shared.VERSIONS_VARIABLE, shared.BASE_VARIABLE)
    for name in variables:
        monkeypatch.setenv(name, str(folder / "a"))
    scope: dict[str, Any] = {"type": "lifespan", "asgi": {"version": "3.0", "spec_version": "2.0"}, "state": {}}
    receive, send = AsyncMock(), AsyncMock()
    middlewares: list[Any] = [AsksForKey, AsksForLoopback, Updates]
    for middleware in middlewares:
        app = AsyncMock()
        asyncio.run(middleware(app)(scope, receive, send))
        app.assert_awaited_once_with(scope, receive, send)
