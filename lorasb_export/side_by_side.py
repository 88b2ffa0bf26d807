"""`lorasb generate`: one prompt, and what the base and each adapter answer; in torch, or of an ONNX export."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from .adapter import Adapter, load_basis_once
from .answer_end import before_end
from .base import BaseModel
from .basis import Basis
from .choices import CAUSAL_LM
from .encoding import prompt_ids
from .errors import ArtifactError, SettingsError
from .inference import answers
from .names import refuse_many


def ask_adapters(
    prompt: str,
    adapters: Mapping[str, str],
    *,
    base: str | None,
    max_tokens: int,
    dtype: str,
) -> dict[str, str]:
    """The base's answer to one prompt, then each adapter's, on one loaded base.

    Args:
        adapters: name → adapter folder or Hub id, all of one base.
        base: the base, where the adapters do not find it; needed when there are none.

    Raises:
        ArtifactError: an adapter is a classifier.
        BaseModelError: an adapter belongs to another base.
        SettingsError: an adapter is called `base`.
    """
    if "base" in adapters:
        what = "an adapter called 'base' would hide the base's answer"
        raise SettingsError(what, where=adapters["base"], fix="Ask for it by its path")
    loaded = {name: Adapter.load(source) for name, source in adapters.items()}
    for name, adapter in loaded.items():
        if adapter.task_type != CAUSAL_LM:
            fix = "Leave it out, and score it with `lorasb evaluate`"
            raise ArtifactError(f"adapter {name} is a classifier, which answers nothing", where=adapter.folder, fix=fix)
    first = next(iter(loaded.values()), None)
    base_model = BaseModel.resolve(base or "") if first is None else first.base.resolve(base)
    bases: dict[str, Basis] = {}
    for adapter in loaded.values():
        base_model.verify(adapter.base, adapter.R)
        load_basis_once(adapter, bases)
    tokenizer = base_model.tokenizer
    network = base_model.load(dtype=dtype)
    found = {"base": answers(network, tokenizer, [prompt], max_tokens=max_tokens)[0]}
    for name, adapter in loaded.items():
        adapter.inject(network)
        found[name] = answers(network, tokenizer, [prompt], max_tokens=max_tokens)[0]
    return found


def ask_onnx(
    folder: Path, prompt: str, adapters: Sequence[str] | None = None, *, max_tokens: int = 128
) -> dict[str, str]:
    """Greedy answers of an exported decoder to one prompt, asked as in training.

    Args:
        adapters: of an `onnx-adapters` folder; None takes all, of a few.

    Returns:
        of an `onnx-adapters` folder the answers of `base` and of each adapter; else that of the one merged in.

    Raises:
        ArtifactError: not an ONNX export, one of a classifier, a damaged one, or it has no such adapter.
        SettingsError: `adapters` of a folder that has one merged in; None where there are many.
    """
    from .exporting.onnx_record import read_record
    from .exporting.onnx_run import OnnxDecoder, tokenizer_in

    record = read_record(folder)
    if record["task_type"] != CAUSAL_LM:
        fix = "Call lorasb_export.exporting.onnx_run.classify, or score its adapter with `lorasb evaluate`"
        raise ArtifactError("the graph is a classifier, which answers nothing", where=folder, fix=fix)
    if record["kind"] == "onnx" and adapters is not None:
        raise SettingsError("the folder has one adapter, merged in", where=folder, fix="Name no adapters")
    if adapters is None:
        refuse_many(record.get("adapters", ()), folder)

    tokenizer = tokenizer_in(folder)
    ids = prompt_ids(tokenizer, prompt)
    decoder = OnnxDecoder(folder)
    if record["kind"] == "onnx":
        names: dict[str, str | None] = {record["adapter"]["name"] or "merged": None}
    else:
        names = {"base": None} | {name: name for name in (record["adapters"] if adapters is None else adapters)}
    found = {}
    for name, adapter in names.items():
        decoder.use(adapter)
        answer = before_end(decoder.generate([ids], max_tokens)[0], decoder.eos_ids)
        found[name] = tokenizer.batch_decode([answer], skip_special_tokens=True)[0]
    return found
