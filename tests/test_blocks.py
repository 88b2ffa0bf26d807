"""A basis of blocks: its file holds their places alone, which must lie within the weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lorasb_export import Adapter, Basis, calibrate
from lorasb_export.base.model import BaseModel
from lorasb_export.errors import ArtifactError
from lorasb_export.files.storage import read_header, sha256_file
from lorasb_export.settings import CalibrationSettings
from tests.artifacts import copy, edit, edit_tensors


@pytest.fixture(scope="module")
def blocks(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved basis of blocks."""
    folder = tmp_path_factory.mktemp("blocks") / "basis"
    calibrate(str(llama), {}, CalibrationSettings(rank=4, directions="block")).save(folder)
    return folder


def test_of_a_block_the_file_holds_its_place_alone(blocks: Path, tmp_path: Path) -> None:
    header = read_header(blocks / "basis.safetensors")
    assert all(name.endswith(".block") and info.nbytes == 32 for name, info in header.items())
    Basis.load(blocks).save(tmp_path / "again")
    for name in ("basis.safetensors", "basis_config.json", "README.md"):
        assert (tmp_path / "again" / name).read_bytes() == (blocks / name).read_bytes()


def test_an_adapter_in_blocks_stands_alone(llama: Path, blocks: Path, tmp_path: Path) -> None:
    Adapter.attach(BaseModel.resolve(llama).load(), Basis.load(blocks)).save(tmp_path / "a")
    adapter = Adapter.load(tmp_path / "a")
    assert adapter.basis_source is None
    assert adapter.load_basis().sha256 == Basis.load(blocks).sha256


@pytest.mark.parametrize(
    "block", [[[-1, 3], [0, 4]], [[0, 5], [0, 4]], [[0, 4], [29, 33]], [[4, 0], [0, 4]], [[0.0, 4.0], [0.0, 4.0]]]
)
def test_a_block_outside_of_its_weight_is_refused(blocks: Path, tmp_path: Path, block: list[list[float]]) -> None:
    bad, name = copy(blocks, tmp_path / "bad"), "model.layers.0.self_attn.q_proj.block"
    edit_tensors(bad, "basis.safetensors", lambda tensors: tensors.update({name: torch.tensor(block)}))
    edit(bad, "basis_config.json", lambda c: c.update(sha256=sha256_file(bad / "basis.safetensors")))
    with pytest.raises(ArtifactError, match=rf"tensor {name} is "):
        Basis.load(bad)
