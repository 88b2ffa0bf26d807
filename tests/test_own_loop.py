"""Adapters in a loop of one's own: attached, trained, saved."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import Trainer, TrainingArguments

from lorasb_export import Adapter, Basis, calibrate, export, fit, merge
from lorasb_export.base.model import BaseModel
from lorasb_export.calibration.gradients import draw
from lorasb_export.choices import SEQ_CLS
from lorasb_export.data.task import load_task
from lorasb_export.errors import ArtifactError, SettingsError
from lorasb_export.evaluation.evaluate import evaluate
from lorasb_export.layers.factors import ModuleBasis
from lorasb_export.settings import CalibrationSettings
from lorasb_export.training.muon import Muon, groups_of
from tests import training

basis = training.basis
PAGE = Path(__file__).parents[1] / "docs/how-to/own-loop.md"


def lines_of_docs(heading: str) -> list[str]:
    """The blocks of Python under `heading` of the page on loops of one's own."""
    _, _, below = PAGE.read_text(encoding="utf-8").partition(f"## {heading}\n")
    return [block.partition("```")[0] for block in below.partition("\n## ")[0].split("```python\n")[1:]]


def test_attach_and_save_in_a_loop_of_ones_own(llama: Path, basis: Path, tmp_path: Path) -> None:
    """The loop of the design's page, and the reloaded adapter answers as the trained one did."""
    network = BaseModel.resolve(llama).load()
    adapter = Adapter.attach(network, Basis.load(basis))
    optimizer = torch.optim.AdamW([p for p in network.parameters() if p.requires_grad], lr=1e-2)
    ids = torch.tensor([[1, 20, 21, 22, 23, 2]])
    for _ in range(3):
        network(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    adapter.save(tmp_path / "mine")
    fresh = BaseModel.resolve(llama).load()
    Adapter.load(tmp_path / "mine").inject(fresh)
    assert torch.equal(fresh(ids).logits, network(ids).logits)


def test_a_trainer_resumes_from_checkpoints_of_r_alone(llama: Path, basis: Path, tmp_path: Path) -> None:
    (line,) = [line for line in lines_of_docs("Your own loop") if line.startswith("model._keys_to_ignore_on_save")]
    rows = [{"input_ids": [1, 20 + i, 21, 22, 2], "labels": [1, 20 + i, 21, 22, 2]} for i in range(12)]

    def trained(steps: int, resume: bool) -> Adapter:
        model = BaseModel.resolve(llama).load()
        adapter = Adapter.attach(model, Basis.load(basis))
        exec(line, {"model": model})
        places = {"output_dir": str(tmp_path / "out"), "use_cpu": True, "report_to": "none", "disable_tqdm": True}
        args = TrainingArguments(**places, max_steps=steps, save_steps=2, learning_rate=1e-2)
        Trainer(model, args, train_dataset=rows).train(resume_from_checkpoint=resume)
        return adapter

    whole = trained(4, resume=False)
    shutil.rmtree(tmp_path / "out/checkpoint-4")
    weights = load_file(tmp_path / "out/checkpoint-2/model.safetensors")
    assert sorted(weights) == sorted(f"{name}.R" for name in whole.R)
    resumed = trained(4, resume=True)
    assert all(torch.equal(R, resumed.R[name]) for name, R in whole.R.items())


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        (torch.full((8, 8), float("nan")), r"it is not finite \(.*\)\. Nothing was written"),
        (torch.zeros(16), r"R is \[16\], not"),  # a flat shard
        (torch.zeros(0), r"R is \[0\], not"),
    ],
)
def test_what_could_not_be_loaded_does_not_replace_what_can(
    value: torch.Tensor, problem: str, llama: Path, basis: Path, tmp_path: Path
) -> None:
    adapter = Adapter.fresh(Basis.load(basis))
    adapter.save(tmp_path / "a")
    before = adapter.sha256
    adapter.R[sorted(adapter.R)[-1]] = value
    with pytest.raises(ArtifactError, match=problem):
        adapter.save(tmp_path / "a", overwrite=True)
    assert Adapter.load(tmp_path / "a").sha256 == before


