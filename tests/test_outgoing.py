"""Which files a push sends, and what is taken out of them: paths and tokens stay at home."""

from __future__ import annotations

import json
import random
from base64 import b64encode
from pathlib import Path

import pytest
from lorasb_cli.main import app
from typer.testing import CliRunner

from lorasb_export import push
from lorasb_export.errors import ArtifactError
from lorasb_export.files.storage import write_json
from lorasb_export.format import sealed
from lorasb_export.provenance import without_folders
from lorasb_export.publishing import outgoing
from lorasb_export.publishing.outgoing import SUMS
from tests.pushing import make

pytestmark = pytest.mark.usefixtures("no_network")


def test_only_allowed_files_are_planned(tmp_path: Path) -> None:
    _, adapter = make(tmp_path)
    unwanted = ["training_args.bin", "optimizer.pt", ".env", "notes.py", "checkpoint-3/adapter.safetensors", "token"]
    unwanted += [".cache/huggingface/token", "scheduler.pt", "rng_state.pth", "a.ckpt", "model.pkl", "token.txt"]
    for name in unwanted:
        (adapter / name).parent.mkdir(parents=True, exist_ok=True)
        (adapter / name).write_bytes(b"secret")
    (adapter / "LICENSE").write_text("MIT")
    plan = push(adapter, "me/a", with_basis=True, dry_run=True)
    assert sorted(plan["skipped"]) == sorted(unwanted)
    assert "LICENSE" in [file["path"] for file in plan["files"]]
    said = CliRunner().invoke(app, ["push", str(adapter), "--repo", "me/a", "--with-basis", "--dry-run"]).stdout
    skipped = [line for line in said.splitlines() if line.startswith("  skipped")]
    assert (len(skipped), skipped[-1]) == (11, "  skipped  2 more")  # the hidden ones
    assert not any("/." in line or " ." in line for line in skipped)
    assert said.index("Card of me/a") < said.index("Would push")  # and above what is read last


@pytest.mark.parametrize(
    ("kind", "config", "names", "library"),
    [
        ("peft", "adapter_config.json", ["adapter_model.safetensors", "lorasb.json"], "peft"),
        ("onnx", "lorasb.json", ["genai_config.json", "model.onnx", "model.onnx_data", "vocab.txt"], "onnxruntime"),
        (
            "onnx-adapters",
            "lorasb.json",
            ["a.onnx_adapter", "basis.onnx_data", "model.onnx", "model.onnx_data"],
            "onnxruntime",
        ),
    ],
)
def test_exports(tmp_path: Path, kind: str, config: str, names: list[str], library: str) -> None:
    names = [*names, "LICENSE-MODEL", "NOTICE.md", "USE_POLICY.md"]
    for name in [*names, "weights.bin"]:
        (tmp_path / name).write_text("{}")
    (tmp_path / config).write_text(json.dumps({"kind": kind, "peft_type": "LORA", "target_modules": []}))
    plan = push(tmp_path, "me/x", dry_run=True)
    assert (plan["kind"], plan["skipped"], plan["card"]["library_name"]) == (kind, ["weights.bin"], library)
    assert [file["path"] for file in plan["files"]] == sorted(["README.md", SUMS, config, *names])


@pytest.mark.parametrize("target", ["../secret.txt", "nowhere"])
def test_links_out_of_the_folder_are_refused(tmp_path: Path, target: str) -> None:
    basis, _ = make(tmp_path)
    (tmp_path / "secret.txt").write_text("secret")
    (basis / "LICENSE.txt").symlink_to(target)
    with pytest.raises(ArtifactError) as caught:
        push(basis, "me/basis", dry_run=True)
    assert str(caught.value) == (
        f"a link that leads nowhere, or out of the folder ({basis / 'LICENSE.txt'}). Replace it by the file itself"
    )


