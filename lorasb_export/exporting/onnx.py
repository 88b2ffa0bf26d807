"""One task as an ONNX graph with its weights merged: a decoder with a key-value cache, or a classifier."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..adapter import Adapter
from ..base.model import BaseModel
from ..cards import card
from ..choices import CAUSAL_LM, MAX_DROP
from ..data.source import AnySource
from ..data.task import TaskData, load_held_out
from ..errors import SettingsError
from ..evaluation.evaluate import require_same_kind, with_labels_of
from ..files.atomic import atomic_folder
from ..files.output import refuse_own_input, require_room
from ..files.storage import expanded
from ..merging.merge import merge
from .onnx_build import build
from .onnx_exporter import PRECISIONS, check_request, exporter_for, parameter_count
from .onnx_quantize import quantize
from .onnx_record import finish, onnx_provenance, write_record
from .onnx_verify import held_out_rows, require_equal, verify_classifier, verify_folder

logger = logging.getLogger(__name__)


def export_onnx(
    adapter: str | Path,
    out: str | Path,
    *,
    base: str | Path | None = None,
    precision: str = "fp32",
    verify: bool = True,
    data: Mapping[str, AnySource | TaskData] = {},
    max_drop: float = MAX_DROP,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Merge an adapter and write the result as an ONNX folder.

    The folder holds `model.onnx`, `model.onnx_data`, the tokenizer with its chat template, `config.json`,
    `generation_config.json`, `lorasb.json` and a card; from onnxruntime-genai's builder also `genai_config.json`.

    Arguments and errors: as for `export`. int8 and int4 make graphs for the CPU, bf16 one for CUDA alone.
    """
    check_request(precision, PRECISIONS)
    wanted = PRECISIONS[precision]
    out, source = expanded(out), Adapter.load(adapter)
    refuse_own_input(out, source.folder, source.basis_source)
    card.check(out)
    name = source.name or ""
    if data and name not in data:
        raise SettingsError(f"data is of {', '.join(data)}, the adapter is {name}", fix="Give its task under its name")
    task = with_labels_of(source, load_held_out(name, data[name])) if data else None
    if task is not None:
        require_same_kind(source, task)
    base_model = source.base.resolve(base)
    exporter = exporter_for(base_model, source.task_type)
    compared = verify and precision != "bf16"
    if verify and not compared:
        logger.warning("a bf16 graph runs on CUDA alone: it is not compared with torch")
    asked = held_out_rows({"": task}, base_model) if task and compared and source.task_type == CAUSAL_LM else {}
    with atomic_folder(out, overwrite=overwrite, kind="onnx") as folder:
        scratch = folder / "scratch"  # inside, so that a killed run leaves one folder and the next call removes it
        scratch.mkdir()
        merged_bytes = 4 if wanted.dtype == "float32" else 2
        require_room(folder, int(parameter_count(base_model) * (merged_bytes + wanted.room)))
        merge(source, scratch / "merged", base=base_model, dtype=wanted.dtype)
        build(exporter, scratch / "merged", folder, precision, scratch, source.task_type)
        if wanted.bits:
            quantize(folder, wanted.bits)
        record = {"kind": "onnx", "exporter": exporter, **onnx_provenance(source, precision)}
        write_record(folder, record)
        if compared:
            merged = BaseModel.resolve(scratch / "merged")
            if source.task_type == CAUSAL_LM:
                found = verify_folder(folder, merged, {"": None}, asked)[""]
            else:
                found = verify_classifier(folder, merged, source, task)
            record["verify"] = require_equal(found, precision, out, max_drop)
        shutil.rmtree(scratch)
        return finish(folder, out, record)
