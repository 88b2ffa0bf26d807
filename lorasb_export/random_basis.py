"""A basis for which no data is needed: B and A orthonormal and random."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from .format import ModuleBasis
from .layer import weight_of


def random_factors(
    targets: Mapping[str, torch.nn.Module], rank: int, seed: int, dtype: torch.dtype
) -> dict[str, ModuleBasis]:
    """Module → B (out, r) and A (r, in), the Q of normal numbers; S = 0, so that R0 = 0 and training starts at W0."""
    generator, modules = torch.Generator().manual_seed(seed), {}
    for name, module in targets.items():
        B, A = (torch.linalg.qr(torch.randn(n, rank, generator=generator))[0] for n in weight_of(module).shape)
        modules[name] = ModuleBasis(B.to(dtype), A.T.to(dtype).contiguous(), torch.zeros(rank))
    return modules
