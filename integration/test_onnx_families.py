"""ONNX exports of a tiny random model of every family answer as torch does; windows shorter than the prompts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("onnxruntime_genai")

import transformers as t

from lorasb_export import merge
from lorasb_export.adapter import Adapter
from lorasb_export.base.model import BaseModel
from lorasb_export.choices import CAUSAL_LM, SEQ_CLS
from lorasb_export.data.encoding import prompt_ids
from lorasb_export.data.task import TaskData, load_task
from lorasb_export.errors import ArtifactError, BaseModelError, DataError
from lorasb_export.evaluation.evaluate import evaluate
from lorasb_export.exporting import onnx_verify
from lorasb_export.exporting.onnx import export_onnx
from lorasb_export.exporting.onnx_adapters import export_onnx_adapters
from lorasb_export.exporting.onnx_ask import ask_onnx
from lorasb_export.exporting.onnx_build import GRAPH
from lorasb_export.exporting.onnx_exporter import GENAI, TORCH, exporter_for
from lorasb_export.exporting.onnx_graph import read_graph
from lorasb_export.exporting.onnx_run import OnnxDecoder, classify, run_classifier
from lorasb_export.exporting.onnx_verify import require_equal
from lorasb_export.files.storage import read_json, write_json
from lorasb_export.settings import BLOCK, RANDOM
from tests.conftest import write_splits
from tests.families import CONFIGS, SIZES
from tests.random_adapter import save_adapter, write_in
from tests.tiny import VOCABULARY, save_tokenizer

from .reference import greedy, random_prompts

pytestmark = pytest.mark.usefixtures("quick_exporters")

TOKENS = 16
PROMPTS = random_prompts(3, 26, 9, 1, 40)
SPLIT = ("q_proj", "v_proj", "down_proj")
WINDOW = {"sliding_window": 16}
HEAD, NO_HEAD = {"head_dim": 16}, {"head_dim": 8}  # the second is what the sizes make of it
LINEAR = {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}
GPT2 = {"vocab_size": len(VOCABULARY), "n_embd": 32, "n_layer": 2, "n_head": 4, "initializer_range": 0.2}
# family: its class, what its config has of its own, the ends of the targets' names
DECODERS: dict[str, tuple[str, dict[str, Any], tuple[str, ...]]] = {
    "qwen2": ("Qwen2ForCausalLM", {}, SPLIT),
    "qwen3": ("Qwen3ForCausalLM", {}, SPLIT),
    "mistral": ("MistralForCausalLM", WINDOW, SPLIT),
    "gemma": ("GemmaForCausalLM", {}, SPLIT),
    "gemma2": ("Gemma2ForCausalLM", WINDOW, SPLIT),
    "gemma3": ("Gemma3ForCausalLM", WINDOW, SPLIT),
    "an odd head": ("LlamaForCausalLM", {"head_dim": 8}, SPLIT),
    "scaled angles": ("LlamaForCausalLM", {"rope_parameters": LINEAR}, SPLIT),
    "phi3": ("Phi3ForCausalLM", {}, ("qkv_proj", "gate_up_proj")),
    "gpt2": ("GPT2LMHeadModel", GPT2, ("c_attn", "c_fc")),
    "gpt_neox": ("GPTNeoXForCausalLM", {"num_attention_heads": 2}, ("query_key_value", "dense_4h_to_h")),
    "phi": ("PhiForCausalLM", NO_HEAD, ("q_proj", "fc2")),
    "stablelm": ("StableLmForCausalLM", NO_HEAD, SPLIT),
    "starcoder2": ("Starcoder2ForCausalLM", WINDOW, ("q_proj", "c_proj")),
    "cohere": ("CohereForCausalLM", {}, SPLIT),
    "olmo2": ("Olmo2ForCausalLM", {}, SPLIT),
}
ENCODERS = {
    "bert": ("BertForSequenceClassification", {}, ("query", "output.dense")),
    "roberta": ("RobertaForSequenceClassification", {}, ("query", "output.dense")),
    "xlm-roberta": ("XLMRobertaForSequenceClassification", {}, ("query", "output.dense")),
    "electra": ("ElectraForSequenceClassification", {"embedding_size": 16}, ("query", "output.dense")),
    "albert": ("AlbertForSequenceClassification", {"embedding_size": 16, "num_hidden_groups": 2}, ("query", "ffn")),
    "distilbert": (
        "DistilBertForSequenceClassification",
        {"dim": 32, "hidden_dim": 64, "n_layers": 2, "n_heads": 4},
        ("q_lin", "lin1"),
    ),
    "modernbert": (
        "ModernBertForSequenceClassification",
        {"local_attention": 8, "cls_token_id": 1, "sep_token_id": 2},
        ("Wqkv", "Wo"),
    ),
}


def make(
    folder: Path, name: str, own: dict[str, Any], ends: tuple[str, ...], task_type: str, directions: str = RANDOM
) -> t.PreTrainedModel:
    """A base in `folder`/base and an adapter in `folder`/a; returns the network with the adapter in its weights."""
    prefix = name.partition("For")[0].removesuffix("LMHeadModel")
    config = getattr(t, CONFIGS.get(prefix, f"{prefix}Config"))(
        **(own if prefix == "GPT2" else SIZES | (HEAD if task_type == CAUSAL_LM else {}) | own)
    )
    config.eos_token_id, config.pad_token_id = 2, 2
    torch.manual_seed(0)
    getattr(t, name)(config).save_pretrained(folder / "base")
    save_tokenizer(folder / "base")
    network = BaseModel.resolve(folder / "base").load(task_type, dtype="float32", device="cpu")
    modules = [name for name, _ in network.named_modules() if name.endswith(ends)]
    assert len(modules) >= 2 * len(ends)
    options: dict[str, Any] = {"relative_size": 0.5, "scaling": 2.0, "directions": directions}
    adapter = save_adapter(folder / "base", network, folder / "a", modules, task_type=task_type, **options)
    if task_type == SEQ_CLS:
        adapter.training = {"labels": ["no", "yes"]}
        adapter.save(folder / "a", overwrite=True)
    if task_type == CAUSAL_LM:
        write_in(network, adapter)
    else:
        adapter.inject(network)
    return network


@pytest.mark.parametrize(
    ("family", "directions"), [*((family, RANDOM) for family in DECODERS), ("qwen3", BLOCK), ("gpt2", BLOCK)]
)
def test_a_decoder_answers_as_base_and_as_task(family: str, directions: str, tmp_path: Path) -> None:
    network = make(tmp_path, *DECODERS[family], CAUSAL_LM, directions)
    export_onnx_adapters([tmp_path / "a"], tmp_path / "onnx")
    graph = (tmp_path / "onnx" / GRAPH).read_bytes()
    assert (tmp_path / "onnx" / "basis.onnx_data").exists() == (b"basis.onnx_data" in graph)
    assert b'File "' not in graph  # of a stack trace, with this disk's paths
    assert str(tmp_path).encode() not in graph
    decoder = OnnxDecoder(tmp_path / "onnx", "a", threads=1)
    task = [greedy(network, prompt, TOKENS) for prompt in PROMPTS]
    assert decoder.generate(PROMPTS, TOKENS, set()) == task
    decoder.use(None)
    base = BaseModel.resolve(tmp_path / "base").load(dtype="float32", device="cpu")
    assert decoder.generate(PROMPTS, TOKENS, set()) == [greedy(base, prompt, TOKENS) for prompt in PROMPTS] != task


@pytest.mark.parametrize("family", ["qwen3", "gpt2"])
def test_blocks_are_chosen_by_row(family: str, tmp_path: Path) -> None:
    """The export compares every row with torch, with its adapter and without."""
    make(tmp_path, *DECODERS[family], CAUSAL_LM, BLOCK)
    result = export_onnx_adapters([tmp_path / "a"], tmp_path / "onnx", routed=True)
    assert result["verify"]["a"]["equal_prompts"] == result["verify"]["a"]["prompts"] > 0


@pytest.mark.parametrize("family", ["phi3", "gpt2"])
def test_a_merged_decoder_answers_as_the_task(family: str, tmp_path: Path) -> None:
    network = make(tmp_path, *DECODERS[family], CAUSAL_LM)
    export_onnx(tmp_path / "a", tmp_path / "onnx")
    decoder = OnnxDecoder(tmp_path / "onnx", threads=1)
    assert decoder.generate(PROMPTS, TOKENS, set()) == [greedy(network, prompt, TOKENS) for prompt in PROMPTS]
    inputs = {
        value.name: value.type.tensor_type.shape.dim for value in read_graph(tmp_path / "onnx" / GRAPH).graph.input
    }
    names = {name: [dim.dim_param for dim in dims if dim.dim_param] for name, dims in inputs.items()}
    assert names["input_ids"] == ["batch_size", "sequence_length"]
    assert names["attention_mask"] == ["batch_size", "total_sequence_length"]
    assert names["past_key_values.0.key"] == ["batch_size", "past_sequence_length"]


@pytest.mark.parametrize("family", ["qwen2", "gpt2"])
def test_others_answers_end_where_ours_do_without_penalties(family: str, tmp_path: Path) -> None:
    """generation_config.json is all that transformers.js reads."""
    make(tmp_path, *DECODERS[family], CAUSAL_LM)
    own = {"eos_token_id": 97, "repetition_penalty": 1.3, "no_repeat_ngram_size": 2, "temperature": 0.7}
    write_json(tmp_path / "base" / "generation_config.json", own)
    export_onnx_adapters([tmp_path / "a"], tmp_path / "onnx", verify=False)
    found = read_json(tmp_path / "onnx" / "generation_config.json")
    assert found == {"eos_token_id": [97, 2], "temperature": 0.7}
    decoder = OnnxDecoder(tmp_path / "onnx")
    assert decoder.eos_ids == {97, 2}
    asked = prompt_ids(BaseModel.resolve(tmp_path / "base").tokenizer, "1+1=")
    said = decoder.generate([asked], 1)[0]
    assert ask_onnx(tmp_path / "onnx", ["1+1="], max_tokens=1)["base"] != [""]
    write_json(tmp_path / "onnx" / "generation_config.json", found | {"eos_token_id": [*said, 2]})
    (said_to_the_end,) = ask_onnx(tmp_path / "onnx", ["1+1="], max_tokens=8)["base"]
    assert said_to_the_end == ""  # nor is an end that is no special token a part of it


def test_gpt2_is_quantized(tmp_path: Path) -> None:
    """Its layers are no matrix products in torch's own export."""
    make(tmp_path, *DECODERS["gpt2"], CAUSAL_LM)
    export_onnx(tmp_path / "a", tmp_path / "onnx", precision="int8")
    nodes = [node.op_type for node in read_graph(tmp_path / "onnx" / GRAPH).graph.node]
    assert nodes.count("MatMulNBits") == 4 * 2 + 1  # of two layers, and the head
    assert OnnxDecoder(tmp_path / "onnx", threads=1).generate(PROMPTS, 1, set())


