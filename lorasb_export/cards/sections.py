"""The sections of a model card, from what a folder records about itself."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from ..basis_source import EMBEDDED
from ..format import finite
from ..hub.ids import is_hub_id, parse_hub_folder
from ..provenance import CURVE

MAX_ROWS = 1000  # of a table: the Hub does not show a card of megabytes
_MAX_ENTRIES = 24  # a larger object is data, not a summary
_METHOD = "LoRA-SB ([arXiv 2411.19557](https://arxiv.org/abs/2411.19557)) trains `R` alone, in fp32."
# What a training summary says in other sections, or to machines.
_ELSEWHERE = {"task", "data", "data_sha256", "rows", "rows_left_out", "rows_cut", "evaluation", "plot", "settings"}
_ELSEWHERE |= {"trainable_parameters", "lora_parameters", "labels", "regression", "capture", "energy", "learning_rates"}
_ELSEWHERE |= {"splits_sha256", "chat_template_sha256"}


@dataclass(frozen=True)
class Facts:
    """What a card says that the folder's own config does not. The licences are empty until a push finds them out.

    Attributes:
        licence: `license`, `license_name`, `license_link` of the base's card.
        data_licences: data source → the licence its card names.
        made: the content of `lorasb.json`.
    """

    licence: Mapping[str, str] = field(default_factory=dict)
    data_licences: Mapping[str, str] = field(default_factory=dict)
    made: Mapping[str, Any] = field(default_factory=dict)


NOTHING = Facts()


def base_link(base: Mapping[str, Any]) -> str:
    """The base by name; a folder of the author's disk by its last part, and in words."""
    name = base.get("name_or_path")
    if is_hub_id(name):
        return f"`{name}`"
    return f"`{_shown(name)}` (a base model that is not on the Hub)" if name else "a base model"


def basis_shown(basis: Mapping[str, Any]) -> str:
    """Where the basis of an adapter is."""
    source = str(basis.get("source", ""))
    if source == EMBEDDED:
        return "a basis that lies in this folder"
    found = parse_hub_folder(source)
    if found and (found.revision or found.path):
        place = f"/tree/{found.revision or 'main'}/{found.path}" if found.path else ""
        commit = f" at `{found.revision[:12]}`" if found.revision else ""
        return f"the basis [{found._replace(revision=None)}](https://huggingface.co/{found.repo}{place}){commit}"
    return f"the basis with sha256 `{basis['sha256'][:12]}…`"


def method(numbers: Mapping[str, Any]) -> str:
    """Rank and sizes, the trained parameters beside those of LoRA."""
    shown = {key: value for key, value in numbers.items() if value is not None}
    ours, lora = shown.get("trained parameters"), shown.get("LoRA of this rank on these modules")
    if _are_numbers(ours, lora) and ours:
        shown["LoRA of this rank on these modules"] = f"{lora:,} parameters, {lora / ours:.1f} times as many"
    return grid("Method", ["", ""], shown.items(), before=_METHOD)


def retained(provenance: Mapping[str, Any]) -> str:
    """What the stored dtype kept of the update."""
    found = provenance.get("retained")
    if not found:
        return ""
    rows = [["all modules", found["cosine"], found["relative_error"]]]
    if "worst" in found:
        worst = found["worst"]
        rows.append([f"`{worst['module']}`, which kept least", worst["cosine"], worst["relative_error"]])
    before = "Rounding a small update to the stored dtype loses part of it. Beside the exact update, what is stored has"
    return grid("Retained update", ["", "cosine", "relative error"], rows, before=f"{before}:")


def data_of_training(training: Mapping[str, Any], facts: Facts) -> str:
    """The rows an adapter was trained on."""
    if not training.get("data"):
        return ""
    row = {
        "data": training["data"],
        "rows": training.get("rows"),
        "left out": training.get("rows_left_out"),
        **({"cut": training["rows_cut"]} if training.get("rows_cut") else {}),
        "licence": facts.data_licences.get(training["data"], "not stated"),
        "sha256": str(training.get("data_sha256"))[:12],
    }
    return grid("Data", list(row), [row.values()])


