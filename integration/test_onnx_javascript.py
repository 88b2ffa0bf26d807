"""The code of docs/how-to/onnx.md, run: by onnxruntime, in Node by its package, in a browser by transformers.js."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest

pytest.importorskip("onnxruntime_genai")

from lorasb_export.base.model import BaseModel
from lorasb_export.exporting.onnx import export_onnx
from lorasb_export.exporting.onnx_adapters import export_onnx_adapters
from lorasb_export.exporting.onnx_ask import ask_onnx
from lorasb_export.files.storage import read_json, write_json
from tests.random_adapter import save_adapter
from tests.tiny import make_gpt2

from .onnx_world import make_world

pytestmark = pytest.mark.usefixtures("quick_exporters")

VERSION = "4.3.1"  # of @huggingface/transformers; it brings onnxruntime-node 1.30 and onnxruntime-web
# In what npm says of a machine without the network: a version that is gone would have another code.
UNREACHED = re.compile("code (ENOTFOUND|EAI_AGAIN|ECONN|E[A-Z_]*TIMED?OUT|ENETUNREACH|EHOSTUNREACH)")
PROMPT = "What is 2+2?"
PAGE = """<!doctype html><meta charset="utf-8">
<script type="importmap">{"imports": {
  "onnxruntime-common": "/node_modules/onnxruntime-common/dist/esm/index.js",
  "onnxruntime-web/webgpu": "/node_modules/onnxruntime-web/dist/ort.webgpu.bundle.min.mjs",
  "@huggingface/transformers": "/node_modules/@huggingface/transformers/dist/transformers.web.js"
}}</script>
<script type="module">
import { env } from "@huggingface/transformers";
env.backends.onnx.wasm.wasmPaths = "/node_modules/onnxruntime-web/dist/"; // else from a CDN
env.backends.onnx.wasm.numThreads = 1;
</script>
<script type="module">
const say = (text) => fetch("/said", { method: "POST", body: text });
addEventListener("unhandledrejection", (event) => say("ERROR " + event.reason));
addEventListener("error", (event) => say("ERROR " + event.message));
const prompt = PROMPT;
CODE
await say(answer);
</script>"""


def code(heading: str, language: str) -> str:
    """The blocks of code under a heading of the how-to."""
    text = (Path(__file__).parents[1] / "docs/how-to/onnx.md").read_text()
    section = text.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    found = re.findall(rf"^```{language}\n(.*?)^```", section, re.DOTALL | re.MULTILINE)
    assert found, heading
    return "\n".join(found)


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export by torch's exporter, in fp16, with the adapter a."""
    root = tmp_path_factory.mktemp("gpt2")
    base = make_gpt2(root / "base")
    network = BaseModel.resolve(base).load()
    save_adapter(base, network, root / "a", ["transformer.h.0.mlp.c_fc"], relative_size=0.5)
    export_onnx_adapters([root / "a"], root / "onnx", precision="fp16", verify=False)
    return root / "onnx"


def test_python_runs_a_task(gpt2: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With OnnxDecoder, and one step without it."""
    names: dict[str, Any] = {}
    exec(code("Run it with onnxruntime", "python").replace("tasks-onnx", str(gpt2)), names)
    (said,) = ask_onnx(gpt2, ["What is the capital of France?"], max_tokens=40)["a"]
    assert said == capsys.readouterr().out.splitlines()[0]
    assert names["answers"][0][0] == names["logits"][0, -1].argmax()


@pytest.fixture(scope="module")
def root(gpt2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with transformers.js installed, and exports of tiny random models in it; gpt2's has no chat template."""
    if shutil.which("node") is None or shutil.which("npm") is None:
        pytest.skip("Node.js is not installed")
    root = tmp_path_factory.mktemp("js")
    # Without scripts: onnxruntime-node's fetches CUDA libraries. sharp, for images, is not needed.
    command = ["npm", "install", "--ignore-scripts", "--no-audit", "--no-fund", f"@huggingface/transformers@{VERSION}"]
    try:
        done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=300)
    except subprocess.TimeoutExpired:
        pytest.skip("the npm registry does not answer in time")
    if done.returncode and UNREACHED.search(done.stderr):
        pytest.skip(f"the npm registry cannot be reached: {done.stderr}")
    assert done.returncode == 0, done.stderr
    world = make_world(root / "world")
    export_onnx(world / "red", root / "a-onnx", verify=False)
    export_onnx_adapters([world / "red", world / "blue"], root / "routed", routed=True, verify=False)
    (root / "ask.mjs").write_text(code("Run it in JavaScript", "js"))
    shutil.copytree(gpt2, root / "gpt2")
    (root / "gpt2" / "chat_template.jinja").unlink()
    config = root / "gpt2" / "tokenizer_config.json"
    write_json(config, {key: value for key, value in read_json(config).items() if key != "chat_template"})
    return root


def test_node_runs_every_task_of_a_routed_graph_and_a_merged_one(root: Path) -> None:
    expected = {name: said for name, (said,) in ask_onnx(root / "routed", [PROMPT], max_tokens=64).items()}
    assert len(set(expected.values())) == 3
    for folder, name in (("routed", "base"), ("routed", "red"), ("routed", "blue"), ("a-onnx", "red")):
        command = ["node", "ask.mjs", folder, name, PROMPT]
        done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        assert letters(done.stdout) == letters(expected[name])


def test_node_runs_a_graph_of_torchs_exporter_in_fp16_without_a_chat_template(root: Path) -> None:
    command = ["node", "ask.mjs", "gpt2", "base", PROMPT]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert letters(done.stdout) == letters(ask_onnx(root / "gpt2", [PROMPT], max_tokens=64)["base"][0])


def letters(text: str) -> str:
    """A text without spaces: transformers.js takes away those before punctuation."""
    return "".join(text.split())


class Site(SimpleHTTPRequestHandler):
    """`root`, with the page at / and its exports under /models; what the page says is kept."""

    extensions_map: ClassVar = SimpleHTTPRequestHandler.extensions_map | {
        ".mjs": "text/javascript",
        ".wasm": "application/wasm",
    }
    page = ""
    said: list[str]
    heard: threading.Event

    def translate_path(self, path: str) -> str:
        return super().translate_path(path.removeprefix("/models"))

    def do_GET(self) -> None:
        if self.path != "/":
            super().do_GET()
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
        self.end_headers()
        self.wfile.write(self.page.encode())

    def do_POST(self) -> None:
        self.said.append(self.rfile.read(int(self.headers["Content-Length"])).decode())
        self.send_response(200)
        self.end_headers()
        self.heard.set()

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def address(root: Path) -> Iterator[str]:
    Site.page = PAGE.replace("PROMPT", json.dumps(PROMPT)).replace("CODE", code("Run it in a browser", "js"))
    Site.said, Site.heard = [], threading.Event()
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Site, directory=str(root))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


def test_a_browser_runs_the_merged_graph(root: Path, address: str, tmp_path: Path) -> None:
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no Chromium")
    command = [chromium, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}", address]
    browser = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        assert Site.heard.wait(120), "the page said nothing"
    finally:
        browser.terminate()
        browser.wait()
    assert letters(Site.said[0]) == letters(ask_onnx(root / "a-onnx", [PROMPT], max_tokens=64)["red"][0])
