"""`lorasb inspect` without a folder: what the project has."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from lorasb_export import Adapter, Basis, calibrate
from lorasb_export.settings import CalibrationSettings
from tests import project_of_a
from tests.conftest import lorasb

project = project_of_a.project


def test_every_task_and_adapter_has_a_line(project: Path, llama: Path, sums: Path) -> None:
    Adapter.load("adapters/a").load_basis().save("basis")
    figures = {"test": {"exact_match": {"base": 0.25, "adapter": 1.0, "rows": 24}}, "valid": {}}
    scored = Adapter.start(Basis.load("basis"))
    scored.training = {"task": "a", "data": str(sums), "steps": 7, "valid_loss": 0.125, "evaluation": figures}
    scored.save("adapters/a", overwrite=True)
    of_own = Adapter.start(calibrate(str(llama), {}, CalibrationSettings(rank=2, directions="random")))
    of_own.save("adapters/own", embed=True)
    of_other = calibrate(str(llama), {}, CalibrationSettings(rank=3, directions="random"))
    of_other.save("others")
    Adapter.start(Basis.load("others")).save("adapters/other")
    Path("adapters/broken").mkdir()
    Path("adapters/broken/adapter_config.json").write_text("{}")
    Path("adapters/.b.run/checkpoint-1").mkdir(parents=True)
    with (project / "lorasb.toml").open("a") as file:
        file.write(f'[tasks.b]\ndata = "{sums}"\n')
    found = json.loads(lorasb("inspect", "--json").stdout)
    assert (found["kind"], found["base_model"], found["path"]) == ("project", str(llama), str(project))
    assert (found["basis"]["sha256"], found["basis"]["rank"]) == (Basis.load("basis").sha256, 4)
    assert list(found["adapters"]) == ["a", "b", "broken", "other", "own"]
    of_a = found["adapters"]["a"]
    assert (of_a["state"], of_a["basis"], of_a["steps"], of_a["evaluation"]) == ("fitted", "shared", 7, figures)
    assert found["adapters"]["b"] == {"state": "not fitted"}
    assert found["adapters"]["broken"]["state"] == "damaged"
    assert "peft_type is None" in found["adapters"]["broken"]["problem"]
    assert (found["adapters"]["own"]["basis"], found["adapters"]["other"]["basis"]) == ("own", "../../others")
    assert found["unfinished"] == [str(project / "adapters" / ".b.run")]
    lines = lorasb("inspect").stdout.splitlines()
    assert lines[3].split() == "a fitted shared 0.1250 exact_match 100.0% (base 25.0%, 24 test rows)".split()
    assert [line.split()[:4] for line in lines[4:8:2]] == [["b", "not", "fitted"], ["other", "fitted", "other", "-"]]
    assert lines[-1].startswith(f"unfinished run: {project}/adapters/.b.run (")


def test_a_project_that_has_nothing_yet(project: Path) -> None:
    (project / "adapters").rename("elsewhere")
    assert lorasb("inspect").stdout.splitlines()[1:] == [
        "basis: not made yet",
        f"{'adapter':20} {'state':10} {'basis':8} {'valid loss':>10}  scored",
        f"{'a':20} not fitted",
    ]


def test_a_basis_that_cannot_be_read_hides_no_adapter(project: Path) -> None:
    Path("basis").mkdir()
    Path("basis/basis_config.json").write_text("[")
    found = json.loads(lorasb("inspect", "--json").stdout)
    assert (found["basis"]["state"], found["adapters"]["a"]["state"]) == ("damaged", "fitted")
    assert "basis: damaged: unreadable JSON" in lorasb("inspect").stdout


def test_a_folder_that_is_no_project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert "Error: nothing to inspect: there is no lorasb.toml here" in lorasb("inspect").stderr
    for option in ("--verify", "--data=x"):
        done = lorasb("inspect", option)
        assert (done.exit_code, "is for one folder: name it" in done.stderr) == (2, True)


def test_it_is_told_without_torch(project: Path) -> None:
    command = [sys.executable, "-X", "importtime", "-m", "lorasb_cli", "inspect"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=project)
    assert (done.returncode, " torch\n" in done.stderr) == (0, False), done.stderr
