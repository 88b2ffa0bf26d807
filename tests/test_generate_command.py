"""What `lorasb generate` asks, and what it refuses to."""

from __future__ import annotations

from pathlib import Path

import pytest
from lorasb_cli.main import app
from typer.testing import CliRunner

from lorasb_export.errors import ArtifactError, SettingsError
from lorasb_export.export import onnx_run
from lorasb_export.export.onnx_record import write_record


def test_names_of_adapters_may_have_blanks_around_them(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []
    monkeypatch.setattr(onnx_run, "answers", lambda *arguments, **_: asked.append(arguments[2]) or {})
    done = CliRunner().invoke(app, ["generate", "hi", "--onnx", "x", "--adapters", "a, b,"], catch_exceptions=False)
    assert (done.exit_code, asked) == (0, [["a", "b"]])


def test_an_answer_has_a_token() -> None:
    done = CliRunner().invoke(app, ["generate", "hi", "--max-tokens", "0"])
    assert (done.exit_code, "--max-tokens" in done.output) == (2, True)


def test_a_classifier_answers_nothing(tmp_path: Path) -> None:
    write_record(tmp_path, {"kind": "onnx", "task_type": "SEQ_CLS"})
    with pytest.raises(ArtifactError, match="the graph is a classifier"):
        onnx_run.answers(tmp_path, "hi")


def test_a_merged_graph_has_no_adapters_to_name(tmp_path: Path) -> None:
    write_record(tmp_path, {"kind": "onnx", "task_type": "CAUSAL_LM"})
    with pytest.raises(SettingsError, match="the folder has one adapter, merged in"):
        onnx_run.answers(tmp_path, "hi", ["a"])


@pytest.mark.parametrize("option", [("--model", "base"), ("--dtype", "float32")])
def test_an_onnx_folder_has_its_own_model(option: tuple[str, str]) -> None:
    done = CliRunner().invoke(app, ["generate", "hi", "--onnx", "x", *option])
    assert done.exit_code == 2
    assert "--onnx goes without --model and --dtype" in done.output
