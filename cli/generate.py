"""`lorasb generate`: answers of the base and of adapters side by side."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lorasb_export.choices import LoadedDtype
from lorasb_export.errors import LoraSBError, some

from .verb import Run
from .words import given, listed, spelled_out

if TYPE_CHECKING:
    from lorasb_export.data.rows import Prompt, Row

SAVES_MEMORY = ("a smaller --batch-size", "--dtype bfloat16")


def run(
    run: Run,
    prompt: Annotated[str | None, typer.Argument(metavar="PROMPT", help="What to ask.", show_default=False)] = None,
    prompts: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Ask each row of a file: JSON lines or CSV, of `prompt` or `messages`."),
    ] = None,
    system: Annotated[
        str | None, typer.Option(metavar="TEXT", help="System message, for prompts that have none of their own.")
    ] = None,
    adapters: Annotated[
        str | None,
        typer.Option(
            metavar="A,B,…|@FILE",
            help="Names, patterns, folders or Hub ids, or a file with one a line; all by default, if there are 32 "
            "or fewer.",
        ),
    ] = None,
    model: Annotated[str | None, typer.Option(help="Base model; without --adapters it is asked alone.")] = None,
    onnx: Annotated[
        str | None, typer.Option(metavar="DIR", help="Ask an ONNX export instead, by ONNX Runtime.")
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 128,
    dtype: Annotated[
        LoadedDtype, typer.Option(help="Data type of the model; auto: the checkpoint's; nf4: four bits.")
    ] = "auto",
    batch_size: Annotated[
        int | None,
        typer.Option(min=1, help="Prompts at once, 16 by default; fewer need less memory."),
    ] = None,
    out: Annotated[
        str | None, typer.Option(metavar="FILE", help="Write the answers as JSON lines, in place of printing them.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file of --out.")] = False,
) -> None:
    """Ask the base and the adapters the same thing. No server is needed."""
    if overwrite and out is None:
        raise typer.BadParameter("--overwrite is for the file of --out")
    if onnx is not None and (model is not None or dtype != "auto"):
        raise typer.BadParameter("--onnx goes without --model and --dtype: the folder has its own")
    if onnx is not None and batch_size is not None:
        raise typer.BadParameter("--onnx goes without --batch-size")
    chosen = None if adapters is None else listed(adapters)
    if chosen is not None and not chosen:
        raise typer.BadParameter("--adapters names none: leave it out, or give a name")
    from lorasb_export.data.rows import with_system
    from lorasb_export.evaluation.prompt_file import answered, answers_file, read_prompts
    from lorasb_export.files.storage import expanded

    rows: list[Row]
    asked: list[Prompt]
    if prompt is not None and prompts is None:
        rows, asked, unit = [{"prompt": prompt}], [prompt], "prompt"
    elif prompt is None and prompts is not None:
        rows, asked = read_prompts(expanded(prompts))
        unit = f"{prompts}: row"
    else:
        raise typer.BadParameter("give a PROMPT, or --prompts FILE, and not both")
    if system is not None:
        asked = [with_system(one, system) for one in asked]
    options: dict[str, Any] = {"max_tokens": max_tokens, "unit": unit}
    failed: dict[str, LoraSBError] = {}
    with nullcontext() if out is None else answers_file(out, overwrite=overwrite, prompts=prompts) as write:
        if onnx is not None:
            from lorasb_export.exporting.onnx_ask import ask_onnx
            from lorasb_export.exporting.onnx_record import read_record

            if chosen is not None:
                chosen = spelled_out(chosen, lambda: read_record(expanded(onnx)).get("adapters", ()))
            found = ask_onnx(expanded(onnx), asked, chosen, **options)
        else:
            options |= {"dtype": dtype, **given(batch_size=batch_size)}
            found, failed = _ask(run, asked, chosen, model, **options)
        lines = answered(rows, found)
        if write is not None:
            write(lines)
    names = list(found)
    if out is not None:
        value = {"out": out, "rows": len(rows), "names": names}
        run.result(value, f"Wrote {out}: {len(rows)} rows, answered by {some(names)}", failed)
    elif prompts is not None:
        run.result({"answered": lines}, "\n\n".join(map(_block, lines, asked)), failed)
    else:
        answers = lines[0]["answers"]
        run.result({"prompt": prompt, "answers": answers}, _said(answers), failed)


def _ask(
    run: Run, asked: Sequence[Prompt], adapters: list[str] | None, model: str | None, **options: Any
) -> tuple[dict[str, list[str]], dict[str, LoraSBError]]:
    """Of the base and of the adapters that are named, else of the project's; and the errors of those of its that are
    damaged."""
    from lorasb_export.names import ours_in

    failed: dict[str, LoraSBError] = {}
    if adapters is not None:
        chosen = spelled_out(adapters, partial(ours_in, run.project.adapters_folder))
    elif model:
        chosen = []
    else:
        from lorasb_export.project.generate import adapters_to_ask

        chosen, classifiers = adapters_to_ask(run.project)
        for name in classifiers:
            run.say(f"{name} is passed over: it is a classifier, which answers nothing")
        options["failed"] = failed
    folders = {name: run.project.find_adapter(name) for name in chosen}
    from lorasb_export.evaluation.side_by_side import ask_adapters  # only now: it brings torch
    from lorasb_export.project.base import find_base

    base = find_base(run.project, model, *folders.values()) if folders else model or run.project.require_model()

    return ask_adapters(asked, folders, base=base, **options), failed


def _block(line: dict[str, Any], asked: Prompt) -> str:
    """A row's number and question, of a chat its last turn, and the answers."""
    turns = asked["messages"] if isinstance(asked, dict) else asked
    question = turns if isinstance(turns, str) else turns[-1].get("content") or ""
    return f"{line['number']}. {question}\n{_said(line['answers'])}"


def _said(answers: dict[str, str]) -> str:
    return "\n".join(f"[{name}] {answer}" for name, answer in answers.items())
