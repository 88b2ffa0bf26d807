"""From rows to a basis: weights, losses, checkpointing, odd models, and what the basis says it captures."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from lorasb_cli.main import app
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModel, BertForMaskedLM, PreTrainedModel
from typer.testing import CliRunner

from lorasb_export import Adapter, fit
from lorasb_export.base import SEQ_CLS, BaseModel
from lorasb_export.basis import Basis
from lorasb_export.batches import IGNORE, Encoded, collate
from lorasb_export.calibration.calibrate import calibrate
from lorasb_export.calibration.capture import capture, overview, recorded
from lorasb_export.calibration.gradients import draw, gradient_sums, gradients_of_rows
from lorasb_export.calibration.subspace import CaptureRatios, rounded
from lorasb_export.data import TaskData, load_task
from lorasb_export.errors import BaseModelError, DataError, SettingsError
from lorasb_export.inspection import inspect_folder
from lorasb_export.settings import CalibrationSettings, FitSettings
from lorasb_export.targets import find_targets
from tests.conftest import write_splits
from tests.tiny import make_bert, make_gpt2

PAD = 2
ROWS = 13
Sums = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def products(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A task folder unlike `sums`: long answers of different lengths."""
    folder = tmp_path_factory.mktemp("data") / "products"
    rows = [{"prompt": f"{a}*{b}=", "completion": "x" * a + str(a * b)} for a in range(1, 8) for b in range(8)]
    write_splits(folder, {"train": rows})
    return folder


@pytest.fixture(scope="module")
def base(llama: Path) -> BaseModel:
    return BaseModel.resolve(llama)


@pytest.fixture(scope="module")
def network(base: BaseModel) -> PreTrainedModel:
    return base.load(dtype="float64")


@pytest.fixture(scope="module")
def rows(base: BaseModel, products: Path) -> list[Encoded]:
    task = load_task("products", products)
    return draw(task, base.load_tokenizer(), [], CalibrationSettings(samples=ROWS))


def sums_of(network: PreTrainedModel, rows: list[Encoded], **changed: Any) -> Sums:
    targets = find_targets(network, "all-linear")
    return gradients_of_rows(network, targets, rows, PAD, CalibrationSettings(**changed))


def plain(network: PreTrainedModel, loss: Callable[[], torch.Tensor]) -> Sums:
    """What autograd says without any of our machinery."""
    targets = find_targets(network, "all-linear")
    network.requires_grad_(True)
    loss().backward()
    found = {name: module.weight.grad.clone() for name, module in targets.items()}
    network.requires_grad_(False)
    network.zero_grad()
    return found


def token_losses(network: PreTrainedModel, row: Encoded) -> torch.Tensor:
    ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"])
    losses = nn.functional.cross_entropy(network(ids).logits[0, :-1], labels[1:], ignore_index=IGNORE, reduction="none")
    return losses[labels[1:] != IGNORE]


def assert_equal(found: Sums, expected: Sums, tolerance: float = 1e-6) -> None:
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert (found[name] - gradient).norm() <= tolerance * gradient.norm(), name


# --- the loss of a row ----------------------------------------------------------------------------------------------


def test_sample_loss_is_that_of_plain_autograd(network: PreTrainedModel, rows: list[Encoded]) -> None:
    """The base's lm_head is tied to its embeddings, which are no target: nothing of theirs leaks into a sum."""
    assert network.get_output_embeddings().weight is network.get_input_embeddings().weight
    expected = plain(network, lambda: torch.stack([token_losses(network, row).mean() for row in rows]).sum())
    assert_equal(sums_of(network, rows), expected)


def test_token_loss_counts_every_token_the_same(network: PreTrainedModel, rows: list[Encoded]) -> None:
    expected = plain(network, lambda: ROWS * torch.cat([token_losses(network, row) for row in rows]).mean())
    found = sums_of(network, rows, loss="token")
    assert_equal(found, expected)
    name = next(iter(found))
    assert (found[name] - sums_of(network, rows)[name]).norm() > 0.01 * found[name].norm()


