"""What transformers' Trainer changes in the process and in the network, put back when a run has ended."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING

import numpy as np
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState

from .. import distributed
from ..base.borrowed import flags_kept
from ..base.structure import is_checkpointing
from ..layers.inject import remove

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_OF_MPI = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")  # what accelerate reads beside WORLD_SIZE


@contextmanager
def left_as_found(network: PreTrainedModel) -> Iterator[None]:
    """The network may be the caller's, or the next task's. What adapter is on it is taken off, before and after."""
    remove(network)  # or what is looked for in the base would be looked for in that
    caches, checkpoints = getattr(network.config, "use_cache", None), is_checkpointing(network)
    dtypes = {parameter: parameter.dtype for parameter in network.parameters()}
    try:
        with flags_kept(network):
            yield
    finally:
        distributed.send_all(network)
        remove(network)
        for parameter, dtype in dtypes.items():
            parameter.data = parameter.data.to(dtype)  # of a head, which is trained in fp32
        network.eval()
        if caches is not None:
            network.config.use_cache = caches
        if is_checkpointing(network) and not checkpoints:
            renamed = getattr(network, "activation_checkpointing_disable", None)
            (renamed or network.gradient_checkpointing_disable)()
            network.disable_input_require_grads()


@contextmanager
def random_state_kept(device: torch.device) -> Iterator[None]:
    """The Trainer seeds python, numpy and torch, and so whatever the caller draws after it."""
    python, of_numpy = random.getstate(), np.random.get_state()
    try:
        of_mps = torch.random.fork_rng([0], device_type="mps") if device.type == "mps" else nullcontext()
        cudas = range(torch.cuda.device_count()) if device.type == "cuda" else ()  # the Trainer seeds them all
        with of_mps, torch.random.fork_rng(list(cudas)):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(of_numpy)


@contextmanager
def accelerate_kept() -> Iterator[None]:
    """The Trainer makes accelerate's state anew, which is one for the process: an Accelerator of the caller's would
    accumulate and cast otherwise afterwards, and one that is made then be refused.

    Runs that mpirun, or srun for MPI, starts side by side are none the less each by itself: on a CPU accelerate would
    join them, and average the gradients of different tasks.
    """
    alone = distributed.world_size() == 1
    hidden = {name: os.environ.pop(name) for name in _OF_MPI if alone and name in os.environ}
    states = [state._shared_state for state in (PartialState, AcceleratorState, GradientState)]
    before = [dict(state) for state in states]
    try:
        yield
    finally:
        os.environ.update(hidden)
        for state, old in zip(states, before, strict=True):
            state.clear()
            state.update(old)
