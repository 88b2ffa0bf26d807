"""What a model needs after transformers has made it: its flaws mended, made-up weights refused."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import BaseModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def amend(model: PreTrainedModel) -> None:
    """Mends, in place, what transformers does wrongly or slowly by default.

    Gemma 2 bounds its attention scores; of the implementations the default leaves that out in silence.

    A head that generates is given the last position of every row, a strided slice, for which torch multiplies row by
    row, each with the weight anew: in bfloat16 on a CPU with a copy of it, which takes longer than all layers.
    """
    if getattr(model.config, "attn_logit_softcapping", None):
        model.set_attn_implementation("eager")
    head = model.get_output_embeddings()
    if head is not None:
        head.register_forward_pre_hook(lambda _, inputs: tuple(hidden.contiguous() for hidden in inputs))


def refuse_made_up(model: PreTrainedModel, missing: Iterable[str], folder: Path) -> None:
    """Refuse a body with weights that the checkpoint lacks and transformers drew at random.

    A head may be new: a classifier's is. So may a pooler, which checkpoints of language models lack.
    """
    prefix = f"{model.base_model_prefix}."
    for name in sorted(missing):
        if name.startswith(prefix) and ".pooler." not in name:
            raise BaseModelError(f"the checkpoint lacks {name}", where=folder, fix="Fetch the base again")