@pytest.mark.parametrize("loss", ["sample", "token"])
def test_sums_are_blind_to_batches_order_and_padding(loss: str, network: PreTrainedModel, rows: list[Encoded]) -> None:
    one_by_one = sums_of(network, rows, loss=loss, batch_size=1)
    order = torch.randperm(ROWS, generator=torch.Generator().manual_seed(0)).tolist()
    shuffled = [rows[i] for i in order]
    for other in (
        sums_of(network, rows, loss=loss, batch_size=3),
        sums_of(network, rows, loss=loss, batch_size=8),
        sums_of(network, shuffled, loss=loss, batch_size=3),
    ):
        assert_equal(other, one_by_one)
    longer = collate([*rows, {"input_ids": [5] * 40, "labels": [IGNORE] * 39 + [5]}], PAD)
    padded = {key: value if key == "logits_to_keep" else value[:-1] for key, value in longer.items()}
    assert padded["input_ids"].shape == (ROWS, 40)
    assert_equal(gradient_sums(network, find_targets(network, "all-linear"), [padded], loss=loss), one_by_one)


@pytest.mark.parametrize(
    ("kind", "name"),
    [*((CalibrationSettings, name) for name in ("loss", "directions", "reduction", "dtype")), (FitSettings, "dtype")],
)
def test_a_setting_that_is_none_of_the_choices_is_refused(kind: Callable[..., Any], name: str) -> None:
    with pytest.raises(SettingsError, match=rf"^{name} is 'int8'\. Use \w+, "):
        kind(**{name: "int8"})


@pytest.mark.parametrize(
    ("kind", "name", "values"),
    [
        (CalibrationSettings, "samples", (0, 1.5, math.nan, math.inf)),
        (CalibrationSettings, "eta", (0, math.nan, math.inf)),
        (CalibrationSettings, "seed", (-1, 2**32)),
        (FitSettings, "seed", (-1, 2**32)),
        (FitSettings, "epochs", (0, math.nan, math.inf)),
        (FitSettings, "learning_rate", (0, -1, math.nan, math.inf, 1e39)),
        (FitSettings, "scaling", (0, math.nan)),
        (FitSettings, "warmup", (-3, 1, 100, math.nan)),
        (FitSettings, "weight_decay", (-1, math.nan)),
        (FitSettings, "max_grad_norm", (-1, math.nan, math.inf)),
    ],
)
def test_numbers_out_of_range_are_refused(kind: Callable[..., Any], name: str, values: tuple[float, ...]) -> None:
    for value in values:
        with pytest.raises(SettingsError, match=rf"^{name} is {re.escape(str(value))}"):
            kind(**{name: value})


# --- weights --------------------------------------------------------------------------------------------------------


def test_a_weight_multiplies_the_losses_of_a_task(network: PreTrainedModel, rows: list[Encoded]) -> None:
    mine, others = rows[:5], rows[5:]
    targets, settings = find_targets(network, "all-linear"), CalibrationSettings(batch_size=3)
    weighted = gradients_of_rows(network, targets, rows, PAD, settings, [2.5] * 5 + [1.0] * (ROWS - 5))
    first, second = sums_of(network, mine), sums_of(network, others)
    assert_equal(weighted, {name: 2.5 * first[name] + second[name] for name in first})


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


def test_a_task_is_called_as_in_the_mixture(base: BaseModel, sums: Path) -> None:
    """Two names for the same loaded data are two tasks, and neither loses its rows."""
    task = load_task("sums", sums)
    basis = calibrate(base, {"a": task, "b": task}, CalibrationSettings(rank=4, samples=4, capture=False))
    assert [(source["name"], source["rows"]) for source in basis.calibration["data"]] == [("a", 4), ("b", 4)]


