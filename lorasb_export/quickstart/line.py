"""The whole line: two tasks, one basis, two adapters; merged, exported, served, and compared row by row."""

from __future__ import annotations

import gc
import importlib.util
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..base.model import BaseModel
from ..calibration.calibrate import calibrate
from ..data.task import TaskData, load_task
from ..environment import require_packages
from ..errors import ServerError, first_line
from ..evaluation.evaluate import evaluate
from ..evaluation.inference import answers, question_of
from ..evaluation.metrics import exact_match
from ..evaluation.record import record_evaluation
from ..exporting.onnx import export_onnx
from ..exporting.onnx_ask import ask_onnx
from ..exporting.onnx_exporter import PRECISIONS, check_request
from ..exporting.peft import export_peft
from ..files.atomic import atomic_folder
from ..files.kind import RECORD
from ..files.storage import expanded, folder_bytes, write_json
from ..merging.merge import merge
from ..project.init import TEXT_DEFAULTS, write_project
from ..project.project import Project
from ..provenance import versions
from ..serving.launcher import running_server
from ..serving.shared import runs_on_cpu
from ..settings import CalibrationSettings, FitSettings
from ..training.fit import fit
from .model import small_model
from .tasks import write_tasks

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

COLUMNS = ("base", "adapter", "merged", "peft", "onnx", "served")
# What the last lines tell people to try in the project's folder.
NEXT = (
    "lorasb inspect adapters/dates",
    "lorasb generate 'Date: 3rd of May 2031'",
    "lorasb serve --adapters dates,orders",
)
PUSH = "lorasb push adapters/dates --repo you/dates-lorasb --with-basis"
_STEPS = 10
_MERGED = "dates"
_DTYPE = "float32"  # all ways are compared row by row: no rounding may come between them


