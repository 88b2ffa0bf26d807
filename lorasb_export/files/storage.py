"""Files: their paths, safetensors headers, strict JSON, digests."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ArtifactError, LoraSBError, UnreadableError

MAX_JSON_BYTES = 12_000_000  # the largest index published, of a model of 671 B parameters, has 9 MB
_MAX_BRACKETS = 500_000  # every one becomes an object in memory, two hundred times its own size
_MAX_DIMENSIONS = 16  # a product of many large numbers takes minutes
DTYPE_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
DTYPE_BYTES |= {"U16": 2, "U32": 4, "U64": 8, "F8_E4M3": 1, "F8_E5M2": 1}
FLOATS = {"F64", "F32", "F16", "BF16"}


def expanded(path: str | Path) -> Path:
    """`path` with a leading `~` as the home folder: no shell does that in a call, or in `--out=~/x`.

    Not by Path.expanduser, which raises where `~name` is no user: it is then a name like any other.
    """
    return Path(os.path.expanduser(path))


def absolute(path: str | Path) -> Path:
    """`expanded`, absolute and without `..`; links stay as they are."""
    return Path(os.path.abspath(expanded(path)))


def real(path: str | Path) -> Path:
    """`path`, absolute, with links followed. Not by Path.resolve, which raises where links go in a circle."""
    return Path(os.path.realpath(path))


def cache_folder() -> Path | None:
    """Where programs keep what can be made again (XDG's base directories), a folder of ours; None without a home.

    A relative XDG_CACHE_HOME is passed over, as that specification says.
    """
    named, home = expanded(os.environ.get("XDG_CACHE_HOME", "")), expanded("~/.cache")
    return next((folder / "lorasb" for folder in (named, home) if folder.is_absolute()), None)


@contextmanager
def cannot_read(path: Path, kind: type[LoraSBError] = UnreadableError) -> Iterator[None]:
    """Raise the system's errors (no permission, a failing disk, …) as an error of that kind about `path`.

    One of many things is then at fault, and the others have their turn. That a file is not there passes.
    """
    try:
        look_at(path)
        yield
    except OSError as error:
        if isinstance(error, FileNotFoundError | LoraSBError):
            raise
        fix = "Check who may read it, and its disk"
        raise kind(f"cannot be read: {error.strerror or error}", where=path, fix=fix) from None


def look_at(path: Path) -> None:
    """Raise the OSError of what may not be looked at. From Python 3.14 on Path.exists says that it is not there."""
    try:
        os.stat(path)
    except ValueError:  # no path at all
        return
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
            raise


def names_in(folder: Path) -> list[str]:
    """What lies in `folder`, by name; nothing where it is no folder. Path.glob is silent of one that it may not read.

    Raises:
        UnreadableError: it cannot be read.
    """
    with cannot_read(folder):
        try:
            return os.listdir(folder)
        except (FileNotFoundError, NotADirectoryError):
            return []


@dataclass(frozen=True)
class TensorInfo:
    """One tensor as its safetensors header describes it; `start` and `end` are absolute file offsets."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.start


def read_header(path: Path) -> dict[str, TensorInfo]:
    """The tensors of a safetensors file, in file order, without reading a byte of weights.

    Raises:
        ArtifactError: the file is missing, truncated, cannot be read, or its header contradicts itself.
    """

    def bad(what: str) -> ArtifactError:
        return ArtifactError(what, where=path, fix="The file is damaged: fetch or write it again")

    with cannot_read(path):
        if not path.is_file():
            raise ArtifactError("file not found", where=path, fix="Check the path")
        size = path.stat().st_size
    with cannot_read(path), path.open("rb") as file:
        start = file.read(8)
        length = int.from_bytes(start, "little")
        if start == b"version ":
            fix = "Run git lfs pull in that folder"
            raise UnreadableError("a pointer of git-lfs, not the file itself", where=path, fix=fix)
        if size < 8 or length > size - 8:
            raise bad("not a safetensors file, or truncated in its header")
        if length > MAX_JSON_BYTES:
            raise bad(f"its header takes {length} bytes, more than the {MAX_JSON_BYTES} this reads")
        try:
            header = parse_json(file.read(length))
            metadata = header.pop("__metadata__", {})
            if not all(isinstance(value, str) for value in metadata.values()):
                raise ValueError("metadata that is not text")
            infos = {name: _tensor_info(entry, 8 + length) for name, entry in header.items()}
        except (ValueError, TypeError, AttributeError) as error:
            raise bad(f"unreadable safetensors header: {error}") from None
    infos = dict(sorted(infos.items(), key=lambda item: (item[1].start, item[1].end)))
    position = 8 + length
    for name, info in infos.items():
        if info.dtype not in DTYPE_BYTES or math.prod(info.shape) * DTYPE_BYTES[info.dtype] != info.nbytes:
            raise bad(f"tensor {name}: {info.nbytes} bytes do not hold {info.dtype} {list(info.shape)}")
        if info.start != position:
            raise bad(f"tensor {name}: the data has a gap or overlaps")
        position = info.end
    if position != size:
        raise bad(f"truncated: the header promises {position} bytes, the file has {size}")
    return infos


def _tensor_info(entry: Any, offset: int) -> TensorInfo:
    """A header's entry, its offsets made absolute. Raises ValueError when it is not as the format says."""
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise ValueError("a tensor is not {dtype, shape, data_offsets}")
    shape, ends = entry["shape"], entry["data_offsets"]
    if not (isinstance(shape, list) and isinstance(ends, list) and len(ends) == 2 and isinstance(entry["dtype"], str)):
        raise ValueError("a tensor's dtype, shape or data_offsets is of another type")
    if len(shape) > _MAX_DIMENSIONS:
        raise ValueError(f"a tensor of {len(shape)} dimensions")
    if not all(type(number) is int and 0 <= number < 2**63 for number in (*shape, *ends)):
        raise ValueError("a tensor's shape or data_offsets are not whole numbers of 63 bits")
    return TensorInfo(entry["dtype"], tuple(shape), offset + ends[0], offset + ends[1])


def utf8(data: bytes, where: object) -> str:
    """The text of a file, without a byte order mark. Raises ArtifactError when it is not UTF-8."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise ArtifactError("not UTF-8 text", where=where, fix="Save it as UTF-8, or write it again") from None


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from `path`. Raises ArtifactError when it is missing, too large, cannot be read or no object."""
    try:
        with cannot_read(path):
            if path.exists() and not path.is_file():
                raise ArtifactError("not a file", where=path, fix="Check the path")
            if path.stat().st_size > MAX_JSON_BYTES:
                raise ArtifactError(f"more than {MAX_JSON_BYTES} bytes of JSON", where=path, fix="Check the path")
            return parse_json(path.read_bytes())
    except FileNotFoundError:
        raise ArtifactError("file not found", where=path, fix="Check the path") from None
    except ValueError as error:
        if isinstance(error, LoraSBError):
            raise
        fix = "Correct it, or write or fetch it again"
        raise ArtifactError(f"unreadable JSON: {error}", where=path, fix=fix) from None


def parse_json(text: str | bytes) -> dict[str, Any]:
    """A JSON object, read strictly: UTF-8, no key twice, no bomb of brackets.

    Raises:
        ValueError: with the reason.
    """
    text = text.decode("utf-8") if isinstance(text, bytes) else text
    if text.count("[") + text.count("{") > _MAX_BRACKETS:
        raise ValueError(f"more than {_MAX_BRACKETS} lists and objects")
    try:
        value = json.loads(text, object_pairs_hook=_without_duplicates)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(value, dict):
        raise ValueError("expected a JSON object")
    return value


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        name = Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"duplicate key {name!r:.60}")
    return found


def to_json(value: Mapping[str, Any]) -> bytes:
    """`value` with sorted keys, so that equal content is equal bytes."""
    return f"{json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False)}\n".encode()


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_bytes(to_json(value))


def folder_bytes(folder: Path) -> int:
    """Bytes of the files in a folder and the folders in it."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def version_of(path: Path) -> tuple[int, ...]:
    """What a file is told apart by from one that takes its place, or that is written into it."""
    found = path.stat()
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def sha256_file(path: Path) -> str:
    """Hex sha256 of a file's bytes. Raises UnreadableError when the system refuses it."""
    with cannot_read(path), path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
