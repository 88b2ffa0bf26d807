"""A process that has imported everything and forks a `lorasb` for each line it reads: starting one takes no time.

In: {"folder", "words", "log", "signal", "after"}; out, when the child has ended: {"code", "seconds"}, where the code is
negative for a signal that killed it.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from integration import child_environment
from integration.torture.forks import end_with, fork_exporters


class Zygote:
    """The parent's side. `variables` are added to the environment."""

    def __init__(self, **variables: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "integration.torture.zygote"],
            env={**child_environment(), "OMP_NUM_THREADS": "1", **variables},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def start(self, folder: Path, *words: str, log: Path, number: int = signal.SIGKILL, after: float = 600) -> None:
        """Begin `lorasb WORDS` in `folder`; it gets signal `number` if it runs `after` seconds. It writes to `log`."""
        asked = {"folder": str(folder), "words": words, "log": str(log), "signal": int(number), "after": after}
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(asked) + "\n")
        self._process.stdin.flush()

    def wait(self) -> tuple[int, float]:
        """Exit code and seconds of what was started last."""
        assert self._process.stdout is not None
        ended = json.loads(self._process.stdout.readline())
        return ended["code"], ended["seconds"]

    def stop(self) -> None:
        self._process.kill()
        self._process.wait()


def _serve() -> None:
    import torch
    import transformers
    from lorasb_cli.main import main

    from lorasb_export import calibrate, fit, merge, push  # noqa: F401
    from lorasb_export.exporting import onnx, peft  # noqa: F401

    assert transformers.LlamaForCausalLM  # loaded
    fork_exporters()
    torch.set_num_threads(1)
    for line in sys.stdin:
        asked, started = json.loads(line), time.monotonic()
        pid = os.fork()
        if not pid:
            _run(asked, main)
        while time.monotonic() - started < asked["after"]:
            if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                break
            time.sleep(min(0.002, asked["after"]))
        else:
            os.kill(pid, asked["signal"])  # not reaped yet: it cannot be another process's pid
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        print(json.dumps({"code": code, "seconds": time.monotonic() - started}), flush=True)


def _run(asked: dict[str, object], main: Callable[[], object]) -> NoReturn:
    """In the child: become `lorasb WORDS`."""
    os.chdir(str(asked["folder"]))
    log = os.open(str(asked["log"]), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    for stream in (1, 2):
        os.dup2(log, stream)
    words = asked["words"]
    assert isinstance(words, list)
    sys.argv = ["lorasb", *words]
    signal.signal(signal.SIGINT, signal.default_int_handler)
    end_with(main)


if __name__ == "__main__":
    _serve()