@pytest.mark.parametrize(
    ("family", "own", "exporter"),
    [
        ("Llama", {}, GENAI),
        ("Mistral", {}, TORCH),
        ("Mistral", {"sliding_window": None}, GENAI),
        ("Qwen2", {"sliding_window": 16}, GENAI),
        ("Qwen2", {"sliding_window": 16, "use_sliding_window": True}, TORCH),
        ("Phi3", {}, GENAI),
        ("Phi3", {"max_position_embeddings": 8192}, TORCH),
        ("Phi3", {"head_dim": 32, "partial_rotary_factor": 0.5}, GENAI),
        ("Phi3", {"head_dim": 16, "partial_rotary_factor": 0.5}, TORCH),
    ],
)
def test_what_config_json_leaves_out_is_read_as_torch_reads_it(
    family: str, own: dict[str, Any], exporter: str, tmp_path: Path
) -> None:
    """Mistral's class has a window of 4,096 tokens, past which the builder's graph was wrong."""
    config = {"architectures": [f"{family}ForCausalLM"], "model_type": family.lower()}
    write_json(tmp_path / "config.json", config | own)
    assert exporter_for(BaseModel.resolve(tmp_path), CAUSAL_LM) == exporter


def test_a_context_that_config_json_leaves_out_is_that_of_its_class(tmp_path: Path) -> None:
    make(tmp_path, *DECODERS["qwen2"], CAUSAL_LM)
    config = read_json(tmp_path / "base" / "config.json")
    assert config.pop("max_position_embeddings") == 32768
    write_json(tmp_path / "base" / "config.json", config)
    export_onnx_adapters([tmp_path / "a"], tmp_path / "onnx", verify=False)
    with pytest.raises(DataError, match="the model's context of 32768"):
        OnnxDecoder(tmp_path / "onnx").generate([[5]], 32768, set())


