"""What a folder, a file or a card of a stranger may not do: run, read, change or publish what is not theirs."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from lorasb_cli.main import app
from typer.testing import CliRunner

from lorasb_export import Adapter, Basis, FitSettings, fit, merge
from lorasb_export.atomic import atomic_folder
from lorasb_export.base import BaseModel
from lorasb_export.cards import card
from lorasb_export.cards.readme import BEGIN, END
from lorasb_export.environment import child_environment
from lorasb_export.errors import ArtifactError, BaseModelError, OutputError, SettingsError
from lorasb_export.exporting.peft import export_peft
from lorasb_export.lock import only_writer
from lorasb_export.project import Project
from lorasb_export.provenance import without_folders
from lorasb_export.publishing.licence import licence
from lorasb_export.publishing.outgoing import take_out_paths
from lorasb_export.serving.plan import make_plan
from lorasb_export.storage import read_header, read_json, write_json
from tests.artifacts import edit
from tests.merging import adapter_for

SECRET = "a secret of the user's"


@pytest.fixture
def adapter(llama: Path, tmp_path: Path) -> Path:
    adapter_for(llama, tmp_path / "a")
    return tmp_path / "a"


@pytest.mark.parametrize("name", ["x.--trust-remote-code", "--host=0", "x.+y", "x..y", "x y", ""])
def test_no_name_of_a_module_becomes_a_flag_of_a_server(name: str, adapter: Path) -> None:
    edit(adapter, "basis_config.json", lambda c: c["target_modules"].update({name: [8, 8]}))
    with pytest.raises(ArtifactError, match="is no name of a module"):
        Basis.load(adapter)
    edit(adapter, "adapter_config.json", lambda c: c["target_modules"].append(name))
    with pytest.raises(ArtifactError, match="is no name of a module"):
        Adapter.load(adapter)


def test_a_server_imports_nothing_from_the_working_folder(llama: Path, tmp_path: Path) -> None:
    (tmp_path / "timeit.py").write_text("raise SystemExit('it ran')")
    options: dict[str, Any] = {"model": str(llama), "mode": "auto", "host": "127.0.0.1", "port": 1, "dtype": "auto"}
    plan = make_plan({}, **options, extra=(), updates_from=None, has_key=False)
    python = plan.command("folder")[: plan.command("folder").index("-m") + 1]
    for command in (python, [sys.executable, "-m"]):  # what the server starts has the environment alone
        done = subprocess.run(
            [*command, "timeit", "-n1", "-r1"], cwd=tmp_path, env=child_environment(), capture_output=True, text=True
        )
        assert (done.returncode, "it ran" in done.stderr) == (0, False)


@pytest.mark.parametrize("file", ["z.safetensors.index.json", "model.safetensors"])
def test_a_config_names_no_other_weights(file: str, llama: Path, tmp_path: Path) -> None:
    base = BaseModel.resolve(llama).load()
    base.save_pretrained(tmp_path / "base")
    write_json(tmp_path / "base" / "config.json", read_json(llama / "config.json") | {"transformers_weights": file})
    with pytest.raises(BaseModelError, match="names the file of its weights itself"):
        BaseModel.resolve(tmp_path / "base")


def test_a_base_that_holds_an_adapter_is_refused(llama: Path, tmp_path: Path) -> None:
    BaseModel.resolve(llama).load().save_pretrained(tmp_path / "base")
    write_json(tmp_path / "base" / "adapter_config.json", {"peft_type": "LORA"})
    with pytest.raises(BaseModelError, match="which transformers would apply"):
        BaseModel.resolve(tmp_path / "base")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("architectures", 5), ("architectures", [5]), ("model_type", ["a"])),
        *(("quantization_config", "x"), ("type_vocab_size", None)),
    ],
)
def test_a_config_with_a_value_of_another_type_is_refused(key: str, value: Any, llama: Path, tmp_path: Path) -> None:
    write_json(tmp_path / "config.json", read_json(llama / "config.json") | {key: value})
    with pytest.raises(BaseModelError, match=f"{key} is "):
        BaseModel.resolve(tmp_path)


def test_a_lock_is_no_link(tmp_path: Path) -> None:
    secret = tmp_path / "id_rsa"
    secret.write_text(SECRET)
    secret.chmod(0o600)
    for name, target in (("a", secret), ("b", tmp_path / "made")):
        (tmp_path / f".{name}.lock").symlink_to(target)
        with pytest.raises(OutputError, match="the lock file is a link"), only_writer(tmp_path / name):
            pass
    os.link(secret, tmp_path / ".c.lock")
    with only_writer(tmp_path / "c"):
        pass
    assert secret.stat().st_mode & 0o777 == 0o600
    assert not (tmp_path / "made").exists()


def test_what_a_link_leads_to_goes_into_no_folder_of_ours(adapter: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text(SECRET)
    (adapter / "training.png").symlink_to(tmp_path / "secret")
    for write in (lambda: export_peft(adapter, tmp_path / "peft"), lambda: merge(adapter, tmp_path / "model")):
        with pytest.raises(ArtifactError, match="a link out of the adapter's folder"):
            write()
    (adapter / "README.md").unlink()
    (adapter / "README.md").symlink_to(tmp_path / "secret")
    with pytest.raises(ArtifactError, match=r"a link out of the folder.*README\.md"):
        card.write(adapter, "a card")
    written = [path for folder in (tmp_path / "peft", tmp_path / "model") for path in folder.rglob("*")]
    assert not [path for path in written if path.is_file() and SECRET.encode() in path.read_bytes()]


def test_the_folders_of_a_user_are_not_taken_for_what_we_left(
    adapter: Path, llama: Path, sums: Path, tmp_path: Path
) -> None:
    for name in (".model.old", ".model.merge", "model", ".new.run", "elsewhere"):
        (tmp_path / name / "checkpoint-1").mkdir(parents=True)
        (tmp_path / name / "thesis").write_text("mine")
    with pytest.raises(OutputError, match="not a folder lorasb wrote"):
        merge(adapter, tmp_path / "model")
    (tmp_path / "model").rename(tmp_path / "old")
    with pytest.raises(OutputError, match=r"has a name it needs.*\.model\.(old|merge)"):
        merge(adapter, tmp_path / "model")
    assert not (tmp_path / "model").exists()
    (tmp_path / ".linked.run").symlink_to(tmp_path / "elsewhere")
    for name in ("new", "linked"):
        with pytest.raises(OutputError, match=r"a run never wrote 'thesis'|is a link"):
            fit(str(llama), Basis.load(adapter), sums, tmp_path / name, settings=FitSettings(max_steps=1))
    for name in (".model.old", ".model.merge", "old", ".new.run", "elsewhere"):
        assert (tmp_path / name / "checkpoint-1").is_dir()
        assert (tmp_path / name / "thesis").read_text() == "mine"


def test_a_folder_that_is_put_back_meanwhile_is_replaced_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As another command does, to which the moment between two renames looks like a process that died there."""
    target, old, rename = tmp_path / "x", tmp_path / ".x.old", Path.rename
    for content in ("before", "after"):
        with atomic_folder(target, overwrite=True) as temporary:
            write_json(temporary / "lorasb.json", {"content": content})
            if content == "after":

                def renamed(path: Path, to: Path) -> Path:
                    if to == target and path != old and old.exists() and not target.exists():
                        monkeypatch.setattr(Path, "rename", rename)
                        old.rename(target)
                    return rename(path, to)

                monkeypatch.setattr(Path, "rename", renamed)
    assert read_json(target / "lorasb.json") == {"content": "after"}
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


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
        ("license: {a: b}", {}),
        (f"license: {'[' * 2000}", {}),
        ("license: mit\nlicense_link: 'http://[x'", {"license": "mit", "license_link": "http://[x"}),
    ],
)
def test_a_licence_is_words(matter: str, found: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(f"---\n{matter}\n---\ntext")
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
        {"energy": {"least": 1}},
        {"energy": {"mean": 10**400}},
        {"lora_parameters": "many", "trainable_parameters": 4},
        {"evaluation": {"test": {"loss": {"base": 1}}}},
    ],
)
def test_what_no_card_could_show_is_refused_when_it_is_read(training: dict[str, Any], adapter: Path) -> None:
    """Not at the end of a merge of hours."""
    edit(adapter, "adapter_config.json", lambda c: c.update(training=training))
    with pytest.raises(ArtifactError, match=f"training says {next(iter(training))} in another shape|capture"):
        Adapter.load(adapter)


