"""`lorasb push`: a folder, or the basis and adapters of a project → the Hub."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from lorasb_export.errors import LoraSBError, SettingsError

from .push_text import text_of
from .verb import Run

INTERRUPTED = "What was not finished is not published; the same command again sends what is missing."


def run(
    run: Run,
    folder: Annotated[
        str | None,
        typer.Argument(
            help="Basis, adapter, merged, PEFT or ONNX folder, or an adapter's name. Default: the project's basis and "
            "all its adapters."
        ),
    ] = None,
    repo: Annotated[
        str | None,
        typer.Option(
            metavar="OWNER/NAME",
            help="Where to; [hub] repo by default. {name} in it stands for the adapter's name, or basis: one for each.",
        ),
    ] = None,
    public: Annotated[
        bool | None,
        typer.Option(
            "--public/--private",
            help="Make a new repository public.  [default: private, or [hub] public]",
            show_default=False,
        ),
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Branch to commit to.")] = None,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Open a pull request instead.")] = False,
    message: Annotated[str | None, typer.Option("--commit-message", help="Commit message.")] = None,
    basis_repo: Annotated[str | None, typer.Option(metavar="OWNER/NAME", help="Where the adapter's basis is.")] = None,
    with_basis: Annotated[
        bool, typer.Option("--with-basis", help="Upload the basis inside the adapter's repository.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print files, commit and the card's changes; send nothing.")
    ] = False,
) -> None:
    """Upload a folder to the Hub, with its card. In a project: the basis and every adapter that changed."""
    project, target = run.project, repo or run.project.repo
    if target is None:
        fix = 'Pass --repo owner/name, or set [hub] repo = "owner/name" in lorasb.toml'
        raise SettingsError("no repository", fix=fix)
    found = None if folder is None else project.find_folder(folder)
    from lorasb_export.names import PLACE

    to_project = found is None or (repo is None and PLACE not in target)  # not to a repository of the folder's own
    if basis_repo and to_project:
        raise typer.BadParameter("--basis-repo is for one adapter in a repository of its own: name both, with --repo")
    from lorasb_export.project.push import push_folder, push_project  # only now: it brings torch

    options: dict[str, Any] = {
        "public": project.public if public is None else public,
        "revision": revision,
        "create_pr": create_pr,
        "message": message,
        "dry_run": dry_run,
    }
    results: list[dict[str, Any]] = []
    failed: dict[str, LoraSBError] = {}
    value = {"pushed": results}
    if found is not None and not to_project:
        results.append(push_folder(project, found, target, with_basis=with_basis, basis_repo=basis_repo, **options))
    else:
        pushed = push_project(project, target, only=found, with_basis=with_basis, **options)
        for _, outcome in run.done_of(pushed, value, lambda: text_of(results, dry_run=dry_run), failed):
            results.append(outcome)
    run.result(value, text_of(results, dry_run=dry_run), failed)
