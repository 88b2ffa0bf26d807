"""Damaged and hostile ONNX folders are refused before they are run."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from lorasb_export.errors import ArtifactError
from lorasb_export.exporting.onnx_record import read_record, write_record
from lorasb_export.exporting.onnx_run import OnnxDecoder
from lorasb_export.exporting.onnx_swap import read_adapter

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxruntime_genai")
onnx = pytest.importorskip("onnx")


def refused(folder: Path, match: str) -> None:
    with pytest.raises(ArtifactError, match=match):
        OnnxDecoder(folder)


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "a/../../secret", "..", "sub/data", "..\\secret", ""])
def test_data_outside_the_folder_is_refused(tasks_onnx: Path, tmp_path: Path, name: str) -> None:
    folder = shutil.copytree(tasks_onnx, tmp_path / "hostile")
    (tmp_path / "secret").write_bytes((folder / "model.onnx_data").read_bytes())
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    tensor = next(tensor for tensor in model.graph.initializer if tensor.external_data)
    next(entry for entry in tensor.external_data if entry.key == "location").value = name
    onnx.save(model, folder / "model.onnx")
    refused(folder, "no file beside the graph")


def test_links_and_lying_offsets_are_refused(tasks_onnx: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tasks_onnx, tmp_path / "hostile")
    data = folder / "model.onnx_data"
    data.rename(tmp_path / "elsewhere")
    data.symlink_to(tmp_path / "elsewhere")
    refused(folder, "is a link")
    data.unlink()
    refused(folder, "is missing")
    (tmp_path / "elsewhere").rename(data)
    whole = (folder / "model.onnx").read_bytes()
    for key, value in (("offset", "-4"), ("offset", str(1 << 60)), ("length", "4"), ("length", "many")):
        model = onnx.load_from_string(whole)
        tensor = next(tensor for tensor in model.graph.initializer if tensor.external_data)
        next(entry for entry in tensor.external_data if entry.key == key).value = value
        onnx.save(model, folder / "model.onnx")
        refused(folder, "does not fit its data|not described whole")


@pytest.mark.parametrize("name", ["model.onnx", "model.onnx_data", "basis.onnx_data", "red.onnx_adapter"])
def test_truncated_files_are_refused(tasks_onnx: Path, tmp_path: Path, name: str) -> None:
    folder = shutil.copytree(tasks_onnx, tmp_path / "cut")
    whole = (folder / name).read_bytes()
    for kept in (0, 1, len(whole) // 10, len(whole) // 2, len(whole) - 1):
        (folder / name).write_bytes(whole[:kept])
        with pytest.raises(ArtifactError):
            OnnxDecoder(folder, "red")


def test_an_adapter_with_nan_is_refused(tasks_onnx: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tasks_onnx, tmp_path / "nan")
    path = folder / "red.onnx_adapter"
    data = bytearray(path.read_bytes())
    R = next(iter(read_adapter(path).values())).tobytes()
    at = data.index(R)
    data[at : at + 4] = np.float32("nan").tobytes()
    path.write_bytes(data)
    with pytest.raises(ArtifactError, match="not finite"):
        OnnxDecoder(folder, "red")


@pytest.mark.parametrize("kind", ["sparse_value", "sparse_values"])
def test_a_sparse_constant_reads_no_file_of_another_folder(tasks_onnx: Path, tmp_path: Path, kind: str) -> None:
    folder = shutil.copytree(tasks_onnx, tmp_path / "hostile")
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    values = onnx.TensorProto(data_type=onnx.TensorProto.FLOAT, dims=[1], name="v", data_location="EXTERNAL")
    values.external_data.add(key="location", value="../secret")
    sparse = onnx.SparseTensorProto(values=values, dims=[4])
    sparse.indices.CopyFrom(onnx.numpy_helper.from_array(np.array([0], np.int64)))
    attribute = onnx.helper.make_attribute(kind, sparse if kind == "sparse_value" else [sparse])
    model.graph.node.add(op_type="Constant", output=["c"]).attribute.append(attribute)
    onnx.save(model, folder / "model.onnx")
    refused(folder, "no file beside the graph")


def test_a_record_names_no_adapter_of_another_folder(tasks_onnx: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tasks_onnx, tmp_path / "hostile")
    record = read_record(folder)
    record["adapters"]["../x"] = record["adapters"]["red"]
    write_record(folder, record)
    with pytest.raises(ArtifactError, match=r"'../x' cannot be a file of the folder"):
        read_record(folder)
