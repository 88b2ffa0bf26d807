"""ONNX exports answer as torch does with W0 + s·B·R·A in its weights."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, OPTConfig, OPTForCausalLM

import lorasb_export
from lorasb_export.adapter import Adapter
from lorasb_export.base.model import BaseModel
from lorasb_export.basis import Basis
from lorasb_export.data.task import TaskData, load_task
from lorasb_export.errors import (
    ArtifactError,
    BaseModelError,
    DataError,
    MissingPackageError,
    OutputError,
    SettingsError,
)
from lorasb_export.exporting import onnx_verify
from lorasb_export.exporting.onnx import export_onnx
from lorasb_export.exporting.onnx_adapters import export_onnx_adapters
from lorasb_export.exporting.onnx_build import DATA, GRAPH
from lorasb_export.exporting.onnx_exporter import PRECISIONS
from lorasb_export.exporting.onnx_graph import read_graph
from lorasb_export.exporting.onnx_quantize import quantize
from lorasb_export.exporting.onnx_run import OnnxDecoder
from lorasb_export.exporting.onnx_verify import held_out_rows, require_equal, verify_folder
from lorasb_export.files.kind import artifact_kind
from lorasb_export.files.storage import read_json, write_json
from tests.tiny import TEMPLATE, VOCABULARY, save_tokenizer

from .onnx_world import EOS, PROMPTS, TOKENS, answers, save_adapter, save_basis
from .reference import merged

ort = pytest.importorskip("onnxruntime")
og = pytest.importorskip("onnxruntime_genai")
onnx = pytest.importorskip("onnx")

pytestmark = pytest.mark.usefixtures("quick_exporters")


@pytest.fixture(scope="module")
def red_onnx(world: Path) -> Path:
    export_onnx(world / "red", world / "red-onnx")
    return world / "red-onnx"


def test_merged_folder_is_complete(red_onnx: Path) -> None:
    names = {path.name for path in red_onnx.iterdir()}
    assert names == {
        *("model.onnx", "model.onnx_data", "genai_config.json", "config.json", "generation_config.json"),
        *("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "LICENSE", "lorasb.json", "README.md"),
    }
    assert artifact_kind(red_onnx) == "onnx"
    assert json.loads((red_onnx / "lorasb.json").read_text())["precision"] == "fp32"
    assert (red_onnx / "chat_template.jinja").read_text() == TEMPLATE
    ends = read_json(red_onnx / "genai_config.json")["model"]["eos_token_id"]
    assert set(ends) == OnnxDecoder(red_onnx, threads=1).eos_ids


def test_no_node_ends_with_an_input_that_is_left_out(red_onnx: Path) -> None:
    """onnxruntime before 1.23 counts them, and knows fewer: it refused the whole graph."""
    nodes = read_graph(red_onnx / "model.onnx").graph.node
    assert [node.name for node in nodes if node.input and not node.input[-1]] == []


def test_merged_logits_equal_torch_at_prefill_and_with_cache(world: Path, red_onnx: Path) -> None:
    network = merged(world / "base", world / "red")
    session = ort.InferenceSession(str(red_onnx / "model.onnx"), providers=["CPUExecutionProvider"])
    outputs = [output.name for output in session.get_outputs()]
    ids = np.array([PROMPTS[1]])
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
    assert OnnxDecoder(red_onnx, threads=1).generate(PROMPTS, TOKENS, set()) == plain
    assert plain != answers(merged(world / "base", None), set())  # the adapter matters
    eos = {plain[0][5], plain[1][2]}
    stopped = OnnxDecoder(red_onnx, threads=1).generate(PROMPTS, TOKENS, eos)
    assert stopped == answers(network, eos)
    assert stopped[1][-1] in eos
    assert len({len(answer) for answer in stopped}) > 1  # rows end at different steps


def test_an_answer_ends_where_tokenizer_or_generation_config_says(red_onnx: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(red_onnx, tmp_path / "copy")
    of_tokenizer = AutoTokenizer.from_pretrained(copy).eos_token_id
    for named, ends in ((7, {7}), ([7, 9], {7, 9}), (None, set())):
        write_json(copy / "generation_config.json", {"eos_token_id": named})
        assert OnnxDecoder(copy, threads=1).eos_ids == {of_tokenizer, *ends}
    (copy / "generation_config.json").unlink()
    assert OnnxDecoder(copy, threads=1).eos_ids == {of_tokenizer, read_json(copy / "config.json")["eos_token_id"]}


def test_the_bases_own_tokenizer_files_win(world: Path, tmp_path: Path) -> None:
    """The builder writes them anew, as transformers 5 does and transformers 4 cannot read them."""
    base, out = shutil.copytree(world / "base", tmp_path / "base"), tmp_path / "out"
    own = {"tokenizer_class": "PreTrainedTokenizerFast", "additional_special_tokens": ["<s>"], "eos_token": "</s>"}
    write_json(base / "tokenizer_config.json", own)
    write_json(base / "genai_config.json", {"of": "another model"})
    export_onnx_adapters([world / "red"], out, base=base, verify=False)
    found = read_json(out / "tokenizer_config.json")
    assert found == own | {"chat_template": TEMPLATE, "model_max_length": 128}
    assert (out / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()
    assert og.Tokenizer(og.Model(str(out))).encode("ab").tolist() == AutoTokenizer.from_pretrained(base)("ab").input_ids


def test_a_tokenizer_of_an_older_kind_is_the_one_that_the_builder_made_of_it(world: Path, tmp_path: Path) -> None:
    base, out = shutil.copytree(world / "base", tmp_path / "base"), tmp_path / "out"
    (base / "tokenizer.json").unlink()
    write_json(base / "tokenizer_config.json", {"tokenizer_class": "GPT2Tokenizer"})
    write_json(base / "vocab.json", {"<|endoftext|>": 98, **{token: i for i, token in enumerate(VOCABULARY)}})
    (base / "merges.txt").write_text("#version: 0.2\n")
    export_onnx_adapters([world / "red"], out, base=base, verify=False)
    assert read_json(out / "tokenizer_config.json")["eos_token"] == "<|endoftext|>"
    assert AutoTokenizer.from_pretrained(out)("ab").input_ids == AutoTokenizer.from_pretrained(base)("ab").input_ids


def test_one_graph_is_the_base_and_every_task(world: Path, tasks_onnx: Path) -> None:
    found = {}
    for name in ("red", "blue", None):
        file = tasks_onnx / f"{name}.onnx_adapter" if name else None
        found[name] = OnnxDecoder(tasks_onnx, file, threads=1).generate(PROMPTS, TOKENS, set())
        assert found[name] == answers(merged(world / "base", world / name if name else None), set())
    assert found["red"] != found["blue"] != found[None] != found["red"]


def test_decoders_of_two_tasks_live_side_by_side(tasks_onnx: Path) -> None:
    def decoder(name: str) -> OnnxDecoder:
        return OnnxDecoder(tasks_onnx, tasks_onnx / f"{name}.onnx_adapter", threads=1)

    red, blue = decoder("red"), decoder("blue")
    blue_first = blue.generate(PROMPTS, TOKENS, set())
    assert red.generate(PROMPTS, TOKENS, set()) != blue_first
    assert blue.generate(PROMPTS, TOKENS, set()) == blue_first


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
    assert require_equal(lossy, "int4", tasks_onnx, 2.0) == lossy  # a quantized graph may differ: reported, not refused
    with pytest.raises(ArtifactError, match="leave torch's"):
        require_equal(lossy, "fp32", tasks_onnx, 2.0)
    with pytest.raises(ArtifactError, match="int4 graph agrees with torch in even its first token"):
        require_equal(found | {"equal_tokens": 0}, "int4", tasks_onnx, 2.0)


def test_prompts_that_do_not_fit_into_the_context_of_128(
    world: Path, tasks_onnx: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Held-out rows are left out and counted, built-in prompts are cut."""
    base, tasks = BaseModel.resolve(world / "base"), {"red": Adapter.load(world / "red")}
    monkeypatch.setattr(onnx_verify, "PROMPTS", ("x" * 120,))
    rows = [{"prompt": "x" * length, "completion": "4"} for length in (2, 117, 130, 116)]
    for held, kept in ((rows, 2), (rows[1:3], 0)):
        asked = held_out_rows(
            {"red": TaskData("sums", "memory", "CAUSAL_LM", {"train": rows, "test": held}, "0")}, base
        )
        found = verify_folder(tasks_onnx, base, tasks, asked)["red"]
        assert found["equal_tokens"] == found["tokens"] > 0
        assert (found["rows_left_out"], found.get("rows", 0)) == (2, kept)


