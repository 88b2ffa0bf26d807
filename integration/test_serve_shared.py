"""A server that holds the basis once: every answer, token for token, is that of the merged weights.

Of a real model's first layers; its real depth is served so in the quickstart.
As many slots as adapters, so that every slot is taken: stock vLLM on a CPU then answers for the base with an adapter.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest

from tests.random_adapter import save_adapter, write_in  # first: it hides broken optional packages

import torch  # isort: skip
from openai import NotFoundError, OpenAI
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from lorasb_export.adapter import Adapter
from lorasb_export.base.model import BaseModel
from lorasb_export.data.encoding import prompt_ids
from lorasb_export.files.storage import read_json, write_json
from lorasb_export.format import sealed
from lorasb_export.names import PARTS_OF_CHATS
from lorasb_export.serving.launcher import RunningServer, running_server
from tests.rows import TOOLED, tool_row

pytest.importorskip("vllm")

from .reference import generated
from .torture.load import load
from .torture.tiny_server import Target

NAMES = ("one", "two", "three")
TOKENS, CHUNK = 32, 64
KEY = "only-for-this-test"
LONG = "The ship left the harbour at dawn, and the captain wrote into her book what she saw of the sea. " * 4
PROMPTS = [f"{LONG}Then {end}" for end in ("she", "the wind", "a light far away")] + ["The capital of France is"]
Key = tuple[str, str]  # model, prompt


@pytest.fixture(scope="module")
def adapters(short_smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Three random adapters on the basis embedded in the first, large enough to change every answer."""
    folder = tmp_path_factory.mktemp("shared")
    model = AutoModelForCausalLM.from_pretrained(short_smollm2, dtype=torch.float32)
    modules = [name for name, module in model.named_modules() if name.endswith("_proj")]
    first = save_adapter(short_smollm2, model, folder / "one", modules, rank=64, relative_size=0.6)
    generator = torch.Generator().manual_seed(1)
    for name in NAMES[1:]:
        random = {module: torch.randn(R.shape, generator=generator) for module, R in first.R.items()}
        R = {module: random[module] * (R.norm() / random[module].norm()) for module, R in first.R.items()}
        Adapter(first.base, first.basis_sha256, str(folder / "one"), R, first.scaling).save(folder / name)
    return {name: folder / name for name in NAMES}


@pytest.fixture(scope="module")
def expected(short_smollm2: Path, adapters: dict[str, Path]) -> dict[Key, list[int]]:
    """Greedy tokens of transformers, for the adapters with their weights written in."""
    tokenizer = AutoTokenizer.from_pretrained(short_smollm2)
    tokens = {}
    for name in (short_smollm2.name, *NAMES):
        model = AutoModelForCausalLM.from_pretrained(short_smollm2, dtype=torch.float32).eval()
        if name in adapters:
            write_in(model, Adapter.load(adapters[name]))
        answers = generated(model, tokenizer, tokenizer(PROMPTS)["input_ids"], TOKENS)
        tokens |= {(name, prompt): answer for prompt, answer in zip(PROMPTS, answers, strict=True)}
    return tokens


