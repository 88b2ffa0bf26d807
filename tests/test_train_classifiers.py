"""Classifiers: their head is trained, at a rate of its own, kept, and scored as it was validated."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BertForSequenceClassification

from lorasb_export import Adapter, calibrate, fit, merge
from lorasb_export.base.model import BaseModel
from lorasb_export.calibration.capture import capture
from lorasb_export.choices import SEQ_CLS
from lorasb_export.data.task import load_task, task_of
from lorasb_export.evaluation.evaluate import evaluate
from lorasb_export.layers.head import head_parameters
from lorasb_export.settings import CalibrationSettings, FitSettings
from lorasb_export.training.trainer import RTrainer
from tests.tiny import make_bert, save_tokenizer


@pytest.mark.parametrize(
    ("optimizer", "dtype"), [("adamw", "auto"), ("muon", "auto"), ("muon", "bfloat16"), ("muon", "float16")]
)
def test_classification_trains_and_keeps_its_head(
    optimizer: str, dtype: str, bert: Path, parity: Path, tmp_path: Path
) -> None:
    calibrate(str(bert), {"parity": parity}, CalibrationSettings(rank=8)).save(tmp_path / "basis")
    settings = FitSettings(epochs=15, learning_rate=2e-2, optimizer=optimizer, dtype=dtype)
    adapter = fit(str(bert), tmp_path / "basis", parity, tmp_path / "a", settings)
    assert (adapter.task_type, adapter.labels) == (SEQ_CLS, ["no", "yes"])
    assert {parameter.dtype for parameter in adapter.head.values()} == {torch.float32}
    loaded = Adapter.load(tmp_path / "a")
    assert set(loaded.head) == {"classifier.weight", "classifier.bias"}
    of_R = sum(R.numel() for R in loaded.R.values())
    of_lora = sum(8 * sum(shape) for shape in loaded.load_basis().shapes.values())
    counts = [loaded.training[of] for of in ("trainable_parameters", "lora_parameters")]
    assert [count - (2 * 32 + 2) for count in counts] == [of_R, of_lora]  # the head is trained in either
    assert evaluate(loaded, load_task("parity", parity), split="train")["adapter"] > 0.9


@pytest.mark.parametrize(
    ("given", "rates", "decays"),
    [
        ({"weight_decay": 0.1}, [9e-3, 1e-3], [0.1, 0]),
        ({"learning_rate": 2e-3, "optimizer": "adamw"}, [2e-3, 2e-3], [0, 0]),
        ({"learning_rate": 2e-3, "head_learning_rate": 5e-4}, [2e-3, 5e-4], [0, 0]),
    ],
)
def test_a_head_has_a_rate_of_its_own(
    given: dict[str, Any],
    rates: list[float],
    decays: list[float],
    bert: Path,
    parity: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found: list[Any] = []
    scheduled = RTrainer.create_scheduler

    def look(trainer: RTrainer, **options: Any) -> Any:
        found.extend((group["lr"], group["weight_decay"]) for group in trainer.optimizer.param_groups)
        return scheduled(trainer, **options)

    monkeypatch.setattr(RTrainer, "create_scheduler", look)
    settings = FitSettings(max_steps=2, warmup=0, **given)
    adapter = fit(str(bert), CalibrationSettings(rank=4), parity, tmp_path / "a", settings)
    assert found == list(zip(rates, decays, strict=True))
    log = [json.loads(line) for line in (tmp_path / "a" / "training_log.jsonl").read_text().splitlines()]
    shown = [entry["learning_rate"] for entry in log if "learning_rate" in entry]
    assert max(shown) <= rates[0]
    assert max(shown) > rates[0] / 3  # R's, not the head's
    assert adapter.training["settings"]["head_learning_rate"] in (None, rates[1])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_head_is_scored_as_it_was_validated(dtype: str, bert: Path, parity: Path, tmp_path: Path) -> None:
    """In fp32, in which it was trained, also on a base of 16 bits."""
    settings = FitSettings(max_steps=4, dtype=dtype, keep="last", metric="accuracy")
    fit(str(bert), CalibrationSettings(rank=4), parity, tmp_path / "a", settings)
    adapter = Adapter.load(tmp_path / "a")
    network = BaseModel.resolve(bert).load(SEQ_CLS, dtype=dtype, num_labels=2)
    before = {name: (tensor.dtype, tensor.clone()) for name, tensor in network.state_dict().items()}
    found = evaluate(adapter, parity, split="valid", network=network)
    assert found["adapter"] == adapter.training["valid_metrics"]["accuracy"]
    for name, tensor in network.state_dict().items():
        assert (tensor.dtype, torch.equal(tensor, before[name][1])) == (before[name][0], True)
    adapter.inject(network)
    head = head_parameters(network)
    assert all(torch.equal(head[name], tensor) for name, tensor in adapter.head.items())
    assert all(parameter.dtype == torch.float32 for parameter in head.values())


def test_numbers_are_learnt_and_scored_as_they_were_validated(bert: Path, tmp_path: Path) -> None:
    rows = [{"text": "a" * n, "label": n / 4} for n in range(1, 13)]
    task = task_of("lengths", {"train": rows, "valid": rows})
    settings = FitSettings(max_steps=6, learning_rate=2e-2, evaluate_every=3, metric="rmse")
    made = fit(str(bert), CalibrationSettings(rank=4), task, tmp_path / "a", settings)
    assert set(made.training["valid_metrics"]) == {"pearson", "rmse"}
    loaded = Adapter.load(tmp_path / "a")
    assert (loaded.regression, loaded.num_labels, loaded.labels) == (True, 1, [])
    found = evaluate(loaded, task, split="valid", metric="rmse")
    assert found["adapter"] == pytest.approx(made.training["valid_metrics"]["rmse"], rel=1e-4)


def test_a_base_that_classifies_otherwise_gets_another_head(bert: Path, parity: Path, tmp_path: Path) -> None:
    """As one does that was trained for another task; and whatever is made of the adapter has the new head."""
    base = tmp_path / "base"
    shutil.copytree(bert, base)
    AutoModelForSequenceClassification.from_pretrained(bert, num_labels=3).save_pretrained(base)
    adapter = fit(base, CalibrationSettings(rank=4), parity, tmp_path / "a", FitSettings(max_steps=2))
    assert adapter.head["classifier.weight"].shape[0] == 2
    merge(adapter, tmp_path / "merged", verify=True)
    assert AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged").config.num_labels == 2


def test_a_narrow_head_is_given_back_as_it_was(bert: Path, parity: Path, tmp_path: Path) -> None:
    """It is trained in fp32, and the next task's own basis is made with it."""
    network = BaseModel.resolve(bert).load(SEQ_CLS, dtype="bfloat16", num_labels=2)
    before = {name: parameter.clone() for name, parameter in head_parameters(network).items()}
    basis = calibrate(str(bert), {}, CalibrationSettings(rank=4, directions="random"))
    settings = FitSettings(max_steps=1, dtype="bfloat16")
    adapter = fit(str(bert), basis, parity, tmp_path / "a", settings, network=network)
    assert all(tensor.dtype == torch.float32 for tensor in adapter.head.values())
    after = head_parameters(network)
    assert all(after[name].dtype == torch.bfloat16 and torch.equal(after[name], before[name]) for name in before)