def test_a_classifier_in_a_loop_of_ones_own_keeps_its_head(bert: Path, parity: Path, tmp_path: Path) -> None:
    basis = calibrate(str(bert), {"parity": parity}, CalibrationSettings(rank=8))
    network = BaseModel.resolve(bert).load(SEQ_CLS, num_labels=3, dtype="bfloat16")
    adapter = Adapter.attach(network, basis)
    before = adapter.head["classifier.weight"].detach().clone()
    network.classifier.weight = torch.nn.Parameter(before.clone())  # as FSDP2 does
    optimizer = Muon(groups_of(network), lr=1e-2)
    ids = torch.tensor([[1, 20, 21, 22, 23, 2]])
    network(ids, labels=torch.tensor([1])).loss.backward()
    optimizer.step()
    adapter.save(tmp_path / "mine")
    loaded = Adapter.load(tmp_path / "mine")
    assert (loaded.task_type, loaded.num_labels, loaded.labels) == (SEQ_CLS, 3, [0, 1, 2])  # as rows have them
    rows = [{"text": "1+1", "label": 0}, {"text": "1+2", "label": 1}]
    (tmp_path / "numbers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert evaluate(loaded, load_task("numbers", tmp_path / "numbers.jsonl"), split="train")["rows"] == 2
    assert torch.equal(loaded.head["classifier.weight"], adapter.head["classifier.weight"])
    assert not torch.equal(loaded.head["classifier.weight"], before)


def test_a_head_of_one_output_predicts_a_number(bert: Path) -> None:
    basis = calibrate(str(bert), {}, CalibrationSettings(rank=4, directions="random"))
    adapter = Adapter.attach(BaseModel.resolve(bert).load(SEQ_CLS, num_labels=1), basis)
    assert (adapter.regression, adapter.num_labels, adapter.labels) == (True, 1, [])


def test_scoring_in_a_loop_of_ones_own_does_not_end_the_training(bert: Path, parity: Path, tmp_path: Path) -> None:
    rows = [{"text": f"{a}+{b}", "label": (a + b) % 2} for a in range(3) for b in range(3)]  # as `attach` names them
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    basis = calibrate(str(bert), {"parity": parity}, CalibrationSettings(rank=8))
    network = BaseModel.resolve(bert).load(SEQ_CLS, num_labels=2)
    adapter = Adapter.attach(network, basis)
    optimizer = torch.optim.SGD([p for p in network.parameters() if p.requires_grad], lr=0.1)
    task, ids, values = load_task("rows", tmp_path / "rows.jsonl"), torch.tensor([[1, 20, 21, 22, 23, 2]]), []
    for _ in range(2):
        before = {name: R.detach().clone() for name, R in adapter.R.items()}
        network(ids, labels=torch.tensor([1])).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        assert all(not torch.equal(R, before[name]) for name, R in adapter.R.items())
        values.append(evaluate(adapter, task, split="train", metric="f1", network=network))
        logits = network(ids).logits
    fresh = BaseModel.resolve(bert).load(SEQ_CLS, num_labels=2).eval()
    adapter.inject(fresh)
    assert torch.equal(fresh(ids).logits, logits)
    assert evaluate(adapter, task, split="train", metric="f1", network=fresh) == values[-1]


@pytest.mark.parametrize("swap", [False, True])  # as torch does it of FSDP2's tensors
def test_a_cast_of_the_model_leaves_R_in_fp32(
    swap: bool, llama: Path, basis: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = BaseModel.resolve(llama).load(dtype="float32")
    adapter = Adapter.attach(network, Basis.load(basis))
    ids = torch.tensor([[1, 20, 21, 22, 23, 2]])
    network(ids, labels=ids).loss.backward()
    before = {name: (R.detach().clone(), R.grad) for name, R in adapter.R.items()}
    monkeypatch.setattr("torch.__future__.get_swap_module_params_on_conversion", lambda: swap)
    network.to(torch.bfloat16)
    assert network.lm_head.weight.dtype == torch.bfloat16
    for name, (R, grad) in before.items():
        assert torch.equal(adapter.R[name], R)
        assert torch.equal(adapter.R[name].grad, grad)
    network(ids, labels=ids).loss.backward()


ROWS = [{"prompt": "1+1", "completion": "2"}] * 100


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda b, _: fit(b, b, ROWS, "out"), "the task's data is a list, not a path or Hub id. For rows in memory"),
        (lambda b, a: evaluate(a, ROWS), "the task's data is a list"),
        (lambda b, _: calibrate(b, {"rows": ROWS}), "the task's data is a list"),
        (lambda b, a: merge(a, "out", base=torch.nn.Linear(2, 2)), "the base model is a Linear"),
        (lambda b, a: export(a, "out", format="peft"), "an adapter is a Adapter, not a path or Hub id. Save it"),
        (lambda b, _: Basis.load({}), "what holds it is a dict"),
    ],
)
def test_what_is_in_memory_is_not_looked_for_under_its_text(
    call: Any, said: str, llama: Path, basis: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SettingsError, match=re.escape(said)):
        call(str(llama), Adapter.fresh(Basis.load(basis)))
    assert not list(tmp_path.iterdir())


