"""Running an exporter, and finishing what it wrote.

Each exporter runs as a child process: it loads the whole model, and its memory goes back when it ends.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..base.model import BaseModel
from ..base.network import as_base_model_error
from ..base.side_files import side_files
from ..base.tokenizer import tokenizer_of
from ..basis import Basis
from ..choices import CAUSAL_LM
from ..environment import child_environment
from ..errors import ServerError
from ..evaluation.answer_end import ends_of, write_end_ids
from ..files.output import disk_error_in
from ..files.storage import read_json, write_json
from .onnx_exporter import GENAI, PRECISIONS, read_config
from .onnx_graph import read_graph, rename_data

if TYPE_CHECKING:
    from onnx import GraphProto

GRAPH, DATA = "model.onnx", "model.onnx_data"  # the data file's name is the one transformers.js looks for
_NORM = re.compile(r"model\.layers\.\d+\.(?:\w+_layernorm|final_norm_layernorm)\.weight")  # Gemma's
_SCALED = "/model/embed_tokens/Mul"
_PENALTIES = ("repetition_penalty", "no_repeat_ngram_size")  # made for chats


def build(
    exporter: str, folder: Path, out: Path, precision: str, scratch: Path, task_type: str, basis: Basis | None = None
) -> None:
    """Write GRAPH and DATA into `out` and copy what lies beside the checkpoint in `folder`, a transformers one.

    Args:
        precision: of the export; fp32 is written where `quantize` is to follow.
        scratch: a temporary folder to run in. `python -m` puts the current folder first on its path, where a user's
            `datasets/` would hide the package of that name.
        basis: makes the targets swappable: kept apart (GENAI; `onnx_swap.add_basis` follows), or with A, R and B
            beside them, of a block with R alone (TORCH).
    """
    _run(_command(exporter, folder, out, precision, scratch, task_type, basis), scratch, folder)
    _finish_graph(out, folder if exporter == GENAI else None)
    _finish_files(exporter, folder, out, task_type)


def _command(
    exporter: str, folder: Path, out: Path, precision: str, scratch: Path, task_type: str, basis: Basis | None
) -> list[str]:
    """What `python -m` runs; arguments as for `build`."""
    wanted = PRECISIONS[precision]
    if exporter == GENAI:
        command = ["onnxruntime_genai.models.builder", "-i", str(folder), "-o", str(out)]
        command += ["-p", "fp32" if wanted.bits else precision, "-e", wanted.provider, "-c", str(scratch / "cache")]
        # Without the second, plain onnxruntime refuses an empty cache for layers with a sliding window; without the
        # third, early versions run code that lies beside a model.
        options = [f"fuse_qkv={str(basis is None).lower()}", "windowed_kv_cache=false", "hf_remote=false"]
        return [*command, "--extra_options", *options]
    command = ["lorasb_export.exporting.onnx_torch", str(folder), str(out), task_type, wanted.dtype]
    if basis is not None:
        (scratch / "basis").mkdir()
        basis.write_into(scratch / "basis")
        command.append(str(scratch / "basis"))
    return command


def _finish_files(exporter: str, folder: Path, out: Path, task_type: str) -> None:
    """What lies beside the graph: files of the checkpoint, and what says how the graph is read and asked."""
    tokenizer, template = out / "tokenizer_config.json", out / "chat_template.jinja"
    kept = {"model_max_length": read_json(tokenizer)["model_max_length"]} if exporter == GENAI else {}
    # The builder writes the tokenizer anew, as transformers 5 does and 4 cannot read it: what it wrote stays only where
    # the base has no tokenizer.json.
    own = (folder / "tokenizer.json").is_file()
    for path in side_files(folder):
        copy = out / path.relative_to(folder)
        if own or not copy.exists():
            copy.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, copy)
    if task_type == CAUSAL_LM:
        _ask_as_we_do(out)
    if template.is_file():  # transformers.js looks for it in the tokenizer's config alone
        kept["chat_template"] = template.read_text(encoding="utf-8")
    if kept:
        write_json(tokenizer, read_json(tokenizer) | kept)
    config = read_json(out / "config.json")
    # For transformers.js: which file it is (its "fp32" is the name without a suffix), and that DATA lies beside it.
    config["transformers.js_config"] = {"dtype": "fp32", "use_external_data_format": (out / DATA).exists()}
    if task_type == CAUSAL_LM:  # its context, under this name: GPT-2 has another, and some leave it out
        config["max_position_embeddings"] = read_config(folder).max_position_embeddings
    write_json(out / "config.json", config)


def _ask_as_we_do(out: Path) -> None:
    """Make generation_config.json end answers where ours end, without the penalties that ours leave out, and
    genai_config.json too: of older builders it lacks some ends.

    transformers.js reads the former, and would penalize greedy answers too.
    """
    with as_base_model_error(out):
        tokenizer = tokenizer_of(out)
        write_end_ids(out, tokenizer)
    of_genai = out / "genai_config.json"
    if of_genai.is_file():
        config = read_json(of_genai)
        config["model"]["eos_token_id"] = sorted(ends_of(out, tokenizer))
        write_json(of_genai, config)
    path = out / "generation_config.json"
    if path.is_file():
        write_json(path, {key: value for key, value in read_json(path).items() if key not in _PENALTIES})


def _run(command: list[str], scratch: Path, folder: Path) -> None:
    child = subprocess.run(
        [sys.executable, "-P", "-m", *command],
        cwd=scratch,
        env=child_environment("accelerate", "PIL", "torchvision", "triton"),  # 45 MB, of no use here
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    if child.returncode != 0:
        last = [line for line in child.stdout.splitlines() if line.strip()][-6:]
        if error := disk_error_in("\n".join(last)):
            raise error
        raise ServerError(
            "\n  ".join([f"the ONNX exporter failed with exit code {child.returncode}; its last lines:", *last]),
            where=folder,
            fix="Check that the memory holds the model; then report it with the versions of the packages",
        )


def _finish_graph(out: Path, built_from: Path | None) -> None:
    """Give the weights the name DATA, for the exporters add `.data` to the graph's; and the cache its head size, which
    the builder leaves open and transformers.js then takes for 0; and Gemma its exact numbers. Inputs that a node leaves
    out at its end go: the builder names them "", and onnxruntime before 1.23 knows fewer of GroupQueryAttention's.

    `built_from` is the checkpoint, where the builder was the exporter.
    """
    import onnx

    model = read_graph(out / GRAPH)
    if (out / f"{GRAPH}.data").exists():
        rename_data(model, f"{GRAPH}.data", DATA)
        (out / f"{GRAPH}.data").rename(out / DATA)
    for node in model.graph.node:
        while node.input and not node.input[-1]:
            node.input.pop()
    if built_from is not None:
        size = read_json(out / "genai_config.json")["model"]["decoder"]["head_size"]
        for value in (*model.graph.input, *model.graph.output):
            if value.name.startswith(("past_key_values.", "present.")):
                value.type.tensor_type.shape.dim[3].dim_value = size
        if read_json(built_from / "config.json")["model_type"] in ("gemma", "gemma2"):
            _make_exact(model.graph, built_from)
    onnx.save(model, out / GRAPH)


def _make_exact(graph: GraphProto, folder: Path) -> None:
    """Put into the builder's `graph` of the Gemma or Gemma 2 checkpoint in `folder` the numbers that it rounds.

    It multiplies embeddings by √width with two decimals, and adds the 1 of Gemma's norms, x·(1 + w), in the dtype that
    the checkpoint is stored in: in bfloat16 that is an error of up to 0.4 % in every norm. A bf16 graph is left as it
    is: its own norms are rounded to bf16 anyway.
    """
    from onnx import TensorProto, helper, numpy_helper
    from safetensors import safe_open

    base = BaseModel.resolve(folder)
    dtypes = {TensorProto.FLOAT: np.float32, TensorProto.FLOAT16: np.float16}
    for tensor in graph.initializer:
        if not _NORM.fullmatch(tensor.name) or tensor.data_type not in dtypes:
            continue
        key = "model.norm.weight" if ".final_norm_" in tensor.name else tensor.name
        with safe_open(base.tensors[key][0], framework="pt") as file:
            weight = 1 + file.get_tensor(key).float().numpy()
        tensor.CopyFrom(numpy_helper.from_array(weight.astype(dtypes[tensor.data_type]), tensor.name))
    width = base.config["hidden_size"]
    for node in graph.node:
        if node.name == _SCALED:
            rounded = next(other for other in graph.node if other.output and other.output[0] == node.input[1])
            kind = rounded.attribute[0].t.data_type
            if kind in dtypes:
                exact = helper.make_node("Constant", [], [f"{_SCALED}/scale"], name=f"{_SCALED}/Constant")
                value = numpy_helper.from_array(np.array(width**0.5, dtypes[kind]))
                exact.attribute.append(helper.make_attribute("value", value))
                node.input[1] = exact.output[0]
                graph.node.insert(0, exact)
            break