def test_tasks_of_different_kinds_are_refused(base: BaseModel, sums: Path, parity: Path) -> None:
    with pytest.raises(DataError, match=r"the tasks mix .* \(a and b\)") as error:
        calibrate(base, {"a": sums, "b": parity})
    command = f"lorasb calibrate --data b={parity} --out basis_b"
    assert f'{command}, then [tasks.b] basis = "basis_b"' in str(error.value)
    numbered = TaskData("n", "memory", SEQ_CLS, {"train": [{"text": "x", "label": 1}]}, "0")
    with pytest.raises(DataError, match="names, of others numbers"):
        calibrate(base, {"a": parity, "n": numbered})


# --- gradient checkpointing -----------------------------------------------------------------------------------------


def saved_bytes(work: Callable[[], object]) -> int:
    """Bytes of the tensors that forward keeps for backward, each storage once; a checkpoint's own are not kept."""
    storages = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        work()
    return sum(storages.values())


def test_checkpointing_keeps_less_and_changes_nothing(network: PreTrainedModel, rows: list[Encoded]) -> None:
    assert_equal(sums_of(network, rows), sums_of(network, rows, gradient_checkpointing=False))
    less = saved_bytes(lambda: sums_of(network, rows, batch_size=ROWS))
    more = saved_bytes(lambda: sums_of(network, rows, gradient_checkpointing=False, batch_size=ROWS))
    assert less < 0.6 * more


def test_checkpointing_leaves_the_network_as_it_was(network: PreTrainedModel, rows: list[Encoded]) -> None:
    layer = network.model.layers[0]
    seen: list[bool | None] = []
    handle = layer.register_forward_pre_hook(lambda *_: seen.append(network.config.use_cache))
    targets = find_targets(network, "all-linear")
    good = collate(rows[:2], PAD)
    broken = {**good, "labels": good["labels"].repeat(2, 1)}  # fails after the forward pass
    for batch, outcome in ((good, nullcontext()), (broken, pytest.raises((ValueError, RuntimeError)))):
        with outcome:
            gradient_sums(network, targets, [batch], gradient_checkpointing=True)
        assert "forward" not in vars(layer)
        assert network.config.use_cache is True
        assert not network.training
        assert not any(p.requires_grad or p.grad is not None for p in network.parameters())
    handle.remove()
    assert set(seen) == {False}


def test_a_network_that_checkpoints_already_goes_on_doing_so(base: BaseModel, rows: list[Encoded]) -> None:
    network = base.load(dtype="float64")
    calls: list[object] = []
    network.model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(None))
    without = {"batch_size": ROWS, "gradient_checkpointing": False}
    expected = sums_of(network, rows, **without)
    assert len(calls) == 1
    network.gradient_checkpointing_enable()
    assert_equal(sums_of(network, rows, **without), expected)
    assert len(calls) == 3  # once forward, once more in backward
    assert network.is_gradient_checkpointing


def test_a_model_that_cannot_checkpoint_does_without(
    network: PreTrainedModel, rows: list[Encoded], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[object] = []
    handle = network.model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(None))
    monkeypatch.setattr(type(network), "supports_gradient_checkpointing", False)
    sums_of(network, rows, batch_size=ROWS)
    handle.remove()
    assert len(calls) == 1  # forward alone


# --- odd models -----------------------------------------------------------------------------------------------------


def test_oracle_23_conv1d_gradients_are_turned(rows: list[Encoded], tmp_path: Path) -> None:
    network = BaseModel.resolve(make_gpt2(tmp_path / "gpt2")).load(dtype="float64")
    expected = plain(network, lambda: torch.stack([token_losses(network, row).mean() for row in rows]).sum())
    found = sums_of(network, rows)
    assert_equal(found, {name: gradient.T for name, gradient in expected.items()})
    assert found["transformer.h.0.attn.c_attn"].shape == (96, 32)  # (out, in)


def test_oracle_23_biases_and_the_head_are_left_alone(bert: Path, parity: Path) -> None:
    base = BaseModel.resolve(bert)
    network = base.load(SEQ_CLS, num_labels=2)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    basis = calibrate(base, {"parity": parity}, CalibrationSettings(rank=4, samples=8), network=network)
    assert len(basis.modules) == 13  # six in each layer and the pooler, not the head
    assert not any("classifier" in name for name in basis.modules)
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())


