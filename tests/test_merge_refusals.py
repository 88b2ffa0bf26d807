"""Merges that are refused before a byte is written."""

from __future__ import annotations

import errno
import json
import os
import shutil
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lorasb_export import Adapter, calibrate, export, fit, merge
from lorasb_export.base.model import BaseModel
from lorasb_export.errors import ArtifactError, BaseModelError, OutputError, SettingsError
from lorasb_export.files.atomic import atomic_file
from lorasb_export.settings import CalibrationSettings, FitSettings
from tests.merging import adapter_for
from tests.random_adapter import BERT_MODULES
from tests.tiny import write_index


def test_refusals_write_nothing(llama: Path, tmp_path: Path) -> None:
    adapter = adapter_for(llama, tmp_path / "a")
    before = sorted(tmp_path.rglob("*"))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("years of work")
    with pytest.raises(OutputError, match="the target exists"):
        merge(adapter, tmp_path / "full")
    assert (tmp_path / "full" / "thesis.txt").read_text() == "years of work"
    shutil.rmtree(tmp_path / "full")
    with pytest.raises(BaseModelError, match="not found"):
        merge(adapter, tmp_path / "model", base=tmp_path / "nowhere")
    with pytest.raises(ArtifactError, match="file not found"):
        merge(tmp_path, tmp_path / "model")
    with pytest.raises(SettingsError, match="is not a whole number with"):
        merge(adapter, tmp_path / "model", max_shard_size="many")
    assert sorted(tmp_path.rglob("*")) == before


def test_no_adapter_is_nothing_to_merge(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"no adapter to merge. Name at least one"):
        merge({}, tmp_path / "out")


def test_another_and_a_merged_base_are_refused(llama: Path, tmp_path: Path) -> None:
    adapter = adapter_for(llama, tmp_path / "a")
    merge(adapter, tmp_path / "model")
    with pytest.raises(BaseModelError, match="already merged"):
        merge(adapter, tmp_path / "twice", base=tmp_path / "model")
    (tmp_path / "model" / "lorasb.json").write_text('{"kind": "merged"}')  # edited by hand
    with pytest.raises(BaseModelError, match="already merged"):
        merge(adapter, tmp_path / "twice", base=tmp_path / "model")
    (tmp_path / "model" / "lorasb.json").unlink()  # and without the note, by the fingerprint
    with pytest.raises(BaseModelError, match="not those the artifact was made for"):
        merge(adapter, tmp_path / "twice", base=tmp_path / "model")
    assert not (tmp_path / "twice").exists()


def test_a_base_that_is_held_is_looked_at_for_each_merge(llama: Path, tmp_path: Path) -> None:
    """Its file is replaced between the two by another of the same size, as old as the first."""
    base = BaseModel.resolve(shutil.copytree(llama, tmp_path / "base"))
    adapter, file = adapter_for(base.folder, tmp_path / "a"), base.folder / "model.safetensors"
    merge(adapter, tmp_path / "model", base=base)
    before = file.stat()
    save_file({name: 1.1 * weight for name, weight in load_file(file).items()}, file, {"format": "pt"})
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(BaseModelError, match="not those the artifact was made for"):
        merge(adapter, tmp_path / "again", base=base)
    assert not (tmp_path / "again").exists()


def test_adapters_of_two_bases_in_one_block_are_not_put_together(llama: Path, tmp_path: Path) -> None:
    """The sha256 of their bases is one and the same."""
    other = shutil.copytree(llama, tmp_path / "other")
    weights = load_file(other / "model.safetensors")
    save_file({name: 1.1 * weight for name, weight in weights.items()}, other / "model.safetensors", {"format": "pt"})
    a, b = (adapter_for(base, tmp_path / name, directions="block") for base, name in ((llama, "a"), (other, "b")))
    assert Adapter.load(a).basis_sha256 == Adapter.load(b).basis_sha256
    with pytest.raises(BaseModelError, match="not those the artifact was made for"):
        merge({a: 1.0, b: 1.0}, tmp_path / "out")
    pytest.importorskip("onnxruntime_genai")
    for adapters in ([a, b], [b, a]):
        with pytest.raises(BaseModelError, match="not those the artifact was made for"):
            export(adapters, tmp_path / "out", format="onnx-adapters")
    assert not (tmp_path / "out").exists()


def test_a_merged_model_is_the_base_of_nothing(llama: Path, sums: Path, tmp_path: Path) -> None:
    """What is calibrated or trained on it would be refused by all else, once the time is spent."""
    merge(adapter_for(llama, tmp_path / "a"), tmp_path / "model")
    base, before = str(tmp_path / "model"), sorted(tmp_path.rglob("*"))
    gradient, drawn = CalibrationSettings(rank=4), CalibrationSettings(rank=4, directions="random")
    for attempt in (
        lambda: calibrate(base, {"sums": sums}, gradient),
        lambda: calibrate(base, {}, drawn),
        lambda: fit(base, gradient, sums, tmp_path / "b", FitSettings(max_steps=1)),
        lambda: fit(base, calibrate(str(llama), {}, drawn), sums, tmp_path / "b", FitSettings(max_steps=1)),
    ):
        with pytest.raises(BaseModelError, match=rf"already merged .*Use the plain base, {llama}"):
            attempt()
    assert sorted(tmp_path.rglob("*")) == before


