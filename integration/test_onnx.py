"""The ONNX exports of a real model answer as torch does: of its first layers, and quantized of all its 135M weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lorasb_export.adapter import Adapter
from lorasb_export.base.model import BaseModel
from lorasb_export.basis import Basis
from lorasb_export.data.encoding import prompt_ids
from lorasb_export.exporting.onnx import export_onnx
from lorasb_export.exporting.onnx_adapters import export_onnx_adapters
from lorasb_export.exporting.onnx_run import OnnxDecoder
from lorasb_export.exporting.onnx_verify import PROMPTS
from lorasb_export.layers.factors import ModuleBasis

from .reference import merged

og = pytest.importorskip("onnxruntime_genai")

from transformers import PreTrainedModel  # noqa: E402

pytestmark = pytest.mark.usefixtures("quick_exporters")

RANK, TOKENS, EOS = 32, 64, {2}
# Of the update, relative to the weight: red changes every answer, blue some. A few layers need more for that.
SIZES, SIZES_OF_FEW = {"red": 0.15}, {"red": 0.6, "blue": 0.15}


def random_adapters(base: BaseModel, folder: Path, sizes: dict[str, float]) -> None:
    """Adapters on all linear layers, with updates of `sizes` times the norm of the weight they are added to."""
    generator = torch.Generator().manual_seed(0)
    network = base.load(dtype="float32", device="cpu")
    weights = {n: m.weight for n, m in network.model.named_modules(prefix="model") if isinstance(m, torch.nn.Linear)}

    def factor(size: int) -> torch.Tensor:
        return torch.linalg.qr(torch.randn(size, RANK, generator=generator)).Q

    factors = {
        name: ModuleBasis(factor(w.shape[0]), factor(w.shape[1]).T.contiguous(), torch.ones(RANK))
        for name, w in weights.items()
    }
    Basis(base.ref(factors), RANK, factors, {}).save(folder / "basis")
    basis = Basis.load(folder / "basis")
    for name, size in sizes.items():
        random = {module: torch.randn(RANK, RANK, generator=generator) for module in weights}
        R = {module: size * weights[module].norm() / r.norm() * r for module, r in random.items()}
        Adapter(basis.base, basis.sha256, basis.source, R, basis=basis).save(folder / name)


def torch_says(network: PreTrainedModel, prompt: list[int], answer: list[int]) -> list[int]:
    """Torch's tokens after the prompt and after each token of `answer`, up to the first that ends an answer.

    In one pass. `answer` itself if, and only if, it is what the plain argmax loop gives.
    """
    with torch.inference_mode():
        logits = network(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 :]
    said = logits.argmax(-1).tolist()[:TOKENS]
    end = next((place for place, token in enumerate(said, 1) if token in EOS), len(said))
    return said[:end]


class World:
    def __init__(self, model: Path, folder: Path) -> None:
        self.base, self.folder = BaseModel.resolve(model), folder
        random_adapters(self.base, folder, SIZES_OF_FEW)
        tokenizer = self.base.tokenizer
        self.prompts = [prompt_ids(tokenizer, prompt) for prompt in PROMPTS]
        self._right: dict[str | None, list[list[int]]] = {}

    def expected(self, name: str | None, answers: list[list[int]]) -> list[list[int]]:
        """Torch's greedy answers, once `answers` are those; else what torch says along `answers`, which differs."""
        if name not in self._right:
            network = merged(self.base.folder, self.folder / name if name else None)
            said = [torch_says(network, *pair) for pair in zip(self.prompts, answers, strict=True)]
            if said != answers:
                return said
            self._right[name] = said
        return self._right[name]


@pytest.fixture(scope="module")
def world(short_smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(short_smollm2, tmp_path_factory.mktemp("onnx"))


@pytest.fixture(scope="module")
def tasks_onnx(world: World) -> Path:
    out = world.folder / "tasks-onnx"
    export_onnx_adapters([world.folder / "red", world.folder / "blue"], out, verify=False)
    return out


def test_merged_export_answers_as_torch_does(world: World) -> None:
    out = world.folder / "red-onnx"
    export_onnx(world.folder / "red", out)
    decoder = OnnxDecoder(out)
    assert decoder.eos_ids == EOS
    answers = decoder.generate(world.prompts, TOKENS, EOS)
    assert answers == world.expected("red", answers)
    assert [decoder.generate([prompt], TOKENS, EOS)[0] for prompt in world.prompts] == answers
    assert answers != world.expected(None, answers)
    end = answers[0][5]  # few answers of the first layers reach the tokenizer's own
    ended = [answer[: answer.index(end) + 1] if end in answer else answer for answer in answers]
    assert len({len(answer) for answer in ended}) > 1
    assert decoder.generate(world.prompts, TOKENS, {end}) == ended


@pytest.mark.parametrize("name", [None, "red", "blue"])
def test_one_graph_answers_as_the_base_and_as_every_task(world: World, tasks_onnx: Path, name: str | None) -> None:
    decoder = OnnxDecoder(tasks_onnx, tasks_onnx / f"{name}.onnx_adapter" if name else None)
    answers = decoder.generate(world.prompts, TOKENS, EOS)
    assert answers == world.expected(name, answers)


def test_genai_runs_the_task(world: World, tasks_onnx: Path) -> None:
    model = og.Model(str(tasks_onnx))
    adapters = og.Adapters(model)
    adapters.load(str(tasks_onnx / "red.onnx_adapter"), "red")
    answers = []
    for prompt in world.prompts:
        parameters = og.GeneratorParams(model)
        parameters.set_search_options(max_length=len(prompt) + TOKENS, do_sample=False)
        generator = og.Generator(model, parameters)
        generator.set_active_adapter(adapters, "red")
        generator.append_tokens(prompt)
        while not generator.is_done():
            generator.generate_next_token()
        found = [int(token) for token in generator.get_sequence(0)[len(prompt) :]]
        answers.append(found if len(found) == TOKENS else [*found, *EOS])  # genai leaves the end out
    assert answers == world.expected("red", answers)


@pytest.fixture(scope="module")
def whole(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Adapters of the whole model."""
    folder = tmp_path_factory.mktemp("whole")
    random_adapters(BaseModel.resolve(smollm2), folder, SIZES)
    return folder


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_quantized_exports_run_and_say_how_far_they_are(whole: Path, precision: str) -> None:
    out = whole / f"red-{precision}"
    result = export_onnx(whole / "red", out, precision=precision)
    assert 0 < result["verify"]["equal_tokens"] <= result["verify"]["tokens"] <= 4 * 32
    assert result["bytes"] < 0.6 * 4 * 134_515_008


def test_a_batch_of_24_rows_of_various_lengths_is_answered(world: World, tasks_onnx: Path) -> None:
    generator = torch.Generator().manual_seed(5)
    lengths = torch.randint(35, 56, (24,), generator=generator).tolist()
    rows = [torch.randint(100, 40_000, (length,), generator=generator).tolist() for length in lengths]
    decoder = OnnxDecoder(tasks_onnx, tasks_onnx / "red.onnx_adapter")
    answers = decoder.generate(rows, 15, set())
    assert [len(answer) for answer in answers] == [15] * 24
    for number in (0, lengths.index(min(lengths)), lengths.index(max(lengths))):
        assert decoder.generate([rows[number]], 15, set()) == [answers[number]]
