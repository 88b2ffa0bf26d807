"""Merged against unmerged, from the disk: the weights never are in memory together, and a wrong folder is seen."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lorasb_export import Adapter, merge
from lorasb_export.base import device as base_device
from lorasb_export.base.model import BaseModel
from lorasb_export.base.streamed import streamed_model
from lorasb_export.choices import CAUSAL_LM
from lorasb_export.data.task import load_task
from lorasb_export.errors import ArtifactError
from lorasb_export.evaluation.logits import TOLERANCE
from lorasb_export.files.storage import read_json, write_json
from lorasb_export.merging import verify
from lorasb_export.merging.rounding import NOT_ROUNDED
from lorasb_export.merging.verify import add_updates, compare_logits
from tests.random_adapter import save_adapter
from tests.rows import task_of
from tests.tiny import make_gpt2

MODULES = [f"model.layers.{i}.{m}" for i in range(2) for m in ("self_attn.q_proj", "mlp.down_proj")]
IDS = torch.tensor([[1, 20, 21, 22, 23, 2]])


@pytest.fixture
def adapter(llama: Path, tmp_path: Path) -> Adapter:
    return save_adapter(llama, BaseModel.resolve(llama).load(), tmp_path / "a", MODULES, relative_size=0.3)


def test_one_module_is_in_memory_at_a_time(llama: Path, adapter: Adapter) -> None:
    whole = BaseModel.resolve(llama).load()
    adapter.inject(whole)
    network = streamed_model(BaseModel.resolve(llama), CAUSAL_LM, device=torch.device("cpu"))
    assert network is not None
    add_updates(network, [adapter])
    most = []

    def count(*_: object) -> None:
        most.append(sum(not p.is_meta for p in network.parameters()))

    for module in network.modules():
        module.register_forward_hook(count)
    with torch.inference_mode():
        assert torch.allclose(network(IDS).logits, whole(IDS).logits, rtol=1e-5, atol=1e-6)
    assert max(most) == 0  # after its call every module has forgotten its weights
    assert all(p.is_meta for p in network.parameters())


def test_weights_of_several_dtypes_are_held_to_the_coarsest(llama: Path, tmp_path: Path) -> None:
    """Whichever module comes first."""
    weights = load_file(llama / "model.safetensors")
    for coarse in ("q_proj", "down_proj"):
        base = shutil.copytree(llama, tmp_path / coarse)
        mixed = {k: w.bfloat16() if coarse in k else w for k, w in weights.items()}
        save_file(mixed, base / "model.safetensors", {"format": "pt"})
        network = BaseModel.resolve(base).load()
        found = save_adapter(base, network, tmp_path / f"a-{coarse}", MODULES, relative_size=0.3)
        assert merge(found, tmp_path / f"model-{coarse}", verify=True)["verify"]["tolerance"] == 0.15


def test_rows_of_the_task_where_they_still_lie(llama: Path, adapter: Adapter, sums: Path, tmp_path: Path) -> None:
    merged = _merged(adapter, tmp_path / "m")
    assert compare_logits(BaseModel.resolve(llama), [adapter], merged, NOT_ROUNDED)["rows"] == 0
    adapter.training = {"data": str(sums), "data_sha256": load_task("sums", sums).sha256}
    found = merge(adapter, tmp_path / "model", verify=True)["verify"]
    assert (found["rows"], found["streamed"]) == (4, True)
    assert found["relative_difference"] < 1e-5
    for place, sha in ((tmp_path / "gone", adapter.training["data_sha256"]), (sums, "that of other rows")):
        adapter.training = {"data": str(place), "data_sha256": sha}
        assert merge(adapter, tmp_path / "again", verify=True, overwrite=True)["verify"]["rows"] == 0


def _merged(adapter: Adapter, folder: Path) -> Path:
    merge(adapter, folder)
    return folder


def test_what_is_not_verified_is_not_written(
    llama: Path, adapter: Adapter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(TOLERANCE, "F32", 0.0)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ArtifactError, match=r"the merged logits differ .* Nothing was written"):
        merge(adapter, tmp_path / "model", verify=True)
    assert sorted(tmp_path.iterdir()) == before


def test_an_update_that_is_not_kept_is_told(
    llama: Path, adapter: Adapter, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    adapter.R = {name: 1e-6 * R for name, R in adapter.R.items()}
    merge(adapter, tmp_path / "fine")
    assert "serve the adapter unmerged" not in caplog.text
    merge(adapter, tmp_path / "coarse", dtype="bfloat16")
    assert "serve the adapter unmerged" in caplog.text


def test_a_device_without_room_leaves_the_comparison_to_the_cpu(
    llama: Path, adapter: Adapter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a model that fits into the host's memory, a finished merge is not thrown away."""
    on, devices = verify._on, []

    def full(device: torch.device, *args: Any) -> Any:
        devices.append(device.type)
        if device.type != "cpu":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return on(device, *args)

    monkeypatch.setattr(verify, "_on", full)
    monkeypatch.setattr(base_device, "default_device", lambda: torch.device("cuda"))
    assert merge(adapter, tmp_path / "model", verify=True)["verify"]["streamed"]
    assert devices == ["cuda", "cpu"]


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: not enough memory")])
def test_what_the_host_has_no_room_for_is_not_tried_again(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base_device, "default_device", lambda: torch.device("cuda"))
    devices = []

    def full(device: torch.device) -> None:
        devices.append(device.type)
        raise error

    with pytest.raises(type(error)):
        base_device.where_there_is_room(full, "compare logits")
    assert devices == ["cuda"]


@pytest.mark.parametrize("value", [0.0, float("nan")])
def test_a_wrong_folder_is_seen(value: float, llama: Path, adapter: Adapter, tmp_path: Path) -> None:
    file = _merged(adapter, tmp_path / "model") / "model.safetensors"
    tensors = load_file(file)
    tensors[f"{MODULES[0]}.weight"][:4] = value
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(ArtifactError, match="the merged logits differ"):
        compare_logits(BaseModel.resolve(llama), [adapter], tmp_path / "model", NOT_ROUNDED)


def test_rows_longer_than_learned_positions_are_cut(tmp_path: Path) -> None:
    base = make_gpt2(tmp_path / "base")
    long = task_of(json.dumps({"prompt": "1" * 300, "completion": "2"}) + "\n", tmp_path / "data")
    write_json(base / "config.json", read_json(base / "config.json") | {"n_positions": 64})
    weights = load_file(base / "model.safetensors")
    (learned,) = [name for name in weights if name.endswith("wpe.weight")]
    save_file(weights | {learned: weights[learned][:64].clone()}, base / "model.safetensors")
    network = BaseModel.resolve(base).load()
    adapter = save_adapter(base, network, tmp_path / "a", ["transformer.h.0.mlp.c_fc"])
    adapter.training = {"data": long.source, "data_sha256": long.sha256}
    assert merge(adapter, tmp_path / "m", verify=True)["verify"]["rows"] == 1
