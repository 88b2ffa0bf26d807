"""W0 + s·B·R·A as a plain model folder: plan and validate (`plan`), then write shard by shard (`write`)."""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

from ..adapter import Adapter
from ..bars import progress_bar
from ..base.model import AnyBase, BaseModel
from ..base.tensors import WEIGHT_INDEX
from ..cards import card
from ..choices import SEQ_CLS
from ..errors import BaseModelError, SettingsError
from ..evaluation.answer_end import write_end_ids
from ..files.kind import RECORD
from ..files.output import cannot_write, free_bytes, refuse_existing_file
from ..files.storage import expanded, read_json, write_json
from ..hub.ids import parse_hub_id
from ..provenance import adapter_provenance, command, published_training
from . import retained
from .combine import Weighted, Weights
from .folder import MergeFolder, resumable_folder
from .plan import MergePlan, plan_merge
from .retained import Retained
from .verify import compare_logits
from .write import worker_threads, write_shard

logger = logging.getLogger(__name__)


def merge(
    adapter: str | Path | Adapter | Weights | Weighted,
    out: str | Path,
    *,
    base: AnyBase | None = None,
    base_dtype: str = "auto",
    dtype: str = "auto",
    max_shard_size: str | int = "5GB",
    verify: bool = False,
    overwrite: bool = False,
    dry_run: bool = False,
    report: str | Path | None = None,
) -> dict[str, Any]:
    """Write `out`, a plain model folder with s·B·R·A added to every target of the base.

    The sum is rounded once to the stored dtype. Other tensors are copied byte for byte (or converted, when `dtype`
    asks for it), and so are tokenizer, chat template and generation files; the tokenizer's end of sequence, where
    trained answers end, is added to a generation_config.json that does not name it. Memory holds the factors of a
    module and a few megabytes per thread. Killed, the same call again goes on after the last finished shard.

    Args:
        adapter: a folder, a Hub id, a loaded Adapter; or several, each with its weight, any finite number: the sum of
            wᵢ·sᵢ·Bᵢ·Rᵢ·Aᵢ, rounded once. Those that share a basis cost no more than one.
        base: the base model, where it is not where the adapter says.
        base_dtype: `nf4`: the base's weights are rounded first, as training with that dtype holds them, so that the
            folder answers as the adapter did there. `auto`: they are taken as they lie in its folder.
        dtype: `auto` (as stored), `float32`, `bfloat16`, `float16` or `float64`.
        max_shard_size: bytes, or a number with KB, MB or GB.
        verify: compare the logits of base + adapter with those of the merged folder; fails above a tolerance.
        dry_run: return the plan; write nothing.
        report: a .json file to write with what every module retains of its update; a .png plot goes beside it.

    Returns:
        `base`, `adapter` (None of several), `out`, `base_dtype`, `dtype`, `stored` (the dtypes of what was added to),
        `modules`, `tensors`, `shards`, `bytes`.
        Of what was done also `shards_reused` (of an interrupted merge), `seconds`, `verify` and `report` where asked
        for, and `retained`: how much of the update the stored dtype kept, as `cosine`, `relative_error` and the
        `worst` module. Of a plan `expected_retained`, `peak_memory_bytes` and `free_bytes`.

    Raises:
        BaseModelError: another base, an already merged or a quantized one, a missing module, a damaged tokenizer.
        OutputError: `out` or the report exists, another merge writes it, the report cannot be written, or the disk has
            too little room.
        ArtifactError: the adapter or its basis is bad, or `verify` failed.
        SettingsError: a dtype, size, weight or report's name that is none.
        LoraSBError: several problems at once, listed; of the first one's kind.
    """
    started = time.monotonic()
    out = expanded(out)
    report = None if report is None else expanded(report)
    if report is not None:
        _check_report(report, may_exist=overwrite or dry_run)
        if not dry_run:
            with cannot_write(report), NamedTemporaryFile(prefix=f".{report.name}.", dir=report.parent):
                pass  # now, and not once the model is there
    plan = plan_merge(
        adapter,
        out,
        base=base,
        base_dtype=base_dtype,
        dtype=dtype,
        max_shard_size=max_shard_size,
        overwrite=overwrite,
    )
    result = plan.summary() | {"out": str(out)}
    if dry_run:
        return result | {
            "peak_memory_bytes": plan.peak_memory(),
            "free_bytes": free_bytes(out),
            "expected_retained": plan.expected_retained(),
        }
    identity = plan.identity()
    with resumable_folder(out, identity, overwrite=overwrite) as folder:
        modules, reused = _write_shards(plan, folder)
        if plan.identity() != identity:
            what = "a file of the base changed while it was read"
            raise BaseModelError(what, where=plan.base.folder, fix="Merge again: nothing of it was kept")
        result |= {"retained": retained.summary(modules), "shards_reused": reused}
        retained.warn(result["retained"], " and ".join(result["stored"]))
        made = {"command": command(), "retained": result["retained"]}
        _write_other_files(plan, folder.path, _provenance(plan, folder.path) | made)
        if verify:
            result["verify"] = compare_logits(plan.base, plan.adapters, folder.path, plan.rounding)
    if report is not None:
        fix = f"The model is whole, in {out}; for its report merge again, with --overwrite"
        retained.write_report(modules, report, fix)
        result["report"] = str(report)
    return result | {"seconds": round(time.monotonic() - started, 2)}


