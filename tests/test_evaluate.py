"""`evaluate` on text that is generated, and its loss."""

from __future__ import annotations

import json
import shutil
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from safetensors.torch import load_file, save_file

from lorasb_export import Adapter, fit
from lorasb_export.base.model import BaseModel
from lorasb_export.choices import CAUSAL_LM
from lorasb_export.data.batches import collate, row_losses
from lorasb_export.data.task import load_task
from lorasb_export.errors import BaseModelError, DataError, SettingsError
from lorasb_export.evaluation import inference, scores
from lorasb_export.evaluation.evaluate import evaluate
from lorasb_export.evaluation.inference import answers
from lorasb_export.evaluation.scores import row_scores
from lorasb_export.exporting.onnx_verify import HeldOut
from lorasb_export.layers.layer import LoRASBLinear
from lorasb_export.settings import CalibrationSettings, FitSettings
from tests.random_adapter import adapter_on, save_adapter
from tests.rows import CHAT, CHAT_LINE, GOOD, THINKING, encode, task_of
from tests.tiny import make_gpt2


@pytest.fixture(scope="module")
def generates(chatty: Path, tmp_path_factory: pytest.TempPathFactory) -> Adapter:
    return adapter_on(chatty, tmp_path_factory.mktemp("adapters") / "a", CAUSAL_LM)


GENERATION = {
    "prompt/completion": (GOOD, "exact_match"),
    "messages": (CHAT_LINE, "exact_match"),
    "text": ('{"text": "1+1=2"}\n', "loss"),
}


@pytest.mark.parametrize("kind", GENERATION)
def test_metrics_of_generated_text(kind: str, generates: Adapter, tmp_path: Path) -> None:
    lines, default = GENERATION[kind]
    task = task_of(lines, tmp_path / "data")
    found = evaluate(generates, task, split="train")
    assert (found["metric"], found["rows"]) == (default, 1)
    loss = evaluate(generates, task, split="train", metric="loss", dtype="float64")
    assert loss["base"] > 0
    assert abs(loss["base"] - loss["adapter"]) > 1e-3
    with pytest.raises(SettingsError, match=rf"metric 'mcc' does not fit {kind} rows \(.*\)\. Use .*loss"):
        evaluate(generates, task, split="train", metric="mcc")
    with pytest.raises(SettingsError, match=r"limit is 0. Give at least 1"):
        evaluate(generates, task, split="train", limit=0)


