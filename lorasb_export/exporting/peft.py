"""An adapter as a stock PEFT LoRA folder: lora_A = A and lora_B = s·B·R, for every tool that reads LoRA."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch

from ..adapter import Adapter
from ..cards import card
from ..cards.sections import Facts
from ..environment import require_packages
from ..errors import BaseModelError, LoraSBError
from ..files.atomic import atomic_folder
from ..files.kind import ADAPTER_CONFIG, RECORD
from ..files.output import refuse_existing, refuse_own_input
from ..files.storage import expanded, read_json, write_json
from ..hub.fetch import resolve_folder
from ..other_base import warn_of_another_template, warn_of_other_weights
from ..provenance import adapter_provenance, command, published_training
from ..tensors import save_tensors

logger = logging.getLogger(__name__)

_PREFIX = "base_model.model."
_CONV1D_NAMES = {"c_attn", "c_proj", "c_fc"}
# transformers has fused the experts of these families, and PEFT takes every layer of these names for one of them.
_FUSED = frozenset(
    "afmoe cohere2_moe deepseek_v2 deepseek_v3 deepseek_v32 dots1 ernie4_5_moe exaone_moe flex_olmo glm4_moe "
    "glm4_moe_lite glm_moe_dsa hunyuan_v1_moe longcat_flash mellum olmoe qwen3_moe qwen3_next solar_open".split()
)
_TAKEN_FOR_EXPERTS = (".gate", ".gate_proj", ".up_proj", ".down_proj")
_MAMBA = frozenset("falcon_h1 falcon_mamba mamba mamba2 nemotron_h".split())  # whose out_proj PEFT refuses


def export_peft(
    adapter: str | Path,
    out: str | Path,
    *,
    base: str | Path | None = None,
    verify: bool = False,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Write `adapter` as a PEFT LoRA folder that `PeftModel.from_pretrained` and vLLM load as it is.

    Arguments and errors: as for `export`. Only `verify` loads the base's weights. A given one is checked against the
    adapter; of the adapter's own the type is looked at, and for module names like GPT-2's how it stores weights.
    """
    out = expanded(out)
    source = Adapter.load(adapter)
    refuse_own_input(out, source.folder, source.basis_source)
    refuse_existing(out, overwrite, kind="peft")
    if verify:
        require_packages("peft")
    looks_like_conv1d = any(name.rpartition(".")[2] in _CONV1D_NAMES for name in source.R)
    base_model = source.base.resolve(base) if verify or base is not None or looks_like_conv1d else None
    if base_model is not None:
        base_model.verify(source.base, source.R)
        warn_of_another_template([source], base_model.folder)
    warn_of_other_weights([source])
    _refuse_what_peft_does_not_take(source, base)
    transposed = base_model is not None and base_model.stores_transposed  # what PEFT calls fan_in_fan_out
    with atomic_folder(out, overwrite=overwrite, kind="peft") as folder:
        size = write_folded(source, folder, transposed=transposed)
        record = {"kind": "peft", **adapter_provenance(source), "command": command()}
        record["training"] = published_training(source, folder)
        write_json(folder / RECORD, record)
        card.write(folder, card.peft_card(peft_config(source, transposed=transposed), facts=Facts(made=record)))
        found = {}
        if verify and base_model is not None:
            from .peft_verify import verify_peft  # only now: who serves adapters folded imports this module too

            found = {"verify": verify_peft(folder, source, base_model)}
    return {"out": str(out), "rank": source.rank, "modules": len(source.R), "bytes": size, **found}


def write_folded(adapter: Adapter, folder: Path, *, transposed: bool = False) -> int:
    """Write PEFT's two files for `adapter` into an existing folder; returns the size of the weights file."""
    path = folder / "adapter_model.safetensors"
    save_tensors(folded_tensors(adapter), path)
    write_json(folder / ADAPTER_CONFIG, peft_config(adapter, transposed=transposed))
    return path.stat().st_size


def folded_tensors(adapter: Adapter) -> dict[str, torch.Tensor]:
    """PEFT's tensor name → fp32 tensor: per module lora_A (r, in) = A, lora_B (out, r) = s·B·R; and the head."""
    tensors = {}
    for name in sorted(adapter.R):
        sBR, A = adapter.as_lora(name)
        tensors[f"{_PREFIX}{name}.lora_A.weight"] = A.contiguous()
        tensors[f"{_PREFIX}{name}.lora_B.weight"] = sBR.contiguous()
    return tensors | {f"{_PREFIX}{name}": tensor for name, tensor in adapter.head.items()}


def peft_config(adapter: Adapter, *, transposed: bool) -> dict[str, Any]:
    """The content of PEFT's `adapter_config.json`.

    The modules are named in full: a suffix such as `q_proj` would also match layers the basis leaves alone.
    """
    return {
        "peft_type": "LORA",
        "task_type": adapter.task_type,
        "base_model_name_or_path": adapter.base.name_or_path,
        "revision": adapter.base.revision,
        "inference_mode": True,
        "r": adapter.rank,
        "lora_alpha": adapter.rank,  # s is inside lora_B; alpha / r must be 1
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": transposed,
        "init_lora_weights": True,  # vLLM refuses any other way to have started
        "target_modules": sorted(adapter.R),
        "modules_to_save": sorted({name.partition(".")[0] for name in adapter.head}) or None,
    }


def _refuse_what_peft_does_not_take(adapter: Adapter, base: str | Path | None) -> None:
    """Raise BaseModelError where PEFT would refuse the adapter, or load it and answer as the base does, or nearly."""

    def first(*endings: str) -> str | None:
        return next((name for name in sorted(adapter.R) if name.endswith(endings)), None)

    def refuse(what: str) -> None:
        raise BaseModelError(what, where=adapter.folder, fix="Use `lorasb merge`")

    if name := first(".dt_proj"):
        refuse(f"PEFT would put a layer around {name}, whose weight Mamba's layers read without asking it")
    taken, out_proj = first(*_TAKEN_FOR_EXPERTS), first(".out_proj")
    family = _family(adapter, base) if taken or out_proj else None
    if taken and family in _FUSED:
        refuse(f"in models of the type {family} PEFT takes {taken} for an expert, and would leave its adapter out")
    if out_proj and family in _MAMBA:
        refuse(f"in models of the type {family} PEFT takes no adapter for {out_proj}")


def _family(adapter: Adapter, base: str | Path | None) -> str | None:
    """The base's model type, by its config.json alone: no weights are fetched. None where that is not at hand."""
    ref = adapter.base
    source = base or (f"{ref.name_or_path}@{ref.revision}" if ref.revision else ref.name_or_path)
    try:
        folder, _ = resolve_folder(source, ("config.json",))
        return str(read_json(folder / "config.json").get("model_type"))
    except LoraSBError as error:
        what = (
            "the type of the base could not be looked up, and in some families PEFT leaves layers out, or refuses them"
        )
        logger.warning("%s: %s", what, error)
        return None
