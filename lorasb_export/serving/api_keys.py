"""The API keys: read, handed to the server in its environment, and found there. On no command line, and in no log."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from ..errors import SettingsError
from ..files.storage import expanded

_VLLMS = "VLLM_API_KEY"  # holds one
_SEVERAL = "LORASB_API_KEYS"  # one a line; vLLM's own is empty then, or vLLM would refuse all but that one
_SHORTEST = 16  # characters of each of several: no word of a comment, and no piece of a line


def api_key(file: str | Path | None) -> str:
    """The key clients have to give: that in `file` (or several, one a line), or else of the environment; "" without.

    Raises:
        SettingsError: `file` has none, or one fits into no header, or is too short to be one of several.
    """
    if file is None:
        where, found = _VLLMS, os.environ.get(_VLLMS, "")
        if not found:
            return ""
        lines = [found.strip()]
    else:
        where = str(file)
        try:
            found = expanded(file).read_text(encoding="ascii")
        except (OSError, ValueError) as error:
            raise SettingsError(f"cannot read the API key: {error}", where=where, fix="Check the path") from None
        lines = [line.strip() for line in found.strip().split("\n")]
        lines = [line for line in lines if line or len(lines) == 1]
    fix = "Make one, for instance with openssl rand -hex 32"
    if not all(line and line.isascii() and line.isprintable() for line in lines):
        raise SettingsError("the API key is not one line of ASCII text", where=where, fix=fix)
    if len(lines) > 1 and not all(len(line) >= _SHORTEST and " " not in line for line in lines):
        what = f"an API key of several, one a line, has less than {_SHORTEST} characters, or a space"
        raise SettingsError(what, where=where, fix=fix)
    return "\n".join(lines)


def as_variables(key: str) -> dict[str, str]:
    """What `api_key` returned as the server gets it in its environment; nothing where that is nothing."""
    if not key:
        return {}
    return {_VLLMS: "", _SEVERAL: key} if "\n" in key else {_VLLMS: key, _SEVERAL: ""}


def keys_in(variables: Mapping[str, str]) -> list[str]:
    """The keys among the server's variables."""
    return (variables.get(_SEVERAL) or variables.get(_VLLMS, "")).splitlines()