def test_an_adapter_is_trained_on(llama: Path, basis: Path, tmp_path: Path) -> None:
    first = Adapter.attach(BaseModel.resolve(llama).load(), Basis.load(basis), scaling=2.0)
    for R in first.R.values():
        R.data.add_(1.0)
    first.save(tmp_path / "first", embed=True)
    start, network = Adapter.load(tmp_path / "first"), BaseModel.resolve(llama).load()
    adapter = Adapter.attach(network, start.load_basis(), start=start)
    assert (adapter.scaling, adapter.sha256) == (2.0, start.sha256)
    optimizer = torch.optim.AdamW([p for p in network.parameters() if p.requires_grad], lr=1e-2)
    ids = torch.tensor([[1, 20, 21, 22, 23, 2]])
    network(ids, labels=ids).loss.backward()
    optimizer.step()
    adapter.save(tmp_path / "second")
    assert Adapter.load(tmp_path / "second").sha256 == adapter.sha256 != start.sha256 == first.sha256
    shutil.rmtree(tmp_path / "first")  # the basis that lay in it went along
    assert Adapter.load(tmp_path / "second").load_basis().sha256 == start.basis_sha256
    other = calibrate(str(llama), {}, CalibrationSettings(rank=8, directions="random"))
    with pytest.raises(ArtifactError, match="do not belong together"):
        Adapter.attach(network, other, start=start)


