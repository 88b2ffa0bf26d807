"""A network as transformers makes it: its flaws mended, made-up weights refused."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..choices import CAUSAL_LM, NF4
from ..errors import BaseModelError, LoraSBError, first_line
from ..out_of_memory import is_out_of_memory
from .structure import body_of, classifies

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

_FETCH = "Fetch the base again"
_EFFICIENT = "FSDP_CPU_RAM_EFFICIENT_LOADING"
_SAVE_POOLER = "draw one for good: AutoModel.from_pretrained(folder).save_pretrained(new_folder)"


def mend_defaults(network: PreTrainedModel) -> None:
    """Mends, in place, what transformers does wrongly or slowly by default.

    Gemma 2 bounds its attention scores; of the implementations the default leaves that out in silence.

    A head that generates is given the last position of every row, a strided slice, for which torch multiplies row by
    row, each with the weight anew: in bfloat16 on a CPU with a copy of it, which takes longer than all layers.
    """
    if getattr(network.config, "attn_logit_softcapping", None):
        network.set_attn_implementation("eager")
    head = network.get_output_embeddings()
    if head is not None:
        head.register_forward_pre_hook(_contiguous)


def _contiguous(_: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(hidden.contiguous() for hidden in inputs)


@contextmanager
def as_base_model_error(folder: Path, fix: str = _FETCH) -> Iterator[None]:
    """Raise what transformers raises on a damaged folder, of a dozen types, as a BaseModelError about `folder`."""
    try:
        yield
    except Exception as error:
        if isinstance(error, LoraSBError) or is_out_of_memory(error):
            raise
        what = f"transformers cannot load the base: {first_line(error):.300}"
        raise BaseModelError(what, where=folder, fix=fix) from error


def auto_class(task_type: str) -> Any:
    """transformers' class of networks for a task type."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    return AutoModelForCausalLM if task_type == CAUSAL_LM else AutoModelForSequenceClassification


def empty_network(
    folder: Path, task_type: str, dtype: str | None, num_labels: int | None, stored_dtype: Callable[[], torch.dtype]
) -> PreTrainedModel:
    """A network whose parameters take no memory, as the config in `folder` has it.

    Args:
        dtype: None is the config's own, or where that names none `stored_dtype()`.

    Raises:
        BaseModelError: whatever transformers raises on a config.json that contradicts itself.
    """
    import torch
    from accelerate import init_empty_weights
    from transformers import AutoConfig, GenerationConfig

    with as_base_model_error(folder), init_empty_weights():
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        if num_labels is not None:
            config.num_labels = num_labels
        wanted = getattr(torch, dtype) if dtype else config.dtype
        wanted = stored_dtype() if wanted is None else wanted
        network: PreTrainedModel = auto_class(task_type).from_config(config, dtype=wanted)
        if network.can_generate() and (folder / "generation_config.json").is_file():
            with suppress(OSError):  # transformers passes over one that it cannot read
                network.generation_config = GenerationConfig.from_pretrained(folder)
    network.tie_weights()  # a parameter that is assigned within is another one
    return network


def read_network(
    folder: Path, loader: Any, options: Mapping[str, Any], seed: int, empty: PreTrainedModel | None
) -> PreTrainedModel:
    """`loader.from_pretrained`, with a head that the checkpoint lacks drawn by `seed`; the global RNG is untouched.

    Args:
        empty: of a network in four bits, itself as it is to be, without weights.

    Raises:
        BaseModelError: whatever transformers raises, or the checkpoint lacks a weight of the body.
    """
    import torch

    from .nf4 import keep_layout, other_shapes, renew_head

    # A head is drawn on the host: of the devices' generators torch would fork each, and of several it warns.
    devices = [device for device in options.get("device_map", {}).values() if device.type == "cuda"]
    fix = _FETCH if empty is None else f"Try without dtype {NF4}; if that fails too, fetch it again"
    network: PreTrainedModel
    with torch.random.fork_rng(devices), as_base_model_error(folder, fix), _read_by_every_process():
        torch.default_generator.manual_seed(seed)
        network, found = loader.from_pretrained(folder, trust_remote_code=False, output_loading_info=True, **options)
        newly_initialized = {*found["missing_keys"], *(name for name, *_ in found.get("mismatched_keys", ()))}
        if empty is not None:
            newly_initialized |= other_shapes(network, empty)
            torch.default_generator.manual_seed(seed)
            renew_head(network, empty, newly_initialized)
            keep_layout(network)
    _refuse_newly_initialized(network, newly_initialized, folder)
    return network


@contextmanager
def _read_by_every_process() -> Iterator[None]:
    """Under `accelerate launch --use_fsdp` transformers reads weights on the first alone, for FSDP to send the rest."""
    before = os.environ.get(_EFFICIENT)
    os.environ[_EFFICIENT] = "false"
    try:
        yield
    finally:
        os.environ.pop(_EFFICIENT)
        if before is not None:
            os.environ[_EFFICIENT] = before


def _refuse_newly_initialized(network: PreTrainedModel, missing: Iterable[str], folder: Path) -> None:
    """Refuse weights that the checkpoint lacks and transformers drew at random.

    A classifier's head may be new. The pooler, which checkpoints of language models lack, lies in the body: it is
    frozen, and no file would keep what was drawn.
    """
    prefix = f"{body_of(network)}."
    for name in sorted(missing):
        if name.startswith(prefix) or not classifies(network):
            pooler = ".pooler." in name
            fix = f"Use a checkpoint that has it, or {_SAVE_POOLER}" if pooler else _FETCH
            what = f"the checkpoint lacks {name}, or has it in another shape"
            raise BaseModelError(what, where=folder, fix=fix)
