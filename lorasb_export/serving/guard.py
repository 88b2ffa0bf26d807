"""Ends a server whose `lorasb serve` was killed. A program of its own, which knows nothing of the rest.

Its standard input gives the server's process group and is held open by `lorasb serve`: it ends when that does, however
that may be. vLLM alone may wait for ever for requests that its engine, dead already, will not answer.

Its argument is for how many seconds the server may take to end by itself.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time


def main() -> None:
    words = sys.stdin.read().split()
    if not words:
        return
    group, end = int(words[0]), time.monotonic() + float(sys.argv[1])
    with contextlib.suppress(ProcessLookupError):
        os.kill(group, signal.SIGTERM)  # its first process: the others would drop what runs
        while time.monotonic() < end:
            time.sleep(0.2)
            os.kill(group, 0)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)


if __name__ == "__main__":
    main()