@pytest.fixture(scope="module")
def updates(adapters: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder clients may load from: two good adapters, and bad ones."""
    folder = tmp_path_factory.mktemp("updates")
    bad = ("nan", "truncated", "large", "swapped", "foreign", "edited", "fifo", "linked")
    for name in ("two", "three", *bad):
        shutil.copytree(adapters["three" if name == "three" else "two"], folder / name)
    (folder / "link").symlink_to(adapters["two"])
    (folder / "empty").mkdir()
    weights = {name: folder / name / "adapter.safetensors" for name in bad}
    tensors = load_file(weights["nan"])
    next(iter(tensors.values()))[0, 0] = torch.nan
    save_file(tensors, weights["nan"])
    os.truncate(weights["truncated"], 100_000)
    os.truncate(weights["large"], 10**12)  # of holes, which a copy would fill
    shutil.copy(adapters["three"] / "adapter.safetensors", weights["swapped"])
    for name in ("fifo", "linked"):
        weights[name].unlink()
    os.mkfifo(weights["fifo"])
    weights["linked"].symlink_to(adapters["two"] / "adapter.safetensors")
    for name, change in (
        ("foreign", {"basis": {"sha256": "0" * 64, "source": "embedded"}}),
        ("edited", {"scaling": 9}),
    ):
        config = read_json(folder / name / "adapter_config.json") | change
        write_json(folder / name / "adapter_config.json", sealed(config) if name == "foreign" else config)
    return folder


@pytest.fixture(scope="module")
def server(
    adapters: dict[str, Path], updates: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RunningServer]:
    extra = ["--max-model-len", "512", "--block-size", "32", "--enable-prompt-tokens-details", "--max-loras", "3"]
    extra += [
        "--enable-auto-tool-choice",
        "--tool-call-parser",
        "hermes",
        "--trust-request-chat-template",
        "--max-num-seqs",
        "32",
        "--max-num-batched-tokens",
        str(CHUNK),
    ]  # long prompts are read in pieces
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("VLLM_API_KEY", raising=False)
        # Of two keys: `running_server` asks with the first, and the tests with the second.
        keys = tmp_path_factory.mktemp("keys") / "keys"
        keys.write_text(f"another-for-this-test\n{KEY}\n")
        options: Any = {"mode": "shared", "dtype": "float32", "extra": extra, "updates_from": updates}
        with running_server(adapters, **options, api_key_file=keys) as running:
            yield running


def client_of(server: RunningServer) -> OpenAI:
    return OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0)


def post(server: RunningServer, what: str, body: dict[str, Any], key: str = KEY) -> tuple[int, str]:
    """Status and message of `/v1/load_lora_adapter` or `/v1/unload_lora_adapter`."""
    headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
    request = Request(f"{server.url}/v1/{what}_lora_adapter", json.dumps(body).encode(), headers)
    try:
        with urlopen(request, timeout=60) as response:
            return response.status, json.load(response)["message"]
    except HTTPError as error:
        return error.code, json.load(error).get("message", "")


def ask(server: RunningServer, key: Key) -> tuple[list[int], int]:
    """The tokens of a greedy answer, and how many of the prompt's came from the prefix cache."""
    options: Any = {"max_tokens": TOKENS, "temperature": 0, "extra_body": {"return_token_ids": True}}
    answer = client_of(server).completions.create(model=key[0], prompt=key[1], **options)
    details: Any = answer.usage and answer.usage.prompt_tokens_details
    chosen: Any = answer.choices[0]
    return chosen.token_ids, details.cached_tokens if details else 0


def stream(server: RunningServer, model: str, prompt: str, tokens: int) -> Iterator[list[int]]:
    """The tokens of a greedy answer, as they come."""
    extra = {"return_token_ids": True, "ignore_eos": True}
    options: Any = {"max_tokens": tokens, "temperature": 0, "stream": True, "extra_body": extra}
    answer: Any = client_of(server).completions.create(model=model, prompt=prompt, **options)
    yield from (chunk.choices[0].token_ids for chunk in answer if chunk.choices and chunk.choices[0].token_ids)


def metric(server: RunningServer, name: str) -> float:
    """The sum of a metric over its labels."""
    with urlopen(f"{server.url}/metrics", timeout=60) as response:
        lines = response.read().decode().splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(f"{name}{{"))


def test_every_adapter_is_listed_under_the_base(server: RunningServer, short_smollm2: Path) -> None:
    assert server.models == [short_smollm2.name, *NAMES]


def test_a_mixed_batch_answers_as_the_merged_weights_do(
    server: RunningServer, expected: dict[Key, list[int]], short_smollm2: Path
) -> None:
    assert all(len({tuple(expected[name, prompt]) for name in (short_smollm2.name, *NAMES)}) == 4 for prompt in PROMPTS)
    cached = []
    for _ in ("fresh", "from the prefix cache"):
        with ThreadPoolExecutor(len(expected)) as pool:
            answers = dict(zip(expected, pool.map(lambda key: ask(server, key), expected), strict=True))
        wrong = [key for key, (tokens, _) in answers.items() if tokens[: len(expected[key])] != expected[key]]
        assert not wrong
        cached.append([count for (_, prompt), (_, count) in answers.items() if prompt.startswith(LONG)])
    assert min(cached[1]) >= CHUNK  # of every model, so the second round is read from the cache


# What vLLM does besides, with an adapter of ours.


def test_a_stream_is_the_same_answer(
    server: RunningServer, expected: dict[Key, list[int]], short_smollm2: Path
) -> None:
    pieces = list(stream(server, "one", PROMPTS[0], TOKENS))
    assert len(pieces) > 1
    assert [*chain(*pieces)] == expected["one", PROMPTS[0]]


