"""What is this folder? Kind, rank, modules, sizes, hashes, spectrum."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from .adapter import Adapter
from .base.model import AnyBase, BaseModel
from .basis import Basis
from .calibration.subspace import by_module, spread
from .data.source import AnySource
from .data.task import TaskData, load_task
from .errors import LoraSBError, SettingsError
from .exporting.onnx_record import read_record
from .files.kind import ADAPTER_CONFIG, ADAPTER_WEIGHTS, MARK_FILES, RECORD, artifact_kind
from .files.storage import folder_bytes, read_header, read_json, sha256_file
from .format import only_numbers
from .hub.fetch import resolve_folder
from .publishing import checksums
from .publishing.outgoing import PROJECT, SUMS
from .publishing.project_index import read_index
from .settings import DRAWN

_FOUND = {"path", "kind", "bytes", "verified", "tensors"}  # never taken from what a folder says of itself


def inspect_folder(
    source: str | Path, *, data: AnySource | TaskData | None = None, base: AnyBase | None = None, verify: bool = False
) -> dict[str, Any]:
    """A description of any folder this package reads or writes; validated as its loader validates it.

    Args:
        source: a folder, or a Hub id, of which only what is described is fetched.
        data: of a basis, also what it captures of this task's gradient; loads the base model.
        base: the base model for `data`, where it is not where the basis says.
        verify: also compare every published file with SHA256SUMS; of a Hub id all of them are fetched. A basis or an
            adapter that was never pushed is compared with what its own config says.

    Raises:
        ArtifactError: it is none of them, or damaged; or with `verify` not as it was published.
        SettingsError: `data` for something that is not a basis.
        DataError, BaseModelError: `data` or the base is bad, or that is another base than the basis was made for.
    """
    folder, where = resolve_folder(source, MARK_FILES)
    kind = artifact_kind(folder)
    found: dict[str, Any] = {"path": where, "kind": kind}
    on_disk = where == str(folder)
    if on_disk:
        found["bytes"] = folder_bytes(folder)
    if data is not None and kind != "basis":
        raise SettingsError(f"--data is for a basis, this is a folder of kind {kind}", where=folder, fix="Leave it out")
    if verify and on_disk and kind in ("basis", "adapter") and not (folder / SUMS).is_file():
        found["verified"] = {"against": f"{kind}_config.json"}  # never pushed; to load it is to compare it with that
    elif verify:
        found["verified"] = {"against": SUMS, **checksums.verify(where)}
    if kind == "basis":
        basis = Basis.load(where)
        return found | _basis(basis) | ({} if data is None else {"capture": _capture(basis, data, base)})
    if kind == "adapter":
        return found | _adapter(Adapter.load(where))
    if kind == "base":
        if not on_disk:  # its weights may take hours to fetch
            return found | {"model_type": read_json(folder / "config.json").get("model_type")}
        base = BaseModel.resolve(folder)
        return found | {"model_type": base.config["model_type"], "tensors": len(base.tensors)}
    if kind == "merged" and on_disk:
        found["tensors"] = len(BaseModel.resolve(folder).tensors)
    if kind == "peft" and on_disk:
        found["tensors"] = len(read_header(folder / "adapter_model.safetensors"))
    if kind == "peft" and not (folder / RECORD).is_file():
        return found | _stock_peft(read_json(folder / ADAPTER_CONFIG))
    if kind == PROJECT:
        index = read_index(read_json(folder / RECORD))
        parts = {
            part: {**about, "evaluation": only_numbers(about["evaluation"])} if "evaluation" in about else about
            for part, about in index["parts"].items()
        }
        return found | {"base_model": index["base"], "parts": parts}
    record = read_record(folder) if kind.startswith("onnx") else read_json(folder / RECORD)
    return found | {key: value for key, value in record.items() if key not in _FOUND}


def _basis(basis: Basis) -> dict[str, Any]:
    made = basis.calibration
    found = {
        "base_model": basis.base.name_or_path,
        "rank": basis.rank,
        "modules": len(basis.modules),
        "sha256": basis.sha256,
        "directions": basis.directions,
    }
    if not basis.is_blocks:
        found["dtype"] = str(next(iter(basis.modules.values())).B.dtype).removeprefix("torch.")
    if basis.directions in DRAWN:
        return found
    calibrated = {
        "calibrated_on": [source["name"] for source in made.get("data", [])],
        "samples": made.get("samples"),
        "reduction": made.get("reduction"),
        "energy": spread(made.get("energy", {}).values()),
    }
    return found | calibrated | _recorded(made.get("capture", {}))


def _recorded(found: Mapping[str, Any]) -> dict[str, Any]:
    """What the basis says it captures; nothing for one that says nothing."""
    if not found:
        return {}
    tasks = {
        name: {key: value for key, value in of_task.items() if key not in ("sha256", "modules")}
        for name, of_task in found["tasks"].items()
    }
    overall = {"basis": found["basis"], "random": found["random"]}
    return {"recorded_capture": {**overall, "tasks": tasks, "by_module": by_module(found["modules"])}}


def _capture(basis: Basis, data: AnySource | TaskData, elsewhere: AnyBase | None) -> dict[str, Any]:
    from .calibration.capture import capture, overview  # only now: it brings transformers

    task = data if isinstance(data, TaskData) else load_task("data", data)
    base = basis.base.resolve(elsewhere)
    base.verify(basis.base, basis.modules)
    dtype, seed = basis.calibration.get("dtype", "auto"), basis.calibration.get("seed", 0)  # of a classifier's head
    network = base.load(task.task_type, dtype=dtype, num_labels=task.num_labels, seed=seed)
    found = capture(base, network, basis, task)
    return found | overview(found)


def _stock_peft(config: Mapping[str, Any]) -> dict[str, Any]:
    """What PEFT's own config says, of a folder that others wrote."""
    return {
        "peft_type": config.get("peft_type"),
        "base_model": config.get("base_model_name_or_path"),
        "rank": config.get("r"),
        "target_modules": config.get("target_modules"),
    }


def _adapter(adapter: Adapter) -> dict[str, Any]:
    assert adapter.folder is not None
    # Isometry: B and A are orthonormal, so ‖s·B·R·A‖ = s·‖R‖ and the singular values of the update are s·σ(R).
    spectrum = torch.linalg.svdvals(torch.stack(list(adapter.R.values()))) * adapter.scaling
    found = {
        "base_model": adapter.base.name_or_path,
        "task_type": adapter.task_type,
        "rank": adapter.rank,
        "scaling": adapter.scaling,
        "modules": len(adapter.R),
        "parameters": sum(R.numel() for R in adapter.R.values()),
        "sha256": sha256_file(adapter.folder / ADAPTER_WEIGHTS),
        "basis_sha256": adapter.basis_sha256,
        "basis_source": adapter.basis_source,
        "update_norm": {
            "total": float(spectrum.square().sum().sqrt()),
            "largest_singular_value": float(spectrum.max()),
        },
        "training": dict(adapter.training),
    }
    try:
        adapter.load_basis()
        found["basis_matches"] = True
    except LoraSBError as error:
        found["basis_matches"], found["basis_problem"] = False, str(error)
    return found