def test_drawing_a_head_leaves_every_other_generator_alone(bert: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a machine with several GPUs torch would save the generator of each, and warn of it at every load."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "manual_seed_all", Mock(side_effect=AssertionError))
    before = torch.get_rng_state()
    BaseModel.resolve(bert).load(SEQ_CLS, num_labels=2)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_pooler_that_no_file_keeps_is_refused(tmp_path: Path) -> None:
    base = make_bert(tmp_path / "base", kind=BertForMaskedLM)
    with pytest.raises(BaseModelError, match=r"lacks bert\.pooler\.dense\.bias .*draw one for good"):
        BaseModel.resolve(base).load(SEQ_CLS, num_labels=2)
    AutoModel.from_pretrained(base).save_pretrained(base)  # as the error says
    one, two = (BaseModel.resolve(base).load(SEQ_CLS, num_labels=2, seed=seed) for seed in (0, 1))
    assert torch.equal(one.bert.pooler.dense.weight, two.bert.pooler.dense.weight)


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
        assert found["modules"] == {name: rounded(ratios) for name, ratios in measured["modules"].items()}
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


def test_a_module_that_a_task_does_not_use_has_no_ratio() -> None:
    ratios, eye = CaptureRatios(), torch.eye(4)
    ratios.add("used", torch.ones(4, 4), basis=(eye[:, :2], eye[:2]))
    ratios.add("unused", torch.zeros(4, 4), basis=(eye[:, :2], eye[:2]))
    assert ratios.modules == {"used": {"basis": 0.5, "random": 0.5}}
    assert ratios.overall() == {"basis": 0.5, "random": 0.5}


# --- on the command line --------------------------------------------------------------------------------------------


def lorasb(*words: str) -> str:
    done = CliRunner().invoke(app, list(words))
    assert done.exit_code == 0, done.output
    return done.stdout


def test_calibrate_and_inspect(llama: Path, sums: Path, products: Path, tmp_path: Path) -> None:
    folder = str(tmp_path / "basis")
    words = ["calibrate", "--model", str(llama), "--data", f"a={sums}", "--data", f"b={products}", "--out", folder]
    options = ["--rank", "4", "--samples", "8", "--loss", "token", "--weight", "b=2", "--no-gradient-checkpointing"]
    found = json.loads(lorasb(*words, *options, "--json"))
    calibration = Basis.load(folder).calibration
    assert [source["weight"] for source in calibration["data"]] == [1.0, 2.0]
    assert (calibration["loss"], calibration["gradient_checkpointing"]) == ("token", False)
    assert found["capture"]["tasks"]["a"] == overview(calibration["capture"]["tasks"]["a"])

    text = lorasb(*words, *options, "--overwrite")
    assert [line.split()[0] for line in text.splitlines()[-4:]] == ["task", "a", "b", "all"]
    assert "%" in text
    text = lorasb(*words, *options, "--overwrite", "--no-capture")
    assert [line.split()[0] for line in text.splitlines()[-2:]] == ["task", "all"]

    shown = inspect_folder(folder)["recorded_capture"]
    assert shown["basis"] == calibration["capture"]["basis"]
    assert set(shown["by_module"]["basis"]) == {"min", "mean", "max"}
    measured = inspect_folder(folder, data=str(sums))["capture"]
    assert measured["by_module"]["own"]["min"] <= measured["own"] <= measured["by_module"]["own"]["max"]
    assert "by module" in lorasb("inspect", folder, "--data", str(sums))


def test_wrong_weights_on_the_command_line() -> None:
    twice = ["calibrate", "--model", "m", "--data", "a=d", "--data", "a=e"]
    assert "'a' is given twice" in CliRunner().invoke(app, twice).output
    for wrong in ("a", "a=", "a=heavy"):
        done = CliRunner().invoke(app, ["calibrate", "--model", "m", "--data", "a=d", "--weight", wrong])
        assert done.exit_code == 2


@pytest.mark.parametrize("directions", ["random", "block"])
@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_a_basis_drawn_at_random_needs_no_data(
    kind: str, directions: str, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, folder = request.getfixturevalue(kind), tmp_path / "basis"
    text = lorasb("calibrate", "--model", str(base), "--directions", directions, "--rank", "4", "--out", str(folder))
    assert text == f"Basis of rank 4 for {14 if kind == 'llama' else 13} modules from random numbers: {folder}\n"
    basis = Basis.load(folder)
    for module in basis.modules.values():
        for factor in (module.B, module.A.T):
            assert torch.allclose(factor.T @ factor, torch.eye(4), atol=1e-6)
        assert not module.S.any()
        assert (module.block is not None) == (directions == "block")
    settings = CalibrationSettings(rank=4, directions=directions)
    network = BaseModel.resolve(base).load("CAUSAL_LM" if kind == "llama" else "SEQ_CLS")
    if directions == "block":
        monkeypatch.setattr(BaseModel, "load", None)  # it needs no weights either
    assert basis.sha256 == calibrate(str(base), {}, settings).sha256
    assert basis.sha256 == calibrate(str(base), {}, settings, network=network).sha256
    assert inspect_folder(folder)["directions"] == directions
    card = (folder / "README.md").read_text()
    assert f"| directions | {directions} |" in card
    assert f"AutoModelFor{'CausalLM' if kind == 'llama' else 'SequenceClassification'}.from_pretrained(" in card
    with pytest.raises(SettingsError, match="rank 40 exceeds module"):
        calibrate(str(base), {}, CalibrationSettings(rank=40, directions=directions))


@pytest.mark.parametrize(("source", "directions"), [("shared", "random"), ("own", "random"), ("own", "block")])
def test_fit_in_a_basis_drawn_at_random_asks_for_no_gradient(
    source: str, directions: str, llama: Path, sums: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It starts at the base model, with three times the rate, nine times at a rank of 4."""
    settings = CalibrationSettings(rank=4, directions=directions)
    monkeypatch.setattr("lorasb_export.training.run_basis.capture", None)
    made = settings if source == "own" else calibrate(str(llama), {}, settings)
    adapter = fit(str(llama), made, sums, tmp_path / "a", FitSettings(max_steps=2))
    assert adapter.training["settings"]["learning_rate"] == 8.1e-2
    assert (adapter.training["capture"], adapter.training["energy"]) == (None, {})
    assert any(R.any() for R in adapter.R.values())
    assert not any(R.any() for R in Adapter.start(adapter.load_basis()).R.values())
    assert "The basis holds" not in (tmp_path / "a" / "README.md").read_text()


def test_random_bases_of_two_models_differ(llama: Path, tmp_path: Path) -> None:
    """Of one shape: a model and its tuned twin. By its basis an adapter is known to fit others."""
    shutil.copytree(llama, tmp_path / "twin")
    weights = load_file(llama / "model.safetensors")
    save_file(
        {name: 1.01 * w for name, w in weights.items()}, tmp_path / "twin" / "model.safetensors", {"format": "pt"}
    )
    settings = CalibrationSettings(rank=4, directions="random")
    one, two = (calibrate(str(base), {}, settings) for base in (llama, tmp_path / "twin"))
    assert one.sha256 != two.sha256


def test_a_single_class_is_nothing_to_learn(bert: Path, tmp_path: Path) -> None:
    rows = [{"text": "a", "label": "yes"}, {"text": "b", "label": "yes"}]
    write_splits(tmp_path / "data", {"train": rows})
    task = load_task("t", tmp_path / "data")  # to score a classifier by such rows is another matter
    random = calibrate(str(bert), {}, CalibrationSettings(rank=4, directions="random"))
    with pytest.raises(DataError, match="every training row has the label 'yes'"):
        calibrate(str(bert), {"t": task}, CalibrationSettings(rank=4))
    with pytest.raises(DataError, match="every training row has the label 'yes'"):
        fit(str(bert), random, task, tmp_path / "a", FitSettings(max_steps=1))
