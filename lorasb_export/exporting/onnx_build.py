"""Two exporters, one rule: onnxruntime-genai's builder for the decoders it knows, torch's exporter for all else.

The builder is an order of magnitude faster and its graph has fused attention, which decodes faster; torch's covers
encoders and further decoders with standard operators. Each runs as a child process: it loads the whole model, and its
memory goes back when it ends.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from ..base import CAUSAL_LM, SEQ_CLS, BaseModel
from ..basis import Basis
from ..environment import child_environment
from ..errors import BaseModelError, ServerError
from ..network import as_base_model_error
from ..output import disk_error_in
from ..side_files import side_files
from ..storage import read_json, write_json
from .onnx_gemma import make_exact
from .onnx_graph import read_graph, rename_data

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

GENAI, TORCH = "genai", "torch"
GRAPH, DATA = "model.onnx", "model.onnx_data"  # the data file's name is the one transformers.js looks for
PROVIDERS = {"fp32": "cpu", "int8": "cpu", "int4": "cpu", "fp16": "cuda", "bf16": "cuda"}  # what each graph is for
# Of the model in torch, before the graph's weights are quantized.
DTYPES = dict.fromkeys(PROVIDERS, "float32") | {"fp16": "float16", "bf16": "bfloat16"}
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
_PENALTIES = ("repetition_penalty", "no_repeat_ngram_size")  # made for chats
_SPLIT = re.compile(r"model\.layers\.(\d+)\.(?:self_(attn)|(mlp))\.((?:q|k|v|o|gate|up|down)_proj)")


def exporter_for(model: BaseModel, task_type: str, swappable: Iterable[str] = ()) -> str:
    """GENAI or TORCH.

    Args:
        swappable: the modules that must stay linear layers of their own; the builder splits fused ones.

    Raises:
        BaseModelError: neither exporter was tested with this architecture.
    """
    architecture = (model.config.get("architectures") or [""])[0]
    fused = [name for name in swappable if not _SPLIT.fullmatch(name)]
    genai = task_type == CAUSAL_LM and architecture in _GENAI_ARCHITECTURES and not fused
    config = _read_config(model.folder)
    rope = _rope_types(config)
    angles = rope <= _ROPE_OF_THE_BUILDER.get(architecture, {"default"})
    if genai and angles and _fits_the_kernel(config) and not _wrong_window(config) and not _wrong_angles(config):
        return GENAI
    if odd := sorted(rope - _ROPE_OF_TORCH):
        raise BaseModelError(
            f"rotary embeddings of type {odd[0]} are not exported to ONNX",
            where=model.folder,
            fix="Use `lorasb merge` and run the model with transformers or vLLM",
        )
    if model.config["model_type"] in _TORCH_TYPES[task_type]:
        return TORCH
    known = _TORCH_TYPES[task_type] | (_GENAI_ARCHITECTURES if task_type == CAUSAL_LM else set())
    raise BaseModelError(
        f"{architecture or model.config['model_type']} is not exported to ONNX for {task_type}"
        + (f" with an adapter on {fused[0]}" if fused and architecture in _GENAI_ARCHITECTURES else ""),
        where=model.folder,
        fix=f"Use `lorasb merge` and run the model with transformers or vLLM. Exported are {', '.join(sorted(known))}",
    )


def _read_config(folder: Path) -> PreTrainedConfig:
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
    """Whether the builder takes a Phi-3 for one of LongRoPE, by its lengths alone."""
    return config.model_type == "phi3" and config.max_position_embeddings != config.original_max_position_embeddings


def _fits_the_kernel(config: PreTrainedConfig) -> bool:
    """Whether the heads, and the part of them that is rotated, are of a size that GroupQueryAttention takes."""
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    rotated = int(size * config.rope_parameters.get("partial_rotary_factor", 1.0))
    return size % _HEAD_STEP == rotated % _HEAD_STEP == 0


def build(
    exporter: str, model: Path, out: Path, precision: str, scratch: Path, task_type: str, basis: Basis | None = None
) -> None:
    """Write GRAPH and DATA into `out` and copy what lies beside the transformers folder `model`.

    Args:
        precision: fp32, fp16 or bf16.
        scratch: a temporary folder to run in. `python -m` puts the current folder first on its path, where a user's
            `datasets/` would hide the package of that name.
        basis: makes the targets swappable: kept apart (GENAI; `onnx_swap.add_basis` follows), or with A, B and R
            beside them (TORCH).
    """
    if exporter == GENAI:
        command = ["onnxruntime_genai.models.builder", "-i", str(model), "-o", str(out), "-p", precision]
        command += ["-e", PROVIDERS[precision], "-c", str(scratch / "cache")]
        # Without the second, plain onnxruntime refuses an empty cache for layers with a sliding window; without the
        # third, early versions run code that lies beside a model.
        options = [f"fuse_qkv={str(basis is None).lower()}", "windowed_kv_cache=false", "hf_remote=false"]
        command += ["--extra_options", *options]
    else:
        command = ["lorasb_export.exporting.onnx_torch", str(model), str(out), task_type]
        command.append(DTYPES[precision])
        if basis is not None:
            (scratch / "basis").mkdir()
            basis.write_into(scratch / "basis")
            command.append(str(scratch / "basis"))
    _run(command, scratch, model)
    _finish_graph(out, model if exporter == GENAI else None)
    tokenizer, template = out / "tokenizer_config.json", out / "chat_template.jinja"
    kept = {"model_max_length": read_json(tokenizer)["model_max_length"]} if exporter == GENAI else {}
    # The builder writes the tokenizer anew, as transformers 5 does and 4 cannot read it: what it wrote stays only where
    # the base has no tokenizer.json.
    own = (model / "tokenizer.json").is_file()
    for path in side_files(model):
        copy = out / path.relative_to(model)
        if not copy.exists() or (own and path.name != "genai_config.json"):
            copy.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, copy)
    if task_type == CAUSAL_LM:
        _ask_as_we_do(out)
    if template.is_file():  # transformers.js looks for it in the tokenizer's config alone
        kept["chat_template"] = template.read_text(encoding="utf-8")
    if kept:
        write_json(tokenizer, read_json(tokenizer) | kept)
    config = read_json(out / "config.json")
    # For transformers.js: which file it is (its "fp32" is the name without a suffix), and that DATA lies beside it.
    config["transformers.js_config"] = {"dtype": "fp32", "use_external_data_format": (out / DATA).exists()}
    if task_type == CAUSAL_LM:  # its context, under this name: GPT-2 has another, and some leave it out
        config["max_position_embeddings"] = _read_config(model).max_position_embeddings
    write_json(out / "config.json", config)


def _ask_as_we_do(out: Path) -> None:
    """Make generation_config.json end answers where ours end, without the penalties that ours leave out.

    transformers.js reads it, and would penalize greedy answers too.
    """
    from transformers import AutoTokenizer

    from ..inference import name_ends

    with as_base_model_error(out):
        tokenizer = AutoTokenizer.from_pretrained(out, trust_remote_code=False)
    name_ends(out, tokenizer)
    path = out / "generation_config.json"
    if path.is_file():
        write_json(path, {key: value for key, value in read_json(path).items() if key not in _PENALTIES})


def genai_outputs(modules: Iterable[str]) -> dict[str, str]:
    """Module → the builder's name for its linear layer's output, before its bias; the same in all precisions."""
    found = {}
    for module in modules:
        layer, attention, mlp, leaf = _SPLIT.fullmatch(module).groups()  # type: ignore[union-attr]  # exporter_for saw to it
        found[module] = f"/model/layers.{layer}/{attention or mlp}/{leaf}/MatMul/output_0"
    return found


def _run(command: list[str], scratch: Path, model: Path) -> None:
    child = subprocess.run(
        [sys.executable, "-m", *command],
        cwd=scratch,
        env=child_environment("accelerate", "PIL", "torchvision", "triton"),  # 45 MB, of no use here
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    if child.returncode != 0:
        last = [line for line in child.stdout.splitlines() if line.strip()][-6:]
        if error := disk_error_in("\n".join(last)):
            raise error
        raise ServerError(
            "\n  ".join([f"the ONNX exporter failed with exit code {child.returncode}; its last lines:", *last]),
            where=model,
            fix="Check that the memory holds the model; then report it with the versions of the packages",
        )


def _finish_graph(out: Path, built_from: Path | None) -> None:
    """Give the weights the name DATA, for the exporters add `.data` to the graph's; and the cache its head size, which
    the builder leaves open and transformers.js then takes for 0; and Gemma its exact numbers. Inputs that a node leaves
    out at its end go: the builder names them "", and onnxruntime before 1.23 knows fewer of GroupQueryAttention's.

    `built_from` is the checkpoint, where the builder was the exporter.
    """
    import onnx

    model = read_graph(out / GRAPH)
    if (out / f"{GRAPH}.data").exists():
        rename_data(model, f"{GRAPH}.data", DATA)
        (out / f"{GRAPH}.data").rename(out / DATA)
    if (out / "genai_config.json").is_file():
        size = read_json(out / "genai_config.json")["model"]["decoder"]["head_size"]
        for value in (*model.graph.input, *model.graph.output):
            if value.name.startswith(("past_key_values.", "present.")):
                value.type.tensor_type.shape.dim[3].dim_value = size
    for node in model.graph.node:
        while node.input and not node.input[-1]:
            node.input.pop()
    if built_from is not None and read_json(built_from / "config.json")["model_type"] in ("gemma", "gemma2"):
        make_exact(model.graph, built_from)
    onnx.save(model, out / GRAPH)
