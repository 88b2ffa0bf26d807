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
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from .errors import ArtifactError
from .storage import FLOATS, TensorInfo, read_header, read_json, sha256_file

FORMAT_VERSION = 1
PEFT_TYPE = "LORA_SB"  # a tool that does not know this type refuses the folder instead of loading half of it
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

_MOST = 10  # problems told at once
_HINT = "Written by another version, or edited by hand"


class ModuleBasis(NamedTuple):
    """The frozen factors of one module: B (out, r) and A (r, in) orthonormal, S (r,) fp32."""

    B: torch.Tensor
    A: torch.Tensor
    S: torch.Tensor

    @property
    def block(self) -> tuple[slice, slice] | None:
        """Where s·B·R·A is s·R in a block of W and zero elsewhere, the block's rows and columns; else None."""
        rows, columns = _span(self.B), _span(self.A.T)
        return rows and columns and (rows, columns)


def _span(factor: torch.Tensor) -> slice | None:
    """The rows in which `factor` (n, r) is the unit matrix, where it is zero in all others."""
    start, rank = int(factor[:, 0].argmax()), factor.shape[1]
    span = slice(start, start + rank)
    is_unit = torch.equal(factor[span], torch.eye(rank).to(factor)) and int(factor.count_nonzero()) == rank
    return span if is_unit else None


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


def read_basis_config(folder: Path) -> tuple[dict[str, Any], dict[str, list[int]]]:
    """A basis folder's config, checked, and the shape of every tensor its `basis.safetensors` must hold.

    Raises:
        ArtifactError: unknown or missing keys, another format version, a rank that does not fit a module.
    """
    where = folder / "basis_config.json"
    config = read_json(where)
    check_config(config, BASIS_KEYS, where)
    check_keys(config["base_model"], BASE_KEYS, where)
    rank = config["rank"]
    expected: dict[str, list[int]] = {}
    if not config["target_modules"]:
        raise ArtifactError("the basis has no module", where=where, fix=_HINT)
    for name, shape in config["target_modules"].items():
        if not (isinstance(shape, list) and len(shape) == 2 and all(type(n) is int for n in shape)):
            raise ArtifactError(f"target module {name} has no shape [out, in]", where=folder)
        rows, columns = shape
        if not 0 < rank <= min(rows, columns):
            raise ArtifactError(f"rank {rank} does not fit module {name} {shape}", where=folder)
        expected |= {f"{name}.B": [rows, rank], f"{name}.A": [rank, columns], f"{name}.S": [rank]}
    return config, expected


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """An adapter folder's config, checked.

    Raises:
        ArtifactError: of another kind, unknown or missing keys, another format version, changed since it was written.
    """
    where = folder / "adapter_config.json"
    config = read_json(where)
    if config.get("peft_type") != PEFT_TYPE:
        what = f"peft_type is {config.get('peft_type')!r:.40}, not {PEFT_TYPE}"
        raise ArtifactError(what, where=where, fix="Not a LoRA-SB adapter")
    check_config(config, ADAPTER_KEYS, where)
    check_keys(config["basis"], {"sha256": str, "source": str}, where)
    return config


def save_tensors(tensors: Mapping[str, torch.Tensor], path: Path) -> None:
    """Write a safetensors file. Raises OSError when the disk does not take it."""
    try:
        save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, path, {"format": "pt"})
    except SafetensorError as error:
        number = re.search(r"\(os error (\d+)\)", str(error))  # all it says of the system's error
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from None


def load_tensors(
    path: Path, expected: Mapping[str, list[int]], digest: str | None = None, device: str | torch.device = "cpu"
) -> dict[str, torch.Tensor]:
    """Tensors of exactly the `expected` names and shapes, float and finite; refused from the header where possible.

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


def check_tensors(path: Path, expected: Mapping[str, list[int]], digest: str | None = None) -> dict[str, TensorInfo]:
    """The header of `path`, which must hold exactly the `expected` names and shapes; its bytes stream by once.

    R and S are fp32, everything else may be any float.

    Args:
        digest: the sha256 the file must have; None to read the header alone.
    """
    header, _ = read_header(path)
    check_keys(header, dict.fromkeys(expected, TensorInfo), path)
    for name, shape in expected.items():
        only = {"F32"} if name.endswith((".R", ".S")) else FLOATS
        if list(header[name].shape) != shape or header[name].dtype not in only:
            raise ArtifactError(
                f"tensor {name} is {header[name].dtype} {list(header[name].shape)}, "
                f"expected {'/'.join(sorted(only))} {shape}",
                where=path,
            )
    if digest is not None and sha256_file(path) != digest:
        raise ArtifactError(f"sha256 is not {digest[:12]}… as its config says", where=path, fix="Fetch it again")
    return header


def check_finite(tensor: torch.Tensor, name: str, where: Path) -> None:
    """Raise ArtifactError when `tensor` holds an infinity or a NaN."""
    lowest, highest = tensor.aminmax()  # NaN comes out as both; a tenth of the time of looking at every entry
    if not (torch.isfinite(lowest) and torch.isfinite(highest)):
        raise ArtifactError(f"tensor {name} has non-finite values", where=where, fix="Train or fetch it again")
