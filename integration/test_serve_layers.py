"""Parts of the shared-basis plugin on vLLM's own layers, without a server."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.random_adapter import save_adapter, save_base  # first: it hides broken optional packages

import torch  # isort: skip
from transformers import LlamaConfig, LlamaForCausalLM

from lorasb_export.calibration.random_basis import random_factors
from lorasb_export.errors import ArtifactError, SettingsError
from lorasb_export.layers.factors import Factors, ModuleBasis
from lorasb_export.serving.shared.slots import Slots

pytest.importorskip("vllm")

ROWS, COLUMNS, RANK = 96, 64, 20


@pytest.mark.skipif(torch.accelerator.is_available(), reason="[W | B] is packed on CPUs only")
@pytest.mark.parametrize("has_kernels", [True, False])
def test_a_fused_layer_needs_no_kernel_of_vllms(monkeypatch: pytest.MonkeyPatch, has_kernels: bool) -> None:
    """Without AVX-512 vLLM packs no weight of 16 bits, and multiplies by torch."""
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.model_executor import parameter
    from vllm.model_executor.layers import utils
    from vllm.model_executor.layers.linear import ColumnParallelLinear
    from vllm.platforms import current_platform

    from lorasb_export.serving.shared.layers import LAYERS

    current_platform.import_kernels()
    monkeypatch.setattr(parameter, "get_tensor_model_parallel_rank", lambda: 0)
    monkeypatch.setattr(parameter, "get_tensor_model_parallel_world_size", lambda: 1)
    if not has_kernels:
        monkeypatch.setattr(utils, "check_cpu_sgl_kernel", lambda *_: False)
        monkeypatch.setattr(utils.ops, "_supports_onednn", False)
    torch.manual_seed(0)
    W, x = torch.randn(ROWS, COLUMNS) / 10, torch.randn(4, COLUMNS).bfloat16()
    R, B, A = torch.randn(RANK, RANK), torch.randn(ROWS, RANK) / 10, torch.randn(RANK, COLUMNS) / 10
    slots = Slots(torch.zeros(3, 1, RANK, RANK, dtype=torch.bfloat16), 8)
    slots.stack[0, 0] = R.T
    with set_current_vllm_config(VllmConfig()):
        base: Any = ColumnParallelLinear(COLUMNS, ROWS, bias=False, params_dtype=torch.bfloat16, disable_tp=True)
        base.weight.data.copy_(W)
        base.quant_method.process_weights_after_loading(base)
        layer: Any = LAYERS[0](base)
        layer.create_lora_weights(2, None)
        layer.set_basis([ModuleBasis(B, A, torch.ones(RANK))], 0, slots)
        slots.update(torch.tensor([0, -1, 0, -1]))
        y = layer.apply(x)
    assert layer.is_fused
    packs = has_kernels and torch.backends.cpu.get_cpu_capability() != "AVX2"
    assert (layer.packed_A.weight.numel() == 0) == packs  # A is held once
    expected = x.float() @ W.T
    expected[[0, 2]] += x.float()[[0, 2]] @ (B @ R @ A).T
    torch.testing.assert_close(y.float(), expected, rtol=0.02, atol=0.1)


@pytest.mark.skipif(torch.accelerator.is_available(), reason="[W | B] is packed on CPUs only")
@pytest.mark.parametrize("directions", ["random", "block"])
@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize(
    ("slices", "parts", "missing"),
    [
        ([64, 64, 64], [192], None),  # the in_proj of LFM2
        ([32, 32, 64, 64], [128, 64], None),  # the in_proj_qkv and in_proj_z of Qwen3.5
        ([32, 32, 64, 64], [128, 64], 0),
        ([32, 32, 64, 64], [128, 64], 1),
    ],
)
def test_a_module_may_fill_several_slices_of_a_layer(
    monkeypatch: pytest.MonkeyPatch,
    slices: list[int],
    parts: list[int],
    missing: int | None,
    processes: int,
    directions: str,
) -> None:
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.lora import utils
    from vllm.model_executor import parameter
    from vllm.model_executor.layers import linear
    from vllm.platforms import current_platform

    from lorasb_export.serving.shared.layers import LAYERS

    current_platform.import_kernels()
    monkeypatch.setattr(utils, "_all_lora_classes", LAYERS)
    for module in (parameter, linear):
        monkeypatch.setattr(module, "get_tensor_model_parallel_world_size", lambda: processes)
    torch.manual_seed(0)
    W, x = torch.randn(sum(slices), COLUMNS) / 10, torch.randn(4, COLUMNS)
    factors: list[Factors | None] = []
    stack, updates = [], []
    for part, rows in enumerate(parts):
        module = torch.nn.Linear(COLUMNS, rows)
        factor = random_factors({"": module}, RANK, part, torch.float32, directions)[""]
        R = torch.randn(RANK, RANK) / 10
        if part == missing:
            factors.append(None)
            updates.append(torch.zeros(rows, COLUMNS))
        else:
            factors.append(factor)
            updates.append(factor.B @ R @ factor.A)
            stack.append(R.T)
    expected = x @ (W + torch.cat(updates)).T
    slots = Slots(torch.stack([torch.stack(stack), torch.zeros(len(stack), RANK, RANK)]), 8)
    for rank in range(processes):
        for module in (parameter, linear):
            monkeypatch.setattr(module, "get_tensor_model_parallel_rank", lambda rank=rank: rank)

        def shard(rows: torch.Tensor, rank: int = rank) -> torch.Tensor:
            return torch.cat([part.chunk(processes)[rank] for part in rows.split(slices)])

        with set_current_vllm_config(VllmConfig()):
            base: Any = linear.MergedColumnParallelLinear(COLUMNS, slices, bias=False, params_dtype=torch.float32)
            base.weight.data.copy_(shard(W))
            base.quant_method.process_weights_after_loading(base)
            options: Any = SimpleNamespace(fully_sharded_loras=False)
            layer: Any = utils.from_layer(base, 1, options, ["a part"] * len(parts))
            layer.set_basis(factors, 0, slots)
            slots.update(torch.tensor([0, 0, 0, 0]))
            y = layer.apply(x)
        assert bool(layer.blocks) == (directions == "block")
        torch.testing.assert_close(y, shard(expected.T).T, rtol=1e-4, atol=1e-4)


def test_parts_that_do_not_fill_a_layer_are_refused() -> None:
    from lorasb_export.serving.shared.layers import SharedBasisLayer

    layer: Any = SimpleNamespace(
        n_slices=4, output_sizes=[32, 32, 64, 64], base_layer=SimpleNamespace(prefix="in_proj")
    )
    with pytest.raises(SettingsError, match=r"in_proj has 2 modules of 160 rows over 4 slices of 192.*--mode folded"):
        SharedBasisLayer._spans(layer, [96, 64])


def test_a_compiled_graph_is_that_of_its_basis(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank and places are constants in it, and two bases of blocks may have equal shapes at other places."""
    from vllm.config import LoRAConfig, VllmConfig

    from lorasb_export.serving.shared import BASIS_VARIABLE, manager

    monkeypatch.setenv(BASIS_VARIABLE, "a folder")
    monkeypatch.setattr(manager.LRUCacheWorkerLoRAManager, "__init__", lambda *_: None)
    monkeypatch.setattr(manager, "refuse_unsafe", lambda _: None)  # this config is of no model
    hashes = set()
    for given in ({}, {"the user": "gives"}):  # by --additional-config
        for sha256 in ("one", "another"):
            basis = SimpleNamespace(sha256=sha256, modules=["layers.0.q_proj", "layers.1.q_proj", "layers.1.up_proj"])
            monkeypatch.setattr(manager.Basis, "open", lambda _, basis=basis: basis)
            config = VllmConfig(additional_config={**given})
            config.lora_config = LoRAConfig(lora_dtype="bfloat16")  # afterwards: vLLM 0.33 would ask the model of it
            manager.SharedWorkerManager(config)
            hashes.add(config.compute_hash())
            assert config.lora_config.target_modules == ["q_proj", "up_proj"]  # of no embedding
    assert len(hashes) == 4


