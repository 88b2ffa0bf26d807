"""The harness of the quality tables: a run is kept and not repeated, the best rate lies inside the ladder."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from integration.bench import basis, quality
from integration.bench.basis_tables import comparable, correlation, equal_rates, pairs
from integration.bench.comparisons import between, draws, four_bits, rate_steps, small_lora, unlisted
from integration.bench.method_tables import by_method, longer, marked, methods_table, metric, settled, sharing
from integration.bench.method_tables import loss as shown_loss
from integration.bench.report import known, pages, with_tables
from integration.bench.tradeoff import family
from integration.evidence.best import best_rates, identity
from integration.evidence.captures import captures
from integration.evidence.cells import (
    DATA,
    LADDER,
    RESULTS,
    RUNS,
    Budget,
    Cell,
    OutOfTime,
    Results,
    Runner,
    cell,
    tuned,
)
from integration.evidence.models import base_of
from integration.evidence.scores import some
from integration.evidence.training import SCALED, basis_of, gradient, weight_basis
from lorasb_export.calibration.subspace import CaptureRatios
from lorasb_export.data.encoding import encode
from lorasb_export.data.task import load_task
from lorasb_export.settings import CalibrationSettings

needs_data = pytest.mark.skipif(not DATA.exists(), reason="the task data is not there")


class Bowl(Runner):
    """In place of training: a loss whose least is at `best`."""

    def __init__(self, results: Results, best: float) -> None:
        super().__init__(results, Budget(None))
        self.best, self.asked = LADDER.index(best), set[float]()

    def __call__(self, cell: Cell) -> dict[str, Any]:
        self.asked.add(cell.lr)
        return {"loss": abs(LADDER.index(cell.lr) - self.best)}


@pytest.mark.parametrize("best", [1e-4, 1e-2, 3e-1])
def test_the_ladder_is_followed_to_its_lowest_rate(best: float, tmp_path: Path) -> None:
    assert tuned(cell("sst2", method="lora-sb"), Bowl(Results(tmp_path / "r"), best)).lr == best


def test_a_search_goes_on_where_an_earlier_one_was(tmp_path: Path) -> None:
    of, results = cell("sst2", method="lora-sb"), Results(tmp_path / "r")
    results.add({"key": replace(of, lr=3e-5).key, "loss": 0})
    bowl = Bowl(results, 1e-5)
    assert tuned(of, bowl).lr == 1e-5
    assert bowl.asked == {1e-5, 3e-5, 1e-4}


def test_every_rank_is_trained_in_everywhere_and_other_calibrations_where_something_is_learnt() -> None:
    assert [of.basis for of in basis.trained_in("rte", {"rank": 16})] == [
        *("own", "mixture", "without", "sst2", "wsvd", "random")
    ]
    assert [of.basis for of in basis.trained_in("sst2", {"samples": 8})] == ["own", "mixture"]
    assert not basis.trained_in("rte", {"samples": 8})


@needs_data
def test_the_data_is_that_which_the_page_names() -> None:
    for task, of in json.loads((RESULTS / "data.json").read_text()).items():
        for split, file in of["files"].items():
            content = (DATA / task / f"{split}.jsonl").read_bytes()
            assert hashlib.sha256(content).hexdigest() == file["sha256"], (task, split)
            assert content.count(b"\n") == file["rows"]


@pytest.mark.parametrize(("method", "orthonormal"), [("lora-xs", "B"), ("lora-xs-mirrored", "A"), ("lora-sb", "AB")])
def test_lora_xs_has_the_singular_values_beside_the_input(method: str, orthonormal: str) -> None:
    """The SVD of a weight's transpose, (U·Σ, Vᵀ), as the code of LoRA-XS takes it: the former is its A, transposed."""
    config = LlamaConfig(hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, vocab_size=9)
    network = LlamaForCausalLM(config)
    of = weight_basis(network, Cell("t", method, rank=4), scaled=SCALED.get(method))
    weight = network.model.layers[0].mlp.down_proj.weight.detach()
    module = of.modules["model.layers.0.mlp.down_proj"]
    U, S, Vh = torch.linalg.svd(weight.T, full_matrices=False)
    if method in SCALED:
        torch.testing.assert_close(module.B @ module.A, ((U[:, :4] * S[:4]) @ Vh[:4]).T)
    for name in orthonormal:
        factor = module.B.T if name == "B" else module.A
        torch.testing.assert_close(factor @ factor.T, torch.eye(4))


