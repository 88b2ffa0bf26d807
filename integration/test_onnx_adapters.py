"""Adapters in an ONNX export: added, replaced, routed row by row, and what ONNX Runtime does with them."""

from __future__ import annotations

import gc
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lorasb_export.adapter import Adapter
from lorasb_export.basis import Basis
from lorasb_export.data.rows import with_system
from lorasb_export.errors import ArtifactError, BaseModelError, DataError, OutputError, SettingsError
from lorasb_export.evaluation.answer_end import before_end
from lorasb_export.evaluation.side_by_side import ask_adapters
from lorasb_export.exporting import onnx_adapters, onnx_run
from lorasb_export.exporting.onnx_adapters import add_onnx_adapters, export_onnx_adapters
from lorasb_export.exporting.onnx_ask import ask_onnx
from lorasb_export.exporting.onnx_record import read_record
from lorasb_export.exporting.onnx_run import OnnxDecoder, open_session
from lorasb_export.exporting.onnx_swap import Arrays, read_adapter, scaled_R, write_adapter
from tests.tiny import make_llama

from .onnx_world import EOS, PROMPTS, TOKENS, answers, save_adapter
from .reference import merged

ort = pytest.importorskip("onnxruntime")
og = pytest.importorskip("onnxruntime_genai")
pytest.importorskip("onnx")

pytestmark = pytest.mark.usefixtures("quick_exporters")


def test_an_adapter_of_another_graph_is_refused(tasks_onnx: Path, tmp_path: Path) -> None:
    own = read_adapter(tasks_onnx / "red.onnx_adapter")
    foreign = {name.rpartition(".")[0] + ".0123456789ab": array for name, array in own.items()}
    write_adapter(tmp_path / "foreign.onnx_adapter", foreign)
    with pytest.raises(ArtifactError, match="another graph"):
        OnnxDecoder(tasks_onnx, tmp_path / "foreign.onnx_adapter")
    with pytest.raises(ArtifactError, match="no such ONNX adapter"):
        OnnxDecoder(tasks_onnx, tasks_onnx / "green.onnx_adapter")
    half = {name: array.astype(np.float16) for name, array in own.items()}
    write_adapter(tmp_path / "half.onnx_adapter", half)
    with pytest.raises(ArtifactError, match="another graph"):
        OnnxDecoder(tasks_onnx, tmp_path / "half.onnx_adapter", threads=1)


