"""Several adapters of one basis as one: Σ wᵢ·sᵢ·B·Rᵢ·A = B·(Σ wᵢ·sᵢ·Rᵢ)·A, exactly."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from .artifact import Adapter
from .errors import ArtifactError, SettingsError


def combine(weights: Mapping[str | Path, float]) -> Adapter:
    """The linear combination of adapters, as one adapter with scaling 1.

    Args:
        weights: folder or Hub id → its weight.

    Raises:
        SettingsError: a weight is not finite.
        ArtifactError: an adapter is damaged, they do not share one basis, or one brings a classification head.
    """
    adapters = [Adapter.load(source) for source in weights]
    first = adapters[0]
    for adapter, weight in zip(adapters, weights.values(), strict=True):
        if weight - weight != 0:
            raise SettingsError(f"weight {weight} of an adapter", where=adapter.folder, fix="Give a finite number")
        if adapter.basis_sha256 != first.basis_sha256 or set(adapter.R) != set(first.R):
            raise ArtifactError(
                f"another basis ({adapter.basis_sha256[:12]}) than the first adapter's ({first.basis_sha256[:12]})",
                where=adapter.folder,
                fix="Combine adapters that were trained in one basis",
            )
        if adapter.head:
            raise ArtifactError(
                "it has a classification head", where=adapter.folder, fix="Merge classifiers one by one"
            )
    R = {
        name: torch.stack(
            [w * a.scaling * a.R[name].double() for a, w in zip(adapters, weights.values(), strict=True)]
        ).sum(dim=0)
        for name in first.R
    }
    source = first.basis_source or str(first.folder)
    return Adapter(first.base, first.basis_sha256, source, R, 1.0, first.task_type)


def provenance(weights: Mapping[str | Path, float]) -> list[dict[str, object]]:
    """What `lorasb.json` says about each adapter of a combination."""
    loaded = [(Adapter.load(source), weight) for source, weight in weights.items()]
    return [{**a.provenance()["adapter"], "weight": w} for a, w in loaded]
