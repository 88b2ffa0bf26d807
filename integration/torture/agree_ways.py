"""The ways out of a `World`: each yields (adapter, or "base"; logits) as somebody gets them who took that way."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from typing import Any
from urllib.request import Request, urlopen

from .agree_world import World, logits  # first: it hides broken optional packages

import numpy as np  # isort: skip
import torch

from lorasb_export import export, merge
from lorasb_export.base.model import BaseModel
from lorasb_export.exporting.onnx_run import OnnxDecoder
from lorasb_export.serving.launcher import running_server
from tests.tiny import VOCABULARY

Answers = Iterator[tuple[str, torch.Tensor]]


def unmerged(world: World) -> Answers:
    for name in world.case.adapters:
        model = BaseModel.resolve(world.base).load(device="cpu")
        world.adapter(name).inject(model)
        yield name, logits(model, world.ids)


def merged(world: World) -> Answers:
    for name in world.case.adapters:
        merge(world.root / name, world.root / f"{name}-merged")
        yield name, logits(BaseModel.resolve(world.root / f"{name}-merged").load(device="cpu"), world.ids)


def peft(world: World) -> Answers:
    from peft import PeftModel

    for name in world.case.adapters:
        export(world.root / name, world.root / f"{name}-peft", format="peft")
        model = BaseModel.resolve(world.base).load(device="cpu")
        yield name, logits(PeftModel.from_pretrained(model, world.root / f"{name}-peft"), world.ids)


def onnx_merged(world: World) -> Answers:
    """Of the first adapter alone: each is an export of its own."""
    first = next(iter(world.case.adapters))
    export(world.root / first, world.root / "onnx", format="onnx", verify=False)
    yield first, _onnx_logits(OnnxDecoder(world.root / "onnx", threads=1), world.ids)


def onnx_swappable(world: World) -> Answers:
    out = world.root / "onnx-adapters"
    export([world.root / name for name in world.case.adapters], out, format="onnx-adapters", verify=False)
    decoder = OnnxDecoder(out, threads=1)
    for name in world.expected:
        decoder.use(None if name == "base" else name)
        yield name, _onnx_logits(decoder, world.ids)


def vllm(mode: str, world: World) -> Answers:
    """One server for the base and all adapters."""
    adapters = {name: world.root / name for name in world.case.adapters}
    extra = ["--max-model-len", "64", "--max-logprobs", "-1", "--enforce-eager", "--max-num-seqs", "8"]
    extra += ["--num-gpu-blocks-override", "64", "--block-size", "32"]
    with running_server(adapters, mode=mode, dtype=world.case.dtype, extra=extra) as server:
        for name in world.expected:
            model = server.models[0] if name == "base" else name
            rows = [_prompt_logprobs(server.url, model, row, len(VOCABULARY)) for row in world.ids.tolist()]
            yield name, torch.tensor(rows, dtype=torch.float64)


WAYS = {
    "unmerged": unmerged,
    "merged": merged,
    "peft": peft,
    "onnx merged": onnx_merged,
    "onnx swappable": onnx_swappable,
}
SERVED_WAYS = {"vllm folded": partial(vllm, "folded"), "vllm shared": partial(vllm, "shared")}


def _onnx_logits(decoder: OnnxDecoder, ids: torch.Tensor) -> torch.Tensor:
    """The first half of the tokens at once, the others one by one with the cache."""
    session, rows = decoder._session, len(ids)
    inputs = {item.name: item for item in session.get_inputs()}
    names = [output.name for output in session.get_outputs()]
    cache = {
        name: np.zeros((rows, item.shape[1], 0, item.shape[3]), np.float32)
        for name, item in inputs.items()
        if name.startswith("past_")
    }
    half = ids.shape[1] // 2
    found, done = [], 0
    for part in (ids[:, :half], *ids[:, half:].split(1, dim=1)):
        there = done + part.shape[1]
        positions = np.arange(done, there)[None].repeat(rows, 0)
        feed = {"input_ids": part.numpy(), "attention_mask": np.ones((rows, there), np.int64)}
        feed["position_ids"] = positions
        feed = {name: array for name, array in feed.items() if name in inputs} | cache
        outputs = dict(zip(names, session.run(names, feed, decoder._chosen.run_options), strict=True))
        found.append(outputs.pop("logits"))
        cache = {name.replace("present", "past_key_values"): array for name, array in outputs.items()}
        done = there
    return torch.from_numpy(np.concatenate(found, axis=1)).double()


def _prompt_logprobs(url: str, model: str, ids: list[int], vocabulary: int) -> list[list[float]]:
    """Log-probabilities of every token after every one of `ids`."""
    body: dict[str, Any] = {"model": model, "prompt": [*ids, 1], "max_tokens": 1, "temperature": 0}
    body["prompt_logprobs"] = vocabulary
    request = Request(f"{url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urlopen(request, timeout=120) as response:
        places = json.load(response)["choices"][0]["prompt_logprobs"][1:]
    return [[place[str(token)]["logprob"] for token in range(vocabulary)] for place in places]
