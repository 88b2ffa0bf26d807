"""What `fit --dry-run` foresees is what `fit` does."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from lorasb_export.base.model import BaseModel
from lorasb_export.errors import TrainingError
from lorasb_export.training.trainer import RTrainer
from tests.conftest import lorasb
from tests.tiny import make_bert, make_gpt2


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
    assert (code, list(actions(tasks).values())) == (1, ["refuse", "refuse", "refuse", "wait"])
    assert tasks["d"]["why"] == "the run ends before, by what refuses a, b, c"
    assert lorasb("fit", "--dry-run").stdout.splitlines()[-2:] == [
        "4 tasks: 3 to refuse, 1 to wait",
        "Nothing would be trained.",
    ]
    assert (lorasb("fit").exit_code, sorted(path.name for path in Path("adapters").glob("[a-d]"))) == (1, ["a", "b"])
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


_TOO_HIGH = ("rank = 4", "rank = 1000"), "rank 1000 exceeds module"
_MISTYPED = ("rank = 4", 'rank = 4\ntargets = "down_prj"'), "down_prj"
_MIXED = ("[tasks.d]\n", '[tasks.d]\ncolumns = {text = "prompt", label = "completion"}\n'), "the tasks mix"


@pytest.mark.parametrize(
    ("change", "told", "directions"),
    [(*case, "gradient") for case in (_TOO_HIGH, _MISTYPED, _MIXED)] + [(*c, "random") for c in (_TOO_HIGH, _MISTYPED)],
)
def test_a_basis_that_cannot_be_made(project: Path, change: tuple[str, str], told: str, directions: str) -> None:
    """Also at a rate that is given: without one the targets are looked at for their default."""
    file = project / "lorasb.toml"
    text = file.read_text().replace(*change).replace("[basis]\n", f'[basis]\ndirections = "{directions}"\n')
    file.write_text(text)
    for more in ((), ("--lr", "0.01")):
        foretold, done = lorasb("fit", "--dry-run", *more), lorasb("fit", *more)
        assert told in foretold.stderr
        assert foretold.exit_code == done.exit_code == 1
        assert foretold.stderr.splitlines()[-1] == done.stderr.splitlines()[-1]
        assert not (project / "adapters").exists()


def test_bad_rows_end_all(project: Path) -> None:
    Path("data/b/train.jsonl").write_text("{")
    code, tasks = foreseen("--basis", "own")
    assert (code, list(actions(tasks).values())) == (1, ["wait", "refuse", "wait", "wait"])
    assert "data/b/train.jsonl" in tasks["b"]["why"]
    done = lorasb("fit", "--basis", "own", "--resume")
    assert (done.exit_code, "data/b/train.jsonl" in done.stderr, Path("adapters").exists()) == (1, True, False)
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


def test_what_ends_the_run_in_its_turn(project: Path) -> None:
    """A stranger's file in the working folder of b: a is trained before, c and d are not reached."""
    Path("adapters/.b.run").mkdir(parents=True)
    Path("adapters/.b.run/notes.txt").touch()
    code, tasks = foreseen()
    assert (code, list(actions(tasks).values())) == (1, ["train", "refuse", "wait", "wait"])
    assert (lorasb("fit").exit_code, [path.name for path in Path("adapters").glob("[a-d]")]) == (1, ["a"])


