"""Links lead nowhere, and what a user has beside a folder is not taken for what a run of ours left there."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import pytest

from lorasb_export import Adapter, FitSettings, fit, merge
from lorasb_export.cards import card
from lorasb_export.choices import CAUSAL_LM
from lorasb_export.errors import ArtifactError, BaseModelError, OutputError, TrainingError
from lorasb_export.evaluation.record import record_evaluation
from lorasb_export.exporting.peft import export_peft
from lorasb_export.files.atomic import atomic_folder
from lorasb_export.files.lock import only_writer
from lorasb_export.files.storage import read_json, write_json
from lorasb_export.hub.cache import leads_out
from tests.merging import adapter_for
from tests.random_adapter import adapter_on

SECRET = "a secret of the user's"


@pytest.fixture
def adapter(llama: Path, tmp_path: Path) -> Path:
    adapter_for(llama, tmp_path / "a")
    return tmp_path / "a"


def test_a_lock_is_no_link(tmp_path: Path) -> None:
    secret = tmp_path / "id_rsa"
    secret.write_text(SECRET)
    secret.chmod(0o600)
    for name, target in (("a", secret), ("b", tmp_path / "made")):
        (tmp_path / f".{name}.lock").symlink_to(target)
        with pytest.raises(OutputError, match="the lock file is a link"), only_writer(tmp_path / name):
            pass
    os.link(secret, tmp_path / ".c.lock")
    (tmp_path / ".d.lock").write_text("mine")
    for name in "cd":
        with pytest.raises(OutputError, match="a file that is no lock has its name"), only_writer(tmp_path / name):
            pass
    assert (tmp_path / ".d.lock").read_text() == "mine"
    assert secret.stat().st_mode & 0o777 == 0o600
    assert not (tmp_path / "made").exists()


def test_what_a_link_leads_to_goes_into_no_folder_of_ours(adapter: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text(SECRET)
    (adapter / "training.png").symlink_to(tmp_path / "secret")
    export_peft(adapter, tmp_path / "peft")
    merge(adapter, tmp_path / "model")
    written = [path for folder in (tmp_path / "peft", tmp_path / "model") for path in folder.rglob("*")]
    assert len(written) > 5
    assert not [path for path in written if path.is_file() and SECRET.encode() in path.read_bytes()]
    (adapter / "README.md").unlink()
    (adapter / "README.md").symlink_to(tmp_path / "secret")
    before = (adapter / "adapter_config.json").read_bytes()
    for write in (
        lambda: card.write(adapter, "a card"),
        lambda: record_evaluation(Adapter.load(adapter), {"split": "test", "metric": "loss"}),
    ):
        with pytest.raises(ArtifactError, match=r"a link out of the folder.*README\.md"):
            write()
    assert (adapter / "adapter_config.json").read_bytes() == before


@pytest.mark.parametrize("home", ["base", "shared", "elsewhere"])
def test_a_folder_of_templates_may_link_within_the_base(home: str, adapter: Path, llama: Path, tmp_path: Path) -> None:
    """Or to the one that all of a folder of links lead to."""
    base, name = shutil.copytree(llama, tmp_path / "base"), "additional_chat_templates/tool.jinja"
    (base / name).parent.mkdir()
    target = tmp_path / home / ("x.jinja" if home == "base" else name)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text("text")
    (base / name).symlink_to(target)
    if home == "shared":
        shutil.move(base / "model.safetensors", tmp_path / "shared" / "model.safetensors")
        (base / "model.safetensors").symlink_to(tmp_path / "shared" / "model.safetensors")
    if home == "elsewhere":
        with pytest.raises(BaseModelError, match="a link to another file"):
            merge(adapter, tmp_path / "model", base=base)
    else:
        merge(adapter, tmp_path / "model", base=base)
        assert (tmp_path / "model" / name).read_text() == "text"


@pytest.mark.parametrize("name", [".model.old", ".model.merge", ".a.run"])
@pytest.mark.parametrize("linked", [False, True])
def test_the_folders_of_a_user_are_not_taken_for_what_we_left(
    name: str, linked: bool, adapter: Path, llama: Path, sums: Path, tmp_path: Path
) -> None:
    mine = tmp_path / ("mine" if linked else name)
    (mine / "checkpoint-1").mkdir(parents=True)
    (mine / "thesis").write_text("mine")
    if linked:
        (tmp_path / name).symlink_to(mine)
    shutil.copytree(adapter, tmp_path / "basis")
    if name == ".a.run":
        shutil.rmtree(adapter)
        for resume in (False, True):
            with pytest.raises(OutputError, match=r"a run never wrote this file .*thesis|is a link"):
                fit(str(llama), tmp_path / "basis", sums, adapter, settings=FitSettings(max_steps=1), resume=resume)
    else:
        with pytest.raises(OutputError, match=r"has a name that it needs.*\.model\.(old|merge)"):
            merge(adapter, tmp_path / "model")
    assert not (tmp_path / "model").exists()
    assert (mine / "checkpoint-1").is_dir()
    assert (mine / "thesis").read_text() == "mine"


def test_a_link_to_another_disk_is_no_mounted_disk(adapter: Path, tmp_path: Path) -> None:
    elsewhere = Path("/dev/shm")
    if not elsewhere.is_dir() or elsewhere.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("no other disk here")
    with tempfile.TemporaryDirectory(dir=elsewhere) as disk:
        merge(adapter, Path(disk, "model"))
        (tmp_path / "model").symlink_to(Path(disk, "model"))
        merge(adapter, tmp_path / "model", overwrite=True)
        with pytest.raises(OutputError, match="the target exists"):
            merge(adapter, tmp_path / "model")


@pytest.mark.parametrize(
    ("place", "is_there"), [("blobs/0a1b", True), ("blobs/0a/0a1b", True), ("blobs/mine/0a1b", False), ("0a1b", False)]
)
def test_what_lies_in_the_store_of_the_hubs_cache(place: str, is_there: bool, tmp_path: Path) -> None:
    """By its hash, or since huggingface_hub 2.4 in a folder called by the first two letters of that."""
    target, link = tmp_path / place, tmp_path / "folder" / "config.json"
    for path in (target, link):
        path.parent.mkdir(parents=True, exist_ok=True)
    target.touch()
    link.symlink_to(target)
    assert leads_out(link, link.parent) is not is_there


def test_an_adapter_whose_replacement_was_cut_short_is_there_when_its_training_goes_on(
    adapter: Path, llama: Path, sums: Path, tmp_path: Path
) -> None:
    """Between the two renames: before, the run trained to its end and then found the old one in its place."""
    basis = shutil.copytree(adapter, tmp_path / "basis")
    fit(str(llama), basis, sums, tmp_path / "b", settings=FitSettings(max_steps=1))
    (tmp_path / "b").rename(tmp_path / ".b.old")
    with pytest.raises(TrainingError, match="the adapter that is there was trained otherwise"):
        fit(str(llama), basis, sums, tmp_path / "b", settings=FitSettings(max_steps=2), resume=True)
    assert (tmp_path / "b" / "adapter.safetensors").is_file()


@pytest.mark.parametrize("overwrite", [True, False])
def test_what_a_link_leads_to_is_replaced_where_we_wrote_it(overwrite: bool, adapter: Path, tmp_path: Path) -> None:
    merge(adapter, tmp_path / "disk" / "model")
    (tmp_path / "model").symlink_to(tmp_path / "disk" / "model")
    before = (tmp_path / "disk" / "model").stat().st_ino
    if not overwrite:
        with pytest.raises(OutputError, match="the target exists"):
            merge(adapter, tmp_path / "model")
        return
    merge(adapter, tmp_path / "model", overwrite=True)
    assert (tmp_path / "model").is_symlink()
    assert (tmp_path / "disk" / "model").stat().st_ino != before


@pytest.mark.parametrize("content", ["mine", "lorasb.json"])
def test_what_appears_while_a_folder_is_put_in_place_stays(
    content: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, rename = tmp_path / "x", Path.rename

    def renamed(path: Path, to: Path) -> Path:
        if to == target:
            monkeypatch.setattr(Path, "rename", rename)
            target.mkdir()
            (target / content).write_text("{}")
        return rename(path, to)

    def write() -> None:
        with atomic_folder(target, kind=None) as temporary:
            write_json(temporary / "lorasb.json", {})
            monkeypatch.setattr(Path, "rename", renamed)

    with pytest.raises(OutputError, match="the target exists"):
        write()
    assert [path.name for path in target.iterdir()] == [content]


def test_a_folder_that_is_put_back_meanwhile_is_replaced_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As another command does, to which the moment between two renames looks like a process that died there."""
    target, old, rename = tmp_path / "x", tmp_path / ".x.old", Path.rename
    for content in ("before", "after"):
        with atomic_folder(target, overwrite=True, kind=None) as temporary:
            write_json(temporary / "lorasb.json", {"content": content})
            if content == "after":

                def renamed(path: Path, to: Path) -> Path:
                    if to == target and path != old and old.exists() and not target.exists():
                        monkeypatch.setattr(Path, "rename", rename)
                        old.rename(target)
                    return rename(path, to)

                monkeypatch.setattr(Path, "rename", renamed)
    assert read_json(target / "lorasb.json") == {"content": "after"}
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_a_link_to_itself_as_the_target_is_an_error_of_ours(llama: Path, tmp_path: Path) -> None:
    adapter = adapter_on(llama, tmp_path / "a", CAUSAL_LM)
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(OutputError, match="cannot write"):
        merge(adapter, tmp_path / "loop")