def test_angles_that_depend_on_the_length_are_refused_before_any_work(tmp_path: Path) -> None:
    make(tmp_path, *DECODERS["qwen2"], CAUSAL_LM)
    config = tmp_path / "base" / "config.json"
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    config.write_text(json.dumps(json.loads(config.read_text()) | {"rope_parameters": rope}))
    with pytest.raises(BaseModelError, match="type dynamic are not exported"):
        export_onnx(tmp_path / "a", tmp_path / "onnx")


@pytest.mark.parametrize("family", ENCODERS)
def test_a_classifier_gives_torchs_logits(family: str, tmp_path: Path) -> None:
    network = make(tmp_path, *ENCODERS[family], SEQ_CLS)
    result = export_onnx(tmp_path / "a", tmp_path / "onnx")
    assert result["verify"]["gap"] < 1e-4
    ids = torch.full((len(PROMPTS), max(map(len, PROMPTS))), 2)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(PROMPTS):
        ids[row, : len(prompt)], mask[row, : len(prompt)] = torch.tensor(prompt), 1
    found = classify(tmp_path / "onnx", {"input_ids": ids.numpy(), "attention_mask": mask.numpy()})
    with torch.inference_mode():
        expected = network(ids, attention_mask=mask).logits.numpy()
    np.testing.assert_allclose(found, expected, atol=1e-4)
    assert np.abs(expected - expected[0]).max() > 1e-2
    with pytest.raises(DataError, match=r"the batch has no attention_mask, which the graph reads"):
        classify(tmp_path / "onnx", {"input_ids": ids.numpy()})
    short = {"input_ids": ids.int().numpy(), "attention_mask": mask.int().numpy()}
    with pytest.raises(
        DataError, match=r"does not run on input_ids \(\d+, \d+\), .* Give numpy arrays as its tokenizer"
    ):
        classify(tmp_path / "onnx", short)
    if family == "bert":
        beyond = np.full((1, network.config.max_position_embeddings + 1), 2)
        with pytest.raises(DataError, match="of texts cut where training did"):
            classify(tmp_path / "onnx", {"input_ids": beyond, "attention_mask": np.ones_like(beyond)})


