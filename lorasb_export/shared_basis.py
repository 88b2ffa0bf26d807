"""The basis that the tasks of a project share: not taken away from the adapters trained in it."""

from __future__ import annotations

from pathlib import Path

from .adapter import EMBEDDED
from .errors import OutputError
from .format import read_adapter_config
from .project import Project
from .storage import sha256_file


def refuse_to_strand(project: Project, target: Path) -> None:
    """Raise OutputError when `target` is a basis that adapters of the project were trained in, and need."""
    weights = target / "basis.safetensors"
    if not weights.is_file():
        return
    sha256 = sha256_file(weights)  # not what its config says: a damaged basis is of no use to them anyway
    configs = {name: read_adapter_config(project.adapter_folder(name)) for name in project.adapter_names()}
    bases = {name: config["basis"] for name, config in configs.items() if config["basis"]["source"] != EMBEDDED}
    trained = [name for name, basis in bases.items() if basis["sha256"] == sha256]
    if trained:
        raise OutputError(
            f"adapters were trained in this basis and are of no use without it: {', '.join(trained)}",
            where=target,
            fix="Choose another folder with --out, or remove these adapters first",
        )
