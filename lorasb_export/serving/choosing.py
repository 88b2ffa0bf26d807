"""Which mode serves the adapters: on their shared basis, or folded; and why not otherwise."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from ..adapter import Adapter
from ..base.model import BaseModel
from ..belonging import by_basis
from ..errors import SettingsError, some
from . import flags
from .modes import Folded, Mode, Shared
from .shared import runs_on_cpu, why_unavailable

logger = logging.getLogger(__name__)

_OF_EXPERTS = re.compile(r"\.(experts|block_sparse_moe)\.")  # the latter alone in Granite's tensors
# Modules that vLLM may give a part of a step's tokens, as the experts beside them: in Nemotron-H the latter too.
_BESIDE_EXPERTS = re.compile(r"\.(shared_expert|fc\d_latent_proj)")
_NOT_RUN = "the shared basis has not been run on an accelerator yet"


def choose_mode(
    mode: str, base: BaseModel, adapters: Mapping[str, Adapter], extra: Sequence[str], updates_from: Path | None
) -> Mode:
    engines = flags.values(extra).get("--data-parallel-size", "1")
    if updates_from is not None:
        if engines != "1":
            fix = "Run several servers behind a load balancer, and send each of them the updates"
            raise SettingsError("--allow-updates has not been run beside --data-parallel-size", fix=fix)
        mode = "shared" if mode == "auto" else mode  # said to be impossible, not left out in silence
        if mode == "folded" or not adapters:
            fix = "Leave --allow-updates out"
            raise SettingsError("only adapters on a shared basis change while they are served", fix=fix)
    if not adapters or mode == "folded":
        return _folded(adapters, extra)
    reason = _why_not_shared(base, adapters, extra)
    if reason is None and mode == "auto" and not runs_on_cpu():
        reason = f"{_NOT_RUN} (--mode shared tries it)"
    if reason is None and updates_from is not None and not runs_on_cpu():
        logger.warning("%s: compare some answers with those of the merged model", _NOT_RUN)
    if reason is None:
        loras, in_memory = (flags.number(extra, flag) for flag in ("--max-loras", "--max-cpu-loras"))
        return Shared(adapters, updates_from, loras, in_memory, engines, base.folder)
    if mode == "shared":
        fix = "Use --mode folded: the same answers from stock vLLM, with a full LoRA in memory for each adapter"
        if updates_from is not None:
            fix = "Leave --allow-updates out, or serve what it is about by another server"
        raise SettingsError(reason, where="--mode shared", fix=fix)
    logger.warning("Serving folded, with a full LoRA in memory for each adapter: %s", reason)
    return _folded(adapters, extra)


def _folded(adapters: Mapping[str, Adapter], extra: Sequence[str]) -> Mode:
    loras = flags.number(extra, "--max-loras")
    if loras is not None and loras <= len(adapters) and runs_on_cpu():
        fix = f"Give at least {len(adapters) + 1}: vLLM's CPU kernel would apply an adapter to the base's answers"
        raise SettingsError(f"--max-loras {loras} for {len(adapters)} adapters on a CPU", fix=fix)
    given = flags.values(extra)
    is_split = "--enable-expert-parallel" in given and all(
        given.get(flag, "1") != "1" for flag in ("--tensor-parallel-size", "--data-parallel-size")
    )
    beside = (name for adapter in adapters.values() for name in adapter.R if _BESIDE_EXPERTS.search(name))
    if is_split and (name := next(beside, None)):
        what = f"of each step {name} would see a part of the tokens, with the adapters of its first ones"
        fix = "Leave it out, or --tensor-parallel-size, or --data-parallel-size"
        raise SettingsError(what, where="--enable-expert-parallel", fix=fix)
    return Folded(adapters, loras)


def _why_not_shared(base: BaseModel, adapters: Mapping[str, Adapter], extra: Sequence[str]) -> str | None:
    bases, strangers = by_basis(adapters)
    if strangers:
        known = f"the basis of {some(bases[0], 1)} is not that of {some(strangers)}"
        return f"{known}: the adapters are of {len(bases)} bases"
    if any(".experts." in name for adapter in adapters.values() for name in adapter.R):
        return "a shared basis of mixture-of-experts layers is not supported"
    given = flags.values(extra)
    if given.get("--data-parallel-size", "1") != "1" and any(_OF_EXPERTS.search(name) for name in base.tensors):
        return "of a mixture-of-experts base an idle engine drops its adapters at every step of the others"
    if "--kv-sharing-fast-prefill" in given:
        return "with --kv-sharing-fast-prefill some layers see fewer tokens than the step has"
    if "--fully-sharded-loras" in given or os.environ.get("VLLM_LORA_ENABLE_DUAL_STREAM", "0") != "0":
        return "--fully-sharded-loras and VLLM_LORA_ENABLE_DUAL_STREAM are for stock LoRA"
    if "--enable-sleep-mode" in given:
        return "after vLLM's sleep of level 2 B and A are not loaded again"
    if "ray" in (given.get("--distributed-executor-backend"), given.get("--data-parallel-backend")):
        return "Ray's workers do not get the variables that name the basis"
    return why_unavailable()
