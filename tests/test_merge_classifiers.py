"""Merged classifiers, as those meet them who have never heard of the adapter."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, BertForPreTraining, pipeline

from lorasb_export import Adapter, fit, merge
from lorasb_export.choices import SEQ_CLS
from lorasb_export.data.task import TaskData, task_of
from lorasb_export.files.storage import read_header, read_json, write_json
from lorasb_export.layers.head import head_parameters
from lorasb_export.settings import CalibrationSettings, FitSettings
from tests.families import make
from tests.merging import adapter_for, logits, unmerged_logits
from tests.random_adapter import BERT_MODULES, adapter_on
from tests.tiny import make_bert, make_gpt2, make_llama


@pytest.fixture(scope="module")
def moods() -> TaskData:
    return task_of(
        "moods", {"train": [{"text": word, "label": label} for word, label in zip("abc", "xyz", strict=True)]}
    )


def merged(base: Path, task: TaskData, folder: Path) -> Path:
    adapter = fit(base, CalibrationSettings(rank=4, directions="random"), task, folder / "a", FitSettings(max_steps=1))
    merge(adapter, folder / "merged", verify=True)
    return folder / "merged"


@pytest.mark.parametrize("of_the_base", ["regression", "multi_label_classification", None])
def test_scores_are_probabilities_whatever_the_base_was_for(
    of_the_base: str | None, bert: Path, moods: TaskData, tmp_path: Path
) -> None:
    base = shutil.copytree(bert, tmp_path / "base")
    write_json(base / "config.json", read_json(base / "config.json") | {"problem_type": of_the_base})
    classify = pipeline("text-classification", str(merged(base, moods, tmp_path)), top_k=None)
    (found,) = classify(["ab"])
    assert sum(of_class["score"] for of_class in found) == pytest.approx(1)


def test_the_heads_that_the_base_was_trained_with_stay_behind(moods: TaskData, tmp_path: Path) -> None:
    """transformers passes over them, vLLM refuses a classifier that has them."""
    folder = merged(make_bert(tmp_path / "base", kind=BertForPreTraining), moods, tmp_path)
    assert any(name.startswith("cls.") for name in read_header(tmp_path / "base" / "model.safetensors"))
    bodies = {name.partition(".")[0] for name in read_header(folder / "model.safetensors")}
    assert bodies == {"bert", "classifier"}


def test_of_a_body_that_the_checkpoint_calls_otherwise_the_names_stay(moods: TaskData, tmp_path: Path) -> None:
    body = "model.language_model."
    folder = merged(make(tmp_path / "base", body), moods, tmp_path)
    of_base, of_merged = (set(read_header(path / "model.safetensors")) for path in (tmp_path / "base", folder))
    assert of_merged == of_base - {"lm_head.weight"} | {"score.weight"}
    assert all(name.startswith(body) for name in of_merged - {"score.weight"})


def test_the_head_is_stored_as_the_body_is(bert: Path, tmp_path: Path) -> None:
    """It was trained in fp32."""
    base = shutil.copytree(bert, tmp_path / "base")
    weights = {name: tensor.bfloat16() for name, tensor in load_file(base / "model.safetensors").items()}
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    merge(adapter_for(base, tmp_path / "a", BERT_MODULES, SEQ_CLS), tmp_path / "merged")
    assert {info.dtype for info in read_header(tmp_path / "merged" / "model.safetensors").values()} == {"BF16"}


@pytest.mark.parametrize("said", [{}, {"pad_token": None}], ids=["nothing", "null"])
def test_a_tokenizer_without_a_pad_token_gets_the_one_that_was_padded_with(
    said: dict[str, None], moods: TaskData, tmp_path: Path
) -> None:
    base = make_gpt2(tmp_path / "base")
    config = read_json(base / "tokenizer_config.json")
    del config["pad_token"]
    write_json(base / "tokenizer_config.json", config | said)
    assert AutoTokenizer.from_pretrained(base).pad_token is None
    classify = pipeline("text-classification", str(merged(base, moods, tmp_path)), batch_size=2)
    assert len(classify(["a", "bca"])) == 2


def test_a_base_that_counts_the_labels_of_its_own_head(bert: Path, moods: TaskData, tmp_path: Path) -> None:
    """As configs of old do, beside the names of the labels or without them."""
    base = shutil.copytree(bert, tmp_path / "base")
    write_json(base / "config.json", read_json(base / "config.json") | {"num_labels": 2})
    classify = pipeline("text-classification", str(merged(base, moods, tmp_path)), top_k=None)
    (found,) = classify(["ab"])
    assert {of_class["label"] for of_class in found} == {"x", "y", "z"}


def test_how_sentences_were_embedded_is_no_concern_of_a_classifier(bert: Path, moods: TaskData, tmp_path: Path) -> None:
    base = shutil.copytree(bert, tmp_path / "base")
    names = ("modules.json", "sentence_bert_config.json", "config_sentence_transformers.json")
    for name in names:
        write_json(base / name, {"max_seq_length": 8})
    assert not {path.name for path in merged(base, moods, tmp_path).iterdir()} & set(names)


def test_classifier_with_its_head(tmp_path: Path) -> None:
    """The checkpoint is a body without prefix; the merged folder loads as a classifier, strictly."""
    from transformers import AutoModelForSequenceClassification

    base = make_bert(tmp_path / "base")
    modules = ["bert.encoder.layer.0.attention.self.query", "bert.encoder.layer.1.output.dense"]
    path = adapter_for(base, tmp_path / "a", modules, SEQ_CLS)
    positions = {"embeddings.position_ids": torch.arange(8)[None]}  # of a BERT saved years ago; first in the file
    save_file(load_file(base / "model.safetensors") | positions, base / "model.safetensors", {"format": "pt"})
    adapter = Adapter.load(path)
    adapter.training = {"labels": ["red", "green", "blue"]}
    merge(adapter, tmp_path / "model")
    model, info = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model", output_loading_info=True)
    assert not info["missing_keys"]
    assert info["unexpected_keys"] <= {"bert.embeddings.position_ids"}
    assert model.config.id2label == {0: "red", 1: "green", 2: "blue"}
    assert model.config.label2id == {"red": 0, "green": 1, "blue": 2}
    assert all(torch.equal(p, adapter.head[name]) for name, p in head_parameters(model).items())
    assert (logits(model.eval()) - unmerged_logits(base, tmp_path / "a", SEQ_CLS)).abs().max() < 1e-5


def test_a_pad_token_without_an_embedding_does_not_pad_what_is_merged(moods: TaskData, tmp_path: Path) -> None:
    base = make_llama(tmp_path / "base")
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_special_tokens({"pad_token": "<new>"})
    tokenizer.save_pretrained(base)
    assert tokenizer.pad_token_id >= read_json(base / "config.json")["vocab_size"]
    file = base / "tokenizer_config.json"  # as older tokenizers say it
    write_json(file, read_json(file) | {"pad_token": {"content": "<new>", "__type": "AddedToken"}})
    write_json(base / "special_tokens_map.json", {"pad_token": "<new>"})
    folder = merged(base, moods, tmp_path)
    assert read_json(folder / "special_tokens_map.json") == {"pad_token": tokenizer.eos_token}
    classify = pipeline("text-classification", str(folder), batch_size=2)
    assert len(classify(["a", "bca"])) == 2


def test_what_happens_to_a_network_does_not_happen_to_the_adapter_that_was_put_on_it(
    bert: Path, tmp_path: Path
) -> None:
    adapter = adapter_on(bert, tmp_path / "a", SEQ_CLS, labels=["no", "yes"])
    network = adapter.base.resolve().load(SEQ_CLS, dtype="float32", num_labels=2)
    adapter.inject(network)
    for parameter in network.parameters():
        parameter.data.zero_()
    assert all(tensor.any() for tensor in (*adapter.head.values(), *adapter.R.values()))
