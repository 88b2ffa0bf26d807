"""What `lorasb export` hands to the exporters."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lorasb_cli.main import app
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from lorasb_export import Adapter, export
from lorasb_export.base.model import BaseModel
from lorasb_export.data.task import TaskData
from lorasb_export.errors import ArtifactError, SettingsError
from lorasb_export.exporting import onnx, onnx_adapters
from lorasb_export.exporting.onnx_record import write_record
from lorasb_export.project.export import tasks_to_compare
from lorasb_export.project.project import Project
from tests.artifacts import forbid
from tests.random_adapter import adapter_on, save_adapter


def test_a_task_added_to_a_folder_is_tested_at_the_folders_precision(
    llama: Path, sums: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = save_adapter(llama, BaseModel.resolve(llama).load(), tmp_path / "a", ["model.layers.0.mlp.up_proj"])
    adapter.training = {"task": "sums", "data": str(sums)}
    adapter.save(tmp_path / "a", overwrite=True)
    calls: list[dict[str, Any]] = []

    def add(*_: object, **options: Any) -> dict[str, Any]:
        calls.append(options)
        return {"bytes": 0, "verify": {"a": {"prompts": 4, "equal_prompts": 4, "rows_left_out": 3}}}

    monkeypatch.setattr(onnx_adapters, "add_onnx_adapters", add)
    (tmp_path / "onnx").mkdir()
    command = ["export", str(tmp_path / "a"), "--into", str(tmp_path / "onnx")]
    for precision, tested in (("int8", {"a"}), ("fp32", set())):
        write_record(tmp_path / "onnx", {"kind": "onnx-adapters", "precision": precision})
        done = CliRunner().invoke(app, command, catch_exceptions=False)
        assert done.exit_code == 0, done.output
        assert set(calls[-1].get("data", {})) == tested
        assert "a: 4 of 4 answers equal torch's; 3 held-out rows left out" in done.output
    done = CliRunner().invoke(app, [*command, "--precision", "int4"])
    assert (done.exit_code, len(calls)) == (2, 2)


def test_a_graph_is_compared_on_the_task_of_its_adapter(
    llama: Path, tasks: dict[str, TaskData], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_adapter(llama, BaseModel.resolve(llama).load(), tmp_path / "minus", ["model.layers.0.mlp.up_proj"])
    compared: list[dict[str, TaskData]] = []

    def held_out(data: dict[str, TaskData], _: object) -> None:
        compared.append(data)
        raise InterruptedError  # before anything is exported

    monkeypatch.setattr(onnx, "held_out_rows", held_out)
    options: dict[str, Any] = {"format": "onnx", "data": tasks}
    with pytest.raises(InterruptedError):
        export(tmp_path / "minus", tmp_path / "out", **options)
    assert compared == [{"": tasks["minus"]}]
    (tmp_path / "minus").rename(tmp_path / "times")
    with pytest.raises(SettingsError, match=r"data is of plus, minus, the adapter is times. Give its task under its"):
        export(tmp_path / "times", tmp_path / "out", **options)


@pytest.mark.parametrize("added", [False, True])
def test_who_was_trained_beside_a_base_in_four_bits_is_told(
    added: bool, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    adapter = save_adapter(llama, BaseModel.resolve(llama).load(), tmp_path / "a", ["model.layers.0.mlp.up_proj"])
    record = {"kind": "onnx-adapters", "routed": False, "adapters": {}, "basis": {"sha256": adapter.basis_sha256}}
    (tmp_path / "onnx").mkdir()
    write_record(tmp_path / "onnx", record | {"base": asdict(adapter.base)})

    def write(*_: object, **__: object) -> None:
        raise InterruptedError  # before anything is written

    monkeypatch.setattr(onnx_adapters, "atomic_folder", write)
    call = onnx_adapters.add_onnx_adapters if added else onnx_adapters.export_onnx_adapters
    for dtype in ("auto", "nf4"):
        assert "trained beside" not in caplog.text
        replace(adapter, training={"settings": {"dtype": dtype}}).save(tmp_path / dtype)
        with pytest.raises(InterruptedError):
            call([tmp_path / dtype], tmp_path / ("onnx" if added else "out"), verify=False)
    assert "The adapter was trained beside a base in four bits" in caplog.text


def test_where_a_dtype_is_too_narrow_the_flag_of_a_graph_is_named(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    base = shutil.copytree(llama, tmp_path / "base")
    modules, network = ["model.layers.0.mlp.up_proj"], BaseModel.resolve(base).load()
    save_adapter(base, network, tmp_path / "a", modules, relative_size=0.001)

    def build(*_: object) -> None:
        raise InterruptedError  # once it is merged

    monkeypatch.setattr(onnx, "build", build)
    with pytest.raises(InterruptedError):
        export(tmp_path / "a", tmp_path / "out", format="onnx", precision="bf16", verify=False)
    assert "--precision fp16 or fp32" in caplog.text
    tensors = load_file(base / "model.safetensors")
    save_file({**tensors, "model.odd.weight": torch.tensor([-1e9])}, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(ArtifactError, match=r"odd\.weight does not fit float16\. .*export --precision fp32"):
        export(tmp_path / "a", tmp_path / "out", format="onnx", precision="fp16")


def test_a_replacement_that_was_cut_short_behind_a_link_is_undone(tmp_path: Path) -> None:
    (tmp_path / "onnx").symlink_to("disk/onnx")
    (tmp_path / "disk" / ".onnx.old").mkdir(parents=True)
    write_record(tmp_path / "disk" / ".onnx.old", {"kind": "onnx-adapters"})
    assert onnx_adapters.exported_record(tmp_path / "onnx")["kind"] == "onnx-adapters"


def test_a_precision_is_of_an_onnx_graph() -> None:
    done = CliRunner().invoke(app, ["export", "a", "--precision", "int4"])
    assert (done.exit_code, "add --format onnx" in done.stderr) == (2, True)


@pytest.mark.parametrize("format", ["onnx", "onnx-adapters"])
def test_a_precision_that_is_none_is_refused_before_data_are_read(
    format: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (onnx, onnx_adapters):
        monkeypatch.setattr(module, "load_held_out", lambda *_: pytest.fail("read"))
    with pytest.raises(SettingsError, match="precision 'fp99' is unknown here"):
        export(tmp_path / "a", tmp_path / "out", format=format, precision="fp99", data={"a": str(tmp_path / "rows")})


@pytest.mark.parametrize("format", ["peft", "onnx"])
def test_what_is_of_many_adapters_is_refused_for_one(format: str, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="routed is for the format onnx-adapters"):
        export(tmp_path / "a", tmp_path / "out", format=format, routed=True)
    with pytest.raises(SettingsError, match=rf"format {format} takes one adapter, 2 were given"):
        export([tmp_path / "a", tmp_path / "b"], tmp_path / "out", format=format)


@pytest.mark.parametrize(
    "words",
    ["--into onnx --format peft", "--into onnx --routed", "--data rows", "--format onnx --data rows --no-verify"],
)
def test_a_flag_that_would_not_be_read_is_wrong_usage(words: str) -> None:
    assert CliRunner().invoke(app, ["export", "a", *words.split()]).exit_code == 2


@pytest.mark.parametrize("words", ["--format onnx-adapters --precision int8", "--into onnx"])
def test_rows_of_another_kind_are_refused(
    words: str, llama: Path, parity: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    save_adapter(llama, BaseModel.resolve(llama).load(), tmp_path / "a", ["model.layers.0.mlp.up_proj"])
    (tmp_path / "onnx").mkdir()
    write_record(tmp_path / "onnx", {"kind": "onnx-adapters", "precision": "fp32", "adapters": {}})
    done = CliRunner().invoke(app, ["export", "./a", *words.split(), "--data", str(parity)])
    assert (done.exit_code, "the data is SEQ_CLS, the adapter CAUSAL_LM" in done.stderr) == (1, True)


def test_only_adapters_that_are_compared_have_their_rows_read(
    llama: Path, sums: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    network, names = BaseModel.resolve(llama).load(), ("a", "b", "c")
    for name in names:
        save_adapter(llama, network, tmp_path / name, ["model.layers.0.mlp.up_proj"])
    calls: list[dict[str, Any]] = []
    monkeypatch.setattr(
        onnx_adapters, "export_onnx_adapters", lambda *_, **options: calls.append(options) or {"bytes": 0}
    )
    monkeypatch.setattr("lorasb_export.project.export.MAX_COMPARED", 2)
    folders = [str(tmp_path / name) for name in names]
    command = ["export", *folders, "--format", "onnx-adapters", "--precision", "int8", "--data", str(sums)]
    CliRunner().invoke(app, command, catch_exceptions=False)
    assert list(calls[0]["data"]) == ["a", "b"]

    monkeypatch.setattr(onnx_adapters, "MAX_COMPARED", 2)
    loaded = {name: Adapter.load(tmp_path / name) for name in names}
    assert list(onnx_adapters._first(loaded)) == ["a", "b"]
    assert "The first 2 adapters are compared with torch, 1 are not" in caplog.text
    caplog.clear()
    del loaded["c"]
    assert (list(onnx_adapters._first(loaded)), caplog.text) == (["a", "b"], "")


def test_data_without_held_out_rows_is_not_passed_over(
    llama: Path, sums: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or a graph would be written without the comparison that was asked for. A file's rows are all held out."""
    monkeypatch.chdir(tmp_path)
    save_adapter(llama, BaseModel.resolve(llama).load(), tmp_path / "a", ["model.layers.0.mlp.up_proj"])
    monkeypatch.setattr(onnx, "export_onnx", lambda *_, data, **__: {"bytes": len(data["a"].rows("test"))})
    (tmp_path / "data").mkdir()
    shutil.copyfile(sums / "train.jsonl", tmp_path / "data" / "train.jsonl")
    command = ["export", "./a", "--format", "onnx", "--data"]
    done = CliRunner().invoke(app, [*command, "data"])
    assert (done.exit_code, "has no valid rows" in done.stderr) == (1, True)
    done = CliRunner().invoke(app, [*command, "data/train.jsonl", "--json"])
    assert json.loads(done.stdout)["bytes"] == 64


