"""The ONNX exporters' processes as forks of one that has imported what they need: of an export's 4 s, 3 are imports."""

from __future__ import annotations

import functools
import gc
import importlib
import os
import runpy
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from pathlib import Path
from typing import Any, NoReturn

import torch

TORCHS_EXPORTER = "lorasb_export.exporting.onnx_torch"
_EXPORTERS = ("onnxruntime_genai.models.builder", TORCHS_EXPORTER)
_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_run_program = subprocess.run

Run = Callable[..., subprocess.CompletedProcess[Any]]


def import_exporters() -> None:
    """For the forks to come."""
    for module in ("onnxruntime_genai.models.builder", "torch.onnx"):
        with suppress(ModuleNotFoundError):  # of genai: without it torch's exporter is taken
            importlib.import_module(module)


def fork_exporters() -> None:
    """From now on `subprocess.run` of `python -m` and an exporter is a fork of this process."""
    subprocess.run = exporters_by(_forked)  # type: ignore[assignment]


@functools.cache
def load_torchs_exporter() -> None:
    """What `torch.onnx.export` imports when it is first called, for the forks to come."""
    with redirect_stdout(sys.stderr):
        torch.onnx.export(torch.nn.Identity(), (torch.zeros(1),), dynamo=True, verbose=False)
    gc.freeze()


def exporters_by(forked: Callable[[list[str], Path], subprocess.CompletedProcess[str]]) -> Run:
    """`subprocess.run`, but an exporter, a module and its words to be run in a folder, is run by `forked`."""

    def run(command: list[str], **options: Any) -> subprocess.CompletedProcess[Any]:
        if command[:3] == [sys.executable, "-P", "-m"] and command[3] in _EXPORTERS:
            return forked(command[3:], options["cwd"])
        return _run_program(command, **options)

    return run


def _forked(command: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    """A fork that runs in `folder` and becomes `command`, a module and its words; what it says is read."""
    reading, writing = os.pipe()
    with uninterrupted():
        pid = os.fork()
    if not pid:
        torch.set_num_threads(1)  # here: torch makes its pool anew after a fork, and two threads at once may find none
        os.chdir(folder)
        for stream in (1, 2):
            os.dup2(writing, stream)
        os.close(writing)
        sys.argv = command
        end_with(lambda: runpy.run_module(command[0], run_name="__main__", alter_sys=True))
    os.close(writing)
    try:
        with open(reading, encoding="utf-8", errors="replace") as said:
            output = said.read()
    except BaseException:  # as the real one: an interrupt ends the child too
        os.kill(pid, signal.SIGKILL)
        raise
    return subprocess.CompletedProcess(command, os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), output)


@contextmanager
def uninterrupted() -> Iterator[None]:
    """SIGINT and SIGTERM wait until the end, or until `end_with`."""
    signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)


def end_with(main: Callable[[], object]) -> NoReturn:
    """Run `main` as the last thing of this process, and end as Python would end: with its code, or by Ctrl-C."""
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
        main()
    finally:  # every way out, typer's SystemExit too, ends here
        error = sys.exc_info()[1]
        if error is not None and not isinstance(error, SystemExit):
            sys.excepthook(type(error), error, error.__traceback__)
        code = error.code if isinstance(error, SystemExit) else int(error is not None)
        sys.stdout.flush()
        sys.stderr.flush()
        if isinstance(error, KeyboardInterrupt):
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGINT)
        os._exit(code if isinstance(code, int) else int(code is not None))
