"""The loss and the metrics of held-out rows, while training."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .. import distributed
from ..data.encoding import Encoded
from ..evaluation.inference import Asked, answers_of_ids
from ..evaluation.metrics import exact_match, prediction_metrics
from ..evaluation.scores import mean_loss, row_scores

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Validation:
    """How one task is validated while it trains.

    Attributes:
        rows: the encoded rows of the valid split.
        asked: the same rows, to answer them too (`exact_match`); empty otherwise.
    """

    rows: Sequence[Encoded]
    tokenizer: PreTrainedTokenizerBase
    asked: Sequence[Asked] = ()

    def run(
        self, network: PreTrainedModel, batch_size: int, told_to_stop: Callable[[], bool]
    ) -> dict[str, float] | None:
        """`loss`, and the metrics that apply. Every process scores its share of the rows.

        None when one of them is told to stop: it may take long.
        """
        mine, asked, pad_id = distributed.share(self.rows), distributed.share(self.asked), self.tokenizer.pad_token_id
        with _left_when(told_to_stop, network):
            scored = row_scores(network, mine, pad_id, batch_size=batch_size) if mine else []
            ids, max_tokens = [one.ids for one in asked], [one.max_tokens for one in asked]
            given = answers_of_ids(network, self.tokenizer, ids, max_tokens, batch_size=batch_size)
        if distributed.any_process(told_to_stop()):
            return None
        expected: list[Any] = distributed.all_gather([row["labels"] for row in mine])
        scored = distributed.all_gather(scored)
        found = {"loss": mean_loss(scored)}
        if not isinstance(expected[0], list):
            predicted = [prediction for _, _, prediction in scored]
            found |= prediction_metrics(predicted, expected, regression=isinstance(expected[0], float))
        if self.asked:
            pairs = distributed.all_gather(list(zip(given, (one.expected for one in asked), strict=True)))
            found["exact_match"] = exact_match([a for a, _ in pairs], [b for _, b in pairs])
        return found


class _Left(Exception):
    pass


@contextmanager
def _left_when(told_to_stop: Callable[[], bool], network: PreTrainedModel) -> Iterator[None]:
    """Leave the block before the next forward pass once `told_to_stop`."""

    def leave(*_: object) -> None:
        if told_to_stop():
            raise _Left

    hook = network.register_forward_pre_hook(leave)
    try:
        with suppress(_Left):
            yield
    finally:
        hook.remove()
