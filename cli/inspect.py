"""`lorasb inspect`: what is this folder, or what does this project have?"""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import typer

from .verb import Run, human_bytes, score

_MAX_LINES = 40  # lines of one part, as there may be of adapters or modules


def run(
    run: Run,
    path: Annotated[
        str | None,
        typer.Argument(help="Any folder, an adapter of the project by name, or a Hub id. Default: the project itself."),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(metavar="TASK|PATH", help="For a basis: measure how much of this task's gradient it captures."),
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Base model for --data, if it has moved since the basis was made.")
    ] = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="Compare every file with SHA256SUMS, which a push publishes beside them.")
    ] = False,
) -> None:
    """Say what a folder is, or what a project has. Kind, rank, modules, sizes, hashes, spectrum, basis match."""
    if path is None and (data is not None or verify):
        raise typer.BadParameter(f"{'--verify' if verify else '--data'} is for one folder: name it")
    if model is not None and data is None:
        raise typer.BadParameter("--model is for --data: nothing else loads the base")
    if path is None:
        from lorasb_export.project_inspect import inspect_project

        project = inspect_project(run.project)
        run.result(project, "\n".join(_project_lines(project)))
        return
    folder = run.project.find_folder(path)
    if data is not None and data in run.project.tasks and Path(data).exists():
        run.say(f"{data} is taken for the task: ./{data} names the path")
    source = None
    if data is not None:
        source = run.project.task_source(data) if data in run.project.tasks else run.project.other_source("", data)
    from lorasb_export.inspection import inspect_folder  # only now: it brings torch

    found = inspect_folder(folder, data=source, base=model, verify=verify)
    shown = {**found, **({"bytes": human_bytes(found["bytes"])} if "bytes" in found else {})}
    if data is not None:
        from lorasb_export.calibration.capture import one_line

        shown["capture"] = f"{one_line(found['capture'])}; --json lists every module"
    run.result(found, "\n".join(_repository_lines(found) if found["kind"] == "project" else _lines(shown)))


def _repository_lines(found: dict[str, Any]) -> list[str]:
    """Of a project's repository: a line for each basis and each adapter."""
    width = min(50, max(map(len, found["parts"]), default=0))
    lines = [f"path: {found['path']}", "kind: project", f"base model: {_in_line(found['base_model'] or 'not named')}"]
    for part, about in found["parts"].items():
        rank = f"rank {about['rank']}, " if "rank" in about else ""
        said = f"{rank}sha256 {about['sha256'][:12]}  {_scores(about.get('evaluation', {}))}"
        lines.append(f"{_in_line(part):{width}}  {_in_line(said)}".rstrip())
    if "verified" in found:
        lines.append(f"verified: {found['verified']['files']} files against {found['verified']['against']}")
    return lines


def _project_lines(found: dict[str, Any]) -> list[str]:
    """The basis, and a line for every adapter; of what it was scored on, the test rows if any."""
    names = {name: _in_line(name) for name in found["adapters"]}
    width = min(40, max([len("adapter"), *map(len, names.values())]))
    lines = [f"base model: {found['base_model'] or 'not named'}", f"basis: {_basis_line(found['basis'])}"]
    if names:
        lines.append(f"{'adapter':{width}} {'state':10} {'basis':8} {'valid loss':>10}  scored")
    for name, adapter in found["adapters"].items():
        said = f"{names[name]:{width}} {adapter['state'].replace('_', ' '):10}"
        if "problem" in adapter:
            said += f" {_in_line(adapter['problem'])}"
        elif adapter["state"] == "fitted":
            loss = score("loss", adapter["valid_loss"])
            said += f" {adapter['basis']:8} {loss:>10}  {_scores(adapter['evaluation'])}"
        if not adapter["task"]:
            said += "  (of no task)"
        lines.append(said.rstrip())
    more = "interrupted or still going; the same command with --resume goes on"
    return lines + [f"unfinished run: {_in_line(path)} ({more})" for path in found["unfinished"]]


def _basis_line(basis: dict[str, Any]) -> str:
    if basis["state"] == "missing":
        return f"none at {basis['path']}"
    if basis["state"] == "damaged":
        return f"damaged: {_in_line(basis['problem'])}"
    return f"{basis['path']}, rank {basis['rank']}, {basis['modules']} modules, sha256 {basis['sha256'][:12]}"


def _scores(evaluation: dict[str, Any]) -> str:
    split = "test" if "test" in evaluation else next(iter(evaluation), "")
    said = []
    for metric, figures in evaluation.get(split, {}).items():
        base, after = (score(metric, figures[which]) for which in ("base", "adapter"))
        said.append(f"{_in_line(metric)} {after} (base {base}, {figures['rows']} {_in_line(split)} rows)")
    return "; ".join(said)


def _in_line(text: str) -> str:
    """Without line breaks: what others wrote must not look like a line of ours."""
    return " ".join(text.split())


def _lines(value: dict[str, Any], indent: str = "") -> list[str]:
    lines = []
    for key, entry in islice(value.items(), _MAX_LINES):
        if isinstance(entry, dict):
            lines += [f"{indent}{key}:", *_lines(entry, indent + "  ")]
        else:
            lines.append(f"{indent}{key}: {f'{entry:.4g}' if isinstance(entry, float) else entry}")
    if len(value) > _MAX_LINES:
        lines.append(f"{indent}… and {len(value) - _MAX_LINES:,} more (--json lists all)")
    return lines
