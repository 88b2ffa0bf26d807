"""A basis and an adapter to push."""

from __future__ import annotations

from pathlib import Path

import torch

from lorasb_export.adapter import Adapter
from lorasb_export.base.model import BaseRef
from lorasb_export.basis import Basis
from lorasb_export.layers.factors import ModuleBasis

BASE = BaseRef("owner/base", None, "f" * 64)
RANK, MODULES = 4, {"model.layers.0.q_proj": (16, 8), "model.layers.0.v_proj": (8, 8)}


def make(folder: Path, seed: int = 0, base: BaseRef = BASE) -> tuple[Path, Path]:
    """A saved basis and a saved adapter that names it by a relative path."""
    generator = torch.Generator().manual_seed(seed)
    modules = {
        name: ModuleBasis(
            torch.linalg.qr(torch.randn(rows, RANK, generator=generator))[0].contiguous(),
            torch.linalg.qr(torch.randn(columns, RANK, generator=generator))[0].T.contiguous(),
            torch.ones(RANK),
        )
        for name, (rows, columns) in MODULES.items()
    }
    calibration = {"samples": 1, "reduction": "sign", "data": [], "energy": {"a": 0.5}}
    Basis(base, RANK, modules, calibration).save(folder / "basis")
    basis = Basis.load(folder / "basis")
    R = {name: torch.randn(RANK, RANK, generator=generator) for name in MODULES}
    Adapter(base, basis.sha256, basis.source, R, training={"steps": 1}).save(folder / "adapters" / "a")
    return folder / "basis", folder / "adapters" / "a"


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}
