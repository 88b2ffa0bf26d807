"""vLLM's LoRA managers with one stack of R for all layers; caches, slots and pinning are vLLM's own."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Any

import torch
from vllm import envs
from vllm.lora import utils
from vllm.lora.lora_model import LoRAModel
from vllm.lora.model_manager import LRUCacheLoRAModelManager
from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager
from vllm.utils.torch_utils import PIN_MEMORY

from ...basis import Basis
from ...errors import ArtifactError, SettingsError
from . import BASIS_VARIABLE
from .layers import LAYERS, SharedBasisLayer
from .loading import load_R
from .slots import Slots


class SharedAdapter(LoRAModel):
    """What vLLM's caches hold of an adapter, until a slot has it: (s·R)ᵀ (m, r, r), as it lies in the stack."""

    def __init__(self, lora_id: int, block: torch.Tensor) -> None:
        super().__init__(lora_id, block.shape[-1], {})
        self.block: torch.Tensor | None = block

    def clone(self, lora_model_id: int) -> SharedAdapter:
        assert self.block is not None
        return SharedAdapter(lora_model_id, self.block)


class SharedModelManager(LRUCacheLoRAModelManager):
    """Gives every layer its B and A, and its part of the stack (slots + 1, m, r, r) of transposed R."""

    def __init__(self, basis: Basis, **options: Any) -> None:
        self.basis = basis
        super().__init__(**options)
        self.pins = self.device.type != "cpu" and PIN_MEMORY
        if self.supports_mm or self.lora_config.fully_sharded_loras:
            fix = "Use --mode folded"
            raise SettingsError("the shared basis serves text models, without --fully-sharded-loras", fix=fix)
        self._share_basis()

    def _create_lora_modules(self) -> None:
        # vLLM picks the layers from this tuple, and its own would allocate a full A and B for every slot.
        stock, utils._all_lora_classes = utils._all_lora_classes, LAYERS
        try:
            super()._create_lora_modules()
        finally:
            utils._all_lora_classes = stock

    def _share_basis(self) -> None:
        modules = {self._vllm_name(name): name for name in self.basis.modules}
        parts = {
            layer_name: [modules.pop(name, None) for name in self.packed_modules.get(layer_name, [layer_name])]
            for layer_name in self.modules
        }
        if modules and not self._has_missing_stages():
            what = f"this model has no LoRA layer for {next(iter(modules))}"
            raise ArtifactError(what, where=self.basis.source, fix="Use --mode folded")
        self.stacked = [name for found in parts.values() for name in found if name is not None]
        shape = (self.lora_slots + 1, len(self.stacked), self.basis.rank, self.basis.rank)
        dtype: Any = self.lora_config.lora_dtype  # vLLM has put a torch.dtype for the name given
        self.stack = torch.zeros(shape, dtype=dtype, device=self.device)
        self.slots = Slots(self.stack, self.max_num_batched_tokens)
        first = 0
        for layer_name, found in parts.items():
            layer = self.modules[layer_name]
            assert isinstance(layer, SharedBasisLayer)
            factors = [None if name is None else self.basis.modules[name] for name in found]
            count = sum(factor is not None for factor in factors)
            if count:
                layer.set_basis(factors, first, self.slots)
            first += count

    def _vllm_name(self, name: str) -> str:
        mapper = getattr(self.model, "hf_to_vllm_mapper", None)
        return name if mapper is None else mapper.get_rename_mapper()._map_name(name) or name

    def _has_missing_stages(self) -> bool:
        """Whether another pipeline stage holds layers of this model."""
        return any(type(module).__name__ == "PPMissingLayer" for module in self.model.modules())

    def load(self, lora_id: int, folder: Path) -> SharedAdapter:
        """The adapter in `folder`, as the stack will hold it; in pinned memory beside an accelerator."""
        names, R = load_R(folder, self.basis)
        if names != self.stacked:
            position = {name: index for index, name in enumerate(names)}
            R = R[[position[name] for name in self.stacked]]
        # Cast and transposed here: a copy of anything else to an accelerator would be staged, and waited for.
        block = torch.empty(R.shape, dtype=self.stack.dtype, device="cpu", pin_memory=self.pins).copy_(R.mT)
        if block.dtype == torch.float16 and not block.isfinite().all():
            fix = "Serve it with --dtype bfloat16 or float32"
            raise ArtifactError("R has values beyond float16's", where=folder, fix=fix)
        return SharedAdapter(lora_id, block)

    def activate_adapter(self, lora_id: int) -> bool:
        fresh = super().activate_adapter(lora_id)
        if fresh:
            adapter = self._registered_adapters[lora_id]
            assert isinstance(adapter, SharedAdapter)
            assert adapter.block is not None
            index = self.lora_index_to_id.index(lora_id)
            self.stack[index].copy_(adapter.block, non_blocking=True)
            if self.capacity == self.lora_slots:
                # Both caches drop the same adapter at the same time, so the slot can be the only copy. (Pinned memory
                # is not given to others before the copy from it is done.)
                adapter.block = None
        return fresh

    def touch(self, lora_id: int) -> bool:
        """Mark an adapter as used now, if it has a slot."""
        if lora_id not in self._active_adapters:
            return False
        self._active_adapters.touch(lora_id)
        self._registered_adapters.touch(lora_id)
        return True

    def create_dummy_lora(self, lora_id: int, rank: int, embedding_modules: Any = None) -> SharedAdapter:
        zero = torch.zeros((), dtype=self.stack.dtype, device=self.device)
        return SharedAdapter(lora_id, zero.expand(len(self.stacked), self.basis.rank, self.basis.rank))

    def _create_merged_loras_inplace(self, lora_model: LoRAModel) -> None:
        """Packed layers read their parts' R side by side in the stack: nothing to merge."""

    def _set_adapter_mapping(self, mapping: Any) -> None:
        # vLLM's own tables are read by none of our layers, and an accelerator would be waited for to fill them.
        slot_of = {lora_id: slot for slot, lora_id in enumerate(self.lora_index_to_id) if lora_id is not None}
        of_tokens = [slot_of[lora_id] if lora_id > 0 else -1 for lora_id in mapping.index_mapping]
        self.slots.update(torch.tensor(of_tokens, dtype=torch.int32, pin_memory=self.pins))


