"""Ctrl-C and SIGTERM end a command with 130 and 143 and one clear line, wherever they meet it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import pytest

LIBRARY = """
import os, signal, sys, time
import typer
from lorasb_cli.verb import Run, as_command

def run(run: Run) -> None:
    try:  # native code that calls Python may turn what a signal raises there into an error of its own
        os.kill(os.getpid(), int(sys.argv.pop()))
        time.sleep(5)
    except KeyboardInterrupt:
        raise ValueError("no shape") from None

app = typer.Typer()
app.command()(as_command(run))
app(args=[])
"""
DONE = """
import os, signal
import typer
from lorasb_cli.verb import Run, as_command

def outcomes():
    yield "a", 1
    os.kill(os.getpid(), signal.SIGINT)

def run(run: Run) -> None:
    done = {}
    for name, outcome in run.done_of(outcomes(), {"done": done}, lambda: "", {}):
        done[name] = outcome

app = typer.Typer()
app.command()(as_command(run))
app(args=["--json"])
"""
STOPPED = """
import os, signal
import typer
from lorasb_export.errors import DataError
from lorasb_cli.verb import Run, as_command

def outcomes():
    yield "a", 1
    try:
        os.kill(os.getpid(), signal.SIGTERM)
    except KeyboardInterrupt:
        if "OF ONE" in os.environ:
            yield "b", DataError("no rows")
            print("goes on")
        raise ValueError("no shape") from None

def run(run: Run) -> None:
    done = {}
    for name, outcome in run.done_of(outcomes(), {"done": done}, lambda: "a is done", {}):
        done[name] = outcome

app = typer.Typer()
app.command()(as_command(run))
app()
"""
EARLY = """
import os, signal
from lorasb_cli import main
main.app = lambda: os.kill(os.getpid(), signal.SIGINT)
main.main()
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_library_that_makes_an_error_of_the_signal_does_not_hide_it(number: signal.Signals, code: int) -> None:
    done = subprocess.run([sys.executable, "-c", LIBRARY, str(int(number))], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (code, "Interrupted. No output was written.\n")


def test_what_was_done_is_told_and_the_reader_may_have_been_interrupted_too() -> None:
    """As Ctrl-C ends both sides of a pipe in a terminal."""
    done = subprocess.run([sys.executable, "-c", DONE], capture_output=True, text=True)
    assert (done.returncode, list(json.loads(done.stdout))) == (130, ["done", "error"])
    reads, writes = os.pipe()
    os.close(reads)
    unread = subprocess.run([sys.executable, "-c", DONE], stdout=writes, stderr=subprocess.PIPE, text=True)
    os.close(writes)
    assert (unread.returncode, unread.stderr) == (130, "Interrupted. No output was written.\n")


@pytest.mark.parametrize("of_one", [{}, {"OF ONE": "1"}], ids=["of all", "of one thing"])
def test_a_signal_that_comes_out_as_an_error_is_one_also_after_some_is_done(of_one: dict[str, str]) -> None:
    """People are told that in a line, and programs what was done."""
    run, environment = [sys.executable, "-c", STOPPED], os.environ | of_one
    told = subprocess.run(run, capture_output=True, text=True, env=environment)
    assert (told.returncode, told.stdout, told.stderr) == (143, "", "Interrupted. No output was written.\n")
    printed = json.loads(subprocess.run([*run, "--json"], capture_output=True, text=True, env=environment).stdout)
    assert (printed["done"], printed["error"]["type"]) == ({"a": 1}, "Terminated")


def test_a_signal_before_the_verb_begins() -> None:
    done = subprocess.run([sys.executable, "-c", EARLY], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (130, "Interrupted. No output was written.\n")
