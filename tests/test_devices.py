"""What differs between devices, as far as a machine without an accelerator can tell."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lorasb_export import Adapter, FitSettings, Stack, distributed, evaluate
from lorasb_export.base.given import require_first_device
from lorasb_export.base.model import BaseModel
from lorasb_export.calibration.subspace import CaptureRatios, truncated_svd
from lorasb_export.errors import BaseModelError, SettingsError
from lorasb_export.layers.exact import exact_products
from lorasb_export.out_of_memory import is_out_of_memory
from lorasb_export.serving.modes import Folded
from lorasb_export.training.arguments import trainer_arguments
from lorasb_export.training.muon import Muon
from tests import serving
from tests.merging import MODULES, adapter_for
from tests.serving import dry_run, value_of

folder = serving.folder


@pytest.fixture
def adapter(llama: Path, tmp_path: Path) -> Adapter:
    return Adapter.load(adapter_for(llama, tmp_path / "a"))


def test_a_base_that_is_offloaded_is_refused(llama: Path, adapter: Adapter) -> None:
    """accelerate brings such a weight in for the forward of its own layer alone."""
    network = BaseModel.resolve(llama).load()
    network.get_submodule(MODULES[0]).to("meta")
    with pytest.raises(BaseModelError, match=rf"the weight of {MODULES[0]} is not in memory"):
        adapter.inject(network)


def test_a_stack_follows_its_model(llama: Path, adapter: Adapter) -> None:
    network = BaseModel.resolve(llama).load()
    stack = Stack(network, {"a": adapter})
    network.to("meta")
    stack.bind()
    assert {stack.values.device.type, *(R.device.type for R in adapter.R.values())} == {"meta"}
    storage = stack.values.untyped_storage()._cdata
    assert all(R.untyped_storage()._cdata == storage for R in adapter.R.values())
    assert {layer.device.type for layer in stack.layers} == {"meta"}
    stack.use("a")


def test_what_is_trained_after_a_move_is_what_is_saved(llama: Path, adapter: Adapter, tmp_path: Path) -> None:
    network = BaseModel.resolve(llama).load()
    stack = Stack(network, {"a": adapter})
    network._apply(torch.clone)  # as `to` another device does, and a Trainer or FSDP2 by it
    with torch.no_grad():
        for layer in stack.layers:
            layer.fill_(0.5)
    stack.bind()
    adapter.save(tmp_path / "saved")
    assert all((R == 0.5).all() for R in Adapter.load(tmp_path / "saved").R.values())
    stack.detach()
    with torch.no_grad():
        for layer in stack.layers:
            layer.fill_(0.25)  # nobody's any more
    assert type(adapter.R) is dict


@pytest.mark.parametrize("allowed", ["highest", "high", "medium"])
def test_products_are_exact_within_and_as_allowed_before(allowed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before, seen = torch.get_float32_matmul_precision(), []
    torch.set_float32_matmul_precision(allowed)
    seen_by = {"eigh": torch.linalg.eigh}

    def eigh(matrix: torch.Tensor) -> object:
        seen.append(torch.backends.cuda.matmul.allow_tf32)
        return seen_by["eigh"](matrix)

    monkeypatch.setattr(torch.linalg, "eigh", eigh)
    try:
        truncated_svd(torch.randn(8, 4), 2, 0)
        CaptureRatios().add("x", torch.randn(8, 4), basis=(torch.eye(8, 2), torch.eye(2, 4)))
        with pytest.raises(KeyError), exact_products():
            raise KeyError
        assert seen == [False]
        assert torch.get_float32_matmul_precision() == allowed
        assert torch.backends.cuda.matmul.allow_tf32 == (allowed != "highest")
    finally:
        torch.set_float32_matmul_precision(before)


newer_switches = pytest.mark.skipif(not hasattr(torch.backends, "fp32_precision"), reason="torch has them since 2.9")


@newer_switches
def test_a_switch_that_follows_the_general_one_follows_it_afterwards() -> None:
    general, switch = torch.backends, torch.backends.cuda.matmul
    before = general.fp32_precision, switch.fp32_precision
    general.fp32_precision, switch.fp32_precision = "tf32", "none"
    try:
        with exact_products():
            assert switch.fp32_precision == "ieee"
        assert switch.fp32_precision == "tf32"
        general.fp32_precision = "ieee"
        assert switch.fp32_precision == "ieee"
    finally:
        general.fp32_precision, switch.fp32_precision = before


def test_infs_of_a_scaled_loss_reach_no_R(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fused AdamW, as of a head on a GPU, would tell GradScaler that the step looks after them itself."""
    R, head = torch.nn.Parameter(torch.eye(2)), torch.nn.Parameter(torch.ones(2))
    init = torch.optim.AdamW.__init__

    def fused(self: torch.optim.AdamW, *args: Any, **options: Any) -> None:
        init(self, *args, **{**options, "fused": True})

    monkeypatch.setattr(torch.optim.AdamW, "__init__", fused)
    groups = [{"params": [R], "orthogonal": True}, {"params": [head], "orthogonal": False}]
    optimizer, scaler = Muon(groups, lr=0.1), torch.amp.GradScaler("cpu", init_scale=2.0**120)
    scaler.scale((R.sum() + head.sum()) * 1e30).backward()
    scaler.step(optimizer)
    assert torch.equal(R, torch.eye(2))
    assert torch.equal(head, torch.ones(2))


