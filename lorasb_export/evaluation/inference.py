"""Greedy answers of a model in torch."""

from __future__ import annotations

import logging
import math
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from ..bars import progress_bar
from ..base.borrowed import evaluating
from ..base.structure import positions, reads_padding, trained_positions
from ..data.chat import calls_tools
from ..data.chat_template import require_template
from ..data.encoding import answer_ids, prompt_ids, require_embeddings
from ..data.rows import CHAT, Prompt, Row, kind_of, question_and_answer
from ..errors import DataError, Problems, SettingsError
from ..layers.inject import refuse_rows
from .answer_end import before_end, end_ids

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


def generate_ids(
    network: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    *,
    max_tokens: Sequence[int],
    ends: Collection[int],
    pad_id: int,
    batch_size: int,
) -> list[list[int]]:
    """Greedy continuations of token-id prompts, up to and without the first of `ends`, in the order given.

    Each has as many tokens at most as `max_tokens` says. The likeliest token and nothing else: penalties in the base's
    generation_config.json, made for chats, are left out.
    """
    from transformers import GenerationConfig

    eos = sorted(ends) or None
    batches = _batches([(len(ids), most) for ids, most in zip(prompts, max_tokens, strict=True)], batch_size, network)
    answers: dict[int, list[int]] = {}
    with torch.inference_mode(), evaluating(network):
        for rows in progress_bar(batches, desc="generate", leave=False):
            longest = max(len(prompts[i]) for i in rows)
            ids = torch.tensor([[pad_id] * (longest - len(prompts[i])) + list(prompts[i]) for i in rows])
            mask = torch.tensor([[0] * (longest - len(prompts[i])) + [1] * len(prompts[i]) for i in rows])
            most = max(max_tokens[i] for i in rows)
            greedy = GenerationConfig(max_new_tokens=most, do_sample=False, eos_token_id=eos, pad_token_id=pad_id)
            with _generation_config(network, greedy):
                output = network.generate(ids.to(network.device), attention_mask=mask.to(network.device))  # type: ignore[operator]
            for i, row in zip(rows, output[:, longest:].tolist(), strict=True):
                answers[i] = before_end(row[: max_tokens[i]], ends)
    return [answers[i] for i in range(len(prompts))]


def _batches(sizes: Sequence[tuple[int, int]], batch_size: int, network: PreTrainedModel) -> list[list[int]]:
    """Which rows to answer at once, of each one's tokens and room: those that need the most memory first, or, of
    a network that reads padding, the longest prompts.

    A batch is as long as its longest prompt and its largest room, which may be of two rows and together more than the
    network's positions: rows that have ended go on counting with the others. Where a network reads padding, a batch is
    of prompts of one length.
    """
    reach, one_length = positions(network), reads_padding(network)
    batches: list[list[int]] = []
    longest = most = 0
    for row in sorted(range(len(sizes)), key=lambda row: (one_length and -sizes[row][0], -sum(sizes[row]))):
        tokens, room = sizes[row]
        is_other = one_length and tokens != longest
        longest, most = max(longest, tokens), max(most, room)
        if not batches or len(batches[-1]) == batch_size or longest + most > reach or is_other:
            batches.append([])
            longest, most = tokens, room
        batches[-1].append(row)
    return batches


@contextmanager
def _generation_config(network: PreTrainedModel, config: GenerationConfig) -> Iterator[None]:
    """What is passed to `generate` only adds to the network's own; so it is put in place of it."""
    own, network.generation_config = network.generation_config, config
    try:
        yield
    finally:
        network.generation_config = own


def checked_prompt_ids(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    max_tokens: Sequence[int],
    *,
    reach: float,
    unit: str,
    made_for: float,
    embeddings: float,
) -> list[list[int]]:
    """Token ids of prompts, asked as in training (`encoding.prompt_ids`), that a network can answer.

    One warning counts those that are longer, with their answers, than it is made for.

    Args:
        max_tokens: of each answer, at most.
        reach: where its positions end (`structure.positions`).
        unit: what errors call one of them; its number, from 1, follows.
        made_for: how many tokens it is made for (`structure.trained_positions`).
        embeddings: how many tokens of the vocabulary, the first ones, it has an embedding for.

    Raises:
        DataError: the chat template refuses a prompt, or there is none for a chat; it has no tokens, or one without an
            embedding; or positions end before its answer. Up to ten are named at once.
        BaseModelError: the end of sequence is in a prompt and has no embedding.
        SettingsError: `prompts` is one text.
    """
    if isinstance(prompts, str):
        raise SettingsError("prompts is a text, not a list of them", fix="Write [prompt]")
    if tokenizer.chat_template is None and any(not isinstance(prompt, str) for prompt in prompts):
        require_template(tokenizer)  # here, or it would be said of every chat
    questions = []
    problems = Problems()
    for number, (prompt, most) in enumerate(zip(prompts, max_tokens, strict=True), 1):
        with problems:
            where = f"{unit} {number}"
            questions.append(_asked(tokenizer, prompt, where, reach=reach, embeddings=embeddings, max_tokens=most))
        if problems.is_full:
            break
    problems.raise_all("nothing was answered")
    if beyond := sum(len(ids) + most > made_for for ids, most in zip(questions, max_tokens, strict=True)):
        logger.warning(
            "%s: %d of %d may reach, with their answers, beyond the %d tokens of max_position_embeddings in the base's "
            "config, where answers get worse, unless rope scaling in its config is meant to reach there",
            *(unit, beyond, len(questions), made_for),
        )
    return questions


