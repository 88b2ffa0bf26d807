"""`--overwrite` replaces a folder by another of its kind and by no other."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path

import pytest

from lorasb_export import Adapter, export
from lorasb_export.errors import OutputError
from lorasb_export.files.kind import artifact_kind
from lorasb_export.files.storage import sha256_file, write_json
from tests import project_of_a
from tests.artifacts import forbid
from tests.conftest import lorasb

project = project_of_a.project
DRAWN = ("--directions", "random", "--rank", "4")
WRITTEN = {
    "basis": ("calibrate", *DRAWN, "--out"),
    "adapter": ("fit", "a", "--basis", "basis", "--max-steps", "1", "--lr", "1e-2", "--out"),
    "merged": ("merge", "adapters/a", "--out"),
    "peft": ("export", "adapters/a", "--out"),
}


@pytest.fixture
def others(project: Path) -> dict[str, Path]:
    """A folder of each kind, none of which another is made from."""
    adapter = Adapter.load("adapters/a")
    adapter.load_basis().save("basis")
    adapter.load_basis().save("other")
    shutil.copytree("adapters/a", "adapters/b")
    for kind, words in (("merged", WRITTEN["merged"]), ("peft", WRITTEN["peft"])):
        assert lorasb(*words, kind).exit_code == 0
    for kind in ("onnx", "onnx-adapters", "quickstart"):
        Path(kind).mkdir()
        write_json(Path(kind) / "lorasb.json", {"kind": kind})
    found = {"basis": Path("other"), "adapter": Path("adapters/b"), "merged": Path("merged"), "peft": Path("peft")}
    return found | {kind: Path(kind) for kind in ("onnx", "onnx-adapters", "quickstart")}


@pytest.mark.parametrize("kind", WRITTEN)
def test_no_verb_replaces_another_kind(kind: str, others: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor works for hours before it says so."""
    before = {path: sha256_file(path) for folder in others.values() for path in folder.iterdir()}
    with monkeypatch.context() as patch:
        for work in ("training.job.Job._train", "project.basis.calibrate", "merging.merge._write_shards"):
            patch.setattr(f"lorasb_export.{work}", lambda *_, **__: pytest.fail("worked"))
        for there, folder in others.items():
            if there != kind:
                done = lorasb(*WRITTEN[kind], str(folder), "--overwrite")
                what = f"the target is of the kind '{there}', and only one of the kind '{kind}' would be replaced"
                assert (done.exit_code, what in done.stderr) == (1, True), done.stderr
    assert before == {path: sha256_file(path) for folder in others.values() for path in folder.iterdir()}
    done = lorasb(*WRITTEN[kind], str(others[kind]), "--overwrite")
    assert done.exit_code == 0, done.stderr
    assert artifact_kind(others[kind]) == kind


@pytest.mark.parametrize("format", ["onnx", "onnx-adapters"])
def test_nor_does_a_graph(format: str, others: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    modules = {"onnx": "onnx", "onnx-adapters": "onnx_adapters"}
    for name in ("check_request", "exporter_for"):
        monkeypatch.setattr(f"lorasb_export.exporting.{modules[format]}.{name}", lambda *_: "genai")
    for there, folder in others.items():
        if there != format:
            with pytest.raises(OutputError, match=f"of the kind '{there}', and only one of the kind '{format}'"):
                export("adapters/a", folder, format=format, verify=False, overwrite=True)


def test_a_damaged_one_may_be_replaced(project: Path) -> None:
    Adapter.load("adapters/a").load_basis().save("other")
    Path("other/basis_config.json").write_text("{")
    assert lorasb(*WRITTEN["basis"], "other", "--overwrite").exit_code == 0


def test_one_that_cannot_be_read_may_be_whole_and_stays(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree("adapters/a", "other")
    write_json(Path("other/lorasb.json"), {"kind": "adapter"})
    with monkeypatch.context() as patch:
        forbid(Path("other/adapter_config.json"), patch, errno.EIO)
        done = lorasb(*WRITTEN["merged"], "other", "--overwrite")
    assert "cannot be read: Input/output error" in done.stderr
    Adapter.load("other")
