"""The vLLM process: started, answered for, stopped."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import deque
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
from .shared import VERSIONS_VARIABLE
from .stopping import STOPPING_VARIABLE

SECONDS = 20  # for a server to end when it has answered all requests (vLLM takes 13); then it is killed
_ARRIVING = 1  # seconds for what came before new requests are refused to reach the engine, which drops what comes late
_LOG_LINES, _LOG_WIDTH = 20, 2000  # vLLM logs the names of thousands of adapters as one line
# What vLLM logs for every engine when it ends; with other words an end takes 10 s longer.
_ASKED, _DRAINED = "send sigterm to process EngineCore", "EngineCore: request processing complete"
# What it logs when its engine has died. Then it ends, unless it waits for something that the engine was to answer.
_DIED = "AsyncLLM output_handler failed."
_RECENT = 60.0  # seconds between an exception and the end that it is the cause of
_EXCEPTION = re.compile(r"(?:[^]]*\] )?((?:\w+\.)*\w*(?:Error|Exception)(?:: .*)?)$")  # behind vLLM's stamp


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
        self._asked = self._drained = 0  # engines that were asked to end, and those with nothing left to do
        self._is_up = self._was_killed = False
        self._end_of_dead: threading.Timer | None = None
        self._cause: str | None = None  # the first exception of a start; of a server that is up, the latest
        self._cause_at = 0.0
        self._command, self._variables, self._echo = command, variables, echo
        self._process: subprocess.Popen[bytes] | None = None
        self._guard: subprocess.Popen[bytes] | None = None
        self._log: deque[str] = deque(maxlen=_LOG_LINES)
        self._reader = threading.Thread(target=self._read_log, daemon=True)

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
            self._reader.start()
        while not self._answers():
            if self._process.poll() is not None:
                raise self._failed()
            time.sleep(0.2)
        self._cause, self._is_up = None, True  # exceptions before it was up did not stop it
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
            self._reader.join(timeout=5)  # a child that outlives the server would hold the log open

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
            idle = idle + 1 if 0 < self._asked == self._drained else 0

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

    def _read_log(self) -> None:
        stream = self._started.stdout
        assert stream is not None
        for line in stream:
            text = line.decode(errors="replace")
            self._log.append(text[:_LOG_WIDTH])
            self._asked += _ASKED in text
            self._drained += _DRAINED in text
            if _DIED in text and self._end_of_dead is None:
                self._end_of_dead = threading.Timer(SECONDS, self._kill_if_dead)
                self._end_of_dead.daemon = True
                self._end_of_dead.start()
            found = _EXCEPTION.match(text.rstrip())
            if found:
                self._forget_an_old_cause()
            # A line "See … for the root cause" counts only if no exception came before, as of a killed engine.
            if found and (self._cause is None or (self._is_up and "root cause" not in text)):
                self._cause, self._cause_at = found[1].rstrip("."), time.monotonic()
            if self._echo:
                with contextlib.suppress(OSError, ValueError):  # a closed stderr must not stop the reading
                    sys.stderr.write(text)
                    sys.stderr.flush()

    def _kill_if_dead(self) -> None:
        """Kill the server, which would wait for ever; but not where the words in its log were those of a prompt."""
        if self._started.poll() is not None or self._answers():
            self._end_of_dead = None
            return
        self._was_killed = True
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)

    def _forget_an_old_cause(self) -> None:
        """A request may have raised it, days ago."""
        if self._is_up and time.monotonic() - self._cause_at > _RECENT:
            self._cause = None

    def _failed(self) -> ServerError:
        self._reader.join(timeout=5)  # a child that outlives the server would hold the log open
        self._forget_an_old_cause()
        lines = "".join(f"  {line.rstrip()}\n" for line in self._log)
        what = f"the vLLM server ended with exit code {self._started.returncode}"
        if self._was_killed:
            what = f"the vLLM server was killed: its engine had died, and it did not end within {SECONDS} s"
        what = what if self._cause is None else f"{what}: {self._cause}"
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