class SharedWorkerManager(LRUCacheWorkerLoRAManager):
    """Made by vLLM's model runner, one in each worker; finds the basis by `BASIS_VARIABLE`."""

    def __init__(self, vllm_config: Any, *arguments: Any, **options: Any) -> None:
        super().__init__(vllm_config, *arguments, **options)
        refuse_unsafe(vllm_config)
        basis = Basis.open(os.environ[BASIS_VARIABLE])  # B and A stay on the disk: the layers hold them
        if vllm_config.lora_config.target_modules is None:  # then vLLM sets aside room for an adapter of the embedding
            vllm_config.lora_config.target_modules = sorted({name.rpartition(".")[2] for name in basis.modules})
        make: Any = partial(SharedModelManager, basis)
        self._manager_cls = make
        # A compiled graph has the basis' rank and places in it as constants. vLLM's cache of graphs takes one by the
        # hash of this config, which it asks for at the first forward pass.
        assert isinstance(vllm_config.additional_config, dict)  # as vLLM's own arguments make it
        vllm_config.additional_config["lorasb_basis"] = basis.sha256

    def add_adapter(self, lora_request: Any) -> bool:
        """Called for every adapter of a step; vLLM's own copies its list of all adapters each time."""
        manager, lora_id = self._adapter_manager, lora_request.lora_int_id
        assert isinstance(manager, SharedModelManager)
        if lora_request.load_inplace or not manager.touch(lora_id):
            return super().add_adapter(lora_request)
        return True

    def _load_adapter(self, lora_request: Any) -> SharedAdapter:
        manager = self._adapter_manager
        assert isinstance(manager, SharedModelManager)
        return manager.load(lora_request.lora_int_id, Path(lora_request.lora_path))


def refuse_unsafe(vllm_config: Any) -> None:
    """Raise SettingsError for what would give wrong answers: `lorasb serve` asks before, a start by other means not."""
    if vllm_config.model_config.enable_sleep_mode:
        fix = "Leave --enable-sleep-mode out"
        raise SettingsError("after vLLM's sleep of level 2 a shared basis is not loaded again", fix=fix)
    parallel = vllm_config.parallel_config
    for flags, is_given in (
        ("--kv-sharing-fast-prefill", vllm_config.cache_config.kv_sharing_fast_prefill),
        ("--enable-dbo and --ubatch-size", parallel.use_ubatching),
        ("--enable-expert-parallel", parallel.use_sequence_parallel_moe),
    ):
        if is_given:
            raise SettingsError("some layers would see fewer tokens than have slots", fix=f"Leave {flags} out")
    if envs.VLLM_LORA_ENABLE_DUAL_STREAM:
        raise SettingsError("VLLM_LORA_ENABLE_DUAL_STREAM is for stock LoRA", fix="Unset it")
