"""A dry run of a push reads and writes nothing, and is refused as the push would be."""

from __future__ import annotations

from pathlib import Path

from integration.hub_client import CLI, Hub


def test_a_dry_run_reads_and_writes_nothing(any_hub: Hub, basis: Path) -> None:
    plan = any_hub.push(basis, "me/basis", dry_run=True)
    assert (plan["parent"], plan["reached"], plan["private"]) == (None, True, True)
    assert {file["change"] for file in plan["files"]} == {"added"}
    assert "me/basis" not in any_hub.repos

    commit = any_hub.push(basis, "me/basis")["commit"]
    (basis / "README.md").write_text("Ours.\n")
    any_hub.requests.clear()
    plan = any_hub.push(basis, "me/basis", dry_run=True, message="Say who made it")
    assert (plan["parent"], plan["message"]) == (commit, "Say who made it")
    changes = {file["path"]: file["change"] for file in plan["files"]}
    assert changes.pop("README.md") == "changed"
    assert changes == dict.fromkeys(["SHA256SUMS", "basis.safetensors", "basis_config.json"], "same")
    assert "+Ours." in plan["card_diff"].splitlines()
    assert plan["card_diff"].count("\n+") < 6
    assert [line for line in any_hub.requests if not line.startswith(("GET ", "HEAD "))] == []
    shown = any_hub.start(CLI, "push", basis, "--repo", "me/basis", "--dry-run")[1]
    assert "changed  README.md" in shown
    assert "same     basis.safetensors" in shown
    assert "+Ours." in shown


def test_a_dry_run_is_refused_as_the_push_would_be(any_hub: Hub, basis: Path, adapter: Path) -> None:
    wrong = {"HF_TOKEN": "hf_wrong"}
    refused = any_hub.push(basis, "me/basis", wrong, dry_run=True)
    assert refused == any_hub.push(basis, "me/basis", wrong)
    assert "asks for a valid token" in refused["text"]
    assert any_hub.push(basis, "me/basis", {"HF_ENDPOINT": "http://127.0.0.1:9"}, dry_run=True)["reached"] is False

    assert any_hub.push(adapter, "me/a", basis_repo="me/new", dry_run=True)["basis"] == "me/new"  # to be pushed yet
    any_hub.push(basis, "me/new")
    refused = any_hub.push(adapter, "me/a", basis_repo="me/new@none", dry_run=True)
    assert refused == any_hub.push(adapter, "me/a", basis_repo="me/new@none")
    assert "the adapter's basis: the Hub has no such repository or revision" in refused["text"]
