"""The words of options as values, and values as words for people."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import typer

from lorasb_export.errors import SettingsError


def listed(words: str) -> list[str]:
    """What stands between commas, or of `@FILE` on its lines; a comma or a line too many stands for nothing.

    Raises:
        SettingsError: the file cannot be read, or has nothing in it.
    """
    parts = _lines(words[1:]) if words.startswith("@") else words.split(",")
    return [word for part in parts if (word := part.strip())]


def _lines(name: str) -> list[str]:
    """Those of a file: Linux takes 128 KiB in one word of a command, four thousand names."""
    from lorasb_export.files.storage import expanded

    fix = "After @ give a file with one name a line"
    try:
        text = expanded(name).read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise SettingsError(f"cannot read a list of names: {reason}", where=name, fix=fix) from None
    if not text.strip():
        raise SettingsError("the list of names is empty", where=name, fix=fix)
    return text.splitlines()


def parse_pairs(option: str, form: str, words: list[str] | None) -> dict[str, str]:
    """The words of a repeatable `option` of the form `NAME=…`, as a dict. Raises typer.BadParameter."""
    pairs = {}
    for word in words or []:
        name, equals, value = word.partition("=")
        if not equals or not name or not value:
            raise typer.BadParameter(f"{option}: {word!r} is not {form}")
        if name in pairs:
            raise typer.BadParameter(f"{option}: {name!r} is given twice")
        pairs[name] = value
    return pairs


def human_bytes(count: float) -> str:
    """1234567 → 1.2 MB."""
    for unit in ("B", "KB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def given(**options: Any) -> dict[str, Any]:
    """The options that were given: those that are not None."""
    return {name: value for name, value in options.items() if value is not None}


def score(metric: str, value: object) -> str:
    """A value of one of our metrics; what is no number, as None of a base that has no score, as a dash."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return "-"
    return f"{value:.1%}" if metric in ("exact_match", "accuracy") else f"{value:.4f}"


def percentages(spread: Mapping[str, float]) -> str:
    """A mean over modules, with the least and the greatest."""
    return f"{spread['mean']:.0%} (by module {spread['min']:.0%} to {spread['max']:.0%})"
