"""The card of each kind of folder, from what the folder records about itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..choices import CAUSAL_LM, NF4, SEQ_CLS
from ..errors import ArtifactError, some
from ..files.atomic import atomic_file
from ..files.kind import CARD
from ..files.storage import utf8
from ..hub.cache import leads_out
from ..hub.ids import is_hub_id, parse_hub_id
from .loading import adapter_lines, model_class_of, outputs, source_of
from .readme import assemble, update
from .sections import (
    NOTHING,
    Facts,
    adapters,
    as_words,
    base_link,
    basis_shown,
    capture,
    data_of_basis,
    data_of_training,
    evaluation,
    limits,
    method,
    provenance_table,
    retained,
    training_table,
)

HERE = "path/to/this/folder"  # how a card calls its folder as long as it has no name on the Hub

_PIPELINES = {CAUSAL_LM: "text-generation", SEQ_CLS: "text-classification"}
_OF_ADAPTERS = ("lorasb", "peft")  # libraries
_ROUNDED = " `W` is the base with its linear layers rounded to NF4 (four bits)."
_BEFORE = " Measured with the adapter itself, before it was written in this form."


def write(folder: Path, card: str) -> None:
    """Write `card` as README.md of `folder`; the user's own text and front-matter keys there are kept.

    Raises:
        ArtifactError: the existing card is not UTF-8, its front matter not valid YAML; or it is a link out of `folder`.
    """
    path = own_readme(folder)
    old = _text(path)
    with atomic_file(path) as temporary:
        temporary.write_text(update(old, card, where=path), encoding="utf-8")


def check(folder: Path) -> None:
    """Raise, before work that is to replace `folder`, what `write` would of the card that is there."""
    path = folder / CARD
    if not path.is_symlink():  # which is not taken over (`atomic.keep_card`)
        update(_text(path), assemble({"tags": []}, ""), where=path)


def _text(path: Path) -> str:
    return utf8(path.read_bytes(), path) if path.is_file() else ""


def own_readme(folder: Path) -> Path:
    """Where the card of `folder` lies. Raises ArtifactError where that is a link out of it."""
    path = folder / CARD
    if leads_out(path, folder):
        raise ArtifactError("a link out of the folder", where=path, fix="Replace it by the file itself, or remove it")
    return path


def basis_card(config: Mapping[str, Any], name: str = HERE, facts: Facts = NOTHING) -> str:
    """The card of a basis folder from its basis_config.json; `name` is what a reader loads it by."""
    base, rank, calibration = base_of(config), config["rank"], config["calibration"]
    energy, model_class = calibration.get("energy") or {}, model_class_of(calibration.get("task_type"))
    numbers = {
        "rank": rank,
        "modules": len(config["target_modules"]),
        "trained parameters of an adapter in it": rank * rank * len(config["target_modules"]),
        "LoRA of this rank on these modules": sum(rank * sum(shape) for shape in config["target_modules"].values()),
        "kept of the first step's energy, mean of modules": sum(energy.values()) / len(energy) if energy else None,
        **{key: calibration.get(key) for key in ("directions", "samples", "reduction", "loss", "dtype", "seed")},
    }
    body = f"""# A LoRA-SB basis for {base_link(base)}

The frozen factors `B` and `A` that adapters for this model share. An adapter trained in the basis adds `s·B·R·A` to the
weight of each of {len(config["target_modules"])} linear layers and is a file of its `R` alone: {rank} × {rank} numbers
a layer.

## How to use it

With the Python package `lorasb`:

```python
from lorasb_export import Adapter, Basis
from transformers import {model_class}

model = {model_class}.from_pretrained({source_of(base)})
adapter = Adapter.attach(model, Basis.load("{name}"))  # then any training loop, and adapter.save("folder")
```

