"""A Hub id wherever a folder is taken: only what is needed comes down, it is verified, pinned, and runs offline."""

from __future__ import annotations

import pickle
import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from integration.hub_client import BASE, CLI, Hub, make_adapter, make_basis, serve
from lorasb_export.files.storage import read_json, write_json
from lorasb_export.format import sealed
from tests.tiny import make_llama


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory, llama: Path) -> Iterator[Hub]:
    """With me/basis, me/a and me/b on it, of owner/base."""
    root = tmp_path_factory.mktemp("hub")
    for found in serve(root, llama):
        basis = make_basis(root / "basis", llama)
        found.push(basis, "me/basis")
        for seed, name in enumerate("ab"):
            found.push(make_adapter(root / name, basis, seed=seed), f"me/{name}", basis_repo="me/basis")
        yield found
        assert found.violations == []


@pytest.fixture(scope="module")
def made(hub: Hub) -> Hub:
    """And with me/merged, made by the line of the card of me/a, and me/peft."""
    hub.lorasb(*commands_of(hub, "me/a")[0])
    hub.lorasb("export", "me/a", "--format", "peft", "--out", hub.root / "peft")
    hub.push(hub.root / "model", "me/merged")
    hub.push(hub.root / "peft", "me/peft")
    return hub


def fetched(hub: Hub, repo: str) -> set[str]:
    """The files of a repository that were downloaded."""
    return {line.rpartition("/")[2] for line in hub.requests if re.match(f"(GET|HEAD) /{repo}/resolve/", line)}


def test_merge_by_name_then_offline(hub: Hub, tmp_path: Path) -> None:
    hub.requests.clear()
    hub.lorasb("merge", "me/a", "--out", tmp_path / "model")
    assert fetched(hub, "me/a") <= {"adapter_config.json", "adapter.safetensors"}
    assert fetched(hub, "me/basis") <= {"basis_config.json", "basis.safetensors"}
    made = read_json(tmp_path / "model" / "lorasb.json")
    refs = {name: hub.repos[name].refs["main"] for name in ("me/a", "me/basis")}
    assert made["adapter"]["source"] == f"me/a@{refs['me/a']}"
    assert made["adapter"]["name"] == "a"
    assert made["basis"]["source"] == f"me/basis@{refs['me/basis']}"
    assert made["command"].startswith("lorasb merge me/a --out model")

    hub.requests.clear()
    offline = """
import sys
from lorasb_export import export, merge
from lorasb_export.inspection import inspect_folder
merge("me/a", sys.argv[1] + "/again")
export("me/a", sys.argv[1] + "/peft", format="peft")
print(inspect_folder("me/a")["basis_matches"])
"""
    assert hub.run(offline, tmp_path, HF_HUB_OFFLINE="1") == "True"
    assert hub.requests == []
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "model" / name).read_bytes()
    assert read_json(tmp_path / "peft" / "lorasb.json")["adapter"]["source"] == f"me/a@{refs['me/a']}"


def test_a_base_whose_large_files_came_by_xet(hub: Hub, llama: Path, tmp_path: Path) -> None:
    """As every large file of the Hub does: in its cache they are links to files that all repositories share."""
    base = shutil.copytree(llama, tmp_path / "base")
    weights = {name: 2 * weight for name, weight in load_file(base / "model.safetensors").items()}
    save_file(weights, base / "model.safetensors", {"format": "pt"})  # others: of a file it has the Hub sends nothing
    (base / "tokenizer.model").write_bytes(b"\xff\x00 words")
    upload = """
import sys
from huggingface_hub import HfApi
HfApi().create_repo("me/large")
print(HfApi().upload_folder(repo_id="me/large", folder_path=sys.argv[1]))
"""
    hub.run(upload, base)
    basis = make_basis(tmp_path / "basis", base)
    config = read_json(basis / "basis_config.json")
    config["base_model"]["name_or_path"] = "me/large"
    write_json(basis / "basis_config.json", sealed(config))
    adapter = make_adapter(tmp_path / "a", basis)
    hub.lorasb("merge", adapter, "--out", tmp_path / "model", "--verify")
    assert (tmp_path / "model" / "tokenizer.model").read_bytes() == b"\xff\x00 words"
    snapshot = next((hub.home / "hub" / "models--me--large" / "snapshots").iterdir())
    assert (snapshot / "tokenizer.model").resolve().parents[1].name == "blobs"  # or this has shown nothing


