"""Ends a server whose `lorasb serve` was killed. A program of its own, which knows nothing of the rest.

Its standard input gives the server's process group and is held open by `lorasb serve`: it ends when that does, however
that may be. vLLM alone may wait for ever for requests that its engine, dead already, will not answer.
"""

from __future__ import annotations

import os
import signal
import sys
import time

SECONDS = 30  # for the server to end by itself; then it is killed


def main() -> None:
    words = sys.stdin.read().split()
    if not words:
        return
    group = int(words[0])
    try:
        os.killpg(group, signal.SIGTERM)
        end = time.monotonic() + SECONDS
        while time.monotonic() < end:
            time.sleep(0.2)
            os.killpg(group, 0)
        os.killpg(group, signal.SIGKILL)
    except ProcessLookupError:
        pass


if __name__ == "__main__":
    main()
