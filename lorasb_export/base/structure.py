"""What a network of transformers is made of, whoever has loaded it."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.nn import Module
    from transformers import PreTrainedModel

_POSITIONS = ("position_embeddings", "wpe", "embed_positions")  # the names of learned ones: BERT's, GPT-2's, OPT's
# RecurrentGemma's convolutions take no mask, DeepSeek V4 compresses tokens in blocks that padding moves, and what was
# the decoder of a sequence-to-sequence model counts padding in its positions.
_READ_PADDING = {
    *("bart", "bigbird_pegasus", "blenderbot", "blenderbot-small", "deepseek_v4", "marian", "mbart", "mvp", "pegasus"),
    *("plbart", "recurrent_gemma"),
}


def body_of(model: Module) -> str:
    """The name of what lies under the head: `base_model_prefix`, or where that is none (Llama 4) its only network."""
    named: str = model.base_model_prefix  # type: ignore[assignment]
    inside = [name for name, child in model.named_children() if hasattr(child, "base_model_prefix")]
    return inside[0] if len(inside) == 1 and not hasattr(model, named) else named


def classifies(network: Module) -> bool:
    """Whether it is a sequence classifier of transformers, which has a head to train."""
    return type(network).__name__.endswith("ForSequenceClassification")


def is_checkpointing(network: Module) -> bool:
    """Whether gradient checkpointing is switched on; transformers renames its own word for it."""
    return any(getattr(module, "gradient_checkpointing", False) for module in network.modules())


def reads_padding(network: PreTrainedModel) -> bool:
    """Whether padding before a prompt changes what is said to it, though it is masked."""
    return network.config.model_type in _READ_PADDING


def positions(network: PreTrainedModel) -> float:
    """How many tokens a network's learned positions reach; infinity where it has none."""
    import torch

    reach = math.inf
    for name, module in network.named_modules():
        if isinstance(module, torch.nn.Embedding) and name.endswith(_POSITIONS):
            first = getattr(module, "offset", 0 if module.padding_idx is None else module.padding_idx + 1)
            reach = min(reach, module.num_embeddings - first)
    return reach


def trained_positions(network: PreTrainedModel) -> float:
    """How many tokens a network is made for, as its config says; infinity where it does not.

    Positions that are computed (RoPE) go on beyond: the answers get worse, and nothing fails.
    """
    return getattr(network.config.get_text_config(), "max_position_embeddings", None) or math.inf
