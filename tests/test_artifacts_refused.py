"""Folders that are damaged, or not of the format, are refused by name."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lorasb_export import Adapter, Basis
from lorasb_export.choices import SEQ_CLS
from lorasb_export.errors import ArtifactError
from lorasb_export.files.kind import artifact_kind
from tests.artifacts import copy, edit, edit_tensors


def check_refused(load: Callable[[Path], object], folder: Path, damage: Callable[[Path], object], message: str) -> None:
    damage(folder)
    with pytest.raises(ArtifactError) as error:
        load(folder)
    assert message in str(error.value)
    assert str(folder) in str(error.value)


BAD_BASIS: dict[str, tuple[Callable[[Path], object], str]] = {
    "other hash": (lambda f: edit(f, "basis_config.json", lambda c: c.update(sha256="0" * 64)), "sha256 is not"),
    "unknown key": (lambda f: edit(f, "basis_config.json", lambda c: c.update(extra=1)), "unknown extra"),
    "missing key": (lambda f: edit(f, "basis_config.json", lambda c: c.pop("rank")), "missing rank"),
    "other version": (lambda f: edit(f, "basis_config.json", lambda c: c.update(format_version=2)), "format version 2"),
    "rank too large": (lambda f: edit(f, "basis_config.json", lambda c: c.update(rank=99)), "rank 99 does not fit"),
    "other shape": (
        lambda f: edit(
            f, "basis_config.json", lambda c: c["target_modules"].update({"model.layers.0.mlp.up_proj": [64, 33]})
        ),
        "expected BF16/F16/F32/F64 [4, 33]",
    ),
    "missing tensor": (lambda f: edit_tensors(f, "basis.safetensors", lambda t: t.popitem()), "missing"),
    "wrong type": (lambda f: edit(f, "basis_config.json", lambda c: c.update(rank="4")), "rank is '4'"),
    "no shape": (
        lambda f: edit(f, "basis_config.json", lambda c: c["target_modules"].update({"model.layers.0.mlp.up_proj": 7})),
        "has no shape [out, in]",
    ),
    "base without fingerprint": (
        lambda f: edit(f, "basis_config.json", lambda c: c["base_model"].pop("fingerprint")),
        "missing fingerprint",
    ),
    "broken json": (lambda f: (f / "basis_config.json").write_text("{"), "unreadable JSON"),
    "truncated": (lambda f: os.truncate(f / "basis.safetensors", 5000), "truncated"),
    "no file": (lambda f: (f / "basis.safetensors").unlink(), "file not found"),
}


@pytest.mark.parametrize("case", BAD_BASIS)
def test_bad_basis_is_refused(case: str, folders: tuple[Path, Path], tmp_path: Path) -> None:
    check_refused(Basis.load, copy(folders[0], tmp_path / "basis"), *BAD_BASIS[case])


def nan(tensors: dict[str, torch.Tensor]) -> None:
    next(iter(tensors.values()))[0, 0] = float("nan")


def half(tensors: dict[str, torch.Tensor]) -> None:
    tensors.update({name: tensor.half() for name, tensor in tensors.items()})


def with_head(folder: Path, name: str, *shape: int) -> None:
    edit(folder, "adapter_config.json", lambda c: c.update(task_type=SEQ_CLS))
    edit_tensors(folder, "adapter.safetensors", lambda t: t.update({name: torch.ones(shape)}))


BAD_ADAPTER: dict[str, tuple[Callable[[Path], object], str]] = {
    "non-finite": (lambda f: edit_tensors(f, "adapter.safetensors", nan), "non-finite"),
    "wrong dtype": (lambda f: edit_tensors(f, "adapter.safetensors", half), "is F16 [4, 4], expected F32 [4, 4]"),
    "other rank": (lambda f: edit(f, "adapter_config.json", lambda c: c.update(r=5)), "expected F32 [5, 5]"),
    "extra tensor": (
        lambda f: edit_tensors(f, "adapter.safetensors", lambda t: t.update(junk=torch.zeros(1))),
        "unknown junk",
    ),
    "unknown key": (lambda f: edit(f, "adapter_config.json", lambda c: c.update(extra=1)), "unknown extra"),
    "wrong type": (
        lambda f: edit(f, "adapter_config.json", lambda c: c.update(target_modules="all")),
        "target_modules is",
    ),
    "scaling not finite": (
        lambda f: edit(f, "adapter_config.json", lambda c: c.update(scaling=float("nan"))),
        "scaling is nan",
    ),
    "other kind": (lambda f: edit(f, "adapter_config.json", lambda c: c.update(peft_type="LORA")), "not LORA_SB"),
    "other version": (
        lambda f: edit(f, "adapter_config.json", lambda c: c.update(format_version=9)),
        "format version 9",
    ),
    "truncated": (lambda f: os.truncate(f / "adapter.safetensors", 3000), "truncated"),
    "not safetensors": (
        lambda f: (f / "adapter.safetensors").write_bytes(b"PK\x03\x04" + b"\xff" * 64),
        "not a safetensors file",
    ),
    "a head that is a weight of the body": (
        lambda f: with_head(f, "model.embed_tokens.weight", 2, 3),
        "model.embed_tokens.weight [2, 3] is no tensor of a classifier's head",
    ),
    "a head without numbers": (lambda f: with_head(f, "score.weight", 0, 32), "score.weight [0, 32] is no tensor"),
    "empty file": (lambda f: (f / "adapter.safetensors").write_bytes(b""), "not a safetensors file"),
}


@pytest.mark.parametrize("case", BAD_ADAPTER)
def test_bad_adapter_is_refused(case: str, folders: tuple[Path, Path], tmp_path: Path) -> None:
    check_refused(Adapter.load, copy(folders[1], tmp_path / "a"), *BAD_ADAPTER[case])


@pytest.mark.parametrize(
    "training",
    [
        {"data": ["a.jsonl", "b.jsonl"]},
        {"settings": None},
        {"evaluation": {"accuracy": 0.93}},
        {"evaluation": {"test": {"accuracy": 0.93}}},
        {"evaluation": {"test": {"accuracy": {"adapter": 0.93}}}},
    ],
)
def test_what_a_card_reads_of_the_training_has_its_shape(
    training: dict[str, Any], folders: tuple[Path, Path], tmp_path: Path
) -> None:
    adapter, (key,) = Adapter.load(folders[1]), training
    adapter.training = training
    with pytest.raises(ArtifactError, match=f"training says {key} in another shape"):
        adapter.save(tmp_path / "a")
    assert not (tmp_path / "a").exists()
    edit(copy(folders[1], tmp_path / "b"), "adapter_config.json", lambda config: config.update(training=training))
    with pytest.raises(ArtifactError, match=rf"training says {key} .* \(.*/b/adapter_config.json\)"):
        Adapter.load(tmp_path / "b")
    adapter.training = {"notes": ["anything"], "evaluation": {"test": {"f1": {"base": None, "adapter": 1, "rows": 2}}}}
    adapter.save(tmp_path / "a")
    assert "| test | f1 | 2 | - | 1 |" in (tmp_path / "a" / "README.md").read_text()


@pytest.mark.parametrize("note", ["{}", '{"kind": "other"}', '{"kind": {}}'])
def test_a_folder_of_a_kind_that_nobody_knows_is_of_none(note: str, tmp_path: Path) -> None:
    (tmp_path / "lorasb.json").write_text(note)
    with pytest.raises(ArtifactError, match="neither a basis, an adapter nor a model folder"):
        artifact_kind(tmp_path)
