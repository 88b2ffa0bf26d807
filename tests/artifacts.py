"""Folders of a basis, an adapter or a base that are copied and edited, or that may not be read."""

from __future__ import annotations

import errno
import io
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
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


def forbid(path: Path, monkeypatch: pytest.MonkeyPatch, code: int = errno.EACCES) -> None:
    """Let the system refuse a file, or what lies in a folder, as another user's: no mode stops root.

    And Path's questions say of it that it is not there, as they do from Python 3.14 on. What is read by os.open, or in
    Rust, is not refused.
    """
    forbidden = os.path.abspath(path)

    def refuse_in(module: ModuleType, name: str) -> None:
        function = getattr(module, name)

        def called(path: Any = ".", *arguments: Any, **options: Any) -> Any:
            place = "" if isinstance(path, int) else os.path.abspath(os.fsdecode(path))
            if place.startswith(f"{forbidden}/") or (place == forbidden and name in ("listdir", "scandir", "open")):
                raise OSError(code, os.strerror(code), place)
            return function(path, *arguments, **options)

        monkeypatch.setattr(module, name, called)

    def answer_no_in(name: str) -> None:
        method = getattr(Path, name)

        def asked(path: Path, *arguments: Any, **options: Any) -> bool:
            try:
                return bool(method(path, *arguments, **options))
            except OSError:
                return False

        monkeypatch.setattr(Path, name, asked)

    for name in ("stat", "listdir", "scandir"):
        refuse_in(os, name)
    refuse_in(io, "open")
    for name in ("exists", "is_file", "is_dir"):
        answer_no_in(name)
