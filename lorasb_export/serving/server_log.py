"""What vLLM logs, read while it runs: its last lines, why it failed, whether its engines are done."""

from __future__ import annotations

import contextlib
import re
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import IO

_LINES, _WIDTH = 20, 2000  # vLLM logs the names of thousands of adapters as one line
# What vLLM logs for every engine when it ends; with other words an end takes 10 s longer.
_ASKED, _DRAINED = "send sigterm to process EngineCore", "EngineCore: request processing complete"
# What it logs when its engine has died. Then it ends, unless it waits for something that the engine was to answer.
_DIED = "AsyncLLM output_handler failed."
_RECENT = 60.0  # seconds between an exception and the end that it is the cause of
_EXCEPTION = re.compile(r"(?:[^]]*\] )?((?:\w+\.)*\w*(?:Error|Exception)(?:: .*)?)$")  # behind vLLM's stamp


class ServerLog:
    """The log of one server.

    Attributes:
        lines: the last ones, each cut where it is very long.
    """

    def __init__(self, *, echo: bool, when_dead: Callable[[], None]) -> None:
        """`echo` copies it to stderr; `when_dead` is called at every line which says that an engine has died."""
        self.lines: deque[str] = deque(maxlen=_LINES)
        self._echo, self._when_dead = echo, when_dead
        self._asked = self._drained = 0  # engines that were asked to end, and those with nothing left to do
        self._is_up = False
        self._cause: str | None = None  # the first exception of a start; of a server that is up, the latest
        self._cause_at = 0.0
        self._reader: threading.Thread | None = None

    def read(self, stream: IO[bytes]) -> None:
        """Read `stream` to its end, in a thread."""
        self._reader = threading.Thread(target=self._read, args=(stream,), daemon=True)
        self._reader.start()

    def wait(self) -> None:
        """Until it was read to its end, but not for long: a child that outlives the server would hold it open."""
        if self._reader is not None:
            self._reader.join(timeout=5)

    def mark_up(self) -> None:
        """The server answers now: exceptions before did not stop it."""
        self._cause, self._is_up = None, True

    @property
    def is_drained(self) -> bool:
        """Whether every engine that was asked to end has nothing left to do."""
        return 0 < self._asked == self._drained

    @property
    def cause(self) -> str | None:
        """The exception that ended the server, if the log has one: not one that a request may have raised, days ago."""
        return None if self._is_up and time.monotonic() - self._cause_at > _RECENT else self._cause

    def _read(self, stream: IO[bytes]) -> None:
        for line in stream:
            text = line.decode(errors="replace")
            self.lines.append(text[:_WIDTH])
            self._asked += _ASKED in text
            self._drained += _DRAINED in text
            if _DIED in text:
                self._when_dead()
            found = _EXCEPTION.match(text.rstrip())
            # A line "See … for the root cause" counts only if no exception came before, as of a killed engine.
            if found and (self.cause is None or (self._is_up and "root cause" not in text)):
                self._cause, self._cause_at = found[1].rstrip("."), time.monotonic()
            if self._echo:
                with contextlib.suppress(OSError, ValueError):  # a closed stderr must not stop the reading
                    sys.stderr.write(text)
                    sys.stderr.flush()