def test_genai_runs_the_same_folder(world: Path, tasks_onnx: Path) -> None:
    model = og.Model(str(tasks_onnx))
    adapters = og.Adapters(model)
    for name in ("red", "blue"):
        adapters.load(str(tasks_onnx / f"{name}.onnx_adapter"), name)
        for prompt, expected in zip(PROMPTS, answers(merged(world / "base", world / name), {EOS}), strict=True):
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


def test_a_bf16_graph_is_written_for_cuda_and_refused_on_the_cpu(
    world: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert export_onnx(world / "red", tmp_path / "out", precision="bf16")["execution_provider"] == "cuda"
    with pytest.raises(ArtifactError, match="cannot load the graph on the CPU"):
        OnnxDecoder(tmp_path / "out")
    assert "a bf16 graph runs on CUDA alone: it is not compared with torch" in caplog.messages


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
    monkeypatch.setitem(PRECISIONS, "fp32", PRECISIONS["fp32"]._replace(room=1e12))  # a terabyte for each parameter
    with pytest.raises(OutputError, match="not enough disk"):
        export_onnx(red, out)
    monkeypatch.setitem(sys.modules, "onnxruntime_genai", None)  # what the import system reads as "not installed"
    with pytest.raises(MissingPackageError, match=r"onnxruntime-genai is not installed.*pip install '\.\[cpu\]'"):
        export_onnx(red, out)
    assert [path.name for path in tmp_path.iterdir() if "out" in path.name] == []


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
    result = lorasb_export.export(world / "red", tmp_path / "int8", format="onnx", precision="int8", data={"red": sums})
    assert result["verify"]["metric"] == "exact_match"
    assert result["verify"]["rows"] == len(list(task.rows(task.held_out())))
    lossy = {"prompts": 4, "equal_prompts": 1, "gap": 1.0, "metric": "exact_match", "rows": 50}
    lossy |= {"torch": 0.92, "onnx": 0.88, "drop": 4.0}
    with pytest.raises(ArtifactError, match=r"int4 loses 4.0 points of exact_match on 50 held-out rows \(92"):
        require_equal(lossy, "int4", tmp_path, 2.0)
    assert require_equal(lossy, "int4", tmp_path, 5.0) == lossy


@pytest.mark.parametrize(
    ("last", "keep", "found"),
    [
        ("logits = MatMul(a, head)", set(), {"body_Q4", "head_Q8"}),
        ("logits = Gemm(a, head)", set(), {"body_Q4", "head"}),  # a classifier
        ("b = MatMul(a, head) c = MatMul(a, B) logits = Add(b, c)", {"B"}, {"body_Q4", "head_Q8", "B"}),
    ],
)
def test_the_head_gets_8_bits_and_what_is_kept_none(last: str, keep: set[str], found: set[str], tmp_path: Path) -> None:
    inputs = '<ir_version: 10, opset_import: ["": 21]> g (float[1, 64] x) => (float[1, 64] logits)'
    model = onnx.parser.parse_model(f"{inputs} {{ a = MatMul(x, body) {last} }}")
    for node in model.graph.node:
        node.name = node.output[0]
        if node.op_type != "Add":
            weight = np.random.default_rng(0).standard_normal((64, 64), np.float32)
            model.graph.initializer.append(onnx.numpy_helper.from_array(weight, node.input[1]))
    onnx.save(model, tmp_path / GRAPH, save_as_external_data=True, location=DATA, size_threshold=0)
    quantize(tmp_path, 4, keep)
    nodes = [node for node in read_graph(tmp_path / GRAPH).graph.node if node.op_type != "Add"]
    assert {node.input[1] for node in nodes} == found
    with_zero_points = {node.input[1] for node in nodes if any("zero_point" in name for name in node.input)}
    assert with_zero_points == {"body_Q4"}  # a small model does not survive four bits without
    assert (tmp_path / DATA).stat().st_mode == (tmp_path / GRAPH).stat().st_mode  # whoever reads one reads both
