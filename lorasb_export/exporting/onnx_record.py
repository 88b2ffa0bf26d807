"""`lorasb.json` of an ONNX folder: what its graph is and which adapters belong to it, sealed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import ArtifactError
from ..format import check_seal, sealed
from ..storage import read_json, write_json

RECORD = "lorasb.json"


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
    del record["config_sha256"]
    return record
