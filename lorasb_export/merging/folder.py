"""The folder a merge works in: one merge at a time, resumable after a kill, renamed when complete.

Beside the target `NAME` lies, while a merge runs or after it was killed, `.NAME.merge`.
A shard is finished when its mark, `.SHARD.json`, exists: the mark is written after the shard's bytes are on the disk.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ..files.atomic import atomic_file, discard, fsync, keep_card, prepare_target, put_in_place
from ..files.lock import only_writer
from ..files.output import cannot_write, refuse_foreign
from ..files.storage import read_json, real, write_json

logger = logging.getLogger(__name__)

_IDENTITY = ".identity"


class MergeFolder:
    """A folder being filled with shards, some of which an earlier, killed merge may have finished."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def mark(self, shard: str, content: Mapping[str, Any]) -> None:
        """Fsync `shard` and record it as finished, with what is to be remembered of it."""
        fsync(self.path / shard)
        with atomic_file(self._mark(shard)) as mark:
            write_json(mark, {"bytes": (self.path / shard).stat().st_size, **content})

    def finished(self, shard: str) -> dict[str, Any] | None:
        """What `mark` recorded, or None where the shard is to be written."""
        if not self._mark(shard).is_file() or not (self.path / shard).is_file():
            return None
        found = read_json(self._mark(shard))
        return found if found["bytes"] == (self.path / shard).stat().st_size else None

    def _mark(self, shard: str) -> Path:
        return self.path / f".{shard}.json"

    def marks(self) -> list[Path]:
        return list(self.path.glob(".*.safetensors.json"))

    def forget_marks(self) -> None:
        """Remove what only a resumed merge needs. What a disk does not let go stays: it is hidden."""
        for path in (self.path / _IDENTITY, *self.marks()):
            with suppress(OSError):
                path.unlink()

    def forget_all_but_shards(self) -> None:
        """Remove what is written anew in any case: of the base's other files some may be gone by now."""
        marks = [mark.name for mark in self.marks()]
        kept = {_IDENTITY, *marks, *(name[1:].removesuffix(".json") for name in marks)}
        for path in self.path.iterdir():
            if path.name not in kept:
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


@contextmanager
def resumable_folder(target: Path, identity: str, *, overwrite: bool = False) -> Iterator[MergeFolder]:
    """Yield a sibling folder that becomes `target` when the block ends without an exception.

    Killed or interrupted, finished shards stay for the next call with the same `identity`; with another one, or after
    an error, the folder is removed.

    Raises:
        OutputError: another process is writing `target`, the target exists and `overwrite` is false, or its
            parent cannot be written.
    """
    target = real(target)  # a link stays one, and what it leads to is replaced
    with only_writer(target), cannot_write(target):
        prepare_target(target, overwrite, "merged")
        folder = _open(target, identity)
        keep_card(target, folder.path)
        try:
            yield folder
            put_in_place(folder.path, target, overwrite, "merged")
            MergeFolder(target).forget_marks()  # only now: killed before, the next merge still has its shards
        except KeyboardInterrupt:
            if not folder.marks():
                discard(folder.path, target)
            raise
        except BaseException:
            discard(folder.path, target)
            raise


def bytes_of_an_earlier_try(target: Path) -> int:
    """Room on the disk that a killed merge into `target` takes: it will be used again, or freed."""
    work = _work_path(real(target))
    return sum(path.stat().st_blocks * 512 for path in work.iterdir()) if work.is_dir() else 0


def _work_path(target: Path) -> Path:
    return target.parent / f".{target.name}.merge"


def _open(target: Path, identity: str) -> MergeFolder:
    work = _work_path(target)
    folder, known = MergeFolder(work), work / _IDENTITY
    refuse_foreign(work, lambda path: (path / _IDENTITY).is_file())
    if work.is_dir():
        if known.is_file() and known.read_text() == identity:
            folder.forget_all_but_shards()
            return folder
        if folder.marks():
            logger.info("the base, the adapter or a setting changed: the interrupted merge is not resumed")
        discard(work, target)
    work.mkdir()
    (work / _IDENTITY).write_text(identity)
    return folder