class _Line:
    """What the steps share: the tasks' held-out rows, the answers of each way, the seconds of each step."""

    def __init__(self, tasks: Mapping[str, TaskData], say: Callable[[str], None]) -> None:
        self.tasks = tasks
        self.say = say
        self.answers: dict[str, dict[str, list[str]]] = {name: {} for name in tasks}
        self.seconds: dict[str, float] = {}
        self.count = 1  # getting the model was the first step

    @contextmanager
    def step(self, name: str, words: str) -> Iterator[None]:
        self.count += 1
        self.say(f"[{self.count}/{_STEPS}] {words} …")
        started = time.monotonic()
        yield
        self.seconds[name] = round(time.monotonic() - started, 1)

    def prompts(self, task: str) -> list[str]:
        return [row["prompt"] for row in self.tasks[task].rows("test")]

    def expected(self, task: str) -> list[str]:
        return [row["completion"] for row in self.tasks[task].rows("test")]

    def limit(self, task: str, tokenizer: PreTrainedTokenizerBase) -> int:
        return max(question_of(tokenizer, row, "a row", ()).max_tokens for row in self.tasks[task].rows("test"))

    def ask(self, way: str, task: str, network: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        limit = self.limit(task, tokenizer)
        self.answers[task][way] = answers(network, tokenizer, self.prompts(task), max_tokens=limit)

    def scores(self) -> dict[str, dict[str, float | None]]:
        return {
            name: {
                way: round(exact_match(found[way], self.expected(name)), 4) if way in found else None for way in COLUMNS
            }
            for name, found in self.answers.items()
        }

    def disagreements(self) -> list[str]:
        """Rows on which another way answers otherwise than the adapter in torch."""
        return [
            f"{name} row {number}: {way} says {other!r}, the adapter {ours!r}"
            for name, found in self.answers.items()
            for way in COLUMNS[2:]
            for number, (ours, other) in enumerate(zip(found["adapter"], found.get(way, found["adapter"]), strict=True))
            if ours.strip() != other.strip()
        ]


def quickstart(
    out: str | Path, *, serve: bool, overwrite: bool, say: Callable[[str], None]
) -> tuple[dict[str, Any], str]:
    """Run the whole line in the new project folder `out`.

    Returns:
        a result (`base_model`, `basis`, `adapters`, `merged`, `merged_adapter`, `peft`, `onnx`, `exact_match`,
        `disagreements`, `seconds`) and the same as text for people.

    Raises:
        OutputError: `out` exists.
        MissingPackageError: PEFT, which the comparison needs, or a package for ONNX is not installed.
        SettingsError, ServerError: the small model cannot be had, see `small_model`; or the server does not answer.
    """
    require_packages("peft")
    check_request("fp32", PRECISIONS)
    out = expanded(out).absolute()
    started = time.monotonic()
    say(f"[1/{_STEPS}] Getting SmolLM2-135M-Instruct …")
    base = BaseModel.resolve(small_model())
    # Only the project: the steps below write into it.
    with atomic_folder(out, overwrite=overwrite, kind="quickstart") as temporary:
        data = write_tasks(temporary / "data")
        write_json(temporary / RECORD, {"kind": "quickstart", "versions": versions()})
        write_project(
            temporary / "lorasb.toml",
            base.name_or_path,
            {name: f"data/{name}" for name in data},
            basis={**TEXT_DEFAULTS, "samples": 16},
            fit={"epochs": 1, "batch_size": 4},
        )
    tasks = {name: load_task(name, out / "data" / name) for name in data}
    project = Project.load(out / "lorasb.toml")
    line = _Line(tasks, say)
    line.seconds["model"] = round(time.monotonic() - started, 1)

    network, tokenizer = base.load(dtype=_DTYPE), base.tokenizer
    fitting = FitSettings(**{**project.fit, "dtype": _DTYPE})
    folders = {name: project.adapter_folder(name) for name in tasks}
    with line.step("calibrate", "Calibrating one basis on both tasks"):
        settings = CalibrationSettings(**{**project.calibration, "dtype": _DTYPE})
        calibrate(base, tasks, settings, network=network).save(out / "basis")
    for name in tasks:
        with line.step(f"fit_{name}", f"Fitting {name}"):
            fitted = fit(base, out / "basis", tasks[name], folders[name], fitting, network=network)
        with line.step(f"evaluate_{name}", f"Asking the base and the adapter {name}"):
            options: dict[str, Any] = {"split": "test", "predictions": True, "network": network}
            found = evaluate(fitted, tasks[name], base=base, **options)
        for way in ("base", "adapter"):
            line.answers[name][way] = [row[way] for row in found["predictions"]]
        record_evaluation(fitted, found)
    adapter = folders[_MERGED]
    with line.step("merge", f"Merging {_MERGED}"):
        merge(adapter, out / "model", dtype=_DTYPE)
        line.ask("merged", _MERGED, BaseModel.resolve(out / "model").load(dtype=_DTYPE), tokenizer)
    with line.step("peft", f"Exporting {_MERGED} to PEFT"):
        export_peft(adapter, out / "peft")
        from peft import PeftModel  # only now: it takes seconds

        with_peft: Any = PeftModel.from_pretrained(network, str(out / "peft"), torch_device=str(network.device))
        line.ask("peft", _MERGED, with_peft.eval(), tokenizer)
    del network, with_peft, options  # all that holds the base, for a GPU's memory
    with line.step("onnx", f"Exporting {_MERGED} to ONNX"):
        export_onnx(adapter, out / "onnx", verify=False)  # its answers are compared below
        limit = line.limit(_MERGED, tokenizer)
        (line.answers[_MERGED]["onnx"],) = ask_onnx(out / "onnx", line.prompts(_MERGED), max_tokens=limit).values()
    if serve and importlib.util.find_spec("vllm") is not None:
        rounding = "" if runs_on_cpu() else ", in 16 bits: on some rows rounding may change its answer"
        with line.step("serve", f"Starting vLLM with both adapters and asking it{rounding}"):
            _ask_server(line, folders, tokenizer)
    else:
        say("vLLM is not installed (or --no-serve): the column 'served' stays empty")

    result = {
        "out": str(out),
        "base_model": base.name_or_path,
        "basis": str(out / "basis"),
        "adapters": {name: str(folder) for name, folder in folders.items()},
        "merged": str(out / "model"),
        "merged_adapter": _MERGED,
        "peft": str(out / "peft"),
        "onnx": str(out / "onnx"),
        "exact_match": line.scores(),
        "disagreements": line.disagreements(),
        "seconds": {**line.seconds, "total": round(time.monotonic() - started, 1)},
    }
    return result, _report(result, out, push_bytes=folder_bytes(adapter) + folder_bytes(out / "basis"))


def _serving() -> dict[str, Any]:
    """What the server is started with."""
    options: dict[str, Any] = {"dtype": _DTYPE, "extra": ["--max-model-len", "512"]}
    if not runs_on_cpu():  # where adapters are applied in 16 bits, and vLLM takes nearly all memory, or does not start
        options["dtype"] = "auto"  # vLLM knows which 16 bits this accelerator computes in
        options["extra"] += ["--gpu-memory-utilization", "0.5"]
    return options


def _ask_server(line: _Line, folders: Mapping[str, Path], tokenizer: PreTrainedTokenizerBase) -> None:
    from openai import DefaultHttpxClient, OpenAI, OpenAIError

    gc.collect()  # the networks of the steps before, in cycles
    torch.cuda.empty_cache()  # nothing where there is no GPU
    with running_server(folders, **_serving()) as server:
        key = os.environ.get("VLLM_API_KEY", "none")
        past_proxies = DefaultHttpxClient(trust_env=False)  # the server is on this machine
        client = OpenAI(base_url=f"{server.url}/v1", api_key=key, timeout=120, http_client=past_proxies)

        def ask(name: str, prompt: str, limit: int) -> str:
            reply = client.chat.completions.create(
                model=name, messages=[{"role": "user", "content": prompt}], temperature=0, max_tokens=limit
            )
            return reply.choices[0].message.content or ""

        with ThreadPoolExecutor(16) as pool:
            waiting = {}
            for name in line.tasks:
                limit = line.limit(name, tokenizer)
                waiting[name] = [pool.submit(ask, name, prompt, limit) for prompt in line.prompts(name)]
            for name, futures in waiting.items():
                try:
                    line.answers[name]["served"] = [future.result() for future in futures]
                except OpenAIError as error:
                    fix = "Start again with --overwrite; --no-serve leaves this step out"
                    raise ServerError(f"vLLM did not answer: {first_line(error)}", where=name, fix=fix) from None


def _report(result: Mapping[str, Any], out: Path, *, push_bytes: int) -> str:
    lines = ["", "Exact match on held-out rows", "  ".join(f"{word:>8}" for word in ("task", *COLUMNS))]
    for name, scores in result["exact_match"].items():
        cells = ["-" if scores[way] is None else f"{scores[way]:.0%}" for way in COLUMNS]
        lines.append("  ".join(f"{word:>8}" for word in (name, *cells)))
    disagreements: Sequence[str] = result["disagreements"]
    lines.append(f"Rows on which two ways differ: {len(disagreements)}")
    lines += disagreements[:5]
    steps = ", ".join(f"{name} {seconds:.0f}" for name, seconds in result["seconds"].items())
    lines += [
        f"Seconds: {steps}",
        "",
        f"Everything is in {out}. Look around there:",
        *([] if shutil.which("lorasb") else [f"  . {Path(sys.prefix) / 'bin' / 'activate'}"]),
        f"  cd {out}",
        *(f"  {command}" for command in NEXT),
        f"  {PUSH}   # private; {push_bytes / 1e6:.0f} MB",
        "",
        "The same on your own data:",
        "  lorasb init --model HuggingFaceTB/SmolLM2-135M-Instruct --task mine=path/to/folder-with-train.jsonl",
        "  lorasb fit",
        "  lorasb merge --out model/",
    ]
    return "\n".join(lines)
