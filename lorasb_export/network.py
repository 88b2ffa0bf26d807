"""A network as transformers makes it: its flaws mended, made-up weights refused."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .choices import NF4
from .errors import BaseModelError, LoraSBError, SettingsError, first_line, is_out_of_memory

if TYPE_CHECKING:
    import torch
    from torch.nn import Module
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_FETCH = "Fetch the base again"
_SAVE_POOLER = "draw one for good: AutoModel.from_pretrained(folder).save_pretrained(new_folder)"
_POSITIONS = ("position_embeddings", "wpe", "embed_positions")  # the names of learned ones: BERT's, GPT-2's, OPT's


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
    with torch.random.fork_rng(devices), as_base_model_error(folder, fix):
        torch.default_generator.manual_seed(seed)
        network, found = loader.from_pretrained(folder, trust_remote_code=False, output_loading_info=True, **options)
        newly_initialized = {*found["missing_keys"], *(name for name, *_ in found.get("mismatched_keys", ()))}
        if empty is not None:
            newly_initialized |= other_shapes(network, empty)
            torch.default_generator.manual_seed(seed)
            renew_head(network, empty, newly_initialized)
            keep_layout(network)
    refuse_newly_initialized(network, newly_initialized, folder)
    return network


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


@contextmanager
def evaluating(network: PreTrainedModel) -> Iterator[None]:
    """Without dropout; then in the mode it was in, which a loop of one's own may have left at training."""
    training = network.training
    network.eval()
    try:
        yield
    finally:
        network.train(training)


@contextmanager
def other_forwards(forwards: Mapping[Module, Callable[..., Any]]) -> Iterator[None]:
    """Module → what is called within in place of its `forward`; someone else's wrapper is put back afterwards."""
    before = {module: vars(module).get("forward") for module in forwards}
    try:
        for module, forward in forwards.items():
            module.forward = forward
        yield
    finally:
        for module, wrapper in before.items():
            del module.forward
            if wrapper is not None:
                module.forward = wrapper


def positions(network: PreTrainedModel) -> float:
    """How many tokens a network's learned positions reach; infinity where it has none."""
    import torch

    reach = math.inf
    for name, module in network.named_modules():
        if isinstance(module, torch.nn.Embedding) and name.endswith(_POSITIONS):
            first = getattr(module, "offset", 0 if module.padding_idx is None else module.padding_idx + 1)
            reach = min(reach, module.num_embeddings - first)
    return reach


def require_positions(network: PreTrainedModel, max_length: int) -> None:
    """Raise SettingsError where rows may be longer than a network's learned positions reach."""
    if max_length > (reach := positions(network)):
        fix = f"Lower max_length to {reach}"
        raise SettingsError(f"max_length is {max_length}, the base's positions end at {reach}", fix=fix)


def refuse_several_devices(network: Module) -> None:
    """Raise SettingsError where accelerate has spread `network`: which logits are wanted, or which of several adapters
    a row takes, is told on one device only."""
    if len(set(getattr(network, "hf_device_map", {}).values())) > 1:
        fix = "Load it onto one, or use one adapter, in a loop of your own: Adapter.attach takes such a model"
        raise SettingsError("the network lies on several devices", where="hf_device_map", fix=fix)


def require_first_device(device: torch.device) -> None:
    """Raise SettingsError for another than the first of several: transformers' Trainer takes that in a process alone,
    and would leave what lies elsewhere behind."""
    import torch

    if device.type == "cpu":
        return
    index = torch.accelerator.current_device_index() if device.index is None else device.index
    if index != 0:
        fix = f"Start the process with CUDA_VISIBLE_DEVICES={index}, in which it is the first"
        raise SettingsError(f"the base is on {device.type}:{index}, training takes {device.type}:0", fix=fix)


def require_dtype(network: PreTrainedModel, dtype: str) -> None:
    """Raise SettingsError where `network` is not of the `dtype` that settings ask for, and records would name."""
    from .nf4 import dtype_name

    loaded = dtype_name(network)
    if dtype not in ("auto", loaded) or (dtype == "auto" and loaded == NF4):
        fix = f"Set dtype to {loaded}, or load the network in that one"
        raise SettingsError(f"dtype is {dtype}, the network that was given is {loaded}", fix=fix)


def is_checkpointing(network: Module) -> bool:
    """Whether gradient checkpointing is switched on; transformers renames its own word for it."""
    return any(getattr(module, "gradient_checkpointing", False) for module in network.modules())


def classifies(network: Module) -> bool:
    """Whether it is a sequence classifier of transformers, which has a head to train."""
    return type(network).__name__.endswith("ForSequenceClassification")


def require_outputs(network: PreTrainedModel, num_labels: int | None) -> None:
    """Raise SettingsError where `network` has another head than rows ask for: None is that of text."""
    outputs = network.config.num_labels if classifies(network) else None
    if outputs != num_labels:
        theirs, ours = (f"a classifier (outputs: {n})" if n else "a model of text" for n in (outputs, num_labels))
        fix = "Load it for this task, or leave it out"
        raise SettingsError(f"the network that was given is {theirs}, the rows need {ours}", fix=fix)


def refuse_newly_initialized(network: PreTrainedModel, missing: Iterable[str], folder: Path) -> None:
    """Refuse a body with weights that the checkpoint lacks and transformers drew at random.

    A head may be new: a classifier's is. The pooler, which checkpoints of language models lack, lies in the body: it is
    frozen, and no file would keep what was drawn.
    """
    prefix = f"{network.base_model_prefix}."
    for name in sorted(missing):
        if name.startswith(prefix):
            pooler = ".pooler." in name
            fix = f"Use a checkpoint that has it, or {_SAVE_POOLER}" if pooler else _FETCH
            what = f"the checkpoint lacks {name}, or has it in another shape"
            raise BaseModelError(what, where=folder, fix=fix)
