"""Format version 1 (docs/reference/files.md): its keys, and strict loading.

What does not look exactly as the format says is refused, naming file, key and reason.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import NoneType
from typing import Any, get_args

from .choices import TaskType
from .errors import ArtifactError, UnreadableError, some
from .files.kind import ADAPTER_CONFIG, BASIS_CONFIG, PEFT_TYPE
from .files.storage import read_header, read_json

FORMAT_VERSION = 1
# Key → the type, or types, of its value.
BASE_KEYS = {"name_or_path": str, "revision": (str, NoneType), "fingerprint": str}
BASIS_KEYS = {
    "format_version": int,
    "base_model": dict,
    "rank": int,
    "target_modules": dict,
    "sha256": str,
    "calibration": dict,
    "created_with": dict,
    "config_sha256": str,
}
ADAPTER_KEYS = {
    "peft_type": str,
    "format_version": int,
    "base_model_name_or_path": str,
    "revision": (str, NoneType),
    "base_fingerprint": str,
    "task_type": str,
    "r": int,
    "scaling": (int, float),
    "target_modules": list,
    "basis": dict,
    "training": dict,
    "sha256": str,
    "config_sha256": str,
}
# Of what is said about the training, the keys that are read again; any other is its author's own.
_TRAINING_KEYS: Mapping[str, Any] = {
    **dict.fromkeys(("task", "data", "data_sha256", "chat_template_sha256", "plot"), (str, NoneType)),
    **dict.fromkeys(("data_read", "splits_sha256", "learning_rates", "capture", "energy"), (dict, NoneType)),
    "labels": (list, NoneType),
    "settings": dict,
    "evaluation": dict,
}
_MODULE = re.compile(r"[^\s.-][^\s.]*(\.[^\s.-][^\s.]*)*")  # a part with a dash before it would be a flag
_FIGURES = {"base", "adapter", "rows"}

AGAIN = "Train or fetch it again"
EDITED = "Written by another version, or edited by hand"


def _check_config(config: Mapping[str, Any], keys: Mapping[str, Any], where: Path) -> None:
    """Refuse a config of another format version, with other keys or types, or changed since it was written."""
    if config.get("format_version") != FORMAT_VERSION:
        raise UnreadableError(
            f"format version {config.get('format_version')!r:.40}, this release reads {FORMAT_VERSION}",
            where=where,
            fix="Use the lorasb release that wrote it, or write it again",
        )
    check_keys(config, keys, where)
    check_seal(config, where)


def check_seal(config: Mapping[str, Any], where: Path) -> None:
    """Refuse a config that is not as `sealed` made it."""
    try:
        digest = sealed(config)["config_sha256"]
    except RecursionError:
        raise ArtifactError("the config is nested too deeply", where=where, fix=EDITED) from None
    if config.get("config_sha256") != digest:
        raise ArtifactError("the config is not as it was written: its config_sha256 differs", where=where, fix=EDITED)


def sealed(config: Mapping[str, Any]) -> dict[str, Any]:
    """`config` with its own digest, so that a changed number is found: sha256 of its JSON, keys sorted, no spaces."""
    content = json.loads(json.dumps({key: value for key, value in config.items() if key != "config_sha256"}))
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return content | {"config_sha256": hashlib.sha256(text.encode()).hexdigest()}


def check_keys(found: Mapping[str, Any], keys: Mapping[str, Any], where: Path) -> None:
    """Refuse unknown and missing keys, and values of a wrong type, of a JSON object; all at once.

    Args:
        keys: key → the type, or types, its value may have.
    """
    problems = [f"missing {key:.80}" for key in sorted(set(keys) - set(found))]
    problems += [f"unknown {key:.80}" for key in sorted(set(found) - set(keys))]
    for key in sorted(set(keys) & set(found)):
        if not isinstance(found[key], keys[key]) or isinstance(found[key], bool):
            problems.append(f"{key:.80} is {found[key]!r:.40}")
    if problems:
        raise ArtifactError(f"wrong keys: {some(problems)}", where=where, fix=EDITED)


def check_training(training: Mapping[str, Any], where: object) -> None:
    """Refuse a `training` object with values of a shape that the model card cannot show."""
    wrong = [key for key, types in _TRAINING_KEYS.items() if key in training and not isinstance(training[key], types)]
    splits = training.get("evaluation", {}).values() if not wrong else ()
    if not all(isinstance(of_split, dict) and all(map(_are_figures, of_split.values())) for of_split in splits):
        wrong = ["evaluation"]
    wrong = wrong or [key for key, value in training.items() if not _is_text(value)]
    if wrong:
        fix = 'Write data as text, evaluation as {split: {metric: {"base", "adapter", "rows"}}}, or use another key'
        raise ArtifactError(f"training says {wrong[0]} in another shape than fit does", where=where, fix=fix)


def _are_figures(value: Any) -> bool:
    return isinstance(value, dict) and set(value) >= _FIGURES


def only_numbers(evaluation: Mapping[str, Any]) -> dict[str, Any]:
    """An evaluation of that shape, {split: {metric: {base, adapter, rows}}}, with nothing but numbers, or None."""
    return {
        split: {metric: {key: finite(of_one[key]) for key in sorted(_FIGURES)} for metric, of_one in of_split.items()}
        for split, of_split in evaluation.items()
    }


def finite(value: Any) -> float | None:
    """A number, as others' JSON can say it; None for whatever else a config has in its place, also for NaN."""
    try:
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        return value if is_number and math.isfinite(value) else None
    except OverflowError:  # a whole number too large for arithmetic
        return None


