"""An adapter goes with the chat template it was trained with: the project's base first, and a warning of another."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from lorasb_export import Adapter, Basis, calibrate, fit
from lorasb_export.base.model import BaseModel
from lorasb_export.data.trained_template import TEMPLATE_KEY, template_sha256
from lorasb_export.errors import TrainingError
from lorasb_export.settings import CalibrationSettings, FitSettings
from tests import artifacts
from tests.conftest import lorasb
from tests.rows import MARKED, task_of
from tests.test_resume import interrupt
from tests.tiny import TEMPLATE

SETTINGS = FitSettings(max_steps=2, checkpoint_every=1, learning_rate=1e-2)
WARNING = "a: trained with another chat template than this base has"
VERBS = (
    ("evaluate", "a", "--limit", "1"),
    ("generate", "1+1=", "--adapters", "adapters/a", "--max-tokens", "2"),
    ("merge", "adapters/a", "--out", "model", "--overwrite"),
    ("export", "adapters/a", "--out", "peft", "--verify", "--overwrite"),
    ("serve", "--adapters", "adapters/a", "--dry-run"),
)


@pytest.fixture
def project(llama: Path, sums: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project whose basis was calibrated on the original, and whose `model` has a template of the user's own."""
    monkeypatch.chdir(tmp_path)
    calibrate(str(llama), {}, CalibrationSettings(rank=4, directions="random")).save("basis")
    shutil.copytree(llama, "base")
    Path("base/chat_template.jinja").write_text(MARKED)
    Path("lorasb.toml").write_text(f'model = "base"\n[tasks.a]\ndata = "{sums}"\n')
    done = lorasb("fit", "--max-steps", "1", "--lr", "1e-2")
    assert done.exit_code == 0, done.stderr
    return tmp_path


def test_the_projects_base_comes_before_the_one_that_the_adapter_names(
    project: Path, llama: Path, caplog: pytest.LogCaptureFixture
) -> None:
    adapter = Adapter.load("adapters/a")
    assert adapter.base.name_or_path == str(llama)
    assert adapter.training[TEMPLATE_KEY] == template_sha256(project / "base") != template_sha256(llama)
    for words in VERBS:
        done = lorasb(*words)
        assert done.exit_code == 0, done.stderr
    assert Path("model/chat_template.jinja").read_text() == MARKED
    assert str(project / "base") in done.stdout
    assert WARNING not in caplog.text


@pytest.mark.parametrize("words", VERBS)
def test_another_template_is_told_of_once(
    words: tuple[str, ...], project: Path, llama: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for more in (["--model", str(llama)], ["--model", "base"]):
        caplog.clear()
        done = lorasb(*words, *more)
        assert done.exit_code == 0, done.stderr
        assert caplog.text.count(WARNING) == (more[1] != "base")


def test_outside_of_the_project_the_adapter_says_where_its_base_is(
    project: Path, caplog: pytest.LogCaptureFixture
) -> None:
    Path("lorasb.toml").unlink()
    assert lorasb("merge", "adapters/a", "--out", "model").exit_code == 0
    assert caplog.text.count(WARNING) == 1
    assert Path("model/chat_template.jinja").read_text() == TEMPLATE


def test_an_adapter_of_another_base_keeps_its_own(project: Path, bert: Path) -> None:
    file = Path("lorasb.toml")
    file.write_text(file.read_text().replace('"base"', f'"{bert}"'))
    done = lorasb("merge", "adapters/a", "--out", "model")
    assert done.exit_code == 0, done.stderr
    assert Path("model/chat_template.jinja").read_text() == TEMPLATE


def test_of_an_older_adapter_nothing_is_said(project: Path, llama: Path, caplog: pytest.LogCaptureFixture) -> None:
    artifacts.edit(Path("adapters/a"), "adapter_config.json", lambda c: c["training"].pop(TEMPLATE_KEY))
    assert lorasb("merge", "adapters/a", "--out", "model", "--model", str(llama)).exit_code == 0
    assert WARNING not in caplog.text
    again = lorasb("fit", "--max-steps", "1", "--lr", "1e-2", "--model", str(llama), "--resume")
    assert again.exit_code == 0, again.stderr


def test_no_template_is_another_than_one(project: Path, llama: Path, caplog: pytest.LogCaptureFixture) -> None:
    Path("base/chat_template.jinja").unlink()
    assert lorasb("fit", "--max-steps", "1", "--lr", "1e-2", "--overwrite").exit_code == 0
    assert Adapter.load("adapters/a").training[TEMPLATE_KEY] is None
    assert lorasb("merge", "a", "--out", "model", "--model", str(llama)).exit_code == 0
    assert WARNING in caplog.text


def test_rows_that_no_template_writes_record_none(llama: Path, tmp_path: Path) -> None:
    task = task_of('{"text": "abc"}\n' * 4, tmp_path / "plain")
    own = CalibrationSettings(rank=4, directions="random")
    assert TEMPLATE_KEY not in fit(str(llama), own, task, tmp_path / "a", SETTINGS).training


def test_a_run_with_another_template_is_neither_resumed_nor_taken_for_finished(
    project: Path, llama: Path, sums: Path
) -> None:
    out, base = project / "other" / "a", project / "base"
    interrupt(base, project / "basis", sums, out, SETTINGS)
    with pytest.raises(TrainingError, match="the interrupted run had other chat template"):
        fit(str(llama), project / "basis", sums, out, SETTINGS, resume=True)
    fit(str(base), project / "basis", sums, out, SETTINGS, resume=True)
    with pytest.raises(TrainingError, match="trained otherwise: another chat template"):
        fit(str(llama), Basis.load(project / "basis"), sums, out, SETTINGS, resume=True)


def _in_config(folder: Path, template: Any) -> None:
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": template}))


def test_the_digest_is_of_what_the_tokenizer_has_wherever_it_lies(llama: Path, tmp_path: Path) -> None:
    """In a file of its own, as transformers 5 writes it, or in the config, as older ones did."""
    in_file = template_sha256(llama)
    assert in_file is not None

    def made(name: str) -> Path:
        shutil.copytree(llama, tmp_path / name)
        return tmp_path / name

    def digest(folder: Path, template: Any) -> str | None:
        assert BaseModel.resolve(folder).tokenizer.chat_template == template
        return template_sha256(folder)

    one = made("one")
    (one / "chat_template.jinja").unlink()
    assert digest(one, None) is None
    _in_config(one, TEMPLATE)
    assert digest(one, TEMPLATE) == in_file
    both = {"default": TEMPLATE, "tool_use": MARKED}
    _in_config(one, [{"name": name, "template": template} for name, template in both.items()])
    several = made("several")
    (several / "additional_chat_templates").mkdir()
    (several / "additional_chat_templates" / "tool_use.jinja").write_text(MARKED)
    assert digest(one, both) == digest(several, both) != in_file
    (several / "tokenizer_config.json").write_text("{")
    (several / "chat_template.jinja").write_bytes(b"\xff")
    assert template_sha256(several) is None
