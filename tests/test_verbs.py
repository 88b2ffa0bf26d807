"""What the verbs say of themselves, what they hand on, and what they refuse before anything is loaded."""

from __future__ import annotations

import socket
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
from lorasb_cli.main import app
from lorasb_cli.verb import Run, as_command
from typer.testing import CliRunner

from lorasb_export import Adapter, Basis
from lorasb_export.base.network import as_base_model_error
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
    of_fit = [words[0].settings for words, _ in seen[:2]]
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


def test_what_would_not_be_looked_at_is_refused() -> None:
    assert "--dry-run writes no model" in lorasb("merge", "a", "--dry-run", "--verify").output
    refused = "--data and --max-drop are for comparing"
    for words in (
        ["--format", "peft"],
        ["--format", "onnx", "--no-verify"],
        ["--format", "onnx", "--precision", "bf16"],
    ):
        assert refused in " ".join(lorasb("export", "a", "--max-drop", "1", *words).output.split())
