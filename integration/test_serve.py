"""One real server on the real model: names, both endpoints, answers against merged weights, and a clean end.

The server is a child process that calls `serve`, as the command line does; a test near the end stops it.
"""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

import psutil
import pytest

from tests.random_adapter import LLAMA_MODULES, save_adapter, write_in  # first: it hides broken optional packages

import torch  # isort: skip
from openai import AuthenticationError, NotFoundError, OpenAI
from transformers import AutoModelForCausalLM, AutoTokenizer

from lorasb_export import environment
from lorasb_export.serving.plan import DRAIN_SECONDS
from lorasb_export.serving.server import SECONDS

pytest.importorskip("vllm")

from .reference import generated

TOKENS = 32
PROMPTS = [
    "The capital of France is",
    "Write one sentence about the sea.",
    "Name three colours.",
    "Why is the sky blue?",
]
PROGRAM = """
import json, sys
from lorasb_export.serving.launcher import serve
options = json.loads(sys.argv[1])
sys.exit(serve(**options, port=0, on_ready=lambda ready: print(json.dumps(ready), flush=True)))
"""


@dataclass
class Child:
    """The process that called `serve`, what it reported, and its folder for temporary files."""

    process: subprocess.Popen[str]
    ready: dict[str, Any]
    temporary: Path

    def client(self, key: str = "only-for-this-test") -> OpenAI:
        return OpenAI(base_url=f"{self.ready['url']}/v1", api_key=key, max_retries=0)


