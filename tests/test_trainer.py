"""The loop: mixed batches of several tasks, evaluation, the best checkpoint, early stopping."""

from __future__ import annotations

import gc
import itertools
import json
import os
import signal
import weakref
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch._subclasses import FakeTensorMode

from lorasb_export import Adapter, Basis, calibrate, fit
from lorasb_export.base import BaseModel
from lorasb_export.data import TaskData, load_task, task_of
from lorasb_export.errors import BaseModelError, DataError, SettingsError, Terminated, TrainingError
from lorasb_export.settings import CalibrationSettings, FitSettings
from lorasb_export.training import job
from lorasb_export.training.fit import fit_together
from lorasb_export.training.history import History
from lorasb_export.training.task_run import TaskRun
from lorasb_export.training.trainer import RTrainer
from lorasb_export.training.validation import Validation

SETTINGS = FitSettings(epochs=2, batch_size=3, learning_rate=1e-2, dtype="float64", checkpoint_every=3)


@pytest.fixture
def counted_forwards(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    seen: Counter[str] = Counter()
    step = RTrainer.training_step

    def counting(self: RTrainer, model: object, inputs: dict, *rest: object) -> torch.Tensor:
        seen["steps"] += 1
        return step(self, model, inputs, *rest)

    monkeypatch.setattr(RTrainer, "training_step", counting)
    return seen


def equal(one: Adapter, two: Adapter, tolerance: float) -> bool:
    return all(torch.allclose(R.double(), two.R[name].double(), rtol=0, atol=tolerance) for name, R in one.R.items())


@pytest.mark.parametrize(("accumulate", "optimizer"), [(1, "adamw"), (2, "adamw"), (1, "muon")])
def test_tasks_together_end_as_each_alone(
    accumulate: int,
    optimizer: str,
    llama: Path,
    basis: Path,
    tasks: dict[str, TaskData],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Issue 3.8: other lengths of runs, other schedules, one clip each; the same R to 1e-6 in float64."""
    clip = torch.nn.utils.clip_grad_norm_

    def clipped(group: list[torch.nn.Parameter], limit: float) -> torch.Tensor:
        assert all(p.grad is not None for p in group)  # else torch's norm of nothing is on the CPU
        return clip(group, limit)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", clipped)
    settings = replace(SETTINGS, accumulate=accumulate, optimizer=optimizer)
    together = fit_together(llama, basis, tasks, tmp_path / "together", settings)
    for adapter, (name, task) in zip(together, tasks.items(), strict=True):
        alone = fit(str(llama), basis, task, tmp_path / name, settings)
        assert equal(adapter, alone, 1e-6)
        written = Adapter.load(tmp_path / "together" / name)
        assert written.training["together"] == ["minus", "plus"]
        for key in ("steps", "train_loss", "valid_loss", "best_step", "trainable_parameters"):
            assert written.training[key] == pytest.approx(alone.training[key], abs=1e-5), key
    start = Adapter.start(Basis.load(basis))
    assert not equal(together[0], start, 1e-3)
    assert not equal(together[0], together[1], 1e-3)
    assert not list((tmp_path / "together").glob(".*"))


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_stopped_run_together_is_resumed_bit_for_bit(
    optimizer: str,
    llama: Path,
    basis: Path,
    tasks: dict[str, TaskData],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings = replace(SETTINGS, optimizer=optimizer)

    class Stop(Exception):
        pass

    step = RTrainer.training_step

    def stopping(self: RTrainer, *arguments: object) -> torch.Tensor:
        if self.state.global_step == 7:
            raise Stop
        return step(self, *arguments)

    inputs = (str(llama), basis, list(tasks.values()))
    with monkeypatch.context() as patch:
        patch.setattr(RTrainer, "training_step", stopping)
        with pytest.raises(Stop):
            fit_together(*inputs, tmp_path / "a", settings)
    others = [replace(task, name=f"other-{name}") for name, task in tasks.items()]
    fit_together(*inputs[:2], others, tmp_path / "a", settings)  # meanwhile, in the same project
    backwards = fit_together(*inputs[:2], inputs[2][::-1], tmp_path / "a", settings, resume=True)
    resumed = backwards[::-1]  # in whatever order they are named
    undisturbed = fit_together(*inputs, tmp_path / "b", settings)
    assert all(equal(one, two, 0) for one, two in zip(resumed, undisturbed, strict=True))
    with monkeypatch.context() as patch:
        patch.setattr(RTrainer, "training_step", stopping)
        with pytest.raises(Stop):
            fit_together(*inputs, tmp_path / "c", settings)
    with pytest.raises(TrainingError, match=r"run together had other tasks .*together"):
        fit_together(*inputs[:2], [*inputs[2], *others], tmp_path / "c", settings, resume=True)
    again = fit_together(*inputs, tmp_path / "a", settings, resume=True)  # finished: read, not trained
    assert [adapter.sha256 for adapter in again] == [adapter.sha256 for adapter in undisturbed]


def test_killed_between_two_adapters_it_goes_on_beside_one_finished_before(
    llama: Path, basis: Path, tasks: dict[str, TaskData], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = task_of("first", {"train": list(tasks["plus"].rows("train"))[:6]})
    out = tmp_path / "out"
    fit(str(llama), basis, first, out / "first", SETTINGS)
    write = job.write_record

    def killed(folder: Path, run: TaskRun, *rest: Any) -> None:
        if run.task.name == "plus":
            raise KeyboardInterrupt
        write(folder, run, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(job, "write_record", killed)
        with pytest.raises(KeyboardInterrupt):
            fit_together(str(llama), basis, [first, *tasks.values()], out, SETTINGS, resume=True)
    assert (out / "minus").exists()
    fitted = fit_together(str(llama), basis, [first, *tasks.values()], out, SETTINGS, resume=True)
    undisturbed = fit_together(str(llama), basis, tasks, tmp_path / "undisturbed", SETTINGS)
    assert {adapter.name: adapter.sha256 for adapter in fitted[1:]} == {a.name: a.sha256 for a in undisturbed}


def test_no_task_is_nothing_to_train(llama: Path, basis: Path, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"no task to fit. Give at least one"):
        fit_together(str(llama), basis, [], tmp_path)


def test_classifiers_do_not_train_together(bert: Path, parity: Path, basis: Path, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="each has its own head"):
        fit_together(str(bert), basis, [load_task("a", parity), load_task("b", parity)], tmp_path)


def test_the_best_evaluated_R_is_kept(llama: Path, basis: Path, tasks: dict[str, TaskData], tmp_path: Path) -> None:
    """A rate that spoils the end: the R kept is that of the best evaluation, and its loss is the one reported."""
    settings = replace(
        SETTINGS, max_steps=12, evaluate_every=2, learning_rate=2.0, schedule="constant_with_warmup", warmup=0.5
    )
    best = fit(str(llama), basis, tasks["plus"], tmp_path / "best", settings)
    log = [json.loads(line) for line in (tmp_path / "best" / "training_log.jsonl").read_text().splitlines()]
    losses = {entry["step"]: entry["eval_loss"] for entry in log if "eval_loss" in entry}
    assert sorted(losses) == [2, 4, 6, 8, 10, 12]
    assert [entry["step"] for entry in log if "loss" in entry] == list(range(1, 13))  # where it is evaluated too
    assert best.training["best_step"] == min(losses, key=losses.__getitem__) < 12
    assert best.training["valid_loss"] == pytest.approx(min(losses.values()), abs=1e-6)
    last = fit(str(llama), basis, tasks["plus"], tmp_path / "last", replace(settings, keep="last"))
    assert last.training["valid_loss"] == pytest.approx(losses[12], abs=1e-6)
    assert not equal(best, last, 1e-3)


def test_a_resumed_run_that_comes_to_no_better_R_keeps_the_best_of_its_checkpoint(
    llama: Path, basis: Path, tasks: dict[str, TaskData], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed after a better evaluation that no checkpoint knows of; on a GPU the second way there may end elsewhere."""
    settings = replace(SETTINGS, max_steps=6, evaluate_every=2, checkpoint_every=3)
    inputs = (str(llama), basis, tasks["plus"])
    step, losses = RTrainer.training_step, itertools.count(1000.0)

    def stopping(self: RTrainer, *arguments: object) -> torch.Tensor:
        if self.state.global_step == 4:
            raise InterruptedError
        return step(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(RTrainer, "training_step", stopping)
        with pytest.raises(InterruptedError):
            fit(*inputs, tmp_path / "a", settings)
    monkeypatch.setattr(Validation, "run", lambda *_: {"loss": next(losses)})
    resumed = fit(*inputs, tmp_path / "a", settings, resume=True)
    assert resumed.training["best_step"] == 2
    assert equal(resumed, fit(*inputs, tmp_path / "b", settings), 0)


def test_patience_ends_the_run_early_and_a_finished_run_is_not_trained_again(
    llama: Path, basis: Path, tasks: dict[str, TaskData], tmp_path: Path, counted_forwards: Counter[str]
) -> None:
    settings = replace(
        SETTINGS, max_steps=40, evaluate_every=1, patience=2, learning_rate=2.0, schedule="constant_with_warmup"
    )
    adapter = fit(str(llama), basis, tasks["plus"], tmp_path / "a", settings)
    stopped = adapter.training["steps"]
    assert counted_forwards["steps"] == stopped == adapter.training["best_step"] + 2 < 40
    assert fit(str(llama), basis, tasks["plus"], tmp_path / "a", settings, resume=True).sha256 == adapter.sha256
    assert counted_forwards["steps"] == stopped


def test_with_patience_the_log_is_not_read_at_every_step(
    llama: Path, basis: Path, tasks: dict[str, TaskData], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    has_stopped, read = History.has_stopped, Counter[str]()

    def counting(self: History) -> bool:
        read["log"] += 1
        return has_stopped(self)

    monkeypatch.setattr(History, "has_stopped", counting)
    settings = replace(SETTINGS, max_steps=20, evaluate_every=10, patience=9)
    fit(str(llama), basis, tasks["plus"], tmp_path / "a", settings)
    assert read["log"] == 4  # as it begins, after each evaluation, at the end


def test_killed_after_an_early_stop_the_run_only_writes(
    llama: Path,
    basis: Path,
    tasks: dict[str, TaskData],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    counted_forwards: Counter[str],
) -> None:
    settings = replace(
        SETTINGS, max_steps=40, evaluate_every=1, patience=2, learning_rate=2.0, schedule="constant_with_warmup"
    )
    inputs = (str(llama), basis, tasks["plus"], tmp_path / "a", settings)
    with monkeypatch.context() as patch:
        patch.setattr("lorasb_export.training.job.write_record", lambda *_: (_ for _ in ()).throw(OSError("disk")))
        with pytest.raises(OSError, match="disk"):
            fit(*inputs)
    stopped = counted_forwards["steps"]
    adapter = fit(*inputs, resume=True)
    assert counted_forwards["steps"] == stopped == adapter.training["steps"]


@pytest.mark.parametrize("metric", ["loss", "exact_match"])
@pytest.mark.parametrize("which", ["first", "of-the-last-step", "that-ends-patience"])
def test_sigterm_in_a_validation_does_not_wait_for_its_end(
    which: str, metric: str, llama: Path, basis: Path, tasks: dict[str, TaskData], tmp_path: Path, monkeypatch: Any
) -> None:
    """It is made again when the run is resumed, which ends as the undisturbed one."""
    settings = replace(SETTINGS, max_steps=4, evaluate_every=2, metric=metric, checkpoint_every=100)
    if which == "that-ends-patience":
        settings = replace(settings, max_steps=40, patience=1, learning_rate=2.0, schedule="constant_with_warmup")
    whole = fit(str(llama), basis, tasks["plus"], tmp_path / "whole", settings)
    assert whole.training["steps"] < 40
    run, calls, last = Validation.run, [], whole.training["steps"] // 2

    def told(self: Validation, *arguments: Any) -> Any:
        calls.append(0)
        if len(calls) == (1 if which == "first" else last):
            os.kill(os.getpid(), signal.SIGTERM)
            assert run(self, *arguments) is None
            return None
        return run(self, *arguments)

    monkeypatch.setattr(Validation, "run", told)
    with pytest.raises(Terminated):
        fit(str(llama), basis, tasks["plus"], tmp_path / "a", settings)
    (marker,) = (tmp_path / ".a.run").glob("checkpoint-*/complete.json")
    assert not json.loads(marker.read_text())["finished"]
    resumed = fit(str(llama), basis, tasks["plus"], tmp_path / "a", settings, resume=True)
    assert equal(resumed, whole, 0)
    assert resumed.training["best_step"] == whole.training["best_step"]
    assert resumed.training["steps"] == whole.training["steps"]


@pytest.mark.parametrize(("asked", "value"), [("patience", 1), ("metric", "exact_match")])
def test_what_needs_valid_rows_is_refused_without(
    llama: Path, basis: Path, sums: Path, tmp_path: Path, asked: str, value: Any
) -> None:
    with pytest.raises(DataError, match=rf"no valid rows, so {value if asked == 'metric' else asked} .*leave {asked}"):
        fit(str(llama), basis, sums / "train.jsonl", tmp_path / "a", replace(SETTINGS, **{asked: value}))


def test_metrics_of_the_valid_split(
    llama: Path, bert: Path, basis: Path, tasks: dict[str, TaskData], parity: Path, tmp_path: Path
) -> None:
    settings = replace(SETTINGS, max_steps=4, metric="exact_match")
    answered = fit(str(llama), basis, tasks["plus"], tmp_path / "a", settings)
    assert set(answered.training["valid_metrics"]) == {"exact_match"}
    with pytest.raises(SettingsError, match=r"metric 'mcc' does not fit"):
        fit(str(llama), basis, tasks["plus"], tmp_path / "b", replace(settings, metric="mcc"))

    folder = tmp_path / "parity"
    folder.mkdir()
    rows = (parity / "train.jsonl").read_text()
    (folder / "train.jsonl").write_text(rows)
    (folder / "valid.jsonl").write_text(rows)
    own = CalibrationSettings(rank=8)
    classified = fit(str(bert), own, folder, tmp_path / "c", FitSettings(epochs=15, learning_rate=2e-2, metric="mcc"))
    assert set(classified.training["valid_metrics"]) == {"accuracy", "mcc"}
    assert classified.training["valid_metrics"]["accuracy"] > 0.9


def test_an_own_basis_is_calibrated_once_and_lies_in_the_adapter(
    llama: Path, tasks: dict[str, TaskData], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = CalibrationSettings(rank=4)
    inputs = (str(llama), own, tasks["plus"], tmp_path / "a", replace(SETTINGS, dtype="auto"))
    with monkeypatch.context() as patch:
        patch.setattr(RTrainer, "training_step", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            fit(*inputs)
        patch.setattr("lorasb_export.training.run_basis.calibrate", lambda *_, **__: pytest.fail("calibrated again"))
        with pytest.raises(KeyboardInterrupt):
            fit(*inputs, resume=True)
    other = fit(str(llama), CalibrationSettings(rank=2), *inputs[2:], resume=True)  # no checkpoint of the first yet
    assert other.rank == 2
    adapter = fit(*inputs, overwrite=True)
    assert (tmp_path / "a" / "basis.safetensors").is_file()
    assert adapter.basis_source is None
    assert adapter.training["capture"]["basis"] == adapter.training["capture"]["own"]


def test_forward_passes_of_one_step_train_the_R_of_one_batch(
    llama: Path, basis: Path, products: Path, tmp_path: Path
) -> None:
    """Of rows with few and with many labels: a mean of the passes' means would count those of short rows more."""
    settings = replace(SETTINGS, max_steps=4, optimizer="adamw")
    one, several = (
        fit(str(llama), basis, products, tmp_path / f"{size}", replace(settings, batch_size=size, accumulate=passes))
        for size, passes in ((8, 1), (4, 2))
    )
    assert equal(one, several, 1e-9)
    assert several.training["train_loss"] == pytest.approx(one.training["train_loss"], rel=1e-9)


def test_gradient_checkpointing_trains_the_same_R(
    llama: Path, basis: Path, tasks: dict[str, TaskData], tmp_path: Path
) -> None:
    plain = fit(str(llama), basis, tasks["plus"], tmp_path / "a", SETTINGS)
    recomputed = fit(str(llama), basis, tasks["plus"], tmp_path / "b", replace(SETTINGS, gradient_checkpointing=True))
    assert equal(plain, recomputed, 1e-9)


@pytest.mark.parametrize("kind", ["text", "together", "classes"])
def test_a_training_step_never_waits_for_the_device(
    llama: Path, bert: Path, sums: Path, parity: Path, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its tensors have no values here: whatever asks for one, `.item()`, `.tolist()`, a mask as an index, raises."""
    step = RTrainer.training_step

    def without_values(self: RTrainer, model: Any, *arguments: Any) -> None:
        with FakeTensorMode(allow_non_fake_inputs=True):
            step(self, model, *arguments)
            self._clip_grad_norm(model)
        raise EOFError("the step is over")

    monkeypatch.setattr(RTrainer, "training_step", without_values)
    base, data = (bert, parity) if kind == "classes" else (llama, sums)
    drawn = calibrate(str(base), {}, CalibrationSettings(rank=4, directions="random"))
    one, other = (load_task(name, data) for name in ("one", "other"))
    train: Any = partial(fit, str(base), drawn, one, tmp_path / "one")
    if kind == "together":
        train = partial(fit_together, str(base), drawn, [one, other], tmp_path)
    with pytest.raises(EOFError, match="the step is over"):
        train(FitSettings(max_steps=2, accumulate=2))


def test_the_base_of_a_finished_run_makes_room_for_the_next_one(
    llama: Path, basis: Path, tasks: dict[str, TaskData], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The trainer holds it in a cycle; on a device both might not fit. `meta` stands for one."""
    load, loaded = BaseModel.load, []

    def watched(self: BaseModel, *arguments: Any, **options: Any) -> Any:
        network = load(self, *arguments, **options)
        loaded.append(weakref.ref(network))
        return network

    monkeypatch.setattr(BaseModel, "load", watched)
    gc.disable()  # by itself it comes at some moment or other
    try:
        fit(str(llama), basis, tasks["plus"], tmp_path / "plus", replace(SETTINGS, max_steps=1))
        BaseModel.resolve(llama).load(device="meta")
    finally:
        gc.enable()
    assert loaded[0]() is None


def test_the_head_gets_the_last_positions_in_one_block_of_memory(llama: Path) -> None:
    """Of a strided slice torch makes a product for every row, on a CPU by copies of the weight."""
    network, seen = BaseModel.resolve(llama).load(), []
    head = network.get_output_embeddings()
    head.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].is_contiguous()))
    ids = torch.arange(18).reshape(3, 6)
    last = network(ids, logits_to_keep=2).logits
    assert seen == [True]
    assert torch.allclose(last, network(ids).logits[:, -2:], atol=1e-6)


def test_what_the_base_cannot_do_is_refused(llama: Path, bert: Path, sums: Path, parity: Path, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"dtype is 'bf16'.*bfloat16"):
        fit(str(llama), CalibrationSettings(rank=8), sums, tmp_path / "a", FitSettings(dtype="bf16"))
    for calibration, settings in (({"max_length": 600}, {}), ({}, {"max_length": 600})):
        with pytest.raises(SettingsError, match=r"max_length is 600, the base's positions end at 512\. Lower"):
            fit(str(bert), CalibrationSettings(rank=8, **calibration), parity, tmp_path / "a", FitSettings(**settings))


def test_checkpointing_that_the_base_lacks_is_refused(
    llama: Path, basis: Path, sums: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = BaseModel.resolve(llama).load(dtype="float64")
    monkeypatch.setattr(type(network), "supports_gradient_checkpointing", False)
    settings = replace(SETTINGS, gradient_checkpointing=True)
    with pytest.raises(SettingsError, match="LlamaForCausalLM has no gradient checkpointing"):
        fit(str(llama), basis, sums, tmp_path / "a", settings, network=network)


def test_a_base_with_peft_layers_is_refused(
    llama: Path, basis: Path, tasks: dict[str, TaskData], tmp_path: Path
) -> None:
    from peft import LoraConfig, get_peft_model

    network = BaseModel.resolve(llama).load(dtype="float64")
    get_peft_model(network, LoraConfig(r=2, target_modules=["q_proj"]))  # puts its layers into `network`
    with pytest.raises(BaseModelError, match=r"already carries PEFT layers.*q_proj.*Merge or unload them first"):
        fit(str(llama), basis, tasks["plus"], tmp_path / "a", SETTINGS, network=network)
    with pytest.raises(BaseModelError, match="already carries PEFT layers"):
        calibrate(str(llama), tasks, CalibrationSettings(rank=2), network=network)


@pytest.mark.parametrize(("optimizer", "state"), [("adamw", "exp_avg"), ("muon", "momentum")])
def test_a_checkpoint_holds_R_and_the_optimizer_and_no_pickle_of_ours(
    optimizer: str,
    state: str,
    llama: Path,
    basis: Path,
    tasks: dict[str, TaskData],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("lorasb_export.training.job.shutil.rmtree", lambda *_, **__: None)
    settings = replace(SETTINGS, max_steps=3, dtype="auto", optimizer=optimizer)
    fit(str(llama), basis, tasks["plus"], tmp_path / "a", settings)
    (checkpoint,) = (tmp_path / ".a.run").glob("checkpoint-*")
    assert sorted(path.name for path in checkpoint.iterdir()) == [
        "adapter-0.safetensors",
        "complete.json",
        "optimizer.pt",  # the last three are the Trainer's own, read with weights_only
        "rng_state.pth",
        "scheduler.pt",
        "trainer_state.json",
    ]
    moments = torch.load(checkpoint / "optimizer.pt", weights_only=True)["state"]
    R = load_file(checkpoint / "adapter-0.safetensors")
    assert sum(of[state].numel() for of in moments.values()) == sum(t.numel() for t in R.values())


def test_a_base_in_float16_gives_R_the_gradient_of_float32(
    llama: Path, basis: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a mean over so many labels float16 would hold little: each one's share is near its least number."""
    task = task_of("long", {"train": [{"text": "a sentence of so many words " * 18} for _ in range(32)]})
    found: list[torch.Tensor] = []

    def keep(self: RTrainer, model: object) -> torch.Tensor:
        found.append(torch.cat([p.grad.flatten() for p in self._parameters[0]]))
        return found[-1].norm()

    monkeypatch.setattr(RTrainer, "_clip_grad_norm", keep)
    for dtype in ("float32", "float16"):
        fit(llama, basis, task, tmp_path / dtype, FitSettings(max_steps=1, batch_size=32, dtype=dtype))
    expected, of_half = found
    assert (of_half - expected).norm() < 0.005 * expected.norm()
