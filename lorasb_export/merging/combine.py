"""Several adapters as few: those of one basis add up exactly, Σ wᵢ·sᵢ·B·Rᵢ·A = B·(Σ wᵢ·sᵢ·Rᵢ)·A."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ..adapter import Adapter
from ..errors import ArtifactError, SettingsError
from ..provenance import adapter_provenance

Weights = Mapping[str | Path, float]  # folder or Hub id → the weight of that adapter
Weighted = Sequence[tuple[Adapter, float]]  # the same of loaded adapters


def combine(weighted: Weighted) -> tuple[Adapter, ...]:
    """The linear combination of adapters: for every basis among them one adapter with scaling 1.

    Raises:
        SettingsError: a weight is not finite.
        ArtifactError: an adapter brings a classification head, or is for another kind of task.
    """
    groups: dict[str, list[tuple[Adapter, float]]] = {}
    task_type = None
    for adapter, weight in weighted:
        if not math.isfinite(weight):
            raise SettingsError(f"weight {weight} of an adapter", where=adapter.folder, fix="Give a finite number")
        if adapter.head:
            raise ArtifactError(
                "it has a classification head", where=adapter.folder, fix="Merge classifiers one by one"
            )
        if task_type not in (None, adapter.task_type):
            what = f"it is for {adapter.task_type}, the first for {task_type}"
            raise ArtifactError(what, where=adapter.folder, fix="Merge adapters of one kind")
        task_type = adapter.task_type
        groups.setdefault(adapter.basis_sha256, []).append((adapter, weight))
    return tuple(_of_one_basis(group) for group in groups.values())


def _of_one_basis(group: Weighted) -> Adapter:
    first = group[0][0]
    for adapter, _ in group:
        if set(adapter.R) != set(first.R):
            raise ArtifactError("its modules are not those of its basis", where=adapter.folder, fix="Fetch it again")
    R = {
        name: torch.stack([w * a.scaling * a.R[name].detach().cpu().double() for a, w in group]).sum(dim=0)
        for name in first.R
    }
    source = first.basis_source or str(first.folder)
    return Adapter(first.base, first.basis_sha256, source, R, 1.0, first.task_type, basis=first.basis)


def combined_record(weighted: Weighted) -> list[dict[str, Any]]:
    """What `lorasb.json` says about each adapter of a combination."""
    found = []
    for adapter, weight in weighted:
        said = adapter_provenance(adapter)
        found.append({**said["adapter"], "weight": weight} | {key: said[key] for key in ("basis", "rank", "scaling")})
    return found
