"""Bad data is named by file and line; good data becomes the batches the loss expects."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lorasb_export import calibrate
from lorasb_export.base import CAUSAL_LM, SEQ_CLS, BaseModel
from lorasb_export.data import IGNORE, collate, encode, load_task, prompt_ids
from lorasb_export.errors import BaseModelError, DataError, SettingsError
from lorasb_export.settings import CalibrationSettings
from tests.tiny import make_llama, save_tokenizer

GOOD = '{"prompt": "1+1=", "completion": "2"}\n'

BAD = {
    "broken line": (GOOD + '{"prompt": "1+', "broken JSON", "train.jsonl:2"),
    "not an object": (GOOD + "[1, 2]\n", "not a JSON object", "train.jsonl:2"),
    "lacks a field": (GOOD + '\n{"prompt": "1+1="}\n', "lacks field 'completion'", "train.jsonl:3"),
    "empty completion": (GOOD + '{"prompt": "1+1=", "completion": " "}\n', "completion is empty", "train.jsonl:2"),
    "not a string": ('{"prompt": 1, "completion": "2"}\n', "'prompt' is not a string", "train.jsonl:1"),
    "text not a string": ('{"text": ["a"], "label": 1}\n', "'text' is not a string", "train.jsonl:1"),
    "label not a class": ('{"text": "a", "label": 0.5}\n', "label 0.5 is neither a name nor", "train.jsonl:1"),
    "labels of two kinds": ('{"text": "a", "label": 1}\n{"text": "b", "label": "x"}\n', "some labels are names", ""),
    "no rows": ("\n\n", "no training rows", ""),
    "neither kind": ('{"question": "?"}\n', "neither 'prompt' nor 'text'", ""),
    "not text": (b"\xff\xfe\x00", "cannot read the data", "train.jsonl"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_rows_are_named(case: str, tmp_path: Path) -> None:
    content, message, place = BAD[case]
    (tmp_path / "train.jsonl").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError) as error:
        load_task("t", tmp_path)
    assert message in str(error.value)
    assert place in str(error.value)


def test_no_data(tmp_path: Path, llama: Path) -> None:
    with pytest.raises(DataError, match=r"no train\.jsonl"):
        load_task("t", tmp_path)
    with pytest.raises(DataError, match="no such file, folder or Hub dataset"):
        load_task("t", tmp_path / "nowhere")
    with pytest.raises(DataError, match="no data to calibrate on"):
        calibrate(str(llama), {})


def test_a_single_file_is_the_training_split(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(GOOD)
    task = load_task("t", tmp_path / "rows.jsonl")
    assert (task.task_type, len(task.splits["train"]), list(task.splits)) == (CAUSAL_LM, 1, ["train"])
    with pytest.raises(DataError, match="no valid rows"):
        task.rows("valid")


def test_loss_is_on_the_completion_alone(llama: Path) -> None:
    tokenizer = BaseModel.resolve(llama).load_tokenizer()
    (row,) = encode([{"prompt": "1+1=", "completion": "2"}], tokenizer, CAUSAL_LM, [], 64)
    assert "".join(tokenizer.convert_ids_to_tokens(row["input_ids"])) == "<s>1+1=</s><s>2</s>"
    completion = [label for label in row["labels"] if label != IGNORE]
    assert "".join(tokenizer.convert_ids_to_tokens(completion)) == "2</s>"


def test_prompt_without_a_chat_template_is_taken_as_it_is(tmp_path: Path) -> None:
    save_tokenizer(tmp_path, template=False)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.convert_ids_to_tokens(prompt_ids(tokenizer, "1+1=")) == list("1+1=")


def test_rows_cut_to_nothing_are_left_out_or_refused(llama: Path) -> None:
    tokenizer = BaseModel.resolve(llama).load_tokenizer()
    rows = [{"prompt": "1+1=", "completion": "2"}, {"prompt": "1" * 50, "completion": "2"}]
    assert len(encode(rows, tokenizer, CAUSAL_LM, [], 20)) == 1
    with pytest.raises(DataError, match="every prompt is 20 tokens or longer"):
        encode(rows[1:], tokenizer, CAUSAL_LM, [], 20)


def test_batches_are_padded_right_and_know_which_logits_they_need(llama: Path) -> None:
    tokenizer = BaseModel.resolve(llama).load_tokenizer()
    rows = encode(
        [{"prompt": "1+1=", "completion": "2"}, {"prompt": "1", "completion": "200"}], tokenizer, CAUSAL_LM, [], 64
    )
    batch = collate(rows, 2)
    assert batch["attention_mask"].tolist() == [[1] * 9, [1] * 8 + [0]]
    assert batch["labels"].shape == (2, 9)
    assert batch["logits_to_keep"] == 6  # the second row's prompt is 4 tokens: positions 3 to 8


def test_labels_outside_the_training_labels(bert: Path) -> None:
    tokenizer = BaseModel.resolve(bert).load_tokenizer()
    with pytest.raises(DataError, match="label 'maybe' is not among the training labels"):
        encode([{"text": "x", "label": "maybe"}], tokenizer, SEQ_CLS, ["no", "yes"], 64)


def test_mixed_kinds_are_refused(llama: Path, sums: Path, parity: Path) -> None:
    with pytest.raises(DataError, match="mix text generation and classification"):
        calibrate(str(llama), {"sums": sums, "parity": parity})


def test_rank_larger_than_a_module(llama: Path, sums: Path) -> None:
    with pytest.raises(
        SettingsError, match=r"rank 17 exceeds module model\.layers\.0\.self_attn\.k_proj of shape \(16, 32\)"
    ):
        calibrate(str(llama), {"sums": sums}, CalibrationSettings(rank=17))


def test_target_that_matches_nothing(llama: Path, sums: Path) -> None:
    with pytest.raises(SettingsError, match=r"target 'q_prj' matches no module.*q_proj"):
        calibrate(str(llama), {"sums": sums}, CalibrationSettings(rank=4, targets="v_proj,q_prj"))


def test_targets_by_ending(llama: Path, sums: Path) -> None:
    basis = calibrate(str(llama), {"sums": sums}, CalibrationSettings(rank=4, targets="q_proj,mlp.down_proj"))
    assert {name.rpartition(".")[2] for name in basis.modules} == {"q_proj", "down_proj"}
    assert len(basis.modules) == 4


def test_module_without_gradient_is_reported(llama: Path, sums: Path, tmp_path: Path) -> None:
    base = BaseModel.resolve(make_llama(tmp_path / "dead"))
    network = base.load()
    network.model.layers[0].mlp.up_proj.weight.data.zero_()
    network.model.layers[0].mlp.gate_proj.weight.data.zero_()
    with pytest.raises(BaseModelError, match=r"received no gradient.*layers\.0\.mlp"):
        calibrate(base, {"sums": sums}, CalibrationSettings(rank=4), network=network)


def test_non_finite_gradient_is_reported(llama: Path, sums: Path) -> None:
    base = BaseModel.resolve(llama)
    network = base.load()
    network.model.layers[0].mlp.up_proj.weight.data[0, 0] = float("inf")
    with pytest.raises(BaseModelError, match="not finite"):
        calibrate(base, {"sums": sums}, CalibrationSettings(rank=4), network=network)
    assert not any(torch.isnan(p).any() for p in network.model.layers[1].parameters())


BAD_BASES = {
    "a file": (lambda f: f.write_text("hello"), "the base model is a file"),
    "missing": (lambda f: None, "the base model was not found"),
    "empty folder": (lambda f: f.mkdir(), "no config.json"),
    "no weights": (
        lambda f: (f.mkdir(), (f / "config.json").write_text('{"model_type": "llama"}')),
        "no safetensors file",
    ),
    "encoder-decoder": (
        lambda f: (f.mkdir(), (f / "config.json").write_text('{"model_type": "t5", "is_encoder_decoder": true}')),
        "neither a causal language model nor a sequence classifier",
    ),
    "vision": (
        lambda f: (f.mkdir(), (f / "config.json").write_text('{"model_type": "vit"}')),
        "neither a causal language model nor a sequence classifier",
    ),
    "quantized": (
        lambda f: (
            f.mkdir(),
            (f / "config.json").write_text('{"model_type": "llama", "quantization_config": {"quant_method": "gptq"}}'),
        ),
        "quantized (gptq)",
    ),
}


@pytest.mark.parametrize("case", BAD_BASES)
def test_bad_base_is_refused(case: str, tmp_path: Path) -> None:
    make, message = BAD_BASES[case]
    make(tmp_path / "base")
    with pytest.raises(BaseModelError) as error:
        BaseModel.resolve(tmp_path / "base").tensors  # noqa: B018
    assert message in str(error.value)


def test_an_encoder_is_not_asked_to_generate(bert: Path, sums: Path) -> None:
    with pytest.raises(BaseModelError, match="BertModel does not generate text"):
        calibrate(str(bert), {"sums": sums})
