"""What `inspect` says of a folder: what it finds, not what is recorded."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lorasb_export.errors import ArtifactError
from lorasb_export.exporting.onnx_record import write_record
from lorasb_export.files.storage import read_json, write_json
from lorasb_export.inspection import inspect_folder
from lorasb_export.project.project import Project
from lorasb_export.publishing.outgoing import SUMS
from tests.conftest import lorasb


def test_inspect_believes_what_it_finds_not_what_is_recorded(llama: Path, tmp_path: Path) -> None:
    merged = tmp_path / "merged"
    shutil.copytree(llama, merged)
    write_json(merged / "lorasb.json", {"kind": "merged", "bytes": -1, "verified": {"against": SUMS}, "rank": 4})
    found = inspect_folder(merged)
    assert (found["kind"], found["rank"], found["tensors"] > 2) == ("merged", 4, True)
    assert found["bytes"] > 0
    assert "verified" not in found
    weights = (merged / "model.safetensors").read_bytes()
    (merged / "model.safetensors").write_bytes(weights[:-1])
    with pytest.raises(ArtifactError, match="truncated"):
        inspect_folder(merged)


def test_inspect_of_an_onnx_folder_whose_record_was_edited(tmp_path: Path) -> None:
    write_record(tmp_path, {"kind": "onnx", "precision": "fp32"})
    assert inspect_folder(tmp_path)["precision"] == "fp32"
    write_json(tmp_path / "lorasb.json", read_json(tmp_path / "lorasb.json") | {"precision": "int4"})
    with pytest.raises(ArtifactError, match="the config is not as it was written"):
        inspect_folder(tmp_path)


def test_inspect_of_a_peft_folder_that_others_wrote(tmp_path: Path) -> None:
    config = {"peft_type": "LORA", "r": 8, "target_modules": ["q_proj"], "base_model_name_or_path": "owner/base"}
    write_json(tmp_path / "adapter_config.json", config)
    save_file({"x": torch.zeros(2)}, tmp_path / "adapter_model.safetensors")
    found = inspect_folder(tmp_path)
    assert (found["kind"], found["rank"], found["target_modules"]) == ("peft", 8, ["q_proj"])
    assert (found["base_model"], found["tensors"]) == ("owner/base", 1)


def test_of_what_there_are_many_the_first_are_printed(tmp_path: Path) -> None:
    names = [f"label{number}" for number in range(41)]
    write_record(tmp_path, {"kind": "onnx", "labels": names, "few": names[:2]})
    said = lorasb("inspect", str(tmp_path)).stdout
    assert f"labels: {', '.join(names[:40])} and 1 more (--json lists all)\n" in said
    assert "few: ['label0', 'label1']\n" in said
    adapter = {"sha256": "1" * 64, "basis": "../../basis", "basis_sha256": "0" * 64, "base_model": "owner/base"}
    parts = {f"adapters/{name}": {**adapter, "task_type": "CAUSAL_LM"} for name in (*names, *"abcdefghij")}
    basis = {"basis": {"sha256": "0" * 64, "rank": 4, "base_model": "owner/base"}}
    write_json(
        tmp_path / "lorasb.json", {"kind": "project", "base": {"name_or_path": "owner/base"}, "parts": parts | basis}
    )
    lines = lorasb("inspect", str(tmp_path)).stdout.splitlines()
    assert lines[3].startswith("basis ")
    assert (len(lines), lines[-1]) == (3 + 40 + 1, "… and 12 more (--json lists all)")


def test_a_folder_that_hides_an_adapter_is_told_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for folder in ("billing", "adapters/billing"):
        (tmp_path / folder).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    for word in (".", "./billing", "adapters/billing"):
        assert Project.load().find_folder(word) == word
    assert not caplog.text
    assert Project.load().find_folder("billing") == "billing"
    assert "billing is taken for the folder of that name here; the adapter is adapters/billing" in caplog.text


def test_a_path_that_a_task_hides_is_told_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("lorasb.toml").write_text('[tasks.a]\ndata = "./rows"\n')
    project = Project.load()
    assert str(project.find_data("a")) == str(tmp_path / "rows")
    assert not caplog.text
    Path("a").mkdir()
    assert str(project.find_data("a")) == str(tmp_path / "rows")
    assert "a is taken for the task: ./a names the path" in caplog.text
    assert str(project.find_data("./a")) == "./a"
