"""From rows to a basis: tasks and their weights, modules, and what the basis says it captures."""

from __future__ import annotations

import json
import shutil
import weakref
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import HrmTextConfig, HrmTextForCausalLM

from lorasb_export import fit
from lorasb_export.base.model import BaseModel
from lorasb_export.basis import Basis
from lorasb_export.calibration.calibrate import calibrate
from lorasb_export.calibration.capture import capture, overview, recorded
from lorasb_export.calibration.gradients import draw
from lorasb_export.calibration.subspace import CaptureRatios, to_four_digits
from lorasb_export.choices import SEQ_CLS
from lorasb_export.data.task import TaskData, load_task, load_tasks, task_of
from lorasb_export.errors import BaseModelError, DataError, SettingsError
from lorasb_export.inspection import inspect_folder
from lorasb_export.settings import CalibrationSettings, FitSettings
from tests.conftest import lorasb, write_splits
from tests.families import SIZES
from tests.tiny import make_llama, save_tokenizer


@pytest.fixture(scope="module")
def base(llama: Path) -> BaseModel:
    return BaseModel.resolve(llama)


# --- tasks and their weights ----------------------------------------------------------------------------------------


def test_weights_of_a_mixture(base: BaseModel, sums: Path, products: Path) -> None:
    network, data = base.load(), {"a": sums, "b": products}
    settings = CalibrationSettings(rank=4, samples=8, capture=False)
    plain = calibrate(base, data, settings, network=network)
    assert [source["weight"] for source in plain.calibration["data"]] == [1.0, 1.0]
    assert calibrate(base, data, settings, weights={"a": 1, "b": 1.0}, network=network).sha256 == plain.sha256
    heavy = calibrate(base, data, settings, weights={"a": 20}, network=network)
    assert [source["weight"] for source in heavy.calibration["data"]] == [20.0, 1.0]
    task = load_task("a", sums)
    assert capture(base, network, heavy, task)["basis"] > capture(base, network, plain, task)["basis"]
    with pytest.raises(SettingsError, match=r"a weight for 'c', which is no task.*a, b"):
        calibrate(base, data, settings, weights={"c": 1.0}, network=network)
    for wrong in (0.0, -1.0, float("inf"), float("nan")):
        with pytest.raises(SettingsError, match="weight of task a"):
            calibrate(base, data, settings, weights={"a": wrong}, network=network)


def test_of_many_tasks_without_a_row_to_learn_from_ten_are_told(
    base: BaseModel, sums: Path, log: pytest.LogCaptureFixture
) -> None:
    long = task_of("long", {"train": [{"prompt": "1" * 600, "completion": "2"}]})
    data = {"a": sums, **{f"t{k}": long for k in range(12)}}
    calibrate(base, data, CalibrationSettings(rank=4, samples=4, capture=False), pass_over=True)
    (told,) = [message for message in log.messages if "The basis is made without 12 of 13 tasks" in message]
    assert told.count("there is no row to learn from") == 10
    assert told.endswith("\n  and 2 more")


def test_data_without_a_name_is_refused(llama: Path, sums: Path) -> None:
    with pytest.raises(SettingsError, match=r'the data is a str, not tasks by name\. Give {"name": data}'):
        calibrate(str(llama), str(sums), CalibrationSettings(rank=4))  # type: ignore[arg-type]


def test_a_task_is_called_as_in_the_mixture(base: BaseModel, sums: Path) -> None:
    """Two names for the same loaded data are two tasks, and neither loses its rows."""
    task = load_task("sums", sums)
    basis = calibrate(base, {"a": task, "b": task}, CalibrationSettings(rank=4, samples=4, capture=False))
    assert [(source["name"], source["rows"]) for source in basis.calibration["data"]] == [("a", 4), ("b", 4)]