def test_the_lines_of_the_docs_attach_train_on_and_take_off(
    llama: Path, basis: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(llama, tmp_path / "base")
    shutil.copytree(basis, tmp_path / "basis")
    monkeypatch.chdir(tmp_path)
    attached, trained_on, taken_off = lines_of_docs("Your own loop")[:3]
    names: dict[str, Any] = {}
    exec(attached, names)
    exec(trained_on, names)
    assert names["adapter"].sha256 == Adapter.load("adapters/mine").sha256
    exec(taken_off, names)
    assert names["model"].state_dict().keys() == BaseModel.resolve(llama).load().state_dict().keys()


def test_the_lines_of_the_docs_make_the_basis_that_calibrate_makes(
    llama: Path, sums: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(llama, "base")
    (lines,) = lines_of_docs("A basis of your own loss")
    settings = CalibrationSettings(rank=4, targets="mlp-output")
    theirs = calibrate(str(llama), {"sums": sums}, settings)
    rows = draw(load_task("sums", sums), BaseModel.resolve(llama), [], settings)
    batches = [{key: torch.tensor([row[key]]) for key in ("input_ids", "labels")} for row in rows]
    exec(lines.replace("= 64,", "= 4,"), {"loader": batches, "loss_of": lambda model, batch: model(**batch).loss})
    ours = Basis.load("basis")
    assert ours.modules.keys() == theirs.modules.keys()
    for name, module in ours.modules.items():
        expected = theirs.modules[name]
        assert torch.allclose(module.B * module.S @ module.A, expected.B * expected.S @ expected.A, atol=1e-7)
        assert torch.allclose(module.B @ module.B.T, expected.B @ expected.B.T, atol=1e-3)
    adapter = Adapter.attach(BaseModel.resolve(llama).load(), ours)
    adapter.save("a")
    assert Adapter.load("a").load_basis().sha256 == ours.sha256


def test_the_lines_of_the_docs_evaluate_many_with_one_basis(
    llama: Path, basis: Path, sums: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for source, name in ((llama, "base"), (basis, "basis"), (sums, "data/a")):
        shutil.copytree(source, name)
    for init, name in (("zero", "a"), ("svd", "b")):
        Adapter.fresh(Basis.load("basis"), init=init).save(f"adapters/{name}")
    _, lines = lines_of_docs("Several adapters on one model")
    read, load = [], Basis.load

    def reading(source: str) -> Basis:
        read.append(source)
        return load(source)

    monkeypatch.setattr(Basis, "load", reading)
    names: dict[str, Any] = {}
    exec(lines, names)
    assert read == ["basis"]
    assert names["scores"] == {name: evaluate(f"adapters/{name}", "data/a") for name in "ab"}
    assert len(names["said_by_base"]) == 1


def test_a_basis_that_is_not_orthonormal_is_not_saved(basis: Path, tmp_path: Path) -> None:
    good = Basis.load(basis)
    name = next(iter(good.modules))
    module = good.modules[name]
    assert isinstance(module, ModuleBasis)
    for bad in (
        replace(module, B=2 * module.B),
        replace(module, A=module.A[:4]),
        replace(module, A=torch.nan * module.A),
    ):
        with pytest.raises(ArtifactError, match=rf"[AB] of {name} is not made of 8 orthonormal vectors"):
            replace(good, modules={**good.modules, name: bad}).save(tmp_path / "bad")
    rounded = {n: replace(m, B=m.B.bfloat16(), A=m.A.bfloat16()) for n, m in good.modules.items()}
    replace(good, modules=rounded).save(tmp_path / "rounded")


def test_a_classifier_is_trained_on_from_its_head_and_labels(bert: Path, parity: Path, tmp_path: Path) -> None:
    basis = calibrate(str(bert), {"parity": parity}, CalibrationSettings(rank=2))
    base = BaseModel.resolve(bert)
    network = base.load(SEQ_CLS, num_labels=2)
    network.config.id2label = {0: "odd", 1: "even"}
    start = Adapter.attach(network, basis)
    start.head["classifier.weight"].data.add_(1.0)
    start.training["task"] = "parity"
    adapter = Adapter.attach(base.load(SEQ_CLS, num_labels=2, seed=1), basis, start=start)
    assert adapter.sha256 == start.sha256
    assert adapter.training == {"labels": ["odd", "even"]}  # of the run there is nothing yet
    assert not any(p is q for p, q in zip(adapter.tensors().values(), start.tensors().values(), strict=True))
    with pytest.raises(ArtifactError, match="another head than the adapter to start from"):
        Adapter.attach(base.load(SEQ_CLS, num_labels=3), basis, start=start)


def test_what_a_loop_says_of_itself_may_be_any_numbers(basis: Path, tmp_path: Path) -> None:
    adapter = Adapter.fresh(Basis.load(basis))
    said = {"loss": np.float32(0.5), "steps": torch.tensor(3), "all": [np.int64(1)], "some": np.array([0.25])}
    adapter.training = MappingProxyType({**said, "folder": tmp_path, "own": MappingProxyType({"x": 1})})
    adapter.save(tmp_path / "a")
    expected = {"loss": 0.5, "steps": 3, "all": [1], "some": [0.25], "folder": str(tmp_path), "own": {"x": 1}}
    assert Adapter.load(tmp_path / "a").training == expected