def test_a_rate_at_the_end_of_those_tried_is_not_known_to_be_the_best() -> None:
    lines = [{"task": "t", "method": "lora", "seed": 0, "lr": lr, "loss": lr} for lr in (1e-3, 3e-3)]
    (best,) = best_rates([*lines, {**lines[1], "seed": 1, "loss": 0}]).values()
    assert (best.lines, best.closed) == ([lines[0]], False)
    (best,) = best_rates([*lines, {**lines[0], "lr": 1e-4, "loss": 1}]).values()
    assert (best.lines, best.closed) == ([lines[0]], True)


def test_a_basis_whose_search_has_not_ended_is_compared_where_the_rate_of_the_own_was_tried() -> None:
    line = {"task": "t", "method": "lora-sb", "seed": 0, "basis": "own", "balanced": False}
    own = [{**line, "lr": lr, "loss": abs(lr - 3e-3)} for lr in (1e-3, 3e-3, 1e-2)]
    other = [{**line, "basis": "random", "lr": lr, "loss": 1 - lr} for lr in (3e-3, 1e-2)]

    def compared(lines: list[dict[str, Any]]) -> set[tuple[str, float]]:
        best = best_rates(lines)
        found = [comparable(best, identity) for identity in best]
        return {(of.lines[0]["basis"], of.lines[0]["lr"]) for of in found if of}

    assert compared([*own, *other]) == {("own", 3e-3), ("random", 1e-2)}
    assert compared([*own, *other[1:]]) == {("own", 3e-3)}
    assert compared([*own[1:], *other]) == set()


def test_losses_are_compared_with_those_of_lora_seed_by_seed() -> None:
    rest = {"metric": "accuracy", "value": 0.5, "trainable": 1, "adapter_bytes": 4, "seconds": 1.0}

    def lines(method: str, losses: list[float]) -> list[dict[str, Any]]:
        cells = [cell("sst2", **quality.METHODS[method], lr=1e-3, seed=seed) for seed in range(len(losses))]
        return [{**of.fields, "loss": loss, **rest} for of, loss in zip(cells, losses, strict=True)]

    found = by_method(best_rates([*lines("LoRA r=8", [0.5, 0.25]), *lines("block, r=64", [0.25, 0.125, 0.75])]))
    assert found["block, r=64", "sst2"]["less_lora"] == [-0.25, -0.125]


def test_sharing_is_compared_seed_by_seed_where_both_searches_have_ended() -> None:
    rest = {"metric": "accuracy", "trainable": 1, "adapter_bytes": 4, "seconds": 1.0}

    def lines(task: str, basis: str, values: dict[int, float], rates: tuple[float, ...]) -> list[dict[str, Any]]:
        fields = quality.METHODS[f"{basis} basis, r=64"]
        cells = [cell(task, **fields, lr=rate) for rate in rates if rate != 1e-2]
        cells += [cell(task, **fields, lr=1e-2, seed=seed) for seed in values]
        return [{**of.fields, "value": values[of.seed], "loss": abs(of.lr - 1e-2), **rest} for of in cells]

    closed = (3e-3, 1e-2, 3e-2)
    runs = [*lines("sst2", "own", {0: 0.5, 1: 0.25}, closed), *lines("sst2", "shared", {0: 0.75, 1: 0.25}, closed)]
    runs += [*lines("sst2", "random", {0: 0.5}, closed[:2]), *lines("sst2", "balanced", {0: 0.5}, closed)]
    runs += [*lines("cola", "own", {0: 0.5}, closed), *lines("cola", "shared", {0: 0.25}, closed)]
    assert sharing(by_method(best_rates(runs))).splitlines()[2:] == [
        "| all linear layers, r = 64: cola, accuracy | -25.0 | +0.000 |  |  |  |  |",
        "| all linear layers, r = 64: sst2, accuracy | +12.5 ± 12.5 | +0.000 ± 0.000 | +0.0 | +0.000 |  |  |",
        "| **mean** | **-6.2** |  |  |  |  |  |",
        "| **mean without cola** | **+12.5 ± 12.5** |  |  |  |  |  |",
    ]


