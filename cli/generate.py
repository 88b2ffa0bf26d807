"""`lorasb generate`: answers of the base and of adapters side by side."""

from __future__ import annotations

from typing import Annotated

import typer

from lorasb_export.choices import CAUSAL_LM, LoadedDtype

from .verb import Run, listed

SAVES_MEMORY = ("--dtype bfloat16",)


def run(
    run: Run,
    prompt: Annotated[str, typer.Argument(help="What to ask.")],
    adapters: Annotated[
        str | None,
        typer.Option(
            metavar="A,B,…|@FILE",
            help="Names, folders or Hub ids, or a file with one a line; all by default, where there are at most 32.",
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
) -> None:
    """Ask the base and the adapters the same thing. No server is needed."""
    chosen = None if adapters is None else listed(adapters)
    if onnx is not None:
        if model is not None or dtype != "auto":
            raise typer.BadParameter("--onnx goes without --model and --dtype: the folder has its own")
        from lorasb_export.side_by_side import ask_onnx
        from lorasb_export.storage import expanded

        _print(run, prompt, ask_onnx(expanded(onnx), prompt, chosen, max_tokens=max_tokens))
        return
    if chosen is None:
        from lorasb_export.names import refuse_many

        names = [] if model else run.project.adapter_names()
        refuse_many(names, run.project.folder)
        chosen = [name for name in names if _answers(run, name)]
    folders = {name: run.project.find_adapter(name) for name in chosen}
    first = next(iter(folders.values()), None)
    base = run.project.base_elsewhere(model, first) if first else model or run.project.require_model()
    from lorasb_export.side_by_side import ask_adapters  # only now: it brings torch

    found = ask_adapters(prompt, folders, base=base, max_tokens=max_tokens, dtype=dtype)
    _print(run, prompt, found)


def _answers(run: Run, name: str) -> bool:
    """Whether an adapter of the project generates; of one that does not it is said."""
    from lorasb_export.format import read_adapter_config

    if read_adapter_config(run.project.adapter_folder(name))["task_type"] == CAUSAL_LM:
        return True
    run.say(f"{name} is passed over: it is a classifier, which answers nothing")
    return False


def _print(run: Run, prompt: str, found: dict[str, str]) -> None:
    run.result({"prompt": prompt, "answers": found}, "\n".join(f"[{name}] {answer}" for name, answer in found.items()))
