"""What is taken for a folder, and what for a Hub id."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from lorasb_export.errors import ArtifactError
from lorasb_export.fetch import BASIS_FILES, is_hub_id, resolve_folder

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


@pytest.mark.parametrize(
    ("name", "expected"),
    [("owner/name", True), ("gpt2", False), ("/a/b", False), ("./a", False), ("a/b/c", False), (None, False)],
)
def test_hub_ids(name: object, expected: bool) -> None:
    assert is_hub_id(name) is expected
