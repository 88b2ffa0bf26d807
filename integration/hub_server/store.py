"""What the server keeps: verified blobs, immutable commits, and the folder that xet writes to."""

from __future__ import annotations

import hashlib
import json
import shutil
import struct
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType


@dataclass(frozen=True)
class Entry:
    """One file of a commit. `oid` is what the client compares: git's sha1, or the sha256 of an LFS file."""

    oid: str
    sha256: str
    size: int
    lfs: bool


@dataclass
class Repo:
    """A repository; a gated one shows its files' names but gives none of them. `titles` are those of its commits."""

    private: bool
    gated: bool = False
    commits: dict[str, MappingProxyType[str, Entry]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    titles: dict[str, str] = field(default_factory=dict)

    def commit(self, ref: str, files: dict[str, Entry], title: str) -> str:
        """Put `files` on top of `ref`; the new commit's id."""
        content = [self.refs.get(ref), title, sorted((path, entry.oid) for path, entry in files.items())]
        oid = hashlib.sha1(json.dumps([*content, len(self.commits)]).encode()).hexdigest()
        self.commits[oid] = MappingProxyType(files)
        self.refs[ref], self.titles[oid] = oid, title
        return oid


class Store:
    """Verified blobs by sha256, and the xet folder that clients write to."""

    def __init__(self, root: Path) -> None:
        self.blobs, self.cas = root / "blobs", root / "cas"
        self.blobs.mkdir(parents=True)
        self.cas.mkdir()

    def path(self, sha256: str) -> Path:
        return self.blobs / sha256

    def put(self, data: bytes) -> str:
        sha256 = hashlib.sha256(data).hexdigest()
        self.path(sha256).write_bytes(data)
        return sha256

    def regular(self, data: bytes) -> Entry:
        """Keep a small file, which git itself stores."""
        oid = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
        return Entry(oid, self.put(data), len(data), lfs=False)

    def folder(self, folder: Path) -> dict[str, Entry]:
        """Keep the files of a folder, as if somebody else had uploaded them."""
        entries = {path.name: self.regular(path.read_bytes()) for path in folder.iterdir() if path.is_file()}
        large = {name: e for name, e in entries.items() if name.endswith(".safetensors")}
        return entries | {name: Entry(e.sha256, e.sha256, e.size, lfs=True) for name, e in large.items()}

    def xet_bytes(self) -> int:
        """Bytes of data and of its description that clients have written to the xet folder."""
        return sum(path.stat().st_size for path in self.cas.glob("xet/xorbs/**/*") if path.is_file())

    def xet_hashes(self) -> dict[str, str]:
        """sha256 → xet hash, from the shards in the xet folder (a section of 48-byte records in each)."""
        found = {}
        for shard in self.cas.glob("xet/xorbs/shards/*.mdb"):
            data, at = shard.read_bytes(), 48
            while data[at : at + 32] != b"\xff" * 32:
                flags, segments = struct.unpack_from("<II", data, at + 32)
                xet, at = _swapped(data[at : at + 32]), at + 48 * (1 + segments)
                at += 48 * segments * (flags >> 31)  # verification records
                if flags >> 30 & 1:
                    found[_swapped(data[at : at + 32])] = xet
                    at += 48
        return found

    def take_from_xet(self, sha256: str, size: int) -> bool:
        """Rebuild a file out of the xet folder into the blobs; whether it is what the client said it is."""
        import hf_xet

        xet = self.xet_hashes().get(sha256)
        if xet is None:
            return False
        with tempfile.TemporaryDirectory() as folder:
            copy, out = Path(folder, "cas"), Path(folder, "out")
            shutil.copytree(self.cas, copy)  # its database may still be locked by the client
            access = {"token": "t", "token_expiry_unix_secs": int(time.time()) + 3600}
            with hf_xet.XetSession().new_file_download_group(endpoint=f"local://{copy}", **access) as group:
                group.start_download_file(hf_xet.XetFileInfo(xet, size), str(out))
            return self.put(out.read_bytes()) == sha256


def _swapped(data: bytes) -> str:
    return b"".join(data[start : start + 8][::-1] for start in range(0, 32, 8)).hex()
