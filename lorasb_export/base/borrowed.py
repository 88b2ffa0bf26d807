"""A network that is used for a while, and afterwards is as it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@contextmanager
def evaluating(network: PreTrainedModel) -> Iterator[None]:
    """Without dropout; then in the mode it was in, which a loop of one's own may have left at training."""
    training = network.training
    network.eval()
    try:
        yield
    finally:
        network.train(training)


@contextmanager
def without_cache(network: PreTrainedModel) -> Iterator[None]:
    """Forward passes keep no keys and values: nobody goes on from them."""
    caches = getattr(network.config, "use_cache", None)
    if caches:
        network.config.use_cache = False
    try:
        yield
    finally:
        if caches:
            network.config.use_cache = caches


@contextmanager
def flags_kept(network: PreTrainedModel) -> Iterator[None]:
    """Afterwards its own parameters ask for gradients as before: an adapter freezes them."""
    flags = {parameter: parameter.requires_grad for parameter in network.parameters()}
    try:
        yield
    finally:
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)
