"""A tokenizer as transformers makes it, and as a base needs it: with a token to pad with."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import BaseModelError
from .network import as_base_model_error

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from .model import BaseModel


def tokenizer_of(folder: Path) -> PreTrainedTokenizerBase:
    """A folder's tokenizer, as its Hugging Face files say.

    Beside a tekken.json transformers takes Mistral's own, if mistral_common is there, which vLLM brings: that one knows
    no chat template, and serving asks with the template.
    """
    from transformers import AutoTokenizer

    has_others = any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json"))
    found: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
        folder, trust_remote_code=False, mistral_format=False if has_others else None
    )
    return found


def padded_tokenizer(base: BaseModel) -> PreTrainedTokenizerBase:
    """See `BaseModel.tokenizer`."""
    with as_base_model_error(base.folder):
        tokenizer = tokenizer_of(base.folder)
    ids = tokenizer.pad_token_id, tokenizer.eos_token_id
    pads, ends = (token is not None and token < base.embeddings for token in ids)
    if not pads:
        if not ends:
            what = "the tokenizer has neither a pad token nor an end-of-sequence token with an embedding"
            fix = "Name one in tokenizer_config.json, for instance as pad_token"
            raise BaseModelError(what, where=base.folder, fix=fix)
        tokenizer.pad_token = tokenizer.eos_token
    if base.config.get("type_vocab_size", 0) < 2:
        tokenizer.model_input_names = [name for name in tokenizer.model_input_names if name != "token_type_ids"]
    return tokenizer
