"""What a push plans and refuses, as far as it goes without a network; integration/test_push.py goes on from here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from lorasb_export import Adapter, push
from lorasb_export.errors import ArtifactError, SettingsError
from lorasb_export.files.storage import write_json
from lorasb_export.inspection import inspect_folder
from lorasb_export.publishing.outgoing import SUMS
from tests.pushing import contents, make

pytestmark = pytest.mark.usefixtures("no_network")


def test_a_dry_run_plans_and_changes_nothing(tmp_path: Path) -> None:
    basis, _ = make(tmp_path)
    before = contents(basis)
    plan = push(basis, "me/basis", dry_run=True)
    assert (plan["repo"], plan["kind"], plan["private"]) == ("me/basis", "basis", True)
    assert [file["path"] for file in plan["files"]] == ["README.md", SUMS, "basis.safetensors", "basis_config.json"]
    assert plan["bytes"] == sum(file["bytes"] for file in plan["files"])
    assert plan["card"]["base_model"] == "owner/base"
    assert "commit" not in plan
    assert (plan["reached"], plan["parent"], plan["sent"]) == (False, None, plan["bytes"])
    assert "+# A LoRA-SB basis for `owner/base`" in plan["card_diff"].splitlines()
    assert contents(basis) == before
    json.dumps(plan)


def test_an_adapter_takes_its_local_basis_along_when_asked(tmp_path: Path) -> None:
    _, adapter = make(tmp_path)
    before = contents(adapter)
    plan = push(adapter, "me/a", with_basis=True, dry_run=True)
    assert plan["basis"] == "embedded"
    assert {"basis.safetensors", "basis_config.json"} <= {file["path"] for file in plan["files"]}
    assert contents(adapter) == before


def test_an_adapter_whose_basis_nobody_finds_is_refused(tmp_path: Path) -> None:
    basis, adapter = make(tmp_path)
    with pytest.raises(ArtifactError) as caught:
        push(adapter, "me/a", dry_run=True)
    assert str(caught.value) == (
        f"nobody else could find this adapter's basis, a local folder ({basis}). Push the basis first and name it "
        "with --basis-repo, or upload it in the adapter with --with-basis"
    )
    plan = push(adapter, "me/a", basis_repo="me/basis", dry_run=True)  # the Hub does not answer: not pinned
    assert plan["basis"] == "me/basis"
    assert [file["path"] for file in plan["files"]] == ["README.md", SUMS, "adapter.safetensors", "adapter_config.json"]


@pytest.mark.parametrize(
    ("kind", "there", "missing"),
    [
        ("peft", ["adapter_model.bin"], "adapter_model.safetensors"),
        ("onnx", ["model.onnx_data"], "model.onnx"),
        ("onnx-adapters", ["model.onnx", "a.onnx_adapter"], "basis.onnx_data and no model.onnx_data"),
        ("onnx-adapters", ["model.onnx", "model.onnx_data", "basis.onnx_data"], "a.onnx_adapter"),
    ],
)
def test_a_folder_without_its_weights_is_refused(tmp_path: Path, kind: str, there: list[str], missing: str) -> None:
    for name in there:
        (tmp_path / name).write_bytes(b"\x0fmodel.onnx_data \x0fbasis.onnx_data")
    config = "adapter_config.json" if kind == "peft" else "lorasb.json"
    write_json(tmp_path / config, {"kind": kind, "peft_type": "LORA", "adapters": {"a": {}}})
    with pytest.raises(ArtifactError) as caught:
        push(tmp_path, "me/x", dry_run=True)
    assert caught.value.what == f"the folder has no {missing}"


def test_a_plain_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ArtifactError, match="a folder of kind 'base' is not pushed"):
        push(tmp_path, "me/model", dry_run=True)


def test_damage_is_refused(tmp_path: Path) -> None:
    basis, adapter = make(tmp_path)
    for folder in (basis, adapter):  # never pushed: each has its config to be compared with
        config = "basis_config.json" if folder == basis else "adapter_config.json"
        assert inspect_folder(folder, verify=True)["verified"] == {"against": config}
    data = (basis / "basis.safetensors").read_bytes()
    (basis / "basis.safetensors").write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    for folder in (basis, adapter):
        with pytest.raises(ArtifactError, match="sha256 is not"):
            push(folder, "me/x", with_basis=folder == adapter, dry_run=True)
    with pytest.raises(ArtifactError, match="sha256 is not"):
        inspect_folder(basis, verify=True)


@pytest.mark.parametrize(
    ("repo", "options", "message"),
    [
        ("basis", {}, "not a Hub repository (basis). Give owner/name"),
        ("me/a/b", {}, "not a Hub repository (me/a/b). Give owner/name"),
        ("me/a", {"basis_repo": "x"}, "not a Hub repository (x). Give owner/name"),
        ("me/a", {"create_pr": True, "revision": "b"}, "create_pr and revision exclude each other. Leave one out"),
        (
            "me/a",
            {"basis_repo": "me/b", "with_basis": True},
            "basis_repo and with_basis exclude each other. Leave one out",
        ),
        ("me/a", {"basis_repo": "me/b"}, "basis_repo and with_basis are for adapters ({}). Leave it out"),
    ],
)
def test_wrong_options(tmp_path: Path, repo: str, options: dict[str, Any], message: str) -> None:
    basis, _ = make(tmp_path)
    with pytest.raises(SettingsError) as caught:
        push(basis, repo, dry_run=True, **options)
    assert str(caught.value) == message.format(basis)


def test_a_basis_inside_is_not_sent_where_it_has_a_repository(tmp_path: Path) -> None:
    _, adapter = make(tmp_path)
    found = Adapter.load(adapter)
    found.load_basis()
    found.save(tmp_path / "adapters" / "e", embed=True)
    plan = push(tmp_path / "adapters" / "e", "me/e", basis_repo="me/basis", dry_run=True)
    assert not [file["path"] for file in plan["files"] if file["path"].startswith("basis")]


def test_a_merged_model_that_is_cut_short_is_refused(tmp_path: Path) -> None:
    write_json(tmp_path / "config.json", {"model_type": "llama"})
    write_json(tmp_path / "lorasb.json", {"kind": "merged"})
    save_file({"x": torch.zeros(64)}, tmp_path / "model.safetensors")
    data = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(data[:-1])
    with pytest.raises(ArtifactError, match=r"model\.safetensors"):
        push(tmp_path, "me/merged", dry_run=True)
