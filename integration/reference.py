"""What exports and servers have to answer: torch with W0 + s·B·R·A in its weights."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lorasb_export.adapter import Adapter
from lorasb_export.base.model import BaseModel


def merged(base: Path, adapter: Path | None) -> PreTrainedModel:
    """With the update computed in float64."""
    network = BaseModel.resolve(base).load(dtype="float32", device="cpu")
    if adapter is not None:
        task = Adapter.load(adapter)
        for name, factors in task.load_basis().modules.items():
            B, A, weight = factors.B, factors.A, network.get_submodule(name).weight
            weight.data = (weight.double() + task.scaling * B.double() @ task.R[name].double() @ A.double()).float()
    return network


def greedy(network: PreTrainedModel, prompt: list[int], tokens: int, eos: Collection[int] = ()) -> list[int]:
    """The plain argmax loop, without a cache."""
    answer: list[int] = []
    with torch.inference_mode():
        while len(answer) < tokens and not (answer and answer[-1] in eos):
            answer.append(int(network(torch.tensor([prompt + answer])).logits[0, -1].argmax()))
    return answer


def generated(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[list[int]], tokens: int
) -> list[list[int]]:
    """The greedy answers of transformers' own loop, in one batch: each up to and including its end."""
    batch = tokenizer.pad({"input_ids": prompts}, padding_side="left", return_tensors="pt")
    rows = model.generate(**batch, max_new_tokens=tokens, do_sample=False, pad_token_id=tokenizer.pad_token_id)
    eos = tokenizer.eos_token_id
    answers = rows[:, batch["input_ids"].shape[1] :].tolist()
    return [answer[: answer.index(eos) + 1] if eos in answer else answer for answer in answers]


def random_prompts(*lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(3, 98, (length,), generator=generator).tolist() for length in lengths]
