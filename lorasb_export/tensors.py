"""The tensors of a folder's safetensors files: written, checked against what the format says, read."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from .errors import ArtifactError
from .files.storage import FLOATS, TensorInfo, read_header, sha256_file
from .format import AGAIN, EDITED, check_keys

TORCH_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


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


def load_tensors(path: Path, expected: Mapping[str, list[int]], digest: str) -> dict[str, torch.Tensor]:
    """Tensors of exactly the `expected` names and shapes, finite; refused from the header where possible.

    Args:
        digest: the sha256 the file must have.
    """
    check_tensors(path, expected, digest)
    try:
        tensors: dict[str, torch.Tensor] = load_file(path)
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
    header = read_header(path)
    check_keys(header, dict.fromkeys(expected, TensorInfo), path)
    for name, shape in expected.items():
        only = {"F32"} if name.endswith((".R", ".S")) else {"I64"} if name.endswith(".block") else FLOATS
        if list(header[name].shape) != shape or header[name].dtype not in only:
            raise ArtifactError(
                f"tensor {name} is {header[name].dtype} {list(header[name].shape)}, "
                f"expected {'/'.join(sorted(only))} {shape}",
                where=path,
                fix=EDITED,
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


def all_finite(tensor: torch.Tensor) -> bool:
    """Whether no entry is an infinity or a NaN."""
    lowest, highest = tensor.aminmax()  # NaN comes out as both; a tenth of the time of looking at every entry
    return bool(torch.isfinite(lowest) and torch.isfinite(highest))


def check_finite(tensor: torch.Tensor, name: str, where: Path) -> None:
    """Raise ArtifactError when `tensor` holds an infinity or a NaN."""
    if not all_finite(tensor):
        raise ArtifactError(f"tensor {name} has non-finite values", where=where, fix=AGAIN)


def head_shapes(header: Mapping[str, TensorInfo], modules: Sequence[str], where: Path) -> dict[str, list[int]]:
    """What the file of a classifier holds beside R. Raises ArtifactError where it cannot be of a head."""
    head = {name: list(info.shape) for name, info in header.items() if not name.endswith(".R")}
    bodies = tuple({f"{name.partition('.')[0]}." for name in modules})
    for name, shape in head.items():
        if name.startswith(bodies) or 0 in shape:
            fix = "Train or fetch it again: a head lies outside the model's body"
            raise ArtifactError(f"{name} {shape} is no tensor of a classifier's head", where=where, fix=fix)
    return head


def gathered(tensors: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Whole tensors of FSDP2's shards, on the device of their mesh: offloaded to the CPU they cannot meet there."""
    return {
        name: t.to(t.device_mesh.device_type).full_tensor() if hasattr(t, "full_tensor") else t
        for name, t in tensors.items()
    }


def check_savable(R: Mapping[str, torch.Tensor], head: Mapping[str, torch.Tensor], shape: tuple[int, int]) -> None:
    """Raise ArtifactError for what `load` would refuse."""
    for name, tensor in {**R, **head}.items():
        if name in R and tensor.shape != shape:
            what, fix = f"R is {list(tensor.shape)}, not {list(shape)}", "Gather it on this process before it is saved"
            raise ArtifactError(what, where=name, fix=fix)
        if not all_finite(tensor):
            raise ArtifactError("it is not finite", where=name, fix="Nothing was written; train at a lower rate")
