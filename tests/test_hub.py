"""Push and resolve, as far as they go without a network; integration/test_push.py goes on from here."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
from pathlib import Path
from typing import Any

import httpx2
import pytest
import torch
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError
from lorasb_cli.main import app
from safetensors.torch import save_file
from typer.testing import CliRunner

from lorasb_export import push
from lorasb_export.adapter import Adapter
from lorasb_export.base import BaseRef
from lorasb_export.basis import Basis
from lorasb_export.errors import ArtifactError, LoraSBError, SettingsError
from lorasb_export.exporting.onnx_record import write_record
from lorasb_export.factors import ModuleBasis
from lorasb_export.fetch import BASIS_FILES, resolve_folder
from lorasb_export.format import sealed
from lorasb_export.hub_calls import hub_errors, retry_after
from lorasb_export.inspection import inspect_folder
from lorasb_export.project import Project
from lorasb_export.provenance import without_folders
from lorasb_export.publishing import outgoing
from lorasb_export.publishing.outgoing import SUMS
from lorasb_export.publishing.push_project import push_project
from lorasb_export.storage import read_json, write_json

RANK, MODULES = 4, {"model.layers.0.q_proj": (16, 8), "model.layers.0.v_proj": (8, 8)}


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("the network was touched")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def make(folder: Path, seed: int = 0) -> tuple[Path, Path]:
    """A saved basis and a saved adapter that names it by a relative path."""
    generator = torch.Generator().manual_seed(seed)
    modules = {
        name: ModuleBasis(
            torch.linalg.qr(torch.randn(rows, RANK, generator=generator))[0].contiguous(),
            torch.linalg.qr(torch.randn(columns, RANK, generator=generator))[0].T.contiguous(),
            torch.ones(RANK),
        )
        for name, (rows, columns) in MODULES.items()
    }
    base = BaseRef("owner/base", None, "f" * 64)
    calibration = {"samples": 1, "reduction": "sign", "data": [], "energy": {"a": 0.5}}
    Basis(base, RANK, modules, calibration).save(folder / "basis")
    basis = Basis.load(folder / "basis")
    R = {name: torch.randn(RANK, RANK, generator=generator) for name in MODULES}
    Adapter(base, basis.sha256, basis.source, R, training={"steps": 1}).save(folder / "adapters" / "a")
    return folder / "basis", folder / "adapters" / "a"


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_dry_run_plans_and_changes_nothing(tmp_path: Path) -> None:
    basis, _ = make(tmp_path)
    before = contents(basis)
    plan = push(basis, "me/basis", dry_run=True)
    assert (plan["repo"], plan["kind"], plan["private"]) == ("me/basis", "basis", True)
    assert [file["path"] for file in plan["files"]] == ["README.md", SUMS, "basis.safetensors", "basis_config.json"]
    assert plan["bytes"] == sum(file["bytes"] for file in plan["files"])
    assert plan["card"]["base_model"] == "owner/base"
    assert "commit" not in plan
    assert (plan["reached"], plan["parent"], plan["sent"]) == (False, None, plan["bytes"])
    assert "+# A LoRA-SB basis for `owner/base`" in plan["card_diff"].splitlines()
    assert contents(basis) == before
    json.dumps(plan)


def test_a_basis_named_by_way_of_the_folder_above(tmp_path: Path) -> None:
    make(tmp_path)
    project = Project(tmp_path, basis_path=f"../{tmp_path.name}/basis")
    plans = push_project(project, "me/{name}", dry_run=True)
    assert [(plan["repo"], plan.get("basis")) for plan in plans] == [("me/basis", None), ("me/a", "me/basis")]


def test_an_adapter_takes_its_local_basis_along_when_asked(tmp_path: Path) -> None:
    _, adapter = make(tmp_path)
    before = contents(adapter)
    plan = push(adapter, "me/a", with_basis=True, dry_run=True)
    assert plan["basis"] == "embedded"
    assert {"basis.safetensors", "basis_config.json"} <= {file["path"] for file in plan["files"]}
    assert contents(adapter) == before


def test_an_adapter_whose_basis_nobody_finds_is_refused(tmp_path: Path) -> None:
    basis, adapter = make(tmp_path)
    with pytest.raises(ArtifactError) as caught:
        push(adapter, "me/a", dry_run=True)
    assert str(caught.value) == (
        f"nobody else could find this adapter's basis, a local folder ({basis}). Push the basis first and name it "
        "with --basis-repo, or upload it in the adapter with --with-basis"
    )
    plan = push(adapter, "me/a", basis_repo="me/basis", dry_run=True)  # the Hub does not answer: not pinned
    assert plan["basis"] == "me/basis"
    assert [file["path"] for file in plan["files"]] == ["README.md", SUMS, "adapter.safetensors", "adapter_config.json"]


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


@pytest.mark.parametrize(
    ("kind", "there", "missing"),
    [
        ("peft", ["adapter_model.bin"], "adapter_model.safetensors"),
        ("onnx", ["model.onnx_data"], "model.onnx"),
        ("onnx-adapters", ["model.onnx", "a.onnx_adapter"], "basis.onnx_data and no model.onnx_data"),
        ("onnx-adapters", ["model.onnx", "model.onnx_data", "basis.onnx_data"], "a.onnx_adapter"),
    ],
)
def test_a_folder_without_its_weights_is_refused(tmp_path: Path, kind: str, there: list[str], missing: str) -> None:
    for name in there:
        (tmp_path / name).write_bytes(b"\x0fmodel.onnx_data \x0fbasis.onnx_data")
    config = "adapter_config.json" if kind == "peft" else "lorasb.json"
    write_json(tmp_path / config, {"kind": kind, "peft_type": "LORA", "adapters": {"a": {}}})
    with pytest.raises(ArtifactError) as caught:
        push(tmp_path, "me/x", dry_run=True)
    assert caught.value.what == f"the folder has no {missing}"


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


def test_a_plain_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ArtifactError, match="a folder of kind 'base' is not pushed"):
        push(tmp_path, "me/model", dry_run=True)


def test_damage_is_refused(tmp_path: Path) -> None:
    basis, adapter = make(tmp_path)
    for folder in (basis, adapter):  # never pushed: each has its config to be compared with
        config = "basis_config.json" if folder == basis else "adapter_config.json"
        assert inspect_folder(folder, verify=True)["verified"] == {"against": config}
    data = (basis / "basis.safetensors").read_bytes()
    (basis / "basis.safetensors").write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    for folder in (basis, adapter):
        with pytest.raises(ArtifactError, match="sha256 is not"):
            push(folder, "me/x", with_basis=folder == adapter, dry_run=True)
    with pytest.raises(ArtifactError, match="sha256 is not"):
        inspect_folder(basis, verify=True)


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


def test_inspect_believes_what_it_finds_not_what_is_recorded(llama: Path, tmp_path: Path) -> None:
    merged = tmp_path / "merged"
    shutil.copytree(llama, merged)
    write_json(merged / "lorasb.json", {"kind": "merged", "bytes": -1, "verified": {"against": SUMS}, "rank": 4})
    found = inspect_folder(merged)
    assert (found["kind"], found["rank"], found["tensors"] > 2) == ("merged", 4, True)
    assert found["bytes"] > 0
    assert "verified" not in found
    weights = (merged / "model.safetensors").read_bytes()
    (merged / "model.safetensors").write_bytes(weights[:-1])
    with pytest.raises(ArtifactError, match="truncated"):
        inspect_folder(merged)


def test_inspect_of_an_onnx_folder_whose_record_was_edited(tmp_path: Path) -> None:
    write_record(tmp_path, {"kind": "onnx", "precision": "fp32"})
    assert inspect_folder(tmp_path)["precision"] == "fp32"
    write_json(tmp_path / "lorasb.json", read_json(tmp_path / "lorasb.json") | {"precision": "int4"})
    with pytest.raises(ArtifactError, match="the config is not as it was written"):
        inspect_folder(tmp_path)


def test_inspect_of_a_peft_folder_that_others_wrote(tmp_path: Path) -> None:
    config = {"peft_type": "LORA", "r": 8, "target_modules": ["q_proj"], "base_model_name_or_path": "owner/base"}
    write_json(tmp_path / "adapter_config.json", config)
    save_file({"x": torch.zeros(2)}, tmp_path / "adapter_model.safetensors")
    found = inspect_folder(tmp_path)
    assert (found["kind"], found["rank"], found["target_modules"]) == ("peft", 8, ["q_proj"])
    assert (found["base_model"], found["tensors"]) == ("owner/base", 1)


@pytest.mark.parametrize(
    ("word", "kept"),
    [
        ("/home/me/x", "x"),
        ("a=/home/me/x/", "a=x"),
        ("--out=/home/me/x", "--out=x"),
        ("/a/x,/b/z", "x,z"),
        ("--rank=4", "--rank=4"),
        ("data/x", "data/x"),
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


def test_lists_and_labels_are_published_as_they_are(tmp_path: Path) -> None:
    """`modules.json` of a sentence encoder is a list; a class may be called /r/a/politics."""
    config = {"training": {"data": "/home/somebody/data", "labels": ["/r/a/politics", "/r/b/politics"]}}
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


@pytest.mark.parametrize(
    ("repo", "options", "message"),
    [
        ("basis", {}, "not a Hub repository (basis). Give owner/name"),
        ("me/a/b", {}, "not a Hub repository (me/a/b). Give owner/name"),
        ("me/a", {"basis_repo": "x"}, "not a Hub repository (x). Give owner/name"),
        ("me/a", {"create_pr": True, "revision": "b"}, "create_pr and revision exclude each other. Leave one out"),
        ("me/a", {"basis_repo": "me/b"}, "basis_repo and with_basis are for adapters ({}). Leave it out"),
    ],
)
def test_wrong_options(tmp_path: Path, repo: str, options: dict[str, Any], message: str) -> None:
    basis, _ = make(tmp_path)
    with pytest.raises(SettingsError) as caught:
        push(basis, repo, dry_run=True, **options)
    assert str(caught.value) == message.format(basis)


def test_a_local_folder_resolves_to_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "me" / "basis").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    expected = tmp_path / "me" / "basis"
    assert resolve_folder("me/basis", BASIS_FILES) == (expected, str(expected))  # before the Hub is asked
    assert os.path.isabs(resolve_folder(Path("me/basis"), BASIS_FILES)[1])


@pytest.mark.parametrize("source", ["nothing", "a/b/c", "/tmp/none/x", "./a", "owner/"])
def test_neither_folder_nor_hub_id(source: str) -> None:
    with pytest.raises(ArtifactError) as caught:
        resolve_folder(source, BASIS_FILES)
    assert str(caught.value) == (
        f"neither a folder nor a Hub id ({source}). "
        "Give an existing folder, or a Hub id: owner/name or owner/name@revision"
    )


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("Network error: HTTP status client error (401 Unauthorized), domain: http://x", "asks for a valid token"),
        ("Rate limited: HTTP status client error (429 Too Many Requests), domain: http://x", "rate limit is reached"),
        ("Server error: HTTP status server error (503 Service Unavailable), domain: http://x", "the Hub fails (503)"),
        ("Network error: Request middleware error: error sending request for url (http://x)", "cannot be reached"),
    ],
)
def test_what_hf_xet_says_is_understood(said: str, expected: str) -> None:
    """It raises Python's own ConnectionError, with the status in words."""
    with pytest.raises(LoraSBError, match=re.escape(expected)), hub_errors("me/a", LoraSBError):
        raise ConnectionError(said)


