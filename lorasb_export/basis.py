"""Basis: the folder that many adapters share (format version 1, docs/reference/files.md).

Shapes everywhere: W (out, in), B (out, r), R (r, r), A (r, in), S (r,); the update of a module is s·B·R·A.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as serialize

from .base.model import BaseRef
from .cards import card
from .errors import ArtifactError
from .files.atomic import atomic_folder
from .files.kind import BASIS_CONFIG, BASIS_FILES, BASIS_WEIGHTS
from .files.storage import absolute, expanded, read_json, version_of, write_json
from .format import EDITED, FORMAT_VERSION, basis_tensors, read_basis_config, sealed
from .hub.fetch import resolve_folder
from .hub.ids import parse_hub_folder
from .layers.factors import BlockBasis, Factors, ModuleBasis
from .provenance import versions
from .settings import GRADIENT, CalibrationSettings, changes
from .tensors import check_finite, check_tensors, load_tensors, read_tensor

_DECISIVE = ("rank", "directions", "targets", "reduction", "loss", "eta", "max_length", "dtype", "seed")
_ROUNDING = 0.02  # of products of orthonormal vectors rounded to bfloat16: twice 2⁻⁸, and room


class _ModulesOnDisk(Mapping[str, ModuleBasis]):
    """module → its factors, read from the file at every access."""

    def __init__(self, path: Path, names: list[str], expected: Mapping[str, list[int]], digest: str) -> None:
        self.path, self.names, self._version = path, names, version_of(path)
        self.header = check_tensors(path, expected, digest)

    def __getitem__(self, name: str) -> ModuleBasis:
        return ModuleBasis(*(self._read(f"{name}.{part}") for part in "BAS"))

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)

    def _read(self, name: str) -> torch.Tensor:
        tensor = read_tensor(self.path, self.header[name])
        check_finite(tensor, name, self.path)
        if version_of(self.path) != self._version:
            raise ArtifactError("the basis was replaced while it was read", where=self.path, fix="Begin again")
        return tensor


@dataclass(frozen=True, eq=False)  # tensors have no one answer to ==
class Basis:
    """One frozen pair (B, A) per target module of one base model, shared by any number of adapters.

    Attributes:
        base: the model it was made for: name, revision, fingerprint of the weights.
        rank: r, the same in every module.
        modules: full module name → its `B` (out, r), `A` (r, in), `S` (r,), and the `shape` of its weight.
        calibration: how it was made, JSON; see `calibrate`.
        created_with: package → version, of what wrote it.
        source: where it was loaded from or saved to: an absolute folder or a Hub id@revision; None until then.
        sha256: of its tensors, by which adapters know it.
    """

    base: BaseRef
    rank: int
    modules: Mapping[str, Factors]
    calibration: Mapping[str, Any]
    created_with: Mapping[str, str] = field(default_factory=versions)
    source: str | None = None

    def __repr__(self) -> str:
        of = f"rank {self.rank} for {len(self.modules)} modules of {self.base.name_or_path}"
        return f"<Basis {self.source}: {of}>"

    @property
    def directions(self) -> str:
        """What B and A span: GRADIENT, or one of DRAWN."""
        directions: str = self.calibration.get("directions", GRADIENT)
        return directions

    def differences(self, settings: Mapping[str, Any]) -> list[str]:
        """How this basis's calibration differs from `settings`, names and values of `CalibrationSettings`.

        Only what it records, and what the result depends on, is compared: not `samples`, of which it knows the rows.
        """
        made, now = {**self.calibration, "directions": self.directions, "rank": self.rank}, settings
        if "targets" in settings:
            now = {**settings, "targets": CalibrationSettings(targets=settings["targets"]).targets}
        return changes({key: made[key] for key in settings if key in _DECISIVE and key in made}, now)

    @property
    def is_blocks(self) -> bool:
        """Whether every module's factors are the place of a block: all of a basis are, or none."""
        return next(iter(self.modules.values())).block is not None

    @cached_property
    def shapes(self) -> Mapping[str, tuple[int, int]]:
        """Module → the shape (out, in) of its weight."""
        return {name: module.shape for name, module in self.modules.items()}

    @cached_property
    def _bytes(self) -> bytes:
        tensors = {
            f"{name}.{part}": tensor.detach().cpu().contiguous()
            for name, module in sorted(self.modules.items())
            for part, tensor in module.tensors().items()
        }
        return serialize(tensors, {"format": "pt"})

    @cached_property
    def sha256(self) -> str:
        """sha256 of `basis.safetensors`."""
        return hashlib.sha256(self._bytes).hexdigest()

    def config(self) -> dict[str, Any]:
        """The content of `basis_config.json`."""
        content = {
            "format_version": FORMAT_VERSION,
            "base_model": asdict(self.base),
            "rank": self.rank,
            "target_modules": {name: list(shape) for name, shape in sorted(self.shapes.items())},
            "sha256": self.sha256,
            "calibration": dict(self.calibration),
            "created_with": dict(self.created_with),
        }
        return sealed(content)

    def save(self, folder: str | Path, *, overwrite: bool = False) -> None:
        """Write the basis folder, whole or not at all.

        Adapters trained in it afterwards record `folder` as its location, as do existing ones without a location at
        their next `save`. A basis from the Hub keeps its Hub id.

        Raises:
            OutputError: the folder exists and `overwrite` is false, or it holds something other than a basis.
            ArtifactError: the columns of a B, or the rows of an A, are not `rank` orthonormal ones.
        """
        folder = expanded(folder)
        self._check_orthonormal()
        with atomic_folder(folder, overwrite=overwrite, kind="basis") as temporary:
            self.write_into(temporary)
            card.write(temporary, card.basis_card(read_json(temporary / BASIS_CONFIG)))
        if not parse_hub_folder(self.source or ""):
            object.__setattr__(self, "source", str(absolute(folder)))  # all else of it stays frozen

    def _check_orthonormal(self) -> None:
        unit = torch.eye(self.rank)
        for name, module in self.modules.items():
            for part, rows in () if module.block else (("B", module.B.T), ("A", module.A)):
                products = (rows.float() @ rows.float().T).cpu()
                if products.shape != unit.shape or not (products - unit).abs().max() <= _ROUNDING:
                    what = f"{part} of {name} is not made of {self.rank} orthonormal vectors"
                    raise ArtifactError(what, fix="Take U and Vᵀ of an SVD, or Q of a QR decomposition")

    def write_into(self, folder: Path) -> None:
        """Write `basis.safetensors` and `basis_config.json` into an existing folder.

        Raises:
            ArtifactError: a loaded basis would be written in other bytes than those that adapters know it by.
        """
        if hashlib.sha256(self._bytes).hexdigest() != self.sha256:
            fix = "Copy its two files by hand: another version of safetensors wrote them"
            what = "this version of safetensors lays the basis out otherwise, in different bytes"
            raise ArtifactError(what, where=self.source, fix=fix)
        (folder / BASIS_WEIGHTS).write_bytes(self._bytes)
        write_json(folder / BASIS_CONFIG, self.config())

    @classmethod
    def open(cls, source: str | Path) -> Basis:
        """As `load`, but with `modules` that are read from the disk at every access: for a basis of any size.

        Raises:
            ArtifactError: as for `load`, but non-finite values are found when their module is read.
        """
        folder, where = resolve_folder(source, BASIS_FILES)
        config, shapes = read_basis_config(folder)
        path = folder / BASIS_WEIGHTS
        expected = basis_tensors(shapes, config["rank"], path)
        if not any(name.endswith(".B") for name in expected):  # of blocks there is nothing to leave on the disk
            return cls.load(where)
        modules = _ModulesOnDisk(path, list(shapes), expected, config["sha256"])
        return cls._recorded(config, shapes, modules, where)

    @classmethod
    def load(cls, source: str | Path) -> Basis:
        """Load and validate a basis folder, or one on the Hub (`owner/name` or `owner/name@revision`).

        Raises:
            ArtifactError: unknown or missing keys, wrong shape, dtype, rank or hash, non-finite values,
                another format version, a truncated file.
        """
        folder, where = resolve_folder(source, BASIS_FILES)
        config, shapes = read_basis_config(folder)
        path, rank = folder / BASIS_WEIGHTS, config["rank"]
        tensors = load_tensors(path, basis_tensors(shapes, rank, path), config["sha256"])
        modules: dict[str, Factors] = {}
        for name, shape in shapes.items():
            block = tensors.get(f"{name}.block")
            if block is None:
                modules[name] = ModuleBasis(*(tensors[f"{name}.{part}"] for part in "BAS"))
            else:
                modules[name] = _block_factors(block, name, shape, rank, path)
        return cls._recorded(config, shapes, modules, where)

    @classmethod
    def _recorded(
        cls,
        config: Mapping[str, Any],
        shapes: Mapping[str, tuple[int, int]],
        modules: Mapping[str, Factors],
        where: str,
    ) -> Basis:
        base = BaseRef(**config["base_model"])
        basis = cls(base, config["rank"], modules, config["calibration"], config["created_with"], where)
        basis.__dict__.update(sha256=config["sha256"], shapes=shapes)  # verified: no need to serialize or read again
        return basis


def _block_factors(block: torch.Tensor, name: str, shape: tuple[int, int], rank: int, where: Path) -> BlockBasis:
    """The factors of module `name` from what the file holds of its block. Raises ArtifactError when it has no such."""
    spans = [slice(*span) for span in block.tolist()]
    if any(s.start < 0 or s.stop > n or s.stop - s.start != rank for s, n in zip(spans, shape, strict=True)):
        what = f"tensor {name}.block is {block.tolist()}, no block of {rank} rows and columns of {list(shape)}"
        raise ArtifactError(what, where=where, fix=EDITED)
    return BlockBasis(shape, *spans)