def test_a_tensor_of_another_shape_is_refused(llama: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(llama, base)
    adapter = Adapter.load(adapter_for(base, tmp_path / "a"))
    tensors = load_file(base / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"] = torch.zeros(64, 40)
    save_file(tensors, base / "model.safetensors")
    adapter.base = BaseModel.resolve(base).ref(adapter.R)  # the fingerprint alone would catch it
    with pytest.raises(ArtifactError, match=r"is F32 \[64, 40\], the basis was made for \[64, 32\]"):
        merge(adapter, tmp_path / "model")


def test_no_disk_space_is_seen_before_writing(llama: Path, tmp_path: Path) -> None:
    """A base that claims 8 TB in a sparse file: no disk here has room for it."""
    base = tmp_path / "base"
    shutil.copytree(llama, base)
    adapter = adapter_for(base, tmp_path / "a")
    elements = 2 * 10**12
    header = {"huge": {"dtype": "F32", "shape": [elements], "data_offsets": [0, 4 * elements]}}
    text = json.dumps(header).encode()
    with (base / "huge.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + 4 * elements)
    write_index(base)
    with pytest.raises(OutputError, match=r"not enough disk: 8000\.0 GB needed"):
        merge(adapter, tmp_path / "model")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "base"]


@pytest.mark.parametrize("of_a_classifier", [False, True])
def test_a_damaged_tokenizer_is_seen_before_writing(
    of_a_classifier: bool, llama: Path, bert: Path, tmp_path: Path
) -> None:
    """Not once the last shard is written, which would all be gone then."""
    base = shutil.copytree(bert if of_a_classifier else llama, tmp_path / "base")
    what = (BERT_MODULES, "SEQ_CLS") if of_a_classifier else ()
    adapter = adapter_for(base, tmp_path / "a", *what)
    (base / "tokenizer.json").write_text('{"truncated')
    for dry_run in (True, False):
        with pytest.raises(BaseModelError, match=r"cannot load the base: .*base\). Fetch"):
            merge(adapter, tmp_path / "model", dry_run=dry_run)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "base"]


def test_what_is_merged_is_not_overwritten(llama: Path, tmp_path: Path) -> None:
    adapter = adapter_for(llama, tmp_path / "adapters" / "a")
    for out, why in ((adapter, "the target holds what it is made from"), (adapter.parent, "not a folder lorasb wrote")):
        with pytest.raises(OutputError, match=why):
            merge(adapter, out, overwrite=True)
    assert (adapter / "adapter.safetensors").exists()
    with pytest.raises(SettingsError, match="the report's folder is not there"):
        merge(adapter, tmp_path / "model", report=tmp_path / "nowhere" / "kept.json")
    (tmp_path / "kept.png").write_text("a picture of mine")
    with pytest.raises(OutputError, match=r"the report exists \(.*kept\.png\)"):
        merge(adapter, tmp_path / "model", report=tmp_path / "kept.json")
    assert not (tmp_path / "model").exists()


def test_a_report_that_cannot_be_written_is_told_before_the_merge(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where that is seen only then, the model is told of too."""
    adapter = adapter_for(llama, tmp_path / "a")
    really_open = os.open

    def refuse(path: str | Path, flags: int, *mode: int) -> int:
        if "kept" in Path(path).name and flags & os.O_CREAT:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return really_open(path, flags, *mode)

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", refuse)
        with pytest.raises(
            OutputError, match=r"cannot write: Permission denied \(.*kept\.json\)\. Choose another path"
        ):
            merge(adapter, tmp_path / "model", report=tmp_path / "kept.json")
        merge(adapter, tmp_path / "model", report=tmp_path / "kept.json", dry_run=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a"]
    for name in ("kept.json", "kept.png"):

        def full(path: Path, of: str = name) -> AbstractContextManager[Path]:
            if path.name == of:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
            return atomic_file(path)

        monkeypatch.setattr("lorasb_export.merging.retained.atomic_file", full)
        with pytest.raises(
            OutputError, match=rf"No space left on device \(.*{name}\)\. The model is whole, in .*model;"
        ):
            merge(adapter, tmp_path / "model", report=tmp_path / "kept.json", overwrite=True)
        assert (tmp_path / "model" / "model.safetensors").is_file()


def test_dry_run_writes_nothing(llama: Path, tmp_path: Path) -> None:
    plan = merge(adapter_for(llama, tmp_path / "a"), tmp_path / "model", dry_run=True)
    assert (plan["modules"], plan["shards"]) == (6, 1)
    assert plan["bytes"] == sum(t.numel() * 4 for t in load_file(llama / "model.safetensors").values())
    assert not (tmp_path / "model").exists()
