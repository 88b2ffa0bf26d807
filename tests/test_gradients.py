"""Rows that are drawn, and gradients summed over them: losses, weights, checkpointing, odd models."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from lorasb_export.base.model import BaseModel
from lorasb_export.base.structure import is_checkpointing
from lorasb_export.calibration import gradients
from lorasb_export.calibration.calibrate import calibrate
from lorasb_export.calibration.gradients import draw, gradient_sums, gradients_of_rows
from lorasb_export.choices import CAUSAL_LM
from lorasb_export.data.batches import collate
from lorasb_export.data.encoding import IGNORE, Encoded
from lorasb_export.data.task import load_task
from lorasb_export.errors import BaseModelError, DataError
from lorasb_export.layers.targets import find_targets
from lorasb_export.settings import CalibrationSettings
from tests.rows import encode
from tests.tiny import make_gpt2

PAD = 2
ROWS = 13
Sums = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def base(llama: Path) -> BaseModel:
    return BaseModel.resolve(llama)


@pytest.fixture(scope="module")
def network(base: BaseModel) -> PreTrainedModel:
    return base.load(dtype="float64")


@pytest.fixture(scope="module")
def rows(base: BaseModel, products: Path) -> list[Encoded]:
    task = load_task("products", products)
    return draw(task, base, [], CalibrationSettings(samples=ROWS))


def sums_of(network: PreTrainedModel, rows: list[Encoded], **changed: Any) -> Sums:
    targets = find_targets(network, "all-linear")
    return gradients_of_rows(network, targets, rows, PAD, CalibrationSettings(**changed))


def plain(network: PreTrainedModel, loss: Callable[[], torch.Tensor]) -> Sums:
    """What autograd says without any of our machinery."""
    targets = find_targets(network, "all-linear")
    network.requires_grad_(True)
    loss().backward()
    found = {name: module.weight.grad.clone() for name, module in targets.items()}
    network.requires_grad_(False)
    network.zero_grad()
    return found


def token_losses(network: PreTrainedModel, row: Encoded) -> torch.Tensor:
    ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"])
    losses = nn.functional.cross_entropy(network(ids).logits[0, :-1], labels[1:], ignore_index=IGNORE, reduction="none")
    return losses[labels[1:] != IGNORE]


def assert_equal(found: Sums, expected: Sums, tolerance: float = 1e-6) -> None:
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert (found[name] - gradient).norm() <= tolerance * gradient.norm(), name


def test_rows_that_are_drawn_keep_their_numbers(base: BaseModel, sums: Path) -> None:
    task = load_task("sums", sums)
    every = encode(task.rows("train"), base.tokenizer, CAUSAL_LM, [], 64)
    drawn = draw(task, base, [], CalibrationSettings(samples=5))
    assert len(drawn) == 5
    assert all(row == every[row["row"] - 1] for row in drawn)


@pytest.mark.parametrize(
    ("rows", "samples", "count"),
    [(64, 1, 1), (64, 65, 64), (64, 0.25, 16), (64, 0.001, 1), (16, None, 16), (64, None, 32), (40_000, None, 40)],
)
def test_a_count_or_a_share_of_the_rows_is_drawn(
    rows: int, samples: float | None, count: int, base: BaseModel, sums: Path
) -> None:
    task = load_task("sums", sums)
    task = replace(task, splits={"train": [task.rows("train")[0]] * rows})
    assert len(draw(task, base, [], CalibrationSettings(samples=samples))) == count


def test_others_are_drawn_in_the_place_of_rows_with_nothing_to_learn(base: BaseModel, sums: Path) -> None:
    """And where all have something, the rows are those of one sample, whose bases are pinned."""
    task = load_task("sums", sums)
    settings = CalibrationSettings(samples=5, max_length=32)
    numbers = [row["row"] for row in draw(task, base, [], settings)]
    assert numbers == random.Random(0).sample(range(1, 65), 5)
    too_long = {"prompt": "1" * 64, "completion": "2"}
    splits = {"train": [too_long if k in numbers[1:4] else row for k, row in enumerate(task.rows("train"), 1)]}
    drawn = draw(replace(task, splits=splits), base, [], settings)
    assert [row["row"] for row in drawn][:2] == [numbers[0], numbers[4]]
    assert (len({row["row"] for row in drawn} - set(numbers)), len(drawn)) == (3, 5)
    assert drawn == draw(replace(task, splits=splits), base, [], settings)
    splits = {"train": [too_long] * 9 + [task.rows("train")[0]]}
    assert [row["row"] for row in draw(replace(task, splits=splits), base, [], settings)] == [10]
    with pytest.raises(DataError, match="there is no row to learn from"):
        draw(replace(task, splits={"train": [too_long] * 9}), base, [], settings)


# --- losses and weights ---------------------------------------------------------------------------------------------


def test_sample_loss_is_that_of_plain_autograd(network: PreTrainedModel, rows: list[Encoded]) -> None:
    """The base's lm_head is tied to its embeddings, which are no target: nothing of theirs leaks into a sum."""
    assert network.get_output_embeddings().weight is network.get_input_embeddings().weight
    expected = plain(network, lambda: torch.stack([token_losses(network, row).mean() for row in rows]).sum())
    assert_equal(sums_of(network, rows), expected)


