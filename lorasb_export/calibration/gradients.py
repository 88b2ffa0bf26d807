"""Gradients of a task's loss at W0, summed over a few rows: what a basis is made from, and what it is measured on."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.pytorch_utils import Conv1D

from ..bars import progress_bar
from ..base.borrowed import evaluating, flags_kept, without_cache
from ..base.model import BaseModel
from ..base.nf4 import state_of
from ..base.products import apply_linear, shape_of, weight_of
from ..base.structure import is_checkpointing
from ..data.batches import collate, label_counts, row_losses
from ..data.encoding import Encoded, encode_all, without_left_out
from ..data.task import TaskData
from ..distributed import share, world_size
from ..errors import BaseModelError
from ..settings import CalibrationSettings

if TYPE_CHECKING:
    from transformers import PreTrainedModel


MIN_ROWS = 32  # rows of a task, where nobody says how many


def draw(
    task: TaskData, base: BaseModel, labels: Sequence[Any], settings: CalibrationSettings, *, least: int = MIN_ROWS
) -> list[Encoded]:
    """The training rows that `settings` draws from `task`, encoded for a `base` with a head whose classes are `labels`.

    Where `settings` leaves their number open, 0.1 % of the rows as in the paper, but not less than `least`. In the
    place of rows that `encode` leaves out others are drawn, while there are any.

    Raises:
        DataError, BaseModelError: as `encode`.
    """
    rows = list(enumerate(task.rows("train"), 1))
    wanted = settings.samples
    if wanted is None:
        wanted = max(least, round(len(rows) / 1000))
    count = max(1, round(len(rows) * wanted)) if wanted < 1 else int(wanted)
    dice, unit = random.Random(settings.seed), task.unit("train")
    options: dict[str, Any] = {"max_length": settings.max_length, "unit": unit, "embeddings": base.embeddings}
    drawn = dict(dice.sample(rows, min(count, len(rows))))
    encoded = encode_all(drawn, base.tokenizer, task.task_type, labels, **options)
    if lacking := sum(row["left_out"] is not None for row in encoded):
        others = [row for row in rows if row[0] not in drawn]
        for number, row in dice.sample(others, len(others)):
            encoded += encode_all({number: row}, base.tokenizer, task.task_type, labels, **options)
            lacking -= encoded[-1]["left_out"] is None
            if not lacking:
                break
    return without_left_out(encoded, settings.max_length, unit)


def gradients_of_rows(
    network: PreTrainedModel,
    targets: Mapping[str, torch.nn.Module],
    rows: Sequence[Encoded],
    pad_id: int,
    settings: CalibrationSettings,
    weights: Sequence[float] | None = None,
) -> dict[str, torch.Tensor]:
    """`gradient_sums` over `rows` in batches, each row's loss multiplied by its weight.

    Processes that joined torch.distributed share the rows, and every one gets the sums over all of them.
    """
    weighted = share(list(zip(rows, [1.0] * len(rows) if weights is None else weights, strict=True)))
    batches = []
    for i in range(0, len(weighted), settings.batch_size):
        batch, factors = zip(*weighted[i : i + settings.batch_size], strict=True)
        batches.append({**collate(batch, pad_id), "weights": torch.tensor(factors)})
    return gradient_sums(
        network,
        targets,
        progress_bar(batches, desc="gradients"),
        loss=settings.loss,
        gradient_checkpointing=settings.gradient_checkpointing,
    )


def of_share(sums: dict[str, torch.Tensor], device: torch.device, desc: str) -> Iterator[tuple[str, torch.Tensor]]:
    """This process's share of the modules: name and sum, on `device`. Sums are freed as they are used, others at once.

    `desc` is what the progress bar is called.
    """
    mine = share(sorted(sums))
    for name in sums.keys() - set(mine):
        del sums[name]
    if device.type == "cuda":
        torch.cuda.empty_cache()  # of the passes: the libraries that decompose take memory beside torch
    for name in progress_bar(mine, desc=desc):
        yield name, sums.pop(name).to(device)


def gradient_sums(
    network: PreTrainedModel,
    targets: Mapping[str, torch.nn.Module],
    batches: Iterable[dict[str, Any]],
    *,
    loss: str,
    gradient_checkpointing: bool,
) -> dict[str, torch.Tensor]:
    """Σ over rows of ∂(loss of the row)/∂W for every target: module name → (out, in), fp32, where `_place` says.

    The loss of a row is the mean over its tokens (`sample`: every row counts the same), or the sum over them times
    rows/tokens of the whole data (`token`: every token counts the same); neither depends on what batch a row is in.
    A gradient is added to its sum and freed as soon as backward has made it: beside the sums there is never more than
    one layer's. In several processes the sums are those over the batches of all of them.

    Args:
        batches: as `collate` makes them; in addition `weights` (n,), by which the losses of the rows are multiplied.
        gradient_checkpointing: recompute the inside of every layer in backward, where the network's class can; done in
            any case where it is switched on in the network.

    Raises:
        BaseModelError: a gradient is not finite.
    """
    sums: dict[str, torch.Tensor] = {}
    scale = 1  # of the losses of a batch, lest float16 lose the gradients of means; a power of two changes no digit
    counted = torch.zeros(2, dtype=torch.float64)  # rows and tokens
    place = _place(network, targets)

    def keep(name: str, gradient: torch.Tensor) -> None:
        gradient = gradient.to(place)
        if name in sums:
            sums[name].add_(gradient, alpha=1 / scale)
        else:
            sums[name] = gradient.to(torch.promote_types(gradient.dtype, torch.float32)).div_(scale)

    packed = {name: module for name, module in targets.items() if state_of(weight_of(module))}
    plain = {name: module for name, module in targets.items() if name not in packed}
    wanted = gradient_checkpointing and network.supports_gradient_checkpointing
    checkpointed = wanted or is_checkpointing(network)
    with (
        _only_trainable(network, plain, keep),
        _gradients_of_packed(packed, keep),
        _checkpointed(network) if checkpointed else nullcontext(),
    ):
        for batch in batches:
            lengths = label_counts(batch["labels"]).tolist()  # on the host: nothing here waits for the device
            counted += torch.tensor([len(lengths), sum(lengths)])
            tensors = {key: v.to(network.device) for key, v in batch.items()}
            labels, factors = tensors.pop("labels"), tensors.pop("weights", 1)
            losses, counts = row_losses(network(**tensors).logits, labels)
            if loss == "sample":
                scale = 1 << (max(lengths) - 1).bit_length()
                losses = losses / counts * scale
            (factors * losses).sum().backward()

    rows, tokens = _over_processes(counted, network.device).tolist()
    for name, module in targets.items():
        transposed = isinstance(module, Conv1D)  # it stores its weight as (in, out)
        if name not in sums:
            shape = shape_of(module)[:: -1 if transposed else 1]
            sums[name] = torch.zeros(shape, dtype=torch.promote_types(network.dtype, torch.float32), device=place)
        total = _over_processes(sums[name], network.device)
        if loss == "token":
            total *= rows / tokens
        if not math.isfinite(total.sum()):  # as it is not with a NaN or infinity anywhere; isfinite() makes copies
            raise BaseModelError("the gradient is not finite", where=name, fix="Calibrate in float32 (--dtype float32)")
        sums[name] = total.T if transposed else total
    return sums


def _place(network: PreTrainedModel, targets: Mapping[str, nn.Module]) -> torch.device:
    """Where gradients are summed: beside the network on a GPU with room for three times the sums, else on the CPU.

    The rest is for activations, and for the decompositions of the sums. On the CPU every gradient is waited for.
    """
    numbers = sum(math.prod(shape_of(module)) for module in targets.values())
    needed = numbers * torch.promote_types(network.dtype, torch.float32).itemsize
    if network.device.type == "cuda" and 3 * needed < _free(network.device):
        return network.device
    return torch.device("cpu")


def _free(device: torch.device) -> int:
    """Bytes of a GPU that nobody has, and that torch keeps of what was freed: of the passes before, maybe."""
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + kept


def _over_processes(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Σ of a tensor over the processes that share the rows, where it lies; every one of them must come here.

    It goes through `device` where the backend is not gloo: the others sum only what lies there.
    """
    if world_size() == 1:
        return tensor
    moved = tensor.to("cpu" if dist.get_backend() == "gloo" else device)
    dist.all_reduce(moved)
    return moved.to(tensor.device)