@pytest.fixture(scope="module")
def adapters(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two random adapters of all linear layers, large enough to change every answer.

    Of a base that penalizes repetition, as Qwen's instruct models do; what answers are compared with does not.
    """
    folder = tmp_path_factory.mktemp("adapters")
    base = folder / smollm2.name
    base.mkdir()
    for path in smollm2.iterdir():
        (base / path.name).symlink_to(path)
    (base / "generation_config.json").unlink()
    own = json.loads((smollm2 / "generation_config.json").read_text())
    (base / "generation_config.json").write_text(json.dumps(own | {"repetition_penalty": 1.7}))
    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    modules = [name for name, module in model.named_modules() if name.endswith("_proj")]
    for seed, name in enumerate(("one", "two")):
        save_adapter(base, model, folder / name, modules, rank=64, relative_size=0.15, seed=seed)
    return {name: folder / name for name in ("one", "two")}


@pytest.fixture(scope="module")
def child(adapters: dict[str, Path]) -> Iterator[Child]:
    with tempfile.TemporaryDirectory() as short:  # pytest's own are too long for the sockets that go there
        folder = Path(short)
        process = start(adapters, folder)
        assert process.stdout is not None
        try:
            line = process.stdout.readline()
            assert line, (folder / "log").read_text()[-5000:]
            yield Child(process, json.loads(line), folder)
        finally:
            process.send_signal(signal.SIGINT)
            process.wait(60)


def start(adapters: dict[str, Path], folder: Path) -> subprocess.Popen[str]:
    """A process that serves `adapters`, with its log and its temporary files in `folder`."""
    options = {
        "adapters": {name: str(path) for name, path in adapters.items()},
        "dtype": "float32",
        # The second is there without a key alone; here it is asked for beside the key.
        "extra": ["--max-model-len", "1024", "--middleware", "lorasb_export.serving.key.AsksForLoopback"],
    }
    variables = {"TMPDIR": str(folder), "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_API_KEY": "only-for-this-test"}
    with (folder / "log").open("w") as log:
        return subprocess.Popen(
            [sys.executable, "-c", PROGRAM, json.dumps(options)],
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env=environment.child_environment(**variables),
        )


@pytest.fixture(scope="module")
def expected(smollm2: Path, adapters: dict[str, Path]) -> dict[tuple[str, str, str], str]:
    """(model, endpoint, prompt) → the greedy answer of transformers, for adapters with their weights written in."""
    from lorasb_export.adapter import Adapter

    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    prompts = {}
    for prompt in PROMPTS:
        message = [{"role": "user", "content": prompt}]
        chat = tokenizer.apply_chat_template(message, add_generation_prompt=True, return_dict=True)
        prompts |= {("completions", prompt): tokenizer(prompt)["input_ids"], ("chat", prompt): chat["input_ids"]}
    answers = {}
    for name in (smollm2.name, *adapters):
        model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32).eval()
        if name in adapters:
            write_in(model, Adapter.load(adapters[name]))
        for key, answer in zip(prompts, generated(model, tokenizer, [*prompts.values()], TOKENS), strict=True):
            answers[name, *key] = tokenizer.decode(answer, skip_special_tokens=True)
    return answers


def ask(client: OpenAI, model: str, endpoint: str, prompt: str) -> str:
    if endpoint == "chat":
        message: Any = [{"role": "user", "content": prompt}]
        chat = client.chat.completions.create(model=model, messages=message, max_tokens=TOKENS, temperature=0)
        return chat.choices[0].message.content or ""
    return client.completions.create(model=model, prompt=prompt, max_tokens=TOKENS, temperature=0).choices[0].text


def left_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_each_adapter_is_a_model_whose_parent_is_the_base(child: Child, smollm2: Path) -> None:
    assert child.ready["models"] == [smollm2.name, "one", "two"]
    listed = {model.id: getattr(model, "parent", None) for model in child.client().models.list()}
    assert listed == {smollm2.name: None, "one": smollm2.name, "two": smollm2.name}


def test_mixed_requests_get_the_answers_of_the_merged_weights(
    child: Child, expected: dict[tuple[str, str, str], str]
) -> None:
    """Every (model, endpoint, prompt) at once, so that base and adapter rows share batches."""
    client = child.client()
    with ThreadPoolExecutor(len(expected)) as pool:
        answers = dict(zip(expected, pool.map(lambda key: ask(client, *key), expected), strict=True))
    assert answers == expected


def test_a_metric_has_one_line_and_not_one_for_every_mixture_of_adapters(child: Child) -> None:
    with urlopen(f"{child.ready['url']}/metrics", timeout=60) as response:
        assert response.read().decode().count("vllm:lora_requests_info{") == 1


def test_the_adapters_change_the_answers(expected: dict[tuple[str, str, str], str], smollm2: Path) -> None:
    for endpoint in ("chat", "completions"):
        for prompt in PROMPTS:
            assert len({expected[name, endpoint, prompt] for name in (smollm2.name, "one", "two")}) == 3


def test_an_unknown_model_is_404(child: Child) -> None:
    with pytest.raises(NotFoundError):
        ask(child.client(), "three", "chat", "Hello")


def test_the_key_from_the_environment_is_asked_for_and_on_no_command_line(child: Child) -> None:
    with pytest.raises(AuthenticationError):
        ask(child.client("another"), "one", "chat", "Hello")
    for process in psutil.Process(child.process.pid).children(recursive=True):
        assert "only-for-this-test" not in " ".join(process.cmdline())


def test_without_the_key_nothing_answers_but_health_and_metrics(child: Child) -> None:
    """Whatever paths this vLLM has, and vLLM's own check knows few of them."""

    def status(method: str, path: str, key: str = "") -> int:
        request = Request(child.ready["url"] + path, b"{}", {"Authorization": f"Bearer {key}"}, method=method.upper())
        try:
            with urlopen(request, timeout=60) as response:
                found: int = response.status
        except HTTPError as error:
            return error.code
        return found

    request = Request(child.ready["url"] + "/openapi.json", headers={"Authorization": "Bearer only-for-this-test"})
    with urlopen(request, timeout=60) as response:
        paths = {(method, path) for path, methods in json.load(response)["paths"].items() for method in methods}
    assert ("post", "/invocations") in paths
    assert {path for method, path in paths if status(method, path) != 401} == {"/health", "/metrics"}
    assert status("post", "/invocations", "only-for-this-test") == 400  # it is asked, and the request is empty


def test_what_vllm_runs_at_its_own_start_is_run(child: Child) -> None:
    """Behind the middlewares. Where one raises, uvicorn says so in a line of its log, and goes on without it."""
    log = (child.temporary / "log").read_text()
    assert "Application startup complete" in log
    assert "appears unsupported" not in log


def test_a_page_that_has_its_name_point_to_this_machine_is_refused(child: Child) -> None:
    port = urlsplit(child.ready["url"]).port
    for host, status in ((f"localhost:{port}", 200), (f"evil.example:{port}", 403)):
        request = Request(child.ready["url"] + "/health", headers={"Host": host})
        with contextlib.closing(_answer(request)) as answer:
            assert answer.status == status
            assert (b"(the Host header)" in answer.read()) == (status == 403)


def _answer(request: Request) -> Any:
    try:
        return urlopen(request, timeout=60)
    except HTTPError as error:
        return error


def test_sigterm_lets_a_stream_finish_ends_it_with_143_and_leaves_nothing(child: Child) -> None:
    # So few tokens that a busy machine too has them within the time that is given (DRAIN_SECONDS).
    options: Any = {"model": "one", "max_tokens": TOKENS + 16, "stream": True, "extra_body": {"ignore_eos": True}}
    stream: Any = child.client().completions.create(prompt=PROMPTS[0], **options)
    assert next(stream).choices[0].finish_reason is None
    processes = psutil.Process(child.process.pid).children(recursive=True)
    assert child.ready["pid"] in {process.pid for process in processes}
    assert left_in(child.temporary) != {"log"}
    child.process.terminate()
    end = time.monotonic() + 10
    for path in ("/health", "/v1/models"):  # a balancer's question, and one that vLLM would answer
        status = 200
        while status == 200 and time.monotonic() < end:  # until our process has got the signal
            with contextlib.closing(_answer(Request(child.ready["url"] + path))) as answer:
                status = answer.status
        assert (status, answer.headers["Retry-After"]) == (503, "1")
    with contextlib.closing(_answer(Request(child.ready["url"] + "/metrics"))) as answer:
        assert answer.status == 200
    assert [chunk.choices[0].finish_reason for chunk in stream][-1] == "length"
    assert child.process.wait(60) == 143
    assert not psutil.wait_procs(processes, timeout=5)[1]
    assert left_in(child.temporary) == {"log"}


def wait_for_child(process: subprocess.Popen[str], word: str, log: Path) -> list[psutil.Process]:
    """The children of `process`, as soon as one has `word` in its command line."""
    end = time.monotonic() + 600
    while time.monotonic() < end:
        assert process.poll() is None, log.read_text()[-5000:]
        processes = psutil.Process(process.pid).children(recursive=True)
        with contextlib.suppress(psutil.NoSuchProcess):
            if any(word in " ".join(child.cmdline()) for child in processes):
                return processes
        time.sleep(0.05)
    process.kill()
    pytest.fail(f"no child with {word} in ten minutes: {log.read_text()[-5000:]}")


@pytest.fixture(scope="module")
def few(short_smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two adapters that are checked and written for a server in no time, where its answers are not waited for."""
    folder = tmp_path_factory.mktemp("few")
    model = AutoModelForCausalLM.from_pretrained(short_smollm2)
    for seed, name in enumerate(("one", "two")):
        save_adapter(short_smollm2, model, folder / name, LLAMA_MODULES, seed=seed)
    return {name: folder / name for name in ("one", "two")}


def test_a_kill_ends_the_server_too(few: dict[str, Path], tmp_path: Path) -> None:
    process = start(few, tmp_path)
    processes = wait_for_child(process, "vllm.entrypoints", tmp_path / "log")
    process.kill()
    process.wait()
    assert not psutil.wait_procs(processes, timeout=DRAIN_SECONDS + SECONDS + 10)[1]


@pytest.mark.parametrize(("word", "number"), [("guard.py", signal.SIGTERM), ("vllm.entrypoints", signal.SIGINT)])
def test_a_signal_while_it_starts_ends_it_and_leaves_nothing(
    few: dict[str, Path], tmp_path: Path, word: str, number: signal.Signals
) -> None:
    process = start(few, tmp_path)
    processes = wait_for_child(process, word, tmp_path / "log")
    process.send_signal(number)
    assert process.wait(60) == 128 + number, (tmp_path / "log").read_text()[-5000:]
    assert not psutil.wait_procs(processes, timeout=5)[1]
    assert left_in(tmp_path) == {"log"}