```bash
lorasb fit --basis {name}    # in a project: trains an adapter of each task
```
{method(numbers)}{data_of_basis(calibration, facts)}{capture(calibration.get("capture", {}))}"""
    made = {"basis sha256": config["sha256"], "command": calibration.get("command"), "versions": config["created_with"]}
    return whole_card(body, base, made, facts, name, None, {}, library="lorasb", tags=["lora-sb-basis"])


def adapter_card(config: Mapping[str, Any], name: str = HERE, facts: Facts = NOTHING) -> str:
    """The card of an adapter folder from its adapter_config.json; `name` is what a reader loads it by."""
    base, task_type, training = base_of(config), config["task_type"], config["training"]
    numbers = {
        "rank": config["r"],
        "modules": len(config["target_modules"]),
        "scaling s": config["scaling"],
        "trained parameters": training.get("trainable_parameters"),
        "LoRA of this rank on these modules": training.get("lora_parameters"),
    }
    body = f"""# {_task(training)}: a LoRA-SB adapter for {base_link(base)}

One trained {config["r"]} × {config["r"]} matrix `R` for each of {len(config["target_modules"])} linear layers.
It adds `s·B·R·A` to their weights, where `B` and `A` are frozen and shared by many tasks:
{basis_shown(config["basis"])}.

## How to load it

{adapter_lines(base, task_type, training, name, [name] if task_type != SEQ_CLS else [])}
{method(numbers)}{_trained(training, facts)}"""
    made = {"basis_sha256": config["basis"]["sha256"], **facts.made}
    return whole_card(body, base, made, facts, name, task_type, training, library="lorasb")


def peft_card(config: Mapping[str, Any], name: str = HERE, facts: Facts = NOTHING) -> str:
    """The card of a PEFT export from its adapter_config.json; `name` is what a reader loads it by."""
    base, task_type = base_of(config), config.get("task_type")
    training = facts.made.get("training", {})
    loaded = f"AutoModel.from_pretrained({source_of(base)}{outputs(training)})"
    body = f"""# {_task(training)}: a LoRA for {base_link(base)}

A LoRA-SB adapter folded into a stock PEFT LoRA of rank {config.get("r")}: `A` and `s·B·R`.

## How to load it

```python
from peft import PeftModel
from transformers import {model_class_of(task_type)} as AutoModel

model = PeftModel.from_pretrained({loaded}, "{name}")
```
{_trained(training, facts, _BEFORE)}"""
    return whole_card(body, base, facts.made, facts, name, task_type, training, library="peft", tags=["lora"])


def merged_card(provenance: Mapping[str, Any], name: str = HERE, facts: Facts = NOTHING) -> str:
    """The card of a merged model from its lorasb.json; `name` is what a reader loads it by."""
    base, task_type, training = base_of(provenance), provenance.get("task_type"), provenance.get("training", {})
    several = [as_words(str(one["name"])) for one in provenance.get("adapters", [])]
    title, what = _task(training), "a LoRA-SB adapter"
    if several:
        title, what = " + ".join(several[:10]) + " + …" * (len(several) > 10), f"{len(several)} LoRA-SB adapters"
    rounded = _ROUNDED if provenance.get("base_dtype") == NF4 else ""
    body = f"""# {title}: {base_link(base)} with {what} merged in

An ordinary model that needs no adapter library: `W + s·B·R·A` of every adapted layer, rounded once.{rounded}

## How to load it

```python
from transformers import {model_class_of(task_type)} as AutoModel, AutoTokenizer

model = AutoModel.from_pretrained("{name}")
tokenizer = AutoTokenizer.from_pretrained("{name}")
```
{adapters(provenance)}{method(_of_update(provenance))}{retained(provenance)}{_trained(training, facts, _BEFORE)}"""
    return whole_card(body, base, provenance, facts, name, task_type, training, library="transformers")


def onnx_card(provenance: Mapping[str, Any], name: str = HERE, facts: Facts = NOTHING) -> str:
    """The card of an ONNX export (kind `onnx` or `onnx-adapters`) from its lorasb.json."""
    base, training, task_type = base_of(provenance), provenance.get("training", {}), provenance.get("task_type")
    tasks = list(provenance.get("adapters", {}))
    title, content = f"{_task(training)}: an adapter merged into", "with a LoRA-SB adapter merged in"
    if tasks:
        each = "of which each row of a batch picks one" if provenance.get("routed") else "one `.onnx_adapter` file each"
        title, content = f"{some(tasks)}: adapters for", f"with LoRA-SB adapters, {each}"
    cache = "" if task_type == SEQ_CLS else " with a key-value cache"
    numbers = {**_of_update(provenance), "precision": provenance.get("precision")}
    numbers |= {"made for": provenance.get("execution_provider"), "exporter": provenance.get("exporter")}
    body = f"""# {title} {base_link(base)}, for ONNX Runtime

