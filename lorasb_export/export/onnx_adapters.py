"""Many tasks on one ONNX graph: the base model once, B and A once, and one small `.onnx_adapter` file per task.

After every target's y = x·W0ᵀ the graph computes y + ((x·Aᵀ)·Rᵀ)·Bᵀ. Each R is an initializer of zeros that a run may
replace, so the graph alone is the base model, and an active adapter makes it the task.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from ..artifact import Adapter, Basis, check_same_basis
from ..errors import BaseModelError, SettingsError
from ..storage import atomic_folder, require_room
from .onnx import PROVIDERS, base_of, build, check_request, finish, parameters, provenance
from .onnx_verify import require_equal, verify_folder

if TYPE_CHECKING:
    import torch
    from onnx import NodeProto, TensorProto

_BASIS_FILE = "basis.onnx.data"  # beside the builder's model.onnx.data, which stays as it was written
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}")
_MODULE = re.compile(r"model\.layers\.(\d+)\.(?:self_(attn)|(mlp))\.(\w+)")
_MERGED = "Export each adapter merged instead: --format onnx"


def export_onnx_adapters(
    adapters: Sequence[str | Path],
    out: str | Path,
    *,
    base: str | Path | None = None,
    precision: str = "fp32",
    verify: bool = False,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Write one ONNX folder for several adapters of one basis: a graph, and `NAME.onnx_adapter` for each of them.

    Args:
        adapters: LoRA-SB adapter folders, or ones on the Hub; the last part of each path is its name.
        base: another place of the base model than the one the adapters name; the weights must be the same.
        precision: of the base's weights: `fp32`, `int8`, `int4` or `fp16`. Only fp16 changes that of B, A and R.
        verify: compare each adapter's greedy answers with those of base + adapter in torch; fp32 fails when they
            differ.

    Returns:
        what `lorasb.json` records, with `out` and the `bytes` written.

    Raises:
        ArtifactError: the adapters do not share one basis, or `verify` failed.
        SettingsError: no adapter, two of one name, or a name that is no plain file name.
        and what `export_onnx` raises.
    """
    check_request(precision, {name: PROVIDERS[name] for name in PROVIDERS if name != "bf16"})  # numpy has no bf16
    files = [adapter_file(adapter) for adapter in adapters]
    if not files or len(set(files)) != len(files):
        raise SettingsError("the adapters need different names", where=", ".join(files), fix="Rename a folder")
    tasks = [Adapter.load(adapter) for adapter in adapters]
    basis = tasks[0].load_basis()
    for task in tasks:
        check_same_basis(task, basis)
        model = base_of(task, base)
    model.verify(basis.base, basis.modules)
    dtype = np.dtype(np.float16 if precision == "fp16" else np.float32)
    with atomic_folder(Path(out), overwrite=overwrite) as folder:
        scratch = folder / "scratch"
        scratch.mkdir()
        require_room(folder, parameters(model) * dtype.itemsize)
        build(model.folder, folder, precision, scratch, "fuse_qkv=false")
        shutil.rmtree(scratch)
        _add_basis(folder, basis, dtype)
        for task, file in zip(tasks, files, strict=True):
            _write_adapter(folder / file, task, dtype)
        record = {"kind": "onnx-adapters", **provenance(tasks[0], precision)}
        del record["adapter"], record["scaling"], record["training"]  # those of the first; each adapter's are listed
        record["adapters"] = {
            file: {"sha256": task.sha256, "scaling": task.scaling} for file, task in zip(files, tasks, strict=True)
        }
        if verify:
            record["verify"] = {
                file: require_equal(verify_folder(folder, model.folder, task, folder / file), precision, out)
                for file, task in zip(files, tasks, strict=True)
            }
        return finish(folder, out, record)


def adapter_file(adapter: str | Path) -> str:
    """`NAME.onnx_adapter` for an adapter's folder or Hub id. Raises SettingsError for a name unfit for a file."""
    name = Path(adapter).resolve().name if Path(adapter).is_dir() else str(adapter).partition("@")[0].split("/")[-1]
    if not _NAME.fullmatch(name):
        raise SettingsError(
            f"{name!r} cannot name an adapter", where=adapter, fix="Use letters, digits, dots, dashes and underscores"
        )
    return f"{name}.onnx_adapter"


