"""What an ONNX export takes: precisions, and two exporters.

One rule: onnxruntime-genai's builder for the decoders it knows, torch's exporter for all else.

The builder is an order of magnitude faster and its graph has fused attention, which decodes faster; torch's covers
encoders and further decoders with standard operators.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from ..base.model import BaseModel
from ..base.network import as_base_model_error
from ..base.supported import architecture
from ..choices import CAUSAL_LM, SEQ_CLS
from ..environment import require_packages
from ..errors import BaseModelError, SettingsError
from ..files.storage import DTYPE_BYTES

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

GENAI, TORCH = "genai", "torch"
_GENAI_ARCHITECTURES = {
    *("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM", "Phi3ForCausalLM"),
    *("GemmaForCausalLM", "Gemma2ForCausalLM"),
}
_HEAD_STEP = 16  # of sizes in GroupQueryAttention, which the builder's graphs use
# Families that the builder knows, exported by torch where it cannot handle their head size, window or targets.
_BOTH = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2")
_TORCH_TYPES = {
    CAUSAL_LM: {*_BOTH, "gemma3_text", "gpt2", "gpt_neox", "phi", "phi3", "stablelm", "starcoder2", "cohere", "olmo2"},
    SEQ_CLS: {"bert", "roberta", "xlm-roberta", "distilbert", "electra", "albert", "modernbert"},
}
_ROPE_OF_THE_BUILDER = {"LlamaForCausalLM": {"default", "llama3"}}  # others it leaves out without a word
_ROPE_OF_TORCH = {"default", "linear", "llama3", "yarn"}  # the others' angles depend on how long the text is
_SPLIT = re.compile(r"model\.layers\.(\d+)\.(?:self_(attn)|(mlp))\.((?:q|k|v|o|gate|up|down)_proj)")


class _GraphPrecision(NamedTuple):
    """One precision.

    Attributes:
        provider: what the graph is for.
        dtype: of the model in torch, before the graph's weights are quantized.
        room: bytes a parameter on the disk; int8 and int4 are made from fp32 first.
        bits: to which the weights are quantized, where they are.
    """

    provider: str
    dtype: str
    room: float
    bits: int | None = None


PRECISIONS = {
    "fp32": _GraphPrecision("cpu", "float32", 4.0),
    "int8": _GraphPrecision("cpu", "float32", 6.0, bits=8),
    "int4": _GraphPrecision("cpu", "float32", 5.0, bits=4),
    "fp16": _GraphPrecision("cuda", "float16", 2.0),
    "bf16": _GraphPrecision("cuda", "bfloat16", 2.0),
}


def check_request(precision: str, allowed: Collection[str]) -> None:
    """Refuse an unknown precision, and a machine without the ONNX packages, before any work is done."""
    if precision not in allowed:
        raise SettingsError(f"precision {precision!r} is unknown here", fix=f"Choose one of {', '.join(allowed)}")
    require_packages("onnx", "onnx_ir", "onnxscript", "onnxruntime", "onnxruntime_genai")


def parameter_count(base: BaseModel) -> int:
    """How many numbers the base's files hold."""
    return sum(info.nbytes // DTYPE_BYTES[info.dtype] for _, info in base.tensors.values())


def exporter_for(base: BaseModel, task_type: str, swappable: Iterable[str] = ()) -> str:
    """GENAI or TORCH.

    Args:
        swappable: the modules that must stay linear layers of their own; the builder splits fused ones.

    Raises:
        BaseModelError: neither exporter was tested with this architecture.
    """
    named = architecture(base.config)
    fused = [name for name in swappable if not _SPLIT.fullmatch(name)]
    genai = task_type == CAUSAL_LM and named in _GENAI_ARCHITECTURES and not fused
    config = read_config(base.folder)
    rope = _rope_types(config)
    angles = rope <= _ROPE_OF_THE_BUILDER.get(named, {"default"})
    if genai and angles and _fits_the_kernel(config) and not _wrong_window(config) and not _wrong_angles(config):
        return GENAI
    if odd := sorted(rope - _ROPE_OF_TORCH):
        raise BaseModelError(
            f"rotary embeddings of type {odd[0]} are not exported to ONNX",
            where=base.folder,
            fix="Use `lorasb merge` and run the model with transformers or vLLM",
        )
    if base.config["model_type"] in _TORCH_TYPES[task_type]:
        return TORCH
    known = _TORCH_TYPES[task_type] | (_GENAI_ARCHITECTURES if task_type == CAUSAL_LM else set())
    raise BaseModelError(
        f"{named or base.config['model_type']} is not exported to ONNX for {task_type}"
        + (f" with an adapter on {fused[0]}" if fused and named in _GENAI_ARCHITECTURES else ""),
        where=base.folder,
        fix=f"Use `lorasb merge` and run the model with transformers or vLLM. Exported are {', '.join(sorted(known))}",
    )


def read_config(folder: Path) -> PreTrainedConfig:
    """config.json as transformers and both exporters read it: what it leaves out has the value of its class."""
    from transformers import AutoConfig

    with as_base_model_error(folder):
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)


def _rope_types(config: PreTrainedConfig) -> set[str]:
    """The types of its rotary embeddings; `default` where it has none."""
    found = getattr(config, "rope_parameters", None) or {}
    each = [entry for entry in found.values() if isinstance(entry, dict)] or [found]  # one for each type of layer
    return {entry.get("rope_type", "default") for entry in each}


def _wrong_window(config: PreTrainedConfig) -> bool:
    """Whether attention has a sliding window that the builder's graph gets wrong; Gemma 2's it gets right."""
    return getattr(config, "sliding_window", None) is not None and config.model_type != "gemma2"


def _wrong_angles(config: PreTrainedConfig) -> bool:
    """Whether the builder would apply LongRoPE to this Phi-3: it decides by the two context lengths alone."""
    return config.model_type == "phi3" and config.max_position_embeddings != config.original_max_position_embeddings


def _fits_the_kernel(config: PreTrainedConfig) -> bool:
    """Whether the heads, and the part of them that is rotated, are of a size that GroupQueryAttention takes."""
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    rotated = int(size * config.rope_parameters.get("partial_rotary_factor", 1.0))
    return size % _HEAD_STEP == rotated % _HEAD_STEP == 0


def genai_outputs(modules: Iterable[str]) -> dict[str, str]:
    """Module → the builder's name for its linear layer's output, before its bias; the same in all precisions."""
    found = {}
    for module in modules:
        layer, attention, mlp, leaf = _SPLIT.fullmatch(module).groups()  # type: ignore[union-attr]  # exporter_for saw to it
        found[module] = f"/model/layers.{layer}/{attention or mlp}/{leaf}/MatMul/output_0"
    return found