def test_many_prompts_are_answered_as_in_torch(world: Path, tasks_onnx: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a system message too; and no adapter is asked for before all are there."""
    asked = ["1+1=", with_system("1+1=", "add"), *(f"{number}+{number}=" for number in range(9))]
    adapters = {name: str(world / name) for name in ("red", "blue")}
    torchs = ask_adapters(asked, adapters, base=None, max_tokens=6, dtype="float32")
    assert ask_onnx(tasks_onnx, asked, ["red", "blue"], max_tokens=6) == torchs
    assert len({answer for said in torchs.values() for answer in said}) > 20
    with pytest.raises(DataError, match=r"an answer of 120; the base's positions end at 128 \(row 2\)"):
        ask_onnx(tasks_onnx, asked, ["red"], max_tokens=120, unit="row")
    monkeypatch.delattr(OnnxDecoder, "generate")
    with pytest.raises(ArtifactError, match="no such ONNX adapter"):
        ask_onnx(tasks_onnx, asked, ["red", "green"], max_tokens=6)


def test_tasks_are_added_without_the_graph_being_exported_again(world: Path, tmp_path: Path) -> None:
    out = tmp_path / "tasks"
    export_onnx_adapters([world / "red"], out, verify=False)
    graph = {name: (out / name).read_bytes() for name in ("model.onnx", "basis.onnx_data")}
    red = (out / "red.onnx_adapter").stat().st_ino
    result = add_onnx_adapters([world / "blue"], out)
    assert (out / "red.onnx_adapter").stat().st_ino == red  # linked, not written again
    assert set(result["adapters"]) == {"red", "blue"}
    assert result["verify"]["blue"]["equal_tokens"] == result["verify"]["blue"]["tokens"]
    assert {name: (out / name).read_bytes() for name in graph} == graph
    for name in ("red", "blue"):
        found = OnnxDecoder(out, name, threads=1).generate(PROMPTS, TOKENS, set())
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
    folder = shutil.copytree(tasks_onnx, tmp_path / "tasks")
    before = (folder / "red.onnx_adapter").read_bytes()
    os.link(folder / "red.onnx_adapter", tmp_path / "before")
    other = save_adapter(Basis.load(world / "basis"), tmp_path / "red", seed=12)
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tools.jinja").write_text("{{ tools }}")
    result = add_onnx_adapters([other], folder, verify=False, overwrite=True)
    assert result["bytes"] == sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    assert (folder / "red.onnx_adapter").read_bytes() != before == (tmp_path / "before").read_bytes()
    verified = (read_record(path)["verify"] for path in (tasks_onnx, folder))
    assert ["red" in of_folder for of_folder in verified] == [True, False]  # which said it of the one before


def test_what_is_not_ours_stays_in_the_folder(world: Path, tasks_onnx: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tasks_onnx, tmp_path / "tasks")
    own = {".git/HEAD": "ref: x", ".git/hooks/pre-push": "#!", ".gitattributes": "*.onnx", ".cache/a": "", "run": "#!"}
    for name, text in own.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    (folder / "latest").symlink_to(tmp_path)
    new = save_adapter(Basis.load(world / "basis"), tmp_path / "c", seed=12)
    add_onnx_adapters([new], folder, verify=False)
    assert (folder / "c.onnx_adapter").is_file()
    assert {name: (folder / name).read_text() for name in own} == own
    assert all(os.access(folder / name, os.X_OK) for name in own)
    assert (folder / "latest").readlink() == tmp_path


def test_the_adapters_of_a_basis_are_compared_with_one_copy_of_it(
    world: Path, tasks_onnx: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, basis = shutil.copytree(tasks_onnx, tmp_path / "tasks"), Basis.load(world / "basis")
    new = [save_adapter(basis, tmp_path / name, seed) for seed, name in enumerate(("c", "d"))]
    read: list[str] = []
    load = Basis.load
    monkeypatch.setattr(Basis, "load", lambda source: read.append(source) or load(source))
    add_onnx_adapters(new, folder)
    export_onnx_adapters(new, tmp_path / "new")
    assert len(read) == 2


def test_of_many_adapters_each_is_written_in_turn_and_the_first_are_compared(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    held: list[str] = []

    def values_of(adapter: Adapter, dtype: np.dtype[Any]) -> Arrays:
        held.append(f"values of {adapter.name}")
        return scaled_R(adapter, dtype)

    def write(path: Path, arrays: Arrays) -> None:
        held.append(f"file of {path.stem}")
        write_adapter(path, arrays)

    monkeypatch.setattr(onnx_adapters, "scaled_R", values_of)
    monkeypatch.setattr(onnx_adapters, "write_adapter", write)
    monkeypatch.setattr(onnx_adapters, "MAX_COMPARED", 1)
    result = export_onnx_adapters([world / "red", world / "blue"], tmp_path / "tasks")
    assert held == ["values of red", "file of red", "values of blue", "file of blue"]
    assert (list(result["adapters"]), list(result["verify"])) == (["red", "blue"], ["base", "red"])
    assert "The first 1 adapters are compared with torch, 1 are not" in caplog.text


def test_tasks_that_are_added_at_once_are_all_there(world: Path, tasks_onnx: Path, tmp_path: Path) -> None:
    folder, basis = shutil.copytree(tasks_onnx, tmp_path / "tasks"), Basis.load(world / "basis")
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
    graph = (out / "model.onnx").rename(tmp_path / "graph")
    (out / "model.onnx").symlink_to(graph)  # as in the Hub's cache
    before = graph.read_bytes()
    add_onnx_adapters([world / "blue"], out)
    assert (out / "model.onnx_data").stat().st_ino == weights  # linked, not written again
    assert not (out / "tasks-1.onnx_data").exists()
    assert graph.read_bytes() == before
    rows = ["red", None, "blue", "red", "blue", None, "blue", "red", None]
    found = OnnxDecoder(out, threads=1).generate(PROMPTS, TOKENS, set(), rows)
    expected = {
        name: answers(merged(world / "base", world / name if name else None), set()) for name in (None, "red", "blue")
    }
    assert found == [expected[name][row] for row, name in enumerate(rows)]
    assert OnnxDecoder(out, "blue", threads=1).generate(PROMPTS, TOKENS, set()) == expected["blue"]
    with pytest.raises(ArtifactError, match="no adapter 'green'"):
        OnnxDecoder(out, "green")
    with pytest.raises(SettingsError, match="has an adapter 'red'"):
        add_onnx_adapters([world / "red"], out, overwrite=True)

    model, generators, kept = og.Model(str(out)), {}, []  # as the page says it, several requests at a time
    for name, number in (("blue", 2), ("red", 1), (None, 0)):
        parameters = og.GeneratorParams(model)
        parameters.set_search_options(max_length=len(PROMPTS[0]) + TOKENS, do_sample=False)
        generators[name] = og.Generator(model, parameters)
        kept.append(np.array([number], np.int64))
        generators[name].set_model_input("adapter_ids", kept[-1])
    for generator in generators.values():
        generator.append_tokens(PROMPTS[0])
    for name, generator in generators.items():
        while not generator.is_done():
            generator.generate_next_token()
        said = generator.get_sequence(0)[len(PROMPTS[0]) :].tolist()
        assert said == before_end(expected[name][0], {EOS})


def test_routing_needs_a_routed_folder(tasks_onnx: Path) -> None:
    with pytest.raises(SettingsError, match="one adapter for a whole batch"):
        OnnxDecoder(tasks_onnx, threads=1).generate([[5]], 1, set(), ["red"])


# Traps of ONNX Runtime (docs/how-to/onnx.md, "Your own decoding loop"): what it does, and that ours does not fall in.


def session_and_feed(folder: Path) -> tuple[Any, dict[str, Any]]:
    session = open_session(folder, threads=1)
    ids = np.array([PROMPTS[1]])
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
    assert decoder.generate(PROMPTS, TOKENS, set()) == answers(merged(world / "base", world / "blue"), set())
    decoder.use(None)
    assert decoder.generate(PROMPTS, TOKENS, set()) == answers(merged(world / "base", None), set())


def test_of_many_adapters_those_used_last_are_kept(
    world: Path, tasks_onnx: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(tasks_onnx, tmp_path / "tasks")
    shutil.copy(folder / "red.onnx_adapter", folder / "again.onnx_adapter")
    monkeypatch.setattr(onnx_run, "_KEPT", 2)
    decoder = OnnxDecoder(folder, "red", threads=1)
    for name, kept in (("blue", "red blue"), ("red", "blue red"), ("again", "red again"), ("blue", "again blue")):
        decoder.use(name)
        gc.collect()
        assert [path.stem for path, _ in decoder._loaded] == kept.split()
        network = merged(world / "base", world / ("red" if name == "again" else name))
        assert decoder.generate(PROMPTS, TOKENS, set()) == answers(network, set())


def test_an_adapter_that_another_thread_chooses_is_that_of_later_answers(
    world: Path, tasks_onnx: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though the one in use is no longer among those that are kept."""
    monkeypatch.setattr(onnx_run, "_KEPT", 1)
    decoder = OnnxDecoder(tasks_onnx, "red", threads=1)
    run = decoder._session.run_with_ort_values

    def interrupted(*words: Any) -> Any:
        with ThreadPoolExecutor(1) as thread:
            thread.submit(decoder.use, "blue").result()
        gc.collect()
        return run(*words)

    with monkeypatch.context() as patch:
        patch.setattr(decoder._session, "run_with_ort_values", interrupted)
        assert decoder.generate(PROMPTS, TOKENS, set()) == answers(merged(world / "base", world / "red"), set())
    assert decoder.generate(PROMPTS, TOKENS, set()) == answers(merged(world / "base", world / "blue"), set())


def test_adapters_outlive_their_python_names(world: Path, tasks_onnx: Path) -> None:
    """RunOptions does not keep a LoraAdapter alive: ours are held while other adapters come and go."""
    decoder = OnnxDecoder(tasks_onnx, "red", threads=1)
    gc.collect()
    for _ in range(50):
        other = ort.LoraAdapter()
        other.Load(str(tasks_onnx / "blue.onnx_adapter"))
        del other
    gc.collect()
    assert decoder.generate(PROMPTS, TOKENS, set()) == answers(merged(world / "base", world / "red"), set())


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
