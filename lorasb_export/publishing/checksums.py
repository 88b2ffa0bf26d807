"""SHA256SUMS, in the form of `sha256sum`: a push puts one beside what it publishes, `inspect --verify` reads it.

It lists every published file but the card, which people edit on the website.
"""

from __future__ import annotations

import functools
import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ..errors import ArtifactError, some
from ..files.kind import CARD
from ..files.storage import absolute, sha256_file, version_of
from ..hub.fetch import fetch_listed, resolve_folder
from ..hub.ids import parse_hub_folder
from .outgoing import SUMS, Files, is_publishable, part_of

_LINE = re.compile(r"([0-9a-f]{64}) [ *]([^\n]+)")
_UNLISTED = (SUMS, CARD)  # in the folder, or a part of a project
_SHOWN = 3  # files in an error


def digest(file: Path | bytes) -> str:
    """Hex sha256 of a file or of its content; a file is read once, as long as it does not change."""
    if isinstance(file, bytes):
        return hashlib.sha256(file).hexdigest()
    return _digest(file, version_of(file))


@functools.lru_cache(maxsize=100_000)  # a project's adapters, each read three times
def _digest(path: Path, version: tuple[int, ...]) -> str:
    return sha256_file(path)


def checksums(files: Files, others: Mapping[str, str] = MappingProxyType({})) -> bytes:
    """The content of SHA256SUMS for `files` and for `others`, path → sha256, that stay where they are."""
    digests = {path: digest(file) for path, file in files.items() if not _is_unlisted(path)}
    return "".join(f"{sha256}  {path}\n" for path, sha256 in sorted({**others, **digests}.items())).encode()


def verify(source: str | Path) -> dict[str, Any]:
    """Compare every file that SHA256SUMS lists with its hash there. Of a Hub repository all of them are fetched.

    Args:
        source: a folder, or a Hub id; of a folder in a repository what the list says of that one.

    Returns:
        files (how many are listed), bytes (theirs), unlisted (of a folder: files that nothing was said about).

    Raises:
        ArtifactError: there is no SHA256SUMS, it is not ours, or files are missing or differ; which ones is said.
    """
    asked = None if absolute(source).is_dir() else parse_hub_folder(source)
    inside = f"{asked.path}/" if asked and asked.path else ""
    folder, where = resolve_folder(str(asked._replace(path="")) if asked else source, (SUMS,))
    if not (folder / SUMS).is_file():
        fix = "A folder gets one when it is pushed: fetch it from there, or inspect it without --verify"
        raise ArtifactError(f"no {SUMS}: there is nothing to compare with", where=where, fix=fix)
    published = parse((folder / SUMS).read_text(encoding="utf-8", errors="replace"), folder / SUMS)
    listed = {path: sha256 for path, sha256 in published.items() if path.startswith(inside)}
    if not listed:
        raise ArtifactError(f"{SUMS} lists no file in {inside}", where=where, fix="Check the name of the folder")
    on_disk = where == str(folder)
    if not on_disk:
        folder = resolve_folder(where, tuple(listed))[0] if inside else fetch_listed(where, list(listed))
    missing = [path for path in listed if not (folder / path).is_file()]
    changed = [path for path in listed if path not in missing and digest(folder / path) != listed[path]]
    if missing or changed:
        found = ((missing, "missing"), (changed, "changed"))
        what = "; ".join(f"{some(paths, _SHOWN)} {word}" for paths, word in found if paths)
        raise ArtifactError(f"not as published: {what}", where=where, fix="Fetch it again, or ask its owner")
    there = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()] if on_disk else []
    return {
        "files": len(listed),
        "bytes": sum((folder / path).stat().st_size for path in listed),
        "unlisted": sorted(
            path for path in there if path not in listed and not _is_unlisted(path) and not path.startswith(".")
        ),
    }


def _is_unlisted(path: str) -> bool:
    return path.removeprefix(f"{part_of(path)}/") in _UNLISTED


def parse(text: str, where: object) -> Mapping[str, str]:
    """File → sha256 of a SHA256SUMS. It may name only what a push publishes: nothing else is fetched or deleted for it.

    Raises:
        ArtifactError: it was not written by a push, or lists nothing.
    """
    listed: dict[str, str] = {}
    for number, line in enumerate(text.splitlines(), 1):
        match = _LINE.fullmatch(line)
        if match is None or not is_publishable(match.group(2)) or match.group(2) in listed:
            fix = "Fetch it again, or ask its owner"
            raise ArtifactError(f"not a line of a {SUMS} of ours", where=f"{where}:{number}", fix=fix)
        listed[match.group(2)] = match.group(1)
    if not listed:
        raise ArtifactError("it lists no file", where=where, fix="Fetch it again, or ask its owner")
    return listed
