"""What a verb says, as it may be written: harmless to a terminal, in the letters that stdout has."""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import sys
from collections.abc import Mapping
from typing import Any

import typer

# Of control characters a terminal would obey those that a file of somebody else's has; of Unicode's that turn the
# direction of writing, a reader might be misled; and bytes of a file's name that are no UTF-8 may not be printed at
# all. Escaped as here they are valid in JSON too.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def harmless(text: str) -> str:
    return _CONTROL.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


class Harmless(logging.Formatter):
    """Of the messages that are logged."""

    def format(self, record: logging.LogRecord) -> str:
        return harmless(super().format(record))


def print_out(text: str) -> None:
    """Write to stdout; where its reader has gone, as `head` goes, end as other tools do, without a word."""
    try:
        try:
            typer.echo(harmless(text))
        except UnicodeEncodeError:  # stdout is Latin-1, say
            typer.echo(_in_ascii(harmless(text)))
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains when it flushes it
        if isinstance(error, BrokenPipeError):
            raise SystemExit(128 + signal.SIGPIPE) from None
        raise


def _in_ascii(text: str) -> str:
    """With all else escaped as JSON has it: JSON still says the same."""
    return re.sub("[^\0-\x7f]", lambda found: json.dumps(found[0])[1:-1], text)


def as_json(value: Mapping[str, Any]) -> str:
    return json.dumps(value, ensure_ascii=False, default=str)


def parts_of(error: BaseException, message: str) -> dict[str, Any]:
    """What JSON says of an error."""
    parts = {name: getattr(error, name, None) for name in ("what", "where", "fix")}
    return {"type": type(error).__name__, "message": message, **parts}
