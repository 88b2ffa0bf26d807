"""The Hub's cache on this disk, whose folders are made of links to files that are called by their hashes."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

from ..files.storage import real, sha256_file


def is_intact(path: Path) -> bool:
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
