"""Model folders small enough to make in a blink, with a tokenizer of single characters."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, models
from transformers import (
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from lorasb_export.base.products import weight_of
from lorasb_export.files.storage import read_header, write_json
from lorasb_export.layers.layer import LoRASBLinear

TEMPLATE = "{% for m in messages %}<s>{{ m['content'] }}</s>{% endfor %}{% if add_generation_prompt %}<s>{% endif %}"
VOCABULARY = ["<unk>", "<s>", "</s>", *map(chr, range(32, 127))]


def save_tokenizer(folder: Path, *, template: bool = True, token_types: bool = False) -> None:
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(VOCABULARY)}, merges=[])),
        bos_token="<s>",
        eos_token="</s>",
        pad_token="</s>",
        chat_template=TEMPLATE if template else None,
        model_input_names=["input_ids", *(["token_type_ids"] if token_types else []), "attention_mask"],
    )
    tokenizer.save_pretrained(folder)


def make_llama(
    folder: Path, *, dtype: torch.dtype = torch.float32, shards: str = "50GB", tied: bool = True, width: int = 32
) -> Path:
    config = LlamaConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=width,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
        initializer_range=0.2,  # at the usual 0.02 a frozen random body has next to no effect on its logits
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )
    return _save(LlamaForCausalLM, config, folder, dtype, shards)


def make_gpt2(folder: Path) -> Path:
    config = GPT2Config(vocab_size=len(VOCABULARY), n_embd=32, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2)
    return _save(GPT2LMHeadModel, config, folder)


def make_bert(folder: Path, kind: type[PreTrainedModel] = BertModel) -> Path:
    config = BertConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        pad_token_id=2,
    )
    _save(kind, config, folder)
    save_tokenizer(folder, token_types=True)
    return folder


def write_index(folder: Path) -> None:
    """Make all safetensors files of a model folder parts of one checkpoint."""
    (folder / "model.safetensors").rename(folder / "model-1.safetensors")
    weight_map = {name: path.name for path in sorted(folder.glob("*.safetensors")) for name in read_header(path)}
    write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})


def _save(
    kind: type[PreTrainedModel], config: object, folder: Path, dtype: torch.dtype = torch.float32, shards: str = "50GB"
) -> Path:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = kind(config).to(dtype)  # type: ignore[arg-type]
    model.save_pretrained(folder, max_shard_size=shards)
    save_tokenizer(folder)
    return folder


def update_of(layer: LoRASBLinear) -> torch.Tensor:
    """What the layer adds to its base's weight, (out, in): measured, by its own forward pass of the unit vectors."""
    weight = weight_of(layer.base)
    unit_vectors = torch.eye(weight.shape[1], dtype=weight.dtype)
    update: torch.Tensor = layer(unit_vectors) - layer.base(unit_vectors)
    return update.T