def test_longer_runs_have_a_table_of_their_own() -> None:
    rest = {"metric": "exact_match", "value": 0.5, "trainable": 1, "adapter_bytes": 4, "seconds": 1.0}
    cells = [cell("banking77", **quality.METHODS["LoRA r=8"], lr=lr, steps=600) for lr in (1e-3, 3e-3, 1e-2)]
    lines = [{**of.fields, "loss": abs(of.lr - 3e-3), **rest} for of in cells]
    best = best_rates([*lines, {**lines[0], "steps": 120, "lr": 1e-1}])
    assert longer(by_method(best, steps=600)).splitlines()[2:] == [
        "| banking77: LoRA r=8 | 1 | 50.0 (1) | 0.000 | 1e-03, **3e-03**, 1e-02 |"
    ]


def test_capture_is_compared_with_the_loss_within_each_task() -> None:
    """Between the tasks both differ, which says nothing of a basis; nor does a task of larger losses say more."""
    line = {"method": "lora-sb", "rank": 64, "optimizer": "muon", "seed": 0, "balanced": False}

    def of(task: str, losses: dict[str, float]) -> list[dict[str, Any]]:
        rates = {1e-3: 9.0, 3e-3: 0.0, 1e-2: 9.0}
        return [
            {**line, "task": task, "basis": basis, "lr": lr, "loss": loss + more}
            for basis, loss in losses.items()
            for lr, more in rates.items()
        ]

    lines = of("e2e", {"own": 1, "mixture": 2, "random": 3, "wsvd": 4})
    lines += of("sst2", {"own": 7, "mixture": 7, "random": 207, "wsvd": 107})
    lines += of("cola", {"own": 7, "mixture": 7, "random": 9})
    shares = {"own": 0.5, "mixture": 0.375, "random": 0.25, "wsvd": 0.125}
    captured = [{**line, "optimizer": "adamw", "capture": shares[line["basis"]]} for line in lines]
    points = pairs(best_rates(lines), {identity(line): line for line in captured})
    assert points == {
        "Muon, r = 64": {
            "e2e": ([-0.125, -0.25, -0.375], [1, 2, 3]),
            "sst2": ([-0.125, -0.25, -0.375], [0, 200, 100]),
            "cola": ([-0.125, -0.25], [0, 2]),
        },
    }
    said = "-0.75 of 6 pairs within the tasks (e2e -1.00 of 3, sst2 -0.50 of 3)"
    assert correlation(points["Muon, r = 64"]) == said  # of two pairs none


REST = {"metric": "exact_match", "value": 0.5, "trainable": 1, "adapter_bytes": 4, "seconds": 1.0}


def searched(of: Cell, losses: dict[float, float], **rest: Any) -> list[dict[str, Any]]:
    """The lines of a search with the first seed."""
    return [{**replace(of, lr=lr).fields, "loss": loss, **REST, **rest} for lr, loss in losses.items()]


def test_every_result_is_found_again_by_its_fields() -> None:
    names = {field.name for field in dataclasses.fields(Cell)}
    for key, line in Results(RUNS).lines().items():
        assert Cell(**{name: value for name, value in line.items() if name in names}).key == key


