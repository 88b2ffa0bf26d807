"""The folder of an adapter, as it is written: its tensors, its config, its card."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import save as serialize

from . import basis_source
from .cards import card
from .files.kind import ADAPTER_CONFIG, ADAPTER_WEIGHTS, PEFT_TYPE
from .files.storage import write_json
from .format import FORMAT_VERSION, check_training, sealed
from .provenance import current_training

if TYPE_CHECKING:
    from .adapter import Adapter


def write_adapter(adapter: Adapter, temporary: Path, target: Path, *, embed: bool = False) -> None:
    """Write the adapter's files into `temporary`, which will be renamed to `target`."""
    source = adapter.basis_source
    if embed or source is None or (adapter.basis is not None and adapter.basis.is_blocks):
        adapter.load_basis().write_into(temporary)
        source = basis_source.EMBEDDED
    elif os.path.isabs(source):
        source = basis_source.relative(source, target)
    (temporary / ADAPTER_WEIGHTS).write_bytes(tensor_bytes(adapter))
    config = config_of(adapter, source)
    check_training(config["training"], "Adapter.training")
    write_json(temporary / ADAPTER_CONFIG, config)
    card.write(temporary, card.adapter_card(config))


def tensor_bytes(adapter: Adapter) -> bytes:
    """`adapter.safetensors`: sorted names, fp32, so that all R lie in one block."""
    tensors = {name: t.detach().float().cpu().contiguous() for name, t in adapter.tensors().items()}
    return serialize(tensors, {"format": "pt"})


def config_of(adapter: Adapter, source: str) -> dict[str, Any]:
    """The content of `adapter_config.json`; `source` is where it says that the basis is."""
    content = {
        "peft_type": PEFT_TYPE,
        "format_version": FORMAT_VERSION,
        "base_model_name_or_path": adapter.base.name_or_path,
        "revision": adapter.base.revision,
        "base_fingerprint": adapter.base.fingerprint,
        "task_type": adapter.task_type,
        "r": adapter.rank,
        "scaling": adapter.scaling,
        "target_modules": sorted(adapter.R),
        "basis": {"sha256": adapter.basis_sha256, "source": source},
        "training": json.loads(json.dumps(current_training(adapter), default=_plain)),
        "sha256": adapter.sha256,
    }
    return sealed(content)


def _plain(value: Any) -> Any:
    """What JSON cannot say, as it can: numbers of numpy's or torch's as numbers, all else as text."""
    if isinstance(value, Mapping):
        return dict(value)
    return value.tolist() if hasattr(value, "tolist") else str(value)
