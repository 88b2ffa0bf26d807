"""What `lorasb inspect` found, as lines for people."""

from __future__ import annotations

from collections import Counter
from itertools import islice
from typing import Any

from lorasb_export.errors import some

from .words import low_scores, score

_MAX_LINES = 40  # lines of one part, as there may be of adapters or modules
_MANY = 50  # adapters: of more those are shown that are odd
_MORE = "(--json lists all)"


def data_lines(found: dict[str, Any]) -> list[str]:
    """The rows of every split, counted, and the first one, with what is learnt of it between brackets."""
    lines = [
        f"data: {found['path']}",
        f"base model: {found['base_model']}",
        f"rows: {found['row_kind']}, cut after {found['max_length']:,} tokens",
        f"{'split':6} {'rows':>9} {'left out':>9} {'cut':>9}  tokens: {'min':>6} {'median':>7} {'95 %':>7} {'max':>7}"
        + f" {'learnt':>12}" * ("tokens_learnt" in found["splits"]["train"]),
    ]
    for split, of_split in found["splits"].items():
        tokens = of_split["tokens"]
        line = f"{split:6} {of_split['rows']:9,} {of_split['rows_left_out']:9,} {of_split['rows_cut']:9,}"
        line += f"  {tokens['min']:14,} {tokens['median']:7,} {tokens['p95']:7,} {tokens['max']:7,}"
        lines.append(line + (f" {of_split['tokens_learnt']:12,}" if "tokens_learnt" in of_split else ""))
    for split, of_split in found["splits"].items():
        if "classes" in of_split:
            classes = [f"{_in_line(name)} {rows:,}" for name, rows in of_split["classes"].items()]
            lines.append(f"classes of {split}: {some(classes, _MAX_LINES)}")
        if "numbers" in of_split:
            lines.append("numbers of {}: {min:g} to {max:g}, median {median:g}".format(split, **of_split["numbers"]))
    return lines + _row_lines(found["first_row"], found["max_length"])


def _row_lines(row: dict[str, Any], max_length: int) -> list[str]:
    shown = f"the first {max_length:,} of {row['tokens']:,} tokens" if row["cut"] else f"{row['tokens']:,} tokens"
    text = "".join(f"⟦{part['text']}⟧" if part["learnt"] else part["text"] for part in row["segments"])
    if "label" in row:
        text += f" → ⟦{row['label']}⟧"
    return ["", f"train row {row['row']:,}, {shown}; what is learnt stands between ⟦ and ⟧:", text]


def repository_lines(found: dict[str, Any]) -> list[str]:
    """Of a project's repository: a line for each basis and each adapter, of many for the first."""
    width = min(50, max(map(len, found["parts"]), default=0))
    lines = [f"path: {found['path']}", "kind: project", f"base model: {_in_line(found['base_model'] or 'not named')}"]
    bases_first = sorted(found["parts"], key=lambda part: "basis_sha256" in found["parts"][part])
    parts = list(found["parts"]) if len(found["parts"]) <= _MANY else bases_first[:_MAX_LINES]
    for part in parts:
        about = found["parts"][part]
        rank = f"rank {about['rank']}, " if "rank" in about else ""
        said = f"{rank}sha256 {about['sha256'][:12]}  {_scores(about.get('evaluation', {}))}"
        lines.append(f"{_in_line(part):{width}}  {_in_line(said)}".rstrip())
    lines += _more(len(found["parts"]) - len(parts))
    if "verified" in found:
        lines.append(f"verified: {found['verified']['files']} files against {found['verified']['against']}")
    return lines


