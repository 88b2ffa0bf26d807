"""`lorasb generate`: prompts, and what the base and each adapter answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..adapter import Adapter
from ..bars import progress_bar
from ..base.model import BaseModel
from ..basis import Basis
from ..belonging import load_basis_once
from ..choices import CAUSAL_LM
from ..data.rows import Prompt
from ..errors import ArtifactError, LoraSBError, Problems, SettingsError
from ..other_base import warn_of_another_template
from .inference import answers_of_ids, checked_prompt_ids, limits_of


def ask_adapters(
    prompts: Sequence[Prompt],
    adapters: Mapping[str, str],
    *,
    base: str | None,
    max_tokens: int,
    dtype: str,
    batch_size: int = 16,
    unit: str = "prompt",
    failed: dict[str, LoraSBError] | None = None,
) -> dict[str, list[str]]:
    """The base's greedy answers to prompts, then each adapter's, on one loaded base, in the order given.

    All is checked before that is loaded.

    Args:
        prompts, batch_size, unit: as for `inference.answers`.
        adapters: name → adapter folder or Hub id, all of one base.
        base: the base, where the adapters do not find it; needed when there are none.
        failed: takes by name the errors of adapters that are damaged; the others are asked then, if any is left.

    Raises:
        ArtifactError: an adapter is a classifier, or damaged.
        BaseModelError: an adapter belongs to another base.
        DataError: as `inference.answers` has it.
        SettingsError: an adapter is called `base`.
    """
    if "base" in adapters:
        what = "an adapter called 'base' would hide the base's answer"
        raise SettingsError(what, where=adapters["base"], fix="Ask for it by its path")
    loaded = _loaded(adapters, failed)
    base_model = _base_of(loaded, base)
    tokenizer = base_model.tokenizer
    empty = base_model.load_empty(CAUSAL_LM)
    of_each = [max_tokens] * len(prompts)
    questions = checked_prompt_ids(tokenizer, prompts, of_each, unit=unit, **limits_of(empty))
    network = base_model.load(dtype=dtype)
    asked: dict[str, Adapter | None] = {"base": None, **loaded}
    found = {}
    for name, on_it in progress_bar(asked.items(), desc="ask", leave=False):
        if on_it is not None:
            on_it.inject(network)
        found[name] = answers_of_ids(network, tokenizer, questions, of_each, batch_size=batch_size)
    return found


def _loaded(adapters: Mapping[str, str], failed: dict[str, LoraSBError] | None) -> dict[str, Adapter]:
    """Those of `adapters` that are whole, with their bases. Arguments and errors: as for `ask_adapters`."""
    loaded: dict[str, Adapter] = {}
    bases: dict[str, Basis] = {}
    for name, source in adapters.items():
        try:
            adapter = Adapter.load(source)
            load_basis_once(adapter, bases)
        except ArtifactError as error:
            if failed is None:
                raise
            failed[name] = error.alone()
        else:
            loaded[name] = adapter
    if failed and not loaded:
        Problems(failed.values()).raise_all("nothing was asked")
    for name, adapter in loaded.items():
        if adapter.task_type != CAUSAL_LM:
            fix = "Leave it out, and score it with `lorasb evaluate`"
            raise ArtifactError(f"adapter {name} is a classifier, which answers nothing", where=adapter.folder, fix=fix)
    return loaded


def _base_of(loaded: Mapping[str, Adapter], base: str | None) -> BaseModel:
    """The base that all of them are asked on, checked. Arguments and errors: as for `ask_adapters`."""
    first = next(iter(loaded.values()), None)
    base_model = BaseModel.resolve(base or "") if first is None else first.base.resolve(base)
    for adapter in loaded.values():
        base_model.verify(adapter.base, adapter.R)
    base_model.require_task(CAUSAL_LM)
    warn_of_another_template(loaded.values(), base_model.folder)
    return base_model
