"""The front matter of a model card, which the Hub reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..choices import CAUSAL_LM, SEQ_CLS
from ..hub.fetch import is_hub_id, parse_hub_id
from .sections import Facts

_PIPELINES = {CAUSAL_LM: "text-generation", SEQ_CLS: "text-classification"}
_OF_ADAPTERS = ("lorasb", "peft")  # libraries


def metadata(
    base: Mapping[str, Any],
    facts: Facts,
    name: str,
    task_type: str | None,
    training: Mapping[str, Any],
    *,
    library: str,
    tags: Sequence[str],
) -> dict[str, Any]:
    """The front matter. A base model that is a local folder is left out: the Hub could not link to it."""
    keys: dict[str, Any] = {"library_name": library}
    if is_hub_id(base.get("name_or_path")):
        relation = "adapter" if library in _OF_ADAPTERS else "finetune"
        keys |= {"base_model": base["name_or_path"], "base_model_relation": relation}
    pipeline = _PIPELINES.get(task_type or "")
    if pipeline:
        keys["pipeline_tag"] = pipeline
    keys |= facts.licence
    if on_the_hub := parse_hub_id(training.get("data") or ""):
        keys["datasets"] = [on_the_hub.repo]
    keys["tags"] = ["lora-sb", "lorasb", *tags]
    results = _results(training, pipeline or "text-generation")
    if results:
        keys["metrics"] = sorted({metric["type"] for result in results for metric in result["metrics"]})
        keys["model-index"] = [{"name": name.rpartition("/")[2], "results": results}]
    return keys


def _results(training: Mapping[str, Any], pipeline: str) -> list[dict[str, Any]]:
    """The adapter's figures, one result for each split, as the Hub's model-index wants them."""
    task, of_hub = training.get("task") or "task", parse_hub_id(training.get("data") or "")
    return [
        {
            "task": {"type": pipeline},
            "dataset": {"name": task, "type": of_hub.repo if of_hub else task, "split": split},
            "metrics": [{"type": metric, "value": found["adapter"]} for metric, found in metrics.items()],
        }
        for split, metrics in training.get("evaluation", {}).items()
    ]
