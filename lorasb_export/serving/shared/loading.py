"""Adapter folders as the server takes them: R as one block (the engine waits meanwhile), copies, names of versions."""

from __future__ import annotations

import hashlib
import math
from pathlib import Path
from typing import NamedTuple

import torch

from ...basis import Basis
from ...errors import ArtifactError
from ...files.kind import ADAPTER_CONFIG, ADAPTER_FILES, ADAPTER_WEIGHTS
from ...files.output import cannot_write
from ...files.storage import read_header, read_json, real
from ...format import AGAIN, read_adapter_config


class LoadedR(NamedTuple):
    """An adapter's update in its basis: `R` (m, r, r) fp32, multiplied by s, in the order of `names`."""

    names: list[str]
    R: torch.Tensor


def load_R(folder: Path, basis: Basis) -> LoadedR:
    """Read and check the adapter in `folder`.

    Raises:
        ArtifactError: not an adapter of `basis`, damaged, or with non-finite values.
    """
    config = read_adapter_config(folder)
    if config["basis"]["sha256"] != basis.sha256:
        where = folder / ADAPTER_CONFIG
        raise ArtifactError(
            "trained in another basis than this server's", where=where, fix="Serve it by a server of its own"
        )
    path, shape = folder / ADAPTER_WEIGHTS, (basis.rank, basis.rank)
    header = read_header(path)
    if set(header) != {f"{name}.R" for name in basis.modules}:
        raise ArtifactError("the tensors are not one R for each module of the basis", where=path, fix=AGAIN)
    for name, info in header.items():
        if info.dtype != "F32" or info.shape != shape:
            what = f"tensor {name} is {info.dtype} {list(info.shape)}, not F32 {list(shape)}"
            raise ArtifactError(what, where=path, fix=AGAIN)
    infos = list(header.values())  # in the order of the file, without gaps: `read_header` refuses those
    memory = bytearray(infos[-1].end - infos[0].start)
    with path.open("rb") as file:
        digest = hashlib.sha256(file.read(infos[0].start))
        read = file.readinto(memory)
    block = torch.frombuffer(memory, dtype=torch.float32).view(-1, *shape)
    low, high = torch.aminmax(block)  # NaN if there is one; and a tenth of the time of `isfinite`
    if read != len(memory) or not (math.isfinite(low * config["scaling"]) and math.isfinite(high * config["scaling"])):
        raise ArtifactError("truncated, or with non-finite values", where=path, fix=AGAIN)
    digest.update(memory)
    if digest.hexdigest() != config["sha256"]:
        raise ArtifactError("not the tensors that the config names (sha256)", where=path, fix=AGAIN)
    return LoadedR([name.removesuffix(".R") for name in header], block.mul_(config["scaling"]))


def copy_adapter(source: Path, target: Path) -> None:
    """Copy the files of an adapter into a new folder.

    Raises:
        ArtifactError: they cannot be read.
        OutputError: they cannot be written, as to a full disk.
    """
    with cannot_write(target, "Set TMPDIR to a larger disk"):
        target.mkdir()
        for file in ADAPTER_FILES:
            try:
                content = (source / file).read_bytes()
            except OSError as error:
                raise _unreadable(source / file, error) from None
            (target / file).write_bytes(content)


def link_adapter(source: Path, target: Path) -> None:
    """As `copy_adapter`, by hard links: what takes the place of `source` later is not seen.

    Where the disk has none, as between two disks, by symbolic ones, through which it is.
    """
    with cannot_write(target, "Set TMPDIR to a larger disk"):
        target.mkdir()
        for file in ADAPTER_FILES:
            try:
                (target / file).hardlink_to(real(source / file))  # not to a link, as files in the Hub's cache are
            except FileNotFoundError as error:
                raise _unreadable(source / file, error) from None
            except OSError:
                (target / file).symlink_to(source / file)


def _unreadable(path: Path, error: OSError) -> ArtifactError:
    fix = "Check who may read it, and that it is not being replaced"
    return ArtifactError(f"cannot read the adapter: {error.strerror}", where=path, fix=fix)


def version_name(name: str, folder: Path) -> str:
    """`name` with the content of `folder`: vLLM's prefix cache goes by name and path, so a version needs its own.

    The config's digest stands for both files, since the config holds that of the tensors, which `load_R` compares.
    """
    return f"{name}-{read_json(folder / ADAPTER_CONFIG)['config_sha256'][:16]}"
