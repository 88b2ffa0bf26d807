"""A server that holds the basis once: every answer, token for token, is that of the merged weights.

As many slots as adapters, so that every slot is taken: stock vLLM on a CPU then answers for the base with an adapter.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.random_adapter import save_adapter, write_in  # first: it hides broken optional packages

import torch  # isort: skip
from openai import OpenAI
from transformers import AutoModelForCausalLM, AutoTokenizer

from lorasb_export.artifact import Adapter
from lorasb_export.serve import RunningServer, running_server

pytest.importorskip("vllm")

NAMES = ("one", "two", "three")
TOKENS = 32
LONG = "The ship left the harbour at dawn, and the captain wrote into her book what she saw of the sea. " * 4
PROMPTS = [f"{LONG}Then {end}" for end in ("she", "the wind", "a light far away")] + ["The capital of France is"]
Key = tuple[str, str]  # model, prompt


@pytest.fixture(scope="module")
def adapters(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Three random adapters on the basis embedded in the first, large enough to change every answer."""
    folder = tmp_path_factory.mktemp("shared")
    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    modules = [name for name, module in model.named_modules() if name.endswith("_proj")]
    first = save_adapter(smollm2, model, folder / "one", modules, rank=64, relative_size=0.15)
    generator = torch.Generator().manual_seed(1)
    for name in NAMES[1:]:
        random = {module: torch.randn(R.shape, generator=generator) for module, R in first.R.items()}
        R = {module: random[module] * (R.norm() / random[module].norm()) for module, R in first.R.items()}
        Adapter(first.base, first.basis_sha256, str(folder / "one"), R, first.scaling).save(folder / name)
    return {name: folder / name for name in NAMES}


@pytest.fixture(scope="module")
def expected(smollm2: Path, adapters: dict[str, Path]) -> dict[Key, list[int]]:
    """Greedy tokens of transformers, for the adapters with their weights written in."""
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    tokens = {}
    for name in (smollm2.name, *NAMES):
        model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32).eval()
        if name in adapters:
            write_in(model, Adapter.load(adapters[name]))
        for prompt in PROMPTS:
            encoded = tokenizer(prompt, return_tensors="pt")
            output = model.generate(**encoded, max_new_tokens=TOKENS, do_sample=False)
            tokens[name, prompt] = output[0, encoded["input_ids"].shape[1] :].tolist()
    return tokens


@pytest.fixture(scope="module")
def server(adapters: dict[str, Path]) -> Iterator[RunningServer]:
    extra = ["--max-model-len", "512", "--block-size", "32", "--enable-prompt-tokens-details"]
    with running_server(adapters, mode="shared", dtype="float32", extra=extra) as running:
        yield running


def ask(server: RunningServer, key: Key) -> tuple[list[int], int]:
    """The tokens of a greedy answer, and how many of the prompt's came from the prefix cache."""
    client = OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    options: Any = {"max_tokens": TOKENS, "temperature": 0, "extra_body": {"return_token_ids": True}}
    answer = client.completions.create(model=key[0], prompt=key[1], **options)
    details: Any = answer.usage and answer.usage.prompt_tokens_details
    chosen: Any = answer.choices[0]
    return chosen.token_ids, details.cached_tokens if details else 0


def test_every_adapter_is_listed_under_the_base(server: RunningServer, smollm2: Path) -> None:
    assert server.models == [smollm2.name, *NAMES]


def test_a_mixed_batch_answers_as_the_merged_weights_do(
    server: RunningServer, expected: dict[Key, list[int]], smollm2: Path
) -> None:
    assert all(len({tuple(expected[name, prompt]) for name in (smollm2.name, *NAMES)}) == 4 for prompt in PROMPTS)
    cached = []
    for _ in ("fresh", "from the prefix cache"):
        with ThreadPoolExecutor(len(expected)) as pool:
            answers = dict(zip(expected, pool.map(lambda key: ask(server, key), expected), strict=True))
        wrong = [key for key, (tokens, _) in answers.items() if tokens[: len(expected[key])] != expected[key]]
        assert not wrong
        cached.append([count for (_, prompt), (_, count) in answers.items() if prompt.startswith(LONG)])
    assert min(cached[1]) >= 64  # of every model, so the second round is read from the cache