def test_token_loss_counts_every_token_the_same(network: PreTrainedModel, rows: list[Encoded]) -> None:
    expected = plain(network, lambda: ROWS * torch.cat([token_losses(network, row) for row in rows]).mean())
    found = sums_of(network, rows, loss="token")
    assert_equal(found, expected)
    name = next(iter(found))
    assert (found[name] - sums_of(network, rows)[name]).norm() > 0.01 * found[name].norm()


def test_sums_in_float16_are_those_of_float32(base: BaseModel) -> None:
    """A row's mean over so many labels would be lost in it."""
    text = "a sentence of so many words " * 70
    long = encode([{"text": text}], base.tokenizer, CAUSAL_LM, [], 2000)
    expected = sums_of(base.load(dtype="float32"), long)
    assert_equal(sums_of(base.load(dtype="float16"), long), expected, 0.005)


@pytest.mark.parametrize("loss", ["sample", "token"])
def test_sums_are_blind_to_batches_order_and_padding(loss: str, network: PreTrainedModel, rows: list[Encoded]) -> None:
    one_by_one = sums_of(network, rows, loss=loss, batch_size=1)
    order = torch.randperm(ROWS, generator=torch.Generator().manual_seed(0)).tolist()
    shuffled = [rows[i] for i in order]
    for other in (
        sums_of(network, rows, loss=loss, batch_size=3),
        sums_of(network, rows, loss=loss, batch_size=8),
        sums_of(network, shuffled, loss=loss, batch_size=3),
    ):
        assert_equal(other, one_by_one)
    longer = collate([*rows, {"input_ids": [5] * 40, "labels": [IGNORE] * 39 + [5]}], PAD)
    padded = {key: value if key == "logits_to_keep" else value[:-1] for key, value in longer.items()}
    assert padded["input_ids"].shape == (ROWS, 40)
    found = gradient_sums(
        network, find_targets(network, "all-linear"), [padded], loss=loss, gradient_checkpointing=True
    )
    assert_equal(found, one_by_one)


def test_a_weight_multiplies_the_losses_of_a_task(network: PreTrainedModel, rows: list[Encoded]) -> None:
    mine, others = rows[:5], rows[5:]
    targets, settings = find_targets(network, "all-linear"), CalibrationSettings(batch_size=3)
    weighted = gradients_of_rows(network, targets, rows, PAD, settings, [2.5] * 5 + [1.0] * (ROWS - 5))
    first, second = sums_of(network, mine), sums_of(network, others)
    assert_equal(weighted, {name: 2.5 * first[name] + second[name] for name in first})


# --- where the sums lie ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_gradients_are_summed_in_fp32_exactly_one_after_another(
    base: BaseModel, rows: list[Encoded], dtype: str
) -> None:
    """Of batches whose losses are scaled by different powers of two."""
    network, parts = base.load(dtype=dtype), [rows[:3], rows[3:8], rows[8:]]
    found = gradient_sums(
        network,
        find_targets(network, "all-linear"),
        [collate(part, PAD) for part in parts],
        loss="sample",
        gradient_checkpointing=True,
    )
    first, second, third = (sums_of(network, part) for part in parts)
    for name, total in found.items():
        assert total.dtype == torch.float32
        assert torch.equal(total, first[name] + second[name] + third[name]), name


def test_sums_lie_on_a_gpu_that_has_room_for_three_of_them(
    network: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    targets, cpu, gpu = find_targets(network, "all-linear"), torch.device("cpu"), torch.device("cuda", 1)
    assert gradients._place(network, targets) == cpu
    needed = 4 * sum(module.weight.numel() for module in targets.values())  # bfloat16 is summed in float32
    free = {gpu: 3 * needed + 1}
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free[device], 80 << 30))
    on_gpu: Any = SimpleNamespace(device=gpu, dtype=torch.bfloat16)
    assert gradients._place(on_gpu, targets) == gpu
    free[gpu] = 3 * needed
    assert gradients._place(on_gpu, targets) == cpu
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 2)  # of which torch keeps one that nobody has
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 1)
    assert gradients._place(on_gpu, targets) == gpu


