"""ONNX exports answer as torch does with W0 + s·B·R·A in its weights, computed here in float64."""

from __future__ import annotations

import gc
import json
import os
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lorasb_export.adapter import Adapter
from lorasb_export.base import BaseModel
from lorasb_export.basis import Basis
from lorasb_export.data import load_task
from lorasb_export.errors import (
    ArtifactError,
    BaseModelError,
    DataError,
    MissingPackageError,
    OutputError,
    SettingsError,
)
from lorasb_export.kind import artifact_kind

ort = pytest.importorskip("onnxruntime")
og = pytest.importorskip("onnxruntime_genai")
onnx = pytest.importorskip("onnx")

from transformers import (  # noqa: E402
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
)

from lorasb_export.export.onnx import BYTES, export_onnx  # noqa: E402
from lorasb_export.export.onnx_adapter_file import read_adapter, write_adapter  # noqa: E402
from lorasb_export.export.onnx_adapters import add_onnx_adapters, export_onnx_adapters  # noqa: E402
from lorasb_export.export.onnx_record import read_record  # noqa: E402
from lorasb_export.export.onnx_run import OnnxDecoder, open_session  # noqa: E402
from lorasb_export.export.onnx_verify import require_equal, verify_folder  # noqa: E402
from tests.tiny import TEMPLATE, VOCABULARY, make_llama, save_tokenizer  # noqa: E402

from .onnx_world import EOS, make_world, save_adapter, save_basis  # noqa: E402

TOKENS = 24
LENGTHS = (3, 17, 9, 1, 17, 30, 2, 5, 11)  # more than one batch, of unequal rows


def merged(base: Path, adapter: Path | None) -> PreTrainedModel:
    """The reference: torch with W0 + s·B·R·A in its weights."""
    network = BaseModel.resolve(base).load(device="cpu")
    if adapter is not None:
        task = Adapter.load(adapter)
        for name, factors in task.load_basis().modules.items():
            B, A, weight = factors.B, factors.A, network.get_submodule(name).weight
            weight.data = (weight.double() + task.scaling * B.double() @ task.R[name].double() @ A.double()).float()
    return network


def torch_greedy(network: PreTrainedModel, prompt: list[int], eos: set[int]) -> list[int]:
    """The plain argmax loop, without a cache."""
    answer: list[int] = []
    with torch.inference_mode():
        while len(answer) < TOKENS and not (answer and answer[-1] in eos):
            answer.append(int(network(torch.tensor([prompt + answer])).logits[0, -1].argmax()))
    return answer


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(3, 98, (length,), generator=generator).tolist() for length in LENGTHS]


def answers(network: PreTrainedModel, eos: set[int]) -> list[list[int]]:
    return [torch_greedy(network, prompt, eos) for prompt in prompts()]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("onnx"))


@pytest.fixture(scope="module")
def red_onnx(world: Path) -> Path:
    export_onnx(world / "red", world / "red-onnx")
    return world / "red-onnx"


@pytest.fixture(scope="module")
def tasks_onnx(world: Path) -> Path:
    export_onnx_adapters([world / "red", world / "blue"], world / "tasks-onnx")
    return world / "tasks-onnx"


