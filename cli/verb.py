"""What every verb shares: --json, --quiet, --verbose, --config, one way to print, one way to fail.

A verb is a module with `run(run, …)`. It may also say `INTERRUPTED`, what is there after Ctrl-C and how to go on;
`SHARES_WORK`, that several processes of torchrun divide it; and `SAVES_MEMORY`, what to try where memory is full.
"""

from __future__ import annotations

import functools
import inspect
import logging
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields
from types import ModuleType
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer
from typer.models import OptionInfo

from lorasb_export.errors import LoraSBError, SettingsError, Terminated, first_line, some_problems
from lorasb_export.out_of_memory import is_out_of_memory

from .printing import Harmless, as_json, harmless, parts_of, print_out
from .words import given

if TYPE_CHECKING:
    from lorasb_export.project.project import Project

T = TypeVar("T")

JSON_HELP = "Print one JSON object on stdout, last."
QUIET_HELP = "No progress and no messages, only the result and errors."
VERBOSE_HELP = "Show the traceback of an error, and the logs of libraries."
NOTHING_WRITTEN = "No output was written."
CONFIG_HELP = "Project file.  [default: lorasb.toml in the current folder]"

_SHARED = {
    "json": (Annotated[bool, typer.Option("--json", help=JSON_HELP)], False),
    "quiet": (Annotated[bool, typer.Option("--quiet", "-q", help=QUIET_HELP)], False),
    "verbose": (Annotated[bool, typer.Option("--verbose", "-v", help=VERBOSE_HELP)], False),
    "config": (Annotated[str | None, typer.Option("--config", metavar="FILE", help=CONFIG_HELP)], None),
}


@dataclass(frozen=True)
class Run:
    """One call of a verb: its project and where its words go. Data on stdout, messages on stderr."""

    json: bool
    quiet: bool
    verbose: bool
    config: str | None
    options: Mapping[str, Any]  # the verb's own
    done: dict[str, Any] = field(default_factory=dict)  # before an error or a signal ended it: for --json, beside that

    def given(self, settings: type) -> dict[str, Any]:
        """The options that were given, of those that are called as a field of the dataclass `settings`."""
        return given(**{one.name: self.options.get(one.name) for one in fields(settings)})

    @functools.cached_property
    def project(self) -> Project:
        from lorasb_export.project.project import Project

        return Project.load(self.config)

    def say(self, message: str) -> None:
        if not self.quiet and _is_main_process():
            typer.echo(harmless(message), err=True)

    def result(self, value: dict[str, Any], text: str, failed: Mapping[str, LoraSBError] | None = None) -> None:
        """Print the outcome: `value` as JSON, or `text` for people. Under torchrun only the first process does.

        Args:
            failed: of several things to do those that failed, by name: told in one error, of many the first ten (JSON
                has all), and the exit code is 1.
        """
        if _is_main_process() and (self.json or text):
            print_out(as_json(value | _failures(failed)) if self.json else text)
        if failed:
            _tell_failures(failed)
            raise typer.Exit(1)

    def done_of(
        self,
        outcomes: Iterable[tuple[str, T | LoraSBError]],
        value: dict[str, Any],
        text: Callable[[], str],
        failed: dict[str, LoraSBError],
    ) -> Iterator[tuple[str, T]]:
        """Of several things those that were done, by name. What failed goes into `failed`. All is told also where an
        error ends the rest; where a signal does, by --json alone.

        Args:
            value, text, failed: as for `result`, to which they go at the end; the caller fills the first two.
        """
        try:
            for name, outcome in outcomes:
                if isinstance(outcome, LoraSBError):
                    if _received:  # a library made an error of the signal, which is of no one thing
                        raise outcome
                    failed[name] = outcome
                else:
                    yield name, outcome
        except (Exception, KeyboardInterrupt) as error:
            if failed or any(value.values()):
                self.done.update(value | _failures(failed))
                is_stopped = isinstance(error, KeyboardInterrupt) or bool(_received)
                if _is_main_process() and not (self.json or is_stopped) and (said := text()):
                    print_out(said)
            if failed:
                _tell_failures(failed)
            raise


def _failures(failed: Mapping[str, LoraSBError] | None) -> dict[str, Any]:
    """What --json prints besides."""
    return {"failed": {name: parts_of(error, str(error)) for name, error in failed.items()}} if failed else {}


def _tell_failures(failed: Mapping[str, LoraSBError]) -> None:
    if _is_main_process():
        lines = some_problems(failed, numbered=True)
        typer.echo(harmless(f"Error: not all was done, {len(failed):,} failed:\n{lines}"), err=True)


def _is_main_process() -> bool:
    """RANK alone says nothing: a cluster may set it for processes that know nothing of each other."""
    return _processes() == "1" or os.environ.get("RANK", "0") == "0"


def _processes() -> str:
    """How many torchrun has started."""
    return os.environ.get("WORLD_SIZE") or "1"


