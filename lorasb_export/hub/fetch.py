"""Find a folder: on this disk, or on the Hub. Tokens are left to huggingface_hub."""

from __future__ import annotations

import difflib
import hashlib
import logging
import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from ..errors import ArtifactError, LoraSBError
from ..files.storage import absolute, expanded, real, sha256_file
from .calls import hub_errors, with_retries
from .newest import at_newest

logger = logging.getLogger(__name__)

# What each kind of folder is read from. Nothing else is fetched: no picture, and never a pickle or a script.
ADAPTER_FILES = ("adapter.safetensors", "adapter_config.json")
BASIS_FILES = ("basis_config.json", "basis.safetensors")
MARK_FILES = ("adapter_config.json", "basis_config.json", "lorasb.json", "config.json")  # they say what a folder is

# The folders of the repository of a whole project; in the last two lie folders with names, as names.name_problem has
# them. A path of any other form is one of this disk.
BASIS, BASES, ADAPTERS = "basis", "bases", "adapters"
PARTS = {BASIS: "basis", f"{BASES}/*": "basis", f"{ADAPTERS}/*": "adapter"}  # and what each is


def kind_of_part(part: str) -> str:
    """`adapter` of `adapters/NAME`, `basis` of `basis` and `bases/NAME`."""
    return "adapter" if part.startswith(f"{ADAPTERS}/") else "basis"


NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}"  # of an adapter, and of a folder in a repository
_REPO, _REVISION = r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)", r"(?:@([\w./-]+))?"
_PART = rf"{BASIS}|(?:{BASES}|{ADAPTERS})/{NAME}"
_HUB_FOLDER = re.compile(rf"{_REPO}(?:/({_PART}))?{_REVISION}")
_HUB_ADAPTERS = re.compile(rf"{_REPO}/{ADAPTERS}{_REVISION}")
_DATASET_ID = re.compile(r"[A-Za-z0-9][\w.-]*(?:/[A-Za-z0-9][\w.-]*)?(?:@[\w./-]+)?")
_FILE_ENDINGS = (".jsonl", ".json", ".csv")


class HubFolder(NamedTuple):
    """A folder of a repository on the Hub; `path` is empty for the repository itself."""

    repo: str
    path: str = ""
    revision: str | None = None

    def __str__(self) -> str:
        return "/".join(filter(None, (self.repo, self.path))) + (f"@{self.revision}" if self.revision else "")


def parse_hub_folder(source: str | Path) -> HubFolder | None:
    """What reads like a Hub id, or like a basis or an adapter in such a repository: `owner/name/basis`,
    `owner/name/adapters/a`. All with or without `@revision`."""
    match = _HUB_FOLDER.fullmatch(str(source))
    if match is None or ".." in str(source):
        return None
    return HubFolder(match.group(1), match.group(2) or "", match.group(3))


def parse_hub_id(source: str | Path) -> HubFolder | None:
    """As `parse_hub_folder`, but of a whole repository."""
    found = parse_hub_folder(source)
    return None if found is None or found.path else found


def is_hub_id(name: object) -> bool:
    """Whether `name` can be a Hub repository, `owner/name`. A bare name is none: a push shortens paths to that."""
    return isinstance(name, str) and parse_hub_id(name) == HubFolder(name)


def may_be_dataset(source: str, folder: Path) -> bool:
    """Whether `source`, of which there is no file, may be a dataset's id, `owner/name` or `name`, with or without
    `@revision`, rather than a mistyped path: one with a file's ending, or into a folder that `folder` has."""
    is_id = _DATASET_ID.fullmatch(source) is not None and not source.endswith(_FILE_ENDINGS)
    return is_id and not ("/" in source and (folder / source.partition("/")[0]).is_dir())