def test_a_base_that_others_have_fetched_is_used_offline(hub: Hub, tmp_path: Path) -> None:
    """They leave out its card, and all that an online look had listed is asked for otherwise."""
    fetch = """
import sys
from huggingface_hub import snapshot_download
print(snapshot_download(sys.argv[1], allow_patterns=sys.argv[2:]))
"""
    home = {"HF_HOME": str(tmp_path / "home")}
    for words in ((BASE, "config.json"), ("me/a", "adapter*"), ("me/basis", "basis*")):
        hub.run(fetch, *words, **home)
    hub.lorasb("inspect", BASE, **home)  # keeps a list of what there is
    words = ("merge", "me/a", "--out", tmp_path / "model")
    assert "the base model was not found" in hub.lorasb_fails(*words, HF_HUB_OFFLINE="1", **home)
    hub.run(fetch, BASE, "*.safetensors", "*.json", **home)
    exit_code, _, errors = hub.start(CLI, *words, HF_HUB_OFFLINE="1", **home)
    assert (exit_code, "what is in the cache of it is taken" in errors) == (0, True)
    assert (tmp_path / "model" / "model.safetensors").is_file()


def test_what_is_not_in_the_cache_needs_a_connection(hub: Hub) -> None:
    said = hub.lorasb_fails("inspect", "me/never", HF_HUB_OFFLINE="1")
    assert said == (
        "Error: no such folder, and HF_HUB_OFFLINE is set and the cache does not have it (me/never). "
        "Fetch it once with a connection"
    )


def test_inspect_by_name(hub: Hub) -> None:
    head = hub.repos["me/basis"].refs["main"]
    basis, base = hub.lorasb("inspect", "me/basis"), hub.lorasb("inspect", BASE)
    assert (basis["kind"], basis["path"], basis["rank"]) == ("basis", f"me/basis@{head}", 4)
    assert (base["kind"], base["model_type"]) == ("base", "llama")
    assert hub.lorasb("inspect", "me/a")["basis_source"] == f"me/basis@{head}"


def test_published_files_are_compared_with_their_checksums(hub: Hub) -> None:
    found = hub.lorasb("inspect", "me/a", "--verify")["verified"]
    assert (found["files"], found["unlisted"]) == (2, [])
    whole = hub.run("import sys; from huggingface_hub import snapshot_download as get; print(get('me/a'))")
    assert hub.lorasb("inspect", whole, "--verify")["verified"] == found
    assert hub.lorasb("inspect", "me/a", "--verify", HF_HUB_OFFLINE="1")["verified"] == found

    repo, files = hub.repos["me/a"], hub.files("me/a")
    said = "Error: not as published: adapter.safetensors changed (me/a@"
    for changed, expected in (
        ({"adapter.safetensors": hub.files("me/b")["adapter.safetensors"]}, said),
        ({"SHA256SUMS": hub.store.regular(f"{'0' * 64}  evil.bin\n".encode())}, "Error: not a line of a SHA256SUMS of"),
    ):
        repo.commit("tampered", files | changed | {"evil.bin": files["README.md"]}, "not by lorasb")
        hub.requests.clear()
        assert hub.lorasb_fails("inspect", "me/a@tampered", "--verify").startswith(expected)
        assert "evil.bin" not in fetched(hub, "me/a")


def test_fit_in_a_basis_by_name(hub: Hub, sums: Path, tmp_path: Path) -> None:
    words = ["--model", BASE, "--data", sums, "--basis", "me/basis", "--max-steps", "2", "--out", tmp_path / "sums"]
    hub.lorasb("fit", "sums", *words)
    config, made = (read_json(tmp_path / "sums" / name) for name in ("adapter_config.json", "lorasb.json"))
    assert config["basis"]["source"] == f"me/basis@{hub.repos['me/basis'].refs['main']}"
    base = f"from lorasb_export.base.model import BaseModel; print(BaseModel.resolve('{BASE}').revision)"
    assert hub.run(base) == hub.repos[BASE].refs["main"]
    assert made["command"].startswith("lorasb fit sums --model owner/base --data sums --basis me/basis")
    offline = hub.lorasb("fit", "sums", *words, "--overwrite", HF_HUB_OFFLINE="1")
    assert offline["adapters"]["sums"]["steps"] == 2


