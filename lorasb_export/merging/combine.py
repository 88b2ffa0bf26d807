"""Several adapters as few: those of one basis add up exactly, Σ wᵢ·sᵢ·B·Rᵢ·A = B·(Σ wᵢ·sᵢ·Rᵢ)·A.

So their sum is an adapter too, which is scored, served or pushed as any other.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from ..adapter import Adapter
from ..adapter_folder import write_adapter
from ..data.trained_template import TEMPLATE_KEY
from ..errors import ArtifactError, SettingsError
from ..files.atomic import atomic_folder
from ..files.kind import ADAPTER_WEIGHTS, RECORD
from ..files.output import refuse_own_input
from ..files.storage import expanded, write_json
from ..provenance import adapter_provenance, command, versions
from ..tensors import check_savable

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


def load_weighted(adapter: str | Path | Adapter | Weights | Weighted) -> Weighted:
    """The adapters of a merge, each with its weight."""
    pairs: Collection[tuple[str | Path | Adapter, float]]
    if isinstance(adapter, str | Path | Adapter):
        pairs = [(adapter, 1.0)]
    else:
        pairs = adapter.items() if isinstance(adapter, Mapping) else adapter
    if not pairs:
        raise SettingsError("no adapter to merge", fix="Name at least one, with its weight")
    return [(a if isinstance(a, Adapter) else Adapter.load(a), weight) for a, weight in pairs]


def combine_into(adapters: Weights | Weighted, out: str | Path, *, overwrite: bool = False) -> dict[str, Any]:
    """Write the linear combination of adapters of one basis as an adapter of that basis.

    Args:
        adapters: each with its weight, any finite number.
        overwrite: replace the adapter that is there.

    Returns:
        `out`, `modules`, `rank`, `bytes` of the tensors, and `adapters`: what `lorasb.json` says of each.

    Raises:
        ArtifactError: an adapter or its basis is bad; they are of several bases, bring classification heads, or their
            sum is beyond fp32.
        OutputError: `out` exists, or is one of them.
        SettingsError: no adapter, or a weight that is not finite.
    """
    out = expanded(out)
    weighted = load_weighted(adapters)
    summed, *_ = combine(weighted)
    first = weighted[0][0]
    for one, _ in weighted:
        if (one.basis_sha256, one.base.fingerprint) != (first.basis_sha256, first.base.fingerprint):
            what = "it has another basis than the first: the sum is no adapter of one"
            raise ArtifactError(what, where=one.folder, fix="Merge them into a model, which may have several bases")
        refuse_own_input(out, one.folder, one.basis_source)
    record = combined_record(weighted)
    training = _common(weighted) | {"combined": [f"{one['weight']:g} · {one['name']}" for one in record]}
    summed.load_basis()
    R = {name: of_module.float() for name, of_module in summed.R.items()}
    check_savable(R, {}, (summed.rank, summed.rank))
    # No source where the basis lies in the first of them: then it goes along.
    adapter = replace(summed, R=R, basis_source=first.basis_source, training=training)
    with atomic_folder(out, overwrite=overwrite, kind="adapter") as temporary:
        write_adapter(adapter, temporary, out)
        made = {"kind": "adapter", "base": asdict(adapter.base), "combined": record}
        write_json(temporary / RECORD, made | {"versions": versions(), "command": command()})
    size = (out / ADAPTER_WEIGHTS).stat().st_size
    return {"out": str(out), "modules": len(adapter.R), "rank": adapter.rank, "bytes": size, "adapters": record}


def _common(weighted: Weighted) -> dict[str, Any]:
    """What all were trained with alike: their settings, as how long rows were, and the chat template."""
    trainings = [adapter.training for adapter, _ in weighted]
    settings = _shared([training.get("settings") or {} for training in trainings])
    template = {key: value for key, value in _shared(trainings).items() if key == TEMPLATE_KEY}
    return {"settings": settings, **template}


def _shared(values: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    first, *others = values
    return {key: value for key, value in first.items() if all(key in one and one[key] == value for one in others)}


def combined_record(weighted: Weighted) -> list[dict[str, Any]]:
    """What `lorasb.json` says about each adapter of a combination."""
    found = []
    for adapter, weight in weighted:
        said = adapter_provenance(adapter)
        found.append({**said["adapter"], "weight": weight} | {key: said[key] for key in ("basis", "rank", "scaling")})
    return found
