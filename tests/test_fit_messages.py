"""What `fit` says while it works, and to whom."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path

import pytest
from lorasb_cli.main import app
from typer.testing import CliRunner

from lorasb_export import fit
from lorasb_export.settings import CalibrationSettings
from tests.test_fit_tasks import SETTINGS, project


def test_a_long_verb_says_how_far_it_is(
    llama: Path, sums: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, log: pytest.LogCaptureFixture
) -> None:
    """Where no bar can be seen; with --quiet nothing."""
    project(tmp_path / "p", llama, sums, "[basis]\nrank = 4\n[fit]\nmax_steps = 4\n")
    monkeypatch.chdir(tmp_path / "p")
    CliRunner().invoke(app, ["fit"], catch_exceptions=False)
    calibrating, start, *evaluations = log.messages
    assert calibrating == "Calibrating a basis for 14 modules on 32 rows of a"
    assert start == "a: 64 rows, 4 steps at learning rate 0.027"
    pattern = r"a: step (\d) of 4, (?:train loss \d\.\d+, )?valid loss \d\.\d+, about \d+ s left"
    assert [re.fullmatch(pattern, line)[1] for line in evaluations] == ["1", "2", "3", "4"]  # type: ignore[index]
    log.clear()
    CliRunner().invoke(app, ["fit", "--overwrite", "--quiet"], catch_exceptions=False)
    assert not log.messages
    CliRunner().invoke(app, ["fit", "--start-from", "a", "--overwrite"], catch_exceptions=False)
    before = next(line for line in log.messages if "step 0 of 4" in line)
    assert re.fullmatch(r"a: step 0 of 4, valid loss \d\.\d+", before)  # how long a step takes is not known yet


def test_together_a_line_names_the_task_of_its_valid_loss(
    llama: Path, sums: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, log: pytest.LogCaptureFixture
) -> None:
    project(tmp_path / "p", llama, sums, '[basis]\nrank = 4\n[fit]\nmax_steps = 1\n[tasks.b]\ndata = "data"\n')
    monkeypatch.chdir(tmp_path / "p")
    CliRunner().invoke(app, ["fit", "--together"], catch_exceptions=False)
    pattern = r"2 tasks: step 1 of 1, valid loss \d\.\d+ of (\w), about 0 s left"
    assert [re.fullmatch(pattern, line)[1] for line in log.messages[-2:]] == ["a", "b"]  # type: ignore[index]


def test_the_result_counts_rows_left_out_and_cut(
    llama: Path, sums: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Why, a warning says: not all of them are too long."""
    project(tmp_path / "p", llama, sums, "[basis]\nrank = 4\n[fit]\nmax_steps = 1\n")
    monkeypatch.chdir(tmp_path / "p")
    with (tmp_path / "p" / "data" / "train.jsonl").open("a") as file:
        file.write(json.dumps({"prompt": "1" * 600, "completion": "2"}) + "\n")
        file.write(json.dumps({"prompt": "1", "completion": "2" * 600}) + "\n")
    said = CliRunner().invoke(app, ["fit"], catch_exceptions=False).stdout
    assert ", 1 of 66 rows left out, 1 of 65 cut at max_length, " in said


def test_tasks_without_held_out_rows_are_named_once_before_any_is_trained(
    sums: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, log: pytest.LogCaptureFixture
) -> None:
    """Those of which nothing was said; nor is it said of an adapter that is kept, for which it is too late."""
    rows = 'data = "data/train.jsonl"\n'
    tables = "".join(f"[tasks.{name}]\n{rows}" for name in "bcd") + "hold_out = 0\n"
    tables += f"[tasks.e]\n{rows}hold_out = 0.1\n"
    project(tmp_path / "p", tmp_path / "missing", sums, tables)
    monkeypatch.chdir(tmp_path / "p")
    told = "No rows are held out to score %s on. To hold some out, set hold_out = 0.1 in [data]"
    for words, names in (["fit"], "b, c"), (["fit", "--resume"], "b"):
        log.clear()
        assert "missing" in CliRunner().invoke(app, words).stderr
        assert [message.partition(" of lorasb.toml")[0] for message in log.messages] == [told % names]
        (tmp_path / "p/adapters/c").mkdir(parents=True, exist_ok=True)
        (tmp_path / "p/adapters/c/adapter_config.json").write_text('{"peft_type": "LORA_SB"}')
    log.clear()
    with (tmp_path / "p" / "lorasb.toml").open("a") as file:
        file.write("[data]\nhold_out = 0\n")
    assert "missing" in CliRunner().invoke(app, ["fit", "b"]).stderr
    assert not log.messages


def test_the_first_process_alone_warns(
    llama: Path, sums: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, log: pytest.LogCaptureFixture
) -> None:
    project(tmp_path / "p", llama, sums, "[basis]\nrank = 4\n[fit]\nmax_steps = 1\nmax_length = 9\n")
    monkeypatch.chdir(tmp_path / "p")
    CliRunner().invoke(app, ["fit"], catch_exceptions=False)
    assert "cut at 9 tokens" in log.text
    log.clear()
    monkeypatch.setattr("lorasb_cli.verb._processes", lambda: "2")  # not in WORLD_SIZE: accelerate would wait for them
    monkeypatch.setenv("RANK", "1")
    CliRunner().invoke(app, ["fit", "--overwrite"], catch_exceptions=False)
    assert not log.messages


@pytest.mark.parametrize("off", ["", "1"])
def test_bars_are_turned_off_on_a_terminal_too(
    llama: Path, sums: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, off: str
) -> None:
    """By TQDM_DISABLE, which --quiet sets."""

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr("sys.stderr", stderr := Terminal())
    monkeypatch.setenv("TQDM_DISABLE", off)
    fit(str(llama), CalibrationSettings(rank=4), sums, tmp_path / "a", SETTINGS)
    assert [bar in stderr.getvalue() for bar in ("gradients", "SVD", "fit a", "score")] == [not off] * 4
