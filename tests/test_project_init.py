"""`lorasb init`: the project file that it writes, and the tasks that it finds."""

from __future__ import annotations

import json
import re
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from lorasb_cli.main import app
from typer.testing import CliRunner

from lorasb_export.adapter import Adapter
from lorasb_export.data.task import load_task
from lorasb_export.errors import OutputError, SettingsError
from lorasb_export.project import init as project_init
from lorasb_export.project.init import write_project
from lorasb_export.project.project import Project


def test_what_init_writes_loads(tmp_path: Path) -> None:
    path = write_project(tmp_path / "lorasb.toml", 'a "quoted" base', {"dates": "data/dates"}, fit={"epochs": 1})
    project = Project.load(path)
    assert project.model == 'a "quoted" base'
    assert project.tasks["dates"].data == "data/dates"
    assert (project.calibration, project.fit) == ({"rank": 128, "targets": "mlp-output"}, {"epochs": 1})
    with pytest.raises(OutputError, match="the project file exists"):
        write_project(path, "x", {"a": "b"})
    with pytest.raises(SettingsError, match=r"'\.\./evil' cannot be"):
        write_project(tmp_path / "other.toml", "x", {"../evil": "b"})


def test_init_puts_r_on_all_linear_layers_of_what_classifies(tmp_path: Path) -> None:
    asked = {"prompt": "a", "completion": "b", "label": 1}  # a column that no row of this kind needs
    for name, row in (("text", asked), ("classes", {"text": "a", "label": "b"})):
        (tmp_path / name).mkdir()
        (tmp_path / name / "train.jsonl").write_text(f"\n{json.dumps(row)}", encoding="utf-8-sig")  # as data is read
    (tmp_path / "broken").write_text("{")
    (tmp_path / "number").write_text("5")
    found = {
        data: Project.load(write_project(tmp_path / "lorasb.toml", "x", {"a": data}, overwrite=True)).calibration
        for data in ("text", "classes", "classes/train.jsonl", "broken", "number", "me/of-the-hub")
    }
    of_text, of_labels = {"rank": 128, "targets": "mlp-output"}, {"rank": 64, "targets": "all-linear"}
    assert list(found.values()) == [of_text, of_labels, of_labels, of_text, of_text, of_text]