def test_a_name_that_the_hub_does_not_know_is_not_taken_for_a_bad_token() -> None:
    """To those who are not logged in it answers 401: the repository might be a private one."""
    answer = httpx2.Response(401, request=httpx2.Request("GET", "http://hub"))
    with pytest.raises(LoraSBError, match=r"no such repository .* Check the name"), hub_errors("a/b", LoraSBError):
        raise RepositoryNotFoundError("not found", response=answer)


@pytest.mark.parametrize(
    ("status", "headers", "seconds"),
    [
        (429, {"Retry-After": "7"}, 7.0),
        (429, {"ratelimit": '"api";r=0;t=55', "ratelimit-policy": '"fixed window";"api";q=500;w=300'}, 55.0),
        (429, {"ratelimit": '"api";r=0;t=301'}, None),
        (429, {}, 0.0),
        (500, {"ratelimit": '"api";r=400;t=55'}, 0.0),
    ],
)
def test_a_rate_limit_is_waited_for_as_long_as_it_says(
    status: int, headers: dict[str, str], seconds: float | None
) -> None:
    answer = httpx2.Response(status, headers=headers, request=httpx2.Request("GET", "http://hub"))
    assert retry_after(HfHubHTTPError("refused", response=answer)) == seconds


def test_a_panic_of_hf_xet_is_our_error() -> None:
    """It is no Exception. Its words are those of a push whose disk is full as it is first used."""
    panic = type("PanicException", (BaseException,), {})
    said = 'initializing rolling file appender failed: Os { code: 28, message: "No space left on device" }'
    expected = "hf_xet cannot work: No space left on device (me/a)"
    with pytest.raises(LoraSBError, match=re.escape(expected)), hub_errors("me/a", LoraSBError):
        raise panic(said)


def test_no_token_in_an_error() -> None:
    with pytest.raises(LoraSBError) as caught, hub_errors("me/a", LoraSBError):
        raise RuntimeError("header 'Bearer hf_abcDEF123' is illegal, hf_abcDEF123 too")
    assert "hf_abc" not in str(caught.value)
    assert caught.value.__suppress_context__
