"""The graph of many tasks: y + ((x·Aᵀ)·Rᵀ)·Bᵀ after every target, with R to be replaced, or chosen row by row.

Swappable: each R is an initializer of zeros that a run may replace, by an active adapter. Routed: each R is a stack
(tasks, r, r), the first of them zeros, from which the input `adapter_ids` (rows) picks one for every row.

An `.onnx_adapter` file holds s·Rᵀ of every module of one task, in ONNX Runtime's own format.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from ..adapter import Adapter
from ..basis import Basis
from ..errors import ArtifactError, BaseModelError, OutputError
from ..layers.factors import ModuleBasis
from .onnx_graph import external_files, read_graph

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto, TensorProto

BASIS_FILE = "basis.onnx_data"
IDS = "adapter_ids"
SUFFIX = ".onnx_adapter"
Arrays = dict[str, "np.ndarray[Any, Any]"]


def add_basis(path: Path, basis: Basis, outputs: Mapping[str, str], dtype: np.dtype[Any]) -> None:
    """Rewrite the graph in `path` with B, A and a swappable R on every target; A and B go into BASIS_FILE beside it.

    Args:
        outputs: module → the name of its linear layer's output in the graph, before its bias.
    """
    import onnx
    from onnx.helper import make_node, make_tensor_value_info, np_dtype_to_tensor_dtype
    from onnx.numpy_helper import from_array

    model = read_graph(path)
    targets = {output: module for module, output in outputs.items()}
    absent = set(targets) - {name for node in model.graph.node for name in node.output}
    if absent:
        what = f"the graph has no linear layer of its own for {targets[min(absent)]}"
        raise BaseModelError(what, fix="Export each adapter merged instead: --format onnx")
    nodes: list[NodeProto] = []
    with (path.parent / BASIS_FILE).open("wb") as data:
        for node in model.graph.node:
            nodes.append(node)
            y = node.output[0]
            if y not in targets:
                continue
            module, factors = targets[y], basis.modules[targets[y]]
            R = name_of_R(module, basis.sha256)
            if factors.block is None:
                onto, back, (before, after) = "MatMul", "MatMul", _factors(module, factors, dtype, data)
            else:
                onto, back, (before, after) = "Slice", "Pad", _places(module, factors.shape[0], *factors.block)
            model.graph.initializer.extend([*before, *after])
            model.graph.initializer.append(from_array(np.zeros([basis.rank] * 2, dtype), R))
            # An initializer that is an input as well may be replaced in a run.
            model.graph.input.append(make_tensor_value_info(R, np_dtype_to_tensor_dtype(dtype), [basis.rank] * 2))
            node.output[0] = f"{y}/base"
            nodes += [
                make_node(onto, [node.input[0], *(c.name for c in before)], [f"{module}/xA"], f"{module}/A"),
                make_node("MatMul", [f"{module}/xA", R], [f"{module}/xAR"], f"{module}/R"),
                make_node(back, [f"{module}/xAR", *(c.name for c in after)], [f"{module}/xARB"], f"{module}/B"),
                make_node("Add", [f"{y}/base", f"{module}/xARB"], [y], f"{module}/Add"),
            ]
    if basis.is_blocks:
        (path.parent / BASIS_FILE).unlink()  # nothing is in it
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    onnx.save(model, path)


def _factors(
    module: str, factors: ModuleBasis, dtype: np.dtype[Any], data: BinaryIO
) -> tuple[list[TensorProto], list[TensorProto]]:
    """What MatMul takes before R, and after."""
    A, B = (factor.T.float().numpy().astype(dtype) for factor in (factors.A, factors.B))
    return [_external(f"{module}.A", A, data)], [_external(f"{module}.B", B, data)]


def _places(module: str, width: int, rows: slice, columns: slice) -> tuple[list[TensorProto], list[TensorProto]]:
    """What Slice takes before R, and Pad after, where y is (batch, tokens, width)."""
    from onnx.numpy_helper import from_array

    onto = {"start": [columns.start], "stop": [columns.stop], "axis": [2]}
    pads = [0, 0, rows.start, 0, 0, width - rows.stop]
    before = [from_array(np.array(value), f"{module}.A/{name}") for name, value in onto.items()]
    return before, [from_array(np.array(pads), f"{module}.B/pads")]


def make_swappable(path: Path, basis: Basis) -> None:
    """Rewrite a graph of `onnx_torch`, which computes with `<module>.R`, so that a run may replace each R."""
    import onnx
    from onnx.helper import make_tensor_value_info
    from onnx.numpy_helper import from_array

    model = read_graph(path)
    names = {f"{module}.R": name_of_R(module, basis.sha256) for module in basis.modules}
    for tensor in model.graph.initializer:
        if tensor.name in names:
            dtype = tensor.data_type
            name = names[tensor.name]
            tensor.CopyFrom(from_array(np.zeros([basis.rank] * 2, onnx.helper.tensor_dtype_to_np_dtype(dtype)), name))
            model.graph.input.append(make_tensor_value_info(name, dtype, [basis.rank] * 2))
    for node in model.graph.node:
        for place, name in enumerate(node.input):
            node.input[place] = names.get(name, name)
    onnx.save(model, path)


def add_to_stack(path: Path, adapters: Sequence[Arrays]) -> None:
    """Make the graph in `path` a routed one, or give a routed one further adapters; the base is number 0.

    The stack lies in a data file of its own, whose name holds its number of adapters. The file of the old one must have
    one name only: onnx reads no data by a hard link.
    """
    import onnx
    from onnx.numpy_helper import to_array

    model = read_graph(path)
    routed = any(value.name == IDS for value in model.graph.input)
    present = {tensor.name: tensor for tensor in model.graph.initializer if tensor.name in adapters[0]}
    before = external_files(model)
    stacks = {}
    for name, tensor in present.items():
        own = to_array(tensor, str(path.parent))
        stacks[name] = np.concatenate([own if routed else own[None], *(adapter[name][None] for adapter in adapters)])
    file = path.parent / f"tasks-{len(next(iter(stacks.values()))) - 1}.onnx_data"
    with file.open("wb") as data:
        for name, tensor in present.items():
            tensor.CopyFrom(_external(name, stacks[name], data))
    if not routed:
        _route(model, set(present))
    path.unlink()  # it may be a link
    onnx.save(model, path)
    for name in before - external_files(model):
        (path.parent / name).unlink()


def _route(model: ModelProto, names: set[str]) -> None:
    """Pick each R from its stack by row, and make the rows' numbers an input."""
    from onnx import TensorProto
    from onnx.helper import make_node, make_tensor_value_info

    kept = [value for value in model.graph.input if value.name not in names]
    rows = next(value for value in kept if value.name == "input_ids").type.tensor_type.shape.dim[0].dim_param
    del model.graph.input[:]
    model.graph.input.extend([*kept, make_tensor_value_info(IDS, TensorProto.INT64, [rows])])
    nodes: list[NodeProto] = []
    for node in model.graph.node:
        if len(node.input) == 2 and node.input[1] in names:
            R = node.input[1]
            nodes.append(make_node("Gather", [R, IDS], [f"{R}/rows"], f"{R}/Gather", axis=0))
            node.input[1] = f"{R}/rows"
        nodes.append(node)
    del model.graph.node[:]
    model.graph.node.extend(nodes)


def _external(name: str, array: np.ndarray[Any, Any], data: BinaryIO) -> TensorProto:
    """Append `array` to `data`; returns the initializer that points there."""
    from onnx.external_data_helper import set_external_data
    from onnx.numpy_helper import from_array

    tensor = from_array(array, name)
    set_external_data(tensor, Path(data.name).name, data.tell(), data.write(tensor.raw_data))
    tensor.ClearField("raw_data")
    return tensor


def name_of_R(module: str, basis_sha256: str) -> str:
    """The name of a module's R in graph and file. It names the basis, so that a file of another one is refused."""
    return f"{module}.R.{basis_sha256[:12]}"


def scaled_R(adapter: Adapter, dtype: np.dtype[Any]) -> Arrays:
    """Parameter name → s·Rᵀ, (r, r): the graph multiplies from the right, and adapters may differ in s."""
    return {
        name_of_R(module, adapter.basis_sha256): np.ascontiguousarray((adapter.scaling * R.T).numpy().astype(dtype))
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
