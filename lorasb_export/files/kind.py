"""What a folder is, and the names of the files in it."""

from __future__ import annotations

from pathlib import Path

from ..errors import ArtifactError
from .storage import cannot_read, look_at, read_json

# The files of the format, as docs/reference/files.md has them.
RECORD = "lorasb.json"  # how a folder was made; of a project's repository, its index
CARD = "README.md"
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter.safetensors"
BASIS_CONFIG, BASIS_WEIGHTS = "basis_config.json", "basis.safetensors"
# What each kind of folder is read from. Nothing else is fetched: no picture, and never a pickle or a script.
ADAPTER_FILES = (ADAPTER_WEIGHTS, ADAPTER_CONFIG)
BASIS_FILES = (BASIS_CONFIG, BASIS_WEIGHTS)
MARK_FILES = (ADAPTER_CONFIG, BASIS_CONFIG, RECORD, "config.json")  # they say what a folder is

PEFT_TYPE = "LORA_SB"  # a tool that does not know this type refuses the folder instead of loading half of it
_RECORDED = ("merged", "onnx", "onnx-adapters", "project", "quickstart")


def artifact_kind(folder: Path) -> str:
    """What a folder is: `basis`, `adapter`, `peft` or `base`, or what its lorasb.json says, one of `_RECORDED`.

    Raises:
        ArtifactError: not a folder, none of these, or it cannot be read.
    """
    with cannot_read(folder):
        look_at(folder / ADAPTER_CONFIG)  # the folder may be there, and not what is in it
        return _kind(folder)


def _kind(folder: Path) -> str:
    if not folder.is_dir():
        raise ArtifactError("not a folder", where=folder, fix="Check the path")
    if (folder / ADAPTER_CONFIG).is_file():
        return "adapter" if read_json(folder / ADAPTER_CONFIG).get("peft_type") == PEFT_TYPE else "peft"
    if (folder / BASIS_CONFIG).is_file():
        return "basis"
    if (folder / RECORD).is_file():
        kind = read_json(folder / RECORD).get("kind")
        if kind in _RECORDED:
            return str(kind)
    elif (folder / "config.json").is_file():
        return "base"
    has_rows = any((folder / f"train{ending}").is_file() for ending in (".jsonl", ".csv"))
    fix = f"To see its rows: lorasb inspect --data {folder}" if has_rows else "Check the path"
    raise ArtifactError("neither a basis, an adapter nor a model folder", where=folder, fix=fix)