def as_command(function: Callable[..., None]) -> Callable[..., None]:
    """A typer command from a verb's `run(run, …)`: adds the shared options, turns known errors into exit codes."""
    signature = inspect.signature(function, eval_str=True)
    own, verb = list(signature.parameters.values())[1:], sys.modules[function.__module__]
    shared = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
        for name, (annotation, default) in _SHARED.items()
    ]
    flags = {one.name: flag for one in (*own, *shared) if (flag := _flag(one))}

    @functools.wraps(function)
    def command(**options: Any) -> None:
        _refuse_empty(options, flags)
        run = Run(**{name: options.pop(name) for name in _SHARED}, options=options)
        _calm_libraries(run)
        signal.signal(signal.SIGTERM, _stop)
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # a shell's background jobs ignore it
            signal.signal(signal.SIGINT, _stop)
        try:
            _refuse_processes(verb)
            from lorasb_export.hub.newest import asked_once  # only now: it takes a while

            with asked_once():
                function(run, **options)
        except KeyboardInterrupt as stop:
            raise _interrupted(run, verb, stop) from None
        except Exception as error:
            if _received:
                raise _interrupted(run, verb, error) from None
            if is_out_of_memory(error):
                error = _memory_error(error, getattr(verb, "SAVES_MEMORY", ()))
            if not isinstance(error, LoraSBError | OSError):
                if run.json and run.done:
                    print_error(error, str(error), run.done)
                raise
            if run.verbose:
                traceback.print_exc()
            _fail(run, error)

    del command.__wrapped__  # or typer reads the signature behind it
    parameters = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own] + shared
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {p.name: p.annotation for p in parameters}
    return command


def _flag(parameter: inspect.Parameter) -> str | None:
    """How the option is written; None of a word that has no flag, and of a TEXT, which may say nothing."""
    for info in getattr(parameter.annotation, "__metadata__", ()):
        if isinstance(info, OptionInfo) and info.metavar != "TEXT":
            written = [str(word) for word in (info.default, *(info.param_decls or ())) if str(word).startswith("--")]
            return "/".join(written) or f"--{parameter.name.replace('_', '-')}"
    return None


def _refuse_empty(options: Mapping[str, Any], flags: Mapping[str, str]) -> None:
    """Raise typer.BadParameter for an option that is empty, as of a shell's variable that is not set: something else
    would be done than was asked for."""
    for name, flag in flags.items():
        value = options.get(name)
        if "" in (value if isinstance(value, list) else [value]):
            raise typer.BadParameter(f"{flag} is empty: leave it out, or give a value")


def _refuse_processes(verb: ModuleType) -> None:
    """Raise SettingsError where torchrun has started several processes of a verb in which each would do all of it."""
    processes = _processes()
    if processes != "1" and not getattr(verb, "SHARES_WORK", False):
        name = verb.__name__.rpartition(".")[2]
        what = f"{processes} processes (WORLD_SIZE): only fit and calibrate share their work among several"
        raise SettingsError(what, fix=f"Start one without torchrun: lorasb {name}, or unset WORLD_SIZE")


_received: list[int] = []  # signals; what they raise inside of a library may come out as another error


def _stop(number: int, _: object) -> None:
    _received.append(number)
    raise Terminated if number == signal.SIGTERM else KeyboardInterrupt


def _interrupted(run: Run, verb: ModuleType, stop: BaseException) -> typer.Exit:
    """Say what is there and how to go on; with --json also what was done."""
    said = f"Interrupted. {getattr(verb, 'INTERRUPTED', NOTHING_WRITTEN)}"
    is_terminated = isinstance(stop, Terminated) or signal.SIGTERM in _received
    run.say(said)
    if run.json and run.done:
        with suppress(SystemExit, OSError):  # Ctrl-C in a terminal ends the reader of a pipe too
            print_error(Terminated() if is_terminated else KeyboardInterrupt(), said, run.done)
    return typer.Exit(143 if is_terminated else 130)


def _memory_error(error: Exception, ways: Sequence[str]) -> Exception:
    """With the verb's ways to need less of it."""
    what = f"out of memory ({first_line(error)})" if str(error).strip() else "out of memory"
    return LoraSBError(what, fix=f"Try {' or '.join(ways)}" if ways else "Free some, or use a larger machine")


def _fail(run: Run, error: Exception) -> None:
    if isinstance(error, OSError) and type(error).__module__ == "builtins":
        error = _in_our_words(error)
    typer.echo(harmless(f"Error: {error}"), err=True)
    if run.json:
        with suppress(OSError):  # that stdout cannot be written may be what is told
            print_error(error, str(error), run.done)
    raise typer.Exit(1)


def print_error(error: BaseException, message: str, done: Mapping[str, Any] | None = None) -> None:
    """What --json prints of an error. Under torchrun only the first process does; on stderr each tells of its own.

    Args:
        done: what was done before.
    """
    if _is_main_process():
        print_out(as_json({**(done or {}), "error": parts_of(error, message)}))


def _in_our_words(error: OSError) -> Exception:
    fix = "Check that it is there and can be read" if error.filename else "df -h and ulimit -a may say why"
    return LoraSBError(error.strerror or str(error), where=error.filename, fix=fix)


def _calm_libraries(run: Run) -> None:
    """Progress bars on a terminal, lines elsewhere; the libraries' own warnings only when asked for."""
    hushed = run.quiet or not _is_main_process()
    if hushed or not sys.stderr.isatty():
        os.environ["TQDM_DISABLE"] = os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    # Waiting OpenMP threads of torch give way soon. By default they spin, and on cores that another process uses
    # too that makes two threads slower than one; on idle cores this much shorter spin costs nothing.
    os.environ.setdefault("GOMP_SPINCOUNT", "20000")
    if logging.lastResort:  # it prints warnings where nobody has set up another way
        logging.lastResort.setFormatter(Harmless("%(message)s"))
    if hushed:
        logging.getLogger("lorasb_export").setLevel(logging.ERROR)
    elif not sys.stderr.isatty():
        printed = logging.StreamHandler()
        printed.setFormatter(Harmless("%(message)s"))
        logging.basicConfig(handlers=[printed])
        logging.getLogger("lorasb_export").setLevel(logging.INFO)
    if not run.verbose:
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it recommends another package
