"""`lorasb generate --onnx`: prompts, and what an export answers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..bars import progress_bar
from ..choices import CAUSAL_LM
from ..data.rows import Prompt
from ..errors import ArtifactError, SettingsError
from ..evaluation.answer_end import before_end
from ..evaluation.inference import checked_prompt_ids
from ..names import refuse_many
from .onnx_record import read_record
from .onnx_run import OnnxDecoder, limits_in, tokenizer_in


def ask_onnx(
    folder: Path,
    prompts: Sequence[Prompt],
    adapters: Sequence[str] | None = None,
    *,
    max_tokens: int,
    unit: str = "prompt",
) -> dict[str, list[str]]:
    """Greedy answers of an exported decoder to prompts, asked as in training.

    Args:
        prompts, max_tokens, unit: as for `inference.answers`.
        adapters: of an `onnx-adapters` folder; None takes all, of a few.

    Returns:
        of an `onnx-adapters` folder the answers of `base` and of each adapter; else those of the one merged in.

    Raises:
        ArtifactError: not an ONNX export, one of a classifier, a damaged one, or it has no such adapter.
        DataError, BaseModelError: as `inference.answers` has them.
        SettingsError: `adapters` of a folder that has one merged in; None where there are many.
    """
    record = read_record(folder)
    if record["task_type"] != CAUSAL_LM:
        fix = "Call lorasb_export.classify, or score its adapter with `lorasb evaluate`"
        raise ArtifactError("the graph is a classifier, which answers nothing", where=folder, fix=fix)
    if record["kind"] == "onnx" and adapters is not None:
        raise SettingsError("the folder has one adapter, merged in", where=folder, fix="Name no adapters")
    if adapters is None:
        refuse_many(record.get("adapters", ()), folder)

    tokenizer, of_each = tokenizer_in(folder), [max_tokens] * len(prompts)
    questions = checked_prompt_ids(tokenizer, prompts, of_each, unit=unit, **limits_in(folder))
    decoder = OnnxDecoder(folder)
    if record["kind"] == "onnx":
        names: dict[str, str | None] = {record["adapter"]["name"] or "merged": None}
    else:
        names = {"base": None} | {name: name for name in (record["adapters"] if adapters is None else adapters)}
    for adapter in names.values():  # each is there, before the first has worked for an hour
        decoder.use(adapter)
    found = {}
    for name, adapter in progress_bar(names.items(), desc="ask", leave=False):
        decoder.use(adapter)
        ids = [before_end(answer, decoder.eos_ids) for answer in decoder.generate(questions, max_tokens)]
        found[name] = tokenizer.batch_decode(ids, skip_special_tokens=True)
    return found
