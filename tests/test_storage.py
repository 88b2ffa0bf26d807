"""How JSON and the headers of safetensors files are read."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from lorasb_export.files.storage import parse_json, read_header


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
