"""What `lorasb push` sent, or would send, as lines for people."""

from __future__ import annotations

from typing import Any

from lorasb_export.files.kind import ADAPTER_WEIGHTS

from .words import human_bytes

_SHOWN = 10  # of the files that are skipped, or replaced; --json lists all


def text_of(results: list[dict[str, Any]], *, dry_run: bool) -> str:
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
