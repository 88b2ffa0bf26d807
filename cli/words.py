"""The words of options as values, and values as words for people."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from fnmatch import filter as matching
from typing import Any

import typer

from lorasb_export.errors import SettingsError, some
from lorasb_export.evaluation.metrics import better, lower_is_better

FORMS = "patterns of them such as 'eu-*', or @FILE with one a line"
_WORST = 5  # adapters that are named by each metric,
_SEVERAL = 10  # of more than so many


def listed(words: str) -> list[str]:
    """What stands between commas, or of `@FILE` on its lines; a comma or a line too many stands for nothing.

    Raises:
        SettingsError: the file cannot be read, or has nothing in it.
    """
    parts = _lines(words[1:]) if words.startswith("@") else words.split(",")
    return [word for part in parts if (word := part.strip())]


def spelled_out(words: Iterable[str], known: Callable[[], Iterable[str]]) -> list[str]:
    """Names, each once: of `@FILE` those on its lines, of a pattern such as `eu-*` those in `known` that it matches.

    A word with a `/` is a path or a Hub id, and no pattern.

    Raises:
        SettingsError: a file cannot be read, or has nothing in it; a pattern matches none.
    """
    found: list[str] = []
    for word in (one for given in words for one in (listed(given) if given.startswith("@") else [given])):
        is_pattern = "/" not in word and any(sign in word for sign in "*?[")
        if is_pattern and not (matched := matching(known(), word)):
            raise SettingsError("no name matches the pattern", where=word, fix="lorasb inspect --json lists all names")
        found += matched if is_pattern else [word]
    return list(dict.fromkeys(found))


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


def low_scores(scores: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> list[str]:
    """Which of the adapters are no better than their base by any metric, and, of many, which score worst by each.

    Args:
        scores: adapter → metric → its figures `adapter` and `base`. What is no number is passed over.
    """
    after = {name: _numbers(of_metric, "adapter") for name, of_metric in scores.items()}
    base = {name: _numbers(of_metric, "base") for name, of_metric in scores.items()}
    both = {name: after[name].keys() & base[name].keys() for name in scores}
    beats = {name: any(better(one, after[name][one], base[name][one]) for one in both[name]) for name in scores}
    lines = []
    if beaten := [name for name in scores if both[name] and not beats[name]]:
        lines.append(f"no better than the base: {some(beaten)}")
    for metric in sorted({metric for of_one in after.values() for metric in of_one}):
        values = {name: of_one[metric] for name, of_one in after.items() if metric in of_one}
        if len(values) > _SEVERAL:
            order = sorted(values, key=values.__getitem__, reverse=lower_is_better(metric))
            worst = [f"{name} {score(metric, values[name])}" for name in order[:_WORST]]
            lines.append(f"{'highest' if lower_is_better(metric) else 'lowest'} {metric}: {', '.join(worst)}")
    return lines


def _numbers(of_metric: Mapping[str, Mapping[str, Any]], which: str) -> dict[str, float]:
    return {metric: figures[which] for metric, figures in of_metric.items() if score(metric, figures.get(which)) != "-"}


def percentages(spread: Mapping[str, float]) -> str:
    """A mean over modules, with the least and the greatest."""
    return f"{spread['mean']:.0%} (by module {spread['min']:.0%} to {spread['max']:.0%})"
