"""The process that serves: its address, how it starts and fails, and how it ends."""

from __future__ import annotations

import errno
import os
import socket
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from lorasb_cli.main import app
from typer.testing import CliRunner

from lorasb_export.errors import MissingPackageError, OutputError, ServerError
from lorasb_export.serving import choosing, launcher, server_log
from lorasb_export.serving import server as server_module
from lorasb_export.serving.launcher import running_server, serve
from lorasb_export.serving.server import RunningServer
from lorasb_export.serving.shared import VERSIONS_VARIABLE
from lorasb_export.serving.stopping import STOPPING_VARIABLE
from tests import serving

folder, vllm_for_cpus = serving.folder, serving.vllm_for_cpus
PAUSE = "a pause"
MODELS = """
import http.server, os, signal, sys, threading, time
class Models(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b'{"data": [{"id": "base", "root": "the/model"}]}')
    def log_message(self, *words): pass
"""
ANSWERS_TWICE = f"""{MODELS}
server = http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Models)
server.handle_request()  # is it up
server.handle_request()  # its models
for line in sys.argv[2].split("\\n"):
    print(line, flush=True)
    time.sleep(2.5 * (line == "a pause"))
"""
ENDS_SLOWLY = f"""{MODELS}
def end(number, frame):
    print("asked", flush=True)
    if sys.argv[2] == "idle":
        print("[shutdown] Process manager: send sigterm to process EngineCore", flush=True)
        print("[shutdown] EngineCore: request processing complete; starting resource teardown", flush=True)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(60)
    time.sleep(2)
    open(sys.argv[3], "w").write("answered")
    os._exit(0)
signal.signal(signal.SIGTERM, end)
http.server.ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Models).serve_forever()
"""
# Told to end, it writes for how many seconds the file has been there by which new requests are refused.
SEES_FLAG = f"""{MODELS}
def end(number, frame):
    age = time.time() - os.stat(os.environ["LORASB_STOPPING"]).st_mtime
    open(sys.argv[2], "w").write(str(age))
    os._exit(0)
signal.signal(signal.SIGTERM, end)
http.server.ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Models).serve_forever()
"""
ASKS_FOR_KEY = f"""{MODELS}
class Keyed(Models):
    def do_GET(self):
        key = self.headers["Authorization"]
        print(key, file=open(sys.argv[2], "a"))
        if key is None and self.path != "/health" and "asks" in sys.argv:
            self.send_error(401)
        else:
            super().do_GET()
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Keyed).serve_forever()
"""
# A front end whose engine has died while it was to load an adapter: vLLM waits for the answer without an end.
ENGINE_DIED = "(APIServer pid=1) ERROR 11-26 12:54:14 [async_llm.py:906] AsyncLLM output_handler failed."
HANGS = f"""{MODELS}
server = http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Models)
if sys.argv[2] == "while running":
    server.handle_request()  # is it up
    server.handle_request()  # its models
if sys.argv[2] == "as a prompt says":
    threading.Thread(target=server.serve_forever, daemon=True).start()
else:
    server.server_close()
print("ValueError: the cause\\n{ENGINE_DIED}", flush=True)
time.sleep(600)
"""
KILLED = "core.EngineDeadError: See stack trace (above) for the root cause."
FAILS = """
print("[1, 2] " * 30000)  # as a prompt may be
print("(Worker pid=7) ERROR 11-26 12:54:14 [multiproc_executor.py:953] ValueError: the cause")
print("(EngineCore pid=6) ERROR 11-26 12:54:17 [core.py:1510] RuntimeError: what followed")
print("a line\\n" * 100)
print("RuntimeError: Engine core initialization failed. See root cause above.")
raise SystemExit(1)
"""


@pytest.fixture
def busy_port() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener.getsockname()[1]


@pytest.fixture
def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
        return port


def test_a_port_in_use_is_refused_before_anything_is_read(busy_port: int) -> None:
    with pytest.raises(OutputError, match=f"127.0.0.1:{busy_port}"):
        serve({"a": "no/such/folder"}, port=busy_port)


def test_an_address_of_another_machine_is_refused() -> None:
    with pytest.raises(OutputError, match="cannot listen"):
        serve({"a": "no/such/folder"}, host="192.0.2.1")


