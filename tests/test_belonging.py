"""An adapter, its basis and the base belong together: others are refused."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from lorasb_export import Adapter, Basis, calibrate
from lorasb_export.base.model import BaseModel
from lorasb_export.belonging import check_same_basis
from lorasb_export.errors import ArtifactError, BaseModelError
from lorasb_export.inspection import inspect_folder
from lorasb_export.settings import CalibrationSettings
from tests.artifacts import copy, edit, edit_tensors
from tests.tiny import make_llama


def test_oracle_22_an_adapter_of_another_basis_is_refused(
    folders: tuple[Path, Path], llama: Path, sums: Path, tmp_path: Path
) -> None:
    other = calibrate(str(llama), {"sums": sums}, CalibrationSettings(rank=4, seed=9))
    with pytest.raises(ArtifactError, match="trained in basis"):
        check_same_basis(Adapter.load(folders[1]), other)
    other.save(tmp_path / "basis")
    folder = copy(folders[1], tmp_path / "adapters" / "a")
    edit(folder, "adapter_config.json", lambda c: c["basis"].update(source="../../basis"))
    with pytest.raises(ArtifactError, match="do not belong together"):
        Adapter.load(folder).load_basis()
    found = inspect_folder(folder)
    assert (found["basis_matches"], "do not belong together" in found["basis_problem"]) == (False, True)
    total = math.hypot(*(found["scaling"] * float(R.norm()) for R in Adapter.load(folder).R.values()))
    assert found["update_norm"]["total"] == pytest.approx(total, rel=1e-5)
    assert inspect_folder(folders[1])["basis_matches"] is True


def test_oracle_22_an_adapter_of_another_rank_is_refused(folders: tuple[Path, Path], llama: Path, sums: Path) -> None:
    other = calibrate(str(llama), {"sums": sums}, CalibrationSettings(rank=5))
    with pytest.raises(ArtifactError, match="rank 4, the basis has 5"):
        check_same_basis(Adapter.load(folders[1]), other)


def test_oracle_22_an_adapter_of_another_target_set_is_refused(
    folders: tuple[Path, Path], llama: Path, sums: Path
) -> None:
    other = calibrate(str(llama), {"sums": sums}, CalibrationSettings(rank=4, targets="q_proj"))
    with pytest.raises(ArtifactError, match="target modules differ"):
        check_same_basis(Adapter.load(folders[1]), other)


def test_oracle_22_another_base_is_refused(folders: tuple[Path, Path], llama: Path, tmp_path: Path) -> None:
    adapter = Adapter.load(folders[1])
    BaseModel.resolve(llama).verify(adapter.base, adapter.R)
    other = copy(llama, tmp_path / "other")
    edit_tensors(other, "model.safetensors", lambda t: t["model.layers.1.mlp.up_proj.weight"].add_(0.01))
    with pytest.raises(BaseModelError, match="not those the artifact was made for"):
        BaseModel.resolve(other).verify(adapter.base, adapter.R)


def test_missing_module_is_refused(folders: tuple[Path, Path], tmp_path: Path) -> None:
    torch.manual_seed(0)
    small = make_llama(tmp_path / "small")
    edit_tensors(small, "model.safetensors", lambda t: t.pop("model.layers.1.mlp.up_proj.weight"))
    adapter = Adapter.load(folders[1])
    with pytest.raises(BaseModelError, match="no weight for module"):
        BaseModel.resolve(small).verify(adapter.base, adapter.R)


def test_attach_refuses_a_model_of_another_shape(folders: tuple[Path, Path]) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=99,
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    with pytest.raises(ArtifactError, match="the basis was made for"):
        Adapter.attach(LlamaForCausalLM(config), Basis.load(folders[0]))
