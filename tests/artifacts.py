"""Folders of a basis, an adapter or a base that are copied and edited."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from lorasb_export.files.storage import sha256_file
from lorasb_export.format import sealed


def copy(folder: Path, target: Path) -> Path:
    shutil.copytree(folder, target)
    return target


def edit(folder: Path, name: str, change: Callable[[dict[str, Any]], object]) -> None:
    config = json.loads((folder / name).read_text())
    change(config)
    (folder / name).write_text(json.dumps(sealed(config)))


def edit_tensors(folder: Path, name: str, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / name)
    change(tensors)
    save_file(tensors, folder / name)
    config = f"{Path(name).stem}_config.json"
    if (folder / config).exists():  # of our own; a base has none
        edit(folder, config, lambda c: c.update(sha256=sha256_file(folder / name)))