def test_a_head_that_has_learnt_these_classes_keeps_their_order(tmp_path: Path) -> None:
    """Were they sorted, training would begin with a head that names every class as another one."""
    names = ["no", "maybe", "yes"]
    network = BertForSequenceClassification.from_pretrained(
        make_bert(tmp_path / "body"), id2label=dict(enumerate(names)), ignore_mismatched_sizes=True
    )
    base = tmp_path / "base"
    network.save_pretrained(base)
    save_tokenizer(base)
    rows = [{"text": "ab"[i % 2] * (1 + i % 5), "label": names[i % 3]} for i in range(12)]
    task = task_of("t", {"train": rows, "valid": rows})
    frozen = FitSettings(max_steps=1, learning_rate=1e-12, init="zero", keep="last")
    adapter = fit(base, CalibrationSettings(rank=4), task, tmp_path / "a", frozen)
    assert adapter.labels == names
    encoded = AutoTokenizer.from_pretrained(base)([str(row["text"]) for row in rows], padding=True, return_tensors="pt")
    with torch.no_grad():
        logits = network.eval()(input_ids=encoded.input_ids, attention_mask=encoded.attention_mask).logits
    right = sum(names[int(k)] == row["label"] for k, row in zip(logits.argmax(-1), rows, strict=True))
    assert adapter.training["valid_metrics"]["accuracy"] == pytest.approx(right / 12, abs=1e-6)
    again = fit(base, adapter.load_basis(), task, tmp_path / "b", frozen, start=adapter)
    assert again.labels == names
    others = [{**row, "label": f"{row['label']}!"} for row in rows]
    other = fit(base, CalibrationSettings(rank=4), task_of("o", {"train": others}), tmp_path / "c", frozen)
    assert other.labels == ["maybe!", "no!", "yes!"]


def test_a_basis_is_of_the_loss_of_the_classes_that_a_head_has_learnt(tmp_path: Path) -> None:
    """Whatever their order in it, and so is what it is said to capture."""
    rows = [{"text": "ab"[i % 2] * (1 + i % 5), "label": ("no", "maybe", "yes")[i % 3]} for i in range(12)]
    network = BertForSequenceClassification.from_pretrained(make_bert(tmp_path / "body"), num_labels=3)
    task, made = task_of("t", {"train": rows}), []
    for names, order in ((["no", "maybe", "yes"], [0, 1, 2]), (["maybe", "no", "yes"], [1, 0, 2])):
        network.config.id2label = dict(enumerate(names))
        for parameter in network.classifier.parameters():
            parameter.data = parameter.data[order]
        network.save_pretrained(tmp_path / names[0])
        save_tokenizer(tmp_path / names[0])
        settings = CalibrationSettings(rank=4, reduction="raw", dtype="float64")
        made.append(calibrate(tmp_path / names[0], {"t": task}, settings))
    for name, module in made[0].modules.items():
        step, sorted_step = (one.B * one.S @ one.A for one in (module, made[1].modules[name]))
        assert (step - sorted_step).norm() < 1e-5 * step.norm(), name
    base = BaseModel.resolve(tmp_path / "no")
    found = capture(base, base.load(SEQ_CLS, dtype="float64", num_labels=3), made[0], task)
    assert found["basis"] == pytest.approx(found["own"], abs=1e-6)
