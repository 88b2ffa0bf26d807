"""Training: it learns, it resumes bit for bit, it is stopped at any moment and loses nothing."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lorasb_cli.main import app
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification
from typer.testing import CliRunner

from lorasb_export import Adapter, Basis, calibrate, fit, merge
from lorasb_export.base import BaseModel
from lorasb_export.choices import SEQ_CLS
from lorasb_export.data import load_task
from lorasb_export.errors import BaseModelError, OutputError, TrainingError
from lorasb_export.evaluation import evaluate
from lorasb_export.head import head_parameters
from lorasb_export.lock import only_writer
from lorasb_export.settings import CalibrationSettings, FitSettings
from lorasb_export.training.muon import Muon, groups_of
from lorasb_export.training.trainer import RTrainer

SETTINGS = FitSettings(max_steps=12, checkpoint_every=4, learning_rate=1e-2)


@pytest.fixture(scope="module")
def basis(llama: Path, sums: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("project") / "basis"
    calibrate(str(llama), {"sums": sums}, CalibrationSettings(rank=8)).save(folder)
    return folder


def test_it_learns_and_writes_the_whole_folder(llama: Path, sums: Path, basis: Path) -> None:
    out = basis.parent / "adapters" / "learns"
    adapter = fit(str(llama), basis, sums, out, FitSettings(epochs=12, learning_rate=1.5e-2))
    log = [json.loads(line) for line in (out / "training_log.jsonl").read_text().splitlines()]
    losses = [entry["loss"] for entry in log if "loss" in entry]
    assert losses[-1] < 0.75 * losses[0]
    assert sorted(path.name for path in out.iterdir()) == [
        "README.md",
        "adapter.safetensors",
        "adapter_config.json",
        "lorasb.json",
        "training.png",
        "training_log.jsonl",
    ]
    assert (out / "training.png").read_bytes().startswith(b"\x89PNG")
    loaded = Adapter.load(out)
    assert loaded.training == json.loads(json.dumps(adapter.training))
    assert loaded.load_basis().sha256 == Basis.load(basis).sha256
    assert not (out.parent / ".learns.run").exists()


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_oracle_22_resume_is_bit_equal_to_an_undisturbed_run(
    optimizer: str, llama: Path, sums: Path, basis: Path
) -> None:
    """Killed by SIGKILL after a checkpoint, resumed in another process; the same R, bit for bit."""
    folder, undisturbed = basis.parent / f"resume-{optimizer}", replace(SETTINGS, optimizer=optimizer)
    script = (
        "import sys; from lorasb_export import fit\n"
        "from lorasb_export.settings import FitSettings; from lorasb_export.training.trainer import RTrainer\n"
        "import os, signal, torch; torch.set_num_threads(1)\n"
        "step = RTrainer.training_step\n"
        "def killing(self, *args, **kwargs):\n"
        "    if self.state.global_step == 10 and not sys.argv[6:]: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return step(self, *args, **kwargs)\n"
        "RTrainer.training_step = killing\n"
        "settings = FitSettings(max_steps=12, checkpoint_every=4, learning_rate=1e-2, optimizer=sys.argv[5])\n"
        "fit(*sys.argv[1:5], settings, resume=bool(sys.argv[6:]))"
    )
    arguments = [sys.executable, "-c", script, str(llama), str(basis), str(sums), str(folder / "a"), optimizer]
    assert subprocess.run(arguments, capture_output=True).returncode == -signal.SIGKILL
    assert not (folder / "a").exists()
    with pytest.raises(OutputError, match="an interrupted run is there"):
        fit(str(llama), basis, sums, folder / "a", undisturbed)
    resumed = subprocess.run([*arguments, "resume"], capture_output=True, text=True)
    assert resumed.returncode == 0, resumed.stderr
    fit(str(llama), basis, sums, folder / "undisturbed", undisturbed)
    one, two = (load_file(folder / name / "adapter.safetensors") for name in ("a", "undisturbed"))
    assert all(torch.equal(one[name], two[name]) for name in two)
    one, two = ((folder / name / "training_log.jsonl").read_text() for name in ("a", "undisturbed"))
    assert one == two


def interrupt(
    llama: Path, basis: Path, sums: Path, out: Path, settings: FitSettings, *, overwrite: bool = False
) -> None:
    """Leave an interrupted run of `out` behind, stopped after its first checkpoint."""

    class Stop(Exception):
        pass

    def stop(self: object, *_: object) -> None:
        save(self, *_)
        raise Stop

    save, RTrainer._save_checkpoint = RTrainer._save_checkpoint, stop
    try:
        with pytest.raises(Stop):
            fit(str(llama), basis, sums, out, settings, overwrite=overwrite)
    finally:
        RTrainer._save_checkpoint = save


def test_a_run_of_other_settings_is_not_resumed(llama: Path, sums: Path, basis: Path) -> None:
    out = basis.parent / "other" / "a"
    interrupt(llama, basis, sums, out, SETTINGS)
    with pytest.raises(TrainingError, match="other settings"):
        fit(str(llama), basis, sums, out, FitSettings(max_steps=12, checkpoint_every=4), resume=True)
    fit(str(llama), basis, sums, out, SETTINGS, resume=True)
    assert out.exists()


def test_an_empty_folder_is_no_finished_adapter(llama: Path, sums: Path, basis: Path) -> None:
    out = basis.parent / "made-before"
    out.mkdir()
    assert fit(str(llama), basis, sums, out, SETTINGS, resume=True).sha256 == Adapter.load(out).sha256


def test_an_interrupted_replacement_goes_on_and_replaces(llama: Path, sums: Path, basis: Path) -> None:
    """`--overwrite --resume`: the adapter that is there is the old one, not the end of this run."""
    out = basis.parent / "replaced" / "a"
    old = fit(str(llama), basis, sums, out, FitSettings(max_steps=2))
    interrupt(llama, basis, sums, out, SETTINGS, overwrite=True)
    with pytest.raises(TrainingError, match=r"otherwise: .*max_steps 2, not 12 .* --overwrite --resume"):
        fit(str(llama), basis, sums, out, SETTINGS, resume=True)
    assert Adapter.load(out).sha256 == old.sha256
    fit(str(llama), basis, sums, out, SETTINGS, resume=True, overwrite=True)
    assert Adapter.load(out).training["steps"] == 12


def test_a_finished_adapter_of_other_settings_data_or_basis_is_not_kept(
    llama: Path, sums: Path, basis: Path, tmp_path: Path
) -> None:
    out, own = tmp_path / "a", CalibrationSettings(rank=4)
    settings = FitSettings(max_steps=2, learning_rate=(1e-3, 1e-2))
    done = fit(str(llama), basis, sums, out, settings)
    assert fit(str(llama), basis, sums, out, settings, resume=True).sha256 == done.sha256
    one_rate = replace(settings, learning_rate=done.training["settings"]["learning_rate"])
    calibrate(str(llama), {"sums": sums}, replace(own, seed=1)).save(tmp_path / "other")
    for inputs, differing in (
        ((basis, sums, replace(settings, max_steps=3)), "max_steps 2, not 3"),
        ((basis, sums, one_rate), "learning_rate"),
        ((basis, sums / "train.jsonl", one_rate), "other data"),
        ((tmp_path / "other", sums, settings), "another basis"),
        ((replace(own, rank=8), sums, settings), "another basis"),
    ):
        of_basis, data, changed = inputs
        with pytest.raises(TrainingError, match=f"trained otherwise: .*{differing}"):
            fit(str(llama), of_basis, data, out, changed, resume=True)
    assert Adapter.load(out).sha256 == done.sha256
    fit(str(llama), own, sums, out, settings, resume=True, overwrite=True)
    assert fit(str(llama), own, sums, out, settings, resume=True).rank == 4
    with pytest.raises(TrainingError, match="rank 4, not 2"):
        fit(str(llama), replace(own, rank=2), sums, out, settings, resume=True)


def test_the_verb_keeps_an_adapter_of_ones_own_loop(
    llama: Path, sums: Path, basis: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = Adapter.start(Basis.load(basis))
    adapter.training = {"steps": 500, "settings": {"max_length": 128}}  # what one's own loop likes to say
    adapter.save(tmp_path / "adapters" / "a")
    monkeypatch.chdir(tmp_path)
    words = ["fit", "a", "--model", str(llama), "--data", str(sums), "--basis", str(basis), "--resume"]
    done = CliRunner().invoke(app, words)
    assert (done.exit_code, "a: left as it is, for it does not say how" in done.stdout) == (0, True)


def test_an_incomplete_checkpoint_is_passed_over(llama: Path, sums: Path, basis: Path) -> None:
    out = basis.parent / "incomplete" / "a"
    interrupt(llama, basis, sums, out, SETTINGS)
    (checkpoint,) = (out.parent / ".a.run").glob("checkpoint-*")
    assert sum(path.stat().st_size for path in checkpoint.iterdir()) < 200_000  # no base weights
    (checkpoint / "complete.json").unlink()
    fit(str(llama), basis, sums, out, SETTINGS, resume=True)  # starts from the beginning
    assert Adapter.load(out).training["steps"] == 12


def test_the_newest_checkpoints_are_kept_whatever_the_clock_said(
    llama: Path, sums: Path, basis: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another machine's, where the run began, may be ahead. What a kill left half written is not counted."""
    out = basis.parent / "clocks" / "a"
    interrupt(llama, basis, sums, out, SETTINGS)
    run = out.parent / ".a.run"
    (run / "checkpoint-11").mkdir()
    for path in run.glob("checkpoint-*"):
        os.utime(path, (time.time() + 3600,) * 2)
    at_the_end = SimpleNamespace(rmtree=lambda *_, **__: None)
    monkeypatch.setattr("lorasb_export.training.job.shutil", at_the_end)
    fit(str(llama), basis, sums, out, SETTINGS, resume=True)
    assert sorted(path.name for path in run.glob("checkpoint-*")) == ["checkpoint-12", "checkpoint-8"]