def _parameter(module: str, basis_sha256: str) -> str:
    """The name of a module's R in graph and file. It names the basis, so that a file of another one is refused."""
    return f"{module}.R.{basis_sha256[:12]}"


def _add_basis(folder: Path, basis: Basis, dtype: np.dtype[Any]) -> None:
    """Rewrite `model.onnx` with B, A and R on every target; A and B go into a data file of their own."""
    import onnx
    from onnx.helper import make_node, make_tensor_value_info, np_dtype_to_tensor_dtype
    from onnx.numpy_helper import from_array

    model = onnx.load(folder / "model.onnx", load_external_data=False)
    targets = {_output_of(module): module for module in basis.modules}
    absent = set(targets) - {name for node in model.graph.node for name in node.output}
    if absent:
        raise BaseModelError(f"the graph has no linear layer of its own for {targets[min(absent)]}", fix=_MERGED)
    nodes: list[NodeProto] = []
    with (folder / _BASIS_FILE).open("wb") as data:
        for node in model.graph.node:
            nodes.append(node)
            y = node.output[0]
            if y not in targets:
                continue
            module, factors = targets[y], basis.modules[targets[y]]
            A, B, R = f"{module}.A", f"{module}.B", _parameter(module, basis.sha256)
            model.graph.initializer.extend([_external(A, factors.A, dtype, data), _external(B, factors.B, dtype, data)])
            model.graph.initializer.append(from_array(np.zeros([basis.rank] * 2, dtype), R))
            # An initializer that is an input as well may be replaced in a run.
            model.graph.input.append(make_tensor_value_info(R, np_dtype_to_tensor_dtype(dtype), [basis.rank] * 2))
            node.output[0] = f"{y}/base"
            nodes += [
                make_node("MatMul", [node.input[0], A], [f"{module}/xA"], f"{module}/A"),
                make_node("MatMul", [f"{module}/xA", R], [f"{module}/xAR"], f"{module}/R"),
                make_node("MatMul", [f"{module}/xAR", B], [f"{module}/xARB"], f"{module}/B"),
                make_node("Add", [f"{y}/base", f"{module}/xARB"], [y], f"{module}/Add"),
            ]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    onnx.save(model, folder / "model.onnx")


def _output_of(module: str) -> str:
    """The builder's name for the output of linear layer `module`, before its bias; the same in all precisions."""
    found = _MODULE.fullmatch(module)
    if found is None:
        raise BaseModelError(f"the ONNX builder has no name for module {module}", fix=_MERGED)
    layer, attention, mlp, leaf = found.groups()
    return f"/model/layers.{layer}/{attention or mlp}/{leaf}/MatMul/output_0"


def _external(name: str, factor: torch.Tensor, dtype: np.dtype[Any], data: BinaryIO) -> TensorProto:
    """Append the transpose of `factor` (rows, columns) to `data`; returns the initializer that points there."""
    from onnx import TensorProto
    from onnx.helper import np_dtype_to_tensor_dtype

    offset = data.tell()
    length = data.write(factor.T.float().numpy().astype(dtype).tobytes())
    tensor = TensorProto(name=name, dims=list(factor.T.shape), data_type=np_dtype_to_tensor_dtype(dtype))
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", _BASIS_FILE), ("offset", offset), ("length", length)):
        tensor.external_data.add(key=key, value=str(value))
    return tensor


def _write_adapter(path: Path, task: Adapter, dtype: np.dtype[Any]) -> None:
    """Write s·Rᵀ of every module: the graph multiplies from the right, and adapters may differ in s."""
    import onnxruntime as ort

    values = {
        _parameter(module, task.basis_sha256): ort.OrtValue.ortvalue_from_numpy(
            np.ascontiguousarray((task.scaling * R.T).numpy().astype(dtype))
        )
        for module, R in task.R.items()
    }  # held until the file is written: the format does not keep them alive
    file = ort.AdapterFormat()
    file.set_adapter_version(1)
    file.set_model_version(1)
    file.set_parameters(values)
    file.export_adapter(str(path))