def test_rows_of_one_task_at_a_time_are_in_memory(base: BaseModel, sums: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[weakref.ref[TaskData]] = []

    def reading(data: dict[str, Path]) -> Iterator[TaskData]:
        for task in load_tasks(data):
            read.append(weakref.ref(task))
            yield task

    def drawing(*arguments: Any, **options: Any) -> Any:
        assert sum(task() is not None for task in read) == 1
        return draw(*arguments, **options)

    monkeypatch.setattr("lorasb_export.calibration.calibrate.load_tasks", reading)
    monkeypatch.setattr("lorasb_export.calibration.calibrate.draw", drawing)
    calibrate(base, dict.fromkeys("abc", sums), CalibrationSettings(rank=4, samples=2, capture=False))


def test_tasks_of_different_kinds_are_refused(base: BaseModel, sums: Path, parity: Path) -> None:
    with pytest.raises(DataError, match=r"the tasks mix .* \(a and b\)") as error:
        calibrate(base, {"a": sums, "b": parity})
    command = f"lorasb calibrate --data b={parity} --out basis_b"
    assert f'{command}, then [tasks.b] basis = "basis_b"' in str(error.value)
    numbered = TaskData("n", "memory", SEQ_CLS, {"train": [{"text": "x", "label": 1}]}, "0")
    with pytest.raises(DataError, match="names, of others numbers"):
        calibrate(base, {"a": parity, "n": numbered})


def test_a_single_class_is_nothing_to_learn(bert: Path, tmp_path: Path) -> None:
    rows = [{"text": "a", "label": "yes"}, {"text": "b", "label": "yes"}]
    write_splits(tmp_path / "data", {"train": rows})
    task = load_task("t", tmp_path / "data")  # to score a classifier by such rows is another matter
    random = calibrate(str(bert), {}, CalibrationSettings(rank=4, directions="random"))
    with pytest.raises(DataError, match="every training row has the label 'yes'"):
        calibrate(str(bert), {"t": task}, CalibrationSettings(rank=4))
    with pytest.raises(DataError, match="every training row has the label 'yes'"):
        fit(str(bert), random, task, tmp_path / "a", FitSettings(max_steps=1))


# --- modules --------------------------------------------------------------------------------------------------------


def test_rank_larger_than_a_module(llama: Path, sums: Path) -> None:
    with pytest.raises(
        SettingsError, match=r"rank 17 exceeds module model\.layers\.0\.self_attn\.k_proj of shape \(16, 32\)"
    ):
        calibrate(str(llama), {"sums": sums}, CalibrationSettings(rank=17))


def test_target_that_matches_nothing(llama: Path, sums: Path) -> None:
    with pytest.raises(SettingsError, match=r"target 'q_prj' matches no module.*q_proj"):
        calibrate(str(llama), {"sums": sums}, CalibrationSettings(rank=4, targets="v_proj,q_prj"))


@pytest.mark.parametrize("directions", ["gradient", "random"])
def test_a_weight_that_transformers_renames_is_told_of_first(
    directions: str, sums: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """HRM's checkpoints have the projections of its attention as one tensor."""
    torch.manual_seed(0)
    HrmTextForCausalLM(HrmTextConfig(**SIZES)).save_pretrained(tmp_path / "base")
    save_tokenizer(tmp_path / "base")
    base, settings = BaseModel.resolve(tmp_path / "base"), CalibrationSettings(rank=4, directions=directions)
    network = base.load()
    network.save_pretrained(tmp_path / "as_told", save_original_format=False)
    again = BaseModel.resolve(tmp_path / "as_told").load()
    assert all(torch.equal(*pair) for pair in zip(network.parameters(), again.parameters(), strict=True))
    assert calibrate(tmp_path / "as_told", {}, CalibrationSettings(rank=4, directions="random")).modules
    monkeypatch.setattr(BaseModel, "load", lambda *_, **__: pytest.fail("loaded"))
    monkeypatch.setattr("lorasb_export.calibration.calibrate.gradients_of_rows", lambda *_: pytest.fail("computed"))
    told = r"module\.layers\.0\.self_attn\.q_proj.* in another form .*save_original_format=False"
    for given in (None, network):
        with pytest.raises(BaseModelError, match=told):
            calibrate(base, {"sums": sums}, settings, network=given)
    with pytest.raises(BaseModelError, match=told):  # with a basis of its own
        fit(base, settings, load_task("sums", sums), tmp_path / "a", FitSettings(max_steps=1), network=network)


def test_targets_by_ending(llama: Path, sums: Path) -> None:
    basis = calibrate(str(llama), {"sums": sums}, CalibrationSettings(rank=4, targets="q_proj,mlp.down_proj"))
    assert {name.rpartition(".")[2] for name in basis.modules} == {"q_proj", "down_proj"}
    assert len(basis.modules) == 4


def test_targets_as_a_list_are_those_with_commas_between(llama: Path, sums: Path) -> None:
    """As lorasb.toml may say it, with which the basis is compared."""
    settings = CalibrationSettings(rank=4, targets=["q_proj", "mlp.down_proj"])  # type: ignore[arg-type]
    basis = calibrate(str(llama), {"sums": sums}, settings)
    assert len(basis.modules) == 4
    assert basis.differences({"targets": ["q_proj", "mlp.down_proj"]}) == []
    assert basis.differences({"targets": ["q_proj"]}) == ["targets q_proj,mlp.down_proj, not q_proj"]
    with pytest.raises(SettingsError, match=r"targets is \[1\]. Give endings of module names, in quotes"):
        CalibrationSettings(targets=[1])  # type: ignore[arg-type]


def test_module_without_gradient_is_reported(llama: Path, sums: Path, tmp_path: Path) -> None:
    base = BaseModel.resolve(make_llama(tmp_path / "dead"))
    network = base.load()
    network.model.layers[0].mlp.up_proj.weight.data.zero_()
    network.model.layers[0].mlp.gate_proj.weight.data.zero_()
    with pytest.raises(BaseModelError, match=r"received no gradient.*layers\.0\.mlp"):
        calibrate(base, {"sums": sums}, CalibrationSettings(rank=4), network=network)


def test_oracle_23_biases_and_the_head_are_left_alone(bert: Path, parity: Path) -> None:
    base = BaseModel.resolve(bert)
    network = base.load(SEQ_CLS, num_labels=2)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    basis = calibrate(base, {"parity": parity}, CalibrationSettings(rank=4, samples=8), network=network)
    assert len(basis.modules) == 13  # six in each layer and the pooler, not the head
    assert not any("classifier" in name for name in basis.modules)
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())


def test_oracle_23_full_rank_keeps_everything(base: BaseModel, sums: Path) -> None:
    """r = min(out, in) for the square modules: the whole gradient is captured."""
    settings = CalibrationSettings(rank=32, samples=8, targets="self_attn.q_proj,o_proj")
    basis = calibrate(base, {"sums": sums}, settings)
    for module in basis.modules.values():
        assert (module.B.T @ module.B - torch.eye(32)).abs().max() < 1e-5
    assert basis.calibration["capture"]["basis"] == pytest.approx(1.0, abs=1e-4)
    assert basis.calibration["capture"]["random"] == 1.0


# --- what is captured -----------------------------------------------------------------------------------------------


def test_capture_of_a_single_task_is_its_own(base: BaseModel, sums: Path) -> None:
    task, network = load_task("sums", sums), base.load()
    basis = calibrate(base, {"sums": task}, CalibrationSettings(rank=4, capture=False), network=network)
    found, measured = basis.calibration["capture"], capture(base, network, basis, task)
    assert found["tasks"]["sums"] == {
        "sha256": task.sha256,
        "rows": 32,
        "basis": found["basis"],
        "own": found["basis"],
        "random": found["random"],
        "modules": {name: ratios | {"own": ratios["basis"]} for name, ratios in found["modules"].items()},
    }
    assert found["basis"] == pytest.approx(measured["basis"], abs=1e-3)
    assert found["modules"].keys() == basis.modules.keys()
    for name, ratios in found["modules"].items():
        assert ratios["basis"] == pytest.approx(measured["modules"][name]["basis"], abs=1e-3)
        assert ratios["random"] == pytest.approx(measured["modules"][name]["random"], abs=1e-4)
    assert recorded(basis, task).keys() == measured.keys()


def test_capture_of_a_mixture_is_measured_task_by_task(
    base: BaseModel, sums: Path, products: Path, tmp_path: Path
) -> None:
    tasks, network = [load_task("sums", sums), load_task("products", products)], base.load()
    settings = CalibrationSettings(rank=4, samples=32)
    calibrate(base, {task.name: task for task in tasks}, settings, network=network).save(tmp_path / "basis")
    basis = Basis.load(tmp_path / "basis")
    assert json.loads((tmp_path / "basis" / "basis_config.json").read_text())["calibration"] == basis.calibration
    for task in tasks:
        measured, found = capture(base, network, basis, task), recorded(basis, task)
        assert overview(found) == overview(measured)
        assert found["modules"] == {name: to_four_digits(ratios) for name, ratios in measured["modules"].items()}
        assert found["random"] < min(found["basis"], found["own"])
    assert recorded(basis, replace(tasks[0], sha256="another")) is None
    without = calibrate(base, {task.name: task for task in tasks}, replace(settings, capture=False), network=network)
    assert without.sha256 == basis.sha256
    assert without.calibration["capture"]["tasks"] == {}
    assert recorded(without, tasks[0]) is None


def test_capture_of_a_mixture_of_classes(bert: Path, parity: Path, tmp_path: Path) -> None:
    """Each task is measured with the head of the mixture, whose classes are those of all tasks."""
    write_splits(tmp_path / "c", {"train": [{"text": f"{i}", "label": f"label{i % 3}"} for i in range(9)]})
    basis = calibrate(str(bert), {"parity": parity, "c": tmp_path / "c"}, CalibrationSettings(rank=4, samples=8))
    assert basis.calibration["capture"]["tasks"]["c"]["rows"] == 8
    assert basis.calibration["task_type"] == SEQ_CLS


def test_inspect_draws_the_head_that_calibration_drew(bert: Path, parity: Path, tmp_path: Path) -> None:
    basis = calibrate(str(bert), {"parity": parity}, CalibrationSettings(rank=4, seed=7))
    basis.save(tmp_path / "basis")
    recorded = basis.calibration["capture"]["tasks"]["parity"]
    measured = inspect_folder(tmp_path / "basis", data=parity)["capture"]
    assert measured["basis"] == recorded["basis"]  # of the task's own directions rounding decides some signs


def test_a_module_that_a_task_does_not_use_has_no_ratio() -> None:
    ratios, eye = CaptureRatios(), torch.eye(4)
    ratios.add("used", torch.ones(4, 4), basis=(eye[:, :2], eye[:2]))
    ratios.add("unused", torch.zeros(4, 4), basis=(eye[:, :2], eye[:2]))
    assert ratios.modules == {"used": {"basis": 0.5, "random": 0.5}}
    assert ratios.overall() == {"basis": 0.5, "random": 0.5}


# --- on the command line --------------------------------------------------------------------------------------------


def printed(*words: str) -> str:
    done = lorasb(*words)
    assert done.exit_code == 0, done.output
    return done.stdout


def test_calibrate_and_inspect(llama: Path, sums: Path, products: Path, tmp_path: Path) -> None:
    folder = str(tmp_path / "basis")
    words = ["calibrate", "--model", str(llama), "--data", f"a={sums}", "--data", f"b={products}", "--out", folder]
    options = ["--rank", "4", "--samples", "8", "--loss", "token", "--weight", "b=2", "--no-gradient-checkpointing"]
    found = json.loads(printed(*words, *options, "--json"))
    calibration = Basis.load(folder).calibration
    assert [source["weight"] for source in calibration["data"]] == [1.0, 2.0]
    assert (calibration["loss"], calibration["gradient_checkpointing"]) == ("token", False)
    assert found["capture"]["tasks"]["a"] == overview(calibration["capture"]["tasks"]["a"])

    text = printed(*words, *options, "--overwrite")
    assert [line.split()[0] for line in text.splitlines()[-4:]] == ["task", "a", "b", "all"]
    assert "%" in text
    text = printed(*words, *options, "--overwrite", "--no-capture")
    assert [line.split()[0] for line in text.splitlines()[-2:]] == ["task", "all"]

    shown = inspect_folder(folder)["recorded_capture"]
    assert shown["basis"] == calibration["capture"]["basis"]
    assert set(shown["by_module"]["basis"]) == {"min", "mean", "max"}
    measured = inspect_folder(folder, data=str(sums))["capture"]
    assert measured["by_module"]["own"]["min"] <= measured["own"] <= measured["by_module"]["own"]["max"]
    assert "by module" in printed("inspect", folder, "--data", str(sums))


def test_inspect_takes_the_base_from_where_it_is_now(llama: Path, sums: Path, tmp_path: Path) -> None:
    shutil.copytree(llama, tmp_path / "before")
    words = ["calibrate", "--model", str(tmp_path / "before"), "--data", f"a={sums}", "--out", str(tmp_path / "basis")]
    printed(*words, "--rank", "4", "--batch-size", "3")
    assert Basis.load(tmp_path / "basis").calibration["batch_size"] == 3
    (tmp_path / "before").rename(tmp_path / "now")
    words = ["inspect", str(tmp_path / "basis"), "--data", str(sums)]
    assert "say with --model where it is now" in lorasb(*words).stderr
    assert "by module" in printed(*words, "--model", str(tmp_path / "now"))


def test_wrong_weights_on_the_command_line() -> None:
    twice = ["calibrate", "--model", "m", "--data", "a=d", "--data", "a=e"]
    assert "'a' is given twice" in lorasb(*twice).output
    for wrong in ("a", "a=", "a=heavy"):
        assert lorasb("calibrate", "--model", "m", "--data", "a=d", "--weight", wrong).exit_code == 2
