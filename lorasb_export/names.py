"""Which adapters a list of words means, and under which names they are served."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Sequence
from pathlib import Path

from .errors import SettingsError
from .fetch import parse_hub_id

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}")
# First words of the types of parts in chat requests (`text`, `image_url`). vLLM mistakes such a type for the name of an
# adapter, and would answer a request for the base with it.
PARTS_OF_CHATS = frozenset("audio file image input output prompt refusal text thinking tool video".split())


def check_name(name: str) -> str | None:
    """What is wrong with `name` as the name of a served model, or None. No name can leave a folder it is joined to."""
    if _NAME.fullmatch(name) and ".." not in name:
        return None
    return f"{name!r} cannot be served as a name: letters, digits, '.', '_' and '-', at most 96, no '..'"


def check_served_name(name: str) -> str | None:
    """What is wrong with `name` as that of an adapter in vLLM, or None. A task or a folder may be called so."""
    if name in PARTS_OF_CHATS:
        return f"{name!r} cannot be served as a name: vLLM would answer chats with the base by it. Serve it by another"
    return check_name(name)


def name_of(source: Path | str) -> str:
    """The last part of a folder's path as it is written, links and all, or of a Hub id."""
    if isinstance(source, Path):
        return os.path.basename(os.path.abspath(source))
    return source.partition("@")[0].rpartition("/")[2]


def resolve_adapters(names: Sequence[str], adapters_dir: Path) -> dict[str, Path | str]:
    """Served name → adapter folder, or Hub id, in the order given.

    Args:
        names: each a name under `adapters_dir`, the path of a folder, a Hub id, or `name=` before a path or Hub id.
        adapters_dir: the project's adapters, one folder each.

    Raises:
        SettingsError: nothing given, or any entry is unknown, badly named, given twice, or a link out of
            `adapters_dir`; all of them are reported at once.
    """
    if not names:
        raise SettingsError("no adapter to serve", fix="Name at least one, or give --model alone for a merged folder")
    found: dict[str, Path | str] = {}
    problems = []
    for entry in names:
        try:
            name, source = _resolve(entry, adapters_dir)
        except ValueError as error:
            problems.append(str(error))
            continue
        if problem := check_name(name):
            problems.append(f"{problem} (write NAME={entry})" if "=" not in entry else problem)
        elif name in found:
            problems.append(f"{name!r} is given twice (write OTHER_NAME={entry.partition('=')[2] or source})")
        else:
            found[name] = source
    if problems:
        raise SettingsError("; ".join(problems), where="--adapters", fix="Correct these entries")
    return found


def _resolve(entry: str, adapters_dir: Path) -> tuple[str, Path | str]:
    """(served name, source) of one entry; ValueError says what is wrong with it."""
    name, equals, value = entry.partition("=")
    if equals:
        if not value:
            raise ValueError(f"{entry!r} has nothing after '='")
        return name, _folder_or_hub_id(value)
    if "/" in entry:
        source = _folder_or_hub_id(entry)
        return name_of(source), source
    if problem := check_name(entry):
        raise ValueError(problem)
    return entry, _project_adapter(entry, adapters_dir)


def _folder_or_hub_id(value: str) -> Path | str:
    path = Path(os.path.expanduser(value))
    if path.is_dir():
        if not (path / "adapter_config.json").is_file():
            raise ValueError(f"{value!r} is a folder without adapter_config.json")
        return path
    if parse_hub_id(value):
        return value
    raise ValueError(f"{value!r} is neither a folder nor a Hub id")


def _project_adapter(name: str, adapters_dir: Path) -> Path:
    path, root = adapters_dir / name, adapters_dir.resolve()
    for item in (path, *path.glob("*")):
        if not item.resolve().is_relative_to(root):
            raise ValueError(f"{item} is a link that leads out of {adapters_dir} (give its path instead)")
    if (path / "adapter_config.json").is_file():
        return path
    raise ValueError(no_adapter(name, adapters_dir))


def adapters_in(folder: Path) -> list[str]:
    """Names of the adapters in `folder`, sorted, without hidden ones: those are being written."""
    return sorted(path.parent.name for path in folder.glob("[!.]*/adapter_config.json"))


def no_adapter(name: str, adapters_dir: Path) -> str:
    """What to say where `adapters_dir` has no adapter `name`: the nearest that it has, or all."""
    present = [name for name in adapters_in(adapters_dir) if not check_name(name)]
    near = difflib.get_close_matches(name, present, 1)
    hint = f"did you mean {near[0]}?" if near else f"there are: {', '.join(present) or 'none'}"
    return f"no adapter {name!r} in {adapters_dir} ({hint}; write ./{name} for a folder of that name)"