def test_a_run_that_ends_has_trained_first_what_is_of_one_network(project: Path, tmp_path: Path) -> None:
    """Classifiers of 2, 3, 2 and 3 labels: the second ends the run after the third, and the fourth waits."""
    base = make_bert(tmp_path / "encoder")
    for name, count in zip("abcd", (2, 3, 2, 3), strict=True):
        rows = "".join(json.dumps({"text": label, "label": label}) + "\n" for label in "xyz"[:count])
        for split in ("train", "valid", "test"):
            Path(f"data/{name}/{split}.jsonl").write_text(rows)
    of_each = "".join(f'[tasks.{name}]\ndata = "data/{name}"\n' for name in "abcd")
    Path("lorasb.toml").write_text(f'model = "{base}"\n[basis]\nrank = 4\n[fit]\nmax_steps = 2\n{of_each}')
    assert lorasb("calibrate").exit_code == 0
    Path("adapters/.b.run").mkdir(parents=True)
    Path("adapters/.b.run/notes.txt").touch()
    code, tasks = foreseen("--resume", "--overwrite")
    assert (code, actions(tasks)) == (1, {"a": "train", "b": "refuse", "c": "train", "d": "wait"})
    assert list(tasks) == list("abcd")
    done = lorasb("fit", "--resume", "--overwrite")
    assert (done.exit_code, sorted(path.name for path in Path("adapters").glob("[a-d]"))) == (1, ["a", "c"])


def test_what_depends_on_a_basis_that_is_not_made_yet(project: Path) -> None:
    """a has a basis of its own: with the shared one, which fit makes first, it is refused."""
    rows = Path("data/b/train.jsonl")
    rows.write_text("".join(rows.read_text().splitlines(keepends=True)[:8]))  # of the same rows it would be the same
    assert lorasb("fit", "a", "--basis", "own").exit_code == 0
    code, tasks = foreseen("a", "b", "--resume")
    assert (code, list(actions(tasks).values())) == (1, ["refuse", "train"])
    assert "Make it with lorasb calibrate" in tasks["a"]["why"]
    assert lorasb("calibrate").exit_code == 0
    assert "another basis" in foreseen("a", "b", "--resume")[1]["a"]["why"]
    done = json.loads(lorasb("fit", "a", "b", "--resume", "--json").stdout)
    assert (list(done["adapters"]), list(done["failed"])) == (["b"], ["a"])


def test_what_the_options_or_the_base_refuse(project: Path, sums: Path, tmp_path: Path) -> None:
    for words in (["a", "b", "--out", "x"], ["a", "b", "--data", str(sums)]):
        done = lorasb("fit", *words, "--dry-run")
        assert (done.exit_code, "--data and --out take one task" in done.stderr) == (1, True)
    assert lorasb("fit", "a").exit_code == 0
    done = lorasb("fit", "a", "b", "--start-from", "a", "--overwrite", "--dry-run")
    assert (done.exit_code, "the others are to start from it" in done.stderr) == (1, True)
    encoder, gpt2 = make_bert(tmp_path / "encoder"), make_gpt2(tmp_path / "gpt2")
    for words, why in (
        (["--model", str(encoder)], "does not generate text"),
        (["--model", str(gpt2), "--max-length", "5000"], "max_length is 5000, the base's positions end at"),
    ):
        words = ["b", *words, "--basis", "own"]
        code, tasks = foreseen(*words)
        assert (code, why in tasks["b"]["why"], why in lorasb("fit", *words).stderr) == (1, True, True)
    assert lorasb("fit", "b", "--dry-run").stdout == "b  train\n1 task: 1 to train\n"


def test_a_damaged_adapter_is_trained_anew_with_overwrite_alone(project: Path, log: pytest.LogCaptureFixture) -> None:
    assert lorasb("fit", "a").exit_code == 0
    Path("adapters/a/adapter.safetensors").write_bytes(b"damaged")
    code, tasks = foreseen("a", "--resume")
    assert (code, tasks["a"]["action"]) == (1, "refuse")
    code, tasks = foreseen("a", "--resume", "--overwrite")
    assert (code, tasks["a"]["action"], "damaged" in tasks["a"]["why"]) == (0, "train", True)
    assert lorasb("fit", "a", "--resume", "--overwrite").exit_code == 0
    (told,) = [message for message in log.messages if "it is replaced" in message]
    assert told.startswith(f"{project / 'adapters/a'} is damaged (not a safetensors file")
    assert foreseen("a", "--resume")[1]["a"]["action"] == "keep"
