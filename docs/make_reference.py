"""Write docs/reference/cli.md from the verbs' --help and the end of docs/reference/python.md from the docstrings.

With --check it says whether they are up to date.
"""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

REFERENCE = Path(__file__).parent / "reference"
LIBRARY = Path(__file__).parents[1] / "lorasb_export"

VERBS = "init calibrate fit evaluate generate merge export push serve inspect quickstart".split()
CLI = """# Command line

Generated from `--help` by `make docs`; do not edit. Every verb prints its result on stdout and everything else on
stderr, and exits with 0 (done), 1 (an expected failure, explained in one line), 2 (wrong usage), 130 or 143
(interrupted by Ctrl-C or SIGTERM; `torchrun` itself then exits with 1), or 141 (nobody reads its output any longer).
Paths written in `lorasb.toml` are relative to that file, paths on the command line to the current folder.

With `--json` the result is one object. (`serve` prints it on one line once the server answers; if the server fails
later, the error is a second line.) What was written is under `out`. A verb that does several things has an entry
for each of them, by name under `adapters` (`fit`), `evaluation` (`recorded` says whether they are in its card now) or
`exported` (`export` with {name} in --out), or in the list `pushed`, and those that failed under `failed`. An error is
`{"error": {"type", "message", "what", "where", "fix"}}`; one that ends such a verb stands beside what was done before.
"""

MARK = "<!-- From here on made by `make docs` from the docstrings; do not edit. -->\n"
# Module → what of it is shown; of a class its docstring and fields, and the methods behind the colon.
SHOWN: dict[str, Sequence[str]] = {
    "calibration/calibrate.py": ["calibrate"],
    "training/fit.py": ["fit", "fit_together"],
    "evaluation/evaluate.py": ["evaluate"],
    "merging/merge.py": ["merge"],
    "merging/combine.py": ["combine_into"],
    "exporting/export.py": ["export"],
    "exporting/onnx_run.py": ["OnnxDecoder: __init__ use generate", "classify"],
    "publishing/push.py": ["push"],
    "serving/launcher.py": ["serve", "running_server"],
    "serving/server.py": ["RunningServer: wait"],
    "basis.py": ["Basis: load open save"],
    "adapter.py": ["Adapter: attach inject load load_basis save as_lora name rank labels"],
    "layers/inject.py": ["remove"],
    "layers/factors.py": ["ModuleBasis"],
    "stack.py": ["Stack: __init__ use detach"],
    "base/model.py": ["BaseModel: resolve load tokenizer ref verify"],
    "evaluation/inference.py": ["answers"],
    "inspection.py": ["inspect_folder"],
    "training/inspect.py": ["inspect_data"],
    "settings.py": ["CalibrationSettings", "FitSettings"],
    "data/source.py": ["TaskSource"],
    "data/task.py": ["load_task", "task_of", "TaskData: labels rows held_out"],
    "training/muon.py": ["Muon: __init__", "groups_of"],
}
# Module → what its signatures call other types.
TYPES = {
    "choices.py": [
        "Directions",
        "Reduction",
        "LossMean",
        "Dtype",
        "LoadedDtype",
        "Optimizer",
        "Init",
        "Schedule",
        "Metric",
        "Keep",
        "Tracker",
        "MAX_DROP",
    ],
    "base/model.py": ["AnyBase"],
    "data/source.py": ["AnySource"],
    "data/rows.py": ["Row", "Prompt"],
    "merging/combine.py": ["Weights", "Weighted"],
    "serving/launcher.py": ["Adapters"],
}
Shown = ast.FunctionDef | ast.ClassDef


def cli_page() -> str:
    parts = [CLI]
    for words in [[], *([verb] for verb in VERBS)]:
        text = subprocess.run(
            [sys.executable, "-m", "lorasb_cli", *words, "--help"],
            env={**os.environ, "COLUMNS": "110", "TERMINAL_WIDTH": "110", "NO_COLOR": "1"},
            capture_output=True,
            text=True,
            check=True,
        ).stdout.replace("python -m lorasb_cli", "lorasb")
        lines = "\n".join(line.rstrip() for line in text.strip().splitlines())
        parts.append(f"## {' '.join(['lorasb', *words])}\n\n```text\n{lines}\n```\n")
    return "\n".join(parts)


def python_page() -> str:
    """What is written by hand, then every signature with its docstring, as they stand in the source."""
    written, _, _ = (REFERENCE / "python.md").read_text(encoding="utf-8").partition(MARK)
    parts = [written + MARK]
    for path, names in SHOWN.items():
        source = (LIBRARY / path).read_text(encoding="utf-8")
        found = {node.name: node for node in ast.parse(source).body if isinstance(node, Shown)}
        for entry in names:
            name, _, methods = entry.partition(":")
            lines = "\n".join(_lines(source.splitlines(), found[name], methods.split()))
            parts.append(f"## {name}\n\n```python\nfrom lorasb_export import {name}\n\n\n{lines}\n```\n")
    parts += ["## Types\n\n```python", *_types(), "```\n"]
    parts += ["## Errors\n\nIn `lorasb_export.errors`.\n\n| | is also a | |\n|---|---|---|", *_errors(), ""]
    return "\n".join(parts)


def _module(path: str) -> str:
    return "lorasb_export." + path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def _types() -> Iterator[str]:
    for path, names in TYPES.items():
        yield f"# {_module(path)}"
        for line in (LIBRARY / path).read_text(encoding="utf-8").splitlines():
            if line.partition(" = ")[0] in names:
                yield line


def _errors() -> Iterator[str]:
    for node in ast.parse((LIBRARY / "errors.py").read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef) and node.bases:  # what is without is no error
            bases = ", ".join(f"`{ast.unparse(base)}`" for base in node.bases)
            says = (ast.get_docstring(node) or "").splitlines()[0]
            yield f"| `{node.name}` | {bases} | {says} |"


def _lines(source: Sequence[str], node: Shown, methods: Sequence[str]) -> Iterator[str]:
    """The lines of a definition without its body: decorators, signature and docstring, fields, chosen methods."""
    first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
    end = node.body[0].end_lineno if ast.get_docstring(node) else node.body[0].lineno - 1
    yield from source[first - 1 : end]
    if isinstance(node, ast.FunctionDef):
        return
    fields = [part for part in node.body if isinstance(part, ast.AnnAssign)]
    if fields:
        yield ""
    for part in fields:
        yield from source[part.lineno - 1 : part.end_lineno]
    inside = {part.name: part for part in node.body if isinstance(part, ast.FunctionDef)}
    for name in methods:
        yield ""
        yield from _lines(source, inside[name], ())


PAGES = {"cli.md": cli_page, "python.md": python_page}

if __name__ == "__main__":
    for name, page in PAGES.items():
        path, text = REFERENCE / name, page()
        if "--check" not in sys.argv:
            path.write_text(text, encoding="utf-8")
        elif path.read_text(encoding="utf-8") != text:
            sys.exit(f"docs/reference/{name} is out of date: run make docs")
