"""Which adapters can be served, on one base."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from ..adapter import Adapter
from ..base.model import BaseModel, BaseRef
from ..basis import Basis
from ..belonging import load_basis_once
from ..choices import SEQ_CLS
from ..errors import LoraSBError, SettingsError, some_problems
from ..names import served_name_problem
from .modes import VLLM_RANKS

logger = logging.getLogger(__name__)


def load_servable(
    adapters: Mapping[str, str | Path], model: str | None, *, pass_over: bool
) -> tuple[BaseModel, dict[str, Adapter]]:
    """The base that is served, and the adapters that can be; of the others an error, or with `pass_over` a warning."""
    loaded: dict[str, Adapter] = {}
    problems: dict[str, LoraSBError] = {}
    for name, source in adapters.items():
        try:
            loaded[name] = _servable(name, source)
        except LoraSBError as error:
            problems[name] = error
    base, apart = _on_one_base(loaded, None if model is None else BaseModel.resolve(model))
    problems |= apart
    for name in loaded.keys() - problems.keys():
        assert base is not None  # it is theirs
        try:
            _refuse_unapplied(loaded[name], base)
        except LoraSBError as error:
            problems[name] = error
    loaded = {name: adapter for name, adapter in loaded.items() if name not in problems}
    if problems:
        problems = {name: problems[name] for name in adapters if name in problems}
        what, which = f"{len(problems)} of {len(adapters)} adapters cannot be served", some_problems(problems)
        may_pass, too_many = pass_over and loaded, len(apart) > len(adapters) // 10
        if not may_pass or too_many:
            why = " (more than a tenth are without their basis, or of another base: name those to serve)"
            raise type(next(iter(problems.values())))(f"{what}{why if may_pass else ''}:\n{which}", fix="")
        logger.warning("%s:\n%s\nThe others are served", what, which)
    assert base is not None  # given, or that of what is loaded
    return base, loaded


def _servable(name: str, source: str | Path) -> Adapter:
    """The adapter in `source`, loaded. Raises ArtifactError or SettingsError where it cannot be served as `name`."""
    if problem := served_name_problem(name):
        raise SettingsError(problem, fix="Serve it under another: NAME=FOLDER")
    adapter = Adapter.load(source)
    if adapter.task_type == SEQ_CLS:
        fix = "Use `lorasb merge` or `lorasb export --format onnx`"
        raise SettingsError("a classifier, and this server generates text", where=adapter.folder, fix=fix)
    if adapter.rank > VLLM_RANKS[-1]:
        fix = "Use `lorasb merge` and serve the merged folder with --model"
        raise SettingsError(f"rank {adapter.rank}, vLLM takes at most {VLLM_RANKS[-1]}", where=adapter.folder, fix=fix)
    return adapter


def _on_one_base(
    adapters: Mapping[str, Adapter], base: BaseModel | None
) -> tuple[BaseModel | None, dict[str, LoraSBError]]:
    """Give each adapter its basis, and compare its base with `base`, or with that of the most adapters.

    Returns:
        the base, None where none is there; and what is wrong with adapters whose basis cannot be read, or that are of
        another base.
    """
    bases: dict[str, Basis] = {}  # adapters of one basis share it
    verified: set[tuple[BaseRef, frozenset[str]]] = set()  # to read the base for each of a thousand takes seconds
    apart: dict[str, LoraSBError] = {}
    named = {name: (adapter.base.name_or_path, adapter.base.revision) for name, adapter in adapters.items()}
    count = Counter(named.values())
    for name in sorted(adapters, key=lambda name: -count[named[name]]):
        adapter = adapters[name]
        try:
            load_basis_once(adapter, bases)
            base = base or adapter.base.resolve()
            of_base = (adapter.base, frozenset(adapter.R))
            if of_base not in verified:
                base.verify(*of_base)
                verified.add(of_base)
        except LoraSBError as error:
            apart[name] = error
    return base, apart


def _refuse_unapplied(adapter: Adapter, base: BaseModel) -> None:
    """Raise SettingsError for a module to which vLLM would not apply an adapter, or not wholly, without saying so."""
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
