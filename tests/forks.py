"""Processes of a test's own that need not import everything again."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
from collections.abc import Callable

FORK = multiprocessing.get_context("fork")
_VERSION = 0x20080522  # of Linux's capabilities
_MAY_READ_ALL = 1 << 1 | 1 << 2  # CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH


def exit_code_of_a_fork(run: Callable[[], object]) -> int | None:
    """What `run` raises is an exit code of 1. One that has not ended in ten minutes is killed."""
    child = FORK.Process(target=run)
    child.start()
    child.join(600)
    child.kill()
    return child.exitcode


def give_up_roots_rights() -> None:
    """From now on this process is refused the folders that their owner is refused; root's is not, usually."""
    if os.geteuid() != 0:
        return
    system, header, sets = ctypes.CDLL(None), (ctypes.c_uint32 * 2)(_VERSION, 0), (ctypes.c_uint32 * 6)()
    assert system.capget(header, sets) == 0
    sets[0] &= ~_MAY_READ_ALL  # of those in effect
    assert system.capset(header, sets) == 0
