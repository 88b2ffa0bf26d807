"""The tensors of a checkpoint folder: of the files that transformers would read, by their headers."""

from __future__ import annotations

from pathlib import Path

from ..errors import BaseModelError
from ..files.storage import FLOATS, TensorInfo, read_header, read_json

INDEX = "model.safetensors.index.json"
_OUTPUT_EMBEDDING = "lm_head.weight"


def checkpoint_tensors(folder: Path) -> dict[str, tuple[Path, TensorInfo]]:
    """Checkpoint tensor name → (file, header entry), in file order; no weights are read.

    Raises:
        BaseModelError: no safetensors file, the index names a tensor that no file holds, or weights are no floats. An
            output embedding that none holds may be tied to the input's: `network.read_network` refuses one that is not.
    """
    whole, index = folder / "model.safetensors", folder / INDEX
    named = None if whole.is_file() or not index.is_file() else weight_map(index)
    files = [whole] if named is None else sorted({folder / name for name in named.values()})
    if named is None and not whole.is_file():
        raise BaseModelError(
            "no model.safetensors, nor an index of its parts, in the base model's folder",
            where=folder,
            fix="Load it once with transformers, save_pretrained(new_folder), and copy the tokenizer's files there",
        )
    found = {name: (file, info) for file in files for name, info in read_header(file).items()}
    if missing := sorted(set(named or ()) - set(found) - {_OUTPUT_EMBEDDING}):
        what = f"the index names tensor {missing[0]}, which no file holds"
        raise BaseModelError(what, where=index, fix="Fetch it again")
    for name, (file, info) in found.items():
        if name.endswith(".weight") and info.dtype not in FLOATS:
            fix = "Use a full-precision checkpoint"
            raise BaseModelError(f"{name} is stored as {info.dtype}, not as a float", where=file, fix=fix)
    return found


def weight_map(index: Path) -> dict[str, str]:
    """Tensor name → file of an index. Raises BaseModelError when it is none, or a file lies outside the folder."""
    found = read_json(index).get("weight_map")
    if not isinstance(found, dict):
        raise BaseModelError("the index has no weight_map", where=index, fix="Fetch it again")
    for name in found.values():
        if not isinstance(name, str) or name != Path(name).name or not name.endswith(".safetensors"):
            what = f"the index names {name!r:.60}, no safetensors file beside it"
            raise BaseModelError(what, where=index, fix="Fetch it again")
    return found
