"""What is taken for a folder, and what for a Hub id."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from lorasb_export.base.model import BaseModel
from lorasb_export.errors import ArtifactError, BaseModelError
from lorasb_export.files.kind import BASIS_FILES
from lorasb_export.hub.fetch import resolve_folder
from lorasb_export.hub.ids import is_hub_id
from lorasb_export.project.basis import basis_of_task
from lorasb_export.project.project import Project

pytestmark = pytest.mark.usefixtures("no_network")


def test_a_local_folder_resolves_to_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "me" / "basis").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    expected = tmp_path / "me" / "basis"
    assert resolve_folder("me/basis", BASIS_FILES) == (expected, str(expected))  # before the Hub is asked
    assert os.path.isabs(resolve_folder(Path("me/basis"), BASIS_FILES)[1])


@pytest.mark.parametrize("source", ["nothing", "a/b/c", "/tmp/none/x", "./a", "owner/"])
def test_neither_folder_nor_hub_id(source: str) -> None:
    with pytest.raises(ArtifactError) as caught:
        resolve_folder(source, BASIS_FILES)
    assert str(caught.value) == (
        f"neither a folder nor a Hub id ({source}). "
        "Give an existing folder, or a Hub id: owner/name or owner/name@revision"
    )


@pytest.mark.parametrize("source", ["adapters/biling", "adapters/biling/adapters/a", "adapters/none"])
def test_a_mistyped_path_is_not_asked_for_at_the_hub(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "adapters" / "billing").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: pytest.fail("asked the Hub"))
    with pytest.raises(ArtifactError, match="no such folder in adapters, which is one of this disk") as caught:
        resolve_folder(source, BASIS_FILES)
    assert ("did you mean adapters/billing?" in str(caught.value)) is ("biling" in source)
    with pytest.raises(BaseModelError, match="the base model was not found: no such folder in adapters"):
        BaseModel.resolve("adapters/llama")


def test_with_a_revision_it_is_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "adapters").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ArtifactError, match="HF_HUB_OFFLINE is set"):
        resolve_folder("adapters/biling@main", BASIS_FILES)


def test_a_mistyped_path_of_a_project_is_of_its_folder(tmp_path: Path) -> None:
    for folder in ("models", "bases"):
        (tmp_path / folder).mkdir()
    text = 'model = "models/lama"\n[tasks.a]\ndata = "a"\nbasis = "bases/b"\n[tasks.b]\ndata = "b"\nbasis = "me/b"\n'
    (tmp_path / "lorasb.toml").write_text(text)
    project = Project.load(tmp_path / "lorasb.toml")
    assert project.require_model() == str(tmp_path / "models" / "lama")
    assert basis_of_task(project, "a") == str(tmp_path / "bases" / "b")
    assert basis_of_task(project, "b") == "me/b"


@pytest.mark.parametrize(
    ("name", "expected"),
    [("owner/name", True), ("gpt2", False), ("/a/b", False), ("./a", False), ("a/b/c", False), (None, False)],
)
def test_hub_ids(name: object, expected: bool) -> None:
    assert is_hub_id(name) is expected
