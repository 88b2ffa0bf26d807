"""Every module is on the map of the code, every package in the wheel; every link between pages leads somewhere."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import lorasb_export

ROOT = Path(__file__).parents[1]
MODULES = sorted((ROOT / "lorasb_export").rglob("*.py"))


def test_every_module_is_on_the_map() -> None:
    map_of_the_code = (ROOT / "CONTRIBUTING.md").read_text().split("```")[3]
    rooms = dict(re.findall(r"^ {2,4}(\w+)/ (.*?)(?=^ {2,4}\w+/ |^\w|\Z)", map_of_the_code, re.MULTILINE | re.DOTALL))
    top = map_of_the_code.partition("  files/")[0]
    there = {path: set(re.findall(r"\w+", rooms.get(path.parent.name, top))) for path in MODULES}
    assert len(rooms) > 10
    assert not [path for path in MODULES if path.stem not in {"__init__", *there[path]}]


def test_every_package_is_in_the_wheel() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    packages = {path.parent for path in MODULES if path.stem != "sitecustomize"}  # that one lies in a folder of data
    assert set(listed) == {".".join(path.relative_to(ROOT).parts) for path in packages} | {"lorasb_cli"}


def test_the_library_knows_no_command_line() -> None:
    assert not [
        path for path in MODULES if "import lorasb_cli" in path.read_text() or "from lorasb_cli" in path.read_text()
    ]


def test_what_the_page_on_python_imports_is_there_and_nothing_is_left_out() -> None:
    page = (ROOT / "docs" / "reference" / "python.md").read_text()
    lines = set(re.findall(r"^from lorasb_export.*", page, flags=re.MULTILINE))
    assert len(lines) > 20
    for line in lines:
        exec(line)
    shown = set(re.findall(r"^## (\w+)", page, flags=re.MULTILINE)) - {"Types", "Errors"}
    assert shown | {"LoraSBError"} == set(lorasb_export.__all__)


def test_the_pages_import_from_the_top_of_the_package_alone() -> None:
    """Or a module could not be moved."""
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
    deep = {
        page.name: re.findall(r"^(?:from|import) lorasb_export\..*", page.read_text(), re.MULTILINE) for page in pages
    }
    assert not {name: lines for name, lines in deep.items() if lines}


def _prose(page: Path) -> str:
    return re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)


def _anchors(page: Path) -> set[str]:
    """As GitHub names a page's headings."""
    headings = re.findall(r"^#+ (.*)", _prose(page), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_every_link_between_the_pages_leads_somewhere() -> None:
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
    lost = []
    for page in pages:
        for link in re.findall(r"\]\((?!https?:)([^)\s]+)", _prose(page)):
            name, _, anchor = link.partition("#")
            target = page.parent / name if name else page
            if not target.exists() or (anchor and anchor not in _anchors(target)):
                lost.append(f"{page.name}: {link}")
    assert len(pages) > 20
    assert not lost
