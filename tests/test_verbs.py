"""What the verbs say of themselves, and what they refuse before anything is loaded."""

from __future__ import annotations

import io
import json
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields
from inspect import signature
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import Mock

import pytest
import torch
import typer
from lorasb_cli import calibrate, evaluate, fit
from lorasb_cli.main import app, main
from lorasb_cli.verb import Run, as_command
from lorasb_cli.words import human_bytes, score
from typer.testing import CliRunner

from lorasb_export import Adapter, Basis
from lorasb_export.base.model import BaseRef
from lorasb_export.base.network import as_base_model_error
from lorasb_export.errors import DataError, LoraSBError, OutputError, Terminated
from lorasb_export.files.kind import PEFT_TYPE
from lorasb_export.settings import CalibrationSettings, FitSettings
from tests.conftest import lorasb


def test_no_verb_is_described_by_half_a_sentence() -> None:
    done = CliRunner().invoke(app, ["--help"], env={"COLUMNS": "80", "TERMINAL_WIDTH": "80"})
    assert done.exit_code == 0
    assert "...\n" not in done.stdout.partition("Commands:")[2]


@pytest.mark.parametrize(
    "words",
    [
        *("merge --dtype foo", "fit --optimizer sgd", "calibrate --reduction max", "evaluate --metric rouge"),
        *("export --format gguf", "export --precision int3", "serve --mode fast"),
    ],
)
def test_a_choice_that_is_none_is_wrong_usage(words: str) -> None:
    done = CliRunner().invoke(app, words.split())
    assert (done.exit_code, "is not one of" in done.stderr) == (2, True)


def test_fit_says_where_the_rank_is_set() -> None:
    done = CliRunner().invoke(app, ["fit", "--rank", "16"])
    assert (done.exit_code, "rank belongs to the basis: set it in [basis] of lorasb.toml" in done.stderr) == (2, True)


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


@pytest.mark.parametrize(
    "verb", ["evaluate", "generate why", "merge", "export", "push", "serve", "inspect ..", "quickstart"]
)
def test_a_verb_that_does_not_share_its_work_runs_in_one_process(
    verb: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "4")
    done = lorasb(*verb.split())
    assert done.exit_code == 1
    assert done.stderr.startswith("Error: 4 processes (WORLD_SIZE): only fit and calibrate share")
    assert f"lorasb {verb.split()[0]}, or" in done.stderr
    monkeypatch.setenv("WORLD_SIZE", "")
    assert "WORLD_SIZE" not in lorasb("inspect", "x").stderr


@pytest.mark.parametrize(("verb", "settings"), [(fit, FitSettings), (calibrate, CalibrationSettings)])
def test_every_setting_of_the_project_file_has_a_flag(verb: ModuleType, settings: type) -> None:
    assert {setting.name for setting in fields(settings)} <= signature(verb.run).parameters.keys()


def test_a_setting_given_as_a_flag_is_used(llama: Path, sums: Path, tmp_path: Path) -> None:
    base = ["--model", str(llama)]
    words = ["--data", f"a={sums}", "--rank", "4", "--samples", "4", "--eta", "0.25", "--max-length", "9"]
    assert lorasb("calibrate", *base, *words, "--out", str(tmp_path / "basis")).exit_code == 0
    made = Basis.load(tmp_path / "basis").calibration
    assert (made["eta"], made["max_length"]) == (0.25, 9)
    numbers = {"warmup": 0.5, "weight_decay": 0.125, "max_grad_norm": 2.0, "scaling": 3.0, "head_learning_rate": 0.5}
    flags = [word for name, number in numbers.items() for word in (f"--{name.replace('_', '-')}", str(number))]
    words = ["a", "--data", str(sums), "--basis", str(tmp_path / "basis"), "--max-steps", "1", *flags]
    done = lorasb("fit", *base, *words, "--out", str(tmp_path / "a"))
    assert done.exit_code == 0, done.stderr
    assert numbers.items() <= Adapter.load(tmp_path / "a").training["settings"].items()