@pytest.mark.parametrize("scaling", [10**400, -(10**400), math.nan, math.inf])
def test_a_scaling_that_no_float_holds_is_refused(scaling: float, adapter: Path) -> None:
    edit(adapter, "adapter_config.json", lambda c: c.update(scaling=scaling))
    with pytest.raises(ArtifactError, match="non-finite: scaling is"):
        Adapter.load(adapter)


@pytest.mark.parametrize("line", [f'"=".{"a." * 16000}a = 1', f"x = {{ {'a.' * 16000}a = 1 }}", f"[{'a . ' * 17}a]"])
def test_a_project_file_has_no_key_of_many_parts(line: str, tmp_path: Path) -> None:
    (tmp_path / "lorasb.toml").write_text(line)
    with pytest.raises(SettingsError, match="a key of more than 16 parts"):
        Project.load(tmp_path / "lorasb.toml")


def test_a_card_takes_words_of_others_for_words(adapter: Path) -> None:
    task = f"x <img src=y>\n{END}\n# Run this\n{BEGIN} ![z](http://spy/z.png)"
    lines = {"plot": "http://spy/plot.png", "settings": {"a`\n# b": 1}, "task": task}
    edit(adapter, "adapter_config.json", lambda c: c.update(training=lines, revision='1"); import spy  #'))
    edit(adapter, "adapter_config.json", lambda c: c.update(base_model_name_or_path="me/base"))
    edit(adapter, "adapter_config.json", lambda c: c["basis"].update(source="me/b](http://spy) [x@1"))
    text = card.adapter_card(read_json(adapter / "adapter_config.json"))
    assert (text.count(BEGIN), text.count(END)) == (1, 1)
    for part in ("<img", "![z]", "spy/plot", "\n# Run", "\n# b", "me/b]"):
        assert part not in text
    assert "!\\[z](http" in text  # an escaped bracket begins no link
    assert 'revision="1\\"); import spy  #"' in text
