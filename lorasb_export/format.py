"""Format version 1 (docs/reference/files.md): its keys, and strict loading.

What does not look exactly as the format says is refused, naming file, key and reason.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from types import NoneType
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from .errors import ArtifactError
from .factors import BlockBasis
from .kind import PEFT_TYPE
from .storage import FLOATS, TensorInfo, read_header, read_json, sha256_file

FORMAT_VERSION = 1
TORCH_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
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
    **dict.fromkeys(("task", "data", "data_sha256", "plot"), (str, NoneType)),
    **dict.fromkeys(("learning_rates", "capture", "energy"), (dict, NoneType)),
    "labels": (list, NoneType),
    "settings": dict,
    "evaluation": dict,
}
_FIGURES = {"base", "adapter", "rows"}

_MOST = 10  # problems told at once
AGAIN = "Train or fetch it again"
_HINT = "Written by another version, or edited by hand"


def check_config(config: Mapping[str, Any], keys: Mapping[str, Any], where: Path) -> None:
    """Refuse a config of another format version, with other keys or types, or changed since it was written."""
    if config.get("format_version") != FORMAT_VERSION:
        raise ArtifactError(
            f"format version {config.get('format_version')!r:.40}, this release reads {FORMAT_VERSION}",
            where=where,
            fix="Use the lorasb release that wrote it, or write it again",
        )
    check_keys(config, keys, where)
    check_seal(config, where)


def check_seal(config: Mapping[str, Any], where: Path) -> None:
    """Refuse a config that is not as `sealed` made it."""
    if config.get("config_sha256") != sealed(config)["config_sha256"]:
        raise ArtifactError("the config is not as it was written: its config_sha256 differs", where=where, fix=_HINT)


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
    if len(problems) > _MOST:
        problems[_MOST:] = [f"and {len(problems) - _MOST} more"]
    if problems:
        raise ArtifactError(f"wrong keys: {', '.join(problems)}", where=where, fix=_HINT)


def check_training(training: Mapping[str, Any], where: object) -> None:
    """Refuse a `training` object with values of a shape that the model card cannot show."""
    wrong = [key for key, types in _TRAINING_KEYS.items() if key in training and not isinstance(training[key], types)]
    splits = training.get("evaluation", {}).values() if not wrong else ()
    if not all(isinstance(of_split, dict) and all(map(_are_figures, of_split.values())) for of_split in splits):
        wrong = ["evaluation"]
    if wrong:
        fix = 'Write data as text, evaluation as {split: {metric: {"base", "adapter", "rows"}}}, or use another key'
        raise ArtifactError(f"training says {wrong[0]} in another shape than fit does", where=where, fix=fix)


def _are_figures(value: Any) -> bool:
    return isinstance(value, dict) and set(value) >= _FIGURES


def read_basis_config(folder: Path) -> tuple[dict[str, Any], dict[str, tuple[int, int]]]:
    """A basis folder's config, checked, and the shape (out, in) of every target module.

    Raises:
        ArtifactError: unknown or missing keys, another format version, a rank that does not fit a module.
    """
    where = folder / "basis_config.json"
    config = read_json(where)
    check_config(config, BASIS_KEYS, where)
    check_keys(config["base_model"], BASE_KEYS, where)
    rank = config["rank"]
    if not config["target_modules"]:
        raise ArtifactError("the basis has no module", where=where, fix=_HINT)
    for name, shape in config["target_modules"].items():
        if not (isinstance(shape, list) and len(shape) == 2 and all(type(n) is int for n in shape)):
            raise ArtifactError(f"target module {name} has no shape [out, in]", where=where, fix=_HINT)
        if not 0 < rank <= min(shape):
            raise ArtifactError(f"rank {rank} does not fit module {name} {shape}", where=where, fix=_HINT)
    return config, {name: (rows, columns) for name, (rows, columns) in config["target_modules"].items()}


def basis_tensors(shapes: Mapping[str, tuple[int, int]], rank: int, path: Path) -> dict[str, list[int]]:
    """The shapes of what the `basis.safetensors` at `path` must hold: B, A and S of every module, or its block."""
    if any(name.endswith(".block") for name in read_header(path)[0]):
        return {f"{name}.block": [2, 2] for name in shapes}
    expected: dict[str, list[int]] = {}
    for name, (rows, columns) in shapes.items():
        expected |= {f"{name}.B": [rows, rank], f"{name}.A": [rank, columns], f"{name}.S": [rank]}
    return expected


def block_factors(block: torch.Tensor, name: str, shape: tuple[int, int], rank: int, where: Path) -> BlockBasis:
    """The factors of module `name` from what the file holds of its block. Raises ArtifactError when it has no such."""
    spans = [slice(*span) for span in block.tolist()]
    if any(s.start < 0 or s.stop > n or s.stop - s.start != rank for s, n in zip(spans, shape, strict=True)):
        what = f"tensor {name}.block is {block.tolist()}, no block of {rank} rows and columns of {list(shape)}"
        raise ArtifactError(what, where=where, fix=_HINT)
    return BlockBasis(shape, *spans)


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """An adapter folder's config, checked.

    Raises:
        ArtifactError: of another kind, unknown or missing keys, another format version, changed since it was written;
            see also `check_training`.
    """
    where = folder / "adapter_config.json"
    config = read_json(where)
    if config.get("peft_type") != PEFT_TYPE:
        what = f"peft_type is {config.get('peft_type')!r:.40}, not {PEFT_TYPE}"
        raise ArtifactError(what, where=where, fix="Not a LoRA-SB adapter")
    check_config(config, ADAPTER_KEYS, where)
    check_keys(config["basis"], {"sha256": str, "source": str}, where)
    check_training(config["training"], where)
    return config


def save_tensors(tensors: Mapping[str, torch.Tensor], path: Path) -> None:
    """Write a safetensors file. Raises OSError when the disk does not take it."""
    path.touch()
    mode = path.stat().st_mode
    try:
        save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, path, {"format": "pt"})
        path.chmod(mode)  # safetensors makes it readable for its owner alone
    except SafetensorError as error:
        number = re.search(r"\(os error (\d+)\)", str(error))  # all it says of the system's error
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from None


def load_tensors(
    path: Path, expected: Mapping[str, list[int]], digest: str, device: str | torch.device = "cpu"
) -> dict[str, torch.Tensor]:
    """Tensors of exactly the `expected` names and shapes, finite; refused from the header where possible.

    Args:
        digest: the sha256 the file must have.
    """
    check_tensors(path, expected, digest)
    try:
        tensors: dict[str, torch.Tensor] = load_file(path, device=str(device))
    except SafetensorError as error:
        raise ArtifactError(f"unreadable safetensors file: {error}", where=path, fix="Fetch it again") from None
    for name, tensor in tensors.items():
        check_finite(tensor, name, path)
    return tensors


def check_tensors(path: Path, expected: Mapping[str, list[int]], digest: str) -> dict[str, TensorInfo]:
    """The header of `path`, which must hold exactly the `expected` names and shapes.

    The file is read through once for its digest; nothing of it is kept.

    R and S are fp32, places of blocks int64, everything else may be any float.

    Args:
        digest: the sha256 the file must have.
    """
    header, _ = read_header(path)
    check_keys(header, dict.fromkeys(expected, TensorInfo), path)
    for name, shape in expected.items():
        only = {"F32"} if name.endswith((".R", ".S")) else {"I64"} if name.endswith(".block") else FLOATS
        if list(header[name].shape) != shape or header[name].dtype not in only:
            raise ArtifactError(
                f"tensor {name} is {header[name].dtype} {list(header[name].shape)}, "
                f"expected {'/'.join(sorted(only))} {shape}",
                where=path,
                fix=_HINT,
            )
    if sha256_file(path) != digest:
        raise ArtifactError(f"sha256 is not {digest[:12]}… as its config says", where=path, fix="Fetch it again")
    return header


def read_tensor(path: Path, info: TensorInfo) -> torch.Tensor:
    """One tensor of a safetensors file, read into memory of its own: mapped pages would count as ours.

    Raises:
        ArtifactError: the file ends before the tensor does.
    """
    buffer = bytearray(info.nbytes)
    with path.open("rb") as file:
        file.seek(info.start)
        if file.readinto(buffer) != len(buffer):
            raise ArtifactError("the file became shorter while it was read", where=path, fix="Fetch it again")
    return torch.frombuffer(buffer, dtype=TORCH_DTYPES[info.dtype]).view(info.shape)


def check_finite(tensor: torch.Tensor, name: str, where: Path) -> None:
    """Raise ArtifactError when `tensor` holds an infinity or a NaN."""
    lowest, highest = tensor.aminmax()  # NaN comes out as both; a tenth of the time of looking at every entry
    if not (torch.isfinite(lowest) and torch.isfinite(highest)):
        raise ArtifactError(f"tensor {name} has non-finite values", where=where, fix=AGAIN)
