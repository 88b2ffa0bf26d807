"""How JSON and the headers of safetensors files are read."""

from __future__ import annotations

import errno
import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from lorasb_export.errors import ArtifactError
from lorasb_export.files.kind import artifact_kind
from lorasb_export.files.storage import MAX_JSON_BYTES, parse_json, read_header, read_json, sha256_file
from tests.artifacts import forbid


def test_a_key_that_stands_there_twice_is_found_in_one_pass() -> None:
    names = [f'"{number}": 0' for number in range(30_000)]
    started = time.perf_counter()
    with pytest.raises(ValueError, match="duplicate key '29999'"):
        parse_json(f"{{{', '.join([*names, names[-1]])}}}")
    assert time.perf_counter() - started < 2  # looking through all names for every name takes ten


def test_a_tensor_without_numbers_may_be_listed_after_the_one_it_lies_before(tmp_path: Path) -> None:
    header = {name: {"dtype": "F32", "shape": [n], "data_offsets": [0, 4 * n]} for name, n in (("b", 2), ("a", 0))}
    text = json.dumps(header).encode()
    (tmp_path / "x.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(8))
    assert list(read_header(tmp_path / "x.safetensors")) == ["a", "b"]


def test_what_is_too_large_to_be_one_of_ours_is_not_read(tmp_path: Path) -> None:
    file, too_large = tmp_path / "x", MAX_JSON_BYTES + 1
    for start, size, read, what in (
        (b"", too_large, read_json, f"more than {MAX_JSON_BYTES} bytes of JSON"),
        (too_large.to_bytes(8, "little"), 8 + too_large, read_header, f"its header takes {too_large} bytes, more than"),
    ):
        file.write_bytes(start)
        os.truncate(file, size)
        with pytest.raises(ArtifactError, match=what):
            read(file)
    brackets = "[],"
    assert len(parse_json(f'{{"x": [{brackets * 1000}[]]}}')["x"]) == 1001
    with pytest.raises(ValueError, match="more than 500000 lists and objects"):
        parse_json(f'{{"x": [{brackets * 500_000}[]]}}')


@pytest.mark.parametrize("code", [errno.EACCES, errno.EIO])
@pytest.mark.parametrize("read", [artifact_kind, read_json, read_header, sha256_file])
def test_a_file_that_the_system_refuses_is_an_error_of_its_own(
    read: Callable[[Path], object], code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "a"
    folder.mkdir()
    (folder / "adapter_config.json").touch()
    forbid(folder, monkeypatch, code)
    with pytest.raises(ArtifactError, match=f"cannot be read: {os.strerror(code)}"):
        read(folder if read is artifact_kind else folder / "adapter_config.json")
