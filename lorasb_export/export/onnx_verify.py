"""Does an exported ONNX folder answer as torch does?"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..artifact import Adapter
from ..base import BaseModel
from ..data import prompt_ids
from ..errors import ArtifactError
from .onnx_run import OnnxDecoder

if TYPE_CHECKING:
    from transformers import PreTrainedModel

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
    """Compare greedy answers of an exported folder with torch's in fp32, token by token up to the end of each answer.

    Args:
        out: what `export_onnx` or `export_onnx_adapters` wrote.
        reference: the merged model's folder; or the base model, to which torch adds `task`.
        adapter: the `.onnx_adapter` file that carries `task` in `out`, where it is not merged in.

    Returns:
        `prompts`, `equal_prompts` (whole answers equal), `tokens` (in torch's answers), `equal_tokens` (before the
        first that differs), and `gap`: where an answer first differs, by how much torch's logits prefer its own token;
        the largest over the prompts, 0 when all are equal.
    """
    base = BaseModel.resolve(reference)
    network, tokenizer = base.load(dtype="float32", device="cpu"), base.load_tokenizer()
    if task is not None:
        task.inject(network)
    decoder = OnnxDecoder(out, adapter)
    encoded = [prompt_ids(tokenizer, prompt) for prompt in prompts]
    result = {"prompts": len(encoded), "equal_prompts": 0, "tokens": 0, "equal_tokens": 0, "gap": 0.0}
    for ids, found in zip(encoded, decoder.generate(encoded, tokens, decoder.eos_ids), strict=True):
        expected, logits = torch_greedy(network, ids, tokens, decoder.eos_ids)
        equal = next((i for i, (a, b) in enumerate(zip(expected, found, strict=False)) if a != b), len(expected))
        result["equal_prompts"] += expected == found
        result["tokens"] += len(expected)
        result["equal_tokens"] += equal
        if equal < len(expected):
            gap = logits[equal, expected[equal]] - logits[equal, found[equal]]
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


def torch_greedy(
    network: PreTrainedModel, prompt: Sequence[int], max_tokens: int, eos_ids: Collection[int]
) -> tuple[list[int], torch.Tensor]:
    """The plain argmax loop that exports are compared with.

    Returns:
        the answer, up to and including the first of `eos_ids`, and the logits (tokens, vocabulary) it was taken from.
    """
    ids, cache = torch.tensor([list(prompt)]), None
    answer: list[int] = []
    logits: list[torch.Tensor] = []
    with torch.inference_mode():
        while len(answer) < max_tokens and not (answer and answer[-1] in eos_ids):
            output: Any = network(input_ids=ids, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            logits.append(output.logits[0, -1])
            answer.append(int(logits[-1].argmax()))
            ids = torch.tensor([answer[-1:]])
    return answer, torch.stack(logits)
