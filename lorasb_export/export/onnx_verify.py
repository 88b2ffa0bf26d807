"""Does an exported ONNX folder answer as torch does?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ..artifact import Adapter
from ..base import CAUSAL_LM, BaseModel
from ..batches import prompt_ids
from ..errors import ArtifactError
from ..layer import remove
from .onnx_run import OnnxDecoder, classify

PROMPTS = (
    "What is the capital of France?",
    "Write a short poem about the sea.",
    "Explain in two sentences why the sky is blue.",
    "List three uses of a brick.",
)
_TIE = 0.01  # logits: fp32 in another order of summation differs by about 1e-4


def verify_folder(
    out: Path,
    reference: BaseModel,
    tasks: Mapping[str, Adapter | None],
    task_type: str = CAUSAL_LM,
    *,
    prompts: Sequence[str] = PROMPTS,
    tokens: int = 32,
) -> dict[str, dict[str, float]]:
    """Ask an exported folder for answers, and torch in fp32 whether it would have said the same.

    One pass of torch over prompt and answer gives its choice at every step, so an answer without a difference is the
    one that torch's own greedy loop gives.

    Args:
        out: what an ONNX export wrote.
        reference: the merged model; or the base, to which torch adds each task.
        tasks: name of an adapter of `out` → what torch adds; "" → None for the graph's own weights.

    Returns:
        for each of `tasks` the `prompts`, `equal_prompts` (whole answers equal), `tokens` (of the answers),
        `equal_tokens` (before the first of an answer that differs), and `gap`: by how much torch's logits prefer its
        own token there, the largest over the prompts; 0 when all are equal. For a classifier `prompts`,
        `equal_prompts` (the same class) and `gap`, the largest difference of a logit.
    """
    network, tokenizer = reference.load(task_type, dtype="float32", device="cpu"), reference.load_tokenizer()
    if task_type != CAUSAL_LM:
        batch = tokenizer(list(prompts), padding=True, return_tensors="pt")
        with torch.inference_mode():
            expected = network(**batch).logits
        found = torch.from_numpy(classify(out, {name: ids.numpy() for name, ids in batch.items()})).float()
        same = int((found.argmax(-1) == expected.argmax(-1)).sum())
        return {"": {"prompts": len(prompts), "equal_prompts": same, "gap": float((found - expected).abs().max())}}
    encoded = [prompt_ids(tokenizer, prompt) for prompt in prompts]
    decoder = OnnxDecoder(out)
    results = {}
    for name, task in tasks.items():
        decoder.use(name or None)
        if task is not None:
            task.inject(network)
        results[name] = _compare(network, encoded, decoder.generate(encoded, tokens, decoder.eos_ids))
        if task is not None:
            remove(network)
    return results


def _compare(network: Any, prompts: Sequence[list[int]], answers: Sequence[list[int]]) -> dict[str, float]:
    result = {"prompts": len(prompts), "equal_prompts": 0, "tokens": 0, "equal_tokens": 0, "gap": 0.0}
    for prompt, answer in zip(prompts, answers, strict=True):
        with torch.inference_mode():
            logits = network(torch.tensor([prompt + answer[:-1]])).logits[0, len(prompt) - 1 :]  # (tokens, vocabulary)
        preferred = logits.argmax(-1).tolist()
        equal = next((i for i, token in enumerate(answer) if token != preferred[i]), len(answer))
        result["equal_prompts"] += equal == len(answer)
        result["tokens"] += len(answer)
        result["equal_tokens"] += equal
        if equal < len(answer):
            gap = logits[equal, preferred[equal]] - logits[equal, answer[equal]]
            result["gap"] = max(result["gap"], float(gap))
    return result


def require_equal(result: dict[str, float], precision: str, where: str | Path) -> dict[str, float]:
    """`result` of `verify_folder`. Raises ArtifactError when fp32 answers differ by more than a tie between tokens."""
    if precision == "fp32" and result["gap"] > _TIE:
        counts = f"{result['equal_tokens']} of {result['tokens']} tokens are equal, " if "tokens" in result else ""
        raise ArtifactError(
            f"the ONNX answers leave torch's: {counts}the logits differ by {result['gap']:.2g}",
            where=where,
            fix="Nothing was written; report it with the versions of torch, onnxruntime and onnxruntime-genai",
        )
    return result
