"""A process that has imported everything and forks a `lorasb` for each line it reads: starting one takes no time.

What that runs with `python -m` is a fork again, for the same reason: of an ONNX export's 4 seconds 3 are imports.

In: {"folder", "words", "log", "signal", "after"}; out, when the child has ended: {"code", "seconds"}, where the code is
negative for a signal that killed it.
"""

from __future__ import annotations

import importlib
import json
import os
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from lorasb_export import environment

_run_program = subprocess.run


class Zygote:
    """The parent's side. `variables` are added to the environment."""

    def __init__(self, **variables: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "integration.torture.zygote"],
            env={**environment.child_environment(), "OMP_NUM_THREADS": "1", **variables},
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
    environment.hide_broken_packages()
    import torch
    import transformers
    from lorasb_cli.main import main

    from lorasb_export import calibrate, fit, merge, push  # noqa: F401
    from lorasb_export.export import onnx, peft  # noqa: F401

    assert transformers.LlamaForCausalLM  # loaded
    for name in ("onnxruntime_genai.models.builder", "onnxruntime", "onnx"):
        importlib.import_module(name)
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
    subprocess.run = _run_module  # type: ignore[assignment]
    _end_with(main)


def _run_module(command: list[str], *, cwd: Path, stdout: int, **_: object) -> subprocess.CompletedProcess[str]:
    """`subprocess.run` of `python -m MODULE …` in `cwd`, with both streams read: a fork that becomes it."""
    assert (*command[:2], stdout) == (sys.executable, "-m", subprocess.PIPE)
    reading, writing = os.pipe()
    pid = os.fork()
    if not pid:
        subprocess.run = _run_program
        os.chdir(cwd)
        for stream in (1, 2):
            os.dup2(writing, stream)
        os.close(writing)
        sys.argv = command[2:]
        _end_with(lambda: runpy.run_module(command[2], run_name="__main__", alter_sys=True))
    os.close(writing)
    try:
        with open(reading, encoding="utf-8", errors="replace") as said:
            output = said.read()
    except BaseException:  # as the real one: an interrupt ends the child too
        os.kill(pid, signal.SIGKILL)
        raise
    return subprocess.CompletedProcess(command, os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), output)


def _end_with(main: Callable[[], object]) -> NoReturn:
    """Run `main` as the last thing of this process."""
    try:
        main()
    finally:  # every way out, typer's SystemExit too, ends here
        error = sys.exc_info()[1]
        if error is not None and not isinstance(error, SystemExit):
            sys.excepthook(type(error), error, error.__traceback__)
        code = error.code if isinstance(error, SystemExit) else int(error is not None)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 0)


if __name__ == "__main__":
    _serve()
