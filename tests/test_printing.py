"""What the verbs print, for people and as JSON: of what was done, of errors, beside other processes."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from lorasb_cli.main import app, main
from lorasb_cli.verb import Run
from lorasb_cli.words import human_bytes, score
from typer.testing import CliRunner

from lorasb_export import Adapter
from lorasb_export.base.model import BaseRef
from lorasb_export.errors import DataError, LoraSBError, OutputError, Terminated
from tests.conftest import lorasb


@pytest.mark.parametrize("words", ["merge --dtype foo", "merge --no-such-option", "calibrate --data nameless", "merg"])
def test_wrong_usage_with_json(
    words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["lorasb", *words.split(), "--json"])
    with pytest.raises(SystemExit, match="2"):
        main()
    error = json.loads(capsys.readouterr().out)["error"]
    assert set(error) == {"type", "message", "what", "where", "fix"}
    assert words.split()[-1] in error["message"]


@pytest.mark.parametrize(("rank", "objects"), [("0", 1), ("1", 0)])
def test_one_process_of_several_prints_the_error_as_json(
    rank: str, objects: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", rank)
    done = CliRunner().invoke(app, ["fit", "--json"])
    assert (done.exit_code, len(done.stdout.splitlines())) == (1, objects)
    assert done.stderr.startswith("Error: no task to fit")


@pytest.mark.parametrize("processes", [None, "", "1"])
def test_a_rank_without_several_processes_silences_none(
    processes: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a cluster sets it for elements that work each by itself."""
    monkeypatch.chdir(tmp_path)
    Path("lorasb.toml").touch()
    monkeypatch.setenv("RANK", "1")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    if processes is not None:
        monkeypatch.setenv("WORLD_SIZE", processes)
    assert json.loads(lorasb("inspect", "--json").stdout)["kind"] == "project"


def test_what_stdout_has_no_letters_for_is_escaped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(written := io.BytesIO(), "latin-1", errors="strict"))
    value = {"name": "é日😀"}
    for as_json in (True, False):
        Run(json=as_json, quiet=False, verbose=False, config=None, options={}).result(value, value["name"])
    printed, told = written.getvalue().decode("ascii").splitlines()
    assert json.loads(printed) == value
    assert told == r"\u00e9\u65e5\ud83d\ude00"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="only Linux has such a device")
@pytest.mark.parametrize("options", [[], ["--json"]])
@pytest.mark.parametrize(("words", "said"), [([], "No space left on device"), (["nowhere"], "no adapter 'nowhere'")])
def test_a_full_disk_behind_stdout_is_told_in_a_line(
    words: list[str], said: str, options: list[str], tmp_path: Path
) -> None:
    (tmp_path / "lorasb.toml").touch()
    command = [sys.executable, "-m", "lorasb_cli", "inspect", *words, *options]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(command, cwd=tmp_path, stdout=full, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, len(done.stderr.splitlines())) == (1, 1), done.stderr
    assert done.stderr.startswith(f"Error: {said}")


def test_numbers_for_people() -> None:
    assert [human_bytes(count) for count in (999, 1000, 1_234_567, 5e15)] == ["999 B", "1.0 KB", "1.2 MB", "5000.0 TB"]
    assert [score(metric, 0.5) for metric in ("exact_match", "accuracy", "mcc")] == ["50.0%", "50.0%", "0.5000"]
    assert [score("loss", value) for value in (None, True, 2)] == ["-", "-", "2.0000"]


def test_json_tells_of_an_error_also_where_its_traceback_is_shown(tmp_path: Path) -> None:
    done = lorasb("inspect", str(tmp_path / "nowhere"), "--verbose", "--json")
    assert json.loads(done.stdout)["error"]["type"] == "ArtifactError"
    assert "Traceback" in done.stderr


SEVERAL = [("fit", "adapters"), ("evaluate", "evaluation"), ("push --repo me/{name}", "pushed")]


