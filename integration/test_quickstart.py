"""The whole line on the real model: every way to run an adapter answers alike, and the project can be used on."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest

from integration.conftest import Quickstart
from integration.torture.zygote import shared_zygote
from lorasb_export.adapter import Adapter
from lorasb_export.files.kind import artifact_kind
from lorasb_export.files.storage import read_json
from lorasb_export.quickstart.line import NEXT, PUSH

WAYS = ("base", "adapter", "merged", "peft", "onnx", "served")
pytestmark = pytest.mark.timeout(3600)


def lorasb(folder: Path, *words: str) -> Any:
    done = shared_zygote().run("lorasb_cli", *words, "--json", folder=folder)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_the_table(quickstart: Quickstart) -> None:
    found = quickstart.result["exact_match"]
    print(json.dumps({"exact_match": found, "seconds": quickstart.result["seconds"]}, indent=2))
    assert set(found) == {"dates", "orders"}
    assert all(tuple(scores) == WAYS for scores in found.values())
    assert all(scores["base"] < 0.2 and scores["adapter"] > 0.8 for scores in found.values())


def test_five_ways_agree_row_by_row(quickstart: Quickstart) -> None:
    assert quickstart.result["disagreements"] == []
    merged = quickstart.result["exact_match"][quickstart.result["merged_adapter"]]
    assert None not in merged.values()


def test_the_result_names_every_folder(quickstart: Quickstart) -> None:
    result = quickstart.result
    assert artifact_kind(Path(result["basis"])) == "basis"
    assert artifact_kind(Path(result["merged"])) == "merged"
    assert artifact_kind(Path(result["peft"])) == "peft"
    assert artifact_kind(Path(result["onnx"])) == "onnx"
    hashes = {Adapter.load(folder).load_basis().sha256 for folder in result["adapters"].values()}
    assert hashes == {read_json(Path(result["basis"]) / "basis_config.json")["sha256"]}
    assert set(result["seconds"]) >= {
        "model",
        "calibrate",
        "fit_dates",
        "fit_orders",
        "merge",
        "onnx",
        "serve",
        "total",
    }


def test_an_adapter_is_small(quickstart: Quickstart) -> None:
    for folder in quickstart.result["adapters"].values():
        assert (Path(folder) / "adapter.safetensors").stat().st_size < 2e6  # 30 modules of 128 by 128 in fp32


def test_the_project_can_be_used_on(quickstart: Quickstart) -> None:
    folder = quickstart.folder
    inspect, generate, serve, push = (shlex.split(command)[1:] for command in (*NEXT, PUSH))
    assert lorasb(folder, *inspect)["basis_matches"]
    assert lorasb(folder, *generate, "--max-tokens", "16")["answers"]["dates"].startswith("2031-")
    assert {"dates", "orders"} <= set(lorasb(folder, *serve, "--dry-run")["models"])
    pushed = lorasb(folder, *push, "--dry-run")["pushed"]
    assert pushed
    assert all(one["private"] for one in pushed)
    assert lorasb(folder, "merge", "--out", "again/", "--dry-run")["modules"] == 30


def test_evaluate_finds_what_quickstart_found(quickstart: Quickstart) -> None:
    found = lorasb(quickstart.folder, "evaluate", "dates", "--dtype", "float32")["evaluation"]["dates"]
    expected = quickstart.result["exact_match"]["dates"]
    assert (found["base"], found["adapter"]) == (
        pytest.approx(expected["base"]),
        pytest.approx(expected["adapter"], abs=1e-4),
    )
