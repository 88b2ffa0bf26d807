"""Model cards: a generated block and front matter in README.md, around whatever the user wrote there."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from .errors import ArtifactError

BEGIN, END = "<!-- lorasb:begin -->", "<!-- lorasb:end -->"
HERE = "path/to/this/folder"  # how a card calls its folder as long as it has no name on the Hub

_BLOCK = re.compile(rf"{BEGIN}(?:(?!{BEGIN}).)*?{END}", re.DOTALL)
_FRONT_MATTER = re.compile(r"\A---\r?\n(.*?)^---[ \t]*(?:\r?\n|\Z)", re.DOTALL | re.MULTILINE)
_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
_PIPELINES = {"CAUSAL_LM": "text-generation", "SEQ_CLS": "text-classification"}
_CLASSES = {"SEQ_CLS": "AutoModelForSequenceClassification"}  # for the rest, AutoModelForCausalLM
_MAX_ENTRIES = 24  # a larger object is data, not a summary

_METHOD = "LoRA-SB adds `s·B·R·A` to frozen weights; `B` and `A` are made once for a base model and shared."


def write(folder: Path, card: str) -> None:
    """Write `card` as README.md of `folder`; the user's own text and front-matter keys there are kept.

    Raises:
        ArtifactError: the existing front matter is not valid YAML.
    """
    path = folder / "README.md"
    old = path.read_text(encoding="utf-8") if path.is_file() else ""
    path.write_text(update(old, card, where=path), encoding="utf-8")


def update(old: str, card: str, *, where: object = None) -> str:
    """The text `old` with its generated block and keys replaced by those of `card`; raises as `write` does."""
    if not old.strip():
        return card
    user_keys, user_text = _split(old)
    new_keys, new_text = front_matter(card), _split(card)[1]
    try:
        user_tags = (yaml.safe_load(user_keys) or {}).get("tags") or []
    except (yaml.YAMLError, AttributeError):
        fix = "Correct the lines between the first two `---`"
        raise ArtifactError("the card's front matter is not valid YAML", where=where, fix=fix) from None
    new_keys["tags"] += [tag for tag in user_tags if tag not in new_keys["tags"]]
    # The user's keys are kept as text, not parsed and dumped: comments and spelling (`language: no`) survive.
    entries = re.split(r"(?m)^(?=[^\s#-])", user_keys)
    kept = "".join(entry for entry in entries if entry.partition(":")[0].strip("'\" ") not in new_keys)
    if _BLOCK.search(user_text):
        text = _BLOCK.sub(lambda _: new_text.strip(), user_text, count=1)
    else:
        text = f"{user_text.rstrip()}\n\n{new_text}"
    return f"---\n{_dump(new_keys)}{kept}---\n{text}"


def front_matter(card: str) -> dict[str, Any]:
    """The metadata of a card written by this module."""
    return dict(yaml.safe_load(_split(card)[0]) or {})


def is_hub_id(name: object) -> bool:
    """Whether `name` can be a Hub repository (`owner/name`, or an old one without owner), not a path."""
    return isinstance(name, str) and _HUB_ID.fullmatch(name) is not None


def basis_card(config: Mapping[str, Any], name: str = HERE) -> str:
    """The card of a basis folder from its basis_config.json; `name` is what a reader loads it by."""
    base, calibration = config["base_model"], dict(config["calibration"])
    energy, capture = calibration.pop("energy", None), calibration.pop("capture", {})
    if isinstance(energy, Mapping) and energy:
        calibration["energy captured, mean of modules"] = sum(energy.values()) / len(energy)
    body = f"""# LoRA-SB basis

The frozen `B` and `A` of rank {config["rank"]} for {len(config["target_modules"])} modules of {_base(base)}.
An adapter trained in it adds one {config["rank"]} by {config["rank"]} matrix `R` to each. {_METHOD}

```python
from lorasb_export import Adapter, Basis
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained({_source(base)})
adapter = Adapter.attach(model, Basis.load("{name}"))  # train it, then adapter.save("folder")
```
{_table("Calibration", calibration)}{_capture(capture)}"""
    provenance = {"sha256": config["sha256"], "base": base, "created with": config["created_with"]}
    return _card(body, provenance, "lorasb", base, "adapter", None, ["basis"])


def adapter_card(config: Mapping[str, Any], name: str = HERE) -> str:
    """The card of an adapter folder from its adapter_config.json; `name` is what a reader loads it by."""
    base, task_type = _base_of(config), config["task_type"]
    training = dict(config["training"])
    evaluation, plot = training.pop("evaluation", {}), training.pop("plot", None)
    image = f"\n![Loss while training]({plot})\n" if plot else ""
    outputs = 1 if training.get("regression") else len(training.get("labels") or [])
    labels = f", num_labels={outputs}" if outputs else ""
    body = f"""# LoRA-SB adapter

An adapter for {_base(base)}: one trained {config["r"]} by {config["r"]} matrix `R` for each of
{len(config["target_modules"])} modules. {_METHOD}

```python
from lorasb_export import Adapter
from transformers import {_model_class(task_type)} as AutoModel

model = AutoModel.from_pretrained({_source(base)}{labels})
Adapter.load("{name}").inject(model)
```

```bash
lorasb serve --adapters {name}
```
{_table("Training", training)}{image}{_evaluation(evaluation)}"""
    provenance = {"basis": config["basis"], "scaling": config["scaling"], "base": base}
    return _card(body, provenance, "lorasb", base, "adapter", task_type, [])


def peft_card(config: Mapping[str, Any], name: str = HERE) -> str:
    """The card of a PEFT export from its adapter_config.json; `name` is what a reader loads it by."""
    base, task_type = _base_of(config), config.get("task_type")
    body = f"""# LoRA adapter

