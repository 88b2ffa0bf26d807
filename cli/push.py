"""`lorasb push`: a folder, or the basis and adapters of a project → the Hub."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from lorasb_export.errors import LoraSBError, SettingsError
from lorasb_export.files.kind import ADAPTER_WEIGHTS

from .verb import Run
from .words import human_bytes

INTERRUPTED = "What was not finished is not published; the same command again sends what is missing."
_SHOWN = 10  # of the files that are skipped, or replaced; --json lists all


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
        for _, outcome in run.done_of(pushed, value, lambda: _text(results, dry_run), failed):
            results.append(outcome)
    run.result(value, _text(results, dry_run), failed)


def _text(results: list[dict[str, Any]], dry_run: bool) -> str:
    """Of a dry run the cards' changes, which may be long, come before what happens to the files."""
    if not dry_run:
        return "\n".join(map(_done, results))
    cards = [f"Card of {plan['repo']}:\n{plan['card_diff']}\n" for plan in results if plan["card_diff"]]
    return "\n".join([*cards, *map(_plan, results)])


def _done(result: dict[str, Any]) -> str:
    done = "Pushed" if result["changed"] else "Already there:"
    text = f"{done} {len(result['files'])} files, {human_bytes(result['bytes'])}, to {result['url']}"
    return "\n".join([text, *_lines("replaced", _replaced(result)), *_skipped(result)])


def _replaced(result: dict[str, Any]) -> list[str]:
    """The adapters that were there with other weights: from a clone a push puts back what others have renewed since."""
    changed = [file["path"] for file in result["files"] if file["change"] == "changed"]
    return [path for path in changed if path.rpartition("/")[2] == ADAPTER_WEIGHTS]


def _skipped(result: dict[str, Any]) -> list[str]:
    """Hidden files come last, for a clone has hundreds under `.git`."""
    return _lines("skipped", sorted(result["skipped"], key=lambda path: path.startswith(".")))


def _lines(what: str, paths: list[str]) -> list[str]:
    """A line for each of the first few."""
    more = [f"{len(paths) - _SHOWN} more"] if len(paths) > _SHOWN else []
    return [f"  {what:8} {path}" for path in [*paths[:_SHOWN], *more]]


def _plan(plan: dict[str, Any]) -> str:
    """Every file with what happens to it, and the commit."""
    lines = [f"Would push to {plan['url']} ({'private' if plan['private'] else 'public'})"]
    if not plan["reached"]:
        lines.append("The Hub cannot be reached: what it holds already is not known")
    lines += [f"  {file['change']:8} {file['path']}  {human_bytes(file['bytes'])}" for file in plan["files"]]
    lines += [f"  deleted  {path}" for path in plan["deleted"]]
    lines += _skipped(plan)
    changes = plan["sent"] or plan["deleted"]
    on_top = f"on top of {plan['parent'][:12]}" if plan["parent"] else "the first"
    commit = f"{plan['message']!r}, {on_top}, {human_bytes(plan['sent'])}" if changes else "none: nothing changes"
    parts = f", in {plan['commits']} commits" if plan.get("commits", 1) > 1 else ""
    return "\n".join([*lines, f"Commit: {commit}{parts}"])
