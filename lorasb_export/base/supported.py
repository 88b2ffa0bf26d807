"""Which base models this package takes: by their config, and by what a merge has noted beside it."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import NoneType
from typing import Any

from ..errors import BaseModelError
from ..files.kind import ADAPTER_CONFIG, RECORD
from ..files.storage import read_json

_OTHERS = "Use a decoder (Llama, Qwen, Mistral, …) or an encoder (BERT, RoBERTa, …)"
_ALL_LOGITS = "computes all logits, whichever are wanted"
_LOOKS_AHEAD = "sees the tokens that it is to predict"
# Model types of which transformers' network does not do, and why: training would fail, or go wrong without a word.
_REFUSED = {
    "cpmant": _LOOKS_AHEAD,
    "fnet": "reads padding as text",
    "prophetnet": _ALL_LOGITS,
    "rwkv": "divides weights in place when it answers, and reads padding as text",
    "trocr": _ALL_LOGITS,
    "whisper": _ALL_LOGITS,
    "xlnet": f"{_LOOKS_AHEAD}, and classifies by padding",
    "xlstm": f"reads padding as text, and {_ALL_LOGITS}",
}
# Encoders that transformers takes for language models too, with a warning at most. The tokens of the first see those
# that follow, unless `is_decoder` is set; the others, set or not, answer otherwise than they are trained: at other
# positions (RoBERTa's kind), by a mask token (XLM's), in buckets that padding moves (Reformer).
_DECODERS_IF_SET = {
    *("bert", "bert-generation", "big_bird", "electra", "ernie", "megatron-bert", "rembert", "roc_bert", "roformer")
}
_ENCODERS = {
    *("camembert", "data2vec-text", "flaubert", "reformer", "roberta", "roberta-prelayernorm"),
    *("xlm", "xlm-roberta", "xlm-roberta-xl", "xmod"),
}


def check_supported(config: Mapping[str, Any], folder: Path) -> None:
    """Raise BaseModelError for a base that is quantized, takes more than text, neither generates nor classifies, of a
    type whose network does not do, or of which transformers would load other weights than those that are checked."""
    _check_types(config, folder)
    if config.get("transformers_weights") is not None:
        raise BaseModelError(
            "config.json names the file of its weights itself (transformers_weights)",
            where=folder / "config.json",
            fix="Remove that key; the weights are those of model.safetensors, or of its index",
        )
    if (folder / ADAPTER_CONFIG).is_file():
        raise BaseModelError(
            "the base's folder holds an adapter too, which transformers would apply",
            where=folder / ADAPTER_CONFIG,
            fix="Use a folder, or a repository, of the model alone: a copy without adapter_config.json will do",
        )
    quantization = config.get("quantization_config")
    if quantization is not None:
        method = quantization.get("quant_method", "unknown")
        full = quantization.get("base_model_name_or_path") or config.get("_name_or_path")
        raise BaseModelError(
            f"the base model is quantized ({method})",
            where=folder / "config.json",
            fix=f"Use its full-precision original{f', {full}' if full else ''}",
        )
    if config.get("is_encoder_decoder") or not _has_a_class(config):
        raise BaseModelError(
            f"model type {config.get('model_type')!r} is neither a causal language model nor a sequence classifier",
            where=folder / "config.json",
            fix=_OTHERS,
        )
    if reason := _REFUSED.get(str(config.get("model_type"))):
        what = f"model type {config['model_type']!r} is not supported: its network in transformers {reason}"
        raise BaseModelError(what, where=folder / "config.json", fix=_OTHERS)
    named = architecture(config)
    if named.endswith("ForConditionalGeneration"):
        raise BaseModelError(
            f"{named} takes images or audio beside text, which is not supported",
            where=folder / "config.json",
            fix="Use a model of text alone, whose class ends in ForCausalLM",
        )


def architecture(config: Mapping[str, Any]) -> str:
    """The class that a config names first; empty where it names none."""
    return (config.get("architectures") or [""])[0]


def generates(config: Mapping[str, Any]) -> bool:
    """Whether it is a causal language model; one whose config.json does not say is taken for one if it can be."""
    if config.get("model_type") in _ENCODERS or _sees_what_follows(config):
        return False
    if named := architecture(config):
        return named.endswith(("ForCausalLM", "LMHeadModel"))
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return config["model_type"] in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES


def why_it_does_not(config: Mapping[str, Any]) -> str:
    """Where `generates` is false though the name of the class says otherwise: the reason, else nothing."""
    if config.get("model_type") in _ENCODERS:
        return ": transformers' network answers otherwise than it is trained"
    return ": by its config.json its tokens see those that follow" if _sees_what_follows(config) else ""


def _sees_what_follows(config: Mapping[str, Any]) -> bool:
    """Whether a token's logits are made of the tokens after it, which in training are its labels."""
    if config.get("model_type") in _DECODERS_IF_SET and not config.get("is_decoder"):
        return True
    # Models of embeddings, under the name of the decoder that they were made from.
    return not config.get("is_causal", True) or config.get("use_bidirectional_attention") in (True, "all")


def refuse_merged(folder: Path) -> None:
    """Raise BaseModelError where `lorasb merge` wrote this folder: no adapter is for such a base."""
    path = folder / RECORD
    provenance = read_json(path) if path.is_file() else {}
    if provenance.get("kind") != "merged":
        return
    what, fix = "this base is already merged", "Use the plain base"
    with suppress(KeyError, TypeError):  # of a note that was edited by hand
        adapters = provenance.get("adapters") or [provenance["adapter"]]
        named = [f"adapter {found['name'] or 'without a name'}, {found['sha256'][:12]}" for found in adapters]
        what += f" (with {', '.join(named)})"
        fix += f", {provenance['base']['name_or_path']}"
    raise BaseModelError(what, where=folder, fix=fix)


def _check_types(config: Mapping[str, Any], folder: Path) -> None:
    """Refuse what is read here with a value of another type than transformers writes."""
    architectures = config.get("architectures") or []
    right = {
        "architectures": isinstance(architectures, list) and all(isinstance(name, str) for name in architectures),
        "model_type": isinstance(config.get("model_type", ""), str | NoneType),
        "type_vocab_size": isinstance(config.get("type_vocab_size", 0), int),
        "vocab_size": isinstance(config.get("vocab_size", 0), int),
        "quantization_config": isinstance(config.get("quantization_config"), dict | NoneType),
    }
    for key in (key for key, is_right in right.items() if not is_right):
        what = f"{key} is {config[key]!r:.40}"
        raise BaseModelError(
            what, where=folder / "config.json", fix="Fetch it again: transformers writes no such value"
        )


def _has_a_class(config: Mapping[str, Any]) -> bool:
    """Whether transformers knows the model as a causal language model or a sequence classifier."""
    named = architecture(config)
    if named.endswith(("ForCausalLM", "LMHeadModel")) and _transformers_defines(named, str(config.get("model_type"))):
        return True  # seen in its source: to import transformers takes a second, the table below two more and 170 MB
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    )

    known = {*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES}
    return config.get("model_type") in known


def _transformers_defines(class_name: str, model_type: str) -> bool:
    found = importlib.util.find_spec("transformers")
    family = model_type.replace("-", "_").removesuffix("_text")
    for root in (found.submodule_search_locations or []) if found else []:
        path = Path(root, "models", family, f"modeling_{family}.py")
        if path.is_file() and f"class {class_name}(" in path.read_text(encoding="utf-8"):
            return True
    return False