def test_an_adapter_is_held_as_the_stack_holds_it(tmp_path: Path) -> None:
    """So that the copy into a slot is one of plain bytes, which an accelerator makes without waiting."""
    from lorasb_export.serving.shared.manager import SharedModelManager

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "vocab_size": 40}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2))
    modules = ["model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj"]
    adapter = save_adapter(save_base(model, tmp_path / "base"), model, tmp_path / "a", modules)
    stack = torch.zeros(2, 2, adapter.rank, adapter.rank, dtype=torch.bfloat16)
    manager: Any = SimpleNamespace(basis=adapter.load_basis(), stacked=modules, stack=stack, pins=False)
    block = SharedModelManager.load(manager, 1, tmp_path / "a").block
    assert block is not None
    assert block.is_contiguous()
    for matrix, name in zip(block, modules, strict=True):
        torch.testing.assert_close(matrix, (adapter.scaling * adapter.R[name]).T.bfloat16(), rtol=0, atol=0)


def test_a_start_without_lorasb_serve_is_refused_what_that_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.config import CacheConfig, ParallelConfig

    from lorasb_export.serving.shared.manager import refuse_unsafe

    of_cache = SimpleNamespace(kv_sharing_fast_prefill=False)
    parallel = SimpleNamespace(use_ubatching=False, use_sequence_parallel_moe=False)
    config = SimpleNamespace(
        model_config=SimpleNamespace(enable_sleep_mode=False), cache_config=of_cache, parallel_config=parallel
    )
    refuse_unsafe(config)
    monkeypatch.setenv("VLLM_LORA_ENABLE_DUAL_STREAM", "1")
    with pytest.raises(SettingsError, match="VLLM_LORA_ENABLE_DUAL_STREAM is for stock LoRA"):
        refuse_unsafe(config)
    for where, setting, flag in (
        (parallel, "use_sequence_parallel_moe", "--enable-expert-parallel"),
        (parallel, "use_ubatching", "--enable-dbo and --ubatch-size"),
        (of_cache, "kv_sharing_fast_prefill", "--kv-sharing-fast-prefill"),
    ):
        assert setting in {*dir(ParallelConfig), *CacheConfig.__dataclass_fields__}  # as vLLM calls it
        setattr(where, setting, True)
        with pytest.raises(SettingsError, match=f"fewer tokens than have slots. Leave {flag} out"):
            refuse_unsafe(config)
    config.model_config.enable_sleep_mode = True
    with pytest.raises(SettingsError, match="after vLLM's sleep"):
        refuse_unsafe(config)


@pytest.mark.parametrize(("largest", "message"), [(6e4, None), (7e4, "values beyond float16's")])
def test_what_float16_cannot_say_is_refused(tmp_path: Path, largest: float, message: str | None) -> None:
    from lorasb_export.serving.shared.manager import SharedModelManager

    model = LlamaForCausalLM(LlamaConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=1, vocab_size=40))
    adapter = save_adapter(
        save_base(model, tmp_path / "base"), model, tmp_path / "a", ["model.layers.0.self_attn.o_proj"], rank=4
    )
    next(iter(adapter.R.values()))[0, 0] = largest / adapter.scaling
    adapter.save(tmp_path / "b")
    stack = torch.zeros(2, 1, 4, 4, dtype=torch.float16)
    manager: Any = SimpleNamespace(basis=adapter.load_basis(), stacked=list(adapter.R), stack=stack, pins=False)
    if message is None:
        assert SharedModelManager.load(manager, 1, tmp_path / "b").block is not None
        return
    with pytest.raises(ArtifactError, match=message):
        SharedModelManager.load(manager, 1, tmp_path / "b")
