"""The copies of adapters that clients have loaded: a folder for each version, for as long as the engine may read it."""

from __future__ import annotations

import shutil
import time
from collections.abc import Collection
from contextlib import suppress
from filecmp import cmp
from pathlib import Path

from ...files.kind import ADAPTER_FILES
from .loading import version_name

SECONDS = 3600  # longer than any request runs: the engine may read its version again in the middle of it


class Versions:
    """Copies in `folder`; one that has not been the current version of any name for `seconds` is removed."""

    def __init__(self, folder: Path, seconds: float = SECONDS) -> None:
        self.folder, self.seconds = folder, seconds
        self._unused_since: dict[Path, float] = {}

    def keep(self, name: str, copy: Path) -> Path:
        """Move `copy`, a folder on the same disk, to a path that names its content; returns the path.

        Under however many names one adapter is loaded, the disk holds its files once.
        """
        kept = self.folder / version_name(name, copy)
        if not kept.exists():
            same = next(self.folder.glob(f"*{version_name('', copy)}"), None)
            for file in ADAPTER_FILES:
                with suppress(OSError):  # gone meanwhile, or no links on this disk: then it is held twice
                    if same and cmp(same / file, copy / file, shallow=False):
                        link = copy / f".{file}"
                        link.hardlink_to(same / file)
                        link.replace(copy / file)
            copy.rename(kept)
        return kept

    def sweep(self, used: Collection[str]) -> None:
        """Remove what has been unused for long enough; `used` are the paths that names stand for now."""
        now = time.monotonic()
        for path in self.folder.iterdir():
            if str(path) in used:
                self._unused_since.pop(path, None)
            elif now - self._unused_since.setdefault(path, now) > self.seconds:
                shutil.rmtree(path, ignore_errors=True)
                del self._unused_since[path]