@contextmanager
def _only_trainable(
    network: PreTrainedModel, modules: Mapping[str, Any], keep: Callable[[str, torch.Tensor], None]
) -> Iterator[None]:
    """Let only the weights of `modules` require gradients, which `keep` is given and frees, with dropout and the KV
    cache off; all is restored afterwards.
    """

    def hook(name: str, weight: torch.Tensor) -> None:
        assert weight.grad is not None
        keep(name, weight.grad)
        weight.grad = None

    handles = []
    try:
        with flags_kept(network), evaluating(network), without_cache(network):
            network.requires_grad_(False)
            for name, module in modules.items():
                module.weight.requires_grad_(True)
                handles.append(module.weight.register_post_accumulate_grad_hook(partial(hook, name)))
            yield
    finally:
        for handle in handles:
            handle.remove()
        for parameter in network.parameters():
            parameter.grad = None


def _checkpointed(network: PreTrainedModel) -> AbstractContextManager[None]:
    """Keep of every layer its inputs alone. transformers does it only in training mode, with dropout on."""
    layers = [module for module in network.modules() if isinstance(module, GradientCheckpointingLayer)]
    return _other_forwards(
        {m: partial(checkpoint, m.forward, use_reentrant=False, preserve_rng_state=False) for m in layers}
    )


def _gradients_of_packed(
    modules: Mapping[str, nn.Module], keep: Callable[[str, torch.Tensor], None]
) -> AbstractContextManager[None]:
    """In backward passes within, `keep(name, gradient (out, in))` for every packed weight."""
    wanted = torch.zeros((), requires_grad=True)  # the first layer's input asks for no gradient
    return _other_forwards(
        {m: partial(apply_linear, m, keep=partial(keep, name), wanted=wanted) for name, m in modules.items()}
    )


@contextmanager
def _other_forwards(forwards: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Module → what is called within in place of its `forward`; someone else's wrapper is put back afterwards."""
    before = {module: vars(module).get("forward") for module in forwards}
    try:
        for module, forward in forwards.items():
            module.forward = forward
        yield
    finally:
        for module, wrapper in before.items():
            del module.forward
            if wrapper is not None:
                module.forward = wrapper
