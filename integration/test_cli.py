"""The command line as it is typed, in child processes: exit codes, streams, the project file, the docs.

Most are forks of one that has imported everything (`lorasb`); what is about starting is started (`started`).
"""

from __future__ import annotations

import json
import shutil
import socket
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from lorasb_export import Adapter
from lorasb_export.files.storage import read_json

from .torture.zygote import shared_zygote

VERBS = "init calibrate fit evaluate generate merge export push serve inspect quickstart".split()


def started(*words: str | Path, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "lorasb_cli", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd)


def lorasb(*words: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    return shared_zygote().run("lorasb_cli", *map(str, words), folder=cwd)


def result_of(done: subprocess.CompletedProcess[str]) -> Any:
    """The JSON object a verb prints, which is all of its stdout."""
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def project(llama: Path, sums: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project of two tasks, fitted by `lorasb fit` alone, which calibrates the basis first."""
    folder = tmp_path_factory.mktemp("cli")
    shutil.copytree(sums, folder / "data" / "a")
    shutil.copytree(sums, folder / "data" / "b")
    (folder / "lorasb.toml").write_text(
        f'model = "{llama}"\n[basis]\nrank = 4\n[fit]\nmax_steps = 3\n'
        '[tasks.a]\ndata = "data/a"\n[tasks.b]\ndata = "data/b"\n[hub]\nrepo = "me/{name}-lorasb"\n'
    )
    found = result_of(lorasb("fit", "--json", cwd=folder))
    assert set(found["adapters"]) == {"a", "b"}
    return folder


def test_help_is_quick_and_imports_nothing_heavy() -> None:
    command = [sys.executable, "-X", "importtime", "-m", "lorasb_cli", "--help"]
    times = []
    for _ in range(3):
        started = time.monotonic()
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        times.append(time.monotonic() - started)
    for heavy in ("torch", "transformers", "huggingface_hub", "safetensors", "lorasb_export.base.model"):
        assert f" {heavy}\n" not in done.stderr
    assert all(verb in done.stdout for verb in VERBS)
    assert statistics.median(times) < 2  # 0.2 s on a quiet machine; the benchmark `startup` measures it


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_the_shared_options(verb: str, tmp_path: Path) -> None:
    text = lorasb(verb, "--help", cwd=tmp_path).stdout
    for option in ("--json", "--quiet", "--verbose", "--config"):
        assert option in text


def test_usage_errors_exit_2() -> None:
    assert started("merg").returncode == 2
    assert started("merge", "--no-such-option").returncode == 2
    assert started("calibrate", "--data", "nameless").returncode == 2


def test_expected_failures_exit_1_with_one_line(tmp_path: Path) -> None:
    done = started("inspect", tmp_path / "nowhere")
    assert (done.returncode, done.stdout) == (1, "")
    fix = "Give an existing folder, or a Hub id: owner/name or owner/name@revision"
    assert done.stderr == f"Error: neither a folder nor a Hub id ({tmp_path / 'nowhere'}). {fix}\n"
    failed = lorasb("inspect", tmp_path / "nowhere", "--json", cwd=tmp_path)
    assert json.loads(failed.stdout)["error"]["what"] == "neither a folder nor a Hub id"
    assert "Traceback" in lorasb("inspect", tmp_path / "nowhere", "--verbose", cwd=tmp_path).stderr


def test_verbs_without_a_project_say_what_to_do(tmp_path: Path) -> None:
    for verb in ("fit", "merge", "push", "serve", "calibrate"):
        done = lorasb(verb, cwd=tmp_path)
        assert done.returncode == 1, verb
        assert done.stderr.startswith("Error: "), verb
        assert "Traceback" not in done.stderr


def test_init_then_bad_key(tmp_path: Path) -> None:
    found = result_of(lorasb("init", "--model", "base", "--task", "a=data/a", "--json", cwd=tmp_path))
    assert (tmp_path / found["out"]).is_file()
    assert lorasb("init", cwd=tmp_path).returncode == 1
    with (tmp_path / "lorasb.toml").open("a") as file:
        file.write("\n[fit2]\n")
    done = lorasb("fit", cwd=tmp_path)
    assert "unknown key 'fit2' (did you mean 'fit'?)" in done.stderr


def test_fit_wrote_basis_and_adapters(project: Path) -> None:
    basis = read_json(project / "basis" / "basis_config.json")
    assert [source["name"] for source in basis["calibration"]["data"]] == ["a", "b"]
    for name in ("a", "b"):
        adapter = Adapter.load(project / "adapters" / name)
        assert adapter.load_basis().sha256 == basis["sha256"]
    done = lorasb("fit", cwd=project)
    assert (done.returncode, "the target exists" in done.stderr) == (1, True)


def test_flags_win_over_the_file(project: Path) -> None:
    out = project / "adapters" / "flagged"
    found = result_of(lorasb("fit", "a", "--max-steps", "2", "--out", out, "--json", cwd=project))
    assert found["adapters"]["a"]["steps"] == 2
    shutil.rmtree(out)


def test_own_basis_is_embedded(project: Path, tmp_path: Path) -> None:
    config = (project / "lorasb.toml").read_text().replace('data = "data/', f'data = "{project}/data/')
    (tmp_path / "lorasb.toml").write_text(config)
    result_of(lorasb("fit", "--basis", "own", "--json", cwd=tmp_path))
    assert Adapter.load(tmp_path / "adapters" / "b").load_basis().calibration["data"][0]["name"] == "b"
    (tmp_path / "adapters" / "a").rename(tmp_path / "own")
    assert Adapter.load(tmp_path / "own").load_basis().calibration["data"][0]["name"] == "a"
    assert read_json(tmp_path / "own" / "adapter_config.json")["basis"]["source"] == "embedded"


def test_a_task_name_that_leaves_the_folder(project: Path) -> None:
    done = lorasb("fit", "../evil", "--data", project / "data" / "a", cwd=project)
    assert (done.returncode, "cannot be" in done.stderr) == (1, True)
    assert not (project / "evil").exists()


def test_merge_as_typed(project: Path) -> None:
    for again in ("a=0.4", "adapters/a=0.4"):
        assert "is given twice" in lorasb("merge", "a=0.6", again, "--out", "m", cwd=project).stderr
    found = result_of(lorasb("merge", "--out", "model/", "--verify", "--json", cwd=project))
    assert found["adapter"] == str(project / "adapters" / "a")
    assert read_json(project / "model" / "lorasb.json")["kind"] == "merged"
    assert result_of(lorasb("inspect", "model", "--json", cwd=project))["kind"] == "merged"


def test_export_peft(project: Path) -> None:
    result_of(lorasb("export", "b", "--format", "peft", "--out", "b-peft", "--json", cwd=project))
    assert read_json(project / "b-peft" / "adapter_config.json")["peft_type"] == "LORA"
    assert lorasb("export", "b", "--format", "gguf", cwd=project).returncode == 2


def test_evaluate_writes_into_the_card(project: Path) -> None:
    found = result_of(lorasb("evaluate", "--json", cwd=project))["evaluation"]
    assert {found[name]["rows"] for name in ("a", "b")} == {24}
    assert found["a"]["metric"] == "exact_match"
    config = read_json(project / "adapters" / "a" / "adapter_config.json")
    assert config["training"]["evaluation"]["test"]["exact_match"]["rows"] == 24
    assert "exact_match" in (project / "adapters" / "a" / "README.md").read_text()
    Adapter.load(project / "adapters" / "a")


def test_an_adapter_of_ones_own_loop_does_not_say_what_it_was_trained_on(project: Path) -> None:
    mine = Adapter.load(project / "adapters" / "a")
    mine.training = {}
    mine.save(project / "adapters" / "mine")
    try:
        done = lorasb("evaluate", "--limit", "2", "--json", cwd=project)
        assert set(result_of(done)["evaluation"]) == {"a", "b"}
        assert "mine is passed over" in done.stderr
        assert (
            "does not say what it was trained on (mine). Pass --data" in lorasb("evaluate", "mine", cwd=project).stderr
        )
    finally:
        shutil.rmtree(project / "adapters" / "mine")


def test_generate_shows_base_and_adapters(project: Path) -> None:
    found = result_of(lorasb("generate", "1+1=", "--max-tokens", "4", "--json", cwd=project))
    assert list(found["answers"]) == ["base", "a", "b"]


def test_inspect_says_whether_the_basis_matches(project: Path) -> None:
    found = result_of(lorasb("inspect", "adapters/a", "--json", cwd=project))
    assert (found["kind"], found["rank"], found["modules"], found["basis_matches"]) == ("adapter", 4, 14, True)
    assert result_of(lorasb("inspect", "basis", "--json", cwd=project))["calibrated_on"] == ["a", "b"]


def test_inspect_says_what_a_basis_captures(project: Path) -> None:
    found = result_of(lorasb("inspect", "basis", "--data", "data/a", "--json", cwd=project))["capture"]
    assert found["random"] < found["basis"] <= found["own"] * 1.01
    assert lorasb("inspect", "adapters/a", "--data", "data/a", cwd=project).returncode == 1


def test_push_dry_run_as_typed(project: Path) -> None:
    """In a project the basis and every adapter; named, the one."""
    pushed = result_of(lorasb("push", "--dry-run", "--json", cwd=project))["pushed"]
    found = {(one["repo"], one["kind"], one["private"]) for one in pushed}
    kinds = {"basis": "basis", "a": "adapter", "b": "adapter"}
    assert found == {(f"me/{name}-lorasb", kind, True) for name, kind in kinds.items()}
    one = result_of(lorasb("push", "a", "--repo", "me/a", "--with-basis", "--dry-run", "--json", cwd=project))[
        "pushed"
    ][0]
    assert (one["repo"], one["kind"]) == ("me/a", "adapter")


def test_serve_dry_run_as_typed(project: Path) -> None:
    pytest.importorskip("vllm")
    found = result_of(
        lorasb("serve", "--adapters", "a,b", "--dry-run", "--json", "--", "--max-model-len", "99", cwd=project)
    )
    assert found["command"][-2:] == ["--max-model-len", "99"]
    assert {"a", "b"} <= set(found["models"])


def test_serve_on_a_port_in_use(project: Path) -> None:
    pytest.importorskip("vllm")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        done = lorasb("serve", "--adapters", "a,b", "--port", str(taken.getsockname()[1]), cwd=project)
    assert (done.returncode, "cannot listen" in done.stderr) == (1, True)


def test_serve_refuses_a_path_as_a_name(project: Path) -> None:
    done = lorasb("serve", "--adapters", "a,../../etc", "--dry-run", cwd=project)
    assert (done.returncode, done.stderr.startswith("Error: ")) == (1, True)


def test_the_reference_pages_are_what_help_and_docstrings_say() -> None:
    done = subprocess.run([sys.executable, "docs/make_reference.py", "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
