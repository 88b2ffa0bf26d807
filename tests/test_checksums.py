"""SHA256SUMS: `sha256sum` agrees with it, and whatever differs from it is named."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from lorasb_export.errors import ArtifactError
from lorasb_export.publishing.checksums import checksums, verify
from lorasb_export.publishing.outgoing import SUMS, collect


@pytest.fixture
def published(tmp_path: Path) -> Path:
    """A folder as a push publishes it."""
    for name, text in {
        "model.safetensors": "weights",
        "config.json": "{}",
        "README.md": "card",
        ".secret": "s",
    }.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tool.jinja").write_text("{{ x }}")
    files, skipped = collect(tmp_path, "onnx")
    assert skipped == [".secret", "model.safetensors"]
    (tmp_path / SUMS).write_bytes(checksums(files | {"model.safetensors": tmp_path / "model.safetensors"}))
    return tmp_path


def test_what_is_unchanged_passes(published: Path) -> None:
    assert verify(published) == {"files": 3, "bytes": 16, "unlisted": []}
    (published / "notes.txt").write_text("mine")
    (published / "README.md").write_text("edited")
    assert verify(published)["unlisted"] == ["notes.txt"]
    assert "SHA256SUMS" not in collect(published, "onnx")[0]  # the next push makes its own


@pytest.mark.skipif(shutil.which("sha256sum") is None, reason="no sha256sum here")
def test_sha256sum_reads_it(published: Path) -> None:
    done = subprocess.run(["sha256sum", "--check", "--strict", SUMS], cwd=published, capture_output=True, text=True)
    assert (done.returncode, done.stdout.count(": OK")) == (0, 3), done.stderr


def test_what_changed_and_what_is_missing_is_named(published: Path) -> None:
    (published / "model.safetensors").write_text("Weights")
    (published / "config.json").unlink()
    with pytest.raises(ArtifactError) as caught:
        verify(published)
    assert str(caught.value) == (
        f"not as published: config.json missing; model.safetensors changed ({published}). "
        "Fetch it again, or ask its owner"
    )


@pytest.mark.parametrize(
    "line",
    [
        *("", "no hash", f"{'0' * 63}  config.json", f"{'0' * 64}  ../config.json", f"{'0' * 64}  /etc/passwd"),
        *(f"{'0' * 64}  evil.bin", f"{'0' * 64}  modeling.py", f"{'0' * 64}  config.json\n{'0' * 64}  config.json"),
        "\udcff",
    ],
)
def test_what_a_push_did_not_write_is_refused(published: Path, line: str) -> None:
    """Of these, a file that is never published is the one that matters: it is not even fetched."""
    (published / SUMS).write_bytes(f"{line}\n".encode(errors="surrogateescape"))
    with pytest.raises(ArtifactError, match="not a line of a SHA256SUMS of ours"):
        verify(published)


def test_without_it_there_is_nothing_to_compare_with(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="no SHA256SUMS: there is nothing to compare with"):
        verify(tmp_path)
    (tmp_path / SUMS).write_bytes(b"")
    with pytest.raises(ArtifactError, match="it lists no file"):
        verify(tmp_path)


def test_of_many_adapters_few_patterns_are_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each file of the Hub is compared with each of them."""
    names = ["a", "ab", *map(str, range(100))]
    paths = [f"adapters/{name}/{file}" for name in names for file in ("adapter.safetensors", "adapter_config.json")]
    for path in paths:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(path)
    (tmp_path / SUMS).write_bytes(checksums({path: tmp_path / path for path in paths}))
    asked: list[list[str]] = []

    def fetch(*_: Any, allow_patterns: list[str], **__: Any) -> str:
        asked.append(allow_patterns)
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    commit = "0" * 40
    assert verify(f"me/support@{commit}")["files"] == len(paths)
    assert asked[1] == ["adapters/*/adapter.safetensors", "adapters/*/adapter_config.json"]
    assert verify(f"me/support/adapters/a@{commit}")["files"] == 2
    assert set(asked[3]) == {"adapters/a/adapter.safetensors", "adapters/a/adapter_config.json"}
    (tmp_path / "adapters" / "ab" / "adapter.safetensors").unlink()
    with pytest.raises(ArtifactError, match=r"adapters/ab/adapter.safetensors missing"):
        verify(f"me/support@{commit}")