@pytest.mark.parametrize(("kind", "precision"), [("classes", "int8"), ("numbers", "fp32")])
def test_a_classifier_is_scored_on_held_out_rows_as_evaluate_does(
    kind: str, precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = make(tmp_path, *ENCODERS["bert"], SEQ_CLS)
    t.BertForSequenceClassification.from_pretrained(tmp_path / "base").bert.save_pretrained(tmp_path / "base")
    save_tokenizer(tmp_path / "base", token_types=True)
    adapter = Adapter.load(tmp_path / "a")
    if kind == "numbers":
        adapter.head = {name: 50_000 * tensor[:1] for name, tensor in adapter.head.items()}  # prices
        adapter.training = {"labels": [], "regression": True}
        adapter.save(tmp_path / "a", overwrite=True)
    tokenizer, rows = BaseModel.resolve(tmp_path / "base").tokenizer, []
    for text in ("abc", "xyz 1", "hello", "a longer text", "0", "Utrecht", "blue chairs", "q"):
        with torch.inference_mode():
            logits = network(**tokenizer(text, text[::-1], return_tensors="pt")).logits[0]
        label: Any = ["no", "yes"][int(logits.argmax())] if kind == "classes" else 50_000 * float(logits[0]) + 0.5
        rows.append({"text": text, "text_pair": text[::-1], "label": label})
    train = [row | {"label": label} for row, label in zip(rows, ("no", "yes"), strict=False)]
    write_splits(tmp_path / "data", {"train": train if kind == "classes" else rows, "test": rows})
    task = load_task("pairs", tmp_path / "data")
    expected = evaluate(Adapter.load(tmp_path / "a"), task)
    assert expected["adapter"] == pytest.approx(1, abs=1e-6)

    made = export_onnx(tmp_path / "a", tmp_path / "onnx", precision=precision, data={"a": task}, max_drop=100)
    found = made["verify"]
    assert (found["metric"], found["rows"]) == (expected["metric"], len(rows))
    assert found["torch"] == pytest.approx(expected["adapter"], abs=1e-6)
    assert found["drop"] == round(100 * (found["torch"] - found["onnx"]), 2)
    assert ("equal_prompts" in found) == (kind == "classes")
    if precision == "fp32":
        assert found["onnx"] == pytest.approx(found["torch"], abs=1e-6)

    monkeypatch.setattr(onnx_verify, "run_classifier", lambda *arguments: -run_classifier(*arguments))
    lost = f"{precision} loses .* points of {expected['metric']} on 8 held-out rows"
    if kind == "classes":
        with pytest.raises(ArtifactError, match=lost):
            export_onnx(tmp_path / "a", tmp_path / "wrong", precision=precision, data={"a": task})
    else:  # what an export asks of its graph, without making another
        merge(tmp_path / "a", tmp_path / "merged")
        merged, adapter = BaseModel.resolve(tmp_path / "merged"), Adapter.load(tmp_path / "a")
        wrong = onnx_verify.verify_classifier(tmp_path / "onnx", merged, adapter, task)
        with pytest.raises(ArtifactError, match=lost):
            require_equal(wrong, precision, tmp_path, 2.0)
    with pytest.raises(DataError, match="the data is CAUSAL_LM"):
        export_onnx(tmp_path / "a", tmp_path / "wrong", data={"a": TaskData("sums", "memory", CAUSAL_LM, {}, "0")})
    assert not (tmp_path / "wrong").exists()


def test_a_classifier_that_never_agrees_is_refused(tmp_path: Path) -> None:
    for found in ({"equal_prompts": 0, "gap": 3.0}, {"gap": float("nan")}):
        with pytest.raises(ArtifactError, match="no answer of the int4 graph is torch's"):
            require_equal({"prompts": 4, **found}, "int4", tmp_path, 2.0)
    numbers = {"prompts": 4, "gap": 0.2}
    assert require_equal(numbers, "int4", tmp_path, 2.0) == numbers
    with pytest.raises(ArtifactError, match=r"the logits differ by 0\.2"):
        require_equal(numbers, "fp32", tmp_path, 2.0)