def test_a_difference_is_clear_from_four_errors_of_three_seeds() -> None:
    assert marked([0.3, 0.4, 0.5]) == "+0.400 ± 0.058 †"
    assert marked([0.1, 0.4, 0.5]) == "+0.333 ± 0.120"
    assert (marked([0.5, 0.5]), marked([0.5])) == ("+0.500 ± 0.000", "+0.500")
    assert marked([0.0, 0.0, 0.0]) == "+0.000 ± 0.000"


def test_no_difference_is_clear_on_a_task_that_is_not_learnt_or_before_the_search_has_ended() -> None:
    of = {"steps": 120, "loss": 1.0, "less_lora": [0.5, 0.5, 0.5]}
    assert shown_loss({**of, "task": "e2e", "closed": True}) == "1.000 (+0.500 ± 0.000 †)"
    assert shown_loss({**of, "task": "e2e", "closed": False}) == "1.000 (+0.500 ± 0.000) *"
    assert shown_loss({**of, "task": "boolq", "closed": True}) == "1.000 (+0.500 ± 0.000)"


def test_another_number_of_seeds_than_three_is_told() -> None:
    of = {"mean": 0.5, "sd": 0.01, "seeds": 6, "steps": 120, "closed": True}
    assert [metric(of | {"seeds": seeds}) for seeds in (2, 3, 6)] == ["50.0 ± 1.0 (2)", "50.0 ± 1.0", "50.0 ± 1.0 (6)"]


def test_the_tables_do_with_a_method_that_is_not_there_or_on_some_tasks() -> None:
    rates = {1e-3: 1.0, 3e-3: 0.5, 1e-2: 1.0}
    large = [
        line for task in ("banking77", "e2e") for line in searched(cell(task, **quality.METHODS["LoRA r=8"]), rates)
    ]
    found = by_method(best_rates(large))
    assert "LoRA r=2" not in methods_table(found, shown_loss)
    assert "(r = 2" not in between(found)
    assert "parameters; on banking77, e2e, mawps, cola and sst2 it was not run." in small_lora(found)
    begun = searched(cell("banking77", **quality.METHODS["LoRA r=2"]), {3e-3: 0.75})
    found = by_method(best_rates([*large, *begun]))
    assert "LoRA r=2" in methods_table(found, shown_loss)
    assert "LoRA r=2" not in methods_table(found, settled)
    said = "on banking77 its rate search has not ended; on e2e, mawps, cola and sst2 it was not run."
    assert said in small_lora(found)
    small = searched(cell("banking77", **quality.METHODS["LoRA r=2"]), {**rates, 3e-3: 0.75})
    found = by_method(best_rates([*large, *small]))
    assert "| LoRA r=2 | 1 | 0.750 (+0.250) |  |" in methods_table(found, shown_loss)
    assert "on banking77 it is in the tables; on e2e, mawps, cola and sst2 it was not run." in small_lora(found)


def test_what_a_step_of_the_rate_costs_is_told_of_searches_that_have_ended() -> None:
    of = cell("e2e", **quality.METHODS["own basis, r=64"])
    lines = searched(of, {1e-3: 1.0}, value=0.25) + searched(of, {3e-3: 0.5}) + searched(of, {1e-2: 1.0}, value=0.375)
    lines += searched(replace(of, basis="random"), {1e-3: 0.5, 3e-3: 1.0}) + searched(
        replace(of, task="rte"), {1e-3: 1}
    )
    ours, others = rate_steps(best_rates(lines)).splitlines()[2:]
    assert ours == "| LoRA-SB |  | 25.0; 12.5 (1) |  |  |  |"
    assert others == "| PEFT's, and LoRA-XS |  |  |  |  |  |"


