"""torch's attention in 16 bits on a CPU that cannot multiply them: in float32, as `products`.

A module of its own, since what it takes from transformers is slow to import.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .products import compute_dtype, without_autocast


def _in_float32(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """`sdpa_attention_forward`; in float32 if there will be a backward pass, which alone is slow in 16 bits."""
    backward = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (query, key, value))
    if compute_dtype(query) == query.dtype or not backward:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    wide = {name: _widened(option) for name, option in options.items()}
    with without_autocast("cpu"):
        tensors = query.float(), key.float(), value.float(), _widened(attention_mask)
        output, _ = sdpa_attention_forward(module, *tensors, **wide)
    return output.to(query.dtype), None


def _widened(value: Any) -> Any:
    return value.float() if torch.is_tensor(value) and value.is_floating_point() else value


def attend_in_float32() -> None:
    """Have every network of this process attend so, but where someone's own function has taken that of transformers.

    The name stays: by it models choose their masks.
    """
    if ALL_ATTENTION_FUNCTIONS["sdpa"] is sdpa_attention_forward:
        AttentionInterface.register("sdpa", _in_float32)
