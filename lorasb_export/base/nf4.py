"""A base whose linear layers are held in four bits: NF4 (arXiv 2305.14314, QLoRA), by bitsandbytes.

Its weights are packed: uint8, in a shape of their own, beside a state that says what they stand for.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..choices import NF4
from ..environment import require_packages
from ..errors import BaseModelError, SettingsError
from .structure import body_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel


# Layers of Mamba's kind read these weights, and do not call the layers that they belong to.
_READ_BY_OTHERS = ["dt_proj", "mixer.x_proj", "mixer.out_proj", "mamba.x_proj", "mamba.out_proj"]


def quantization(empty: PreTrainedModel) -> Any:
    """What transformers is asked for: that the body's linear layers are packed, and a head is not.

    Args:
        empty: the network without weights.

    Raises:
        MissingPackageError: bitsandbytes is not installed.
        SettingsError: the base is in float64.
    """
    require_packages("bitsandbytes", fix=f"For dtype {NF4}: pip install bitsandbytes")
    if empty.dtype == torch.float64:
        raise SettingsError(f"dtype is {NF4}, the base float64", fix="Take a base in 16 or 32 bits, or another dtype")
    from transformers import BitsAndBytesConfig

    heads = [name for name, _ in empty.named_children() if name != body_of(empty)]
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=NF4,
        bnb_4bit_compute_dtype=empty.dtype,
        bnb_4bit_use_double_quant=True,
        llm_int8_skip_modules=heads + _READ_BY_OTHERS,
    )


def loading_options(empty: PreTrainedModel, device: torch.device) -> dict[str, Any]:
    """Of `from_pretrained`, which then packs weights as it reads them: the base never lies there whole.

    Raises: see `quantization`.
    """
    if device.type != "cpu" and device.index is None:  # accelerate compares it with the process's own
        device = torch.device(device.type, torch.accelerator.current_device_index())
    return {"dtype": empty.dtype, "quantization_config": quantization(empty), "device_map": {"": device}}


def packed_modules(empty: PreTrainedModel) -> list[str]:
    """Names of the modules that `loading_options` has packed, whose places in `empty` are taken by others.

    Raises: see `quantization`.
    """
    from transformers.quantizers.auto import AutoHfQuantizer

    AutoHfQuantizer.from_config(quantization(empty)).preprocess_model(empty, device_map=None)
    return [name for name, module in empty.named_modules() if hasattr(module, "quant_state")]


def rounded(weight: torch.Tensor) -> torch.Tensor:
    """What a weight (out, in) is once it has been packed."""
    from bitsandbytes.functional import quantize_4bit

    return dequantize(*quantize_4bit(weight, quant_type=NF4, compress_statistics=True))


def other_shapes(network: PreTrainedModel, empty: PreTrainedModel) -> set[str]:
    """Parameters of another shape than in `empty`: where transformers packs weights it takes them as they come."""
    wanted = {name: sorted(parameter.shape) for name, parameter in empty.named_parameters()}  # a Conv1D is turned
    found = dict(network.named_parameters())
    return {
        name
        for name, weight in found.items()
        if sorted(getattr(state_of(weight), "shape", weight.shape)) != wanted[name]
    }


def renew_head(network: PreTrainedModel, empty: PreTrainedModel, newly_initialized: Collection[str]) -> None:
    """Draw a classifier's head on the host, where parameters of it are new, as for a base that is not packed."""
    for name, head in empty.named_children():
        if name != body_of(empty) and any(parameter.startswith(f"{name}.") for parameter in newly_initialized):
            head.to_empty(device="cpu")
            head.apply(empty._init_weights)
            setattr(network, name, head.to(network.device))


def is_packed(weight: torch.Tensor) -> bool:
    """Whether its numbers stand for others: in four or eight bits, floats too."""
    return weight.dtype.itemsize == 1 or not weight.is_floating_point()


def state_of(weight: torch.Tensor) -> Any:
    """What a packed weight stands for, as bitsandbytes keeps it; None of a weight that is not packed.

    Raises:
        BaseModelError: it is quantized otherwise: eight bits, or four in another layout.
    """
    state = getattr(weight, "quant_state", None)
    if not is_packed(weight) or (state is not None and not getattr(state, "packing_format_for_cpu", False)):
        return state
    what = f"the network's weights are {weight.dtype}".replace("torch.", "")
    if state is not None:
        what = "the network's weights were laid out anew for answering on a CPU"
    raise BaseModelError(what, fix=f"Load the base in a float type or, with --dtype {NF4}, in four bits")


def dtype_of(weight: torch.Tensor) -> torch.dtype:
    """Of the numbers in it, packed or not."""
    found: torch.dtype = getattr(getattr(weight, "quant_state", None), "dtype", weight.dtype)
    return found


def dequantize(weight: torch.Tensor, state: Any = None) -> torch.Tensor:
    """The weight (out, in) that a packed one stands for; one that is not packed as it is.

    Args:
        state: `state_of` the weight, where that does not know it any longer, as in a backward pass.
    """
    state = state_of(weight) if state is None else state
    if state is None:
        return weight
    from bitsandbytes.functional import dequantize_4bit

    found: torch.Tensor = dequantize_4bit(weight, state)
    return found


def keep_layout(network: nn.Module) -> None:
    """Have layers in four bits stay as they are on a CPU whose instructions multiply bfloat16.

    Without gradients they would lay out their weights anew, for a product that lets no gradient through afterwards.
    """
    for module in network.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]


@contextmanager
def as_if_with_peft(network: nn.Module) -> Iterator[None]:
    """transformers' Trainer refuses a packed network without PEFT's adapters: within, it takes them to be there."""
    network._hf_peft_config_loaded = True  # type: ignore[assignment]
    try:
        yield
    finally:
        del network._hf_peft_config_loaded