def test_draws_stand_side_by_side_and_what_is_in_no_other_table_is_listed() -> None:
    of = cell("banking77", **quality.METHODS["down: random basis, r=128"])
    best = best_rates(
        [
            *searched(of, {1e-2: 0.5, 3e-2: 0.25, 1e-1: 1.0}),
            *searched(replace(of, draw=2), {3e-2: 0.5}),
            *searched(replace(of, steps=7, targets="a|b"), {1e-3: 3.0}),
            *searched(replace(of, init="zero", batch_size=4), {1e-3: 2.0}),
        ]
    )
    name = "banking77, random basis, r = 128, `down_proj`"
    assert draws(best).splitlines()[2:] == [f"| {name} |  | 0.250 (50.0) |  | 0.500 (50.0) * of 1 |"]
    assert unlisted(best, {}).splitlines()[6:] == [
        "| banking77, random basis, r = 128, `a\\|b`, steps 7 | 50.0 (1) * | 3.000 | 1e-03 |",
        f"| {name}, batch_size 4, init zero | 50.0 (1) * | 2.000 | 1e-03 |",
    ]


def test_a_base_in_four_bits_is_compared_with_the_exact_one() -> None:
    of = cell("banking77", **quality.METHODS["LoRA r=8"])
    lines = searched(of, {1e-3: 1.0, 3e-3: 0.5, 1e-2: 1.0})
    lines += searched(replace(of, dtype="nf4"), {1e-3: 2.0, 3e-3: 0.75, 1e-2: 1.0}, value=0.25)
    alone = cell("banking77", **quality.METHODS["DoRA r=8"])
    lines += searched(replace(alone, dtype="nf4"), {1e-3: 2.0, 3e-3: 0.5, 1e-2: 1.0})
    best = best_rates(lines)
    assert four_bits(by_method(best, dtype="nf4"), by_method(best)).splitlines()[2:] == [
        "| banking77: LoRA r=8 | 25.0 (1) | 0.750 | -25.0 (+0.250) |",
        "| banking77: DoRA r=8 | 50.0 (1) | 0.500 (-0.250) |  |",
    ]


def test_capture_is_compared_with_the_loss_at_one_rate_below_and_above_the_best_of_the_own_basis() -> None:
    """Here a basis that captures more has the lower loss below it, and the higher above it."""
    shares = {"own": 0.5, "mixture": 0.375, "random": 0.25}
    cells = {basis: cell("e2e", **{**quality.METHODS["own basis, r=64"], "basis": basis}) for basis in shares}
    lines = [
        line
        for basis, of in cells.items()
        for line in searched(of, {1e-3: 4 - shares[basis], 3e-3: 1.0 + (basis == "random"), 1e-2: 4 + shares[basis]})
    ]
    captured = {
        identity(of.fields): {**of.fields, "capture": shares[basis]}
        for basis, of in ((basis, replace(of, optimizer="adamw")) for basis, of in cells.items())
    }
    (row,) = equal_rates(best_rates(lines), captured).splitlines()[2:]
    assert row == "| r = 64 |  | -1.00 of 3 | -0.87 of 3 | 1.00 of 3 |"


def test_the_tables_in_the_documentation_are_those_of_the_results() -> None:
    for path, text in pages(*known()).items():
        assert path.read_text() == text, f"{path.name}: python -m integration.bench report"


def test_a_table_takes_the_place_of_the_old_one() -> None:
    page = "before\n<!-- a: made by bench report -->\n| old |\n<!-- end of a -->\nafter\n"
    assert with_tables(page, {"a": "| new |"}) == page.replace("| old |", "| new |")
    with pytest.raises(AssertionError, match="no place for b"):
        with_tables(page, {"b": "| new |"})


