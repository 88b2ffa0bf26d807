"""A run that is stopped at any moment is resumed bit for bit, and only as the run it was."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import sys
import time
from dataclasses import replace
from multiprocessing.context import ForkProcess
from pathlib import Path
from typing import Any

import pytest
import torch
from lorasb_cli.main import app, main
from safetensors.torch import load_file
from typer.testing import CliRunner

from lorasb_export import Adapter, Basis, calibrate, fit
from lorasb_export.data.task import TaskData, task_of
from lorasb_export.errors import ArtifactError, OutputError, TrainingError, UnreadableError
from lorasb_export.files.storage import read_json, write_json
from lorasb_export.settings import CalibrationSettings, FitSettings
from lorasb_export.training.trainer import RTrainer
from tests import training
from tests.artifacts import forbid
from tests.forks import FORK, exit_code_of_a_fork
from tests.rows import GOOD

basis = training.basis
SETTINGS = FitSettings(max_steps=12, checkpoint_every=4, learning_rate=1e-2)


def begun(words: list[str], folder: Path, log: Path) -> ForkProcess:
    """`lorasb WORDS` in `folder`, running in a fork; what it says on stderr is in `log`."""

    def become() -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
        os.chdir(folder)
        sys.argv, sys.stderr = ["lorasb", *words], log.open("w", buffering=1)
        main()

    child = FORK.Process(target=become)
    child.start()
    return child


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_oracle_22_resume_is_bit_equal_to_an_undisturbed_run(
    optimizer: str, llama: Path, sums: Path, basis: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed by SIGKILL after a checkpoint, resumed in another process; the same R, bit for bit."""
    folder, undisturbed = basis.parent / f"resume-{optimizer}", replace(SETTINGS, optimizer=optimizer)
    inputs = (str(llama), basis, sums, folder / "a", undisturbed)
    step = RTrainer.training_step

    def killing(self: RTrainer, *arguments: Any, **options: Any) -> Any:
        if self.state.global_step == 10:
            os.kill(os.getpid(), signal.SIGKILL)
        return step(self, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(RTrainer, "training_step", killing)
        assert exit_code_of_a_fork(lambda: fit(*inputs)) == -signal.SIGKILL
    assert not (folder / "a").exists()
    with pytest.raises(OutputError, match="an interrupted run is there"):
        fit(*inputs)
    assert exit_code_of_a_fork(lambda: fit(*inputs, resume=True)) == 0
    fit(str(llama), basis, sums, folder / "undisturbed", undisturbed)
    one, two = (load_file(folder / name / "adapter.safetensors") for name in ("a", "undisturbed"))
    assert all(torch.equal(one[name], two[name]) for name in two)
    one, two = ((folder / name / "training_log.jsonl").read_text() for name in ("a", "undisturbed"))
    assert one == two


def interrupt(
    llama: Path,
    basis: Path | CalibrationSettings,
    sums: Path | TaskData,
    out: Path,
    settings: FitSettings,
    *,
    overwrite: bool = False,
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


def test_a_kill_while_a_run_is_removed_leaves_nothing_that_looks_whole(
    llama: Path, sums: Path, basis: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At its end, before another, and where one of other settings is dropped."""
    out, settings = tmp_path / "a", replace(SETTINGS, max_steps=2)

    def cut_short(path: Path, **_: object) -> None:
        next(path.rglob("adapter-0.safetensors")).unlink()
        raise KeyboardInterrupt

    def killed(settings: FitSettings, **options: bool) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(shutil, "rmtree", cut_short)
            with pytest.raises(KeyboardInterrupt):
                fit(str(llama), basis, sums, out, settings, **options)

    killed(settings)
    made = Adapter.load(out).sha256
    assert fit(str(llama), basis, sums, out, settings, resume=True, overwrite=True).sha256 == made  # kept
    interrupt(llama, basis, sums, out, settings, overwrite=True)
    killed(settings, overwrite=True)
    assert not (tmp_path / ".a.run").exists()
    interrupt(llama, basis, sums, out, settings, overwrite=True)
    killed(replace(settings, seed=1), resume=True, overwrite=True)
    assert fit(str(llama), basis, sums, out, settings, resume=True, overwrite=True).sha256 == made


def test_a_run_of_other_settings_is_not_resumed(llama: Path, sums: Path, basis: Path) -> None:
    out = basis.parent / "other" / "a"
    interrupt(llama, basis, sums, out, SETTINGS)
    with pytest.raises(TrainingError, match="other settings"):
        fit(str(llama), basis, sums, out, FitSettings(max_steps=12, checkpoint_every=4), resume=True)
    fit(str(llama), basis, sums, out, SETTINGS, resume=True)
    assert out.exists()


def test_a_run_is_resumed_with_less_memory_and_other_habits(
    llama: Path, sums: Path, basis: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it learns is the same, so an advice of the error of a full memory can be taken."""
    out = basis.parent / "frugal" / "a"
    interrupt(llama, basis, sums, out, SETTINGS)
    with pytest.raises(TrainingError, match=r"other settings \(batch_size 8, not 4\), settings \(seed 0, not 1\)"):
        fit(str(llama), basis, sums, out, replace(SETTINGS, batch_size=4, seed=1), resume=True)
    save, saved = RTrainer._save_checkpoint, []

    def noting(self: RTrainer, *arguments: Any) -> None:
        saved.append(self.state.global_step)
        save(self, *arguments)

    monkeypatch.setattr(RTrainer, "_save_checkpoint", noting)
    frugal = replace(SETTINGS, gradient_checkpointing=True, checkpoint_every=3)
    resumed = fit(str(llama), basis, sums, out, frugal, resume=True)
    assert saved == [6, 9, 12]  # the run before saved every fourth
    whole = fit(str(llama), basis, sums, basis.parent / "frugal" / "b", SETTINGS)
    for name, R in whole.R.items():
        torch.testing.assert_close(resumed.R[name], R, rtol=1e-4, atol=1e-6)
    assert read_json(out / "lorasb.json")["settings"]["gradient_checkpointing"] is True
    assert fit(str(llama), basis, sums, out, SETTINGS, resume=True).sha256 == resumed.sha256  # kept


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


@pytest.mark.parametrize("change", [{"seed": 1}, {"learning_rate": (1e-3, 1e-2)}, {}])
def test_an_interrupted_run_of_other_settings_or_data_is_dropped_by_overwrite(
    change: dict[str, Any],
    llama: Path,
    sums: Path,
    products: Path,
    basis: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    out, settings = tmp_path / "a", replace(SETTINGS, max_steps=4, checkpoint_every=2)
    interrupt(llama, basis, sums, out, settings)
    settings, data = replace(settings, **change), sums if change else products
    with pytest.raises(TrainingError, match=r"had other .* start afresh with --overwrite"):
        fit(str(llama), basis, data, out, settings, resume=True)
    resumed = fit(str(llama), basis, data, out, settings, resume=True, overwrite=True)
    assert caplog.text.count("it is dropped, and training begins anew") == 1
    assert [path.name for path in tmp_path.iterdir() if path.name.endswith(".run")] == []
    fresh = fit(str(llama), basis, data, tmp_path / "fresh", settings)
    assert resumed.sha256 == fresh.sha256


def test_a_column_that_nobody_reads_makes_no_finished_adapter_another(llama: Path, basis: Path, tmp_path: Path) -> None:
    def of(at: int, answer: str = "2") -> TaskData:
        return task_of("a", {"train": [{"prompt": "1+1=", "completion": answer, "exported_at": at}]})

    inputs, settings = (str(llama), basis), FitSettings(max_steps=1)
    done = fit(*inputs, of(1), tmp_path / "a", settings)
    assert fit(*inputs, of(2), tmp_path / "a", settings, resume=True).sha256 == done.sha256
    with pytest.raises(TrainingError, match="other data"):
        fit(*inputs, of(1, "3"), tmp_path / "a", settings, resume=True)


def test_a_finished_adapter_of_other_settings_data_or_basis_is_not_kept(
    llama: Path, sums: Path, basis: Path, tmp_path: Path
) -> None:
    out, own = tmp_path / "a", CalibrationSettings(rank=4)
    settings = FitSettings(max_steps=2, learning_rate=(1e-3, 1e-2))
    done = fit(str(llama), basis, sums, out, settings)
    assert fit(str(llama), basis, sums, out, settings, resume=True).sha256 == done.sha256
    kept = done.training["settings"]["learning_rate"]
    one_rate = replace(settings, learning_rate=next(rate for rate in (1e-3, 1e-2) if rate != kept))
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
    rows = shutil.copytree(sums, tmp_path / "rows")
    (rows / "test.jsonl").write_text(GOOD)  # over which R does not depend
    assert fit(str(llama), basis, rows, out, settings, resume=True).sha256 == done.sha256
    (rows / "valid.jsonl").write_text(GOOD)
    with pytest.raises(TrainingError, match="trained otherwise: other data"):
        fit(str(llama), basis, rows, out, settings, resume=True)
    fit(str(llama), own, sums, out, settings, resume=True, overwrite=True)
    assert fit(str(llama), own, sums, out, settings, resume=True).rank == 4
    with pytest.raises(TrainingError, match="rank 4, not 2"):
        fit(str(llama), replace(own, rank=2), sums, out, settings, resume=True)


def test_the_verb_keeps_an_adapter_of_ones_own_loop(
    llama: Path, sums: Path, basis: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = Adapter.fresh(Basis.load(basis))
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


def test_a_checkpoint_is_on_the_disk_before_it_counts_as_complete(
    llama: Path, sums: Path, basis: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a power cut a run would else go on from half of one."""
    fsync, put, synced, lacking = os.fsync, Path.replace, set[tuple[int, int]](), list[list[str]]()

    def watched(handle: int) -> None:
        fsync(handle)
        found = os.fstat(handle)
        synced.add((found.st_ino, found.st_mtime_ns))

    def completed(path: Path, target: Path) -> Path:
        if Path(target).name == "complete.json":
            found = {file.name: file.stat() for file in path.parent.iterdir()}
            lacking.append([name for name, of in found.items() if (of.st_ino, of.st_mtime_ns) not in synced])
        return put(path, target)

    monkeypatch.setattr(os, "fsync", watched)
    monkeypatch.setattr(Path, "replace", completed)
    fit(str(llama), basis, sums, tmp_path / "a", replace(SETTINGS, max_steps=2))
    assert lacking
    assert not any(lacking), lacking


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
    monkeypatch.setattr("lorasb_export.training.job.discard", lambda *_: None)
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
    words = ["fit", "a", "--model", str(llama), "--basis", str(basis), "--data", str(sums), "--out", str(out)]
    words += ["--max-steps", "100000", "--checkpoint-every", str(every), "--evaluate-every", "20"]
    log = tmp_path / "log"
    child = begun(words, tmp_path, log)
    try:
        end = time.monotonic() + 120
        while not list(out.parent.glob(f".a.run/{sign}")):
            if child.exitcode is not None or time.monotonic() > end:
                pytest.fail(f"it has not come to train: {log.read_text()}")
            time.sleep(0.05)
        assert child.pid is not None
        os.kill(child.pid, number)
        child.join(60)
    finally:
        child.kill()
    messages = log.read_text()
    assert child.exitcode == code, messages
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


def test_a_damaged_record_of_the_training_is_named(llama: Path, sums: Path, basis: Path, tmp_path: Path) -> None:
    settings = replace(SETTINGS, max_steps=1)
    fit(str(llama), basis, sums, tmp_path / "a", settings)
    record = tmp_path / "a" / "lorasb.json"
    write_json(record, {key: value for key, value in read_json(record).items() if key != "data_sha256"})
    with pytest.raises(ArtifactError, match=r"the record of its training is damaged \(.*lorasb.json\)"):
        fit(str(llama), basis, sums, tmp_path / "a", settings, resume=True)


@pytest.mark.parametrize("settings_known", [True, False])
def test_a_damaged_adapter_is_replaced_by_overwrite(
    settings_known: bool, llama: Path, sums: Path, basis: Path, tmp_path: Path, log: pytest.LogCaptureFixture
) -> None:
    """Also one that would be kept, for it does not say how it was trained."""
    settings, out = replace(SETTINGS, max_steps=1), tmp_path / "a"
    inputs = (str(llama), basis, sums, out, settings)
    made = fit(*inputs)
    if not settings_known:
        (out / "lorasb.json").unlink()
    (out / "adapter.safetensors").write_bytes(b"damaged")
    with pytest.raises(ArtifactError):
        fit(*inputs, resume=True)
    (out / "adapter.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1")
    with pytest.raises(UnreadableError, match="git lfs pull"):  # what it points to may be sound
        fit(*inputs, resume=True, overwrite=True)
    (out / "adapter.safetensors").write_bytes(b"damaged")
    assert fit(*inputs, resume=True, overwrite=True).sha256 == made.sha256
    (told,) = [message for message in log.messages if "it is replaced" in message]
    assert str(out) in told
    assert Adapter.load(out).sha256 == made.sha256


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter.safetensors"])
def test_an_adapter_that_the_disk_refuses_is_not_replaced_as_damaged(
    name: str, llama: Path, sums: Path, basis: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = (str(llama), basis, sums, tmp_path / "a", replace(SETTINGS, max_steps=1))
    made = fit(*inputs)
    with monkeypatch.context() as patch:
        forbid(tmp_path / "a" / name, patch, errno.EIO)
        with pytest.raises(UnreadableError, match="cannot be read: Input/output error"):
            fit(*inputs, resume=True, overwrite=True)
    assert Adapter.load(tmp_path / "a").sha256 == made.sha256
