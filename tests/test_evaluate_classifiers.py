"""`evaluate` on classes and numbers: what a classifier reads, and its head."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from lorasb_export import merge
from lorasb_export.base.model import BaseModel
from lorasb_export.choices import SEQ_CLS
from lorasb_export.data.task import load_task
from lorasb_export.errors import DataError, SettingsError
from lorasb_export.evaluation.evaluate import evaluate, with_labels_of
from lorasb_export.evaluation.scores import row_scores
from tests.random_adapter import LLAMA_MODULES, adapter_on, save_adapter
from tests.rows import CLASS, encode, task_of
from tests.tiny import make_gpt2, make_llama, save_tokenizer


def test_a_given_classifier_keeps_its_head(bert: Path, tmp_path: Path) -> None:
    adapter = adapter_on(bert, tmp_path / "a", SEQ_CLS, labels=["no", "yes"])
    network = BaseModel.resolve(bert).load(SEQ_CLS, num_labels=2, seed=7)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    task = task_of(CLASS + CLASS.replace("yes", "no"), tmp_path / "data")
    found = evaluate(adapter, task, split="train", network=network)
    assert found == evaluate(adapter, task, split="train")
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())


def test_metrics_of_classes(bert: Path, tmp_path: Path) -> None:
    adapter = adapter_on(bert, tmp_path / "a", SEQ_CLS, labels=["no", "yes"])
    task = task_of(
        CLASS + CLASS.replace("yes", "no") + '{"text": "a", "text_pair": "b", "label": "no"}\n', tmp_path / "d"
    )
    found = evaluate(adapter, task, split="train")
    assert (found["metric"], found["base"], found["rows"]) == ("accuracy", None, 3)
    assert found["adapter"] in (1 / 3, 2 / 3)  # the first two rows are one text
    adapter.save(tmp_path / "b")
    assert evaluate(tmp_path / "b", tmp_path / "d", split="train", base=bert) == found | {"task": "d"}
    mcc = evaluate(adapter, task, split="train", metric="mcc")["adapter"]
    assert abs(mcc) in (0, pytest.approx(0.5))  # one of three wrong, or two; 0 where one class is answered to all
    for metric in ("pearson", "rouge"):
        expected = rf"metric '{metric}' does not fit text/label rows \(.*\)\. Use accuracy or mcc or f1"
        with pytest.raises(SettingsError, match=expected):
            evaluate(adapter, task, split="train", metric=metric)


def test_a_decoder_classifies_by_the_tokenizers_padding_whatever_its_config_says(tmp_path: Path) -> None:
    """Of some checkpoints (huggyllama/llama-7b) the config names another token."""
    base = make_llama(tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"pad_token_id": 0}))
    model = BaseModel.resolve(base)
    network, tokenizer = model.load(SEQ_CLS, num_labels=2), model.tokenizer
    rows = [{"text": text, "label": "no"} for text in ("hello", "a longer text")]
    encoded = encode(rows, tokenizer, SEQ_CLS, ["no", "yes"], 64)
    scored = (row_scores(network, part, tokenizer.pad_token_id, batch_size=2) for part in (encoded, encoded[:1]))
    together, alone = (scores[0][0] for scores in scored)
    assert together == pytest.approx(alone, abs=1e-5)
    adapter = save_adapter(base, network, tmp_path / "a", LLAMA_MODULES, task_type=SEQ_CLS)
    adapter.training = {"labels": ["no", "yes"]}
    assert merge(adapter, tmp_path / "merged", verify=True)["verify"]["relative_difference"] < 1e-4


def test_a_pair_is_read_as_everybody_calls_the_tokenizer(bert: Path, tmp_path: Path) -> None:
    adapter = adapter_on(bert, tmp_path / "a", SEQ_CLS, labels=[], regression=True)
    network, tokenizer = BaseModel.resolve(bert).load(SEQ_CLS, num_labels=1), BaseModel.resolve(bert).tokenizer
    adapter.inject(network)
    pairs = [("one", "two, longer"), ("three", "x"), ("a", "b")]
    rows = [{"text": a, "text_pair": b, "label": i + 0.5} for i, (a, b) in enumerate(pairs)]
    encoded = encode(rows, tokenizer, SEQ_CLS, [], 64)
    found = [x for *_, x in row_scores(network, encoded, tokenizer.pad_token_id, batch_size=3)]
    asked = [tokenizer(*pair, return_tensors="pt") for pair in pairs]
    with torch.inference_mode():
        assert found == pytest.approx([float(network(**batch).logits) for batch in asked], abs=1e-5)
        apart = [float(network(batch.input_ids, attention_mask=batch.attention_mask).logits) for batch in asked]
    assert found != pytest.approx(apart, abs=1e-3)  # the second text is told from the first
    task = task_of("".join(json.dumps(row) + "\n" for row in rows), tmp_path / "data")
    adapter.training = {**adapter.training, "data": str(tmp_path / "data"), "data_sha256": task.sha256}
    verified = merge(adapter, tmp_path / "merged", verify=True)["verify"]
    assert (verified["rows"], verified["relative_difference"] < 1e-4) == (3, True)


def test_token_types_are_for_models_that_tell_them_apart(tmp_path: Path) -> None:
    """GPT-2 would take them for tokens and add their embeddings."""
    base = make_gpt2(tmp_path / "gpt2")
    save_tokenizer(base, token_types=True)
    tokenizer = BaseModel.resolve(base).tokenizer
    rows = [{"text": "a", "text_pair": "b", "label": "no"}]
    assert "token_type_ids" not in encode(rows, tokenizer, SEQ_CLS, ["no"], 64)[0]


def test_regression_merged_predicts_the_same_number(bert: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    adapter = adapter_on(bert, tmp_path / "a", SEQ_CLS, labels=[], regression=True)
    assert merge(adapter, tmp_path / "model", verify=True)["verify"]["relative_difference"] < 1e-5
    model, info = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert (model.config.num_labels, model.config.problem_type) == (1, "regression")

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    network = BaseModel.resolve(bert).load(SEQ_CLS, num_labels=1)
    adapter.inject(network)
    texts = ["one", "two, longer", "three"]
    with torch.inference_mode():
        found = [float(model(**tokenizer(text, return_tensors="pt")).logits) for text in texts]
        expected = [float(network(**tokenizer(text, return_tensors="pt")).logits) for text in texts]
    assert found == pytest.approx(expected, abs=1e-5)

    lines = "".join(json.dumps({"text": t, "label": 2 * x + 1}) + "\n" for t, x in zip(texts, found, strict=True))
    result = evaluate(adapter, task_of(lines, tmp_path / "data"), split="train")
    assert (result["metric"], result["base"]) == ("pearson", None)
    assert result["adapter"] == pytest.approx(1, abs=1e-4)
    error = evaluate(adapter, task_of(lines, tmp_path / "data"), split="train", metric="rmse")["adapter"]
    assert error == pytest.approx((sum((x + 1) ** 2 for x in found) / 3) ** 0.5, rel=1e-3)
    with pytest.raises(SettingsError, match="metric 'accuracy' does not fit regression rows"):
        evaluate(adapter, task_of(lines, tmp_path / "data"), split="train", metric="accuracy")
    with pytest.raises(DataError, match=r"the data is SEQ_CLS, the adapter SEQ_CLS \(regression\)"):
        evaluate(adapter, task_of(CLASS + CLASS.replace("yes", "no"), tmp_path / "data"), split="train")


def write_rows(path: Path, labels: list[float]) -> Path:
    path.write_text("".join(json.dumps({"text": f"row {i}", "label": x}) + "\n" for i, x in enumerate(labels)))
    return path


def test_a_few_rows_have_labels_as_the_adapter_has_them(bert: Path, tmp_path: Path) -> None:
    """Of themselves they would be told for others: whole numbers for classes, numbers among names for numbers."""
    numbers = adapter_on(bert, tmp_path / "numbers", SEQ_CLS, labels=[])
    numbers.training["regression"] = True
    assert evaluate(numbers, write_rows(tmp_path / "rows.jsonl", [3, 4, 5]), metric="rmse")["rows"] == 3
    mixed = load_task("mixed", write_rows(tmp_path / "mixed.jsonl", [3, 4.5]))
    assert with_labels_of(numbers, mixed) is mixed  # or its rows would not be those that were trained on
    names = adapter_on(bert, tmp_path / "names", SEQ_CLS, labels=["1", "unknown"])
    (tmp_path / "part.csv").write_text("text,label\na,1\nb,1\n")
    assert evaluate(names, tmp_path / "part.csv")["rows"] == 2
    (tmp_path / "other.csv").write_text("text,label\na,1\nb,2\n")
    with pytest.raises(DataError, match="label 2 is not among the training labels '1', 'unknown'"):
        evaluate(names, tmp_path / "other.csv")
