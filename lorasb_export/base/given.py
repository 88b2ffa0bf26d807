"""A network that somebody gives us, or that we have loaded: refused where it does not do."""

from __future__ import annotations

import logging
from functools import cache
from typing import TYPE_CHECKING

from ..choices import NF4
from ..errors import BaseModelError, SettingsError
from .structure import classifies, positions, trained_positions

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


def require_positions(network: PreTrainedModel, max_length: int, *, where: str | None = None) -> None:
    """Raise SettingsError if rows, of the tasks `where`, may be longer than a network's learned positions reach.

    Warns where they may be longer than it is made for.
    """
    if max_length > (reach := positions(network)):
        fix = f"Lower max_length to {reach}"
        raise SettingsError(f"max_length is {max_length}, the base's positions end at {reach}", where=where, fix=fix)
    if max_length > (made_for := trained_positions(network)):
        _warn_of_length(max_length, made_for)


@cache
def _warn_of_length(max_length: int, made_for: float) -> None:
    """Once: a run asks several times."""
    what = "max_length is %d, and the base's config has max_position_embeddings = %d: what lies beyond is learnt badly"
    logger.warning(f"{what}, unless rope scaling in its config is meant to reach there", max_length, made_for)


def refuse_several_devices(network: PreTrainedModel) -> None:
    """Raise SettingsError where accelerate has spread `network`: which logits are wanted is told on one device only."""
    if len(set(getattr(network, "hf_device_map", {}).values())) > 1:
        fix = (
            "Load it onto one, or train in a loop of your own: Adapter.attach takes such a model, if none is offloaded"
        )
        raise SettingsError("the network lies on several devices", where="hf_device_map", fix=fix)


def require_first_device(device: torch.device) -> None:
    """Raise SettingsError for a device other than the first: in a single process transformers' Trainer takes the first,
    and would leave behind what lies elsewhere."""
    import torch

    if device.type == "cpu":
        return
    index = torch.accelerator.current_device_index() if device.index is None else device.index
    if index != 0:
        fix = "Start the process so that it sees that device alone (of CUDA's by CUDA_VISIBLE_DEVICES)"
        raise SettingsError(f"the base is on {device.type}:{index}, training takes {device.type}:0", fix=fix)


def require_model(network: PreTrainedModel) -> None:
    """Raise SettingsError for what wraps a model (`torch.compile`, PEFT, DDP): its modules have other names."""
    from transformers import PreTrainedModel

    if not isinstance(network, PreTrainedModel):
        fix = "Give the model in it, and compile or wrap it afterwards"
        raise SettingsError(f"the network is a {type(network).__name__}, not a model of transformers", fix=fix)


def require_padding(network: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise SettingsError for a classifier that takes another token for padding than the one that rows are padded with:
    it pools the last other token."""
    theirs, ours = getattr(network.config, "pad_token_id", None), tokenizer.pad_token_id
    if classifies(network) and theirs is not None and theirs != ours:
        what = f"the network takes token {theirs} for padding, rows are padded with {ours}"
        raise SettingsError(what, where="config.pad_token_id", fix=f"Set network.config.pad_token_id = {ours}")


def require_dtype(network: PreTrainedModel, dtype: str) -> None:
    """Raise SettingsError where `network` is not of the `dtype` that settings ask for, and records would name.

    Raises:
        BaseModelError: its weights are in four bits of another kind than NF4.
    """
    loaded = str(network.dtype).removeprefix("torch.")
    if getattr(network, "is_loaded_in_4bit", False):
        loaded = network.config.quantization_config.bnb_4bit_quant_type
        if loaded != NF4:
            raise BaseModelError(f"the network's weights are {loaded}", fix=f"Load it with bnb_4bit_quant_type={NF4!r}")
    if dtype not in ("auto", loaded) or (dtype == "auto" and loaded == NF4):
        fix = f"Set dtype to {loaded}, or load the network in that one"
        raise SettingsError(f"dtype is {dtype}, the network that was given is {loaded}", fix=fix)


def require_loaded(
    network: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, dtype: str, num_labels: int | None
) -> None:
    """Raise SettingsError where `network` is not what loading the base would have made for these settings and rows."""
    require_model(network)
    require_padding(network, tokenizer)
    require_dtype(network, dtype)
    require_outputs(network, num_labels)


def require_outputs(network: PreTrainedModel, num_labels: int | None) -> None:
    """Raise SettingsError where `network` has another head than rows ask for: None is that of text."""
    outputs = network.config.num_labels if classifies(network) else None
    if outputs != num_labels:
        theirs, ours = (f"a classifier (outputs: {n})" if n else "a model of text" for n in (outputs, num_labels))
        fix = "Load it for this task, or leave it out"
        raise SettingsError(f"the network that was given is {theirs}, the rows need {ours}", fix=fix)
