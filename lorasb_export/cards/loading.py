"""The lines of a card by which a model or an adapter is loaded: they can be copied and run."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from ..choices import SEQ_CLS
from ..hub.ids import is_hub_id


def adapter_lines(
    base: Mapping[str, Any], task_type: str, training: Mapping[str, Any], name: str, served: Sequence[str]
) -> str:
    """How the adapter `name` is put onto its base, and merged; how those in `served` are."""
    elsewhere = "" if is_hub_id(base.get("name_or_path")) else " --model path/to/the/base/model"
    serve = f"lorasb serve --adapters {','.join(served)}{elsewhere}    # OpenAI-compatible\n" if served else ""
    return f"""With the Python package `lorasb`:

```python
from lorasb_export import Adapter
from transformers import {model_class_of(task_type)} as AutoModel

model = AutoModel.from_pretrained({source_of(base)}{outputs(training)})
Adapter.load("{name}").inject(model)
```

```bash
lorasb merge {name} --out model{elsewhere}    # a plain model folder
{serve}```"""


def source_of(base: Mapping[str, Any]) -> str:
    """The arguments that `from_pretrained` loads the base by."""
    if not is_hub_id(base.get("name_or_path")):
        return '"path/to/the/base/model"'
    revision = f", revision={quoted(base['revision'])}" if base.get("revision") else ""
    return f'"{base["name_or_path"]}"{revision}'


def model_class_of(task_type: str | None) -> str:
    """What transformers loads the base with."""
    return "AutoModelForSequenceClassification" if task_type == SEQ_CLS else "AutoModelForCausalLM"


def outputs(training: Mapping[str, Any]) -> str:
    """The arguments with which a classifier's base gets a head of the right size, and its classes their names.

    That head comes with the adapter: one of another size, which the base may have, is passed over.
    """
    if training.get("regression"):
        return ", num_labels=1, ignore_mismatched_sizes=True"
    names = (quoted(str(label)) for label in training.get("labels") or [])
    named = ", ".join(f"{k}: {name}" for k, name in enumerate(names))
    return f", id2label={{{named}}}, ignore_mismatched_sizes=True" if named else ""


def quoted(text: str) -> str:
    """A string of Python, which may stand in a card: no mark of its end is in it."""
    return json.dumps(text, ensure_ascii=False).replace("<", "\\u003c")