A LoRA-SB adapter folded into a stock PEFT LoRA of rank {config.get("r")} for {_base(base)}.

```python
from peft import PeftModel
from transformers import {_model_class(task_type)} as AutoModel

model = PeftModel.from_pretrained(AutoModel.from_pretrained({_source(base)}), "{name}")
```
"""
    return _card(body, {"base": base}, "peft", base, "adapter", task_type, ["lora"])


def merged_card(provenance: Mapping[str, Any], name: str = HERE) -> str:
    """The card of a merged model from its lorasb.json; `name` is what a reader loads it by."""
    base, task_type = _base_of(provenance), provenance.get("task_type")
    body = f"""# Merged model

{_base(base)} with a LoRA-SB adapter merged in: an ordinary model that needs no adapter library.

```python
from transformers import {_model_class(task_type)} as AutoModel

model = AutoModel.from_pretrained("{name}")
```
"""
    return _card(body, provenance, "transformers", base, "finetune", task_type, [])


def onnx_card(provenance: Mapping[str, Any], name: str = HERE) -> str:
    """The card of an ONNX export (kind `onnx` or `onnx-adapters`) from its lorasb.json."""
    base = _base_of(provenance)
    content = "a LoRA-SB adapter merged in"
    if provenance.get("kind") == "onnx-adapters":
        content = "LoRA-SB adapters as inputs: each `.onnx_adapter` file is one task"
    body = f"""# ONNX model

{_base(base)} for ONNX Runtime, with {content}.

```python
from huggingface_hub import snapshot_download

folder = snapshot_download("{name}")  # open it with onnxruntime or onnxruntime-genai
```
"""
    return _card(body, provenance, "lorasb", base, "finetune", provenance.get("task_type"), ["onnx"])


def _card(
    body: str,
    provenance: Mapping[str, Any],
    library: str,
    base: Mapping[str, Any],
    relation: str,
    task_type: str | None,
    tags: list[str],
) -> str:
    keys: dict[str, Any] = {"library_name": library}
    if is_hub_id(base.get("name_or_path")):
        keys |= {"base_model": base["name_or_path"], "base_model_relation": relation}
    if task_type in _PIPELINES:
        keys["pipeline_tag"] = _PIPELINES[task_type]
    keys["tags"] = ["lora-sb", "lorasb", *tags]
    return f"---\n{_dump(keys)}---\n{BEGIN}\n{body.rstrip()}\n{_table('Provenance', provenance)}{END}\n"


def _split(card: str) -> tuple[str, str]:
    match = _FRONT_MATTER.match(card)
    return (match.group(1), card[match.end() :]) if match else ("", card)


def _dump(keys: Mapping[str, Any]) -> str:
    return str(yaml.safe_dump(dict(keys), sort_keys=False, allow_unicode=True))


def _base_of(config: Mapping[str, Any]) -> Mapping[str, Any]:
    flat = {"name_or_path": config.get("base_model_name_or_path"), "revision": config.get("revision")}
    base: Mapping[str, Any] = config.get("base") or flat | {"fingerprint": config.get("base_fingerprint")}
    return base


def _base(base: Mapping[str, Any]) -> str:
    known = is_hub_id(base.get("name_or_path"))
    return f"`{base['name_or_path']}`" if known else "a base model that is not on the Hub (a local folder)"


def _source(base: Mapping[str, Any]) -> str:
    if not is_hub_id(base.get("name_or_path")):
        return '"path/to/the/base/model"'
    revision = f', revision="{base["revision"]}"' if base.get("revision") else ""
    return f'"{base["name_or_path"]}"{revision}'


def _model_class(task_type: str | None) -> str:
    return _CLASSES.get(task_type or "", "AutoModelForCausalLM")


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Scalars of nested objects under dotted names; lists and large objects are left out."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and len(value) <= _MAX_ENTRIES:
            flat |= _flat(value, f"{prefix}{key}.")
        elif isinstance(value, (str, int, float)):
            flat[f"{prefix}{key}"] = value
    return flat


def _shown(value: object) -> str:
    """A value for a table cell; of a path only its last part, for the author's folders are nobody's business."""
    if isinstance(value, float):
        return f"{value:.6g}"
    text = str(value)
    if os.path.isabs(text) or text.startswith((".", "~")):
        text = os.path.basename(os.path.normpath(text))
    return text.replace("|", "\\|").replace("\n", " ")


def _table(title: str, values: Mapping[str, Any]) -> str:
    return _grid(title, ["key", "value"], _flat(values).items())


def _capture(capture: Mapping[str, Any]) -> str:
    """A table of the tasks the basis was calibrated on: which share of each one's gradient it captures."""
    columns = ["rows", "basis", "own", "random"]
    tasks = capture.get("tasks", {})
    rows = [[name, *(found.get(column, "") for column in columns)] for name, found in tasks.items()]
    return _grid("Share of a task's gradient captured", ["task", *columns], rows)


def _evaluation(evaluation: Mapping[str, Any]) -> str:
    """A table of {split: {metric: {"base", "adapter", "rows"}}}."""
    columns = ["base", "adapter", "rows"]
    rows = [
        [split, metric, *(found.get(column, "") for column in columns)]
        for split, metrics in evaluation.items()
        for metric, found in metrics.items()
    ]
    return _grid("Evaluation", ["split", "metric", *columns], rows)


def _grid(title: str, header: list[str], rows: Iterable[Iterable[object]]) -> str:
    lines = [f"| {' | '.join(map(_shown, row))} |" for row in rows]
    head = ["", f"## {title}", "", f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
    return "\n".join([*head, *lines, ""]) if lines else ""
