"""Which adapters a list of words means, and under which names they are served."""

from __future__ import annotations

import difflib
import logging
import os
import re
from collections.abc import Callable, Collection, Sequence
from functools import cache
from pathlib import Path

from .errors import ArtifactError, Problems, SettingsError, some
from .files.kind import ADAPTER_CONFIG, artifact_kind
from .files.storage import expanded, names_in
from .hub.cache import leads_out
from .hub.ids import NAME

logger = logging.getLogger(__name__)

PLACE = "{name}"  # stands for an adapter's name, where one word is given for many
_NAME = re.compile(NAME)
# First words of the types of parts in chat requests (`text`, `image_url`). vLLM mistakes such a type for the name of an
# adapter, and would answer a request for the base with it.
PARTS_OF_CHATS = frozenset("audio file image input output prompt refusal text thinking tool video".split())
# What else has a name where adapters have theirs.
_TAKEN = {"base": "the base model answers by it", "runs": "TensorBoard's files lie in the folder of that name"}
_MAX_UNNAMED = 32  # each answer takes seconds, and what is asked is told at the end


def name_problem(name: str, use: str = "be served as a name") -> str | None:
    """What is wrong with `name`, or None. No name can leave a folder it is joined to.

    Args:
        use: what it cannot do then, in the words of who asks.
    """
    if _NAME.fullmatch(name) and ".." not in name:
        return None
    return f"{name!r} cannot {use}: use letters, digits, '.', '_' and '-', at most 96, no '..'"


def task_name_problem(name: str) -> str | None:
    """What is wrong with `name` as that of a project's task, or None."""
    if name in _TAKEN:
        return f"{name!r} cannot name a task: {_TAKEN[name]}"
    return name_problem(name)


def served_name_problem(name: str) -> str | None:
    """What is wrong with `name` as that of an adapter in vLLM, or None. A task or a folder may be called so."""
    if name in PARTS_OF_CHATS:
        return f"{name!r} cannot be served as a name: vLLM would answer chats with the base by it"
    return name_problem(name)


def name_of(source: Path | str) -> str:
    """The last part of a folder's path as it is written, links and all, or of a Hub id."""
    if isinstance(source, Path):
        return os.path.basename(os.path.abspath(source))
    return source.partition("@")[0].rpartition("/")[2]


def look_up_adapter(word: str, adapters_dir: Path) -> Path | str | None:
    """The folder or Hub id that a word means: an adapter in `adapters_dir` by its name, else a folder, else a Hub id.

    A word with a `/` that is neither is given back: who reads it says so. One that can only be a name, and is that of
    none, is None (`unknown_adapter`). To ask for thousands takes no list of adapters.
    """
    path = expanded(word)
    if word != path.name or word.startswith("."):
        return path if path.is_dir() else word
    folders = (adapters_dir / word, path)
    return next(filter(_may_be_adapter, folders), None)


def unknown_adapter(
    name: str, adapters_dir: Path, tasks: Collection[str], list_adapters: Callable[[Path], Sequence[str]]
) -> SettingsError:
    """The error that no adapter is called `name`, with the nearest that there is, or all.

    Args:
        tasks: names that `lorasb fit` can make an adapter for.
        list_adapters: `adapters_in`, or what remembers its answer.
    """
    if name in tasks:
        return SettingsError(f"task {name} has no adapter yet", where=adapters_dir, fix=f"Run: lorasb fit {name}")
    present = [name for name in list_adapters(adapters_dir) if not name_problem(name)]
    what, path = f"no adapter {name!r}", f"./{name} for a folder elsewhere"
    if not present:
        fix = f"Run lorasb fit in the project's folder, or write {path}"
        return SettingsError(f"{what}, nor any other", where=adapters_dir, fix=fix)
    known = difflib.get_close_matches(name, present, 1) or present
    return SettingsError(what, where=adapters_dir, fix=f"Write {some(known)} or {path}")


def resolve_adapters(
    words: Sequence[str], adapters_dir: Path, tasks: Collection[str] = (), *, pass_over: bool = False
) -> dict[str, Path | str]:
    """Served name → adapter folder, or Hub id, in the order given.

    Args:
        words: as for `look_up_adapter`, each alone or with `name=` before it. A folder of such a name is not parted.
        pass_over: leave out with a warning what would be an error, if anything is left.

    Raises:
        SettingsError: any is unknown, badly named, given twice, or a link out of `adapters_dir`; up to ten of them are
            reported at once.
    """
    found: dict[str, Path | str] = {}
    problems, list_adapters = Problems(), cache(adapters_in)
    for entry in words:
        with problems:
            *given, word = [entry] if (adapters_dir / entry).is_dir() else entry.split("=", 1)
            source = look_up_adapter(word, adapters_dir)
            if source is None:
                raise unknown_adapter(word, adapters_dir, tasks, list_adapters)
            if "/" not in word and source == adapters_dir / word:
                _refuse_links_out(adapters_dir / word, adapters_dir)
            name = given[0] if given else name_of(source)
            if problem := name_problem(name):
                raise SettingsError(problem, fix=f"Write NAME={word}")
            if name in found:
                raise SettingsError(f"{name!r} is given twice", fix=f"Write OTHER_NAME={word}")
            found[name] = source
        if problems.is_full and not pass_over:
            break
    if not (pass_over and found):
        problems.raise_all("nothing is served")
    for error in problems.found:
        logger.warning("Passed over: %s", error)
    return found


def refuse_many(names: Collection[str], where: Path) -> None:
    """Raise SettingsError for more adapters than one question should go to though nobody named them."""
    if len(names) > _MAX_UNNAMED:
        what = f"there are {len(names):,} adapters, and at most {_MAX_UNNAMED} are asked where none is named"
        raise SettingsError(what, where=where, fix="Name some with --adapters")


def _refuse_links_out(folder: Path, adapters_dir: Path) -> None:
    for item in (folder, *folder.glob("*")):
        if leads_out(item, adapters_dir):
            raise SettingsError(f"{item} is a link that leads out of {adapters_dir}", fix="Give its path instead")


def adapters_in(folder: Path) -> list[str]:
    """Names of the adapters in `folder`, sorted, without hidden ones: those are being written.

    Raises:
        UnreadableError: the folder cannot be read.
    """
    return sorted(name for name in names_in(folder) if not name.startswith(".") and _may_be_adapter(folder / name))


def _may_be_adapter(folder: Path) -> bool:
    """Whether it has an adapter's config, or cannot be looked into: who loads it says so."""
    try:
        os.stat(folder / ADAPTER_CONFIG)  # Path.exists says, by Python's version, that it is not there
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return False
    except OSError:
        return name_problem(folder.name) is None  # none is called lost+found, as on a disk of its own
    return True


def ours_in(folder: Path) -> list[str]:
    """As `adapters_in`, for who takes all that are there: without other tools' adapters, of which a warning tells.

    What cannot be read stays: who loads it says so.
    """
    names = []
    for name in adapters_in(folder):
        try:
            is_ours = artifact_kind(folder / name) == "adapter"
        except ArtifactError:
            is_ours = True
        if is_ours:
            names.append(name)
        else:
            logger.warning("Passed over: %s is no LoRA-SB adapter", folder / name)
    return names