def ends_after_two(verb: str, end: BaseException, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of three things that `verb` does in `folder`, a is done, b fails, and then `end` comes."""
    monkeypatch.chdir(folder)
    Path("lorasb.toml").write_text("".join(f'[tasks.{name}]\ndata = "data"\n' for name in "abc"))
    Path("adapters/a").mkdir(parents=True)
    Path("adapters/a/adapter_config.json").write_text('{"peft_type": "LORA_SB"}')
    results: dict[str, Any] = {
        "fit": Adapter(BaseRef("base", None, ""), "", None, {}, folder=Path("adapters/a")),
        "evaluate": {"split": "valid", "rows": 1, "metric": "loss", "base": 2.0, "adapter": 1.0},
        "push": {"repo": "me/a", "url": "hub/me/a", "changed": True, "files": [], "bytes": 1, "skipped": []},
    }
    name = verb.partition(" ")[0]

    def one_after_another(*_: Any, **__: Any) -> Iterator[tuple[str, Any]]:
        yield "a", results[name]
        yield "b", DataError("bad rows", fix="Mend them")
        raise end

    function = {"fit": "fit_tasks", "evaluate": "evaluate_adapters", "push": "push_project"}[name]
    monkeypatch.setattr(f"lorasb_export.project.{name}.{function}", one_after_another)


@pytest.mark.parametrize(("verb", "key"), SEVERAL)
@pytest.mark.parametrize("error", [OutputError("full", fix="Free it"), OSError(28, "full"), ValueError("a library's")])
def test_what_was_done_is_told_also_where_an_error_ends_the_rest(
    verb: str, key: str, error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ends_after_two(verb, error, tmp_path, monkeypatch)
    done = lorasb(*verb.split(), "--json")
    printed = json.loads(done.stdout)
    assert (done.exit_code, list(printed)) == (1, [key, "failed", "error"])
    assert (len(printed[key]), list(printed["failed"])) == (1, ["b"])
    assert printed["error"]["what"] == ("full" if isinstance(error, OSError) else None)
    assert "not all was done, 1 failed:\n  1. b: bad rows" in done.stderr
    told = lorasb(*verb.split())
    assert (told.exit_code, "a" in told.stdout, "1. b: bad rows" in told.stderr) == (1, True, True)
    assert isinstance(error, ValueError) or told.stderr.rstrip().splitlines()[-1].startswith("Error: full")


def test_of_many_that_failed_people_are_told_ten_and_programs_all(
    capsys: pytest.CaptureFixture[str],
) -> None:
    failed: dict[str, LoraSBError] = {f"t{number}": DataError("gone", fix="Mount it") for number in range(300)}
    failed["bad"] = DataError("a row was cut", fix="Mend it")
    with pytest.raises(typer.Exit):
        Run(json=True, quiet=False, verbose=False, config=None, options={}).result({}, "", failed)
    printed, told = capsys.readouterr()
    assert list(json.loads(printed)["failed"]) == list(failed)
    head, first, second, *_, last = told.splitlines()
    assert head == "Error: not all was done, 301 failed:"
    assert (first, second) == ("  1. bad: a row was cut. Mend it", "  2. t0: gone. Mount it")
    assert (last, len(told.splitlines())) == ("  and 291 more", 12)


@pytest.mark.parametrize(("verb", "key"), SEVERAL)
@pytest.mark.parametrize(("signal", "code"), [(KeyboardInterrupt(), 130), (Terminated(), 143)])
def test_json_tells_what_was_done_before_a_signal(
    verb: str, key: str, signal: KeyboardInterrupt, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ends_after_two(verb, signal, tmp_path, monkeypatch)
    done = lorasb(*verb.split(), "--json", "--quiet")
    printed = json.loads(done.stdout)
    assert (done.exit_code, list(printed)) == (code, [key, "failed", "error"])
    assert (len(printed[key]), list(printed["failed"])) == (1, ["b"])
    assert printed["error"]["type"] == type(signal).__name__
    assert printed["error"]["message"].startswith("Interrupted. ")
    assert "not all was done, 1 failed:\n  1. b: bad rows" in done.stderr
    told = lorasb(*verb.split())
    assert (told.exit_code, told.stdout) == (code, "")
    assert told.stderr.rstrip().splitlines()[-1].startswith("Interrupted. ")
    monkeypatch.setattr(f"lorasb_cli.{verb.split()[0]}.SHARES_WORK", True, raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    another = lorasb(*verb.split(), "--json")
    assert (another.exit_code, another.stdout) == (code, "")