def test_merged_folder_is_complete(red_onnx: Path) -> None:
    names = {path.name for path in red_onnx.iterdir()}
    assert names == {
        *("model.onnx", "model.onnx_data", "genai_config.json", "config.json", "generation_config.json"),
        *("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "LICENSE", "lorasb.json", "README.md"),
    }
    assert artifact_kind(red_onnx) == "onnx"
    assert json.loads((red_onnx / "lorasb.json").read_text())["precision"] == "fp32"
    assert (red_onnx / "chat_template.jinja").read_text() == TEMPLATE


def test_merged_logits_equal_torch_at_prefill_and_with_cache(world: Path, red_onnx: Path) -> None:
    network = merged(world / "base", world / "red")
    session = ort.InferenceSession(str(red_onnx / "model.onnx"), providers=["CPUExecutionProvider"])
    outputs = [output.name for output in session.get_outputs()]
    ids = np.array([prompts()[1]])
    with torch.inference_mode():
        expected = network(torch.tensor(ids)).logits.numpy()
    cache = {i.name: np.zeros((1, 2, 0, 16), np.float32) for i in session.get_inputs() if "past" in i.name}
    split = 12
    feed = {"input_ids": ids[:, :split], "attention_mask": np.ones((1, split), np.int64), **cache}
    first = dict(zip(outputs, session.run(outputs, feed), strict=True))
    np.testing.assert_allclose(first["logits"], expected[:, :split], atol=1e-4)
    for position in range(split, ids.shape[1]):
        cache = {name.replace("present", "past_key_values"): x for name, x in first.items() if "present" in name}
        mask = np.ones((1, position + 1), np.int64)
        feed = {"input_ids": ids[:, position : position + 1], "attention_mask": mask, **cache}
        first = dict(zip(outputs, session.run(outputs, feed), strict=True))
        np.testing.assert_allclose(first["logits"][:, 0], expected[:, position], atol=1e-4)


def test_merged_batch_of_unequal_prompts_decodes_as_torch(world: Path, red_onnx: Path) -> None:
    network = merged(world / "base", world / "red")
    plain = answers(network, set())
    assert OnnxDecoder(red_onnx, threads=1).generate(prompts(), TOKENS, set()) == plain
    assert plain != answers(merged(world / "base", None), set())  # the adapter matters
    eos = {plain[0][5], plain[1][2]}
    stopped = OnnxDecoder(red_onnx, threads=1).generate(prompts(), TOKENS, eos)
    assert stopped == answers(network, eos)
    assert stopped[1][-1] in eos
    assert len({len(answer) for answer in stopped}) > 1  # rows end at different steps


def test_one_graph_is_the_base_and_every_task(world: Path, tasks_onnx: Path) -> None:
    found = {}
    for name in ("red", "blue", None):
        file = tasks_onnx / f"{name}.onnx_adapter" if name else None
        found[name] = OnnxDecoder(tasks_onnx, file, threads=1).generate(prompts(), TOKENS, set())
        assert found[name] == answers(merged(world / "base", world / name if name else None), set())
    assert found["red"] != found["blue"] != found[None] != found["red"]


def test_decoders_of_two_tasks_live_side_by_side(tasks_onnx: Path) -> None:
    def decoder(name: str) -> OnnxDecoder:
        return OnnxDecoder(tasks_onnx, tasks_onnx / f"{name}.onnx_adapter", threads=1)

    red, blue = decoder("red"), decoder("blue")
    blue_first = blue.generate(prompts(), TOKENS, set())
    assert red.generate(prompts(), TOKENS, set()) != blue_first
    assert blue.generate(prompts(), TOKENS, set()) == blue_first


def test_adapter_files_hold_the_scaled_transpose(world: Path, tasks_onnx: Path) -> None:
    task = Adapter.load(world / "blue")
    stored = ort.AdapterFormat.read_adapter(str(tasks_onnx / "blue.onnx_adapter")).get_parameters()
    assert len(stored) == len(task.R)
    for module, R in task.R.items():
        value = stored[f"{module}.R.{task.basis_sha256[:12]}"].numpy()
        np.testing.assert_array_equal(value, 0.5 * R.T.numpy())


def test_verification_is_recorded_per_task(tasks_onnx: Path) -> None:
    record = json.loads((tasks_onnx / "lorasb.json").read_text())
    assert artifact_kind(tasks_onnx) == "onnx-adapters"
    assert set(record["adapters"]) == {"red", "blue"}
    assert set(record["verify"]) == {"base", "red", "blue"}
    for result in record["verify"].values():
        assert result["equal_tokens"] == result["tokens"] > 0


def test_verification_tells_one_task_from_another(world: Path, tasks_onnx: Path) -> None:
    found = verify_folder(tasks_onnx, BaseModel.resolve(world / "base"), {"blue": Adapter.load(world / "red")})["blue"]
    assert found["equal_prompts"] < found["prompts"]
    lossy = found | {"equal_tokens": 1}
    assert require_equal(lossy, "int4", tasks_onnx) == lossy  # a quantized graph may differ: reported, not refused
    with pytest.raises(ArtifactError, match="leave torch's"):
        require_equal(lossy, "fp32", tasks_onnx)
    with pytest.raises(ArtifactError, match="int4 graph agrees with torch in even its first token"):
        require_equal(found | {"equal_tokens": 0}, "int4", tasks_onnx)


def test_genai_runs_the_same_folder(world: Path, tasks_onnx: Path) -> None:
    model = og.Model(str(tasks_onnx))
    adapters = og.Adapters(model)
    for name in ("red", "blue"):
        adapters.load(str(tasks_onnx / f"{name}.onnx_adapter"), name)
        for prompt, expected in zip(prompts(), answers(merged(world / "base", world / name), {EOS}), strict=True):
            parameters = og.GeneratorParams(model)
            parameters.set_search_options(max_length=len(prompt) + TOKENS, do_sample=False)
            generator = og.Generator(model, parameters)
            generator.set_active_adapter(adapters, name)
            generator.append_tokens(prompt)
            while not generator.is_done():
                generator.generate_next_token()
            found = [int(token) for token in generator.get_sequence(0)[len(prompt) :]]
            assert found == [token for token in expected if token != EOS]  # genai does not return it


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_other_precisions_carry_the_adapter(world: Path, tmp_path: Path, precision: str) -> None:
    result = export_onnx_adapters([world / "red"], tmp_path / "out", precision=precision)
    counts = result["verify"]["red"]
    assert counts["equal_tokens"] > 0
    assert counts["gap"] < 0.5  # of logits whose spread is several units
    assert result["execution_provider"] == {"fp16": "cuda", "int8": "cpu"}[precision]


def test_an_adapter_of_another_graph_is_refused(tasks_onnx: Path, tmp_path: Path) -> None:
    own = read_adapter(tasks_onnx / "red.onnx_adapter")
    foreign = {name.rpartition(".")[0] + ".0123456789ab": array for name, array in own.items()}
    write_adapter(tmp_path / "foreign.onnx_adapter", foreign)
    with pytest.raises(ArtifactError, match="another graph"):
        OnnxDecoder(tasks_onnx, tmp_path / "foreign.onnx_adapter")
    with pytest.raises(ArtifactError, match="no such ONNX adapter"):
        OnnxDecoder(tasks_onnx, tasks_onnx / "green.onnx_adapter")


def test_a_bf16_graph_is_written_for_cuda_and_refused_on_the_cpu(world: Path, tmp_path: Path) -> None:
    assert export_onnx(world / "red", tmp_path / "out", precision="bf16")["execution_provider"] == "cuda"
    with pytest.raises(ArtifactError, match="cannot load the graph on the CPU"):
        OnnxDecoder(tmp_path / "out")


def test_prompts_that_cannot_be_answered_are_refused(red_onnx: Path) -> None:
    decoder = OnnxDecoder(red_onnx, threads=1)
    assert decoder.generate([], 5, set()) == []
    assert decoder.generate([[5]], 0, set()) == [[]]
    with pytest.raises(DataError, match=r"no tokens \(prompt 2\)"):
        decoder.generate([[5], []], 5, set())
    with pytest.raises(DataError, match="context of 128"):
        decoder.generate([[5] * 120], 9, set())


def test_requests_are_refused_before_any_work(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    red, out = world / "red", tmp_path / "out"
    with pytest.raises(SettingsError, match="precision 'fp8'"):
        export_onnx(red, out, precision="fp8")
    with pytest.raises(SettingsError, match="precision 'bf16'"):
        export_onnx_adapters([red], out, precision="bf16")
    with pytest.raises(SettingsError, match="different names"):
        export_onnx_adapters([red, red], out)
    for export in (export_onnx, lambda adapter, out, **options: export_onnx_adapters([adapter], out, **options)):
        for taken in ("red", "basis"):
            with pytest.raises(OutputError, match="the target holds what it is made from"):
                export(red, world / taken, overwrite=True)
    with pytest.raises(ArtifactError, match="do not belong together"):
        export_onnx_adapters([red, world / "stranger"], out)
    classifier = save_adapter(Basis.load(world / "basis"), tmp_path / "classifier", seed=1, task_type="SEQ_CLS")
    for export in (export_onnx, lambda adapter, out: export_onnx_adapters([adapter], out)):
        with pytest.raises(BaseModelError, match="SEQ_CLS"):
            export(classifier, out)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(OutputError, match="exists"):
        export_onnx(red, tmp_path / "full")
    monkeypatch.setitem(BYTES, "fp32", 1e12)  # a terabyte for each parameter
    with pytest.raises(OutputError, match="not enough disk"):
        export_onnx(red, out)
    monkeypatch.setitem(sys.modules, "onnxruntime_genai", None)  # what the import system reads as "not installed"
    with pytest.raises(MissingPackageError, match=r"onnxruntime-genai is not installed.*pip install '\.\[cpu\]'"):
        export_onnx(red, out)
    assert [path.name for path in tmp_path.iterdir() if "out" in path.name] == []


def test_tasks_are_added_without_the_graph_being_exported_again(world: Path, tmp_path: Path) -> None:
    out = tmp_path / "tasks"
    export_onnx_adapters([world / "red"], out, verify=False)
    graph = {name: (out / name).read_bytes() for name in ("model.onnx", "basis.onnx_data")}
    red = (out / "red.onnx_adapter").stat().st_ino
    (out / ".cache" / "huggingface").mkdir(parents=True)  # as beside every download
    result = add_onnx_adapters([world / "blue"], out)
    assert (out / "red.onnx_adapter").stat().st_ino == red  # linked, not written again
    assert set(result["adapters"]) == {"red", "blue"}
    assert result["verify"]["blue"]["equal_tokens"] == result["verify"]["blue"]["tokens"]
    assert {name: (out / name).read_bytes() for name in graph} == graph
    for name in ("red", "blue"):
        found = OnnxDecoder(out, name, threads=1).generate(prompts(), TOKENS, set())
        assert found == answers(merged(world / "base", world / name), set())
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    out.rename(tmp_path / ".tasks.old")  # as after a kill, or on a disk that died, between the renames of an --into
    with pytest.raises(SettingsError, match=r"has an adapter 'red'.*--overwrite"):
        add_onnx_adapters([world / "red"], out)
    with pytest.raises(ArtifactError, match="belongs to another basis"):
        add_onnx_adapters([world / "stranger"], out)
    with pytest.raises(ArtifactError, match="not an export"):
        add_onnx_adapters([world / "red"], world / "base")
    with pytest.raises(BaseModelError, match="the base's weights are not those the artifact was made for"):
        add_onnx_adapters([world / "red"], out, base=make_llama(tmp_path / "other", width=96), overwrite=True)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_an_adapter_is_replaced_with_its_folder(world: Path, tasks_onnx: Path, tmp_path: Path) -> None:
    """The files of the new folder are second names of those of the old one: none is written through its name."""
    folder = copy(tasks_onnx, tmp_path / "tasks")
    before = (folder / "red.onnx_adapter").read_bytes()
    os.link(folder / "red.onnx_adapter", tmp_path / "before")
    other = save_adapter(Basis.load(world / "basis"), tmp_path / "red", seed=12)
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tools.jinja").write_text("{{ tools }}")
    result = add_onnx_adapters([other], folder, verify=False, overwrite=True)
    assert result["bytes"] == sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    assert (folder / "red.onnx_adapter").read_bytes() != before == (tmp_path / "before").read_bytes()


def test_the_adapters_of_a_basis_are_compared_with_one_copy_of_it(
    world: Path, tasks_onnx: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, basis = copy(tasks_onnx, tmp_path / "tasks"), Basis.load(world / "basis")
    new = [save_adapter(basis, tmp_path / name, seed) for seed, name in enumerate(("c", "d"))]
    read: list[str] = []
    load = Basis.load
    monkeypatch.setattr(Basis, "load", lambda source: read.append(source) or load(source))
    add_onnx_adapters(new, folder)
    export_onnx_adapters(new, tmp_path / "new")
    assert len(read) == 2


def test_tasks_that_are_added_at_once_are_all_there(world: Path, tasks_onnx: Path, tmp_path: Path) -> None:
    folder, basis = copy(tasks_onnx, tmp_path / "tasks"), Basis.load(world / "basis")
    new = [save_adapter(basis, tmp_path / name, seed) for seed, name in enumerate(("c", "d", "e"))]
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda adapter: add_onnx_adapters([adapter], folder, verify=False), new))
    assert set(read_record(folder)["adapters"]) == {"red", "blue", "c", "d", "e"}
    assert len(list(folder.glob("*.onnx_adapter"))) == 5


def test_an_adapter_file_is_hardly_larger_than_its_numbers(world: Path, tmp_path: Path) -> None:
    """r = 32, as few as 14 modules: what the format adds for each is its name."""
    basis = Basis.load(world / "basis")
    path = tmp_path / "big.onnx_adapter"
    write_adapter(path, {f"{name}.R.0123456789ab": np.zeros((32, 32), np.float32) for name in basis.modules})
    assert path.stat().st_size <= 1.1 * 32 * 32 * 4 * len(basis.modules)


def test_routed_rows_of_one_batch_answer_for_different_tasks(world: Path, tmp_path: Path) -> None:
    out = tmp_path / "routed"
    result = export_onnx_adapters([world / "red"], out, routed=True)
    assert result["verify"]["red"]["equal_tokens"] == result["verify"]["red"]["tokens"]
    weights = (out / "model.onnx_data").stat().st_ino
    add_onnx_adapters([world / "blue"], out)
    assert (out / "model.onnx_data").stat().st_ino == weights  # linked, not written again
    assert not (out / "tasks-1.onnx_data").exists()
    rows = ["red", None, "blue", "red", "blue", None, "blue", "red", None]
    found = OnnxDecoder(out, threads=1).generate(prompts(), TOKENS, set(), rows)
    expected = {
        name: answers(merged(world / "base", world / name if name else None), set()) for name in (None, "red", "blue")
    }
    assert found == [expected[name][row] for row, name in enumerate(rows)]
    assert OnnxDecoder(out, "blue", threads=1).generate(prompts(), TOKENS, set()) == expected["blue"]
    with pytest.raises(ArtifactError, match="no adapter 'green'"):
        OnnxDecoder(out, "green")
    with pytest.raises(SettingsError, match="has an adapter 'red'"):
        add_onnx_adapters([world / "red"], out, overwrite=True)


def test_routing_needs_a_routed_folder(tasks_onnx: Path) -> None:
    with pytest.raises(SettingsError, match="one adapter for a whole batch"):
        OnnxDecoder(tasks_onnx, threads=1).generate([[5]], 1, set(), ["red"])


# Traps of ONNX Runtime (docs/how-to/onnx.md, "What to know"): what it does, and that ours does not fall in.


def session_and_feed(folder: Path) -> tuple[Any, dict[str, Any]]:
    session = open_session(folder, threads=1)
    ids = np.array([prompts()[1]])
    feed = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    empty = np.zeros((1, 2, 0, 16), np.float32)
    return session, feed | {item.name: empty for item in session.get_inputs() if "past" in item.name}


def active(*files: Path) -> tuple[Any, list[Any]]:
    """Run options with these adapters active, and what must be kept alive beside them."""
    options, held = ort.RunOptions(), []
    for file in files:
        held.append(ort.LoraAdapter())
        held[-1].Load(str(file))
        options.add_active_adapter(held[-1])
    return options, held


def test_io_binding_ignores_an_active_adapter(tasks_onnx: Path) -> None:
    session, feed = session_and_feed(tasks_onnx)
    options, held = active(tasks_onnx / "red.onnx_adapter")
    binding = session.io_binding()
    for name, array in feed.items():
        binding.bind_cpu_input(name, array)
    binding.bind_output("logits")
    session.run_with_iobinding(binding, options)
    bound = binding.get_outputs()[0].numpy()
    base = session.run(["logits"], feed)[0]
    red = session.run(["logits"], feed, options)[0]
    np.testing.assert_array_equal(bound, base)  # when this fails, onnxruntime has mended it: OnnxDecoder may bind
    assert np.abs(red - base).max() > 0.1
    assert held


def test_of_two_active_adapters_the_first_wins_and_use_never_has_two(world: Path, tasks_onnx: Path) -> None:
    session, feed = session_and_feed(tasks_onnx)
    red, blue = tasks_onnx / "red.onnx_adapter", tasks_onnx / "blue.onnx_adapter"
    (both, held), (one, also_held) = active(red, blue), active(red)
    np.testing.assert_array_equal(session.run(["logits"], feed, both)[0], session.run(["logits"], feed, one)[0])
    assert held
    assert also_held
    decoder = OnnxDecoder(tasks_onnx, "red", threads=1)
    decoder.use("blue")
    assert decoder.generate(prompts(), TOKENS, set()) == answers(merged(world / "base", world / "blue"), set())
    decoder.use(None)
    assert decoder.generate(prompts(), TOKENS, set()) == answers(merged(world / "base", None), set())


def test_adapters_outlive_their_python_names(world: Path, tasks_onnx: Path) -> None:
    """RunOptions does not keep a LoraAdapter alive: ours are held while other adapters come and go."""
    decoder = OnnxDecoder(tasks_onnx, "red", threads=1)
    gc.collect()
    for _ in range(50):
        other = ort.LoraAdapter()
        other.Load(str(tasks_onnx / "blue.onnx_adapter"))
        del other
    gc.collect()
    assert decoder.generate(prompts(), TOKENS, set()) == answers(merged(world / "base", world / "red"), set())


def test_a_file_that_reads_back_otherwise_is_an_error(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """onnxruntime writes rubbish when the arrays die before it does; here one is changed behind the writer's back."""
    arrays = {"a.R.0123456789ab": np.eye(4, dtype=np.float32)}
    write_adapter(tmp_path / "good.onnx_adapter", arrays)
    np.testing.assert_array_equal(read_adapter(tmp_path / "good.onnx_adapter")["a.R.0123456789ab"], np.eye(4))
    original = ort.OrtValue.ortvalue_from_numpy
    monkeypatch.setattr(ort.OrtValue, "ortvalue_from_numpy", lambda array: original(array * 2))
    with pytest.raises(ArtifactError, match="not as it was written"):
        write_adapter(tmp_path / "bad.onnx_adapter", arrays)


def test_an_adapter_that_the_disk_does_not_take_is_told_in_our_words(tmp_path: Path) -> None:
    arrays = {"a.R.0123456789ab": np.eye(4, dtype=np.float32)}
    with pytest.raises(OutputError, match=r"cannot write an ONNX adapter: .*Failed to open file") as caught:
        write_adapter(tmp_path / "no such folder" / "a.onnx_adapter", arrays)
    assert "/onnxruntime_src" not in str(caught.value)


def copy(folder: Path, target: Path) -> Path:
    shutil.copytree(folder, target)
    return target


def refused(folder: Path, match: str) -> None:
    with pytest.raises(ArtifactError, match=match):
        OnnxDecoder(folder)


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "a/../../secret", "..", "sub/data", "..\\secret", ""])
def test_data_outside_the_folder_is_refused(tasks_onnx: Path, tmp_path: Path, name: str) -> None:
    folder = copy(tasks_onnx, tmp_path / "hostile")
    (tmp_path / "secret").write_bytes((folder / "model.onnx_data").read_bytes())
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    tensor = next(tensor for tensor in model.graph.initializer if tensor.external_data)
    next(entry for entry in tensor.external_data if entry.key == "location").value = name
    onnx.save(model, folder / "model.onnx")
    refused(folder, "no file beside the graph")