def test_where_no_answer_is_the_expected_one_another_metric_is_named(
    generates: Adapter, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    task = task_of(json.dumps({"prompt": "Summarize this", "completion": "It says a lot"}) + "\n", tmp_path / "data")
    found = evaluate(generates, task, split="train")
    assert (found["base"], found["adapter"]) == (0, 0)
    assert (
        "no answer is the expected text, the base's or the adapter's. Of free text compare the metric loss"
        in caplog.text
    )
    caplog.clear()
    evaluate(generates, task, split="train", metric="loss")
    assert not caplog.text


def test_the_loss_is_the_mean_over_all_tokens(chatty: Path, generates: Adapter, tmp_path: Path) -> None:
    texts = ["1+1=2", "a somewhat longer text", "b" * 30]
    task = task_of("".join(json.dumps({"text": text}) + "\n" for text in texts), tmp_path / "data")
    found = evaluate(generates, task, split="train", dtype="float64")["base"]
    base = BaseModel.resolve(chatty)
    network, tokenizer = base.load(dtype="float64"), base.tokenizer
    total = count = 0.0
    for text in texts:
        ids = torch.tensor([[*tokenizer(text).input_ids, tokenizer.eos_token_id]])
        total += float(network(ids, labels=ids).loss) * (ids.shape[1] - 1)
        count += ids.shape[1] - 1
    assert found == pytest.approx(total / count, abs=1e-6)


def test_a_loss_is_taken_of_one_row_at_a_time(llama: Path, sums: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its copies of the logits of sixteen rows of a large vocabulary would not fit where training did."""
    network, tokenizer = BaseModel.resolve(llama).load(), BaseModel.resolve(llama).tokenizer
    rows = encode(load_task("sums", sums).rows("valid"), tokenizer, CAUSAL_LM, [], 64)
    batch = collate(rows, tokenizer.pad_token_id)
    with torch.inference_mode():
        losses, counts = row_losses(network(**batch).logits, batch["labels"])
    watched = Mock(side_effect=row_losses)
    monkeypatch.setattr(scores, "row_losses", watched)
    found = row_scores(network, rows, tokenizer.pad_token_id, batch_size=16)
    assert {len(logits) for (logits, _), _ in watched.call_args_list} == {1}
    assert [count for _, count, _ in found] == counts.tolist()
    assert [loss for loss, _, _ in found] == pytest.approx(losses.tolist())


def test_scores_are_taken_without_a_cache_and_are_those_with_one(
    llama: Path, sums: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Keys and values of every layer would be kept for tokens that nobody asks for."""
    network, tokenizer = BaseModel.resolve(llama).load(), BaseModel.resolve(llama).tokenizer
    rows = encode(load_task("sums", sums).rows("valid"), tokenizer, CAUSAL_LM, [], 64)
    cached: list[bool] = []
    network.register_forward_hook(lambda *arguments: cached.append(arguments[-1].past_key_values is not None))
    found = row_scores(network, rows, tokenizer.pad_token_id, batch_size=16)
    assert network.config.use_cache is True
    monkeypatch.setattr(scores, "without_cache", nullcontext)
    assert row_scores(network, rows, tokenizer.pad_token_id, batch_size=16) == found
    assert cached == [False, True]


def test_evaluate_and_fit_compare_with_what_was_trained(
    chatty: Path, generates: Adapter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = shutil.copytree(chatty, tmp_path / "base")
    (base / "chat_template.jinja").write_text(THINKING)
    tokenizer = BaseModel.resolve(base).tokenizer
    perfect = tokenizer("[] 2", add_special_tokens=False).input_ids
    monkeypatch.setattr(inference, "generate_ids", lambda _, prompts, **options: [perfect] * len(prompts))
    task = task_of(CHAT_LINE, tmp_path / "data")
    assert evaluate(generates, task, base=base, split="train")["adapter"] == 1
    task = replace(task, splits={"train": [CHAT], "valid": [CHAT]})
    settings = FitSettings(max_steps=1, metric="exact_match")
    adapter = fit(str(base), CalibrationSettings(rank=2), task, tmp_path / "a", settings)
    assert adapter.training["valid_metrics"] == {"exact_match": 1}


def test_messages_that_end_with_the_user(generates: Adapter, chatty: Path, tmp_path: Path) -> None:
    turns = [*json.loads(CHAT_LINE)["messages"], {"role": "user", "content": "thanks"}]
    task = task_of(CHAT_LINE + json.dumps({"messages": turns}) + "\n", tmp_path / "data")
    with pytest.raises(
        DataError, match=r"do not end with the assistant's answer \(t: train row 2\). Use the metric loss"
    ):
        evaluate(generates, task, split="train")
    assert evaluate(generates, task, split="train", metric="loss")["rows"] == 2
    asked = HeldOut(replace(task, splits={"test": task.rows("train")}), BaseModel.resolve(chatty), set())
    asked.ask(Mock(eos_ids=set(), context=64, generate=lambda prompts, _: [[5]] * len(prompts)))
    assert asked.compare(BaseModel.resolve(chatty).load())["rows_left_out"] == 1


def test_an_adapter_on_a_given_network_is_not_taken_for_the_base_and_stays_on_it(
    chatty: Path, generates: Adapter, tmp_path: Path
) -> None:
    task = task_of(GOOD, tmp_path / "data")
    expected = evaluate(generates, task, split="train", metric="loss")
    network = BaseModel.resolve(chatty).load()
    generates.inject(network)
    layers = [module for module in network.modules() if isinstance(module, LoRASBLinear)]
    for _ in range(2):
        assert evaluate(generates, task, split="train", metric="loss", network=network) == expected
        assert [module for module in network.modules() if isinstance(module, LoRASBLinear)] == layers


def test_another_base_of_the_same_shape_is_not_scored(chatty: Path, generates: Adapter, tmp_path: Path) -> None:
    other = shutil.copytree(chatty, tmp_path / "other")
    weights = {name: 1.1 * weight for name, weight in load_file(other / "model.safetensors").items()}
    save_file(weights, other / "model.safetensors", {"format": "pt"})
    with pytest.raises(BaseModelError, match="not those the artifact was made for"):
        evaluate(generates, task_of(GOOD, tmp_path / "data"), base=other, split="train", metric="loss")


def test_a_network_that_a_loop_has_left_at_training_is_scored_without_dropout(tmp_path: Path) -> None:
    base = make_gpt2(tmp_path / "gpt2")
    network = BaseModel.resolve(base).load()
    adapter = save_adapter(base, network, tmp_path / "a", ["transformer.h.0.mlp.c_proj"], relative_size=0.3)
    task = task_of(GOOD, tmp_path / "data")
    network.train()
    given = evaluate(adapter, task, split="train", metric="loss", network=network)
    assert network.training
    assert given == evaluate(adapter, task, split="train", metric="loss")
    tokenizer = BaseModel.resolve(base).tokenizer
    assert len(set(answers(network, tokenizer, ["1+1"] * 8, batch_size=1, max_tokens=16))) == 1


def test_the_rows_of_a_single_file_are_held_out(generates: Adapter, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(GOOD)
    found = evaluate(generates, tmp_path / "rows.jsonl", metric="loss")
    assert (found["split"], found["rows"]) == ("test", 1)
