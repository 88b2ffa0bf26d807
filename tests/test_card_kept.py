"""What people wrote into a README.md stays when a verb writes the folder anew."""

from __future__ import annotations

from pathlib import Path

import pytest

from lorasb_export import Adapter
from lorasb_export.cards.readme import BEGIN
from lorasb_export.files.atomic import atomic_folder
from tests import project_of_a
from tests.conftest import lorasb

project = project_of_a.project
VERBS = {
    "adapters/b": ("fit", "a", "--basis", "basis", "--out", "adapters/b", "--max-steps", "1", "--lr", "1e-2"),
    "other": ("calibrate", "--directions", "random", "--rank", "4", "--out", "other"),
    "model": ("merge", "adapters/a", "--out", "model"),
    "peft": ("export", "adapters/a", "--out", "peft"),
}


@pytest.mark.parametrize("folder", VERBS)
def test_the_text_and_the_keys_of_the_user_stay(folder: str, project: Path) -> None:
    Adapter.load("adapters/a").load_basis().save("basis")
    readme = Path(folder) / "README.md"
    assert lorasb(*VERBS[folder]).exit_code == 0
    generated = readme.read_text()
    readme.write_text(generated.replace("---\n", "---\nlanguage: no\n", 1) + "\nMine.\n")
    (Path(folder) / "notes.txt").write_text("not the card")
    done = lorasb(*VERBS[folder], "--overwrite")
    assert done.exit_code == 0, done.stderr
    text = readme.read_text()
    assert "language: no\n" in text
    assert text.endswith("\nMine.\n")
    assert text.count(BEGIN) == 1
    assert not (Path(folder) / "notes.txt").exists()


@pytest.mark.parametrize("folder", ["adapters/b", "other", "model"])
def test_a_card_that_could_not_be_kept_is_told_of_before_the_work(
    folder: str, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Adapter.load("adapters/a").load_basis().save("basis")
    assert lorasb(*VERBS[folder]).exit_code == 0
    (Path(folder) / "README.md").write_text("---\nlicense: [mit\n---\nMine.\n")
    works = ("training.job.Job._train", "project.basis.calibrate", "merging.merge.resumable_folder")
    for work in (f"lorasb_export.{name}" for name in works):
        monkeypatch.setattr(work, lambda *_, **__: pytest.fail("worked"))
    done = lorasb(*VERBS[folder], "--overwrite")
    assert (done.exit_code, "the card's front matter is not valid YAML" in done.stderr) == (1, True)


def test_a_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("secret")
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "lorasb.json").write_text("{}")
    (tmp_path / "x" / "README.md").symlink_to(tmp_path / "mine")
    with atomic_folder(tmp_path / "x", overwrite=True, kind=None) as new:
        (new / "lorasb.json").write_text("{}")
    assert [path.name for path in (tmp_path / "x").iterdir()] == ["lorasb.json"]
