"""What an ONNX export takes and refuses, before an exporter runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lorasb_export.adapter import Adapter
from lorasb_export.choices import SEQ_CLS
from lorasb_export.data.task import TaskData
from lorasb_export.exporting import onnx
from lorasb_export.exporting.export import export
from tests.random_adapter import adapter_on

pytest.importorskip("onnxruntime_genai")
pytest.importorskip("onnxscript")


@pytest.mark.parametrize(
    ("training", "found", "learnt"),
    [
        ({"labels": [], "regression": True}, [3, 4], [3.0, 4.0]),
        ({"labels": ["1", "unknown"]}, [1, 1], ["1", "1"]),
    ],
)
def test_a_classifier_is_compared_on_the_rows_that_evaluate_takes(
    training: dict[str, Any],
    found: list[int],
    learnt: list[Any],
    bert: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    adapter_on(bert, tmp_path / "made", SEQ_CLS, **training).save(tmp_path / "a")
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": "some text", "label": label}) + "\n" for label in found))
    compared: list[TaskData] = []

    def verify(_folder: Path, _base: object, _adapter: Adapter, task: TaskData) -> dict[str, Any]:
        compared.append(task)
        return {"gap": 0.0}

    monkeypatch.setattr(onnx, "build", lambda *_: None)
    monkeypatch.setattr(onnx, "verify_classifier", verify)
    export(tmp_path / "a", tmp_path / "onnx", format="onnx", data={"a": rows})
    labels = [row["label"] for row in compared[0].rows("test")]
    assert (labels, list(map(type, labels))) == (learnt, list(map(type, learnt)))
