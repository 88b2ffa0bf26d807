"""`basis.source` in an adapter's config: where its basis is (docs/reference/files.md)."""

from __future__ import annotations

import os
import posixpath
from pathlib import Path

from .errors import ArtifactError
from .hub.ids import parse_hub_folder

EMBEDDED = "embedded"


def resolved(named: str, folder: Path, hub_source: str | None) -> str | None:
    """`Adapter.basis_source`, given what the config names. Raises ArtifactError where nobody else could find it."""
    if named == EMBEDDED:
        return None
    if hub_source is not None and parse_hub_folder(named) is None:
        return _beside(named, hub_source)
    if not named.startswith("."):
        return named
    there = os.path.normpath(os.path.join(os.path.realpath(folder), named))
    return there if os.path.isdir(there) else os.path.normpath(folder / named)  # once they were true by links alone


def _beside(named: str, hub_source: str) -> str:
    """A basis in the repository that the adapter is in, at the same commit."""
    adapter = parse_hub_folder(hub_source)
    assert adapter is not None
    path = posixpath.normpath(posixpath.join(adapter.path, named))
    basis = str(adapter._replace(path=path))
    if not named.startswith(".") or parse_hub_folder(basis) is None:
        fix = "Ask its owner to push it again, with its basis"
        raise ArtifactError("its basis is a folder on somebody else's disk", where=hub_source, fix=fix)
    return basis


def relative(source: str, target: Path) -> str:
    """The path from an adapter's folder to its basis, true from where that folder really lies.

    It is the one between the two as they are written, which outlives a move of both, unless a link lies between them:
    `adapters` may lead to another disk.
    """
    real, named = os.path.realpath(target), os.path.relpath(source, os.path.abspath(target))
    if os.path.realpath(os.path.join(real, named)) != os.path.realpath(source):
        named = os.path.relpath(source, real)
    return named if named.startswith(".") else f"./{named}"  # the leading dot marks it as a path
