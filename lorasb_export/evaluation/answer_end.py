"""Where an answer ends, everywhere the same: in torch, ONNX Runtime, transformers.js and vLLM."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING

from ..files.storage import read_json, write_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def end_ids(tokenizer: PreTrainedTokenizerBase, named: int | Sequence[int] | None) -> set[int]:
    """The tokens that end an answer, as vLLM has it: the tokenizer's end of sequence, and those that are `named`.

    Args:
        named: `eos_token_id` of the model's generation_config.json; of its config.json where there is none.
    """
    others = [named] if named is None or isinstance(named, int) else named
    return {token for token in (tokenizer.eos_token_id, *others) if token is not None}


def ends_of(folder: Path, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """`end_ids` of a model folder. Raises ArtifactError where a file that names them is missing or damaged."""
    generation = folder / "generation_config.json"
    config = read_json(generation if generation.is_file() else folder / "config.json")
    return end_ids(tokenizer, config.get("eos_token_id"))


def write_end_ids(folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Add to `eos_token_id` in a model folder's generation_config.json what else ends our answers.

    transformers' `generate` and transformers.js stop at nothing else; we and vLLM at the tokenizer's own as well.
    """
    path = folder / "generation_config.json"
    if path.is_file():
        config = read_json(path)
    else:
        named_by = read_json(folder / "config.json")
        config = {key: named_by[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if key in named_by}
    named = config.get("eos_token_id")
    ends = [named] if isinstance(named, int) else named or []
    if missing := end_ids(tokenizer, named).difference(ends):
        write_json(path, config | {"eos_token_id": [*ends, *missing]})


def before_end(answer: Sequence[int], ends: Collection[int]) -> list[int]:
    """The tokens before the first of `ends`."""
    return list(takewhile(lambda token: token not in ends, answer))