def _is_text(value: Any) -> bool:
    """Whether all that is said in it can be written to a file: JSON can have half of a character (`"\\ud800"`)."""
    try:
        json.dumps(value, ensure_ascii=False, default=str).encode()
    except UnicodeEncodeError:
        return False
    return True


def _check_module_names(names: Iterable[Any], where: Path) -> None:
    """Refuse what is no module's dotted name. The last parts of such names are words of vLLM's command line."""
    for name in names:
        if not isinstance(name, str) or not _MODULE.fullmatch(name):
            raise ArtifactError(f"{name!r:.80} is no name of a module", where=where, fix=EDITED)


def read_basis_config(folder: Path) -> tuple[dict[str, Any], dict[str, tuple[int, int]]]:
    """A basis folder's config, checked, and the shape (out, in) of every target module.

    Raises:
        ArtifactError: unknown or missing keys, another format version, a rank that does not fit a module.
    """
    where = folder / BASIS_CONFIG
    config = read_json(where)
    _check_config(config, BASIS_KEYS, where)
    check_keys(config["base_model"], BASE_KEYS, where)
    rank = config["rank"]
    if not config["target_modules"]:
        raise ArtifactError("the basis has no module", where=where, fix=EDITED)
    _check_module_names(config["target_modules"], where)
    for name, shape in config["target_modules"].items():
        if not (isinstance(shape, list) and len(shape) == 2 and all(type(n) is int for n in shape)):
            raise ArtifactError(f"target module {name} has no shape [out, in]", where=where, fix=EDITED)
        if not 0 < rank <= min(shape):
            raise ArtifactError(f"rank {rank} does not fit module {name} {shape}", where=where, fix=EDITED)
    return config, {name: (rows, columns) for name, (rows, columns) in config["target_modules"].items()}


def basis_tensors(shapes: Mapping[str, tuple[int, int]], rank: int, path: Path) -> dict[str, list[int]]:
    """The shapes of what the `basis.safetensors` at `path` must hold: B, A and S of every module, or its block."""
    if any(name.endswith(".block") for name in read_header(path)):
        return {f"{name}.block": [2, 2] for name in shapes}
    expected: dict[str, list[int]] = {}
    for name, (rows, columns) in shapes.items():
        expected |= {f"{name}.B": [rows, rank], f"{name}.A": [rank, columns], f"{name}.S": [rank]}
    return expected


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """An adapter folder's config, checked.

    Raises:
        ArtifactError: of another kind, unknown or missing keys, another format version, changed since it was written;
            see also `check_training`.
    """
    where = folder / ADAPTER_CONFIG
    config = read_json(where)
    if config.get("peft_type") != PEFT_TYPE:
        what = f"peft_type is {config.get('peft_type')!r:.40}, not {PEFT_TYPE}"
        raise ArtifactError(what, where=where, fix="Not a LoRA-SB adapter")
    _check_config(config, ADAPTER_KEYS, where)
    if config["task_type"] not in get_args(TaskType):
        what = f"task_type is {config['task_type']!r:.40}"
        raise ArtifactError(what, where=where, fix=f"It can be {' or '.join(get_args(TaskType))}; {AGAIN}")
    if finite(config["scaling"]) is None:
        raise ArtifactError(f"non-finite: scaling is {config['scaling']!r:.40}", where=where, fix=AGAIN)
    check_keys(config["basis"], {"sha256": str, "source": str}, where)
    _check_module_names(config["target_modules"], where)
    check_training(config["training"], where)
    return config
