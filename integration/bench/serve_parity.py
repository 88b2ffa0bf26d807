"""Does every adapter answer, in a mixed batch, as its merged model does? Token for token, with the base among them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from lorasb_export.adapter import Adapter
from tests.random_adapter import write_in

from .serve_child import Child

_FEW = 8


def parity(base: Path, adapters: list[Path], *, prompts: int, tokens: int) -> dict[str, Any]:
    """Shares of tokens equal to those of transformers with the merged weights.

    In fp32 fresh and from the prefix cache; of a few prompts with three tensor-parallel processes (the small model has
    nine heads), and in bf16; and the largest difference of a token's log-probability in fp32.
    """
    asked = [[(7919 * n + 104729 * place) % 40_000 + 100 for place in range(40)] for n in range(prompts)]
    expected = list(_merged(base, adapters, asked, tokens))
    common: dict[str, Any] = {"ids": len(adapters), "basis": adapters[0], "enable_prefix_caching": True}
    fresh, cached = _ask(Child(base, adapters, dtype="float32", **common), asked, tokens, times=2)
    few = asked[:_FEW]
    expected_few = [row for start in range(0, len(expected), prompts) for row in expected[start:][: len(few)]]
    (parallel,) = _ask(Child(base, adapters, dtype="float32", tensor_parallel_size=3, **common), few, tokens)
    (half,) = _ask(Child(base, adapters, dtype="bfloat16", **common), few, tokens)
    differences = [
        abs(ours - theirs)
        for (found, found_logprobs), (wanted, logprobs) in zip(fresh, expected, strict=True)
        for _, ours, theirs in zip(range(_agree(found, wanted)), found_logprobs, logprobs, strict=False)
    ]
    return {
        "parity_tokens": min(_share(fresh, expected), _share(cached, expected)),
        "parity_tokens_tp3": _share(parallel, expected_few),
        "parity_logprob": round(max(differences), 6),
        "agreement_bf16": _share(half, expected_few),
    }


@torch.inference_mode()
def _merged(base: Path, adapters: list[Path], asked: list[list[int]], tokens: int) -> Iterator[tuple[list[int], Any]]:
    """Greedy tokens and their log-probabilities, by the base and then by each adapter; no padding, equal lengths."""
    for folder in (None, *adapters):
        model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
        if folder is not None:
            write_in(model, Adapter.load(folder))
        model.generation_config.eos_token_id = None
        options = {"do_sample": False, "return_dict_in_generate": True, "output_logits": True, "pad_token_id": 0}
        output = model.generate(torch.tensor(asked), max_new_tokens=tokens, **options)
        new = output.sequences[:, len(asked[0]) :]
        scores = torch.stack(output.logits, 1).log_softmax(-1).gather(-1, new[..., None])[..., 0]
        yield from zip(new.tolist(), scores.tolist(), strict=True)


def _ask(child: Child, asked: list[list[int]], tokens: int, times: int = 1) -> list[Any]:
    try:
        return [child.call("answers", prompts=asked, tokens=tokens, logprobs=times > 1) for _ in range(times)]
    finally:
        child.stop()


def _agree(found: list[int], wanted: list[int]) -> int:
    """How many tokens are equal before the first that is not."""
    pairs = zip(found, wanted, strict=True)
    return next((place for place, (ours, theirs) in enumerate(pairs) if ours != theirs), len(wanted))


def _share(found: list[Any], expected: list[Any]) -> float:
    equal = sum(_agree(ours[0], wanted[0]) for ours, wanted in zip(found, expected, strict=True))
    return round(equal / sum(len(wanted[0]) for wanted in expected), 4)