def test_links_and_lying_offsets_are_refused(tasks_onnx: Path, tmp_path: Path) -> None:
    folder = copy(tasks_onnx, tmp_path / "hostile")
    data = folder / "model.onnx_data"
    data.rename(tmp_path / "elsewhere")
    data.symlink_to(tmp_path / "elsewhere")
    refused(folder, "is a link")
    data.unlink()
    refused(folder, "is missing")
    (tmp_path / "elsewhere").rename(data)
    whole = (folder / "model.onnx").read_bytes()
    for key, value in (("offset", "-4"), ("offset", str(1 << 60)), ("length", "4"), ("length", "many")):
        model = onnx.load_from_string(whole)
        tensor = next(tensor for tensor in model.graph.initializer if tensor.external_data)
        next(entry for entry in tensor.external_data if entry.key == key).value = value
        onnx.save(model, folder / "model.onnx")
        refused(folder, "does not fit its data|not described whole")


@pytest.mark.parametrize("name", ["model.onnx", "model.onnx_data", "basis.onnx_data", "red.onnx_adapter"])
def test_truncated_files_are_refused(tasks_onnx: Path, tmp_path: Path, name: str) -> None:
    folder = copy(tasks_onnx, tmp_path / "cut")
    whole = (folder / name).read_bytes()
    for kept in (0, 1, len(whole) // 10, len(whole) // 2, len(whole) - 1):
        (folder / name).write_bytes(whole[:kept])
        with pytest.raises(ArtifactError):
            OnnxDecoder(folder, "red")


def test_an_adapter_with_nan_is_refused(tasks_onnx: Path, tmp_path: Path) -> None:
    folder = copy(tasks_onnx, tmp_path / "nan")
    path = folder / "red.onnx_adapter"
    data = bytearray(path.read_bytes())
    R = next(iter(read_adapter(path).values())).tobytes()
    at = data.index(R)
    data[at : at + 4] = np.float32("nan").tobytes()
    path.write_bytes(data)
    with pytest.raises(ArtifactError, match="not finite"):
        OnnxDecoder(folder, "red")


def test_an_architecture_nobody_tested_is_refused_before_any_work(tmp_path: Path) -> None:
    save_tokenizer(tmp_path / "base")
    OPTForCausalLM(
        OPTConfig(vocab_size=len(VOCABULARY), hidden_size=32, ffn_dim=64, num_hidden_layers=1, num_attention_heads=2)
    ).save_pretrained(tmp_path / "base")
    basis = save_basis(tmp_path / "base", tmp_path / "basis", ["model.decoder.layers.0.fc1"], seed=1)
    adapter = save_adapter(basis, tmp_path / "task", seed=1)
    for export in (export_onnx, lambda adapter, out: export_onnx_adapters([adapter], out)):
        with pytest.raises(BaseModelError, match=r"OPTForCausalLM is not exported to ONNX.*LlamaForCausalLM"):
            export(adapter, tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"base", "basis", "task"}


def test_a_lossy_graph_is_refused_with_its_figure(world: Path, tmp_path: Path, sums: Path) -> None:
    task = load_task("sums", sums)
    result = export_onnx(world / "red", tmp_path / "int8", precision="int8", data=task)
    assert result["verify"]["metric"] == "exact_match"
    assert result["verify"]["rows"] == len(list(task.rows(task.held_out())))
    lossy = {"prompts": 4, "equal_prompts": 1, "gap": 1.0, "metric": "exact_match", "rows": 50}
    lossy |= {"torch": 0.92, "onnx": 0.88, "drop": 4.0}
    with pytest.raises(ArtifactError, match=r"int4 loses 4.0 points of exact_match on 50 held-out rows \(92"):
        require_equal(lossy, "int4", tmp_path)
    assert require_equal(lossy, "int4", tmp_path, 5.0) == lossy
