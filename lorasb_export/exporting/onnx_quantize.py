"""Weights of a finished fp32 graph in 8 or 4 bits, by onnxruntime's MatMulNBits.

Blocks of 32 numbers with a scale each, rounded to nearest; int4 with a zero point as well (the builder's own int4 has
none and rounds the embeddings too, which a small model does not survive). The last layer stays as it is where it
shares its weights with the embeddings, else it gets 8 bits. Products are summed from 8-bit activations.
"""

from __future__ import annotations

import logging
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import ServerError
from .onnx_build import DATA, GRAPH

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto

_BLOCK = 32
_BEHIND_THE_HEAD = {"Add", "Mul", "Div", "Tanh", "Cast"}  # its bias, its adapter, a scale, a soft cap
_ACTIVATIONS = 4  # onnxruntime's accuracy level: 8-bit integers, two to three times as fast on a CPU as fp32


def quantize(folder: Path, bits: int, keep: Collection[str] = ()) -> None:
    """Rewrite GRAPH and DATA of `folder`.

    Args:
        keep: names of weights that stay as they are.

    Raises:
        ServerError: nothing was left to quantize.
    """
    import onnx

    path = folder / GRAPH
    model = onnx.load(path)
    head = _head(model, keep)
    weight_of_head = head.input[1] if head else None
    readers = sum(weight_of_head in node.input for node in model.graph.node)
    kept = [node.name for node in _matmuls(model) if node.input[1] in {*keep, weight_of_head}]
    model = _quantized(model, bits, kept)
    if readers == 1:
        others = [node.name for node in _matmuls(model) if node.input[1] != weight_of_head]
        model = _quantized(model, 8, others)
    if not any(node.op_type == "MatMulNBits" for node in model.graph.node):
        fix = "Export with --precision fp32, and report it with the model's name"
        raise ServerError("no layer of the graph can be quantized", where=path, fix=fix)
    (folder / DATA).unlink()
    onnx.save(model, path, save_as_external_data=True, location=DATA)
    (folder / DATA).chmod(path.stat().st_mode)  # onnx makes it readable for its owner alone


def _head(model: ModelProto, keep: Collection[str]) -> NodeProto | None:
    """The last layer of a decoder; None where it is no MatMul, and so not quantized: a classifier's."""
    makers = {output: node for node in model.graph.node for output in node.output}
    waiting = ["logits"]
    while waiting:
        node = makers.get(waiting.pop())
        if node is None:
            continue
        if node.op_type == "MatMul" and node.input[1] not in keep:
            return node
        if node.op_type in _BEHIND_THE_HEAD:
            waiting += node.input
    return None


def _quantized(model: ModelProto, bits: int, exclude: list[str]) -> ModelProto:
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    logging.getLogger("onnxruntime.quantization").setLevel(logging.WARNING)
    quantizer = MatMulNBitsQuantizer(
        model,
        bits=bits,
        block_size=_BLOCK,
        is_symmetric=bits == 8,
        accuracy_level=_ACTIVATIONS,
        nodes_to_exclude=exclude,
        op_types_to_quantize=("MatMul",),
    )
    quantizer.process()
    quantized: ModelProto = quantizer.model.model
    return quantized


def _matmuls(model: ModelProto) -> list[NodeProto]:
    return [node for node in model.graph.node if node.op_type == "MatMul"]
