"""`.onnx_adapter` files: s·Rᵀ of every module of one task, in ONNX Runtime's own format."""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

import numpy as np

from ..adapter import Adapter
from ..errors import ArtifactError, OutputError

SUFFIX = ".onnx_adapter"
Arrays = dict[str, "np.ndarray[Any, Any]"]


def parameter(module: str, basis_sha256: str) -> str:
    """The name of a module's R in graph and file. It names the basis, so that a file of another one is refused."""
    return f"{module}.R.{basis_sha256[:12]}"


def values(adapter: Adapter, dtype: np.dtype[Any]) -> Arrays:
    """Parameter name → s·Rᵀ, (r, r): the graph multiplies from the right, and adapters may differ in s."""
    return {
        parameter(module, adapter.basis_sha256): np.ascontiguousarray((adapter.scaling * R.T).numpy().astype(dtype))
        for module, R in adapter.R.items()
    }


def write_adapter(path: Path, arrays: Arrays) -> None:
    """Write one adapter's file and read it back.

    Raises:
        ArtifactError: what was written is not what was meant. (onnxruntime does not keep the arrays alive while it
            writes: with a temporary among them the file holds rubbish, and says nothing.)
        OutputError: the disk does not take it.
    """
    import onnxruntime as ort

    held = {name: ort.OrtValue.ortvalue_from_numpy(array) for name, array in arrays.items()}
    file = ort.AdapterFormat()
    file.set_adapter_version(_checksum(arrays))
    file.set_model_version(1)
    file.set_parameters(held)
    try:
        file.export_adapter(str(path))
    except RuntimeError as error:  # onnxruntime's, which does not know why
        what = f"cannot write an ONNX adapter: {(str(error).partition('> ')[2] or str(error)).strip()}"
        raise OutputError(what, where=path, fix="Free or check that disk, then start again") from None
    read_adapter(path)


def read_adapter(path: Path) -> Arrays:
    """Parameter name → array.

    Raises:
        ArtifactError: no such file, not an adapter, damaged, or with numbers that are not finite.
    """
    import onnxruntime as ort

    if not path.is_file():
        raise ArtifactError("no such ONNX adapter", where=path, fix="Give an .onnx_adapter of the folder, or its name")
    try:
        file = ort.AdapterFormat.read_adapter(str(path))
        version = file.get_adapter_version()
        found = {name: value.numpy().copy() for name, value in file.get_parameters().items()}
    except Exception as error:  # onnxruntime's errors have no base class of their own
        raise ArtifactError(f"not an ONNX adapter, or truncated: {error}", where=path, fix="Export it again") from None
    if not all(np.isfinite(array).all() for array in found.values()):
        raise ArtifactError("the ONNX adapter holds numbers that are not finite", where=path, fix="Export it again")
    if version != _checksum(found):
        raise ArtifactError("the ONNX adapter is not as it was written", where=path, fix="Export it again")
    return found


def _checksum(arrays: Arrays) -> int:
    """CRC-32 of names, dtypes, shapes and values, without its sign bit: a damaged file is found by itself."""
    found = 0
    for name, array in sorted(arrays.items()):
        found = zlib.crc32(f"{name}{array.dtype}{array.shape}".encode() + array.tobytes(), found)
    return found & 0x7FFFFFFF
