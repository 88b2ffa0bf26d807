"""A project for one repository, as far as it goes without a network; and names of what lies in one."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from lorasb_cli.main import app
from typer.testing import CliRunner

from lorasb_export import Adapter, basis_source
from lorasb_export.cards.project_card import project_card
from lorasb_export.cards.sections import NOTHING
from lorasb_export.errors import ArtifactError, LoraSBError, OutputError, SettingsError
from lorasb_export.files.storage import read_json, write_json
from lorasb_export.format import sealed
from lorasb_export.hub.ids import HubFolder, parse_hub_folder
from lorasb_export.inspection import inspect_folder
from lorasb_export.project.project import Project
from lorasb_export.project.push import push_project
from lorasb_export.publishing import project_repository
from lorasb_export.publishing.outgoing import is_publishable, part_of, stale
from lorasb_export.publishing.project_index import about, labels_of, make_index, others, refuse_lost
from lorasb_export.publishing.repository import Head, Repository, Stored
from tests.pushing import BASE, make


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("me/support/adapters/a@v1", HubFolder("me/support", "adapters/a", "v1")),
        ("me/support/basis", HubFolder("me/support", "basis")),
        ("me/support/bases/own", HubFolder("me/support", "bases/own")),
        ("me/support@refs/pr/1", HubFolder("me/support", "", "refs/pr/1")),
        ("me/support/adapters/a/b", None),
        ("me/support/adapters/..", None),
        ("me/support/models/a", None),
        ("./support/adapters/a", None),
        ("/me/support/adapters/a", None),
        ("adapters/a", HubFolder("adapters/a")),
    ],
)
def test_what_reads_like_a_folder_of_the_hub(source: str, found: HubFolder | None) -> None:
    assert parse_hub_folder(source) == found
    assert found is None or str(found) == source


@pytest.mark.parametrize(
    "named", ["../..", "../../../other/basis", "../../adapters/a/../../../x", "basis", "/disk/basis"]
)
def test_a_basis_beside_an_adapter_lies_in_its_repository(named: str, tmp_path: Path) -> None:
    where = "me/support/adapters/a@1f3c"
    assert basis_source.resolved("../../basis", tmp_path, where) == "me/support/basis@1f3c"
    assert basis_source.resolved("me/other/basis@77", tmp_path, where) == "me/other/basis@77"
    with pytest.raises(ArtifactError, match="its basis is a folder on somebody else's disk"):
        basis_source.resolved(named, tmp_path, where)


def test_what_lies_in_other_parts_is_never_stale() -> None:
    there = ["basis/basis.safetensors", "adapters/a/basis.safetensors", "adapters/a/by-hand.txt"]
    there += ["adapters/b/adapter.safetensors", "adapters/a/training.png", "old.safetensors"]
    files: dict[str, Any] = {"README.md": b"", "adapters/a/adapter.safetensors": b""}
    published = [path for path in there if path != "adapters/a/by-hand.txt"]
    gone = ["adapters/a/basis.safetensors", "adapters/a/training.png", "old.safetensors"]
    assert stale(there, published, files) == gone
    assert [part_of(path) for path in there[:2]] == ["basis", "adapters/a"]


@pytest.mark.parametrize(
    ("path", "may"),
    [
        ("adapters/a/adapter.safetensors", True),
        ("bases/own/basis_config.json", True),
        ("basis/basis.safetensors", True),
        ("adapters/../adapter.safetensors", False),
        ("adapters/.a/adapter.safetensors", False),
        ("adapters/a/model.safetensors", False),
        ("adapters/a/b/adapter.safetensors", False),
        ("basis/adapter.safetensors", False),
    ],
)
def test_what_a_list_of_checksums_may_name(path: str, may: bool) -> None:
    assert is_publishable(path) is may


@pytest.mark.usefixtures("no_network")
def test_a_plan_without_the_hub(tmp_path: Path) -> None:
    _, adapter = make(tmp_path)
    for name in ("b", "c"):
        shutil.copytree(adapter, adapter.with_name(name))
    (adapter.with_name("b") / "adapter.safetensors").write_bytes(b"damaged")
    config = read_json(adapter.with_name("c") / "adapter_config.json")
    write_json(adapter.with_name("c") / "adapter_config.json", config | {"base_model_name_or_path": "owner/other"})
    found = dict(push_project(Project(tmp_path), "me/support", dry_run=True))
    assert list(found) == ["b", "c", "me/support"]
    assert all(isinstance(found[name], ArtifactError) for name in "bc")
    plan = found["me/support"]
    assert not isinstance(plan, LoraSBError)
    assert (plan["kind"], plan["reached"], plan["deleted"]) == ("project", False, [])
    folders = {part_of(file["path"]) for file in plan["files"]}
    assert folders == {"", "basis", "adapters/a"}


@pytest.mark.usefixtures("no_network")
def test_a_base_is_the_same_at_another_commit_unless_its_weights_are_others(tmp_path: Path) -> None:
    """Each of these adapters has a basis of its own; all are of the same modules."""
    make(tmp_path)
    bases = {
        "b": replace(BASE, revision="2" * 40),
        "c": replace(BASE, revision="3" * 40, fingerprint="e" * 64),
        "d": replace(BASE, name_or_path="owner/other"),
    }
    for name, base in bases.items():
        _, adapter = make(tmp_path / "made" / name, base=base)
        Adapter.load(adapter).save(tmp_path / "adapters" / name, embed=True)
    found = dict(push_project(Project(tmp_path), "me/support", dry_run=True))
    assert list(found) == ["c", "d", "me/support"]
    plan = found["me/support"]
    assert not isinstance(plan, LoraSBError)
    assert {part_of(file["path"]) for file in plan["files"]} == {"", "basis", "adapters/a", "adapters/b"}
    assert "it is for other weights of owner/base than others here" in str(found["c"])
    assert "it is for the base model owner/other, the first one here for owner/base" in str(found["d"])


@pytest.mark.usefixtures("no_network")
def test_what_one_repository_is_refused(tmp_path: Path) -> None:
    make(tmp_path)
    for repo, options, said in [
        ("me/support", {"with_basis": True}, "in one repository the basis lies beside the adapters"),
        ("support", {}, "not a Hub repository"),
        ("me/support", {"revision": "x", "create_pr": True}, "create_pr and revision exclude each other"),
    ]:
        with pytest.raises(SettingsError, match=said):
            list(push_project(Project(tmp_path), repo, dry_run=True, **options))


def test_the_card_lists_every_figure() -> None:
    figures = {"base": None, "adapter": 0.5, "rows": 100}
    about = {"sha256": "a" * 64, "basis_sha256": "b" * 64, "task_type": "SEQ_CLS", "evaluation": {}}
    parts: dict[str, Any] = {
        "adapters/a": about | {"evaluation": {"test": {"accuracy": figures}}, "labels": ["x|y", "z"]},
        "adapters/b": about | {"task_type": "CAUSAL_LM"},
        "basis": {"sha256": "b" * 64, "rank": 4},
    }
    base = {"name_or_path": "owner/base", "revision": None}
    text = project_card({"base": base, "parts": parts}, "me/support", NOTHING)
    assert "# 2 LoRA-SB adapters for `owner/base`" in text
    assert "| a | test | accuracy | 100 | - | 0.5 |" in text
    assert "| b | - | - | - | - | - |" in text
    assert "may have chosen the checkpoint" not in text
    assert 'id2label={0: "x|y", 1: "z"}' in text
    assert "lorasb serve --adapters me/support/adapters/b " in text  # vLLM serves no classifier
    of_valid = about | {"evaluation": {"valid": {"accuracy": figures}}}
    text = project_card({"base": base, "parts": parts | {"adapters/a": of_valid}}, "me/support", NOTHING)
    assert "The `valid` rows may have chosen the checkpoint too" in text
    parts |= {f"adapters/{number}": parts["adapters/a"] for number in range(1000)}
    text = project_card({"base": base, "parts": parts}, "me/support", NOTHING)
    assert "The first 1,000 of 1,002 figures" in text
    assert text.count("| accuracy |") == 999


def test_an_index_has_no_labels(tmp_path: Path) -> None:
    """Those of thousands of classifiers are more than is read of it."""
    training = {"labels": [f"some intent's label, {number}" for number in range(77)], "regression": False}
    config = {"sha256": "a" * 64, "basis": {"source": "../../basis", "sha256": "b" * 64}, "training": training}
    config |= {"base_model_name_or_path": "owner/base", "revision": None, "base_fingerprint": "f" * 64}
    config |= {"task_type": "SEQ_CLS"}
    parts = {f"adapters/{number:04}": about("adapter", config) for number in range(5000)}
    write_json(tmp_path / "lorasb.json", make_index({"name_or_path": "owner/base"}, parts))
    found = inspect_folder(tmp_path)["parts"]
    assert len(found) == 5000
    expected = {"sha256": "a" * 64, "basis": "../../basis", "basis_sha256": "b" * 64, "base_model": "owner/base"}
    assert found["adapters/0000"] == {**expected, "task_type": "SEQ_CLS", "evaluation": {}, "regression": False}


@pytest.mark.parametrize("training", ["x", {}, {"labels": "no"}, {"labels": None}, {"labels": ["\ud800"]}])
def test_labels_that_strangers_write_are_not_shown(training: Any) -> None:
    assert labels_of(json.dumps({"training": training})) == []
    assert labels_of(b"\xff") == labels_of("") == []


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize("limit", ["_ENTRIES", "_FILES"])
def test_more_than_the_hub_recommends_is_warned_of(
    limit: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    _, adapter = make(tmp_path)
    list(push_project(Project(tmp_path), "me/support", dry_run=True))
    assert "the Hub recommends" not in caplog.text
    monkeypatch.setattr(project_repository, limit, 2)
    shutil.copytree(adapter, adapter.with_name("b"))
    list(push_project(Project(tmp_path), "me/support", dry_run=True))
    assert "will hold 2 adapters, 12 files; the Hub recommends fewer than" in caplog.text


@pytest.mark.usefixtures("no_network")
def test_inspect_of_a_copy_takes_what_strangers_write(tmp_path: Path) -> None:
    about = {"sha256": "a" * 64, "basis": "../../basis", "basis_sha256": "b" * 64, "base_model": "x", "task_type": "y"}
    figures = {"base": None, "adapter": "<b>", "rows": 10**400}
    parts: dict[str, Any] = {
        "adapters/a": about | {"evaluation": {"test": {"accuracy": figures}}, "more": 1},
        "adapters/b": about | {"evaluation": []},
        "adapters/../c": about,
        "basis": 5,
        "elsewhere": about,
    }
    write_json(tmp_path / "lorasb.json", {"kind": "project", "base": "x", "parts": parts})
    found = inspect_folder(tmp_path)
    assert (found["kind"], found["base_model"], list(found["parts"])) == ("project", None, ["adapters/a"])
    evaluation = {"test": {"accuracy": {"base": None, "adapter": None, "rows": None}}}
    assert found["parts"]["adapters/a"] == about | {"evaluation": evaluation}
    done = CliRunner().invoke(app, ["inspect", str(tmp_path)])
    assert (done.exit_code, "adapters/a" in done.stdout) == (0, True)


@pytest.mark.usefixtures("no_network")
def test_a_token_in_an_adapters_log_is_not_published(tmp_path: Path) -> None:
    _, adapter = make(tmp_path)
    (adapter / "training_log.jsonl").write_text("hf_" + "abcdefghijklmnopqrstuvwxyz")
    with pytest.raises(ArtifactError, match="an access token is in this file"):
        list(push_project(Project(tmp_path), "me/support", dry_run=True))


@pytest.mark.usefixtures("no_network")
def test_a_basis_that_was_replaced_is_not_published_with_its_adapters(tmp_path: Path) -> None:
    basis, _ = make(tmp_path)
    other, _ = make(tmp_path / "other", seed=1)
    shutil.rmtree(basis)
    other.rename(basis)
    with pytest.raises(ArtifactError, match="the adapter was trained in"):
        list(push_project(Project(tmp_path), "me/support", dry_run=True))


@pytest.mark.usefixtures("no_network")
def test_the_projects_basis_is_called_basis_there_whatever_its_folder_is_called(tmp_path: Path) -> None:
    basis, adapter = make(tmp_path)
    basis.rename(tmp_path / "my basis")
    config = read_json(adapter / "adapter_config.json")
    config["basis"]["source"] = "../../my basis"
    write_json(adapter / "adapter_config.json", sealed(config))
    plan = dict(push_project(Project(tmp_path, basis_path="my basis"), "me/support", dry_run=True))["me/support"]
    assert not isinstance(plan, LoraSBError)
    assert "basis/basis.safetensors" in [file["path"] for file in plan["files"]]


def test_weights_that_a_push_no_longer_has_are_stale() -> None:
    shards = ["model-00001-of-00002.safetensors", "model.safetensors.index.json"]
    assert stale([*shards, "notes.txt"], [], {"model.safetensors": b""}) == shards
    there = ["adapters/a/basis.safetensors", "full.safetensors"]
    assert stale(there, [], {"README.md": b"", "adapters/a/adapter.safetensors": b""}) == there[:1]


ABOUT = {"sha256": "a" * 64, "basis": "../../basis", "basis_sha256": "b" * 64, "base_model": "x", "task_type": "y"}


def test_what_is_badly_named_there_is_no_part(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = ["adapters/a", "adapters/q[1]"]
    index = {"base": {"name_or_path": "x"}, "parts": dict.fromkeys(parts, ABOUT)}
    monkeypatch.setattr(Repository, "text", lambda *_: json.dumps(index))
    head = Head(files={f"{part}/adapter.safetensors": Stored("a" * 64, large=True, size=1) for part in parts})
    assert list(others(Repository("me/support", None), head, ())) == ["adapters/a"]


def test_adapters_of_another_base_there_are_no_neighbours() -> None:
    with pytest.raises(OutputError, match=r"adapters there \(adapters/b\) are for another base model, z"):
        refuse_lost({"adapters/a": ABOUT}, {"adapters/b": ABOUT | {"base_model": "z"}}, "me/support")


def test_an_index_has_the_figures() -> None:
    config = {"sha256": "a" * 64, "basis": {"source": "../../basis", "sha256": "b" * 64}, "task_type": "SEQ_CLS"}
    config |= {"base_model_name_or_path": "owner/base", "revision": None, "base_fingerprint": "f" * 64}
    figures = {"test": {"accuracy": {"base": None, "adapter": 0.5, "rows": 100}}}
    assert about("adapter", config | {"training": {"evaluation": figures}})["evaluation"] == figures