def _check_report(report: Path, *, may_exist: bool) -> None:
    if report.suffix != ".json":
        raise SettingsError(f"report is {str(report)!r}", fix="Give a file that ends in .json")
    if not report.absolute().parent.is_dir():
        raise SettingsError("the report's folder is not there", where=report, fix="Make it first")
    for path in (report, report.with_suffix(".png")):
        refuse_existing_file(path, may_exist, "the report exists")


def _write_shards(plan: MergePlan, folder: MergeFolder) -> tuple[dict[str, Retained], int]:
    """Write every shard that an earlier try has not; module → what it retained, and how many shards were there."""
    modules: dict[str, Retained] = {}
    reused = 0
    marks: list[Future[None]] = []
    with (
        progress_bar(total=plan.nbytes, desc="merge", unit="B", unit_scale=True) as bar,
        ThreadPoolExecutor(1) as marking,  # a shard goes to the disk while the next one is computed
        worker_threads() as pool,
    ):
        for name, shard in zip(plan.shard_names(), plan.shards, strict=True):
            known = folder.finished(name)
            if known is not None:
                reused += 1
                modules |= {module: Retained(*sums) for module, sums in known["retained"].items()}
                bar.update(sum(tensor.nbytes for tensor in shard))
                continue
            found = write_shard(folder.path / name, shard, plan, pool, bar)
            modules |= found
            sums = {module: [r.delta, r.error, r.cross] for module, r in found.items()}
            marks.append(marking.submit(folder.mark, name, {"retained": sums}))
        for mark in marks:
            mark.result()
    if reused:
        logger.info("%d of %d shards were finished by an interrupted merge", reused, len(plan.shards))
    return modules, reused


def _provenance(plan: MergePlan, folder: Path) -> dict[str, Any]:
    """The content of `lorasb.json`: one adapter and its training, or every one of a combination with its weight."""
    adapter = plan.adapters[0]
    said = {"kind": "merged", **adapter_provenance(adapter), "base_dtype": plan.rounding.base_dtype}
    said |= {"dtype": plan.dtype, "modules": len(plan.touched)}
    if not plan.combined:
        return said | {"training": published_training(adapter, folder)}
    for key in ("adapter", "basis", "rank", "scaling"):  # these are each adapter's own
        del said[key]
    return said | {"adapters": plan.combined}


