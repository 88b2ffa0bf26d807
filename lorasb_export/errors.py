"""One exception tree. Every message says what is wrong, where, and what to do."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import partial
from os import PathLike
from types import TracebackType
from typing import Any, Self


class LoraSBError(Exception):
    """Base of every error this package raises on purpose.

    Args:
        what: what is wrong, one clause.
        where: the file, key, module or row it was found in.
        fix: what the reader should do next, one sentence; "" where `what` lists errors with theirs.
    """

    def __init__(self, what: str, *, where: object = None, fix: str) -> None:
        super().__init__(what)
        self.what = what
        self.where = None if where is None else str(where)
        self.fix = fix

    def __str__(self) -> str:
        place = f" ({self.where})" if self.where else ""
        advice = f". {self.fix}" if self.fix else ""
        return f"{self.what}{place}{advice}"

    def __reduce__(self) -> tuple[Any, ...]:
        """An exception is pickled as a call of its class with `args`, which has no keywords."""
        return partial(type(self), self.what, where=self.where, fix=self.fix), (), vars(self)

    def alone(self) -> Self:
        """The same error without its traceback, which holds all that was in memory then."""
        return type(self)(self.what, where=self.where, fix=self.fix)


def some(items: Collection[object], most: int = 10) -> str:
    """Names or numbers for an error or a heading: the first of them, where there are thousands."""
    more = f" and {len(items) - most:,} more" if len(items) > most else ""
    return ", ".join(map(str, list(items)[:most])) + more


def first_line(error: BaseException) -> str:
    """The first line of another library's error, whose text may go on for pages; its class's name if it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


class ArtifactError(LoraSBError, ValueError):
    """A basis, adapter or model folder is damaged, foreign, or does not belong to the other one."""


class UnreadableError(ArtifactError):
    """It may be whole, but cannot be read here: a git-lfs pointer, another format version, or the system refuses."""


class BaseModelError(LoraSBError, ValueError):
    """The base model is missing, of an unsupported kind, or not the one an artifact was made for."""


class DataError(LoraSBError, ValueError):
    """Task data is missing, broken, or has nothing to learn from."""


class SettingsError(LoraSBError, ValueError):
    """A setting, in `lorasb.toml`, on the command line or in a call, is unknown or out of range."""


class OutputError(LoraSBError, OSError):
    """The target exists, the disk is full, or a port is taken; what was there is kept."""


class BusyError(OutputError):
    """Another process is writing the target; those beside it may be free."""


class TrainingError(LoraSBError, RuntimeError):
    """Training cannot start, continue or resume."""


class MissingPackageError(LoraSBError, ImportError):
    """An optional package that this step needs is not installed."""


class ServerError(LoraSBError, RuntimeError):
    """A child process (the vLLM server, an exporter) or a remote (the Hub) refused or failed.

    Attributes:
        silent: whether the Hub could say neither yes nor no: it was not reached, or fails (5xx).
        of_every_repository: whether another one would fare no better: the Hub is silent or refuses the token, or its
            client does not work here.
    """

    silent = False
    of_every_repository = False


# Where one command takes several tasks or adapters in turn, these errors end the current one alone.
PER_ITEM_ERRORS = (DataError, ArtifactError, BusyError, TrainingError)


def require_path(what: str, value: object, fix: str) -> None:
    """Raise SettingsError where `value` is no path: what is in memory would be looked for under its whole text."""
    if not isinstance(value, str | PathLike):
        raise SettingsError(f"{what} is a {type(value).__name__}, not a path or Hub id", fix=fix)


def some_problems(found: Mapping[str, LoraSBError], *, numbered: bool = False) -> str:
    """A line for each of the first, by name, where there are thousands. What there is least of comes first: one that is
    damaged is not lost among all classifiers."""
    alike = Counter(error.what for error in found.values())
    first = sorted(found, key=lambda name: alike[found[name].what])[:10]
    lines = [f"{f'{number}. ' * numbered}{name}: {found[name]}" for number, name in enumerate(first, 1)]
    return as_lines(lines, len(found))


def as_lines(lines: Sequence[str], of: int) -> str:
    """Lines of an error or a warning, and how many more there are."""
    more = [f"and {of - len(lines):,} more"] if of > len(lines) else []
    return "\n".join(f"  {line}" for line in (*lines, *more))


class Problems:
    """Collects errors of this package from `with` blocks, so that a user reads all of them at once."""

    def __init__(self, found: Iterable[LoraSBError] = ()) -> None:
        self.found = list(found)

    @property
    def is_full(self) -> bool:
        """Whether there are as many as somebody reads at once: ten."""
        return len(self.found) >= 10

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: TracebackType | None) -> bool:
        if isinstance(error, LoraSBError):
            self.found.append(error)
            return True
        return False

    def raise_all(self, outcome: str) -> None:
        """Raise the one error found, or one of the first's kind that lists all, up to ten.

        Args:
            outcome: what came of it, such as `nothing was written`.
        """
        if len(self.found) == 1:
            raise self.found[0]
        if self.found:
            lines = [f"{number}. {error}" for number, error in enumerate(self.found[:10], 1)]
            what = f"{len(self.found)} problems, {outcome}:\n{as_lines(lines, len(self.found))}"
            raise type(self.found[0])(what, fix="")


class Terminated(KeyboardInterrupt):
    """SIGTERM came. Unwinds like Ctrl-C, so that every `finally` runs; the CLI exits with 143."""
