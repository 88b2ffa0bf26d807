"""lorasb.toml: defaults, flags, and every mistake named at once."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest
from lorasb_cli.main import app
from typer.testing import CliRunner

from lorasb_export import names
from lorasb_export.errors import SettingsError
from lorasb_export.project import project as project_module
from lorasb_export.project.project import Project
from lorasb_export.project.starts import Starts


def load(folder: Path, text: str) -> Project:
    (folder / "lorasb.toml").write_text(text)
    return Project.load(folder / "lorasb.toml")


@pytest.mark.parametrize(
    ("model", "asked"), [("me/base", "me/base@v1.0"), ("me/base@other", "me/base@v1.0"), ("models/base", "")]
)
def test_the_base_is_asked_for_at_the_revision_of_the_file(model: str, asked: str, tmp_path: Path) -> None:
    """A revision means something on the Hub alone."""
    (tmp_path / "models" / "base").mkdir(parents=True)
    project = load(tmp_path, f'model = "{model}"\nrevision = "v1.0"\n')
    assert project.require_model() == (asked or str(tmp_path / "models" / "base"))


@pytest.mark.parametrize("more", [[], ["--json"]])
def test_a_reader_that_has_gone_is_no_error(more: list[str], tmp_path: Path) -> None:
    """As in `lorasb inspect basis | head`."""
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "lorasb_cli", "init", "--quiet", *more]
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True, cwd=tmp_path)
    os.close(writing)
    assert (done.returncode, done.stderr) == (141, "")


def test_all_mistakes_are_named_at_once(tmp_path: Path) -> None:
    text = 'modle = "x"\n[fit]\nepocs = 3\nlr = 0.1\nrank = 16\nbatch_size = "8"\n[basis]\nrank = true\n'
    text += '[hub]\nzzz = 1\n[data]\nholdout = 1\nsubset = "x"\n'
    text += '[tasks."../up"]\ndata = "d"\n[tasks.b]\n[tasks.c]\ndata = "d"\nfit.epochs = "3"\nfit.seed = 1\n'
    text += '[tasks.e]\ndata = "d"\nfit = 3\n'
    with pytest.raises(SettingsError) as error:
        load(tmp_path, text)
    message = str(error.value)
    for part in (
        "unknown key 'modle' (did you mean 'model'?)",
        "[fit] unknown key 'epocs' (did you mean 'epochs'?)",
        "[fit] unknown key 'lr' (did you mean 'learning_rate'?)",
        "[fit] unknown key 'rank' (it is a key of [basis])",
        "[hub] unknown key 'zzz' (there are: repo, public)",
        "[data] unknown key 'holdout' (did you mean 'hold_out'?)",
        "[data] unknown key 'subset' (it is a key of [tasks.NAME])",
        "[fit] batch_size = '8' has the wrong type: it takes int",
        "[basis] rank = True has the wrong type",
        "'../up' cannot be",
        "[tasks.b] lacks data",
        "[tasks.c.fit] unknown key 'seed' (it is a key of [basis] and of [fit])",
        "[tasks.c.fit] epochs = '3' has the wrong type",
        "[tasks.e] fit = 3 has the wrong type: it takes dict",
        "lorasb.toml",
    ):
        assert part in message


@pytest.mark.parametrize("line", ['dtype = "float32"', "seed = 1"])
def test_what_all_tasks_share_is_no_setting_of_one(line: str, tmp_path: Path) -> None:
    """The base is loaded once, in one dtype, and heads are drawn by one seed."""
    with pytest.raises(SettingsError, match=rf"\[tasks\.a\.fit\] unknown key '{line.split()[0]}'"):
        load(tmp_path, f'[tasks.a]\ndata = "d"\nfit.{line}\n')
    assert load(tmp_path, f"[fit]\n{line}\n").fit


def test_a_task_has_a_positive_weight(tmp_path: Path) -> None:
    project = load(tmp_path, '[tasks.a]\ndata = "d"\nweight = 2\n[tasks.b]\ndata = "d"\n')
    assert project.weights(["a", "b", "elsewhere"]) == {"a": 2, "b": 1.0}
    for wrong in ("0", "-1.5", "inf", "nan", "true", '"2"'):
        with pytest.raises(SettingsError, match=r"\[tasks.a\] weight"):
            load(tmp_path, f'[tasks.a]\ndata = "d"\nweight = {wrong}\n')


def test_a_task_is_read_as_its_table_says_then_as_the_common_one(tmp_path: Path) -> None:
    """What the common table says never stands in the way of a task that says otherwise."""
    pair, hub = {"prompt": "question", "completion": "answer"}, 'data = "owner/name"\n'
    project = load(
        tmp_path,
        '[data]\ncolumns = { prompt = "question", completion = "answer" }\nhold_out = 0.1\n'
        f"[tasks.a]\n{hub}[tasks.own]\n{hub}columns = {{ text = 'body' }}\nhold_out = 0.2\n"
        f"[tasks.none]\n{hub}columns = {{}}\nhold_out = 0\n"
        f'[tasks.valid]\n{hub}splits = {{ train = "t", valid = "v" }}\n',
    )
    assert {name: project.task_source(name).options() for name in project.tasks} == {
        "a": {"columns": pair, "hold_out": 0.1},
        "own": {"columns": {"text": "body"}, "hold_out": 0.2},
        "none": {},
        "valid": {"columns": pair, "splits": {"train": "t", "valid": "v"}},
    }
    for name in ("a", "valid", "elsewhere"):
        assert project.other_source(name, "other.csv").options() == {"columns": pair, "hold_out": 0.1}
    assert project.other_source("elsewhere", "other.csv", hold_out=False).options() == {"columns": pair}


def test_a_task_is_trained_by_flags_then_its_own_table_then_the_common_one(tmp_path: Path) -> None:
    text = "[fit]\nepochs = 5\nmax_steps = 6\nlearning_rate = 1e-2\n[tasks.b]\ndata = 'd'\n"
    project = load(tmp_path, text + "[tasks.a]\ndata = 'd'\nfit.max_steps = 7\nfit.learning_rate = [1e-3, 1e-2]\n")
    a, b, other = (project.settings_of(name, {"max_length": 9}) for name in ("a", "b", "elsewhere"))
    assert (a.epochs, a.max_steps, a.rates, a.max_length) == (5, 7, (1e-3, 1e-2), 9)
    assert (b.max_steps, b.rates, b.max_length) == (6, (1e-2,), 9)
    assert other == b
    assert project.settings_of("a", {"max_steps": 8}).max_steps == 8
    wrong = load(tmp_path, "[tasks.a]\ndata = 'd'\nfit.epochs = -1\n")
    with pytest.raises(SettingsError, match=r"epochs is -1 \(\[tasks\.a\.fit\]\)\. Give"):
        wrong.settings_of("a", {})


def test_not_toml_and_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SettingsError, match="not valid TOML"):
        load(tmp_path, "model = ")
    with pytest.raises(SettingsError, match="no such config file"):
        Project.load(tmp_path / "nowhere.toml")
    monkeypatch.setattr(Path, "read_text", Mock(side_effect=PermissionError))
    with pytest.raises(PermissionError):
        Project.load(tmp_path / "lorasb.toml")


def test_a_byte_order_mark_is_passed_over(tmp_path: Path) -> None:
    assert load(tmp_path, '\ufeffmodel = "m"\n').model == "m"


def test_unknown_task_names_the_nearest(tmp_path: Path) -> None:
    project = load(tmp_path, '[tasks.dates]\ndata = "d"\n')
    with pytest.raises(SettingsError, match=r"no task 'date' in the project \(did you mean 'dates'\?\)"):
        project.task_source("date")


def test_adapter_left_out_is_that_of_the_first_task(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    project = load(tmp_path, '[tasks.z]\ndata = "d"\n[tasks.a]\ndata = "d"\n')
    with pytest.raises(SettingsError, match="no adapter in this project"):
        project.find_adapter(None)
    for name in ("a", "z"):
        project.adapter_folder(name).mkdir(parents=True)
        (project.adapter_folder(name) / "adapter_config.json").write_text('{"peft_type": "LORA_SB"}')
    assert project.find_adapter(None) == str(project.adapter_folder("z"))
    assert caplog.messages == ["No adapter is named: z is taken, the first of z, a"]
    assert project.find_adapter("a") == str(project.adapter_folder("a"))
    assert project.find_adapter("me/on-the-hub") == "me/on-the-hub"


def test_an_adapter_is_found_without_listing_thousands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    project = unfitted(tmp_path)
    (tmp_path / "adapters" / ".b").mkdir()
    (tmp_path / "adapters" / ".b" / "adapter_config.json").touch()
    monkeypatch.chdir(tmp_path / "adapters")
    for module in (names, project_module):
        monkeypatch.setattr(module, "adapters_in", lambda _: pytest.fail("listed"))
    assert project.find_adapter("a") == str(project.adapter_folder("a"))
    assert [project.find_adapter(word) for word in ("./a", ".b")] == ["a", ".b"]  # paths, not names


def test_tasks_without_an_adapter_to_start_from_are_told_without_listing_thousands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    project = unfitted(tmp_path)
    monkeypatch.chdir(tmp_path)
    for module in (names, project_module):
        monkeypatch.setattr(module, "adapters_in", lambda _: pytest.fail("listed"))
    with pytest.raises(SettingsError, match="no task has an adapter to start from"):
        Starts(project, "{name}-v1", {name: project.adapter_folder(name) for name in project.tasks})


@pytest.mark.parametrize(
    "words", ["fit", "fit a", "generate hi", "calibrate", "evaluate", "merge", "serve", "push --repo me/{name}"]
)
def test_a_folder_without_a_project(words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, words.split())
    message = f"there is no lorasb.toml here ({tmp_path}). Change to the project's folder, or run lorasb init"
    assert message in done.stderr


def unfitted(folder: Path) -> Project:
    """A project of the tasks `a`, which has an adapter, and `b`."""
    project = load(folder, '[tasks.a]\ndata = "d"\n[tasks.b]\ndata = "d"\n')
    project.adapter_folder("a").mkdir(parents=True)
    (project.adapter_folder("a") / "adapter_config.json").write_text("{}")
    return project


WRONG_NAMES = {"ab": "no adapter 'ab' (", "z": "Write a or ./z", "b": "task b has no adapter yet"}


@pytest.mark.parametrize("name", WRONG_NAMES)
def test_a_name_without_an_adapter(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    project = unfitted(tmp_path)
    monkeypatch.chdir(tmp_path)
    for words in (["merge", name], ["serve", "--adapters", f"x={name}"]):
        assert WRONG_NAMES[name] in CliRunner().invoke(app, words).stderr
    (tmp_path / name).mkdir()
    (tmp_path / name / "adapter_config.json").touch()
    assert project.find_adapter(name) == name


@pytest.mark.parametrize("words", ["merge a", "evaluate a", "generate hi --adapters a", "serve --adapters a"])
@pytest.mark.parametrize("file", ["lorasb.toml", "none"])
def test_a_name_where_no_adapter_is(words: str, file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / file).touch()
    error = CliRunner().invoke(app, words.split()).stderr
    advice = "Run lorasb fit in the project's folder, or write ./a for a folder elsewhere"
    assert error == f"Error: no adapter 'a', nor any other ({tmp_path}/adapters). {advice}\n"


@pytest.mark.parametrize("words", ["push --repo me/x", "push --repo me/{name}", "evaluate"])
def test_adapters_of_other_tools_are_none(
    words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, log: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "adapters" / "theirs").mkdir(parents=True)
    (tmp_path / "adapters" / "theirs" / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    load(tmp_path, '[hub]\nrepo = "me/x"\n')
    done = CliRunner().invoke(app, words.split())
    assert (done.exit_code, "no adapter" in done.stderr) == (1, True)
    assert "theirs is no LoRA-SB adapter" in log.text
    log.clear()
    named = CliRunner().invoke(app, ["push", "theirs", "--dry-run"])
    assert (named.exit_code, "peft_type is 'LORA', not LORA_SB" in named.stderr) == (1, True)
    assert "Passed over" not in log.text


@pytest.mark.parametrize(
    "words",
    [
        *("fit nope", "evaluate nope", "merge nope", "export nope", "inspect nope", "serve --adapters nope"),
        *("push nope --repo me/x", "serve --adapters-dir nope"),
    ],
)
def test_a_wrong_name_is_refused_before_torch_is_loaded(words: str, tmp_path: Path) -> None:
    unfitted(tmp_path)
    command = [sys.executable, "-X", "importtime", "-m", "lorasb_cli", *words.split()]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, "Error: no " in done.stderr, " torch\n" in done.stderr) == (1, True, False)