def _write_other_files(plan: MergePlan, folder: Path, provenance: Mapping[str, Any]) -> None:
    names = plan.shard_names()
    if len(names) > 1:
        weight_map = {t.name: name for name, shard in zip(names, plan.shards, strict=True) for t in shard}
        index = {"metadata": {"total_size": plan.nbytes}, "weight_map": weight_map}
        write_json(folder / WEIGHT_INDEX, index)
    for path in plan.side_files:
        copy = folder / path.relative_to(plan.base.folder)
        copy.parent.mkdir(exist_ok=True)
        shutil.copyfile(path, copy)
    _write_config(plan, folder)
    _name_tokenizer_code(plan.base, folder)
    if plan.adapters[0].task_type == SEQ_CLS:
        _name_padding(plan, folder)
    elif plan.tokenizer is not None:
        write_end_ids(folder, plan.tokenizer)
    write_json(folder / RECORD, provenance)
    card.write(folder, card.merged_card(provenance))


def _write_config(plan: MergePlan, folder: Path) -> None:
    """config.json anew where the dtype or the task changes it, or where it names code that stays on the Hub."""
    config = _with_code_on_the_hub(plan.base, plan.base.config)
    if plan.dtype == "auto" and plan.adapters[0].task_type != SEQ_CLS and config == plan.base.config:
        return
    if plan.dtype != "auto":
        config.pop("torch_dtype", None)
        config["dtype"] = plan.dtype
    if plan.adapters[0].task_type == SEQ_CLS:
        config.pop("num_labels", None)  # of another head; transformers would believe it rather than the names
        config |= _classifier_config(plan.base, plan.adapters[0].labels)
    write_json(folder / "config.json", config)


def _classifier_config(base: BaseModel, labels: Sequence[Any]) -> dict[str, Any]:
    """The entries of config.json that make `base` load as a sequence classifier over `labels`.

    Without labels it predicts one number: regression.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES

    names = [str(label) for label in labels] or ["LABEL_0"]  # transformers counts these: its num_labels
    entries = {
        "architectures": [MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES[base.config["model_type"]]],
        "id2label": {str(i): name for i, name in enumerate(names)},
        "label2id": {name: i for i, name in enumerate(names)},
        "pad_token_id": base.tokenizer.pad_token_id,
    }
    return entries | {"problem_type": "single_label_classification" if labels else "regression"}


def _name_tokenizer_code(base: BaseModel, folder: Path) -> None:
    path = folder / "tokenizer_config.json"
    if path.is_file():
        config = read_json(path)
        if (named := _with_code_on_the_hub(base, config)) != config:
            write_json(path, named)


def _with_code_on_the_hub(base: BaseModel, config: Mapping[str, Any]) -> dict[str, Any]:
    """`config` with the code that its `auto_map` names, which is not fetched, under the base's repository, as
    transformers itself writes it."""

    def named(code: Any) -> Any:
        if isinstance(code, Mapping):
            return {key: named(entry) for key, entry in code.items()}
        if isinstance(code, list):  # of a tokenizer the slow one and the fast one
            return [named(entry) for entry in code]
        return f"{base.name_or_path}--{code}" if isinstance(code, str) and "--" not in code else code

    if parse_hub_id(base.name_or_path) is None or "auto_map" not in config:
        return dict(config)
    return {**config, "auto_map": named(config["auto_map"])}


def _name_padding(plan: MergePlan, folder: Path) -> None:
    """A classifier's config has the id of the pad token. Without its name the tokenizer makes no batches, and with the
    name of another, one without an embedding, batches that the model cannot take."""
    token = plan.base.tokenizer.pad_token
    for path in filter(Path.is_file, (folder / "tokenizer_config.json", folder / "special_tokens_map.json")):
        config = read_json(path)
        if path.name == "special_tokens_map.json" and "pad_token" not in config:
            continue  # an old tokenizer's, which need not name every token
        named = config.get("pad_token")
        if (named.get("content") if isinstance(named, dict) else named) != token:
            write_json(path, config | {"pad_token": token})