def test_serve_evaluate_and_generate_by_name(hub: Hub, sums: Path) -> None:
    revision = hub.repos["me/b"].refs["main"]
    plan = hub.lorasb("serve", "--adapters", f"me/a,me/b@{revision}", "--dry-run")
    assert plan["models"] == [BASE, "a", "b"]
    words = ["serve", "--adapters", f"me/a,me/b@{revision}", "--dry-run"]
    assert hub.lorasb(*words, HF_HUB_OFFLINE="1")["models"] == plan["models"]
    cache = {path: path.read_bytes() for path in (hub.home / "hub").rglob("*") if path.is_file()}
    found = hub.lorasb("evaluate", "me/a", "--data", sums, "--metric", "loss")["evaluation"]["me/a"]
    assert found["rows"] == 24
    answers = hub.lorasb("generate", "1+1=", "--adapters", "me/a,me/b", "--max-tokens", "2")["answers"]
    assert set(answers) == {"base", "me/a", "me/b"}
    assert {path: path.read_bytes() for path in cache} == cache  # what was fetched is not written to


def test_what_does_not_belong_together_is_refused(hub: Hub, llama: Path, tmp_path: Path) -> None:
    """Another basis under the same name, another base, a basis on somebody's disk: nobody merges these."""
    adapter = tmp_path / "c"
    shutil.copytree(hub.root / "a", adapter)
    config = read_json(adapter / "adapter_config.json")
    write_json(adapter / "adapter_config.json", sealed(config | {"base_fingerprint": "0" * 64}))
    (adapter / "evil.py").write_text("raise SystemExit('executed')")
    (adapter / "pytorch_model.bin").write_bytes(b"a pickle")
    hub.put("me/c", adapter)
    said = hub.lorasb_fails("merge", "me/c", "--out", tmp_path / "out")
    assert "its basis is a folder on somebody else's disk (me/c@" in said
    source = {"sha256": config["basis"]["sha256"], "source": "me/basis@main"}
    write_json(adapter / "adapter_config.json", sealed(config | {"base_fingerprint": "0" * 64, "basis": source}))
    hub.put("me/c", adapter)
    said = hub.lorasb_fails("merge", "me/c", "--out", tmp_path / "out")
    assert "the base's weights are not those the artifact was made for (owner/base)" in said
    make_basis(tmp_path / "other", llama, seed=9)
    hub.put("me/other", tmp_path / "other")
    wrong = {"sha256": config["basis"]["sha256"], "source": "me/other@main"}
    write_json(adapter / "adapter_config.json", sealed(config | {"basis": wrong}))
    hub.put("me/c", adapter)
    said = hub.lorasb_fails("merge", "me/c", "--out", tmp_path / "out")
    assert "adapter and basis do not belong together" in said
    assert not fetched(hub, "me/c") & {"evil.py", "pytorch_model.bin"}


def test_a_base_with_code_and_pickles_is_read_without_them(hub: Hub, tmp_path: Path) -> None:
    """Nothing of it is fetched, so nothing can be run; the marker would show it if it were."""
    marker, base = tmp_path / "executed", tmp_path / "base"
    shutil.copytree(hub.base, base)
    classes = {f"Auto{what}": f"evil.Evil{what}" for what in ("Config", "Model", "ModelForCausalLM", "Tokenizer")}
    for name in ("config.json", "tokenizer_config.json"):
        write_json(base / name, read_json(base / name) | {"auto_map": classes})
    (base / "evil.py").write_text(f"open({str(marker)!r}, 'w')\nraise SystemExit('executed')")
    for name in ("pytorch_model.bin", "training_args.bin", "model.pkl"):
        (base / name).write_bytes(pickle.dumps(Touch(marker)))
    (base / "LICENSE").write_text("for anybody")
    hub.put("owner/evil", base)
    answers = hub.lorasb("generate", "1+1=", "--adapters", "me/a", "--model", "owner/evil", "--max-tokens", "2")
    assert set(answers["answers"]) == {"base", "me/a"}
    hub.lorasb("merge", "me/a", "--model", "owner/evil", "--out", tmp_path / "merged")
    assert not any(path.suffix in (".py", ".bin", ".pkl") for path in (tmp_path / "merged").iterdir())
    assert (tmp_path / "merged" / "LICENSE").read_text() == "for anybody"
    assert fetched(hub, "owner/evil") >= {"config.json", "model.safetensors"}
    assert not {name for name in fetched(hub, "owner/evil") if name.endswith((".py", ".bin", ".pkl"))}
    assert not marker.exists()


