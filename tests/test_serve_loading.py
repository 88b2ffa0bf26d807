"""How the plugin reads an adapter's R, and which it refuses."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lorasb_export.adapter import Adapter
from lorasb_export.basis import Basis
from lorasb_export.errors import ArtifactError, OutputError
from lorasb_export.files.storage import read_json, write_json
from lorasb_export.format import sealed
from lorasb_export.serving.shared.loading import copy_adapter, load_R
from tests import serving
from tests.serving import MODULES

adapter = serving.adapter


def load(adapter: Adapter) -> tuple[list[str], torch.Tensor]:
    assert adapter.folder is not None
    return load_R(adapter.folder, Basis.load(adapter.folder))


def test_R_is_read_as_one_block(adapter: Adapter) -> None:
    names, R = load(adapter)
    for name, matrix in zip(names, R, strict=True):
        torch.testing.assert_close(matrix, adapter.scaling * adapter.R[name], rtol=0, atol=0)
    assert sorted(names) == sorted(MODULES)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peft_type": "LORA"}, "peft_type is 'LORA'"),
        ({"format_version": 2}, "format version 2"),
        ({"basis": {"sha256": "0" * 64, "source": "embedded"}}, "another basis"),
        ({"scaling": math.inf}, "non-finite"),
    ],
)
def test_a_foreign_config_is_refused(adapter: Adapter, change: dict[str, object], message: str) -> None:
    assert adapter.folder is not None
    path = adapter.folder / "adapter_config.json"
    write_json(path, sealed(read_json(path) | change))
    with pytest.raises(ArtifactError, match=message):
        load(adapter)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("nan", "non-finite"),
        ("minus infinity", "non-finite"),
        ("shape", "not F32"),
        ("dtype", "not F32"),
        ("missing", "not one R for each module"),
        ("truncated", "truncated"),
        ("one bit", "not the tensors that the config names"),
        ("another version's", "not the tensors that the config names"),
    ],
)
def test_damaged_tensors_are_refused(adapter: Adapter, damage: str, message: str) -> None:
    assert adapter.folder is not None
    path = adapter.folder / "adapter.safetensors"
    tensors = load_file(path)
    key = f"{MODULES[0]}.R"
    if damage == "nan":
        tensors[key][1, 2] = math.nan
    elif damage == "minus infinity":
        tensors[key][1, 2] = -math.inf
    elif damage == "shape":
        tensors[key] = tensors[key][:2].contiguous()
    elif damage == "dtype":
        tensors[key] = tensors[key].half()
    elif damage == "missing":
        del tensors[key]
    elif damage == "another version's":
        tensors[key] += 1
    save_file(tensors, path)
    content = bytearray(path.read_bytes())
    if damage == "truncated":
        del content[-5:]
    elif damage == "one bit":
        content[-2] ^= 0x10
    path.write_bytes(content)
    with pytest.raises(ArtifactError, match=message):
        load(adapter)


def test_an_adapter_that_cannot_be_read_is_no_full_disk(adapter: Adapter, tmp_path: Path) -> None:
    """As while `fit --overwrite` puts another one in its place."""
    with pytest.raises(ArtifactError, match="cannot read the adapter: No such file"):
        copy_adapter(tmp_path / "gone", tmp_path / "copy")
    assert adapter.folder is not None
    with pytest.raises(OutputError, match="Set TMPDIR"):
        copy_adapter(adapter.folder, tmp_path / "nowhere" / "copy")
