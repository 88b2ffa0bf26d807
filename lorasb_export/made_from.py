"""What a folder that is made from an adapter says of it, and of its training."""

from __future__ import annotations

import logging
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .hub.cache import leads_out
from .hub.ids import parse_hub_folder
from .provenance import CURVE, versions

if TYPE_CHECKING:
    from .adapter import Adapter

logger = logging.getLogger(__name__)


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


def published_training(adapter: Adapter, folder: Path | None = None) -> dict[str, Any]:
    """What a folder made from `adapter` says of its training. The picture of its curve, if any, goes to `folder`."""
    training = {key: value for key, value in adapter.current_training().items() if key != "plot"}
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