@pytest.mark.parametrize(
    ("number", "code", "every", "sign"),
    [
        (signal.SIGINT, 130, 50, "checkpoint-*/complete.json"),
        (signal.SIGTERM, 143, 10**6, "best-*.safetensors"),  # none is due: only the signal makes one
    ],
)
def test_a_signal_in_the_middle_leaves_a_resumable_run(
    number: signal.Signals, code: int, every: int, sign: str, llama: Path, sums: Path, basis: Path, tmp_path: Path
) -> None:
    """After Ctrl-C there is the last checkpoint; SIGTERM saves one of the step at hand first."""
    out = basis.parent / f"interrupted-{code}" / "a"
    command = [sys.executable, "-m", "lorasb_cli", "fit", "a", "--model", str(llama), "--basis", str(basis)]
    command += ["--data", str(sums), "--out", str(out), "--max-steps", "100000"]
    command += ["--checkpoint-every", str(every), "--evaluate-every", "20"]
    child = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=tmp_path)
    end = time.monotonic() + 120
    while not list(out.parent.glob(f".a.run/{sign}")):
        if child.poll() is not None or time.monotonic() > end:
            child.kill()
            pytest.fail(f"it has not come to train: {child.communicate()[1]}")
        time.sleep(0.05)
    child.send_signal(number)
    _, messages = child.communicate(timeout=60)
    assert child.returncode == code, messages
    assert "Traceback" not in messages
    assert "--resume" in messages
    assert not out.exists()
    steps = [int(path.parent.name.split("-")[1]) for path in out.parent.glob(".a.run/checkpoint-*/complete.json")]
    if number == signal.SIGTERM:
        (step,) = steps
        assert step >= 20  # the one that the signal met
    else:
        assert steps
        assert all(step % every == 0 for step in steps)


