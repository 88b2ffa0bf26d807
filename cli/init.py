"""`lorasb init`: a commented lorasb.toml."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from lorasb_export.errors import some

from .verb import Run
from .words import parse_pairs

MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"


def run(
    run: Run,
    model: Annotated[str | None, typer.Option(help=f"Base model: a folder or a Hub id.  [default: {MODEL}]")] = None,
    task: Annotated[
        list[str] | None, typer.Option(metavar="NAME=DATA", help="A task and its data; repeatable.")
    ] = None,
    tasks_dir: Annotated[
        str | None,
        typer.Option(
            "--tasks-dir",
            metavar="DIR",
            help="Make a task of each folder in DIR with a train split, and of each .jsonl or .csv file.",
        ),
    ] = None,
    as_published: Annotated[
        bool,
        typer.Option(
            "--as-published",
            help="Train as the paper does: each task in its own basis, on all linear layers, by AdamW.",
        ),
    ] = False,
    add: Annotated[
        bool, typer.Option("--add", help="Append missing tasks to an existing file; leave the rest unchanged.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing file.")] = False,
) -> None:
    """Write a commented lorasb.toml into the current folder."""
    from lorasb_export.project.init import tasks_in, write_project

    named = parse_pairs("--task", "NAME=DATA", task)
    found = tasks_in(tasks_dir) if tasks_dir else {}
    if add:
        if not (named or found):
            raise typer.BadParameter("--add: name what to add with --task or --tasks-dir")
        if model or as_published or overwrite:
            raise typer.BadParameter("--add leaves all else in the file as it is: give --task and --tasks-dir alone")
        _add(run, named, found)
        return
    folder = os.path.realpath(os.path.dirname(os.path.expanduser(run.config or "")) or os.curdir)
    tasks = {name: _from(folder, data) for name, data in ((found | named) or {"a": "data/a"}).items()}
    model = _from(folder, model or MODEL)
    path = write_project(run.config, model, tasks, as_published=as_published, overwrite=overwrite)
    missing = [data for data in tasks.values() if not (path.parent / os.path.expanduser(data)).exists()]
    if missing:
        are, each = ("is", "it") if len(missing) == 1 else ("are", "each")
        run.say(f"{some(missing)} {are} not there yet: put train.jsonl into {each}, unless it is a dataset on the Hub")
    if len(missing) == len(tasks) and not as_published:
        run.say('[basis] is set for text. If the rows have labels, write rank = 64 and targets = "all-linear" there')
    run.result({"out": str(path)}, f"Wrote {path}. Next: lorasb fit (it makes the basis first)")


def _add(run: Run, named: dict[str, str], found: dict[str, str]) -> None:
    """Add the tasks named, and those found whose data no task has yet."""
    from lorasb_export.hub.ids import may_be_dataset
    from lorasb_export.project.init import add_tasks

    project = run.project
    places = {os.path.realpath(project.path(task.data)) for task in project.tasks.values()}
    new = {name: data for name, data in found.items() if os.path.realpath(os.path.expanduser(data)) not in places}
    tasks = {name: _from(str(project.folder), data) for name, data in (new | named).items()}
    added = add_tasks(project, tasks)
    if kept := [name for name in tasks if name not in added]:
        run.say(f"{some(kept)}: there already, and left as the file has it")
    of_all = tasks | {name: task.data for name, task in project.tasks.items()}
    missing = [name for name, data in of_all.items() if not project.path(data).exists()]
    gone = [name for name in missing if not may_be_dataset(of_all[name], project.folder)]
    if gone:
        run.say(f"The data of {some(gone)} is not there: put it there, or take their tables out")
    told = f"Added {some(added)} to {project.file}. Next: lorasb fit --resume" if added else "There is nothing to add"
    run.result({"out": str(project.file), "added": added, "kept": kept, "gone": gone}, told)


def _from(folder: str, path: str) -> str:
    """A path as it is written in a file that lies in `folder`: ours are relative to the current folder."""
    if folder == os.path.realpath(os.curdir) or os.path.isabs(os.path.expanduser(path)) or not os.path.exists(path):
        return path
    return os.path.relpath(os.path.realpath(path), folder)