def test_paths_and_tokens_stay_at_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Absolute paths are cut to their last part wherever JSON of ours has them; a token in any text is refused."""
    _, adapter = make(tmp_path)
    path = adapter / "adapter_config.json"
    config = json.loads(path.read_text())
    config["base_model_name_or_path"] = "/home/somebody/models/base"
    config["training"] = {"data": "/home/somebody/data/a", "settings": {"files": ["/home/somebody/x"], "seed": 0}}
    write_json(path, sealed(config))
    (adapter / "lorasb.json").write_text(json.dumps({"base": {"name_or_path": "/home/somebody/models/base"}}))
    files, _ = outgoing.collect(adapter, "adapter")
    outgoing.take_out_paths(files)
    sent = {name: json.loads(data) for name, data in files.items() if isinstance(data, bytes)}
    assert sorted(sent) == ["adapter_config.json", "lorasb.json"]
    assert "somebody" not in json.dumps(sent)
    assert sent["adapter_config.json"]["training"] == {"data": "a", "settings": {"files": ["x"], "seed": 0}}
    assert sent["lorasb.json"]["base"]["name_or_path"] == "base"

    (adapter / "training_log.jsonl").write_text('{"token": "hf_abcdefghijklmnopqrstuvwxyz"}')
    with pytest.raises(ArtifactError) as caught:
        push(adapter, "me/a", with_basis=True, dry_run=True)
    assert str(caught.value) == ("an access token is in this file (training_log.jsonl). Take it out, and revoke it")

    (adapter / "training_log.jsonl").write_text("{}")
    (adapter / "NOTICE").write_text("x" * 2_000_000 + "the key is opensesame")
    monkeypatch.setenv("HF_TOKEN", "opensesame")  # the token in use, whatever it looks like
    with pytest.raises(ArtifactError, match=r"an access token is in this file \(NOTICE\)"):
        push(adapter, "me/a", with_basis=True, dry_run=True)


@pytest.mark.parametrize(
    "token",
    [
        f"sk-{'a1B2' * 12}",
        f"sk-proj-{'a-1_' * 30}",
        f"sk-ant-api03-{'a-1_' * 20}",
        f"ghp_{'a1B2' * 9}",
        f"gho_{'a1B2' * 9}",
        f"github_pat_{'a1B2' * 5}_{'a1B2' * 14}",
        f"glpat-{'a1_B2' * 4}",
        f"xoxb-{'1' * 12}-{'2' * 12}-{'aB3' * 8}",
        f"AKIA{'A1B2' * 4}",
        f"AIza{'aB-_1' * 7}",
        "-----BEGIN PRIVATE KEY-----",
        "-----BEGIN RSA PRIVATE KEY-----",
    ],
)
def test_tokens_of_others_are_known_by_their_forms(token: str) -> None:
    with pytest.raises(ArtifactError, match="an access token is in this file"):
        outgoing.refuse_tokens({"NOTICE": f'the key="{token}"'.encode()})


def test_words_are_not_taken_for_tokens() -> None:
    """Neither prose, nor a vocabulary's prefixes, nor numbers in base64."""
    words = "sk-learn-based-classification-models, risk-adjusted0123456789abcdefghij, ghp_, xoxb-, AKIA, ghp_short"
    words += " -----BEGIN CERTIFICATE----- -----BEGIN PUBLIC KEY----- github_pat_ sk-SK sk_live"
    words += " sk-xxxxxxxxxxxxxxxxxxxxxxxx sk-YOURAPIKEYGOESHERE12 xoxb-your-bot-token-goes-here AKIAIOSFODNN7EXAMPLE"
    base64 = b64encode(random.Random(0).randbytes(1 << 20))
    outgoing.refuse_tokens({"NOTICE": words.encode(), "vocab.txt": base64, "LICENSE": b"+AIza" + base64})


@pytest.mark.parametrize(
    ("word", "kept"),
    [
        ("/home/me/x", "x"),
        ("a=/home/me/x/", "a=x"),
        ("--out=/home/me/x", "--out=x"),
        ("/a/x,/b/z", "x,z"),
        ("--rank=4", "--rank=4"),
        ("data/x", "data/x"),
        ("a=~me", "a=~me"),
    ],
)
def test_a_recorded_command_names_no_folder(word: str, kept: str) -> None:
    assert without_folders(word) == kept