def is_mistyped_path(source: str, folder: Path | None = None) -> bool:
    """Whether `source`, which reads like a Hub id and of which there is no folder, is a path even so: into a folder
    that `folder`, or the working folder, has. The Hub would learn the name, and whoever registers it be trusted."""
    first, slash, _ = source.partition("/")
    return bool(slash) and "@" not in source and ((folder or Path()) / first).is_dir()


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
        ArtifactError: neither; or the Hub does not have it, will not give it, or cannot be reached.
    """
    path = absolute(source)
    if path.is_dir():
        return path, str(path)
    asked = parse_hub_folder(source)
    if asked is None or path.exists() or expanded(asked.repo).exists():
        raise neither_folder_nor_id(source, ArtifactError)
    inside = f"{asked.path}/" if asked.path else ""
    wanted = [inside + file for file in files]
    name, commit, root = snapshot(str(asked._replace(path="")), wanted, ArtifactError)
    found, where = [file for file in wanted if (root / file).is_file()], str(HubFolder(name, asked.path, commit))
    if not found:
        which = "folder of that repository" if asked.path else "repository"
        fix = "See what it is: lorasb inspect"
        raise ArtifactError(f"that {which} has no {' or '.join(files)}", where=where, fix=fix)
    for damaged in (file for file in found if not _is_intact(root / file)):
        _fetch_again(name, commit, root, damaged)
    return root / asked.path, where


def adapters_folder(source: str) -> Path:
    """The folder behind `source` that holds adapters by their names: one of this disk, or `owner/name/adapters` (with
    or without `@revision`) of a project on the Hub, which is fetched with its bases.

    Raises:
        ArtifactError: as for `resolve_folder`.
    """
    match = None if expanded(source).exists() else _HUB_ADAPTERS.fullmatch(source)
    if match is None:
        return expanded(source)
    files = {"adapter": (*ADAPTER_FILES, *BASIS_FILES), "basis": BASIS_FILES}
    wanted = [f"{part}/{file}" for part, kind in PARTS.items() for file in files[kind]]
    repo = HubFolder(match.group(1), revision=match.group(2))
    name, commit, root = snapshot(str(repo), wanted, ArtifactError)
    for file in sorted(path for path in root.rglob("*") if path.is_file() and not _is_intact(path)):
        _fetch_again(name, commit, root, file.relative_to(root).as_posix())
    return root / ADAPTERS


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
        raise neither_folder_nor_id(source, kind, before)
    name, _, tagged = parsed
    if revision is None and is_mistyped_path(source):
        raise _no_such_folder(source, kind, before)
    fetch = partial(snapshot_download, name, allow_patterns=list(patterns), ignore_patterns=list(but))
    with hub_errors(source, kind, f"{before}no such folder, and "):
        try:
            folder = at_newest(name, revision or tagged, fetch)
        except LocalEntryNotFoundError:
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


def neither_folder_nor_id(source: str | Path, kind: type[LoraSBError], before: str = "") -> LoraSBError:
    """To raise for a `source` that cannot be found anywhere."""
    fix = "Give an existing folder, or a Hub id: owner/name or owner/name@revision"
    if re.match(r"[\w-]+/[\w.-]+/(adapter|bas)", str(source)):
        fix += f"; of a project's repository owner/name/{ADAPTERS}/NAME"
    return kind(f"{before}neither a folder nor a Hub id", where=str(source), fix=fix)


def _is_intact(path: Path) -> bool:
    """Whether a file of the cache has the hash it is called by there: sha256 of a large file, git's of a small one."""
    if not path.is_symlink():
        return True  # a cache without links keeps no hash
    expected = path.readlink().name
    if re.fullmatch("[0-9a-f]{64}", expected):
        return sha256_file(path) == expected
    return git_hash(path.read_bytes()) == expected


def git_hash(data: bytes) -> str:
    """What git calls these bytes, and the Hub a file that is not large."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _fetch_again(name: str, commit: str, folder: Path, file: str) -> None:
    from huggingface_hub import hf_hub_download

    where = f"{name}@{commit}"
    with hub_errors(where, ArtifactError):
        with_retries(lambda: hf_hub_download(name, file, revision=commit, force_download=True))
    if not _is_intact(folder / file):
        fix = "Try again later; if it stays so, ask the owner to upload it again"
        raise ArtifactError(f"{file} does not arrive as the Hub names it (its hash differs)", where=where, fix=fix)


def is_blob(path: Path) -> bool:
    """Whether a file that a link led to is one of the Hub's cache, whose folders are made of links to `blobs/HASH`;
    since huggingface_hub 2.4 those of large files lead on to `blobs/HA/HASH`, which all repositories share."""
    shared = path.parent.parent.name == "blobs" and path.parent.name == path.name[:2]
    return shared or path.parent.name == "blobs"


def leads_out(path: Path, folder: Path) -> bool:
    """Whether `path`, somewhere in `folder`, is a link to a file out of it, and not into the Hub's cache.

    What a folder from a stranger links to is neither copied from it nor published with it.
    """
    target = real(path)
    return not (target.is_relative_to(real(folder)) or is_blob(target))
