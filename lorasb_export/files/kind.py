"""What a folder is."""

from __future__ import annotations

from pathlib import Path

from ..errors import ArtifactError
from .storage import cannot_read, look_at, read_json

PEFT_TYPE = "LORA_SB"  # a tool that does not know this type refuses the folder instead of loading half of it
_RECORDED = ("merged", "onnx", "onnx-adapters", "project", "quickstart")


def artifact_kind(folder: Path) -> str:
    """What a folder is: `basis`, `adapter`, `peft` or `base`, or what its lorasb.json says, one of `_RECORDED`.

    Raises:
        ArtifactError: not a folder, none of these, or it cannot be read.
    """
    with cannot_read(folder):
        look_at(folder / "adapter_config.json")  # the folder may be there, and not what is in it
        return _kind(folder)


def _kind(folder: Path) -> str:
    if not folder.is_dir():
        raise ArtifactError("not a folder", where=folder, fix="Check the path")
    if (folder / "adapter_config.json").is_file():
        return "adapter" if read_json(folder / "adapter_config.json").get("peft_type") == PEFT_TYPE else "peft"
    if (folder / "basis_config.json").is_file():
        return "basis"
    if (folder / "lorasb.json").is_file():
        kind = read_json(folder / "lorasb.json").get("kind")
        if kind in _RECORDED:
            return str(kind)
    elif (folder / "config.json").is_file():
        return "base"
    has_rows = any((folder / f"train{ending}").is_file() for ending in (".jsonl", ".csv"))
    fix = f"To see its rows: lorasb inspect --data {folder}" if has_rows else "Check the path"
    raise ArtifactError("neither a basis, an adapter nor a model folder", where=folder, fix=fix)