def test_a_vocabulary_is_not_taken_for_paths(tmp_path: Path) -> None:
    tokenizer = {"model": {"vocab": {"/": 1, "/usr": 2}}, "name_or_path": "/home/somebody/base", "added": ["/tmp"]}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    files: outgoing.Files = {"tokenizer_config.json": tmp_path / "tokenizer_config.json"}
    outgoing.take_out_paths(files)
    sent = files["tokenizer_config.json"]
    assert isinstance(sent, bytes)
    assert json.loads(sent) == tokenizer | {"name_or_path": "base"}


def test_a_part_of_a_config_names_no_folder_either(tmp_path: Path) -> None:
    config = {"text_config": {"_name_or_path": "/home/somebody/text", "hidden_size": 8}, "chat": ["/"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    files: outgoing.Files = {"config.json": tmp_path / "config.json"}
    outgoing.take_out_paths(files)
    text = config["text_config"] | {"_name_or_path": "text"}  # type: ignore[operator]
    assert json.loads(outgoing.content_of(files["config.json"])) == config | {"text_config": text}


def test_lists_and_labels_are_published_as_they_are(tmp_path: Path) -> None:
    """`modules.json` of a sentence encoder is a list; a class may be called /r/a/politics, and a prompt begin with a
    switch of the model's."""
    config = {
        "training": {
            "data": "/home/somebody/data",
            "labels": ["/r/a/politics", "/r/b/politics"],
            "data_read": {"columns": {"prompt": "/no_think {title}/{body}"}},
        }
    }
    files: outgoing.Files = {}
    for name, content in {"lorasb.json": config, "modules.json": [{"path": "/x"}], "tokenizer.json": []}.items():
        (tmp_path / name).write_text(json.dumps(content))
        files[name] = tmp_path / name
    outgoing.take_out_paths(files)
    assert files["modules.json"] == tmp_path / "modules.json"
    sent = files["lorasb.json"]
    assert isinstance(sent, bytes)
    assert json.loads(sent)["training"] == config["training"] | {"data": "data"}


@pytest.mark.parametrize("content", [b"{", b"\xff", b"[" * 200_000])
def test_json_that_does_not_parse(tmp_path: Path, content: bytes) -> None:
    """Somebody else's is published as it is; ours is named."""
    files: outgoing.Files = {"vocab.json": content}
    outgoing.take_out_paths(files)
    assert files == {"vocab.json": content}
    with pytest.raises(ArtifactError, match=r"unreadable JSON: .* \(basis_config.json\). Write the folder again"):
        outgoing.take_out_paths({"basis_config.json": content})


def test_a_card_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    basis, _ = make(tmp_path)
    (basis / "README.md").write_bytes(b"caf\xe9")
    with pytest.raises(ArtifactError) as caught:
        push(basis, "me/basis", dry_run=True)
    assert str(caught.value) == (f"not UTF-8 text ({basis / 'README.md'}). Save it as UTF-8, or write it again")


def test_a_long_list_of_tokens_hides_no_path() -> None:
    """`tokenizer_config.json` of some bases has megabytes of added tokens."""
    content = {
        "name_or_path": "/home/me/secret/base",
        "added_tokens_decoder": {str(k): "x" * 60 for k in range(20_000)},
    }
    files: outgoing.Files = {"tokenizer_config.json": json.dumps(content).encode()}
    outgoing.take_out_paths(files)
    assert json.loads(outgoing.content_of(files["tokenizer_config.json"])) == content | {"name_or_path": "base"}


def test_a_routed_export_has_no_file_for_each_adapter(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"no other file is named")
    write_json(tmp_path / "lorasb.json", {"kind": "onnx-adapters", "adapters": {"a": {}}, "routed": True})
    outgoing.refuse_incomplete({"model.onnx": tmp_path / "model.onnx"}, "onnx-adapters", tmp_path)
    write_json(tmp_path / "lorasb.json", {"kind": "onnx-adapters", "adapters": {"a": {}}})
    with pytest.raises(ArtifactError, match=r"no a\.onnx_adapter"):
        outgoing.refuse_incomplete({"model.onnx": tmp_path / "model.onnx"}, "onnx-adapters", tmp_path)
