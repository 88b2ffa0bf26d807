"""A stranger finds every module on CONTRIBUTING's map, and a user every package in the wheel."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
MODULES = sorted(path for path in (ROOT / "lorasb_export").rglob("*.py") if path.parent.name != "child_site")


def test_every_module_is_on_the_map() -> None:
    map_of_the_code = (ROOT / "CONTRIBUTING.md").read_text().split("```")[3]
    there = set(re.findall(r"\w+", map_of_the_code))
    missing = [path for path in MODULES if not {path.stem, path.stem.removeprefix("onnx")} & there]
    assert not [path for path in missing if path.stem != "__init__" and "serve" not in path.parts]  # a map of its own


def test_every_package_is_in_the_wheel() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    there = {".".join(path.parent.relative_to(ROOT).parts) for path in MODULES}
    assert set(listed) == there | {"lorasb_cli"}


def test_the_library_knows_no_command_line() -> None:
    assert not [
        path for path in MODULES if "import lorasb_cli" in path.read_text() or "from lorasb_cli" in path.read_text()
    ]