def data_of_basis(calibration: Mapping[str, Any], facts: Facts) -> str:
    """The rows a basis was calibrated on."""
    rows = [
        [
            s["name"],
            s["source"],
            s["rows"],
            s["weight"],
            facts.data_licences.get(s["source"], "not stated"),
            s["sha256"][:12],
        ]
        for s in calibration.get("data", [])
    ]
    what = f"The first {MAX_ROWS:,} of {len(rows):,} tasks; `basis_config.json` has all."
    more = what if len(rows) > MAX_ROWS else ""
    return grid("Data", ["task", "data", "rows", "weight", "licence", "sha256"], rows[:MAX_ROWS], before=more)


def training_table(training: Mapping[str, Any]) -> str:
    """The curve, what the run reports, what the basis holds of the task, the settings."""
    rest = _flat({key: value for key, value in training.items() if key not in _ELSEWHERE})
    rest |= {name: _Words(value) for name, value in rest.items() if name.startswith("data_read.columns.")}
    rows = [[name.replace("_", " ").replace(".", ", "), value] for name, value in rest.items()]
    image = f"![Loss while training]({CURVE})" if training.get("plot") == CURVE else ""
    settings = [
        f"`{_shown(name)}` {_shown(value)}" for name, value in training.get("settings", {}).items() if value is not None
    ]
    after = f"\nSettings: {', '.join(settings)}.\n" if settings else ""
    return grid("Training", ["", ""], rows, before=image) + _held_by_basis(training) + _by_rate(training) + after


def _by_rate(training: Mapping[str, Any]) -> str:
    values = training.get("learning_rates") or {}
    if not values or not _are_numbers(*(value for value in values.values() if value is not None)):
        return ""
    found = {_shown(rate): "not finite" if value is None else f"{value:.4g}" for rate, value in values.items()}
    told = ", ".join(f"{value} at {rate}" for rate, value in found.items())
    metric = training.get("settings", {}).get("metric", "loss")
    return f"\nTrained at each of these learning rates: `{_shown(metric)}` {told}.\n"


def _held_by_basis(training: Mapping[str, Any]) -> str:
    """What `fit` found out about the basis and this task."""
    found, energy = training.get("capture") or {}, training.get("energy") or {}
    least, most = (_at(found, "by_module", "basis", end) for end in ("min", "max"))
    if not _are_numbers(*map(found.get, ("basis", "own", "random")), least, most, _at(energy, "mean")):
        return ""
    return (
        f"\nThe basis holds {found['basis']:.0%} of this task's gradient (by module {least:.0%} to "
        f"{most:.0%}); one of the task's own would hold {found['own']:.0%}, a random one "
        f"{found['random']:.0%}. The basis keeps {energy['mean']:.0%} of the energy of the first step it was made "
        "from.\n"
    )


def adapters(provenance: Mapping[str, Any]) -> str:
    """The adapters of a folder that holds several: name → what is said of each, or a list that says names too."""
    found = provenance.get("adapters") or {}
    if isinstance(found, Mapping):
        found = [{"name": name, **of_one} for name, of_one in found.items()]
    rows = [[one["name"], one.get("weight", 1), one.get("source", "-"), one["sha256"]] for one in found]
    return grid("Adapters", ["name", "weight", "source", "sha256"], rows)


def evaluation(training: Mapping[str, Any], note: str) -> str:
    """A table of {split: {metric: {"base", "adapter", "rows"}}} after a `note`, or the words that there is none."""
    if not training:
        return ""
    chosen_on = "valid" if training.get("best_step") is not None or training.get("learning_rates") else None
    rows = [
        [f"{split} (these rows also chose the checkpoint)" if split == chosen_on else split, *figures]
        for split, *figures in figure_rows(training.get("evaluation", {}))
    ]
    if not rows:
        return "\n## Evaluation\n\nNot evaluated on held-out rows beside the base.\n"
    before = f"On held-out rows, the base asked the same way; greedy decoding where the metric is of answers.{note}"
    return grid("Evaluation", ["split", "metric", "rows", "base", "adapter"], rows, before=before)


