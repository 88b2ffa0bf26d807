"""Reading an ONNX graph that somebody else may have made: nothing outside its folder is touched."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import ArtifactError
from ..hub.cache import is_blob

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto, NodeProto, TensorProto

_AGAIN = "The file is damaged: export or fetch it again"


def read_graph(path: Path) -> ModelProto:
    """The graph in `path`, without the weights of its data files, which are checked to be there and whole.

    Raises:
        ArtifactError: no file, not an ONNX graph, or a tensor whose data is not in a plain file beside it: a path
            (the CVE-2022-25882 family), a link, a missing or a short file.
    """
    import onnx
    from google.protobuf.message import DecodeError

    if not path.is_file():
        raise ArtifactError("file not found", where=path, fix="Check the path")
    try:
        model = onnx.load(path, load_external_data=False)
    except DecodeError:
        raise ArtifactError("not an ONNX graph, or truncated", where=path, fix=_AGAIN) from None
    if not model.graph.node or not model.graph.output:
        raise ArtifactError("the ONNX graph is empty, or truncated", where=path, fix=_AGAIN)
    for tensor in _tensors(model):
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            _check_data(tensor, path)
    return model


def external_files(model: ModelProto) -> set[str]:
    """Names of the data files a graph refers to."""
    return {entry.value for tensor in _tensors(model) for entry in tensor.external_data if entry.key == "location"}


def rename_data(model: ModelProto, old: str, new: str) -> None:
    """Make every tensor in the data file `old` point to `new`."""
    for tensor in _tensors(model):
        for entry in tensor.external_data:
            if entry.key == "location" and entry.value == old:
                entry.value = new


def _check_data(tensor: TensorProto, path: Path) -> None:
    import onnx
    from onnx.helper import tensor_dtype_to_np_dtype

    entries = {entry.key: entry.value for entry in tensor.external_data}
    name = entries.get("location", "")
    if not name or name in (".", "..") or "/" in name or "\\" in name or ":" in name or "\0" in name:
        raise ArtifactError(
            f"tensor {tensor.name} has its data in {name!r}, which is no file beside the graph",
            where=path,
            fix="Do not load this folder: a graph from a stranger can read files this way",
        )
    data = path.parent / name
    if data.is_symlink() and not is_blob(data.resolve()):
        raise ArtifactError(f"the data file {name} is a link", where=path, fix="Put the file itself beside the graph")
    if not data.is_file():
        raise ArtifactError(f"the data file {name} is missing", where=path, fix="Keep the files of the folder together")
    bits = 4 if tensor.data_type in (onnx.TensorProto.INT4, onnx.TensorProto.UINT4) else 0
    try:
        bits = bits or 8 * tensor_dtype_to_np_dtype(tensor.data_type).itemsize
        needed = math.ceil(math.prod(tensor.dims) * bits / 8)
        offset, length = int(entries.get("offset", 0)), int(entries.get("length", needed))
    except (KeyError, ValueError):
        raise ArtifactError(f"tensor {tensor.name} is not described whole", where=path, fix=_AGAIN) from None
    if offset < 0 or length != needed or offset + length > data.stat().st_size:
        raise ArtifactError(f"tensor {tensor.name} does not fit its data in {name}", where=path, fix=_AGAIN)


def _tensors(model: ModelProto) -> Iterator[TensorProto]:
    """Every tensor of a graph, its functions and subgraphs: each may point to a file."""
    yield from _in_graph(model.graph)
    for function in model.functions:
        for node in function.node:
            yield from _in_attributes(node)


def _in_graph(graph: GraphProto) -> Iterator[TensorProto]:
    yield from graph.initializer
    for sparse in graph.sparse_initializer:
        yield from (sparse.values, sparse.indices)
    for node in graph.node:
        yield from _in_attributes(node)


def _in_attributes(node: NodeProto) -> Iterator[TensorProto]:
    for attribute in node.attribute:
        if attribute.HasField("t"):
            yield attribute.t
        yield from attribute.tensors
        for sparse in (attribute.sparse_tensor, *attribute.sparse_tensors):
            yield from (sparse.values, sparse.indices)
        if attribute.HasField("g"):
            yield from _in_graph(attribute.g)
        for graph in attribute.graphs:
            yield from _in_graph(graph)
