"""Does an exported ONNX folder answer as torch does?"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from ..artifact import Adapter
from ..base import BaseModel
from ..batches import prompt_ids
from ..errors import ArtifactError
from .onnx_run import OnnxDecoder

PROMPTS = (
    "What is the capital of France?",
    "Write a short poem about the sea.",
    "Explain in two sentences why the sky is blue.",
    "List three uses of a brick.",
)
_TIE = 0.01  # logits: fp32 in another order of summation differs by about 1e-4


def verify_folder(
    out: str | Path,
    reference: str | Path,
    task: Adapter | None = None,
    adapter: str | Path | None = None,
    *,
    prompts: Sequence[str] = PROMPTS,
    tokens: int = 64,
) -> dict[str, float]:
    """Ask an exported folder for greedy answers, and torch in fp32 whether it would have said the same.

    One pass of torch over prompt and answer gives its choice at every step, so an answer without a difference is the
    one that torch's own greedy loop gives.

    Args:
        out: what `export_onnx` or `export_onnx_adapters` wrote.
        reference: the merged model's folder; or the base model, to which torch adds `task`.
        adapter: the `.onnx_adapter` file that carries `task` in `out`, where it is not merged in.

    Returns:
        `prompts`, `equal_prompts` (whole answers equal), `tokens` (of the answers), `equal_tokens` (before the first of
        an answer that differs), and `gap`: by how much torch's logits prefer its own token there, the largest over the
        prompts; 0 when all are equal.
    """
    base = BaseModel.resolve(reference)
    network, tokenizer = base.load(dtype="float32", device="cpu"), base.load_tokenizer()
    if task is not None:
        task.inject(network)
    decoder = OnnxDecoder(out, adapter)
    encoded = [prompt_ids(tokenizer, prompt) for prompt in prompts]
    result = {"prompts": len(encoded), "equal_prompts": 0, "tokens": 0, "equal_tokens": 0, "gap": 0.0}
    for prompt, answer in zip(encoded, decoder.generate(encoded, tokens, decoder.eos_ids), strict=True):
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
        raise ArtifactError(
            f"the ONNX answers leave torch's: {result['equal_tokens']} of {result['tokens']} tokens are equal, "
            f"the logits differ by {result['gap']:.2g}",
            where=where,
            fix="Nothing was written; report it with the versions of onnxruntime and onnxruntime-genai",
        )
    return result