@newer_switches
def test_products_are_exact_for_who_uses_the_newer_switches() -> None:
    switch = torch.backends.cuda.matmul
    before, switch.fp32_precision = switch.fp32_precision, "tf32"
    try:
        with exact_products():
            assert switch.fp32_precision == "ieee"
            assert torch.get_float32_matmul_precision() == "highest"
        assert switch.fp32_precision == "tf32"
    finally:
        switch.fp32_precision = before


def test_the_environment_of_accelerate_does_not_choose_the_precision(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert trainer_arguments(FitSettings(learning_rate=1e-3), tmp_path, 1, "a").mixed_precision == "no"


def test_a_loss_is_not_taken_over_several_devices(llama: Path, adapter: Adapter, sums: Path) -> None:
    network = BaseModel.resolve(llama).load()
    network.hf_device_map = {"model": 0, "lm_head": 1}
    with pytest.raises(SettingsError, match="lies on several devices"):
        evaluate(adapter, sums, network=network, metric="loss")


def test_training_by_itself_is_refused_on_another_than_the_first_device() -> None:
    """transformers' Trainer takes the first, and would leave what lies elsewhere behind."""
    for device in ("cpu", "cuda:0", "mps:0"):
        require_first_device(torch.device(device))
    with pytest.raises(SettingsError, match=r"the base is on cuda:1, training takes cuda:0"):
        require_first_device(torch.device("cuda:1"))


@pytest.mark.parametrize(
    "words",
    [
        "MPS backend out of memory (MPS allocated: 1 GB)",
        "Invalid buffer size: 9.75 GiB",
        "CUBLAS_STATUS_ALLOC_FAILED",
        "CUDA error: out of memory",
        "cusolver error: CUSOLVER_STATUS_INTERNAL_ERROR, when calling `cusolverDnCreate(handle)`",
        "CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`",
    ],
)
def test_a_full_memory_is_known_by_its_words(words: str) -> None:
    assert is_out_of_memory(RuntimeError(words))
    assert not is_out_of_memory(RuntimeError("shape mismatch"))


@pytest.mark.parametrize(("place", "count", "on_cpu"), [("1", 1, ""), ("4", 4, ""), ("1", 1, "1")])
def test_processes_that_would_share_a_gpu_are_refused(
    place: str, count: int, on_cpu: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    for name, value in (("LOCAL_RANK", place), ("ACCELERATE_USE_CPU", on_cpu)):
        monkeypatch.setenv(name, value)
    if on_cpu:
        distributed._require_gpu_of_its_own()
    else:
        with pytest.raises(SettingsError, match=rf"process {int(place) + 1} of this machine, and it sees {count} GPU"):
            distributed._require_gpu_of_its_own()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", place)  # each sees the one that is its own
    if count == 1:
        distributed._require_gpu_of_its_own()
    monkeypatch.setenv("LOCAL_RANK", "0")
    distributed._require_gpu_of_its_own()


def test_folded_adapters_take_turns_in_sixteen_slots(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    serving.install(monkeypatch, "vllm")
    named = {f"a{number}": folder / "a" for number in range(40)}
    command = dry_run(named, mode="folded")["command"]
    assert (value_of(command, "--max-loras"), value_of(command, "--max-cpu-loras")) == ("16", "40")
    many = dry_run({f"a{number}": folder / "a" for number in range(80)}, mode="folded")
    assert value_of(many["command"], "--max-cpu-loras") == "64"
    assert many["memory"]["host_bytes"] == many["memory"]["disk_bytes"] // 2 * 64 // 80  # in 16 bits; no more are held
    assert "each of the 16 slots takes some, try -- --max-loras 8. " in Folded(dict.fromkeys(named), None).advice
    few = dry_run({"a": folder / "a"}, mode="folded")["command"]
    assert (value_of(few, "--max-loras"), "--max-cpu-loras" in few) == ("1", False)
