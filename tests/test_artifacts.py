"""The two folders of the format: what is in them, byte-stable, whole or not at all."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lorasb_export import Adapter, Basis
from lorasb_export.errors import ArtifactError, OutputError
from lorasb_export.files.storage import read_header
from lorasb_export.provenance import adapter_provenance, published_training
from tests.artifacts import copy, edit


def test_both_are_printed_in_a_line(folders: tuple[Path, Path], llama: Path) -> None:
    basis, adapter = Basis.load(folders[0]), Adapter.load(folders[1])
    digest, of = basis.sha256[:12], f"14 modules of {llama}"
    assert repr(basis) == f"<Basis {folders[0]}: rank 4 for {of}>"
    assert repr(adapter) == f"<Adapter a: CAUSAL_LM, rank 4 on {of}, basis {digest}>"


def test_basis_save_load_save_is_byte_stable(folders: tuple[Path, Path], tmp_path: Path) -> None:
    Basis.load(folders[0]).save(tmp_path / "again")
    for name in ("basis.safetensors", "basis_config.json", "README.md"):
        assert (tmp_path / "again" / name).read_bytes() == (folders[0] / name).read_bytes()


def test_oracle_22_save_load_save_is_byte_stable(folders: tuple[Path, Path]) -> None:
    target = folders[1].parent / "again"
    Adapter.load(folders[1]).save(target)
    for name in ("adapter.safetensors", "adapter_config.json", "README.md"):
        assert (target / name).read_bytes() == (folders[1] / name).read_bytes()


def test_oracle_22_the_file_holds_R_alone_in_one_block(folders: tuple[Path, Path]) -> None:
    """Oracle 22: the R-only file is r²·modules·4 bytes and a header; keys sorted."""
    header = read_header(folders[1] / "adapter.safetensors")
    assert list(header) == sorted(header)
    assert all(name.endswith(".R") and info.dtype == "F32" for name, info in header.items())
    assert sum(info.nbytes for info in header.values()) == 14 * 4 * 4 * 4


def test_config_keys_are_those_of_the_format(folders: tuple[Path, Path]) -> None:
    basis, adapter = (
        json.loads((f / n).read_text())
        for f, n in zip(folders, ("basis_config.json", "adapter_config.json"), strict=True)
    )
    assert set(basis) == {
        "format_version",
        "base_model",
        "rank",
        "target_modules",
        "sha256",
        "calibration",
        "created_with",
        "config_sha256",
    }
    assert set(basis["base_model"]) == {"name_or_path", "revision", "fingerprint"}
    assert adapter["peft_type"] == "LORA_SB"
    assert set(adapter) == {
        *("peft_type", "format_version", "base_model_name_or_path", "revision", "base_fingerprint", "task_type", "r"),
        *("scaling", "target_modules", "basis", "training", "sha256", "config_sha256"),
    }
    assert adapter["basis"] == {"sha256": basis["sha256"], "source": "../../basis"}


def test_peft_refuses_our_folder(folders: tuple[Path, Path]) -> None:
    from peft import PeftConfig

    with pytest.raises((KeyError, ValueError), match="LORA_SB"):
        PeftConfig.from_pretrained(str(folders[1]))


def test_an_adapter_is_where_and_what_it_was_saved_as(
    folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    adapter = Adapter.fresh(Basis.load(folders[0]))
    assert adapter.name is None
    adapter.save("mine")
    assert (adapter.name, adapter.folder) == ("mine", tmp_path / "mine")
    adapter.hub_source = "me/theirs@0123"
    adapter.save("copy")
    assert (adapter.name, adapter_provenance(adapter)) == ("copy", adapter_provenance(Adapter.load("copy")))


def test_what_was_measured_of_another_r_is_not_saved_with_this_one(
    folders: tuple[Path, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    figures = {"test": {"accuracy": {"base": 0.5, "adapter": 0.97, "rows": 100}}}
    trained = Adapter.load(folders[1])
    trained.training = {"task": "a", "settings": {"rank": 4}, "steps": 300, "valid_loss": 0.1, "evaluation": figures}
    trained.save(tmp_path / "trained")
    assert Adapter.load(tmp_path / "trained").training == trained.training  # of a record of one's own nothing is lost
    for own in ({}, {"evaluation": {}, "steps": 300, "valid_loss": 0.1}):
        adapter = Adapter.load(tmp_path / "trained")
        next(iter(adapter.R.values())).mul_(0.5)  # as a `Stack` or a loop of one's own trains it on
        adapter.training = {**adapter.training, **own}
        adapter.save(tmp_path / "on", overwrite=True)
        assert Adapter.load(tmp_path / "on").training == {"task": "a", "settings": {"rank": 4}, **own}
        assert "0.97" not in (tmp_path / "on" / "README.md").read_text()
    told = [message for message in caplog.messages if "has changed since it was loaded" in message]
    assert [message.partition("without ")[2] for message in told] == ["evaluation, steps, valid_loss"]


def test_an_adapter_or_a_basis_is_a_key(folders: tuple[Path, Path]) -> None:
    for load, folder in ((Basis.load, folders[0]), (Adapter.load, folders[1])):
        one, two = load(folder), load(folder)
        assert {one: 0.5, two: 0.25}[one] == 0.5
        assert two in [one, two]


def test_the_picture_of_the_curve_goes_where_the_adapter_is_published(
    folders: tuple[Path, Path], tmp_path: Path
) -> None:
    adapter = copy(folders[1], tmp_path / "adapter")
    edit(adapter, "adapter_config.json", lambda config: config["training"].update(plot="../secret.png"))
    (tmp_path / "secret.png").write_bytes(b"secret")
    for with_picture, plot in ((False, None), (True, "training.png")):
        if with_picture:
            (adapter / "training.png").write_bytes(b"curve")
        into = tmp_path / f"into-{with_picture}"
        into.mkdir()
        loaded = Adapter.load(adapter)
        assert published_training(loaded, into).get("plot") == plot
        assert [path.read_bytes() for path in into.iterdir()] == [b"curve"] * with_picture
    assert "plot" not in published_training(Adapter.load(adapter))  # nowhere to copy it to


def test_an_existing_target_is_kept(folders: tuple[Path, Path]) -> None:
    before = (folders[0] / "basis.safetensors").read_bytes()
    with pytest.raises(OutputError, match="the target exists"):
        Basis.load(folders[0]).save(folders[0])
    assert (folders[0] / "basis.safetensors").read_bytes() == before


def test_a_basis_is_not_written_under_the_digest_of_other_bytes(folders: tuple[Path, Path], tmp_path: Path) -> None:
    basis = Basis.load(folders[0])
    basis.__dict__["sha256"] = "0" * 64  # as of a file that another version of safetensors laid out
    with pytest.raises(ArtifactError, match="lays the basis out otherwise"):
        basis.save(tmp_path / "again")