def limits_of(network: PreTrainedModel) -> dict[str, float]:
    """What `checked_prompt_ids` asks of a network, loaded or empty."""
    table: Any = network.get_input_embeddings()
    return {"reach": positions(network), "made_for": trained_positions(network), "embeddings": table.weight.shape[0]}


def _asked(
    tokenizer: PreTrainedTokenizerBase, prompt: Prompt, where: str, *, reach: float, embeddings: float, max_tokens: int
) -> list[int]:
    ids = prompt_ids(tokenizer, prompt, where)
    if not ids:
        raise DataError("the prompt has no tokens, so there is nothing to answer", where=where, fix="Fill it in")
    if len(ids) + max_tokens > reach:
        what = f"a prompt of {len(ids)} tokens and an answer of {max_tokens}; the base's positions end at {reach}"
        raise DataError(what, where=where, fix="Shorten one of them")
    require_embeddings(ids, tokenizer, embeddings, where)
    return ids


def answers(
    network: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    *,
    max_tokens: int = 128,
    batch_size: int = 16,
    unit: str = "prompt",
) -> list[str]:
    """Greedy answers to prompts, asked as in training, in the order given.

    Args:
        prompts: texts, the turns of chats, or chats with tools: dicts of `messages` and `tools`.
        max_tokens: of an answer, at most.
        batch_size: prompts at once; it does not change the answers beyond rounding.
        unit: what errors call a prompt; its number, from 1, follows.

    Raises:
        DataError: the chat template refuses a prompt, or there is none for a chat; it has no tokens, or one without an
            embedding; or learned positions end before its answer. Up to ten are named at once.
        BaseModelError: the end of sequence is in a prompt and has no embedding.
        SettingsError: a `Stack` on `network` has an adapter chosen for each row; here one answers all. Or `prompts`
            is one text.
    """
    refuse_rows(network)
    of_each = [max_tokens] * len(prompts)
    questions = checked_prompt_ids(tokenizer, prompts, of_each, unit=unit, **limits_of(network))
    return answers_of_ids(network, tokenizer, questions, of_each, batch_size=batch_size)


def answers_of_ids(
    network: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Sequence[int]],
    max_tokens: Sequence[int],
    *,
    batch_size: int = 16,
) -> list[str]:
    """Greedy answers to what `checked_prompt_ids` gave, of as many tokens at most as `max_tokens` says of each."""
    if not questions:  # of which batch_decode makes one empty answer
        return []
    ids = generate_ids(
        network,
        questions,
        max_tokens=max_tokens,
        ends=end_ids(tokenizer, network.generation_config.eos_token_id),
        pad_id=tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
        batch_size=batch_size,
    )
    return tokenizer.batch_decode(ids, skip_special_tokens=True)


class Asked(NamedTuple):
    """A row as a network is asked it: the token ids, the text that is expected, and the most tokens it may answer."""

    ids: list[int]
    expected: str
    max_tokens: int


def asked_of(
    network: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row], unit: str
) -> list[Asked]:
    """How rows with answers are asked.

    Args:
        unit: what errors call a row; its number, from 1, follows.

    Raises:
        DataError: messages that do not end with the assistant's turn after another; and as `checked_prompt_ids`.
        BaseModelError: as `checked_prompt_ids`.
    """
    ends = end_ids(tokenizer, network.generation_config.eos_token_id)
    found = [question_of(tokenizer, row, f"{unit} {number}", ends) for number, row in enumerate(rows, 1)]
    prompts, expected, max_tokens = zip(*found, strict=True)
    ids = checked_prompt_ids(tokenizer, prompts, max_tokens, unit=unit, **limits_of(network))
    return list(map(Asked, ids, expected, max_tokens))


def asked_row(
    tokenizer: PreTrainedTokenizerBase, row: Row, where: str, ends: Collection[int], embeddings: float
) -> Asked:
    """As `asked_of`, of one row, whatever its length."""
    prompt, expected, max_tokens = question_of(tokenizer, row, where, ends)
    ids = _asked(tokenizer, prompt, where, reach=math.inf, embeddings=embeddings, max_tokens=max_tokens)
    return Asked(ids, expected, max_tokens)


class Question(NamedTuple):
    """A row's question; what a model that says exactly what the row trains is read to say; and tokens to allow it."""

    prompt: Prompt
    expected: str
    max_tokens: int


def question_of(tokenizer: PreTrainedTokenizerBase, row: Row, where: str, ends: Collection[int]) -> Question:
    """How a row is asked.

    What is expected is not always the row's text: a template may write more (Qwen3's empty thoughts), a tokenizer
    normalize it. It is the row's text where the answer is learnt after something else than the question.

    Args:
        ends: the tokens that end an answer (`end_ids`).
    """
    prompt, answer = question_and_answer(row, where)
    longest = len(tokenizer(answer, add_special_tokens=False).input_ids) + 8
    ids = answer_ids(tokenizer, row, where)
    if ids is None and kind_of(row) == CHAT and calls_tools(row["messages"][-1]):
        what = "the chat template writes the call of a tool after something else than the question"
        raise DataError(what, where=where, fix="Use the metric loss, or let the template write the same in both")
    if ids is not None:
        (answer,) = tokenizer.batch_decode([before_end(ids, ends)], skip_special_tokens=True)
    return Question(prompt, answer, max(longest, len(ids or ())))
