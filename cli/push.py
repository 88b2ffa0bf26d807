"""`lorasb push`: a folder → the Hub."""

from __future__ import annotations

from typing import Annotated

import typer

from .verb import Run, human_bytes


def run(
    run: Run,
    folder: Annotated[
        str | None,
        typer.Argument(help="Basis, adapter, merged, PEFT or ONNX folder; the project's adapter by default."),
    ] = None,
    repo: Annotated[str | None, typer.Option(metavar="OWNER/NAME", help="Where to; [hub] repo by default.")] = None,
    public: Annotated[bool, typer.Option("--public", help="Make the repository public; private otherwise.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch to commit to.")] = None,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Open a pull request instead.")] = False,
    message: Annotated[str | None, typer.Option(help="Commit message.")] = None,
    basis_repo: Annotated[
        str | None, typer.Option(metavar="OWNER/NAME", help="Name the basis there instead of taking it along.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print files and card, send nothing.")] = False,
) -> None:
    """Upload a folder to the Hub, with its card."""
    from lorasb_export.errors import SettingsError
    from lorasb_export.hub import push

    target = repo or run.project.repo
    if target is None:
        raise SettingsError("no repository", fix='Pass --repo owner/name, or set [hub] repo = "…" in lorasb.toml')
    result = push(
        run.project.find_folder(folder),
        target,
        public=public or run.project.public,
        revision=revision,
        create_pr=create_pr,
        message=message,
        basis_repo=basis_repo,
        dry_run=dry_run,
    )
    done = "Would push" if dry_run else "Pushed" if result["changed"] else "Already there:"
    text = f"{done} {len(result['files'])} files, {human_bytes(result['bytes'])}, to {result['url']}"
    run.result(result, text)