@pytest.mark.parametrize("resume", [False, True])
def test_a_second_fit_into_the_same_folder_leaves_the_first_alone(
    llama: Path, sums: Path, basis: Path, tmp_path: Path, resume: bool
) -> None:
    running = tmp_path / ".a.run"
    running.mkdir()
    (running / "half a checkpoint").write_text("…")
    with only_writer(tmp_path / "a"), pytest.raises(OutputError, match="another process is writing this target"):
        fit(str(llama), basis, sums, tmp_path / "a", resume=resume, overwrite=True)
    assert (running / "half a checkpoint").exists()


def test_the_basis_is_not_overwritten(llama: Path, sums: Path, basis: Path) -> None:
    with pytest.raises(OutputError, match="the target holds what it is made from"):
        fit(str(llama), basis, sums, basis, SETTINGS, overwrite=True)
    assert Basis.load(basis)


def test_a_diverging_run_is_stopped_and_named(llama: Path, sums: Path, basis: Path) -> None:
    with pytest.raises(TrainingError, match=r"loss of a is not finite at step \d+, on training rows \d+"):
        fit(
            str(llama),
            basis,
            sums,
            basis.parent / "diverges" / "a",
            FitSettings(max_steps=40, learning_rate=1e30, max_grad_norm=1e30),
        )


def test_a_basis_of_another_base_is_refused(bert: Path, llama: Path, sums: Path, basis: Path, tmp_path: Path) -> None:
    with pytest.raises(BaseModelError, match="no weight for module"):
        fit(str(bert), basis, sums, tmp_path / "a", SETTINGS)
    assert list(tmp_path.iterdir()) == []


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


def test_a_base_that_classifies_otherwise_gets_another_head(bert: Path, parity: Path, tmp_path: Path) -> None:
    """As one does that was trained for another task; and whatever is made of the adapter has the new head."""
    base = tmp_path / "base"
    shutil.copytree(bert, base)
    AutoModelForSequenceClassification.from_pretrained(bert, num_labels=3).save_pretrained(base)
    adapter = fit(base, CalibrationSettings(rank=4), parity, tmp_path / "a", FitSettings(max_steps=2))
    assert adapter.head["classifier.weight"].shape[0] == 2
    merge(adapter, tmp_path / "merged", verify=True)
    assert AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged").config.num_labels == 2


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
