"""The card of a push, and what is said to the user: never a token."""

from __future__ import annotations

from pathlib import Path

import pytest

from integration.hub_client import CLI, Hub
from integration.hub_server import Fault
from lorasb_export.files.storage import read_json, write_json
from lorasb_export.format import sealed


@pytest.mark.parametrize(
    ("repo", "env", "text"),
    [
        ("me/a", {"HF_TOKEN": ""}, "the Hub asks for a valid token (me/a). Run `hf auth login`, or set HF_TOKEN"),
        (
            "me/a",
            {"HF_TOKEN": "hf_wrong"},
            "the Hub asks for a valid token (me/a). Run `hf auth login`, or set HF_TOKEN",
        ),
        (
            "you/a",
            {},
            "this token may not do that: You don't have the rights to create a model under this namespace (you/a). "
            "Use a token that may, with write access for a push",
        ),
        (
            "me/a",
            {"HF_ENDPOINT": "http://127.0.0.1:9"},
            "the Hub cannot be reached (me/a). Check the network and HF_ENDPOINT",
        ),
        (
            "me/a",
            {"HF_HUB_OFFLINE": "1"},
            "HF_HUB_OFFLINE is set: nothing can be pushed (me/a). Unset it",
        ),
    ],
)
def test_what_the_user_is_told(any_hub: Hub, basis: Path, repo: str, env: dict[str, str], text: str) -> None:
    assert any_hub.push(basis, repo, env) == {"error": "ServerError", "text": text}
    assert list(any_hub.repos) == ["owner/base"]


def test_what_people_write_on_the_website_survives(any_hub: Hub, basis: Path) -> None:
    any_hub.push(basis, "me/basis")
    card = any_hub.content("me/basis", "README.md").decode()
    repo, edited = any_hub.repos["me/basis"], f"{card}\nMind the dates before 1900.\n"
    repo.commit("main", any_hub.files("me/basis") | {"README.md": any_hub.store.regular(edited.encode())}, "web")
    assert any_hub.push(basis, "me/basis")["changed"] is False
    assert any_hub.push(basis, "me/basis", message="Again")["changed"] is False
    assert any_hub.content("me/basis", "README.md").decode() == edited
    assert "license: apache-2.0" in card  # the base's


def test_a_card_on_the_hub_that_is_not_utf8_is_named(any_hub: Hub, basis: Path) -> None:
    any_hub.push(basis, "me/basis")
    card = {"README.md": any_hub.store.regular(b"caf\xe9")}
    any_hub.repos["me/basis"].commit("main", {**any_hub.files("me/basis"), **card}, "web")
    said = "not UTF-8 text (me/basis/README.md). Save it as UTF-8, or write it again"
    assert any_hub.push(basis, "me/basis") == {"error": "ArtifactError", "text": said}


def test_the_card_says_whose_data_and_under_which_licence(any_hub: Hub, adapter: Path, tmp_path: Path) -> None:
    (tmp_path / "dates").mkdir()
    (tmp_path / "dates" / "README.md").write_text("---\nlicense: cc-by-4.0\n---\nDates.\n")
    any_hub.put("datasets/owner/dates", tmp_path / "dates")
    config = read_json(adapter / "adapter_config.json")
    config["training"] |= {"data": "owner/dates", "rows": 9, "rows_left_out": 0, "data_sha256": "d" * 64}
    write_json(adapter / "adapter_config.json", sealed(config))
    assert any_hub.push(adapter, "me/a", with_basis=True)["card"]["datasets"] == ["owner/dates"]
    card = any_hub.content("me/a", "README.md").decode()
    assert "| owner/dates | 9 | 0 | cc-by-4.0 | dddddddddddd |" in card
    assert "license: apache-2.0" in card


@pytest.mark.parametrize("more", [["--verbose"], ["--verbose", "HF_DEBUG"], []])
def test_no_token_is_shown_however_much_is_said(any_hub: Hub, basis: Path, more: list[str]) -> None:
    """`start` looks for it in all output, and `serve` in all files; here the Hub does not accept it."""
    any_hub.faults.append(Fault("POST .*/commit/", status=401, times=9))
    variables = {"HF_DEBUG": "1", "HF_HUB_VERBOSITY": "debug"} if "HF_DEBUG" in more else {}
    words = ["push", basis, "--repo", "me/basis", *[word for word in more if word.startswith("-")]]
    code, _, said = any_hub.start(CLI, *words, **variables)
    assert code == 1
    assert ("Traceback" in said) is bool(more)
    assert "the Hub asks for a valid token" in said