def test_the_weights_of_a_base_that_is_refused_are_not_fetched(hub: Hub, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(hub.base, base)
    quantized = {"quantization_config": {"quant_method": "gptq"}}
    write_json(base / "config.json", read_json(base / "config.json") | quantized)
    hub.put("owner/quantized", base)
    words = ("merge", "me/a", "--model", "owner/quantized", "--out", tmp_path / "merged")
    assert "quantized (gptq)" in hub.lorasb_fails(*words)
    assert fetched(hub, "owner/quantized") == {"config.json"}


def test_a_base_at_a_revision_is_the_hubs_also_where_a_folder_has_its_name(hub: Hub, tmp_path: Path) -> None:
    hub.put("owner/twin", hub.base)
    (hub.root / "owner" / "twin").mkdir(parents=True)  # commands run in that root
    done = hub.lorasb("merge", "me/a", "--model", "owner/twin@main", "--out", tmp_path / "merged")
    assert done["base"] == "owner/twin"
    shutil.rmtree(hub.root / "owner")  # else other tests' owner/base would be a mistyped path


class Touch:
    """Unpickled, it leaves a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return (Path.touch, (self.path,))


def lines_of(hub: Hub, repo: str, language: str = "python") -> str:
    """The first block of code in a published card."""
    block = re.search(rf"```{language}\n(.*?)```", hub.content(repo, "README.md").decode(), re.DOTALL)
    assert block is not None
    return block.group(1)


def commands_of(hub: Hub, repo: str) -> list[list[str]]:
    """The words after `lorasb` of each command in a published card."""
    return [shlex.split(line, comments=True)[1:] for line in lines_of(hub, repo, "bash").splitlines()]


LOGITS = "\nimport torch\nprint(model(torch.arange(8)[None]).logits.double().sum().item())"


def test_the_cards_lines_run_as_they_stand(made: Hub) -> None:
    hub = made
    merge, serve = commands_of(hub, "me/a")
    assert merge[0] == "merge"  # which has run: it made me/merged
    assert hub.lorasb(*serve, "--dry-run")["models"] == [BASE, "a"]
    sums = {repo: float(hub.run(lines_of(hub, repo) + LOGITS)) for repo in ("me/a", "me/merged", "me/peft")}
    plain = f'from transformers import AutoModelForCausalLM as M\nmodel = M.from_pretrained("{BASE}")'
    base = float(hub.run(plain + LOGITS))
    assert sums["me/a"] == pytest.approx(sums["me/merged"], rel=1e-4)
    assert sums["me/a"] == pytest.approx(sums["me/peft"], rel=1e-4)
    assert abs(sums["me/a"] - base) > 1
    assert hub.run(lines_of(hub, "me/basis") + "\nprint(len(adapter.R))") == "2"


@pytest.mark.usefixtures("quick_exporters")
def test_the_lines_of_onnx_cards_run_as_they_stand(hub: Hub) -> None:
    """Ours, of a graph by torch's exporter; and those of genai, whose builder takes the wider model."""
    pytest.importorskip("onnxruntime_genai")
    from lorasb_export.exporting.onnx import export_onnx
    from lorasb_export.exporting.onnx_adapters import export_onnx_adapters

    export_onnx(hub.root / "a", hub.root / "onnx", base=hub.base, verify=False)
    wide = hub.root / "wide"
    basis = make_basis(wide / "basis", make_llama(wide / "base", width=64))
    adapters = [make_adapter(wide / name, basis, seed=seed) for seed, name in enumerate("ab")]
    export_onnx_adapters(adapters, hub.root / "tasks", base=wide / "base", verify=False)
    for folder in ("onnx", "tasks"):
        repo = f"me/{folder}-graph"
        assert hub.push(hub.root / folder, repo)["skipped"] == []
        lines = lines_of(hub, repo)
        assert ("import onnxruntime_genai" in lines) is (folder == "tasks")
        assert hub.run(f"{lines}\nprint(folder)").endswith(f"{folder}-graph")
    assert "adapters for `owner/base`" in hub.content("me/tasks-graph", "README.md").decode()


def test_no_published_file_says_where_its_owner_keeps_it(made: Hub) -> None:
    """Of all that is pushed in this module, as it lies on the Hub."""
    hub = made
    places = [str(hub.root).encode(), str(hub.base).encode(), str(Path.home()).encode() + b"/"]
    pushed = {(repo, path) for repo in hub.repos if repo.startswith("me/") for path in hub.files(repo)}
    assert {repo for repo, _ in pushed} >= {"me/basis", "me/a", "me/merged", "me/peft"}
    telling = {(repo, path) for repo, path in pushed if any(place in hub.content(repo, path) for place in places)}
    assert telling - {("me/c", "adapter_config.json")} == set()  # that one was not pushed by lorasb
