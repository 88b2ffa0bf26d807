"""The vLLM process: started, answered for, stopped."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from http.client import HTTPException
from pathlib import Path
from typing import NoReturn
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import ProxyHandler, Request, build_opener

from ..errors import OutputError, ServerError
from . import guard
from .api_keys import keys_in
from .listening import listens
from .server_log import ServerLog
from .shared import VERSIONS_VARIABLE
from .stopping import STOPPING_VARIABLE

SECONDS = 20  # for a server to end when it has answered all requests (vLLM takes 13); then it is killed
_ARRIVING = 1  # seconds for what came before new requests are refused to reach the engine, which drops what comes late


class RunningServer:
    """A vLLM server in a process group of its own.

    Attributes:
        url: where it answers, without `/v1`.
        models: the names it serves, the base first.
        pid: of the process.
    """

    def __init__(
        self,
        command: Sequence[str],
        variables: Mapping[str, str],
        url: str,
        *,
        echo: bool,
        advice: str = "",
        drain: int = 0,
    ) -> None:
        """`advice` is what else to try, a sentence for the error of a server that did not start.

        `drain` is for how many seconds the command lets running requests finish.
        """
        self.url = url
        self.models: list[str] = []
        self._advice, self._drain = advice, drain
        self._is_up = self._was_killed = False
        self._end_of_dead: threading.Timer | None = None
        self._command, self._variables = command, variables
        self._process: subprocess.Popen[bytes] | None = None
        self._guard: subprocess.Popen[bytes] | None = None
        self._log = ServerLog(echo=echo, when_dead=self._end_soon)

    @property
    def pid(self) -> int:
        return self._started.pid

    @property
    def _started(self) -> subprocess.Popen[bytes]:
        assert self._process is not None
        return self._process

    def start(self) -> None:
        """Start the process and wait until it answers.

        Raises:
            ServerError: it ended before, or was killed because its engine had died.
            OutputError: another server answers in its place.
        """
        with _signals_held():
            # Sessions of their own: the terminal's Ctrl-C reaches only us, and we stop the server with its children.
            self._guard = subprocess.Popen(
                [sys.executable, "-I", "-S", guard.__file__, str(self._drain + SECONDS)],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
            assert self._guard.stdin is not None
            tell = self._guard.stdin.fileno()
            self._process = subprocess.Popen(
                self._command,
                env=self._variables,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=lambda: os.write(tell, b"%d\n" % os.getpid()),  # here: we may be killed at any moment
            )
            assert self._process.stdout is not None
            self._log.read(self._process.stdout)
        while not self._answers():
            if self._process.poll() is not None:
                raise self._failed()
            time.sleep(0.2)
        self._is_up = True
        self._log.mark_up()
        try:
            self.models = self._models()
        except OutputError:  # ours is not
            self._is_up = False
            raise

    def _models(self) -> list[str]:
        """The names that are served; OutputError where another server answers, before it is told the key.

        vLLM holds its port for a long time before it listens on it, and so may another. Where the system does not tell
        who listens, one that asks for a key, as ours does, is told it.
        """
        port = urlsplit(self.url).port
        assert port is not None
        another = OutputError("another server answers there", where=self.url, fix="Stop it, or give another --port")
        is_child = listens(self.pid, port)
        if is_child is False:
            raise self._failed() if self._ends() else another
        words, versions = set(self._command), self._variables.get(VERSIONS_VARIABLE)
        key = next(iter(keys_in(self._variables)), "")
        try:
            if key and is_child is None and not self._asks_for_key():
                raise another
            cards = json.loads(self._get("/v1/models", key))["data"]
            roots = [card["root"] for card in cards if f"{card['id']}={card['root']}" not in words]
            # Those under `versions` were loaded by a client who was quicker than we are.
            are_ours = all(r in words or (versions and Path(r).is_relative_to(versions)) for r in roots)
        except (OSError, HTTPException, ValueError, LookupError, TypeError):
            if self._ends():
                raise self._failed() from None
            if is_child:
                raise
            raise another from None
        if not are_ours:
            raise another
        return [card["id"] for card in cards]

    def _ends(self) -> bool:
        """Whether our server has ended, or will within a second: its port is closed before it is gone."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._started.wait(1)
        return self._started.poll() is not None

    def wait(self) -> NoReturn:
        """Wait until the server ends by itself, or is killed because its engine has died, and raise ServerError: nobody
        has stopped it, so it failed.

        Its exit code says nothing: it is 0 when the engine died under a front end that then closed.
        """
        self._started.wait()
        raise self._failed()

    def stop(self) -> None:
        """Let running requests finish, then kill what is left of the server; an interrupt meanwhile kills at once."""
        try:
            if self._process is not None:
                self._stop(self._process)
        finally:
            if self._guard is not None:
                _end(self._guard)

    def _stop(self, process: subprocess.Popen[bytes]) -> None:
        try:
            if self._is_up:
                self._refuse_new_requests(process)
                process.terminate()  # the front end alone: workers would drop what runs
                self._wait_for_requests(process)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)  # vLLM takes 10 s longer to end its workers itself
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(SECONDS)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            self._log.wait()

    def _refuse_new_requests(self, process: subprocess.Popen[bytes]) -> None:
        """Have them answered with 503, where the server was started with what does that, and let those before it in."""
        if STOPPING_VARIABLE in self._variables:
            with contextlib.suppress(OSError, subprocess.TimeoutExpired):  # its folder is gone, or the disk full
                Path(self._variables[STOPPING_VARIABLE]).touch()
                process.wait(_ARRIVING)

    def _wait_for_requests(self, process: subprocess.Popen[bytes]) -> None:
        end, idle = time.monotonic() + self._drain, 0
        while process.poll() is None and time.monotonic() < end and idle < 10:  # for a second: the last words are sent
            time.sleep(0.1)
            idle = idle + 1 if self._log.is_drained else 0

    def _answers(self) -> bool:
        try:
            self._get("/health")
        except (OSError, HTTPException):
            return False
        return True

    def _asks_for_key(self) -> bool:
        try:
            self._get("/v1/models")
        except HTTPError as error:
            return error.code == 401
        return False

    def _get(self, path: str, key: str = "") -> bytes:
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        opener = build_opener(ProxyHandler({}))  # the server is on this machine, whatever http_proxy says
        with opener.open(Request(self.url + path, headers=headers), timeout=10) as response:
            content: bytes = response.read()
        return content

    def _end_soon(self) -> None:
        """See to it that a server whose engine has died ends."""
        if self._end_of_dead is None:
            self._end_of_dead = threading.Timer(SECONDS, self._kill_if_dead)
            self._end_of_dead.daemon = True
            self._end_of_dead.start()

    def _kill_if_dead(self) -> None:
        """Kill the server, which would wait for ever; but not where the words in its log were those of a prompt."""
        if self._started.poll() is not None or self._answers():
            self._end_of_dead = None
            return
        self._was_killed = True
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)

    def _failed(self) -> ServerError:
        self._log.wait()
        lines = "".join(f"  {line.rstrip()}\n" for line in self._log.lines)
        what = f"the vLLM server ended with exit code {self._started.returncode}"
        if self._was_killed:
            what = f"the vLLM server was killed: its engine had died, and it did not end within {SECONDS} s"
        if (cause := self._log.cause) is not None:
            what = f"{what}: {cause}"
        advice = "" if self._is_up else self._advice
        return ServerError(what, fix=f"{advice}Its last lines:\n{lines.rstrip()}")


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    assert process.stdin is not None
    process.stdin.close()


@contextmanager
def _signals_held() -> Iterator[None]:
    """Hold signals back while a child is created: one that interrupted it would leave a child nobody knows of."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    held: list[int] = []
    signals = (signal.SIGINT, signal.SIGTERM)
    before = [(number, signal.signal(number, lambda number, frame: held.append(number))) for number in signals]
    try:
        yield
    finally:
        for signum, handler in before:
            signal.signal(signum, handler)
        for received in held:
            signal.raise_signal(received)
