"""Modules to which vLLM would not apply an adapter, or not wholly: it says nothing, and answers as something else."""

from __future__ import annotations

from ..adapter import Adapter
from ..base.model import BaseModel
from ..errors import SettingsError


def refuse_unapplied(adapter: Adapter, base: BaseModel) -> None:
    """Raise SettingsError for an adapter with such a module."""
    if any(name.endswith(".kv_b_proj") for name in adapter.R):
        # Its attention multiplies by that weight itself, so that LoRA's layer around it is never asked.
        fix = "Use `lorasb merge` and serve the merged folder with --model"
        raise SettingsError("vLLM applies no adapter to kv_b_proj", where=adapter.folder, fix=fix)
    of_text = base.config.get("text_config") or {}
    if not (base.config.get("attention_k_eq_v") or of_text.get("attention_k_eq_v")):
        return
    # Gemma 4: vLLM loads the weight of k_proj for the values too, but adds an adapter of it to the keys alone.
    for name in adapter.R:
        parent, _, leaf = name.rpartition(".")
        if leaf == "k_proj" and base.tensor_key(f"{parent}.v_proj.weight") is None:
            what = f"{name} makes keys and values, and vLLM would apply an adapter to the keys alone"
            fix = "Use `lorasb merge` and serve the merged folder with --model, or calibrate without k_proj"
            raise SettingsError(what, where=adapter.folder, fix=fix)
