"""SHA256SUMS, in the form of `sha256sum`: a push puts one beside what it publishes, `inspect --verify` reads it.

It lists every published file but the card, which people edit on the website.
"""

from __future__ import annotations

import functools
import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import ArtifactError
from ..fetch import resolve_folder
from ..names import some
from ..storage import sha256_file, version_of
from .outgoing import SUMS, Files, is_publishable

_LINE = re.compile(r"([0-9a-f]{64}) [ *]([^\n]+)")
_UNLISTED = (SUMS, "README.md")
_SHOWN = 3  # files in an error


def digest(file: Path | bytes) -> str:
    """Hex sha256 of a file or of its content; a file is read once, as long as it does not change."""
    if isinstance(file, bytes):
        return hashlib.sha256(file).hexdigest()
    return _digest(file, version_of(file))


@functools.lru_cache(maxsize=1024)
def _digest(path: Path, version: tuple[int, ...]) -> str:
    return sha256_file(path)


def checksums(files: Files) -> bytes:
    """The content of SHA256SUMS for `files`."""
    lines = [f"{digest(file)}  {path}\n" for path, file in sorted(files.items()) if path not in _UNLISTED]
    return "".join(lines).encode()


def verify(source: str | Path) -> dict[str, Any]:
    """Compare every file that SHA256SUMS lists with its hash there. Of a Hub repository all of them are fetched.

    Args:
        source: a folder, or a Hub id.

    Returns:
        files (how many are listed), bytes (theirs), unlisted (of a folder: files that nothing was said about).

    Raises:
        ArtifactError: there is no SHA256SUMS, it is not ours, or files are missing or differ; which ones is said.
    """
    folder, where = resolve_folder(source, (SUMS,))
    if not (folder / SUMS).is_file():
        fix = "A folder gets one when it is pushed: fetch it from there, or inspect it without --verify"
        raise ArtifactError(f"no {SUMS}: there is nothing to compare with", where=where, fix=fix)
    listed = parse((folder / SUMS).read_text(encoding="utf-8", errors="replace"), folder / SUMS)
    on_disk = where == str(folder)
    if not on_disk:
        folder, _ = resolve_folder(where, tuple(listed))
    missing = [path for path in listed if not (folder / path).is_file()]
    changed = [path for path in listed if path not in missing and digest(folder / path) != listed[path]]
    if missing or changed:
        found = ((missing, "missing"), (changed, "changed"))
        what = "; ".join(f"{some(paths, _SHOWN)} {word}" for paths, word in found if paths)
        raise ArtifactError(f"not as published: {what}", where=where, fix="Fetch it again, or ask its owner")
    there = [path for path in folder.rglob("*") if path.is_file()] if on_disk else []
    inside = [path.relative_to(folder).as_posix() for path in there]
    return {
        "files": len(listed),
        "bytes": sum((folder / path).stat().st_size for path in listed),
        "unlisted": sorted(path for path in inside if path not in (*listed, *_UNLISTED) and not path.startswith(".")),
    }


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
