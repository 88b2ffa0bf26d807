"""Find a folder: on this disk, or on the Hub. Tokens are left to huggingface_hub."""

from __future__ import annotations

import difflib
import logging
import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from ..errors import ArtifactError, LoraSBError, require_path
from ..files.kind import ADAPTER_FILES, BASIS_FILES
from ..files.storage import absolute, cannot_read, expanded
from .cache import is_intact
from .calls import hub_errors, with_retries
from .ids import ADAPTERS, PARTS, HubFolder, is_mistyped_path, parse_hub_adapters, parse_hub_folder, parse_hub_id
from .newest import at_newest, is_only_read

logger = logging.getLogger(__name__)

_OF_ADAPTER = re.compile(rf"^{ADAPTERS}/[^/]+/")


def resolve_folder(source: str | Path, files: Sequence[str]) -> tuple[Path, str]:
    """The folder behind `source`, and the name to remember it by.

    Args:
        source: a local folder, or a Hub id `owner/name` or `owner/name@revision`, or of a folder in a repository,
            `owner/name/folder@revision`. Where `owner` is a folder here, it is one of the Hub only with a revision.
        files: what is wanted of it. Of a Hub repository only these are fetched, and checked against the hashes that
            the Hub names.

    Returns:
        (absolute folder, the same as text), or (its snapshot, `owner/name@commit` or `owner/name/folder@commit`).

    Raises:
        ArtifactError: neither; it cannot be read; or the Hub does not have it, will not give it, or cannot be reached.
    """
    require_path("what holds it", source, "Save it, and give its folder")
    path = absolute(source)
    with cannot_read(path):
        if path.is_dir():
            return path, str(path)
    asked = parse_hub_folder(source)
    if asked is None or path.exists() or expanded(asked.repo).exists():
        raise _neither_folder_nor_id(source, ArtifactError)
    inside = f"{asked.path}/" if asked.path else ""
    wanted = [inside + file for file in files]
    name, commit, root = snapshot(str(asked._replace(path="")), wanted, ArtifactError)
    found, where = [file for file in wanted if (root / file).is_file()], str(HubFolder(name, asked.path, commit))
    if not found:
        which = "folder of that repository" if asked.path else "repository"
        fix = "See what it is: lorasb inspect"
        raise ArtifactError(f"that {which} has no {' or '.join(files)}", where=where, fix=fix)
    _mend(name, commit, root, found)
    return root / asked.path, where


def adapters_folder(source: str) -> Path:
    """The folder behind `source` that holds adapters by their names: one of this disk, or `owner/name/adapters` (with
    or without `@revision`) of a project on the Hub, which is fetched with its bases.

    Raises:
        ArtifactError: as for `resolve_folder`.
    """
    repo = None if expanded(source).exists() else parse_hub_adapters(source)
    if repo is None:
        return expanded(source)
    files = {"adapter": (*ADAPTER_FILES, *BASIS_FILES), "basis": BASIS_FILES}
    wanted = [f"{part}/{file}" for part, kind in PARTS.items() for file in files[kind]]
    name, commit, root = snapshot(str(repo), wanted, ArtifactError)
    _mend(name, commit, root, sorted(path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()))
    return root / ADAPTERS


def fetch_listed(source: str, files: Sequence[str]) -> Path:
    """The root of a repository on the Hub with those of `files`, by their paths there, that it has.

    A pattern for each file would take the square of their number where a project has thousands of adapters: those of
    one name are fetched of all its adapters.

    Raises:
        ArtifactError: as for `resolve_folder`.
    """
    patterns = sorted({_OF_ADAPTER.sub(f"{ADAPTERS}/*/", file) for file in files})
    name, commit, root = snapshot(source, patterns, ArtifactError)
    _mend(name, commit, root, [file for file in files if (root / file).is_file()])
    return root


def snapshot(
    source: str,
    patterns: Sequence[str],
    kind: type[LoraSBError],
    before: str = "",
    revision: str | None = None,
    but: Sequence[str] = (),
    cached: Path | None = None,
) -> tuple[str, str, Path]:
    """Fetch what `patterns` admit, `but` some, of a Hub repository: its name, the commit it is at, its folder.

    Where the Hub does not say which commit is the newest, the one that was fetched before is taken (`at_newest`).

    Args:
        source: `owner/name` or `owner/name@revision`; `revision` wins.
        kind: of the error raised; `before` begins its message.
        cached: where what there is will do, as long as it has weights: of a base that another program has fetched some
            text may be missing, such as its card.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    parsed = parse_hub_id(source)
    if parsed is None or expanded(source).exists():
        raise _neither_folder_nor_id(source, kind, before)
    name, _, tagged = parsed
    if revision is None and is_mistyped_path(source):
        raise _no_such_folder(source, kind, before)
    fetch = partial(snapshot_download, name, allow_patterns=list(patterns), ignore_patterns=list(but))
    with hub_errors(source, kind, f"{before}no such folder, and "):
        try:
            folder = at_newest(name, revision or tagged, fetch)
        except OSError as error:
            if not (isinstance(error, LocalEntryNotFoundError) or is_only_read(error)):
                raise
            if cached is None or not any(cached.glob("*.safetensors")):
                raise
            logger.warning("%s cannot be looked at on the Hub: what is in the cache of it is taken", source)
            return name, cached.name, cached
    return name, Path(folder).name, Path(folder)


def _no_such_folder(source: str, kind: type[LoraSBError], before: str) -> LoraSBError:
    parent, _, name = source.partition("/")
    close = difflib.get_close_matches(name, [path.name for path in Path(parent).glob("*")], 1)
    near = f" (did you mean {parent}/{close[0]}?)" if close else ""
    fix = f"Check the path, or write {source}@main for a repository on the Hub"
    return kind(f"{before}no such folder in {parent}, which is one of this disk{near}", where=source, fix=fix)


def _neither_folder_nor_id(source: str | Path, kind: type[LoraSBError], before: str = "") -> LoraSBError:
    """To raise for a `source` that cannot be found anywhere."""
    fix = "Give an existing folder, or a Hub id: owner/name or owner/name@revision"
    if re.match(r"[\w-]+/[\w.-]+/(adapter|bas)", str(source)):
        fix += f"; of a project's repository owner/name/{ADAPTERS}/NAME"
    return kind(f"{before}neither a folder nor a Hub id", where=str(source), fix=fix)


def _mend(name: str, commit: str, folder: Path, files: Sequence[str]) -> None:
    """Fetch again, once, those that are not as the Hub names them."""
    from huggingface_hub import hf_hub_download

    where = f"{name}@{commit}"
    for file in files:
        if is_intact(folder / file):
            continue
        with hub_errors(where, ArtifactError):
            with_retries(partial(hf_hub_download, name, file, revision=commit, force_download=True))
        if not is_intact(folder / file):
            fix = "Try again later; if it stays so, ask the owner to upload it again"
            raise ArtifactError(f"{file} does not arrive as the Hub names it (its hash differs)", where=where, fix=fix)