def test_structured_output_and_tools(server: RunningServer, short_smollm2: Path) -> None:
    colours: Any = {"type": "object", "properties": {"colour": {"enum": ["red", "green"]}}, "required": ["colour"]}
    messages: Any = [{"role": "user", "content": "Which colour has grass?"}]
    common: Any = {"model": "one", "messages": messages, "max_tokens": 64, "temperature": 0}
    # Three layers would write blanks in their JSON until the answer is full, and any words where no schema holds.
    vocabulary = AutoTokenizer.from_pretrained(short_smollm2).get_vocab()
    common["logit_bias"] = {str(number): -100 for token, number in vocabulary.items() if not token.strip("ĠĊĉč")}
    chat = client_of(server).chat.completions
    schema: Any = {"type": "json_schema", "json_schema": {"name": "answer", "schema": colours}}
    answer = chat.create(**common, response_format=schema).choices[0].message.content
    assert json.loads(answer or "")["colour"] in ("red", "green")
    tools = [{"type": "function", "function": {"name": "paint", "parameters": colours, "strict": True}}]
    choice = {"type": "function", "function": {"name": "paint"}}
    call: Any = (chat.create(**common, tools=tools, tool_choice=choice).choices[0].message.tool_calls or [None])[0]
    assert call.function.name == "paint"
    assert json.loads(call.function.arguments)["colour"] in ("red", "green")


def test_a_chat_with_tools_has_the_tokens_that_are_trained(server: RunningServer, short_smollm2: Path) -> None:
    tokenizer = BaseModel.resolve(short_smollm2).tokenizer
    tokenizer.chat_template = TOOLED
    row = tool_row("weather", city="Oslo")
    call = row["messages"][1]["tool_calls"][0]["function"]
    bare = {"function": {"strict": True, "name": "clock", "cache": 1}}
    for tools in (row["tools"], [*row["tools"], bare | {"type": "function"}]):
        for arguments in ('{"city": "Oslo"}', "{}", ""):
            call["arguments"] = arguments
            asked = {"messages": row["messages"][:3], "tools": tools}
            tokens = _tokens(server, TOOLED, asked)
            assert tokenizer.decode(tokens) == tokenizer.decode(prompt_ids(tokenizer, asked))
            assert tokens == prompt_ids(tokenizer, asked)


@pytest.mark.parametrize("roles", ["du", "dudu", "sdu", "ud", "ssu"])
@pytest.mark.parametrize("names", ["", "{% set role = 'developer' %}"])
def test_a_chat_with_developers_and_reasoning_has_the_tokens_that_are_trained(
    roles: str, names: str, server: RunningServer, short_smollm2: Path
) -> None:
    tokenizer = BaseModel.resolve(short_smollm2).tokenizer
    written = "{{ m['role'] }}: {{ m['reasoning'] }}, {{ m['reasoning_content'] }}, {{ m['content'] }}\n"
    tokenizer.chat_template = names + "{% for m in messages %}" + written + "{% endfor %}"
    known = {"s": "system", "d": "developer", "u": "user"}
    turns = [{"role": known[role], "content": f"turn {number}"} for number, role in enumerate(roles)]
    thought = {"role": "assistant", "content": "So.", "reasoning": "Well."}
    asked = {"messages": [*turns, thought, {"role": "user", "content": "?"}]}
    tokens = _tokens(server, tokenizer.chat_template, asked)
    assert tokenizer.decode(tokens) == tokenizer.decode(prompt_ids(tokenizer, asked))


def _tokens(server: RunningServer, template: str, asked: dict[str, Any]) -> list[int]:
    """Token ids that the server makes of a chat."""
    body = {"model": "one", "chat_template": template, "add_special_tokens": False, **asked}
    headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
    request = Request(f"{server.url}/tokenize", json.dumps(body).encode(), headers)
    with urlopen(request, timeout=60) as response:
        tokens: list[int] = json.load(response)["tokens"]
    return tokens


def test_metrics_count_what_adapters_say(server: RunningServer) -> None:
    before = metric(server, "vllm:generation_tokens_total")
    tokens, _ = ask(server, ("one", PROMPTS[1]))
    assert metric(server, "vllm:generation_tokens_total") == before + len(tokens)


def test_no_adapter_has_the_name_of_a_part_of_a_chat() -> None:
    from vllm.renderers.chat_utils import parse_chat_messages

    kinds = sys.modules[parse_chat_messages.__module__].MM_PARSER_MAP  # in vLLM 0.33 a module below
    assert {kind.split("_")[0] for kind in kinds} <= PARTS_OF_CHATS


# Live changes. The adapters are known by their answers: a copy of "two" under another name answers as "two" does.


