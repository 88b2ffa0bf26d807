"""`lorasb inspect` without a folder: what the project has."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lorasb_export import Adapter, Basis, calibrate
from lorasb_export.files.storage import cache_folder, read_json, write_json
from lorasb_export.format import sealed
from lorasb_export.settings import CalibrationSettings
from tests import project_of_a
from tests.conftest import lorasb
from tests.forks import exit_code_of_a_fork, give_up_roots_rights

project = project_of_a.project
FIGURES = {"exact_match": {"base": 0.25, "adapter": 1.0, "rows": 24}}
NO_BETTER = {"exact_match": {"base": 0.25, "adapter": 0.25, "rows": 24}}


def inspected() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(lorasb("inspect", "--json").stdout)
    return found


def rewrite(config: Path, **changes: Any) -> None:
    """Change a config as a stranger may: it seals what it says."""
    write_json(config, sealed(read_json(config) | changes))


def test_every_task_and_adapter_has_a_line(project: Path, llama: Path, sums: Path) -> None:
    Adapter.load("adapters/a").load_basis().save("basis")
    scored = Adapter.fresh(Basis.load("basis"))
    of_training = {"task": "a", "data": str(sums), "steps": 7, "valid_loss": 0.125}
    scored.training = {**of_training, "evaluation": {"valid": {}, "test": FIGURES}}
    scored.save("adapters/a", overwrite=True)
    of_own = Adapter.fresh(calibrate(str(llama), {}, CalibrationSettings(rank=2, directions="random")))
    of_own.save("adapters/own", embed=True)
    of_other = calibrate(str(llama), {}, CalibrationSettings(rank=3, directions="random"))
    of_other.save("others")
    Adapter.fresh(Basis.load("others")).save("adapters/other")
    for name, config in (("broken", {"peft_type": "LORA_SB"}), ("peft", {"peft_type": "LORA"})):
        Path("adapters", name).mkdir()
        write_json(Path("adapters", name, "adapter_config.json"), config)
    Path("adapters/.b.run/checkpoint-1").mkdir(parents=True)
    with (project / "lorasb.toml").open("a") as file:
        file.write(f'[tasks.b]\ndata = "{sums}"\n')
    found = inspected()
    assert (found["kind"], found["base_model"], found["path"]) == ("project", str(llama), str(project))
    assert (found["basis"]["sha256"], found["basis"]["rank"]) == (Basis.load("basis").sha256, 4)
    adapters = found["adapters"]
    assert list(adapters) == ["a", "b", "broken", "other", "own", "peft"]
    assert [adapter["task"] for adapter in adapters.values()] == [True, True, False, False, False, False]
    of_a = adapters["a"]
    assert (of_a["state"], of_a["basis"], of_a["steps"], of_a["valid_loss"]) == ("fitted", "shared", 7, 0.125)
    assert of_a["evaluation"] == {"valid": {}, "test": FIGURES}
    assert adapters["b"] == {"task": True, "path": f"{project}/adapters/b", "state": "not_fitted"}
    assert (adapters["broken"]["state"], adapters["peft"]["state"]) == ("damaged", "not_ours")
    assert "format version None" in adapters["broken"]["problem"]
    assert (adapters["own"]["basis"], adapters["other"]["basis"]) == ("own", "other")
    assert found["unfinished"] == [str(project / "adapters" / ".b.run")]
    lines = [" ".join(line.split()) for line in lorasb("inspect").stdout.splitlines()]
    assert lines[3] == "a fitted shared 0.1250 exact_match 100.0% (base 25.0%, 24 test rows)"
    assert (lines[4], lines[6]) == ("b not fitted", "other fitted other - (of no task)")
    rewrite(Path("adapters/a/adapter_config.json"), training=of_training | {"evaluation": {"test": NO_BETTER}})
    assert "no better than the base: a" in lorasb("inspect").stdout.splitlines()
    assert lines[-1].startswith(f"unfinished run: {project}/adapters/.b.run (")


def test_of_many_adapters_the_odd_ones_are_listed_and_all_are_counted(project: Path) -> None:
    Adapter.load("adapters/a").load_basis().save("basis")
    scored = Adapter.fresh(Basis.load("basis"))
    for number in range(60):
        scored.save(f"adapters/t{number}")
    shutil.rmtree("adapters/a")  # the only one with a task
    Path("adapters/t7/adapter_config.json").write_text("[")
    said = [" ".join(line.split()) for line in lorasb("inspect").stdout.splitlines()]
    assert said[2] == "adapters: 61: 59 fitted (basis: shared), 1 not fitted, 1 damaged, 60 of no task"
    assert [line.partition(" ")[0] for line in said[3:]] == ["adapter", "a", "t7"]
    assert len(inspected()["adapters"]) == 61
    shutil.rmtree("basis")
    said = lorasb("inspect").stdout.splitlines()
    assert "61: 59 fitted (basis: missing), 1 not fitted, 1 damaged" in said[2]
    assert [line.partition(" ")[0] for line in said[4:7]] == ["a", "t7", "t0"]
    assert (len(said), said[-1]) == (4 + 40 + 1, "… and 21 more (--json lists all)")


def test_a_project_that_has_nothing_yet(project: Path) -> None:
    (project / "adapters").rename("elsewhere")
    said = [" ".join(line.split()) for line in lorasb("inspect").stdout.splitlines()]
    assert said[1:] == [f"basis: none at {project}/basis", "adapter state basis valid loss scored", "a not fitted"]


def test_an_adapter_whose_basis_is_gone_or_another_one_is_told_of(project: Path, llama: Path) -> None:
    Adapter.load("adapters/a").load_basis().save("basis")
    Adapter.fresh(Basis.load("basis")).save("adapters/a", overwrite=True)
    assert inspected()["adapters"]["a"]["basis"] == "shared"
    shutil.rmtree("basis")
    assert inspected()["adapters"]["a"]["basis"] == "missing"
    calibrate(str(llama), {}, CalibrationSettings(rank=3, directions="random")).save("basis")
    assert inspected()["adapters"]["a"]["basis"] == "missing"
    Path("basis/basis_config.json").write_text("[")
    found = inspected()
    assert (found["basis"]["state"], found["adapters"]["a"]["basis"]) == ("damaged", "missing")
    assert "basis: damaged: unreadable JSON" in lorasb("inspect").stdout
    config = Path("adapters/a/adapter_config.json")
    rewrite(config, basis=read_json(config)["basis"] | {"source": "shared"})
    assert inspected()["adapters"]["a"]["basis"] == "missing"


@pytest.mark.parametrize("data", [5, None, [1], [{"name": 3}]])
def test_what_a_stranger_says_of_a_basis_hides_no_adapter(project: Path, data: Any) -> None:
    Adapter.load("adapters/a").load_basis().save("basis")
    config = Path("basis/basis_config.json")
    rewrite(config, calibration=read_json(config)["calibration"] | {"data": data})
    found = inspected()
    assert (found["basis"]["state"], found["adapters"]["a"]["state"]) == ("made", "fitted")
    assert lorasb("inspect").exit_code == 0


@pytest.mark.parametrize("value", [10**400, True, "x", [1], float("nan"), None])
def test_figures_that_are_no_numbers_are_dashes(project: Path, value: Any) -> None:
    figures = {"m\nbasis: forged": {"base": value, "adapter": value, "rows": value}}
    config = Path("adapters/a/adapter_config.json")
    rewrite(config, training={"valid_loss": value, "evaluation": {"test": figures}})
    of_a = inspected()["adapters"]["a"]
    if value is not True:
        assert (of_a["state"], of_a["valid_loss"]) == ("fitted", None)
    done = lorasb("inspect")
    assert done.exit_code == 0
    assert len(done.stdout.splitlines()) == 4
    assert "m basis: forged - (base -, " in done.stdout


def test_a_name_that_is_no_text_is_shown_escaped(project: Path) -> None:
    os.rename(b"adapters/a", b"adapters/x\xff\n")
    environment = {**os.environ, "PYTHONIOENCODING": "utf-8:strict"}
    for words in (["inspect"], ["inspect", "--json"]):
        command = [sys.executable, "-m", "lorasb_cli", *words]
        done = subprocess.run(command, capture_output=True, cwd=project, env=environment)
        assert (done.returncode, b"x\\udcff" in done.stdout) == (0, True), done.stderr


def test_a_folder_that_may_not_be_entered_hides_no_other(project: Path) -> None:
    def inspect() -> None:
        give_up_roots_rights()
        states = {name: adapter["state"] for name, adapter in inspected()["adapters"].items()}
        assert states == {"a": "damaged", "b": "fitted"}

    shutil.copytree("adapters/a", "adapters/b")
    Path("adapters/a").chmod(0)
    try:
        assert exit_code_of_a_fork(inspect) == 0
    finally:
        Path("adapters/a").chmod(0o700)


def test_a_folder_that_is_no_project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert "Error: there is no lorasb.toml here" in lorasb("inspect").stderr
    assert "Name the folder to inspect" in lorasb("inspect").stderr
    done = lorasb("inspect", "--verify")
    assert (done.exit_code, "is for one folder: name it" in done.stderr) == (2, True)


def test_it_is_told_without_torch_and_from_elsewhere(project: Path) -> None:
    command = [sys.executable, "-X", "importtime", "-m", "lorasb_cli", "inspect", "--config", f"{project}/lorasb.toml"]
    done = subprocess.run(command, capture_output=True, text=True, cwd="/")
    assert (done.returncode, " torch\n" in done.stderr) == (0, False), done.stderr
    assert "fitted" in done.stdout


def test_the_cache_is_where_the_variable_says_or_at_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for value, expected in ((f"{tmp_path}/c", "c/lorasb"), ("relative", ".cache/lorasb"), ("", ".cache/lorasb")):
        monkeypatch.setenv("XDG_CACHE_HOME", value)
        assert cache_folder() == tmp_path / expected