{base_link(base)} as an ONNX graph{cache}, {content}.

## How to load it

```python
{_onnx_lines(provenance, tasks, name)}```
{adapters(provenance)}{method(numbers)}{_trained(training, facts, _BEFORE)}"""
    return whole_card(body, base, provenance, facts, name, task_type, training, library="onnxruntime", tags=["onnx"])


def _onnx_lines(provenance: Mapping[str, Any], tasks: Sequence[str], name: str) -> str:
    """How to load a folder by what can run it: onnxruntime-genai its own builder's graphs, if they are not routed."""
    short = name.rpartition("/")[2]  # a folder of its own: in the cache the graph's data would be a link
    fetch = "" if name == HERE else "from huggingface_hub import snapshot_download\n"
    folder = f'folder = "{name}"\n' if name == HERE else f'folder = snapshot_download("{name}", local_dir="{short}")\n'
    if provenance.get("task_type") == SEQ_CLS:
        return f'import onnxruntime as ort\n{fetch}\n{folder}session = ort.InferenceSession(folder + "/model.onnx")\n'
    if provenance.get("exporter", "genai") != "genai" or provenance.get("routed"):
        adapter = f', "{tasks[0]}"' if tasks else ""
        decoder = f"decoder = OnnxDecoder(folder{adapter})  # decoder.generate(prompt_ids, 40)\n"
        return f"{fetch}from lorasb_export import OnnxDecoder\n\n{folder}{decoder}"
    load = ""
    if tasks:
        load = f"""adapters = og.Adapters(model)
adapters.load(folder + "/{tasks[0]}.onnx_adapter", "{tasks[0]}")  # generator.set_active_adapter(adapters, "{tasks[0]}")
"""
    return f"import onnxruntime_genai as og\n{fetch}\n{folder}model = og.Model(folder)\n{load}"


def _task(training: Mapping[str, Any]) -> str:
    return as_words(str(training.get("task") or "One task"))


def _of_update(provenance: Mapping[str, Any]) -> dict[str, Any]:
    training = provenance.get("training", {})
    return {
        **{key: provenance.get(key) for key in ("rank", "modules", "scaling")},
        "trained parameters": training.get("trainable_parameters"),
        "LoRA of this rank on these modules": training.get("lora_parameters"),
    }


def _trained(training: Mapping[str, Any], facts: Facts, note: str = "") -> str:
    return data_of_training(training, facts) + training_table(training) + evaluation(training, note)


def whole_card(
    body: str,
    base: Mapping[str, Any],
    made: Mapping[str, Any],
    facts: Facts,
    name: str,
    task_type: str | None,
    training: Mapping[str, Any],
    *,
    library: str,
    tags: Sequence[str] = (),
) -> str:
    """A card: `body` with its front matter before, which the Hub reads, and after it what every card ends with.

    A base model that is a local folder is left out of the front matter: the Hub could not link to it.
    """
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
    rest = limits(base, training, facts) + provenance_table(base, made)
    return assemble(keys, f"{body.rstrip()}\n{rest}")


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


def base_of(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """`name_or_path`, `revision` and `fingerprint` of the base, from any config of ours."""
    flat = {"name_or_path": config.get("base_model_name_or_path"), "revision": config.get("revision")}
    base: Mapping[str, Any] = (
        config.get("base") or config.get("base_model") or flat | {"fingerprint": config.get("base_fingerprint")}
    )
    return base