def figure_rows(evaluation: Mapping[str, Any]) -> Iterator[list[Any]]:
    """Split, metric, rows, the base's figure and the adapter's."""
    for split, metrics in evaluation.items():
        for metric, found in metrics.items():
            base = "-" if found["base"] is None else found["base"]
            yield [split, metric, found["rows"], base, found["adapter"]]


def capture(found: Mapping[str, Any]) -> str:
    """A table of the tasks the basis was calibrated on: which share of each one's gradient it captures."""
    columns = ["rows", "basis", "own", "random"]
    tasks = found.get("tasks", {})
    rows = [[name, *(of_task.get(column, "") for column in columns)] for name, of_task in tasks.items()]
    before = "Of each task's gradient: held by this basis, by one of the task's own, by a random one."
    return grid("Captured gradient", ["task", *columns], rows, before=before)


def limits(base: Mapping[str, Any], training: Mapping[str, Any], facts: Facts) -> str:
    """What a reader must not expect."""
    lines = [
        f"It is made for {base_link(base)} with exactly the weights it was trained on, and has that model's "
        "knowledge, gaps and biases.",
        "What it does on inputs unlike its training data was not looked at.",
    ]
    if training and not training.get("evaluation"):
        lines.append("No figure on held-out rows is known.")
    if not facts.licence:
        lines.append("The licence of the base model is not known here; it applies to this as well.")
    return "\n## Limits\n\n" + "".join(f"* {line}\n" for line in lines)


def provenance_table(base: Mapping[str, Any], made: Mapping[str, Any]) -> str:
    """Hashes, versions and the command."""
    said = {"kind", "training", "retained", "settings", "scaling", "rank", "modules", "task_type", "verify", "seconds"}
    said |= {"capture", "base_fingerprint", "adapters"}
    rows = {"base": base} | {key: value for key, value in made.items() if key not in said | {"base"}}
    return grid("Provenance", ["", ""], ([name.replace("_", " "), value] for name, value in _flat(rows).items()))


def grid(title: str, header: list[str], rows: Iterable[Iterable[object]], *, before: str = "") -> str:
    """A section with a table; empty without rows."""
    lines = [f"| {' | '.join(map(_shown, row))} |" for row in rows]
    if not lines:
        return f"\n## {title}\n\n{before}\n" if before.startswith("!") else ""
    text = [before, ""] if before else []
    head = ["", f"## {title}", "", *text, f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
    return "\n".join([*head, *lines, ""])


def _at(value: Any, *keys: str) -> Any:
    """What lies under nested keys; None where there is none: `training` may be another program's."""
    for key in keys:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def _are_numbers(*values: Any) -> bool:
    """Whether each can be shown as a float: none is a word, NaN, or an integer of a thousand digits."""
    return all(finite(value) is not None for value in values)


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Scalars of nested objects under dotted names; lists and large objects are left out."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and len(value) <= _MAX_ENTRIES:
            flat |= _flat(value, f"{prefix}{key}.")
        elif isinstance(value, (str, int, float)):
            flat[f"{prefix}{key}"] = value
    return flat


class _Words(str):
    """No path, whatever it begins with: a column's template may be "/no_think {question}"."""


def _shown(value: object) -> str:
    """A value for a table cell; of a path only its last part, for the author's folders are nobody's business."""
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, int) and not isinstance(value, bool) and value >= 10_000:
        return f"{value:,}"
    text = str(value)
    if not isinstance(value, _Words) and (os.path.isabs(text) or text.startswith((".", "~"))):
        text = os.path.basename(os.path.normpath(text))
    return as_words(text).replace("|", "\\|")


def as_words(text: str) -> str:
    """What others wrote, on one line and without a meaning in Markdown: no tag, comment, link or image."""
    plain = " ".join(text.split()).replace("<", "&lt;")
    return plain.replace("[", "\\[") if "](" in plain else plain