@pytest.mark.parametrize("loss", ["sample", "token"])
def test_passes_never_wait_for_a_device_that_holds_the_sums(
    base: BaseModel, rows: list[Encoded], loss: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`meta` stands for one: what asks a tensor there for its value, or copies it to the host, raises."""
    network = base.load(device="meta")
    monkeypatch.setattr(gradients, "_place", lambda *_: torch.device("meta"))
    monkeypatch.setattr("transformers.masking_utils.find_packed_sequence_indices", lambda _: None)  # it does, once

    def batches() -> Iterator[dict[str, Any]]:
        yield collate(rows[:3], PAD) | {"weights": torch.ones(3)}
        yield collate(rows[3:8], PAD) | {"weights": torch.ones(5)}
        raise EOFError("the passes are over")

    with pytest.raises(EOFError, match="the passes are over"):
        gradient_sums(network, find_targets(network, "all-linear"), batches(), loss=loss, gradient_checkpointing=True)


# --- gradient checkpointing -----------------------------------------------------------------------------------------


def saved_bytes(work: Callable[[], object]) -> int:
    """Bytes of the tensors that forward keeps for backward, each storage once; a checkpoint's own are not kept."""
    storages = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        work()
    return sum(storages.values())


def test_checkpointing_keeps_less_and_changes_nothing(network: PreTrainedModel, rows: list[Encoded]) -> None:
    assert_equal(sums_of(network, rows), sums_of(network, rows, gradient_checkpointing=False))
    less = saved_bytes(lambda: sums_of(network, rows, batch_size=ROWS))
    more = saved_bytes(lambda: sums_of(network, rows, gradient_checkpointing=False, batch_size=ROWS))
    assert less < 0.6 * more


def test_checkpointing_leaves_the_network_as_it_was(network: PreTrainedModel, rows: list[Encoded]) -> None:
    layer = network.model.layers[0]
    seen: list[bool | None] = []
    handle = layer.register_forward_pre_hook(lambda *_: seen.append(network.config.use_cache))
    targets = find_targets(network, "all-linear")
    good = collate(rows[:2], PAD)
    broken = {**good, "labels": good["labels"].repeat(2, 1)}  # fails after the forward pass
    for batch, outcome in ((good, nullcontext()), (broken, pytest.raises((ValueError, RuntimeError)))):
        with outcome:
            gradient_sums(network, targets, [batch], loss="sample", gradient_checkpointing=True)
        assert "forward" not in vars(layer)
        assert network.config.use_cache is True
        assert not network.training
        assert not any(p.requires_grad or p.grad is not None for p in network.parameters())
    handle.remove()
    assert set(seen) == {False}


def test_a_network_that_checkpoints_already_goes_on_doing_so(base: BaseModel, rows: list[Encoded]) -> None:
    network = base.load(dtype="float64")
    calls: list[object] = []
    network.model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(None))
    without = {"batch_size": ROWS, "gradient_checkpointing": False}
    expected = sums_of(network, rows, **without)
    assert len(calls) == 1
    network.gradient_checkpointing_enable()
    assert_equal(sums_of(network, rows, **without), expected)
    assert len(calls) == 3  # once forward, once more in backward
    assert is_checkpointing(network)


def test_a_model_that_cannot_checkpoint_does_without(
    network: PreTrainedModel, rows: list[Encoded], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[object] = []
    handle = network.model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(None))
    monkeypatch.setattr(type(network), "supports_gradient_checkpointing", False)
    sums_of(network, rows, batch_size=ROWS)
    handle.remove()
    assert len(calls) == 1  # forward alone


# --- odd models -----------------------------------------------------------------------------------------------------


def test_oracle_23_conv1d_gradients_are_turned(rows: list[Encoded], tmp_path: Path) -> None:
    network = BaseModel.resolve(make_gpt2(tmp_path / "gpt2")).load(dtype="float64")
    expected = plain(network, lambda: torch.stack([token_losses(network, row).mean() for row in rows]).sum())
    found = sums_of(network, rows)
    assert_equal(found, {name: gradient.T for name, gradient in expected.items()})
    assert found["transformer.h.0.attn.c_attn"].shape == (96, 32)  # (out, in)


def test_non_finite_gradient_is_reported(llama: Path, sums: Path) -> None:
    base = BaseModel.resolve(llama)
    network = base.load()
    network.model.layers[0].mlp.up_proj.weight.data[0, 0] = float("inf")
    with pytest.raises(BaseModelError, match="not finite"):
        calibrate(base, {"sums": sums}, CalibrationSettings(rank=4), network=network)
    assert not any(torch.isnan(p).any() for p in network.model.layers[1].parameters())