def test_rows_that_may_not_be_read_are_not_there_to_compare_on(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Those of who trained the adapter, in a home of their own."""
    monkeypatch.chdir(tmp_path)
    adapter = save_adapter(llama, BaseModel.resolve(llama).load(), tmp_path / "a", ["model.layers.0.mlp.up_proj"])
    adapter.training = {"task": "sums", "data": str(tmp_path / "home" / "rows")}
    adapter.save("a", overwrite=True)
    forbid(tmp_path / "home", monkeypatch)
    assert tasks_to_compare(Project.load(None), ["a"], None) == {}
    assert "No held-out rows for sums" in caplog.text


def test_an_adapter_is_called_as_the_link_that_is_given(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    save_adapter(llama, BaseModel.resolve(llama).load(), tmp_path / "v3", ["model.layers.0.mlp.up_proj"])
    (tmp_path / "onnx").mkdir()
    taken = {"kind": "onnx-adapters", "precision": "fp32", "routed": False, "adapters": {"latest": {}, "Old": {}}}
    write_record(tmp_path / "onnx", taken)
    for name, message in (
        ("latest", "has an adapter 'latest' (onnx). Rename the adapter, or pass --overwrite"),
        ("old", "has an adapter 'Old' (onnx). Rename the adapter\n"),  # on some disks one file
        ("my task", "'my task' cannot name an exported adapter: use letters, digits"),
        ("base", "an adapter called 'base' would hide the base"),
    ):
        (tmp_path / name).symlink_to("v3")
        done = CliRunner().invoke(app, ["export", f"./{name}", "--into", "onnx"])
        assert (done.exit_code, message in done.stderr) == (1, True), done.stderr
    (tmp_path / "LATEST").symlink_to("v3")
    done = CliRunner().invoke(app, ["export", "./latest", "./LATEST", "--into", "onnx"])
    assert "the adapters need different names, by more than capitals (latest, LATEST)" in done.stderr


@pytest.fixture
def of_a_project(
    llama: Path, bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[Adapter, list[tuple[list[str], dict[str, Any]]]]:
    """In the working folder three adapters of a basis that can be exported, and others that cannot; one of the former,
    and what exporters are called with."""
    monkeypatch.chdir(tmp_path)
    adapters = tmp_path / "adapters"
    network = BaseModel.resolve(llama).load()
    first = save_adapter(llama, network, adapters / "a", ["model.layers.0.mlp.up_proj"])
    for name in ("b", "c", "base", "my task", "A", "damaged"):
        shutil.copytree(adapters / "a", adapters / name)
    weights = bytearray((adapters / "damaged" / "adapter.safetensors").read_bytes())
    weights[-1] ^= 1
    (adapters / "damaged" / "adapter.safetensors").write_bytes(weights)
    adapter_on(bert, adapters / "sorts", "SEQ_CLS", labels=["no", "yes"]).save(adapters / "sorts", overwrite=True)
    save_adapter(llama, network, adapters / "z", ["model.layers.0.mlp.up_proj"], seed=1)
    calls: list[tuple[list[str], dict[str, Any]]] = []

    def called(folders: list[str], *_: object, **options: Any) -> dict[str, Any]:
        calls.append(([Path(folder).name for folder in folders], options))
        return {"bytes": 0}

    for name in ("export_onnx_adapters", "add_onnx_adapters"):
        monkeypatch.setattr(onnx_adapters, name, called)
    return first, calls


def test_where_none_is_named_what_cannot_be_exported_does_not_keep_the_others_from_it(
    of_a_project: tuple[Adapter, list[tuple[list[str], dict[str, Any]]]], caplog: pytest.LogCaptureFixture
) -> None:
    _, calls = of_a_project
    command = ["export", "--format", "onnx-adapters"]
    done = CliRunner().invoke(app, [*command, "--json"], catch_exceptions=False)
    assert (done.exit_code, list(json.loads(done.stdout)["failed"])) == (1, ["damaged"])
    assert "Error: not all was done, 1 failed:\n  1. damaged: " in done.stderr
    assert calls[0][0] == ["A", "b", "c"]
    assert calls[0][1]["overwrite"] is False
    assert "5 of 9 are passed over" in caplog.text
    for reason in ("a and A differ by capitals", "hide the base", "damaged", "'my task' cannot", "every classifier"):
        assert reason in caplog.text
    assert "Passed over, being of another basis than A and 2 more: z" in caplog.text
    Path("adapters", "damaged").rename("damaged")  # what is left out then is meant to be
    done = CliRunner().invoke(app, [*command, "--json"], catch_exceptions=False)
    assert (done.exit_code, json.loads(done.stdout), calls[1]) == (0, {"bytes": 0}, calls[0])
    Path("damaged").rename(Path("adapters", "damaged"))
    for name in ("a", "A", "b", "c", "z"):
        shutil.rmtree(Path("adapters", name))
    done = CliRunner().invoke(app, command)
    assert (done.exit_code, "4 problems, nothing is exported" in done.stderr, len(calls)) == (1, True, 2)


@pytest.mark.parametrize("routed", [False, True])
def test_into_an_export_goes_what_it_lacks_and_what_has_changed(
    routed: bool,
    of_a_project: tuple[Adapter, list[tuple[list[str], dict[str, Any]]]],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    first, calls = of_a_project
    replace(first, scaling=0.5).save(tmp_path / "adapters" / "b", overwrite=True)
    there = {"sha256": first.sha256, "scaling": first.scaling}
    record = {"kind": "onnx-adapters", "precision": "fp32", "routed": routed, "adapters": {"a": there, "b": there}}
    record |= {"basis": {"sha256": first.basis_sha256}, "base": asdict(first.base)}
    (tmp_path / "onnx").mkdir()
    write_record(tmp_path / "onnx", record)
    command = ["export", "--into", "onnx"]
    done = CliRunner().invoke(app, [*command, "--json"], catch_exceptions=False)
    failed = ["b", "damaged"] if routed else ["damaged"]
    assert (done.exit_code, list(json.loads(done.stdout)["failed"])) == (1, failed)
    folders, options = calls[0]
    assert folders == (["c"] if routed else ["b", "c"])
    assert options["overwrite"] is True
    assert ("b has changed, and a routed graph only grows" in caplog.text) is routed
    for reason in ("A and a differ by capitals", "adapter z belongs to another basis", "damaged"):
        assert reason in caplog.text

    record["adapters"] = {name: there | {"scaling": s} for name, s in (("a", 2.0), ("b", 0.5), ("c", 2.0))}
    write_record(tmp_path / "onnx", record)
    shutil.rmtree(tmp_path / "adapters" / "damaged")
    done = CliRunner().invoke(app, [*command, "--json"], catch_exceptions=False)
    assert (done.exit_code, list(json.loads(done.stdout)["adapters"]), len(calls)) == (0, ["a", "b", "c"], 1)
    assert CliRunner().invoke(app, command).stdout == "Nothing to add to onnx\n"

    # Of what the export has, one is of another basis now, and one a classifier: it is not as the project is.
    for name, another in (("b", "z"), ("c", "sorts")):
        shutil.rmtree(tmp_path / "adapters" / name)
        shutil.copytree(tmp_path / "adapters" / another, tmp_path / "adapters" / name)
    done = CliRunner().invoke(app, command, catch_exceptions=False)
    assert (done.exit_code, done.stdout, len(calls)) == (1, "", 1)
    assert "2 failed:\n  1. b: adapter b belongs to another basis" in done.stderr
    assert "\n  2. c: the adapter's task is SEQ_CLS" in done.stderr
