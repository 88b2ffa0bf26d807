"""Copies of adapters, or links to them, that a server reads: what becomes of the folders meanwhile changes nothing."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

from ..adapter import Adapter
from ..errors import ArtifactError
from .shared.loading import copy_adapter, link_adapter, version_name

_PAUSE = 0.1  # seconds before an adapter that is being replaced is copied again


def copied(adapter: Adapter, source: Path, name: str, path: Path, *, links: bool) -> str:
    """Copy the adapter in `source` to `path`, or beside it, or link it there, and return the name of its version.

    One that was replaced since it was checked, as by a fit of every night, is taken as it is now.

    Raises:
        ArtifactError: it cannot be read, or was replaced by one that is no adapter, or of another base or basis.
    """
    for tries_left in (2, 1, 0):
        try:
            (link_adapter if links else copy_adapter)(source, path)
            version = version_name(name, path)
            if version != path.name:
                if not _may_replace(adapter, path):
                    raise ArtifactError("the adapter was replaced meanwhile", where=source, fix="Start again")
                path.rename(path.with_name(version))
            break
        except ArtifactError:  # begun between two renames, say: a folder is replaced by moving the old one away first
            if not tries_left:
                raise
            shutil.rmtree(path, ignore_errors=True)
            time.sleep(_PAUSE)
    return version


def _may_replace(adapter: Adapter, copy: Path) -> bool:
    """Whether `copy` is a whole adapter, and all that was checked of `adapter` holds for it."""
    try:
        new = Adapter.load(copy)
    except ArtifactError:  # the tensors of one, and the config of the next
        return False
    old_one, new_one = (
        (one.task_type, one.basis_sha256, one.base.fingerprint, one.rank, one.R.keys()) for one in (adapter, new)
    )
    return old_one == new_one