def test_data_without_a_task_is_asked_for_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert "Name it: lorasb fit TASK --data" in lorasb("fit", "--data", "rows.csv").stderr


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("calibrate --data nameless", "--data: 'nameless' is not NAME=PATH"),
        ("calibrate --weight a=", "--weight: 'a=' is not NAME=NUMBER"),
        ("calibrate --data a=x --weight a=much", "--weight: of a 'much' is not a number"),
        ("init --task a", "--task: 'a' is not NAME=DATA"),
        ("push --repo me/x --basis-repo me/b", "--basis-repo is for one adapter"),
    ],
)
def test_wrong_usage_names_the_option(words: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    done = lorasb(*words.split())
    assert (done.exit_code, said in done.stderr) == (2, True), done.stderr


@pytest.mark.parametrize(
    ("words", "flag"),
    [
        *(("init --model=", "--model"), ("init --tasks-dir=", "--tasks-dir"), ("calibrate --out=", "--out")),
        *(("calibrate --data a=x --data=", "--data"), ("fit --start-from=", "--start-from")),
        *(("fit --lr=", "--learning-rate/--lr"), ("fit --basis=", "--basis"), ("fit --config=", "--config")),
        *(
            ("evaluate --data=", "--data"),
            ("push adapters/a --repo=", "--repo"),
            ("generate hi --adapters=", "--adapters"),
        ),
        *(("serve --adapters-dir=", "--adapters-dir"), ("quickstart --out=", "--out")),
    ],
)
def test_an_option_that_is_empty_is_not_taken_for_one_that_is_left_out(
    words: str, flag: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of a variable of the shell's that is not set."""
    monkeypatch.chdir(tmp_path)
    done = lorasb(*words.split())
    said = f"{flag} is empty: leave it out, or give a value"
    assert (done.exit_code, said in " ".join(done.stderr.split())) == (2, True), done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory. Tried 2 GiB"), MemoryError(), None])
def test_out_of_memory_says_what_takes_less(error: Exception | None, capsys: pytest.CaptureFixture[str]) -> None:
    def verb(run: Run, batch_size: int = 8, dtype: str = "auto") -> None:
        """As cli/evaluate.py has it."""
        with as_base_model_error(Path("base")):  # as a base is loaded: it is not the base that is at fault
            if error is not None:
                raise error
            torch.empty(1 << 50)

    verb.__module__ = evaluate.__name__
    with pytest.raises(typer.Exit):
        as_command(verb)(batch_size=8, dtype="auto", json=False, quiet=False, verbose=False, config=None)
    said = capsys.readouterr().err
    assert said.startswith("Error: out of memory")
    assert said.endswith("Try a smaller --batch-size or --dtype bfloat16\n")


def test_out_of_memory_in_merge_does_not_offer_another_dtype_of_the_result(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full(*_: object, **__: object) -> None:
        raise MemoryError

    monkeypatch.setattr("lorasb_export.merging.merge.plan_merge", full)
    said = CliRunner().invoke(app, ["merge", "adapters/a"]).stderr
    assert said == "Error: out of memory. Free some, or use a larger machine\n"


@pytest.mark.parametrize(
    "words",
    [
        "inspect ~nobody-here/x",
        "merge ~nobody-here/x",
        "push ~nobody-here/x --repo me/x",
        "serve --adapters ~nobody-here/x",
        "calibrate --model ~nobody-here/x --data a=b",
        "fit --model ~nobody-here/x --data ~nobody-here/x a",
    ],
)
def test_the_home_of_nobody_is_a_path_that_is_not_there(
    words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, words.split())
    assert (done.exit_code, done.stderr.startswith("Error: ")) == (1, True), done.exception
    assert "~nobody-here/x" in done.stderr


def test_serve_says_that_it_starts_once_it_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "adapters" / "a").mkdir(parents=True)
    (tmp_path / "adapters" / "a" / "adapter_config.json").write_text(f'{{"peft_type": "{PEFT_TYPE}"}}')
    monkeypatch.chdir(tmp_path)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        done = CliRunner().invoke(app, ["serve", "--port", str(taken.getsockname()[1])])
    assert done.stderr.startswith("Error: cannot listen")


def test_a_flag_undoes_what_the_project_file_turns_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("lorasb.toml").write_text(
        "[basis]\ncapture = false\ngradient_checkpointing = false\ntargets = ['q_proj', 'v_proj']\n"
        "[fit]\ngradient_checkpointing = true\ngroup_by_length = true\ndtype = 'bfloat16'\nbatch_size = 2\n"
        "[hub]\nrepo = 'me/{name}'\npublic = true\n[tasks.a]\ndata = 'a'\n"
    )
    seen: list[Any] = []
    stop = Mock(side_effect=lambda *words, **options: seen.append((words, options)) or (_ for _ in ()).throw(OSError))
    for place in ("project.fit.fit_tasks", "project.basis.calibrate_into", "project.push.push_project"):
        monkeypatch.setattr(f"lorasb_export.{place}", stop)
    monkeypatch.setattr("lorasb_export.base.model.BaseModel.resolve", lambda name: name)
    for words in ("fit", "fit --no-gradient-checkpointing --no-group-by-length"):
        lorasb(*words.split())
    for words in ("calibrate --model m", "calibrate --model m --capture --gradient-checkpointing --dtype auto"):
        lorasb(*words.split())
    for words in ("push", "push --private"):
        lorasb(*words.split())
    of_fit = [words[2] for words, _ in seen[:2]]
    assert [(s.gradient_checkpointing, s.group_by_length) for s in of_fit] == [(True, True), (False, False)]
    of_basis = [words[2] for words, _ in seen[2:4]]
    assert [(s.capture, s.gradient_checkpointing, s.dtype) for s in of_basis] == [
        (False, False, "bfloat16"),
        (True, True, "auto"),
    ]
    assert {(s.targets, s.batch_size) for s in of_basis} == {("q_proj,v_proj", 2)}
    assert [options["public"] for _, options in seen[4:]] == [True, False]


MERGE, EXPORT = "merging.merge.merge", "exporting.export.export"
HANDED_ON: list[tuple[str, str, dict[str, Any]]] = [
    ("merge a --dtype float16 --max-shard-size 1MB", MERGE, {"dtype": "float16", "max_shard_size": "1MB"}),
    ("merge a --report kept.json --verify --model m", MERGE, {"report": "kept.json", "verify": True, "base": "m"}),
    (
        "evaluate a --data rows --model m --split valid --limit 3 --dtype float32 --metric loss --batch-size 2",
        "project.evaluate.evaluate_adapters",
        {"data": "rows", "model": "m", "split": "valid", "limit": 3}
        | {"dtype": "float32", "metric": "loss", "batch_size": 2},
    ),
    ("export a --format onnx-adapters --routed", EXPORT, {"format": "onnx-adapters", "routed": True}),
    (
        "export a --format onnx --precision int8 --max-drop 3 --overwrite --model m",
        EXPORT,
        {"precision": "int8", "max_drop": 3, "overwrite": True, "base": "m"},
    ),
    (
        "push --repo me/x --commit-message Again --revision b",
        "project.push.push_project",
        {"message": "Again", "revision": "b"},
    ),
    (
        "serve --adapters a --model m --host 0.0.0.0 --port 8123 --dtype float16 --mode folded -- --seed 1",
        "serving.launcher.serve",
        {"model": "m", "host": "0.0.0.0", "port": 8123, "dtype": "float16", "mode": "folded", "extra": ["--seed", "1"]},
    ),
    (
        "serve --adapters-dir adapters --allow-updates --api-key-file key",
        "serving.launcher.serve",
        {"updates_from": Path("adapters"), "api_key_file": "key"},
    ),
]


@pytest.mark.parametrize(("words", "place", "expected"), HANDED_ON)
def test_what_is_given_is_handed_on(
    words: str, place: str, expected: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("adapters/a").mkdir(parents=True)
    Path("adapters/a/adapter_config.json").write_text('{"peft_type": "LORA_SB"}')
    monkeypatch.setattr("lorasb_export.project.export.tasks_to_compare", lambda *_: {})
    called = Mock(side_effect=OSError)
    monkeypatch.setattr(f"lorasb_export.{place}", called)
    assert lorasb(*words.split()).exit_code == 1
    found = called.call_args.kwargs
    assert {name: found.get(name) for name in expected} == expected


def test_a_folder_with_an_equals_sign_is_merged_as_it_is_called(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    merged = Mock(side_effect=OSError)
    monkeypatch.setattr(f"lorasb_export.{MERGE}", merged)
    for name in ("lr=1e-3", "lr=high"):
        Path(name).mkdir()
        Path(name, "adapter_config.json").touch()
        assert lorasb("merge", name).exit_code == 1
        assert merged.call_args.args[0] == name


def test_a_link_in_a_circle_is_no_adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("loop").symlink_to("loop")
    done = lorasb("merge", "./loop=0.5", "./a=0.5")
    assert (done.exit_code, done.stderr.startswith("Error: ")) == (1, True), done.exception


def test_numbers_for_people() -> None:
    assert [human_bytes(count) for count in (999, 1000, 1_234_567, 5e15)] == ["999 B", "1.0 KB", "1.2 MB", "5000.0 TB"]
    assert [score(metric, 0.5) for metric in ("exact_match", "accuracy", "mcc")] == ["50.0%", "50.0%", "0.5000"]
    assert [score("loss", value) for value in (None, True, 2)] == ["-", "-", "2.0000"]


def test_what_would_not_be_looked_at_is_refused() -> None:
    assert "--dry-run writes no model" in lorasb("merge", "a", "--dry-run", "--verify").output
    refused = "--data and --max-drop are for comparing"
    for words in (
        ["--format", "peft"],
        ["--format", "onnx", "--no-verify"],
        ["--format", "onnx", "--precision", "bf16"],
    ):
        assert refused in " ".join(lorasb("export", "a", "--max-drop", "1", *words).output.split())


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
