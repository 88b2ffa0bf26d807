"""An adapter's config, and the card of it."""

from __future__ import annotations

from typing import Any

from lorasb_export.cards import card

FIGURES = {"base": 0.0, "adapter": 0.75, "rows": 64}
ADAPTER: dict[str, Any] = {
    "base_model_name_or_path": "owner/base",
    "revision": "abc",
    "base_fingerprint": "f" * 64,
    "task_type": "CAUSAL_LM",
    "r": 4,
    "scaling": 1.0,
    "target_modules": ["a", "b"],
    "basis": {"sha256": "0" * 64, "source": "embedded"},
    "training": {"train_loss": 0.125, "steps": 30, "settings": {"epochs": 3}, "labels": [], "plot": "training.png"},
}


def adapter(**changes: Any) -> str:
    return card.adapter_card({**ADAPTER, **changes})
