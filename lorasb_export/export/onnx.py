"""One task as an ONNX decoder with a KV cache, built by onnxruntime-genai from the merged model.

The builder runs as a child process: it loads the whole model and its memory goes back when it ends.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from importlib.metadata import packages_distributions, version
from pathlib import Path
from typing import Any

from .. import card
from ..artifact import Adapter, command, published_training, versions
from ..base import CAUSAL_LM, BaseModel
from ..environment import child_environment
from ..errors import BaseModelError, ServerError, SettingsError
from ..merge import merge
from ..storage import DTYPE_BYTES, atomic_folder, require_room, write_json
from .onnx_run import require_packages
from .onnx_verify import require_equal, verify_folder

PROVIDERS = {"fp32": "cpu", "int8": "cpu", "int4": "cpu", "fp16": "cuda", "bf16": "cuda"}  # what each graph is for
_BYTES = {"fp32": 4.0, "fp16": 2.0, "bf16": 2.0, "int8": 2.0, "int4": 1.0}  # per parameter; embeddings stay wider
_MERGE_DTYPES = {"fp16": "float16", "bf16": "bfloat16"}  # else float32: the update is not rounded before it must be
_SIDE_FILES = {".json", ".jinja", ".model", ".txt"}
_NOT_COPIED = {"lorasb.json", "model.safetensors.index.json"}


def export_onnx(
    adapter: str | Path,
    out: str | Path,
    *,
    base: str | Path | None = None,
    precision: str = "fp32",
    verify: bool = False,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Merge an adapter and write the result as an ONNX folder that onnxruntime and onnxruntime-genai run.

    The folder holds `model.onnx`, `model.onnx.data`, `genai_config.json`, the tokenizer with its chat template,
    `config.json`, `generation_config.json`, `lorasb.json` and a card.

    Args:
        adapter: a LoRA-SB adapter folder, or one on the Hub.
        base: another place of the base model than the one the adapter names; the weights must be the same.
        precision: `fp32`, `int8`, `int4` (graphs for the CPU), `fp16` or `bf16` (graphs for CUDA).
        verify: compare greedy answers with those of the merged model in torch; fp32 fails when they differ.

    Returns:
        what `lorasb.json` records, with `out` and the `bytes` written.

    Raises:
        ArtifactError: `verify` failed.
        BaseModelError: a sequence classifier, or not the base of the adapter.
        MissingPackageError: onnxruntime-genai is not installed.
        OutputError: `out` exists, or the disk is too full.
        ServerError: the builder failed, for instance on an architecture it does not know.
        SettingsError: unknown precision.
    """
    check_request(precision, PROVIDERS)
    task = Adapter.load(adapter)
    model = base_of(task, base)
    with atomic_folder(Path(out), overwrite=overwrite) as folder:
        scratch = folder / "scratch"  # inside, so that a killed run leaves one folder and the next call removes it
        scratch.mkdir()
        merged_bytes = 2 if precision in _MERGE_DTYPES else 4
        require_room(folder, int(parameters(model) * (merged_bytes + _BYTES[precision])))
        merge(task, scratch / "merged", base=base, dtype=_MERGE_DTYPES.get(precision, "float32"))
        build(scratch / "merged", folder, precision, scratch)
        record = {"kind": "onnx", **provenance(task, precision)}
        if verify:
            record["verify"] = require_equal(verify_folder(folder, scratch / "merged"), precision, out)
        shutil.rmtree(scratch)
        return finish(folder, out, record)


def check_request(precision: str, allowed: dict[str, str]) -> None:
    """Refuse an unknown precision, and a machine without the ONNX packages, before any work is done."""
    if precision not in allowed:
        raise SettingsError(f"precision {precision!r} is unknown here", fix=f"Choose one of {', '.join(allowed)}")
    require_packages("onnx", "onnx_ir", "onnxruntime", "onnxruntime_genai")


def base_of(task: Adapter, base: str | Path | None) -> BaseModel:
    """The base model to export `task` with. Raises BaseModelError for a sequence classifier."""
    if task.task_type != CAUSAL_LM:
        raise BaseModelError(
            f"the adapter's task is {task.task_type}; only causal language models are exported to ONNX",
            where=task.folder,
            fix="Use `lorasb merge` and run the merged classifier with transformers",
        )
    return task.base.resolve(base)


def parameters(model: BaseModel) -> int:
    """How many numbers the base's files hold."""
    return sum(info.nbytes // DTYPE_BYTES[info.dtype] for _, info in model.tensors.values())


def build(model: Path, out: Path, precision: str, scratch: Path, *options: str) -> None:
    """Run the onnxruntime-genai builder on the transformers folder `model`, then copy what it leaves behind.

    Args:
        scratch: an empty or temporary folder to run in. `python -m` puts the current folder first on its path,
            where a user's `datasets/` would hide the package of that name.
        options: `KEY=VALUE` for the builder's `--extra_options`.
    """
    command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", str(model), "-o", str(out)]
    command += ["-p", precision, "-e", PROVIDERS[precision], "-c", str(scratch / "cache")]
    command += ["--extra_options", *options] if options else []
    child = subprocess.run(
        command,
        cwd=scratch,
        env=child_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    if child.returncode != 0:
        lines = [line for line in child.stdout.splitlines() if line.strip()]
        raise ServerError(
            "\n  ".join([f"the ONNX builder failed with exit code {child.returncode}; its last lines:", *lines[-6:]]),
            where=model,
            fix="Check that onnxruntime-genai supports this architecture, and that the memory holds the model",
        )
    for path in model.iterdir():
        if path.suffix in _SIDE_FILES and path.name not in _NOT_COPIED and not (out / path.name).exists():
            shutil.copyfile(path, out / path.name)


def provenance(task: Adapter, precision: str) -> dict[str, Any]:
    """What `lorasb.json` says of every ONNX export."""
    distributions = packages_distributions()  # the GPU builds are called onnxruntime-gpu and onnxruntime-genai-cuda
    names = [distributions[package][0] for package in ("onnx", "onnxruntime", "onnxruntime_genai")]
    record = {**task.provenance(), "precision": precision, "execution_provider": PROVIDERS[precision]}
    record |= {"command": command(), "training": published_training(task)}
    return record | {"versions": versions() | {name: version(name) for name in names}}


def finish(folder: Path, out: str | Path, record: dict[str, Any]) -> dict[str, Any]:
    """Write `lorasb.json` and the card; returns `record` with the folder's name and size."""
    write_json(folder / "lorasb.json", record)
    card.write(folder, card.onnx_card(record))
    return record | {"out": str(out), "bytes": sum(path.stat().st_size for path in folder.iterdir())}
