"""The vLLM process: started, answered for, stopped."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from http.client import HTTPException
from urllib.request import ProxyHandler, Request, build_opener

from ..errors import ServerError

_STOP_SECONDS = 30  # for the server to end by itself; then it is killed
_LOG_LINES = 20
_PR_SET_PDEATHSIG = 1  # prctl(2)


class RunningServer:
    """A vLLM server in a process group of its own.

    Attributes:
        url: where it answers, without `/v1`.
        models: the names it serves, the base first.
    """

    def __init__(self, command: Sequence[str], variables: Mapping[str, str], url: str, echo: bool) -> None:
        self.url = url
        self.models: list[str] = []
        self._command, self._variables, self._echo = command, variables, echo
        self._process: subprocess.Popen[bytes] | None = None
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
        """Start the process and wait until it answers. Raises ServerError when it ends before."""
        with _signals_held():
            # A session of its own: the terminal's Ctrl-C reaches only us, and we stop the server with its children.
            self._process = subprocess.Popen(
                self._command,
                env=self._variables,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=_end_with_parent(),
            )
        self._reader.start()
        while not self._answers("/health"):
            if self._process.poll() is not None:
                raise self._failed()
            time.sleep(0.2)
        self.models = [card["id"] for card in json.loads(self._get("/v1/models"))["data"]]

    def wait(self) -> int:
        """Wait until the server ends by itself; returns 0. Raises ServerError when it failed."""
        if self._started.wait() != 0:
            raise self._failed()
        return 0

    def stop(self) -> None:
        """Ask the server to stop, then kill what is left of it; an interrupt meanwhile kills at once."""
        if self._process is None:
            return
        try:
            self._process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(_STOP_SECONDS)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._reader.join()

    def _answers(self, path: str) -> bool:
        try:
            self._get(path)
        except (OSError, HTTPException):
            return False
        return True

    def _get(self, path: str) -> bytes:
        headers = {"Authorization": f"Bearer {self._variables.get('VLLM_API_KEY', '')}"}
        opener = build_opener(ProxyHandler({}))  # the server is on this machine, whatever http_proxy says
        with opener.open(Request(self.url + path, headers=headers), timeout=10) as response:
            content: bytes = response.read()
        return content

    def _read_log(self) -> None:
        stream = self._started.stdout
        assert stream is not None
        for line in stream:
            text = line.decode(errors="replace")
            self._log.append(text)
            if self._echo:
                with contextlib.suppress(OSError, ValueError):  # a closed stderr must not stop the reading
                    sys.stderr.write(text)
                    sys.stderr.flush()

    def _failed(self) -> ServerError:
        self._reader.join(timeout=5)  # a child that outlives the server would hold the log open
        lines = "".join(f"  {line.rstrip()}\n" for line in self._log)
        code = self._started.returncode
        return ServerError(f"the vLLM server ended with exit code {code}", fix=f"Its last lines:\n{lines.rstrip()}")


def _end_with_parent() -> Callable[[], object] | None:
    """What a child calls so that the kernel stops it when we are killed; None where there is no such call.

    It goes by the thread that starts the child, so only the main thread, which ends with the process, does it.
    """
    if sys.platform != "linux" or threading.current_thread() is not threading.main_thread():
        return None
    return partial(ctypes.CDLL(None).prctl, _PR_SET_PDEATHSIG, signal.SIGTERM)


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