@pytest.fixture(scope="module")
def untrained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the real encoder makes of the held-out rows without training."""
    of = cell("sst2", method="base", steps=0, valid_rows=64, test_rows=128)
    return Runner(Results(tmp_path_factory.mktemp("untrained") / "r.jsonl"), Budget(None))(of)


@needs_data
def test_the_quick_table_has_two_methods_that_learn() -> None:
    """`python -m integration.bench quality --quick`, whole."""
    found = quality.run(quick=True)
    assert found["complete"]
    assert set(found["table"]) == {"sst2"}
    lora, ours = found["table"]["sst2"].values()
    assert ours["trainable"] < lora["trainable"]
    assert max(lora["loss"], ours["loss"]) < 0.69  # a coin's


@needs_data
def test_a_run_is_kept_and_not_repeated(untrained: dict[str, Any], tmp_path: Path) -> None:
    """Real training of the real encoder, twice over one file: the second time nothing is trained."""
    results = Results(tmp_path / "r.jsonl")
    of = cell("sst2", method="lora-sb", basis="own", steps=30, valid_rows=64, test_rows=128, samples=16, lr=1e-2)
    trained = Runner(results, Budget(None))(of)
    assert trained["loss"] < untrained["loss"]
    assert trained["value"] > untrained["value"]
    assert trained["trainable"] == 37 * 64 * 64 + 2 * 384 + 2  # with the pooler; and the head
    assert json.loads(results.path.read_text().splitlines()[0]) == trained
    spent = Runner(results, Budget(-1))
    assert spent(of) == trained
    with pytest.raises(OutOfTime):
        spent(replace(of, seed=1))


@needs_data
def test_muon_trains_the_factors_of_lora_and_adamw_a_head(untrained: dict[str, Any], tmp_path: Path) -> None:
    """torch's Muon takes matrices alone, and a classifier's head has a bias."""
    of = cell("sst2", method="lora", rank=8, optimizer="muon", steps=20, valid_rows=64, test_rows=16, lr=1e-2)
    run = Runner(Results(tmp_path / "r.jsonl"), Budget(None))
    assert run(of)["loss"] < untrained["loss"]


@needs_data
def test_captures_are_those_of_the_bases_that_are_trained_in() -> None:
    """One at a time, by the basis that a run would load; all at once, from shared sums and a higher rank's basis."""
    fields = [
        {"basis": "own"},
        {"basis": "mixture", "balanced": True},
        {"basis": "without", "reduction": "raw"},
        {"basis": "wsvd"},
        {"basis": "random"},
    ]
    # No more directions than rows: the pooler's gradient has no others, and which the SVD then takes is rounding.
    cells = [cell("cola", method="lora-sb", rank=r, samples=16, **of) for of in fields for r in (8, 16)]
    found = dict(captures(cells))
    assert set(found) == set(cells)
    task = load_task("cola", DATA / "cola")
    base = base_of(task.task_type)
    network = base.load(task.task_type, dtype="float32", num_labels=task.num_labels, seed=0)
    of_task = task.task_type, task.labels, 192
    rows = encode(some(task.rows("valid"), 64), base.tokenizer, *of_task, embeddings=base.embeddings)
    g = gradient(base, task, rows, CalibrationSettings(), task.num_labels)
    for of in cells:
        ratios = CaptureRatios()
        for name, factors in basis_of(network, base, task, of).modules.items():
            ratios.add(name, g[name], capture=(factors.B, factors.A))
        assert found[of] == pytest.approx(ratios.overall(), abs=2e-3)
    own, drawn = found[cells[1]], found[cells[-1]]
    assert own["capture"] > 1.3 * own["random"]
    assert drawn["capture"] == pytest.approx(drawn["random"], rel=0.1)


def test_methods_are_cells() -> None:
    for fields in quality.METHODS.values():
        assert cell("e2e", **fields).key != cell("mawps", **fields).key


def test_every_method_has_its_place_in_the_picture() -> None:
    assert family("down: LoRA r=8") == family("DoRA r=8")
    assert len({family(name) for name in quality.METHODS if name != "base"}) == 5
