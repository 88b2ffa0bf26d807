"""What configs and `lorasb.json` record of how a folder was made: the command, versions, the adapter, its training."""

from __future__ import annotations

import logging
import os
import re
import shlex
import shutil
import sys
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .hub.cache import leads_out
from .hub.ids import parse_hub_folder

if TYPE_CHECKING:
    from .adapter import Adapter

logger = logging.getLogger(__name__)

# What begins with a ~ and has no folder stays as it is; to look whether it has one, at every ~, would take minutes.
_FROM_ROOT = re.compile(r"(?:(?<=[=,@])|^)(?:~|(?:file://)?/)[^,]*")
MAX_COMMAND = 4000  # characters of a command

CURVE = "training.png"  # the picture of an adapter's losses

# What `Adapter.training` says of one R and of no other.
_MEASURED = {"steps", "best_step", "train_loss", "valid_loss", "valid_metrics", "learning_rates", "evaluation", "plot"}


def command() -> str | None:
    """The `lorasb` command line this process runs, with the last part of every absolute path; None for other programs.

    It is provenance: with the settings that are recorded beside it, how to make the same thing again. Of one that
    names thousands of tasks the first are kept: it lies in the folder of each of them.
    """
    program = Path(sys.argv[0])
    if program.name != "lorasb" and program.parent.name != "lorasb_cli":
        return None
    words = list(map(without_folders, sys.argv[1:]))
    text = shlex.join(["lorasb", *words])
    return text if len(text) <= MAX_COMMAND else f"{text[:MAX_COMMAND]} … ({len(words):,} words)"


def without_folders(word: str) -> str:
    """Of every path from the root or a home in `path`, `path=weight`, `name=path`, `@path`, `--option=path` or several
    with commas, the last part."""
    return _FROM_ROOT.sub(lambda found: os.path.basename(os.path.normpath(found[0])), word)


def versions() -> dict[str, str]:
    """Versions of what writes an artifact, for its provenance."""
    return {name: version(name) for name in ("lorasb", "torch", "transformers")}


def adapter_provenance(adapter: Adapter) -> dict[str, Any]:
    """What `lorasb.json` of a folder made from `adapter` says about it."""
    made = {"name": adapter.name, "sha256": adapter.sha256}
    basis = {"sha256": adapter.basis_sha256}
    if adapter.hub_source is not None:
        made["source"] = adapter.hub_source
    if adapter.basis_source is not None and parse_hub_folder(adapter.basis_source):
        basis["source"] = adapter.basis_source
    return {
        "base": asdict(adapter.base),
        "adapter": made,
        "basis": basis,
        "rank": adapter.rank,
        "scaling": adapter.scaling,
        "task_type": adapter.task_type,
        "modules": len(adapter.R),
        "versions": versions(),
    }


def current_training(adapter: Adapter) -> dict[str, Any]:
    """Its `training`, without what was measured of the R and head that were loaded, if these were trained on since."""
    if adapter.as_loaded is None or adapter.as_loaded[0] == adapter.sha256:
        return dict(adapter.training)
    old = {key: value for key, value in adapter.as_loaded[1].items() if key in _MEASURED}
    if not old or any(adapter.training.get(key) != value for key, value in old.items()):  # they are told anew
        return dict(adapter.training)
    logger.warning("%s has changed since it was loaded: its record is kept without %s", adapter, ", ".join(sorted(old)))
    return {key: value for key, value in adapter.training.items() if key not in old}


def published_training(adapter: Adapter, folder: Path | None = None) -> dict[str, Any]:
    """What a folder made from `adapter` says of its training. The picture of its curve, if any, goes to `folder`."""
    training = {key: value for key, value in current_training(adapter).items() if key != "plot"}
    return training | {"plot": CURVE} if folder and _copy_curve(adapter, folder) else training


def _copy_curve(adapter: Adapter, folder: Path) -> bool:
    """Put the picture of the adapter's losses into `folder`; returns whether there is one."""
    # Only under its own name: what a config calls its picture may be any path.
    curve = adapter.folder / CURVE if adapter.folder is not None else None
    if curve is None or not curve.is_file():
        return False
    if leads_out(curve, curve.parent):
        logger.warning("%s is left out: a link out of the adapter's folder", curve)
        return False
    shutil.copyfile(curve, folder / CURVE)
    return True
