"""What `lorasb generate` asks, and what it refuses to."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest
from lorasb_cli.main import app
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from lorasb_export.base.model import BaseModel
from lorasb_export.basis import Basis
from lorasb_export.choices import CAUSAL_LM, SEQ_CLS
from lorasb_export.errors import ArtifactError, SettingsError
from lorasb_export.exporting.onnx_ask import ask_onnx
from lorasb_export.exporting.onnx_record import write_record
from lorasb_export.names import refuse_many
from tests.random_adapter import save_adapter


@pytest.fixture
def project(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Adapters a and b of one basis, and the classifier c."""
    for name, task_type in (("a", CAUSAL_LM), ("b", CAUSAL_LM), ("c", SEQ_CLS)):
        model, folder = BaseModel.resolve(llama).load(task_type), tmp_path / "adapters" / name
        save_adapter(llama, model, folder, ["model.layers.0.mlp.up_proj"], task_type=task_type)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_all_adapters_but_classifiers_answer_by_default(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    load = Basis.load
    monkeypatch.setattr(Basis, "load", lambda source: read.append(source) or load(source))
    done = CliRunner().invoke(app, ["generate", "hi", "--max-tokens", "2", "--json"], catch_exceptions=False)
    assert list(json.loads(done.stdout)["answers"]) == ["base", "a", "b"]
    assert "c is passed over: it is a classifier, which answers nothing" in done.stderr
    assert len(read) == 1  # a and b share their basis


def test_more_adapters_than_one_waits_for_are_to_be_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a project and of an ONNX export, before anything is loaded."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "lorasb_export.evaluation.side_by_side", None)  # it asks: to import it fails
    tasks: dict[str, dict[str, str]] = {f"t{number}": {} for number in range(33)}
    (tmp_path / "onnx").mkdir()
    for name in tasks:
        (tmp_path / "adapters" / name).mkdir(parents=True)
        (tmp_path / "adapters" / name / "adapter_config.json").write_text('{"peft_type": "LORA_SB"}')
    write_record(tmp_path / "onnx", {"kind": "onnx-adapters", "task_type": CAUSAL_LM, "adapters": tasks})
    what = "there are 33 adapters, and at most 32 are asked where none is named"
    for words, where in ([], tmp_path), (["--onnx", "onnx"], "onnx"):
        done = CliRunner().invoke(app, ["generate", "hi", *words])
        assert (done.exit_code, done.stderr) == (1, f"Error: {what} ({where}). Name some with --adapters\n")
    refuse_many(list(tasks)[:32], tmp_path)
    of_peft = tmp_path / "adapters" / "t7" / "adapter_config.json"  # it is not asked, nor counted
    of_peft.write_text('{"peft_type": "LORA"}')
    assert "33 adapters" not in CliRunner().invoke(app, ["generate", "hi"]).stderr


def test_a_named_classifier_is_refused_before_the_base_is_loaded(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(BaseModel, "load")
    done = CliRunner().invoke(app, ["generate", "hi", "--adapters", "a,c"])
    message = f"adapter c is a classifier, which answers nothing ({project}/adapters/c). Leave it out"
    assert (done.exit_code, message in done.stderr) == (1, True)


def test_another_base_of_the_same_shape_is_not_asked(
    project: Path, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = shutil.copytree(llama, project / "other")
    weights = {name: 1.1 * weight for name, weight in load_file(other / "model.safetensors").items()}
    save_file(weights, other / "model.safetensors", {"format": "pt"})
    monkeypatch.delattr(BaseModel, "load")
    done = CliRunner().invoke(app, ["generate", "hi", "--adapters", "a", "--model", str(other)])
    assert (done.exit_code, "not those the artifact was made for" in done.stderr) == (1, True)


def test_an_adapter_called_base_is_asked_by_its_path(project: Path) -> None:
    (project / "adapters" / "b").rename(project / "adapters" / "base")
    done = CliRunner().invoke(app, ["generate", "hi"])
    message = f"an adapter called 'base' would hide the base's answer ({project}/adapters/base). Ask for it by its path"
    assert (done.exit_code, message in done.stderr) == (1, True)
    command = ["generate", "hi", "--adapters", "adapters/base", "--max-tokens", "2", "--json"]
    done = CliRunner().invoke(app, command, catch_exceptions=False)
    assert list(json.loads(done.stdout)["answers"]) == ["base", "adapters/base"]


def test_names_of_adapters_may_have_blanks_around_them(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []
    monkeypatch.setattr(
        "lorasb_export.exporting.onnx_ask.ask_onnx", lambda *arguments, **_: asked.append(arguments[2]) or {}
    )
    done = CliRunner().invoke(app, ["generate", "hi", "--onnx", "x", "--adapters", "a, b,"], catch_exceptions=False)
    assert (done.exit_code, asked) == (0, [["a", "b"]])


def test_a_pattern_is_of_the_adapters_of_the_export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []
    monkeypatch.setattr(
        "lorasb_export.exporting.onnx_ask.ask_onnx", lambda *arguments, **_: asked.append(arguments[2]) or {}
    )
    tasks: dict[str, dict[str, str]] = {"eu-de": {}, "eu-fr": {}, "us": {}}
    write_record(tmp_path, {"kind": "onnx-adapters", "task_type": CAUSAL_LM, "adapters": tasks})
    words = ["generate", "hi", "--onnx", str(tmp_path), "--adapters", "eu-*"]
    assert CliRunner().invoke(app, words, catch_exceptions=False).exit_code == 0
    assert asked == [["eu-de", "eu-fr"]]


@pytest.mark.parametrize("where", ["--model", "--onnx"])
def test_a_list_without_a_name_asks_nobody(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not the base alone. A system message may be empty: a template's own is left out then."""
    asked = Mock(return_value={})
    monkeypatch.setattr("lorasb_export.exporting.onnx_ask.ask_onnx", asked)
    monkeypatch.setattr("lorasb_export.evaluation.side_by_side.ask_adapters", asked)
    done = CliRunner().invoke(app, ["generate", "hi", where, "x", "--adapters", " ,"])
    assert (done.exit_code, "--adapters names none" in done.stderr, asked.mock_calls) == (2, True, [])
    assert CliRunner().invoke(app, ["generate", "hi", where, "x", "--system", ""]).exit_code == 0
    assert asked.call_args.args[0 if where == "--model" else 1][0][0] == {"role": "system", "content": ""}


def test_an_answer_has_a_token() -> None:
    done = CliRunner().invoke(app, ["generate", "hi", "--max-tokens", "0"])
    assert (done.exit_code, "--max-tokens" in done.output) == (2, True)


def test_a_classifier_answers_nothing(tmp_path: Path) -> None:
    write_record(tmp_path, {"kind": "onnx", "task_type": "SEQ_CLS"})
    with pytest.raises(ArtifactError, match="the graph is a classifier"):
        ask_onnx(tmp_path, ["hi"], max_tokens=8)


@pytest.mark.parametrize("is_there", [True, False])
def test_a_damaged_tokenizer_of_an_onnx_folder(is_there: bool, llama: Path, tmp_path: Path) -> None:
    write_record(tmp_path, {"kind": "onnx", "task_type": "CAUSAL_LM"})
    for name in ("config.json", "tokenizer_config.json", "tokenizer.json") if is_there else ("config.json",):
        (tmp_path / name).write_bytes((llama / name).read_bytes()[:1000])
    done = CliRunner().invoke(app, ["generate", "hi", "--onnx", str(tmp_path)])
    assert "Error: transformers cannot load the tokenizer: " in done.stderr
    assert f"({tmp_path}). Export it again" in done.stderr


def test_a_merged_graph_has_no_adapters_to_name(tmp_path: Path) -> None:
    write_record(tmp_path, {"kind": "onnx", "task_type": "CAUSAL_LM"})
    with pytest.raises(SettingsError, match="the folder has one adapter, merged in"):
        ask_onnx(tmp_path, ["hi"], ["a"], max_tokens=8)


@pytest.mark.parametrize("option", [("--model", "base"), ("--dtype", "float32")])
def test_an_onnx_folder_has_its_own_model(option: tuple[str, str]) -> None:
    done = CliRunner().invoke(app, ["generate", "hi", "--onnx", "x", *option])
    assert done.exit_code == 2
    assert "--onnx goes without --model and --dtype" in done.output