def test_one_switch_trains_as_published(
    parity: Path, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """arXiv 2411.19557: a basis of each task's own, from the signs of its gradients, on all linear layers; AdamW."""
    monkeypatch.chdir(tmp_path)
    words = ["--model", str(llama), "--task", f"a={parity}", "--as-published"]
    assert CliRunner().invoke(app, ["init", *words]).exit_code == 0
    text = Path("lorasb.toml").read_text()
    Path("lorasb.toml").write_text(text.replace("rank = 64", "rank = 4"))  # of a base this small
    done = CliRunner().invoke(app, ["fit", "--max-steps", "1"])
    assert done.exit_code == 0, done.stderr
    adapter = Adapter.load("adapters/a")
    basis = adapter.load_basis()
    assert adapter.training["settings"]["optimizer"] == "adamw"
    assert {key: basis.calibration[key] for key in ("directions", "reduction", "targets")} == {
        "directions": "gradient",
        "reduction": "sign",
        "targets": "all-linear",
    }
    assert [of["name"] for of in basis.calibration["data"]] == ["a"]
    assert not Path("basis").exists()


def test_labels_among_text_get_a_basis_of_their_own(
    sums: Path, parity: Path, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, data in (("text", sums), ("labels", parity), ("more-text", sums), ("more-labels", parity)):
        shutil.copytree(data, tmp_path / "data" / name)
    words = [f"--task={name}=data/{name}" for name in ("text", "labels")]
    assert CliRunner().invoke(app, ["init", "--model", str(llama), *words]).exit_code == 0
    assert Project.load().calibration == {"rank": 128, "targets": "mlp-output"}
    text = Path("lorasb.toml").read_text().replace("rank = 128", "rank = 4")
    Path("lorasb.toml").write_text(text)
    assert CliRunner().invoke(app, ["init", "--add", "--tasks-dir", "data"]).exit_code == 0
    own = {name: task.basis for name, task in Project.load().tasks.items()}
    assert own == {"text": None, "labels": "own", "more-labels": "own", "more-text": None}
    Path("empty.toml").write_text('model = "m"\n')
    CliRunner().invoke(app, ["init", "--config", "empty.toml", "--add", "--tasks-dir", "data"])
    own = {name: task.basis for name, task in Project.load("empty.toml").tasks.items()}
    assert own == {"text": None, "labels": "own", "more-labels": "own", "more-text": None}
    foreseen = CliRunner().invoke(app, ["fit", "--dry-run"])
    assert foreseen.exit_code == 0, foreseen.output


def test_init_says_which_data_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    done = CliRunner().invoke(app, ["init", "--task", "a=data", "--task", "b=data/missing"])
    assert done.stderr == "data/missing is not there yet: put train.jsonl into it, unless it is a dataset on the Hub\n"
    unknown = CliRunner().invoke(app, ["init", "--task", "b=data/missing", "--overwrite"])
    assert "If the rows have labels, write rank = 64" in unknown.stderr


def test_paths_given_to_init_are_of_the_working_folder(
    parity: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(parity, "data/a")
    (tmp_path / "base").mkdir()
    (tmp_path / "proj").mkdir()
    words = ["--config", "proj/lorasb.toml", "--model", "base", "--task", "a=data/a", "--task", "b=owner/data"]
    done = CliRunner().invoke(app, ["init", *words])
    project = Project.load("proj/lorasb.toml")
    assert (project.model, str(project.task_source("b"))) == ("../base", "owner/data")
    assert Path(str(project.task_source("a"))).samefile("data/a")
    assert project.calibration["rank"] == 64  # the rows, which have labels, were found
    assert done.stderr.startswith("owner/data is not there yet")
    (tmp_path / "deep" / "er").mkdir(parents=True)
    (tmp_path / "link").symlink_to("deep/er")
    CliRunner().invoke(app, ["init", "--config", "link/lorasb.toml", "--model", "base", "--task", "a=data/a"])
    assert Project.load("link/lorasb.toml").model == "../../base"


def test_the_data_of_the_tutorial(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (Path(__file__).parents[1] / "docs" / "tutorial.md").read_text(encoding="utf-8")
    (script,) = re.findall('python -c "(.*)"', page)
    monkeypatch.chdir(tmp_path)
    exec(script)
    for task in ("dates", "orders"):
        assert f"--task {task}=data/{task}" in page
        assert load_task(task, f"data/{task}").held_out() == "test"


def test_init_takes_every_folder_with_rows_for_a_task(
    sums: Path, parity: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, data in (("b", sums), ("a", sums), (".hidden", sums)):
        shutil.copytree(data, tmp_path / "data" / name)
    (tmp_path / "data" / "empty").mkdir()
    (tmp_path / "data" / "f").mkdir()
    (tmp_path / "data" / "f" / "rows.jsonl").touch()
    for name in ("d.jsonl", "e.f.CSV", ".hidden.csv", "notes.txt", "g.json"):
        (tmp_path / "data" / name).touch()
    (tmp_path / "proj").mkdir()
    done = CliRunner().invoke(
        app, ["init", "--config", "proj/lorasb.toml", "--tasks-dir", "data", "--task", f"c={parity}"]
    )
    assert done.exit_code == 0, done.output
    assert "folders with rows and without train.jsonl or train.csv are no tasks: f" in caplog.text
    project = Project.load("proj/lorasb.toml")
    assert {name: task.data for name, task in project.tasks.items()} == {
        "a": "../data/a",
        "b": "../data/b",
        "c": str(parity),
        "d": "../data/d.jsonl",
        "e.f": "../data/e.f.CSV",
    }
    assert load_task("a", project.task_source("a")).sha256 == load_task("a", sums).sha256
    done = CliRunner().invoke(app, ["init", "--tasks-dir", "proj"])
    assert (done.exit_code, "there are no tasks in it (proj)" in done.stderr) == (1, True)


def test_tasks_are_added_to_a_file_that_stays_as_it_is(
    sums: Path, parity: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    init = ["init", "--add", "--tasks-dir", "data"]
    shutil.copytree(sums, "data/old")
    missing = CliRunner().invoke(app, init)
    assert (missing.exit_code, "no project file to add to" in missing.stderr) == (1, True)
    own = '# mine\r\nmodel = "base"\n[tasks.old]\ndata = "gone/old.jsonl"\n[tasks.old.fit]\nepochs = 2\n\n'
    Path("lorasb.toml").write_bytes(b"\xef\xbb\xbf" + own.encode())
    shutil.copytree(parity, "data/new")
    done = CliRunner().invoke(app, [*init, "--json"])
    told = {"out": "lorasb.toml", "added": ["new"], "kept": ["old"], "gone": ["old"]}
    assert (done.exit_code, json.loads(done.stdout)) == (0, told)
    assert "old: there already, and left as the file has it" in done.stderr
    assert "The data of old is not there" in done.stderr
    assert Path("lorasb.toml").read_bytes().decode() == own.rstrip() + '\n\n[tasks."new"]\ndata = "data/new"\n'
    project = Project.load()
    assert (project.tasks["old"].data, project.tasks["old"].fit) == ("gone/old.jsonl", {"epochs": 2})
    before = Path("lorasb.toml").stat().st_mtime_ns
    assert json.loads(CliRunner().invoke(app, [*init, "--json"]).stdout)["added"] == []
    assert Path("lorasb.toml").stat().st_mtime_ns == before


def test_tasks_are_added_beside_a_linked_file_and_as_the_others_are_trained(
    sums: Path, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b"):
        shutil.copytree(sums, f"real/data/{name}")
    words = ["--config", "real/lorasb.toml", "--model", str(llama), "--as-published", "--task", "first=real/data/a"]
    assert CliRunner().invoke(app, ["init", *words]).exit_code == 0
    Path("lorasb.toml").symlink_to("real/lorasb.toml")
    words = ["--tasks-dir", "real/data", "--task", "hub=owner/rows", "--task", "typo=data/typo"]
    done = CliRunner().invoke(app, ["init", "--add", *words, "--json"])
    found = json.loads(done.stdout)
    assert (found["added"], found["gone"]) == (["b", "hub", "typo"], ["typo"])  # a's rows are the first's
    assert Path("lorasb.toml").is_symlink()
    tasks = Project.load().tasks
    assert {name: task.data for name, task in tasks.items()} == {
        "first": "data/a",
        "b": "data/b",
        "hub": "owner/rows",
        "typo": "data/typo",
    }
    assert {task.basis for task in tasks.values()} == {"own"}


def test_tasks_that_are_added_at_once_are_all_there(
    sums: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_project(None, "base", {"z": str(sums)})
    project, write = Project.load(), project_init._write

    def slowly(*arguments: Any) -> None:
        time.sleep(0.05)
        write(*arguments)

    monkeypatch.setattr(project_init, "_write", slowly)
    with ThreadPoolExecutor() as threads:
        added = list(threads.map(lambda name: project_init.add_tasks(project, {name: str(sums)}), "abca"))
    assert sorted(map(len, added)) == [0, 1, 1, 1]
    assert sorted(Project.load().tasks) == ["a", "b", "c", "z"]
    assert [path.name for path in tmp_path.iterdir()] == ["lorasb.toml"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--add"], "name what to add with --task or --tasks-dir"),
        (["--add", "--task", "a=b", "--overwrite"], "give --task and --tasks-dir alone"),
        (["--add", "--task", "../a=b"], "cannot be"),
        (["--add", "--task", "b=b"], r"its tasks stand on one line .*Write each of them as a table, \[tasks.NAME\]"),
    ],
)
def test_what_cannot_be_added_leaves_the_file_alone(
    words: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    before = 'model = "base"\ntasks = { a = { data = "a" } }\n'
    Path("lorasb.toml").write_text(before)
    done = CliRunner().invoke(app, ["init", *words])
    assert done.exit_code != 0
    assert re.search(said, " ".join(done.stderr.replace("│", " ").split()))
    assert Path("lorasb.toml").read_text() == before


def test_init_takes_no_name_for_two_tasks_and_no_split_for_one(
    sums: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(sums, "data/a")
    Path("data/a.csv").touch()
    error = CliRunner().invoke(app, ["init", "--tasks-dir", "data"]).stderr
    assert error == "Error: a and a.csv are two tasks of one name (data). Rename or remove one\n"
    error = CliRunner().invoke(app, ["init", "--tasks-dir", "data/a"]).stderr
    assert "it has a train split, so it is one task (data/a). Give the folder that it lies in" in error
    assert "there are no tasks in it (nowhere)" in CliRunner().invoke(app, ["init", "--tasks-dir", "nowhere"]).stderr


def test_every_text_that_init_writes_is_read(tmp_path: Path) -> None:
    path = write_project(tmp_path / "lorasb.toml", "a base 😀", {"a": "data/😀"})
    path.write_text(f"# {'.' * 40}\n{path.read_text()}")
    project = Project.load(path)
    assert (project.model, project.tasks["a"].data) == ("a base 😀", "data/😀")
