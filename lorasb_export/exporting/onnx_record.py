"""`lorasb.json` of an ONNX folder: what its graph is and which adapters belong to it, sealed."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import packages_distributions, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..cards import card
from ..errors import ArtifactError
from ..files.kind import RECORD
from ..files.storage import folder_bytes, read_json, write_json
from ..format import check_seal, sealed
from ..names import name_problem
from ..provenance import adapter_provenance, command, published_training, versions
from .onnx_exporter import PRECISIONS

if TYPE_CHECKING:
    from ..adapter import Adapter


def write_record(folder: Path, record: Mapping[str, Any]) -> None:
    write_json(folder / RECORD, sealed(record))


def read_record(folder: Path) -> dict[str, Any]:
    """What `write_record` wrote.

    Raises:
        ArtifactError: no ONNX export, or the record was changed since it was written.
    """
    record = read_json(folder / RECORD) if (folder / RECORD).is_file() else {}
    if record.get("kind") not in ("onnx", "onnx-adapters"):
        raise ArtifactError("not an ONNX export", where=folder, fix="Give what `lorasb export --format onnx` wrote")
    check_seal(record, folder / RECORD)
    problems = [name_problem(name, "be a file of the folder") for name in record.get("adapters", ())]
    if problem := next(filter(None, problems), None):
        raise ArtifactError(problem, where=folder / RECORD, fix="Export it again")
    del record["config_sha256"]
    return record


def onnx_provenance(adapter: Adapter, precision: str) -> dict[str, Any]:
    """What `lorasb.json` says of every ONNX export."""
    distributions = packages_distributions()  # the GPU builds are called onnxruntime-gpu and onnxruntime-genai-cuda
    names = [distributions[package][0] for package in ("onnx", "onnxruntime", "onnxruntime_genai")]
    record = {
        **adapter_provenance(adapter),
        "precision": precision,
        "execution_provider": PRECISIONS[precision].provider,
    }
    record |= {"command": command(), "training": published_training(adapter)}
    return record | {"versions": versions() | {name: version(name) for name in names}}


def finish(folder: Path, out: str | Path, record: dict[str, Any]) -> dict[str, Any]:
    """Write `lorasb.json` and the card; returns `record` with the folder's name and size."""
    write_record(folder, record)
    card.write(folder, card.onnx_card(record))
    return record | {"out": str(out), "bytes": folder_bytes(folder)}