@pytest.mark.parametrize(
    ("body", "message"),
    [
        *(
            ({"lora_name": name}, "cannot be served as a name")
            for name in ("../x", "/etc", "a/b", "..", "", "ｔwo", "twо", "two\u200b", "two\n", "two\0", "x" * 97)
        ),
        *(
            ({"lora_name": "x", "lora_path": path}, "not the name of a folder")
            for path in ("/etc", "../shared0", "two/.", "two\0", "ｔwo", "x" * 5000)
        ),
        ({"lora_name": "image", "lora_path": "two"}, "cannot be served as a name"),
        ({"lora_name": "x", "lora_path": "link"}, "leads out of"),
        ({"lora_name": "x", "lora_path": "linked"}, "leads out of"),
        ({"lora_name": "x", "lora_path": "empty"}, "has no adapter.safetensors"),
        ({"lora_name": "x", "lora_path": "fifo"}, "has no adapter.safetensors"),
        ({"lora_name": "x", "lora_path": "large"}, "larger than any adapter"),
        ({"lora_name": "x", "lora_path": "swapped"}, "not the tensors that the config names"),
        ({"lora_name": "x", "lora_path": "foreign"}, "another basis"),
        ({"lora_name": "x", "lora_path": "edited"}, "not as it was written"),
        ({"lora_name": "SmolLM2-135M-Instruct", "lora_path": "two"}, "the name of the base"),
        ({"lora_name": "x", "lora_path": "nothing"}, "no adapter 'nothing'"),
        ({"lora_name": "x", "lora_path": "nan"}, "non-finite"),
        ({"lora_name": "x", "lora_path": "truncated"}, "truncated"),
        ({"lora_name": "x", "lora_path": 7}, "a value is not a string"),
    ],
)
def test_a_bad_adapter_is_refused_with_400(server: RunningServer, body: dict[str, Any], message: str) -> None:
    status, answer = post(server, "load", body)
    assert status == 400
    assert message in answer
    assert set(server.models) == {model.id for model in client_of(server).models.list()}


def test_without_the_key_nothing_is_loaded(server: RunningServer) -> None:
    assert post(server, "load", {"lora_name": "four", "lora_path": "two"}, key="another")[0] == 401


def test_an_adapter_comes_is_replaced_and_goes(
    server: RunningServer, expected: dict[Key, list[int]], updates: Path
) -> None:
    prompt = PROMPTS[0]
    for version in ("two", "three"):  # the second replaces the first, whose prompt lies in the prefix cache
        assert post(server, "load", {"lora_name": "four", "lora_path": version}) == (200, "loaded four")
        assert ask(server, ("four", prompt))[0] == expected[version, prompt]
    assert "four" in {model.id for model in client_of(server).models.list()}
    old = [*chain(*stream(server, "three", prompt, 400))]  # a replacement takes the time of one or two
    running = stream(server, "four", prompt, 400)  # replaced meanwhile, it keeps what it began with
    first = next(running)
    assert post(server, "load", {"lora_name": "four", "lora_path": "two"})[0] == 200
    assert metric(server, "vllm:num_requests_running") == 1
    assert ask(server, ("four", prompt))[0] == expected["two", prompt]
    assert [*first, *chain(*running)] == old
    assert post(server, "unload", {"lora_name": "four"})[0] == 200
    assert post(server, "unload", {"lora_name": "four"})[0] == 404
    with pytest.raises(NotFoundError):
        ask(server, ("four", prompt))
    for name in NAMES:  # some of them had to leave their slot for it
        assert ask(server, (name, prompt))[0] == expected[name, prompt]


def test_nothing_is_lost_or_wrong_under_load(
    server: RunningServer, expected: dict[Key, list[int]], short_smollm2: Path
) -> None:
    """The last test here: names stand for other versions afterwards. What each client does is in `torture`."""
    tokenizer = AutoTokenizer.from_pretrained(short_smollm2)
    answers = {
        (version, tuple(tokenizer(prompt)["input_ids"])): tuple(tokens[:4])
        for (version, prompt), tokens in expected.items()
    }
    served = {name: name for name in NAMES}
    target = Target(server.url, KEY, server.pid, short_smollm2.name, served, ("two", "three"), answers, context=512)
    tally = load(target, n=200, seed=0)
    assert not tally.problems
    assert tally.tried == tally.ok > 1200
    with urlopen(f"{server.url}/metrics", timeout=60) as response:
        metrics = response.read().decode()
    assert metrics.count("vllm:lora_requests_info{") == 1  # not one more for every mixture of adapters in a step
