"""The basis of a project: made once, as its file says, and not taken away from the adapters trained in it."""

from __future__ import annotations

import logging
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from threading import Event
from typing import Any

import pytest

from lorasb_export import Adapter, Basis, calibrate
from lorasb_export.base.model import BaseModel
from lorasb_export.calibration.calibrate import calibrated_once
from lorasb_export.files.lock import only_writer
from lorasb_export.files.storage import read_json, write_json
from lorasb_export.project.project import Project
from lorasb_export.settings import CalibrationSettings
from lorasb_export.training.trainer import RTrainer
from tests.artifacts import forbid
from tests.conftest import lorasb


@pytest.fixture
def project(llama: Path, sums: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project with a basis and the adapters a and b in it; the working folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lorasb.toml").write_text(f'model = "{llama}"\n[basis]\nrank = 4\n[tasks.a]\ndata = "{sums}"\n')
    calibrate(str(llama), {"a": sums}, CalibrationSettings(rank=4)).save("basis")
    for name in "ab":
        Adapter.fresh(Basis.load("basis")).save(f"adapters/{name}")
    return tmp_path


def test_a_basis_that_adapters_need_is_not_replaced(project: Path) -> None:
    old = Basis.load("basis").sha256
    for words in ((), ("--overwrite",)):
        done = lorasb("calibrate", "--rank", "2", *words)
        assert done.exit_code == 1
        assert "adapters were trained in this basis and are of no use without it: a, b" in done.stderr
        assert Basis.load("basis").sha256 == old
    done = lorasb("calibrate", "--rank", "2", "--out", "other")
    assert (done.exit_code, "fit will refuse" in done.stderr) == (0, False)
    shutil.rmtree("adapters/a")
    Adapter.load("adapters/b").save("adapters/b", overwrite=True, embed=True)  # it brings its own
    done = lorasb("calibrate", "--rank", "2", "--overwrite")
    assert done.exit_code == 0
    assert "fit will refuse this basis: rank 2, not 4, says [basis] in" in done.stderr
    assert Basis.load("basis").rank == 2


def test_a_basis_that_runs_go_on_in_is_not_replaced(project: Path) -> None:
    shutil.rmtree("adapters")
    for name in ("a", "together+0123"):
        checkpoint = project / "adapters" / f".{name}.run" / "rate-0.1" / "checkpoint-2"
        checkpoint.mkdir(parents=True)
        made = {"basis_sha256": Basis.load("basis").sha256, "data_sha256": [], "tasks": ["a"]}
        write_json(checkpoint / "complete.json", made)
        done = lorasb("calibrate", "--rank", "2", "--overwrite")
        assert (done.exit_code, "interrupted runs go on in it: a (" in done.stderr) == (1, True)
        write_json(checkpoint / "complete.json", {**made, "basis_sha256": "of another"})
    assert lorasb("calibrate", "--rank", "2", "--overwrite").exit_code == 0


def test_a_basis_is_not_replaced_that_what_cannot_be_looked_into_may_need(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.rmtree("adapters")
    old = Basis.load("basis").sha256
    for hidden in ("a", ".a.run"):
        checkpoint = project / "adapters" / hidden / "checkpoint-2"
        checkpoint.mkdir(parents=True)
        (checkpoint.parent / "adapter_config.json").touch()
        write_json(checkpoint / "complete.json", {"basis_sha256": old})
        with monkeypatch.context() as patch:
            forbid(project / "adapters" / hidden, patch)
            done = lorasb("calibrate", "--rank", "2", "--overwrite")
        assert (done.exit_code, "cannot be read: Permission denied" in done.stderr) == (1, True), done.stderr
        assert Basis.load("basis").sha256 == old
        shutil.rmtree("adapters")


@pytest.mark.parametrize("replaced", [True, False])
def test_a_basis_that_is_lost_in_training_goes_into_the_adapter(
    replaced: bool, project: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Before the first checkpoint nothing says that somebody needs it."""
    shutil.rmtree("adapters")
    old, step = Basis.load("basis").sha256, RTrainer.training_step

    def meanwhile(self: RTrainer, *arguments: Any) -> Any:
        shutil.rmtree("basis")
        if replaced:
            random = CalibrationSettings(rank=2, directions="random")
            calibrate(Project.load().require_model(), {}, random).save("basis")
        return step(self, *arguments)

    monkeypatch.setattr(RTrainer, "training_step", meanwhile)
    assert lorasb("fit", "a", "--max-steps", "1").exit_code == 0
    assert "basis is not there any more, or another basis: " in caplog.text
    adapter = Adapter.load("adapters/a")
    assert (adapter.basis_source, adapter.load_basis().sha256) == (None, old)


def test_a_second_calibrate_into_the_same_folder_leaves_the_first_alone(project: Path) -> None:
    with only_writer(project / "other"):
        done = lorasb("calibrate", "--out", "other", "--overwrite")
    assert (done.exit_code, "another process is writing this target" in done.stderr) == (1, True)
    assert not (project / "other").exists()


def test_a_changed_basis_section_is_not_passed_over(project: Path) -> None:
    file = project / "lorasb.toml"
    as_made = file.read_text()
    for changed, differing in (
        ("rank = 2", "rank 4, not 2"),
        ('rank = 4\ndirections = "random"', "directions gradient, not random"),
        ("rank = 4\nseed = 3", "seed 0, not 3"),
        ('rank = 4\ntargets = "q_proj"', "targets all-linear, not q_proj"),
    ):
        file.write_text(as_made.replace("rank = 4", changed))
        done = lorasb("fit", "--max-steps", "1", "--overwrite")
        assert (done.exit_code, f"does not match [basis] in lorasb.toml: {differing} (" in done.stderr) == (1, True), (
            done.stderr
        )
        assert (
            f"does not match [basis] in lorasb.toml: {differing} ("
            in lorasb("fit", "--basis", "basis", "--overwrite").stderr
        )
    file.write_text(as_made.replace("rank = 4", "rank = 4\nsamples = 8\nbatch_size = 2"))  # no other basis
    assert lorasb("fit", "--max-steps", "1", "--overwrite").exit_code == 0


@pytest.mark.parametrize(
    ("line", "differing"),
    [
        ('reduction = "raw"', "reduction sign, not raw"),
        ('loss = "token"', "loss sample, not token"),
        ("eta = 1e-5", "eta 3e-06, not 1e-05"),
        ("max_length = 64", "max_length 512, not 64"),
        ('dtype = "bfloat16"', "dtype auto, not bfloat16"),
    ],
)
def test_whatever_a_basis_depends_on_is_compared(line: str, differing: str, project: Path) -> None:
    file = project / "lorasb.toml"
    file.write_text(file.read_text().replace("rank = 4", f"rank = 4\n{line}"))
    done = lorasb("fit", "--max-steps", "1", "--overwrite")
    told = f"does not match [basis] in lorasb.toml: {differing} ("
    assert (done.exit_code, told in done.stderr) == (1, True), done.stderr


def test_the_weight_of_a_task_reaches_the_calibration(project: Path, sums: Path, products: Path) -> None:
    file, made = project / "lorasb.toml", {}
    of_a = file.read_text()
    for name, weight in (("plain", ""), ("one", "weight = 1\n"), ("heavy", "weight = 20\n")):
        file.write_text(f'{of_a}{weight}[tasks.b]\ndata = "{products}"\n')
        done = lorasb("calibrate", "--out", name)
        assert done.exit_code == 0, done.stderr
        made[name] = Basis.load(name)
    weights = {name: [task["weight"] for task in basis.calibration["data"]] for name, basis in made.items()}
    assert weights == {"plain": [1, 1], "one": [1, 1], "heavy": [20, 1]}
    assert made["one"].sha256 == made["plain"].sha256 != made["heavy"].sha256
    for folder in ("basis", "adapters"):
        shutil.rmtree(folder)
    assert lorasb("fit", "a", "--max-steps", "1").exit_code == 0  # which makes the basis
    assert Basis.load("basis").sha256 == made["heavy"].sha256


def test_an_empty_folder_is_no_basis(llama: Path, tmp_path: Path) -> None:
    (tmp_path / "basis").mkdir()
    made = calibrated_once(
        tmp_path / "basis", lambda: calibrate(str(llama), {}, CalibrationSettings(rank=4, directions="random"))
    )
    assert made.rank == 4


def test_who_comes_second_waits_for_the_basis(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And does not calibrate it too, to find at the end that it is there."""
    folder, settings = tmp_path / "basis", CalibrationSettings(rank=4, directions="random")
    begun, waited_for = Event(), Event()

    def slowly() -> Basis:
        begun.set()
        assert waited_for.wait(30)
        return calibrate(str(llama), {}, settings)

    def never() -> Basis:
        raise AssertionError("made twice")

    monkeypatch.setattr(logging.getLogger("lorasb_export.files.lock"), "warning", lambda *_: waited_for.set())
    with ThreadPoolExecutor() as threads:
        first = threads.submit(calibrated_once, folder, slowly)
        assert begun.wait(30)
        second = threads.submit(calibrated_once, folder, never)
        assert first.result().sha256 == second.result().sha256
    assert [path.name for path in tmp_path.iterdir()] == ["basis"]


def test_a_basis_that_another_node_has_made_is_taken(llama: Path, tmp_path: Path) -> None:
    """This one's NFS had not seen it yet."""
    settings = CalibrationSettings(rank=4, directions="random")

    def make() -> Basis:
        calibrate(str(llama), {}, settings).save(tmp_path / "basis")
        return calibrate(str(llama), {}, replace(settings, seed=1))

    made = calibrated_once(tmp_path / "basis", make)
    assert made.calibration["seed"] == 0


@pytest.mark.parametrize(("said", "dtype"), [("float32", "auto"), (None, "auto"), (None, "float16")])
def test_a_random_basis_is_made_from_the_shapes_of_the_weights_alone(
    said: str | None, dtype: str, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And in the dtype that they would be loaded in."""
    BaseModel.resolve(llama).load(dtype="bfloat16").save_pretrained(tmp_path)
    config = read_json(tmp_path / "config.json")
    write_json(tmp_path / "config.json", config | {"dtype": said})
    base, settings = BaseModel.resolve(tmp_path), CalibrationSettings(rank=4, directions="random", dtype=dtype)
    network = base.load(dtype=dtype)
    monkeypatch.delattr(BaseModel, "load")
    assert calibrate(base, {}, settings).sha256 == calibrate(base, {}, settings, network=network).sha256


def test_a_path_that_reads_like_the_hub_is_not_made_anew(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = project / "lorasb.toml"
    file.write_text(file.read_text().replace("rank = 4", 'rank = 4\npath = "me/basis-lorasb"'))
    done = lorasb("fit", "--max-steps", "1", "--overwrite")
    assert (done.exit_code, "path reads like a basis of the Hub ([basis])" in done.stderr) == (1, True)
    assert not (project / "me").exists()
    file.write_text(file.read_text().replace("me/basis", "./me/basis"))
    assert lorasb("fit", "--max-steps", "1", "--overwrite").exit_code == 0
    assert (project / "me/basis-lorasb/basis.safetensors").is_file()
