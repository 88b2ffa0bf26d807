"""A server that answers in milliseconds, hundreds of adapters for it, and the answers it has to give."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

from tests.random_adapter import save_adapter, save_base, write_in  # first: it hides broken optional packages

import torch  # isort: skip
from transformers import LlamaConfig, LlamaForCausalLM

from lorasb_export.adapter import Adapter
from lorasb_export.base.model import BaseModel
from lorasb_export.quickstart.model import small_model
from lorasb_export.serving.launcher import running_server

RANK, TOKENS, CONTEXT, VOCABULARY = 16, 8, 128, 4096
PROMPTS = tuple(
    tuple((7919 * n + 104729 * place) % (VOCABULARY - 100) + 100 for place in range(24 + n)) for n in range(4)
)
Tokens = tuple[int, ...]


@dataclass(frozen=True)
class Target:
    """A server to put load on.

    Attributes:
        pid: the server's process; its children count as its own.
        base: the name of the base.
        served: name → the version it is served with at the start.
        versions: folders of adapters that may be loaded, by the path a client gives.
        answers: (version, or the base's name, and prompt) → the greedy tokens.
        context: tokens of the longest request that is accepted.
    """

    url: str
    key: str
    pid: int
    base: str
    served: dict[str, str]
    versions: tuple[str, ...]
    answers: dict[tuple[str, Tokens], Tokens]
    context: int


def tiny_world(
    folder: Path, adapters: int, *, tied: bool = False
) -> tuple[list[str], dict[tuple[str, Tokens], Tokens]]:
    """A random model with two layers in `folder`/tiny, `adapters` random adapters in `folder`/adapters.

    Args:
        tied: its embeddings are its lm_head as well.

    Returns:
        their names, and (name, or `tiny`, and prompt) → the greedy tokens.
    """
    model = _model(tied)
    base = save_base(model, folder / "tiny")
    tokenizer = BaseModel.resolve(small_model()).folder
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(tokenizer / name, base / name)
    versions = [f"v{number:04d}" for number in range(adapters)]
    return versions, _answers(model, base, folder / "adapters", versions)


@contextmanager
def tiny_server(folder: Path, adapters: int) -> Iterator[Target]:
    """Serve half of the adapters of a `tiny_world`; the rest can be loaded.

    There are slots for half of those served, so that they are evicted and read again all the time.
    """
    versions, answers = tiny_world(folder, adapters)
    served = {f"task-{version}": version for version in versions[: adapters // 2]}
    extra = ["--max-model-len", str(CONTEXT), "--max-num-seqs", "32", "--max-loras", str(max(2, len(served) // 2))]
    # Few blocks: all are written to in the first requests, so that later growth of memory is a leak.
    extra += ["--block-size", "32", "--num-gpu-blocks-override", "512", "--disable-uvicorn-access-log"]
    key = "only-for-this-run"
    before = os.environ.get("VLLM_API_KEY")
    os.environ["VLLM_API_KEY"] = key
    try:
        folders = {name: folder / "adapters" / version for name, version in served.items()}
        options = {"mode": "shared", "dtype": "float32", "updates_from": folder / "adapters"}
        with running_server(folders, extra=extra, **options) as server:  # type: ignore[arg-type]
            yield Target(
                server.url, key, server.pid, server.models[0], served, tuple(versions), answers, context=CONTEXT
            )
    finally:
        os.environ.pop("VLLM_API_KEY")
        if before is not None:
            os.environ["VLLM_API_KEY"] = before


def wrong_answer(url: str, key: str, versions: Mapping[str, str], answers: Mapping[tuple[str, Tokens], Tokens]) -> str:
    """The first greedy answer of a model that is not the one known for its version, in words; empty if all are right.

    Args:
        versions: the name a server knows a model by → its version among `answers`.
    """
    for name, of in versions.items():
        for (version, prompt), tokens in answers.items():
            if version == of:
                body = {"model": name, "prompt": list(prompt), "max_tokens": len(tokens), "temperature": 0}
                reply = post(f"{url}/v1/completions", key, body | {"ignore_eos": True, "return_token_ids": True})
                found = tuple(json.loads(reply)["choices"][0]["token_ids"])
                if found != tokens:
                    return f"{name} answers {found}, not {tokens}"
    return ""


@torch.inference_mode()
def greedy(model: LlamaForCausalLM) -> dict[Tokens, Tokens]:
    """Prompt → what transformers says after it."""
    found = {}
    for prompt in PROMPTS:
        output = model.generate(torch.tensor([prompt]), max_new_tokens=TOKENS, do_sample=False)
        found[prompt] = tuple(output[0, len(prompt) :].tolist())
    return found


def post(url: str, key: str, body: Mapping[str, Any]) -> bytes:
    headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
    with urlopen(Request(url, json.dumps(body).encode(), headers), timeout=60) as response:
        content: bytes = response.read()
    return content


def _model(tied: bool) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": VOCABULARY}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "tie_word_embeddings": tied}
    # Weights large enough that every layer has its say in the answer.
    config = LlamaConfig(**sizes, **heads, initializer_range=0.2, max_position_embeddings=256, eos_token_id=None)
    return LlamaForCausalLM(config).eval()


def _answers(
    model: LlamaForCausalLM, base: Path, folder: Path, versions: list[str]
) -> dict[tuple[str, Tokens], Tokens]:
    """Write the adapters, the first with their basis, and ask transformers with each one's weights written in."""
    modules = [name for name, _ in model.named_modules() if name.endswith("_proj")]
    first = save_adapter(base, model, folder / versions[0], modules, rank=RANK, relative_size=0.5)
    answers = {(base.name, prompt): tokens for prompt, tokens in greedy(model).items()}
    plain = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    generator = torch.Generator().manual_seed(1)
    for version in versions:
        adapter = first
        if version != versions[0]:
            random = {name: torch.randn(R.shape, generator=generator) for name, R in first.R.items()}
            R = {name: random[name] * (first.R[name].norm() / random[name].norm()) for name in random}
            source = str(folder / versions[0])
            adapter = Adapter(first.base, first.basis_sha256, source, R, first.scaling, basis=first.load_basis())
            adapter.save(folder / version)
        write_in(model, adapter)
        answers |= {(version, prompt): tokens for prompt, tokens in greedy(model).items()}
        model.load_state_dict(plain)
    return answers
