"""The tensors of a checkpoint folder: of the files that transformers would read, by their headers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from ..errors import BaseModelError
from ..files.storage import FLOATS, TensorInfo, read_header, read_json

WEIGHT_INDEX = "model.safetensors.index.json"
_OUTPUT_EMBEDDING = "lm_head.weight"
# What transformers, and vLLM, read as `model.`: of models cut out of one for images (Qwen3.5), and of Nemotron-H.
_READ_AS_MODEL = ("model.language_model.", "backbone.")


def checkpoint_tensors(folder: Path) -> dict[str, tuple[Path, TensorInfo]]:
    """Checkpoint tensor name → (file, header entry), in file order; no weights are read.

    Raises:
        BaseModelError: no safetensors file, the index names a tensor that no file holds, or weights are no floats. An
            output embedding that none holds may be tied to the input's: `network.read_network` refuses one that is not.
    """
    whole, index = folder / "model.safetensors", folder / WEIGHT_INDEX
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


def possible_keys(parameter: str) -> Iterator[str]:
    """What a checkpoint may call a parameter of the network.

    A model class with a head prefixes its body (`bert.`, `transformer.`, `model.`); the checkpoint may not, or with
    another word.
    """
    yield parameter
    body, _, inner = parameter.partition(".")
    yield inner
    if body == "model":
        yield from (f"{prefix}{inner}" for prefix in _READ_AS_MODEL)


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