def project_lines(found: dict[str, Any]) -> list[str]:
    """The basis, and a line for every adapter, of many for the odd; of what it was scored on, the test rows if any."""
    adapters = found["adapters"]
    odd = list(adapters) if len(adapters) <= _MANY else _odd(adapters)
    names = {name: _in_line(name) for name in (odd if len(odd) <= _MANY else odd[:_MAX_LINES])}
    width = min(40, max([len("adapter"), *map(len, names.values())]))
    lines = [f"base model: {found['base_model'] or 'not named'}", f"basis: {_basis_line(found['basis'])}"]
    if len(adapters) > _MANY:
        lines.append(_counts(adapters))
    if names:
        lines.append(f"{'adapter':{width}} {'state':10} {'basis':8} {'valid loss':>10}  scored")
    for name in names:
        adapter = adapters[name]
        said = f"{names[name]:{width}} {adapter['state'].replace('_', ' '):10}"
        if "problem" in adapter:
            said += f" {_in_line(adapter['problem'])}"
        elif adapter["state"] == "fitted":
            loss = score("loss", adapter["valid_loss"])
            said += f" {adapter['basis']:8} {loss:>10}  {_scores(adapter['evaluation'])}"
        if not adapter["task"]:
            said += "  (of no task)"
        lines.append(said.rstrip())
    lines += _more(len(odd) - len(names))
    scored = {name: _held_out(adapter.get("evaluation", {}))[1] for name, adapter in adapters.items()}
    lines += map(_in_line, low_scores(scored))
    more = "interrupted or still going; the same command with --resume goes on"
    return lines + [f"unfinished run: {_in_line(path)} ({more})" for path in found["unfinished"]]


def _counts(adapters: dict[str, Any]) -> str:
    """How many adapters there are, by state and basis."""
    count = Counter(_state(adapter) for adapter in adapters.values())
    said = [f"{number:,} {state}" for state, number in count.most_common()]
    if no_task := sum(not adapter["task"] for adapter in adapters.values()):
        said.append(f"{no_task:,} of no task")
    return f"adapters: {len(adapters):,}: {', '.join(said)}"


def _state(adapter: dict[str, Any]) -> str:
    state = str(adapter["state"]).replace("_", " ")
    return f"{state} (basis: {adapter['basis']})" if adapter["state"] == "fitted" else state


def _odd(adapters: dict[str, Any]) -> list[str]:
    """Names of those that are not fitted, or are of another basis than most, or of a task or none unlike most. What
    there is least of comes first."""
    kinds = {name: (_state(adapter), adapter["task"]) for name, adapter in adapters.items()}
    count = Counter(kinds.values())
    sound = Counter(kinds[name] for name, one in adapters.items() if one.get("basis", "missing") != "missing")
    usual = [kind for kind, _ in sound.most_common(1)]
    return sorted((name for name, kind in kinds.items() if kind not in usual), key=lambda name: count[kinds[name]])


def _more(number: int) -> list[str]:
    return [f"… and {number:,} more {_MORE}"] if number > 0 else []


def _basis_line(basis: dict[str, Any]) -> str:
    if basis["state"] == "missing":
        return f"none at {basis['path']}"
    if basis["state"] == "damaged":
        return f"damaged: {_in_line(basis['problem'])}"
    return f"{basis['path']}, rank {basis['rank']}, {basis['modules']} modules, sha256 {basis['sha256'][:12]}"


def _held_out(evaluation: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """The split that counts, the test rows if they were scored, and its figures by metric."""
    split = "test" if "test" in evaluation else next(iter(evaluation), "")
    return split, evaluation.get(split, {})


def _scores(evaluation: dict[str, Any]) -> str:
    (split, of_metric), said = _held_out(evaluation), []
    for metric, figures in of_metric.items():
        base, after = (score(metric, figures[which]) for which in ("base", "adapter"))
        said.append(f"{_in_line(metric)} {after} (base {base}, {figures['rows']} {_in_line(split)} rows)")
    return "; ".join(said)


def _in_line(text: str) -> str:
    """Without line breaks: what others wrote must not look like a line of ours."""
    return " ".join(text.split())


def lines_of(value: dict[str, Any], indent: str = "") -> list[str]:
    lines = []
    for key, entry in islice(value.items(), _MAX_LINES):
        if isinstance(entry, dict):
            lines += [f"{indent}{key}:", *lines_of(entry, indent + "  ")]
        elif isinstance(entry, list) and len(entry) > _MAX_LINES:
            lines.append(f"{indent}{key}: {some(entry, _MAX_LINES)} {_MORE}")
        else:
            lines.append(f"{indent}{key}: {f'{entry:.4g}' if isinstance(entry, float) else entry}")
    return lines + [indent + line for line in _more(len(value) - _MAX_LINES)]
