"""What an ONNX export takes and refuses, before an exporter runs."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from lorasb_export.adapter import Adapter
from lorasb_export.base.model import BaseModel
from lorasb_export.choices import CAUSAL_LM, SEQ_CLS
from lorasb_export.data.task import TaskData, task_of
from lorasb_export.errors import ArtifactError, BaseModelError, DataError, SettingsError
from lorasb_export.exporting import onnx, onnx_verify
from lorasb_export.exporting.export import export
from lorasb_export.exporting.onnx_adapters import add_onnx_adapters, export_onnx_adapters
from lorasb_export.exporting.onnx_ask import ask_onnx
from lorasb_export.exporting.onnx_build import _ask_as_we_do
from lorasb_export.exporting.onnx_record import write_record
from lorasb_export.exporting.onnx_run import _batches
from lorasb_export.exporting.onnx_verify import held_out_rows
from lorasb_export.files.storage import read_json, write_json
from tests.random_adapter import adapter_on
from tests.tiny import make_llama

pytest.importorskip("onnxruntime_genai")
pytest.importorskip("onnxscript")

ROWS = TaskData("sums", "memory", CAUSAL_LM, {"test": [{"prompt": "1+1=", "completion": "2"}]}, "0")


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


@pytest.fixture
def exported(tmp_path: Path) -> Path:
    """As far as it is read before an adapter is added."""
    (tmp_path / "tasks").mkdir()
    write_record(
        tmp_path / "tasks", {"kind": "onnx-adapters", "routed": False, "adapters": {}, "basis": {"sha256": ""}}
    )
    return tmp_path / "tasks"


def test_a_classifier_is_not_added_without_its_head(bert: Path, exported: Path, tmp_path: Path) -> None:
    adapter_on(bert, tmp_path / "a", SEQ_CLS, labels=["no", "yes"])
    with pytest.raises(BaseModelError, match="every classifier has a head of its own"):
        add_onnx_adapters([tmp_path / "a"], exported, verify=False)
    with pytest.raises(BaseModelError, match="every classifier has a head of its own"):
        export_onnx_adapters([tmp_path / "a"], tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_data_of_no_adapter_is_refused(llama: Path, exported: Path, tmp_path: Path) -> None:
    adapter_on(llama, tmp_path / "a", CAUSAL_LM)
    data = {"a": ROWS, "b": ROWS}
    with pytest.raises(SettingsError, match=r"data is of b, none of the adapters.*under its adapter's name"):
        add_onnx_adapters([tmp_path / "a"], exported, data=data)
    with pytest.raises(SettingsError, match="data is of b, none of the adapters"):
        export([tmp_path / "a"], tmp_path / "new", format="onnx-adapters", data=data)


def test_a_token_without_an_embedding_is_told_of_before_a_graph_is_asked(tmp_path: Path) -> None:
    base = make_llama(tmp_path / "base")
    tokenizer = BaseModel.resolve(base).tokenizer
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(base)
    told = r"'<new>', token 98, has no embedding: the base has 98 \({} 2\)"
    rows = [{"prompt": prompt, "completion": "2"} for prompt in ("1+1=", "1<new>")]
    with pytest.raises(DataError, match=told.format("sums: test row")):
        held_out_rows({"sums": task_of("sums", {"train": rows, "test": rows})}, BaseModel.resolve(base))
    write_record(base, {"kind": "onnx", "task_type": CAUSAL_LM})
    with pytest.raises(DataError, match=told.format("prompt")):
        ask_onnx(base, ["1+1=", "1<new>"], max_tokens=1)


def test_a_readme_that_cannot_be_kept_is_told_of_before_the_work(llama: Path, exported: Path, tmp_path: Path) -> None:
    adapter_on(llama, tmp_path / "a", CAUSAL_LM)
    (exported / "README.md").write_bytes(b"---\ntags: [\n---\n")
    with pytest.raises(ArtifactError, match="front matter is not valid YAML"):
        add_onnx_adapters([tmp_path / "a"], exported)


def test_a_graph_is_asked_without_the_penalties_of_chats(llama: Path, tmp_path: Path) -> None:
    """transformers.js reads them, and would answer otherwise than torch does here."""
    out = shutil.copytree(llama, tmp_path / "out")
    penalties = {"repetition_penalty": 1.3, "no_repeat_ngram_size": 3}
    write_json(out / "generation_config.json", {"eos_token_id": 97, "temperature": 0.5, **penalties})
    _ask_as_we_do(out)
    assert read_json(out / "generation_config.json") == {"eos_token_id": [97, 2], "temperature": 0.5}


def test_logits_that_are_not_finite_are_no_tie(tmp_path: Path) -> None:
    """Of two prompts torch's logits of the first are NaN where the graph answered something else."""
    logits = torch.zeros(1, 2, 3)
    logits[0, 1, 2] = torch.nan  # argmax takes it: 2, where the graph said 1

    def network(ids: torch.Tensor) -> Any:
        return SimpleNamespace(logits=logits if ids[0, 0] == 1 else torch.eye(3)[None, :2])

    found = onnx_verify._compare(cast("Any", network), [[1], [2]], [[0, 1], [0, 1]], torch.device("cpu"))
    assert (found["equal_tokens"], math.isnan(found["gap"])) == (3, True)
    with pytest.raises(ArtifactError, match="no answer of the fp32 graph"):
        onnx_verify.require_equal(found, "fp32", tmp_path, 2.0)


def test_a_prompt_that_is_longer_than_what_is_read_at_once_is_read_alone() -> None:
    assert _batches([3000, 5]) == [[0], [1]]
