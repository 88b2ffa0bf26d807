"""A basis left on the disk and read one module at a time: what a merge of any size needs of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import torch

from .base import BaseRef
from .basis import Basis
from .errors import ArtifactError
from .factors import ModuleBasis
from .fetch import BASIS_FILES, resolve_folder
from .format import basis_tensors, check_finite, check_tensors, read_basis_config
from .storage import TensorInfo

TORCH_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class _Modules(Mapping[str, ModuleBasis]):
    """module → its factors, read from the file at every access."""

    def __init__(self, path: Path, names: list[str], header: Mapping[str, TensorInfo]) -> None:
        self.path, self.names, self.header = path, names, header

    def __getitem__(self, name: str) -> ModuleBasis:
        return ModuleBasis(*(self._read(f"{name}.{part}") for part in "BAS"))

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)

    def _read(self, name: str) -> torch.Tensor:
        tensor = read_tensor(self.path, self.header[name])
        check_finite(tensor, name, self.path)
        return tensor


def open_basis(source: str | Path) -> Basis:
    """A basis folder, or one on the Hub, whose `modules` are read when asked for. Its file is hashed as a stream.

    Raises:
        ArtifactError: as for `Basis.load`, but non-finite values are found when their module is read.
    """
    folder, where = resolve_folder(source, BASIS_FILES)
    config, shapes = read_basis_config(folder)
    path = folder / "basis.safetensors"
    expected = basis_tensors(shapes, config["rank"], path)
    if not any(name.endswith(".B") for name in expected):  # of blocks there is nothing to leave on the disk
        return replace(Basis.load(folder), source=where)
    modules = _Modules(path, list(shapes), check_tensors(path, expected, config["sha256"]))
    base = BaseRef(**config["base_model"])
    basis = Basis(base, config["rank"], modules, config["calibration"], config["created_with"], where)
    basis.__dict__.update(sha256=config["sha256"], shapes=shapes)  # verified above
    return basis


def read_tensor(path: Path, info: TensorInfo) -> torch.Tensor:
    """One tensor of a safetensors file, read into memory of its own: mapped pages would count as ours.

    Raises:
        ArtifactError: the file ends before the tensor does.
    """
    buffer = bytearray(info.nbytes)
    with path.open("rb") as file:
        file.seek(info.start)
        if file.readinto(buffer) != len(buffer):
            raise ArtifactError("the file became shorter while it was read", where=path, fix="Fetch it again")
    return torch.frombuffer(buffer, dtype=TORCH_DTYPES[info.dtype]).view(info.shape)