@pytest.mark.parametrize(
    ("error", "fix"),
    [
        (OSError(errno.EADDRINUSE, "taken"), "give another --port"),
        (OSError(errno.EACCES, "forbidden"), "Give a --port above 1023"),
        (OSError(errno.EADDRNOTAVAIL, "of another machine"), "Give --host an address of this machine"),
        (socket.gaierror(socket.EAI_NONAME, "no such name"), "Give --host an address of this machine"),
    ],
)
def test_what_is_advised_fits_why_nothing_can_listen(error: OSError, fix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("socket.socket.bind", Mock(side_effect=error))
    with pytest.raises(OutputError, match=rf"^cannot listen: {error.strerror} \(here:80\)\. .*{fix}"):
        launcher._claim_port("here", 80)


@pytest.mark.parametrize("port", ["70000", "-1"])
def test_a_number_that_is_no_port_is_refused(port: str) -> None:
    done = CliRunner().invoke(app, ["serve", "--model", "model", "--port", port])
    assert done.exit_code == 2
    assert "--port" in done.output


def test_without_vllm_the_extra_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(MissingPackageError, match=r"pip install '\.\[cpu\]'"):
        serve({"a": folder / "a"}, port=0)


def test_a_server_that_dies_at_start_leaves_its_last_lines_and_no_folder(
    folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pytest.importorskip("vllm")
    monkeypatch.setattr(choosing, "why_unavailable", lambda: None)  # as if the plugin were installed
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    options = {"extra": ["--no-such-flag"], "dtype": "float32", "mode": "shared"}
    with pytest.raises(ServerError) as caught, running_server({"a": folder / "a"}, **options):  # type: ignore[arg-type]
        pass
    assert "no-such-flag" in str(caught.value)
    assert "or try --mode folded" in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_a_start_that_fails_names_its_cause() -> None:
    """vLLM's own is a hundred lines of tracebacks above the end, by several processes."""
    command, url = [sys.executable, "-c", FAILS], "http://127.0.0.1:1"
    server = RunningServer(command, os.environ, url, echo=False, advice="Try another. ")
    began = time.monotonic()
    try:
        with pytest.raises(ServerError, match=r"exit code 1: ValueError: the cause\. Try another\. Its last lines:"):
            server.start()
    finally:
        server.stop()
    assert time.monotonic() - began < 20, "the time goes as the square of a line's length"


def test_the_error_of_a_start_with_thousands_of_names_is_no_megabyte() -> None:
    server = RunningServer(
        [sys.executable, "-c", "print('x' * 2_000_000)"], os.environ, "http://127.0.0.1:1", echo=False
    )
    try:
        with pytest.raises(ServerError) as caught:
            server.start()
    finally:
        server.stop()
    assert len(str(caught.value)) < 3000


@pytest.mark.parametrize(
    ("count", "line"), [(2, "Serving base, a1, a2 on"), (10_001, "Serving base and 10,001 adapters on")]
)
def test_of_many_models_the_number_is_told(
    folder: Path, monkeypatch: pytest.MonkeyPatch, log: pytest.LogCaptureFixture, count: int, line: str
) -> None:
    models = ["base", *(f"a{number}" for number in range(1, count + 1))]

    echoed = []

    def serve(*arguments: Any, on_ready: Any, echo: bool, **options: Any) -> int:
        on_ready({"url": "http://127.0.0.1:8000", "models": models, "pid": 1})
        echoed.append(echo)
        return 0

    monkeypatch.setattr("lorasb_export.serving.launcher.serve", serve)
    for words in ([], ["--quiet"]):
        done = CliRunner().invoke(app, ["serve", "--adapters-dir", str(folder), "--adapters", "a", *words])
        assert line in done.output
    assert echoed == [True, False]  # the server's log


def test_a_server_on_an_address_of_ipv6_is_found_there() -> None:
    assert [launcher._url(host, 8000) for host in ("::", "::1")] == ["http://[::1]:8000"] * 2
    with socket.socket(socket.AF_INET6) as taken:
        try:
            taken.bind(("::1", 0))
        except OSError:
            pytest.skip("no IPv6 here")
        taken.listen()
        with pytest.raises(OutputError, match="cannot listen"):
            launcher._claim_port("::1", taken.getsockname()[1])
    assert launcher._claim_port("::1", 0) > 0


def test_a_long_path_is_no_place_for_sockets() -> None:
    """Theirs has room for about a hundred characters."""
    assert launcher._keep_inside("/tmp/" + "x" * 60) == {}


@pytest.mark.parametrize(
    ("log", "cause"),
    [
        (f"ConnectionError: just before\nAssertionError: the cause\n{KILLED}", ": AssertionError: the cause"),
        (KILLED, f": {KILLED[:-1]}"),
        (f"RuntimeError: of a request\n{PAUSE}\n{KILLED}", f": {KILLED[:-1]}"),
        (f"RuntimeError: of a request\n{PAUSE}", ""),
    ],
)
def test_a_server_that_ends_though_nobody_stopped_it_has_failed(
    log: str, cause: str, free_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When its engine dies, vLLM's front end closes as if it had been asked to."""
    monkeypatch.setattr(server_log, "_RECENT", 2)
    command = [sys.executable, "-c", ANSWERS_TWICE, str(free_port), log, "the/model"]
    url = f"http://127.0.0.1:{free_port}"
    server = RunningServer(command, os.environ, url, echo=False, advice="Start otherwise. ")
    try:
        server.start()
        with pytest.raises(ServerError) as caught:
            server.wait()
        lines = "".join(f"\n  {line}" for line in log.splitlines())
        assert f"exit code 0{cause}. Its last lines:" in str(caught.value)
        assert str(caught.value).endswith(lines)
    finally:
        server.stop()


@pytest.mark.parametrize("when", ["at start", "while running"])
def test_a_server_that_outlives_its_engine_is_killed(
    when: str, free_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server_module, "SECONDS", 1)
    command = [sys.executable, "-c", HANGS, str(free_port), when, "the/model"]
    server = RunningServer(command, os.environ, f"http://127.0.0.1:{free_port}", echo=False)
    try:
        if when == "while running":
            server.start()
        ends = server.wait if when == "while running" else server.start
        with pytest.raises(ServerError, match=r"its engine had died, and it did not end within 1 s: ValueError: the"):
            ends()
    finally:
        server.stop()


def test_a_prompt_in_the_log_kills_no_server(free_port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "SECONDS", 1)
    command = [sys.executable, "-c", HANGS, str(free_port), "as a prompt says", "the/model"]
    server = RunningServer(command, os.environ, f"http://127.0.0.1:{free_port}", echo=False)
    try:
        server.start()
        while not any(ENGINE_DIED in line for line in server._log.lines):
            time.sleep(0.05)
        if (timer := server._end_of_dead) is not None:  # else it has looked by now
            timer.join()
        assert server._started.poll() is None
        assert server._answers()
    finally:
        server.stop()


def test_another_server_that_started_on_the_port_is_not_taken_for_ours(
    free_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM listens late, so that two may take a port for free. The other may serve the same; it is not told our key."""
    url = f"http://127.0.0.1:{free_port}"
    first = RunningServer([sys.executable, "-c", ENDS_SLOWLY, str(free_port), "the/model"], os.environ, url, echo=False)
    waits = [sys.executable, "-c", "import time; time.sleep(60)", "the/model"]
    second = RunningServer(waits, os.environ, url, echo=False)
    try:
        first.start()
        with monkeypatch.context() as patch:
            patch.setattr(second, "_get", lambda path: b"" if path == "/health" else pytest.fail("asked"))
            with pytest.raises(OutputError, match="another server answers there"):
                second.start()
        second.stop()
        second = RunningServer([*waits[:-1], "another/model"], os.environ, url, echo=False)
        monkeypatch.setattr(server_module, "listens", lambda session, port: None)  # where the system does not tell
        with pytest.raises(OutputError, match="another server answers there"):
            second.start()
    finally:
        second.stop()
        first.stop()


@pytest.mark.parametrize("asks", [True, False])
def test_where_the_system_does_not_tell_who_listens_the_key_goes_to_who_asks_for_one(
    free_port: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asks: bool
) -> None:
    monkeypatch.setattr(server_module, "listens", lambda session, port: None)
    url, told = f"http://127.0.0.1:{free_port}", tmp_path / "told"
    program = [sys.executable, "-c", ASKS_FOR_KEY, str(free_port), str(told), "the/model", *(["asks"] if asks else [])]
    server = RunningServer(program, {**os.environ, "VLLM_API_KEY": "s3cret"}, url, echo=False)
    try:
        with nullcontext() if asks else pytest.raises(OutputError, match="another server answers there"):
            server.start()
    finally:
        server.stop()
    assert told.read_text().split() == ["None", "None", *(["Bearer", "s3cret"] if asks else [])]


def test_an_adapter_that_a_client_has_loaded_before_we_ask_is_ours(
    free_port: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who deploys tries to load until it works, and may be quicker."""
    monkeypatch.setattr(server_module, "listens", lambda session, port: None)  # where the system does not tell
    loaded = ANSWERS_TWICE.replace("the/model", str(tmp_path / "versions" / "a-0123"))
    command = [sys.executable, "-c", loaded, str(free_port), PAUSE]
    for versions, is_ours in (("versions", True), ("others", False)):
        variables = {**os.environ, VERSIONS_VARIABLE: str(tmp_path / versions)}
        server = RunningServer(command, variables, f"http://127.0.0.1:{free_port}", echo=False)
        try:
            with nullcontext() if is_ours else pytest.raises(OutputError, match="another server answers there"):
                server.start()
        finally:
            server.stop()
        assert server.models == (["base"] if is_ours else [])


def test_a_server_that_fails_before_it_names_its_models_is_not_another(free_port: int) -> None:
    dies = ANSWERS_TWICE.replace(
        "server.handle_request()  # its models", "print('ValueError: why', flush=True); os._exit(1)"
    )
    command = [sys.executable, "-c", f"import os\n{dies}", str(free_port), "", "the/model"]
    server = RunningServer(command, os.environ, f"http://127.0.0.1:{free_port}", echo=False)
    try:
        with pytest.raises((ServerError, ConnectionError)) as caught:
            server.start()
        assert "another server" not in str(caught.value)
    finally:
        server.stop()


@pytest.mark.parametrize("seconds", [0, 10])
@pytest.mark.parametrize("by", ["us", "the guard"])
def test_a_running_request_gets_its_time(
    seconds: int, by: str, free_port: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The guard ends the server of a `lorasb serve` that was killed."""
    monkeypatch.setattr(server_module, "SECONDS", 0)
    answer = tmp_path / "answer"
    command = [sys.executable, "-c", ENDS_SLOWLY, str(free_port), "busy", str(answer), "the/model"]
    server = RunningServer(command, os.environ, f"http://127.0.0.1:{free_port}", echo=False, drain=seconds)
    server.start()
    if by == "the guard":
        assert server._guard is not None
        assert server._guard.stdin is not None
        server._guard.stdin.close()
        server._guard.wait()
    server.stop()
    assert answer.exists() == (seconds > 0)


def test_a_server_with_nothing_to_do_is_not_waited_for(free_port: int) -> None:
    """vLLM would take 13 s."""
    command = [sys.executable, "-c", ENDS_SLOWLY, str(free_port), "idle", "", "the/model"]
    server = RunningServer(command, os.environ, f"http://127.0.0.1:{free_port}", echo=False, drain=20)
    server.start()
    began = time.monotonic()
    server.stop()
    assert time.monotonic() - began < 5


def test_new_requests_are_refused_before_the_server_is_told_to_end(
    free_port: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that none reaches vLLM while it ends, which would answer it with 200 and an empty text."""
    monkeypatch.setattr(server_module, "SECONDS", 0)
    flag, seen = tmp_path / "flag", tmp_path / "seen"
    command = [sys.executable, "-c", SEES_FLAG, str(free_port), str(seen), "the/model"]
    variables = {**os.environ, STOPPING_VARIABLE: str(flag)}
    server = RunningServer(command, variables, f"http://127.0.0.1:{free_port}", echo=False, drain=10)
    server.start()
    assert not flag.exists()
    server.stop()
    assert float(seen.read_text()) > 0.9


def test_a_server_whose_folder_was_cleaned_away_is_stopped_all_the_same(free_port: int, tmp_path: Path) -> None:
    command = [sys.executable, "-c", ENDS_SLOWLY, str(free_port), "busy", str(tmp_path / "answer"), "the/model"]
    variables = {**os.environ, STOPPING_VARIABLE: str(tmp_path / "gone" / "flag")}
    server = RunningServer(command, variables, f"http://127.0.0.1:{free_port}", echo=False, drain=10)
    server.start()
    server.stop()
    assert (tmp_path / "answer").exists()


@pytest.mark.parametrize("host", ["", "localhost", "0.0.0.0"])
def test_a_server_is_asked_at_an_address_not_at_a_name(host: str) -> None:
    """Of which there may be two, with another server behind one of them."""
    assert launcher._url(host, 8000) == "http://127.0.0.1:8000"
