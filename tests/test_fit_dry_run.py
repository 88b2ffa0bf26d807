"""What `fit --dry-run` foresees is what `fit` does."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from lorasb_export.base import BaseModel
from lorasb_export.errors import TrainingError
from lorasb_export.training.trainer import RTrainer
from tests.conftest import lorasb


@pytest.fixture
def project(llama: Path, sums: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The tasks a to d, each with data of its own; the working folder."""
    monkeypatch.chdir(tmp_path)
    for name in "abcd":
        shutil.copytree(sums, f"data/{name}")
    tasks = "".join(f'[tasks.{name}]\ndata = "data/{name}"\n' for name in "abcd")
    head = f'model = "{llama}"\n[basis]\nrank = 4\n[fit]\nmax_steps = 4\ncheckpoint_every = 2\n'
    Path("lorasb.toml").write_text(head + tasks)
    return tmp_path


def foreseen(*words: str) -> tuple[int, dict[str, Any]]:
    """Exit code and tasks, by a run that may neither load the base nor write anything."""
    before = {str(path): path.stat().st_mtime_ns for path in Path().rglob("*")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BaseModel, "load", lambda *_, **__: pytest.fail("loaded"))
        done = lorasb("fit", *words, "--dry-run", "--json")
        assert lorasb("fit", *words, "--dry-run").exit_code == done.exit_code
    assert before == {str(path): path.stat().st_mtime_ns for path in Path().rglob("*")}
    return done.exit_code, json.loads(done.stdout)["tasks"]


def actions(tasks: dict[str, Any]) -> dict[str, str]:
    return {name: found["action"] for name, found in tasks.items()}


def test_what_is_foreseen_is_done(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """a is finished, b has other rows now, c was interrupted after two steps, d is new."""
    code, tasks = foreseen()
    assert (code, set(actions(tasks).values())) == (0, {"train"})
    assert lorasb("fit", "a", "b").exit_code == 0
    with Path("data/b/train.jsonl").open("a") as file:
        file.write('{"prompt": "1+1=", "completion": "2"}\n')
    save = RTrainer._save_checkpoint

    def stopped(self: RTrainer, *arguments: Any) -> None:
        save(self, *arguments)
        raise TrainingError("stopped", fix="Go on")

    with monkeypatch.context() as patch:
        patch.setattr(RTrainer, "_save_checkpoint", stopped)
        assert lorasb("fit", "c").exit_code == 1

    code, tasks = foreseen()
    assert (code, list(actions(tasks).values())) == (1, ["refuse", "refuse", "refuse", "train"])
    assert ("the target exists" in tasks["a"]["why"], "an interrupted run is there" in tasks["c"]["why"]) == (
        True,
        True,
    )
    code, tasks = foreseen("--resume")
    assert (code, list(actions(tasks).values())) == (1, ["keep", "refuse", "resume", "train"])
    assert ("trained otherwise: other data" in tasks["b"]["why"], tasks["c"]["step"]) == (True, 2)
    code, tasks = foreseen("--resume", "--overwrite")
    assert (code, list(actions(tasks).values())) == (0, ["keep", "train", "resume", "train"])
    assert (tasks["b"]["why"], tasks["d"]["why"]) == ("other data", None)
    code, tasks = foreseen("--resume", "c", "--seed", "3")
    assert (code, "the interrupted run had other settings (seed" in tasks["c"]["why"]) == (1, True)
    code, tasks = foreseen("--overwrite")
    assert (code, set(actions(tasks).values())) == (0, {"train"})

    kept = Path("adapters/a/adapter.safetensors").stat().st_mtime_ns
    done = lorasb("fit", "--resume", "--json")
    assert (list(json.loads(done.stdout)["adapters"]), list(json.loads(done.stdout)["failed"])) == (
        ["a", "c", "d"],
        ["b"],
    )
    assert Path("adapters/a/adapter.safetensors").stat().st_mtime_ns == kept
    assert lorasb("fit", "b", "--overwrite").exit_code == 0
    code, tasks = foreseen("--resume")
    assert (code, set(actions(tasks).values())) == (0, {"keep"})
    lines = lorasb("fit", "--resume", "--dry-run").stdout.splitlines()
    assert (lines[0], lines[-1]) == ("a  keep", "4 tasks: 4 to keep")


def test_bad_rows_are_foreseen_beside_the_other_tasks(project: Path) -> None:
    Path("data/b/train.jsonl").write_text("{")
    code, tasks = foreseen("--basis", "own")
    assert (code, list(actions(tasks).values())) == (1, ["train", "refuse", "train", "train"])
    assert "data/b/train.jsonl" in tasks["b"]["why"]
    assert lorasb("fit", "--together", "--dry-run").exit_code == 2


def test_only_an_adapter_is_taken_as_kept(project: Path) -> None:
    """With --resume neither a basis in its place is, nor one whose card could not be kept where it is replaced."""
    assert lorasb("calibrate").exit_code == 0
    shutil.copytree("basis", "adapters/a")
    code, tasks = foreseen("a", "--resume")
    done = lorasb("fit", "a", "--resume")
    assert (code, done.exit_code, "of the kind 'basis'" in done.stderr) == (1, 1, True)
    assert "of the kind 'basis'" in tasks["a"]["why"]
    shutil.rmtree("adapters/a")
    assert lorasb("fit", "a").exit_code == 0
    Path("adapters/a/README.md").write_text("---\n{\n---\n")
    for words in (["--overwrite"], ["--overwrite", "--resume"]):
        done = lorasb("fit", "a", *words)
        assert (done.exit_code, foreseen("a", *words)[1]["a"]["why"] in done.stderr) == (1, True)
