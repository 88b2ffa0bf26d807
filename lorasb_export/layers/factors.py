"""The frozen factors of one module: two matrices, or the place of a block of its weight, for which nothing is held."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch


@dataclass(frozen=True, eq=False)
class ModuleBasis:
    """B (out, r) and A (r, in) orthonormal, S (r,) fp32."""

    B: torch.Tensor
    A: torch.Tensor
    S: torch.Tensor
    block: ClassVar[None] = None

    @property
    def shape(self) -> tuple[int, int]:
        """Of W, (out, in)."""
        return self.B.shape[0], self.A.shape[1]

    def tensors(self) -> Mapping[str, torch.Tensor]:
        """What a file holds of it."""
        return {"A": self.A, "B": self.B, "S": self.S}


@dataclass(frozen=True, eq=False)
class BlockBasis:
    """Unit vectors: s·B·R·A is s·R in `rows` and `columns` of W, zero elsewhere.

    B, A and S = 0 are made when they are asked for.

    Attributes:
        shape: of W, (out, in).
    """

    shape: tuple[int, int]
    rows: slice
    columns: slice

    @property
    def block(self) -> tuple[slice, slice]:
        return self.rows, self.columns

    @property
    def B(self) -> torch.Tensor:
        return _units(self.shape[0], self.rows)

    @property
    def A(self) -> torch.Tensor:
        return _units(self.shape[1], self.columns).T.contiguous()

    @property
    def S(self) -> torch.Tensor:
        return torch.zeros(self.rows.stop - self.rows.start, dtype=torch.float32)

    def tensors(self) -> Mapping[str, torch.Tensor]:
        """What a file holds of it: its first row and the one past its last, and of the columns."""
        return {"block": torch.tensor([[span.start, span.stop] for span in self.block])}


Factors = ModuleBasis | BlockBasis


def _units(n: int, span: slice) -> torch.Tensor:
    """(n, r): the unit matrix in `span`, zero elsewhere."""
    factor = torch.zeros(n, span.stop - span.start, dtype=torch.float32)
    factor[span].fill_diagonal_(1)
    return factor
