"""A process that has imported everything and forks a `python -m` for each line it reads: starting one takes no time.

In: {"folder", "command", "logs", "signal", "after", "processes"}, where the command is a module, or a script, and its
words, and stdout and stderr go to the two logs; of several processes each is told what torchrun would tell it. Out,
when they have ended: {"code", "seconds"}, where the code is that of the first that failed, negative for a signal that
killed it. The process ends when its stdin does.

A signal of the one who asked comes when a child has become its command, or later: one that interrupts the hooks of
`os.fork` is lost, and leaves their locks shut. Who is still there _GRACE seconds after it is killed.
"""

from __future__ import annotations

import functools
import gc
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

import psutil

from integration import child_environment
from integration.torture.forks import (
    TORCHS_EXPORTER,
    end_with,
    fork_exporters,
    import_exporters,
    load_torchs_exporter,
    uninterrupted,
)

_GRACE = 120


class Zygote:
    """The parent's side. `variables` are added to the environment."""

    def __init__(self, **variables: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "integration.torture.zygote"],
            env={**child_environment("bitsandbytes"), "OMP_NUM_THREADS": "1", **variables},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def start(self, folder: Path, *words: str, log: Path, number: int = signal.SIGKILL, after: float = 600) -> None:
        """Begin `lorasb WORDS` in `folder`; it gets signal `number` if it runs `after` seconds. It writes to `log`."""
        self._ask(folder, ("lorasb_cli", *words), (log, log), number, after)

    def _ask(
        self,
        folder: Path,
        command: tuple[str, ...],
        logs: tuple[Path, Path],
        number: int,
        after: float,
        processes: int = 1,
    ) -> None:
        asked = {"folder": str(folder), "command": command, "signal": int(number), "after": after}
        asked["processes"] = processes
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({**asked, "logs": [str(log) for log in logs]}) + "\n")
        self._process.stdin.flush()

    def wait(self) -> tuple[int, float]:
        """Exit code and seconds of what was started last. Who is interrupted here has stopped the zygote."""
        assert self._process.stdout is not None
        try:
            ended = json.loads(self._process.stdout.readline())
        except BaseException:  # its answer would be taken for that of the next
            self.stop()
            raise
        return ended["code"], ended["seconds"]

    def run(
        self, *command: str, folder: Path, together: bool = False, processes: int = 1
    ) -> subprocess.CompletedProcess[str]:
        """What `python -m MODULE WORDS`, or `python SCRIPT.py WORDS`, does in `folder`.

        Args:
            together: what it says on stderr comes on stdout.
            processes: so many of them, as torchrun starts them: where one fails, the others get SIGTERM.
        """
        with tempfile.TemporaryDirectory() as place:
            out, errors = Path(place, "out"), Path(place, "out" if together else "errors")
            self._ask(folder, command, (out, errors), signal.SIGKILL, 600, processes)
            code, _ = self.wait()
            said = out.read_text(errors="replace"), "" if together else errors.read_text(errors="replace")
            return subprocess.CompletedProcess(command, code, *said)

    @property
    def has_ended(self) -> bool:
        return self._process.poll() is not None

    def stop(self) -> None:
        """End it, and what it runs."""
        with suppress(psutil.NoSuchProcess):
            its = psutil.Process(self._process.pid)
            for process in (its, *its.children(recursive=True)):
                with suppress(psutil.NoSuchProcess):
                    process.kill()
        self._process.wait()


def shared_zygote() -> Zygote:
    """One for all tests of this process; another, where one of them has stopped it."""
    if _zygote().has_ended:
        _zygote.cache_clear()
    return _zygote()


@functools.cache
def _zygote() -> Zygote:
    return Zygote()


def _serve() -> None:
    import lorasb_cli.main  # noqa: F401
    import matplotlib.backends.backend_agg  # noqa: F401
    import onnxruntime  # noqa: F401
    import torch
    import transformers
    from tqdm import tqdm

    from lorasb_export import calibrate, fit, merge, push  # noqa: F401
    from lorasb_export.exporting import onnx, peft  # noqa: F401

    assert transformers.LlamaForCausalLM  # loaded
    import_exporters()
    fork_exporters()
    # tqdm's own is one for all processes: a child that is killed while it holds it would keep it from all others.
    tqdm.set_lock(threading.RLock())
    torch.set_num_threads(1)
    gc.freeze()  # a child's collections would copy every page that it shares with this process
    for line in sys.stdin:
        asked, started = json.loads(line), time.monotonic()
        if asked["command"][0] == TORCHS_EXPORTER:
            load_torchs_exporter()
        with uninterrupted():
            pids = [os.fork() or _become(asked, variables) for variables in _of_torchrun(asked["processes"])]
        code, sent = 0, set[int]()
        while pids:
            for pid in list(pids):
                ended, status = os.waitpid(pid, os.WNOHANG)
                if ended:
                    pids.remove(pid)
                    code = code or os.waitstatus_to_exitcode(status)
                    with suppress(ProcessLookupError):  # an exporter that a killed one has left writes on
                        os.killpg(pid, signal.SIGKILL)
            late = time.monotonic() - started - asked["after"]
            for number, is_due in (
                (asked["signal"], late >= 0),
                (signal.SIGTERM, code != 0),
                (signal.SIGKILL, late >= _GRACE),
            ):
                if is_due and number not in sent:
                    sent.add(number)
                    for pid in pids:  # not reaped yet: it cannot be another process's pid
                        os.kill(pid, number)
            if pids:
                time.sleep(0.002 if sent else min(0.002, asked["after"]))
        print(json.dumps({"code": code, "seconds": time.monotonic() - started}), flush=True)


def _of_torchrun(processes: int) -> list[dict[str, str]]:
    """The variables of each of them; none of a single one."""
    if processes == 1:
        return [{}]
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    size = {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [{"RANK": str(rank), "LOCAL_RANK": str(rank), **size, **place} for rank in range(processes)]


def _become(asked: dict[str, Any], variables: dict[str, str]) -> NoReturn:
    """In the child: become `python -m MODULE WORDS`, or `python SCRIPT.py WORDS`."""
    os.setsid()
    os.environ |= variables
    os.chdir(asked["folder"])
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for stream, log in enumerate(asked["logs"], 1):
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), stream)
    name = asked["command"][0]
    sys.argv = asked["command"]
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if name.endswith(".py"):
        end_with(lambda: runpy.run_path(name, run_name="__main__"))
    end_with(lambda: runpy.run_module(name, run_name="__main__", alter_sys=True))


if __name__ == "__main__":
    _serve()
