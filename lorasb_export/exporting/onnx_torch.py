"""A transformers folder as an ONNX graph by `torch.onnx.export`, in standard operators only. Run as a child process.

    python -m lorasb_export.exporting.onnx_torch FOLDER OUT TASK_TYPE DTYPE [BASIS]

Inputs and outputs are named as transformers.js and optimum expect them. With BASIS every target also computes
((x·Aᵀ)·Rᵀ)·Bᵀ, from the initializers `<module>.A`, `.R` (a placeholder) and `.B`; of a block there is `.R` alone.
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from onnx_ir.passes.common import ClearMetadataAndDocStringPass
from transformers import DynamicCache, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..base.model import BaseModel
from ..basis import Basis
from ..choices import CAUSAL_LM

_ROWS, _TOKENS, _PAST = 2, 3, 5  # of the example; no 0 or 1, which the tracer takes for constants
_BATCH, _SEQUENCE = "batch_size", "sequence_length"  # the builder's names, by which runtimes are told sizes


class _Decoder(torch.nn.Module):
    """ids (b, t), mask (b, past + t), positions (b, t), then past keys and values → logits, new keys and values."""

    def __init__(self, network: PreTrainedModel) -> None:
        super().__init__()
        self.network = network

    def forward(
        self, ids: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor, past: list[torch.Tensor]
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        cache = DynamicCache(list(zip(past[::2], past[1::2], strict=True)))
        output = self.network(ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True)
        layers = output.past_key_values.layers
        return output.logits, [tensor for layer in layers for tensor in (layer.keys, layer.values)]


class _Classifier(torch.nn.Module):
    """ids, mask and, where the tokenizer makes them, token types, all (b, t) → logits (b, classes)."""

    def __init__(self, network: PreTrainedModel) -> None:
        super().__init__()
        self.network = network

    def forward(self, ids: torch.Tensor, mask: torch.Tensor, types: torch.Tensor | None = None) -> torch.Tensor:
        return self.network(ids, attention_mask=mask, **({} if types is None else {"token_type_ids": types})).logits


class _SwappableBlock(torch.nn.Module):
    """A linear layer with R beside it, in a block of its weight."""

    R: torch.Tensor

    def __init__(self, linear: torch.nn.Linear, rows: slice, columns: slice, dtype: torch.dtype) -> None:
        super().__init__()
        self.linear, self.columns = linear, columns
        self.pads = rows.start, linear.out_features - rows.stop
        rank = rows.stop - rows.start
        self.register_buffer("R", torch.randn(rank, rank, dtype=dtype))  # zeros later, as of `_Swappable`

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x) + torch.nn.functional.pad(x[..., self.columns] @ self.R, self.pads)


class _Swappable(torch.nn.Module):
    """A linear layer with the three factors beside it, in the order that keeps R an initializer of its own."""

    A: torch.Tensor
    R: torch.Tensor
    B: torch.Tensor

    def __init__(self, linear: torch.nn.Module, A: torch.Tensor, B: torch.Tensor, dtype: torch.dtype) -> None:
        super().__init__()
        self.linear = linear
        R = torch.randn(A.shape[0], A.shape[0])  # zeros later: of equal initializers the exporter keeps one
        for name, factor in (("A", A.T), ("R", R), ("B", B.T)):
            self.register_buffer(name, factor.to(dtype).contiguous())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x) + ((x @ self.A) @ self.R) @ self.B


def export_graph(folder: Path, out: Path, task_type: str, dtype: str, basis: Path | None) -> None:
    """Write `out`/model.onnx and model.onnx_data."""
    base = BaseModel.resolve(folder)
    network = base.load(task_type, dtype=dtype, device="cpu")
    if not getattr(network.config, "attn_logit_softcapping", None):  # which only the eager kind has
        network.config._attn_implementation = "sdpa"
    _unfold(network)
    if basis is not None:
        for name, module in Basis.load(basis).modules.items():
            linear: Any = network.get_submodule(name)
            if module.block is None:
                network.set_submodule(name, _Swappable(linear, module.A, module.B, network.dtype))
            else:
                network.set_submodule(name, _SwappableBlock(linear, *module.block, network.dtype))
    if task_type == CAUSAL_LM:
        wrapper, arguments, shapes, inputs, outputs = _decoder(network)
    else:
        wrapper, arguments, shapes, inputs, outputs = _classifier(network, base)
    program = torch.onnx.export(
        wrapper,
        arguments,
        dynamo=True,
        dynamic_shapes=shapes,
        input_names=inputs,
        output_names=outputs,
        external_data=True,
        verbose=False,
    )
    assert program is not None
    for value in list(program.model.graph.initializers.values()):
        value.name = str(value.name).removeprefix("network.")
    ClearMetadataAndDocStringPass()(program.model)  # torch notes stack traces: where its files lie on this disk
    program.save(out / "model.onnx", external_data=True)


def _unfold(network: PreTrainedModel) -> None:
    """Linear layers in place of GPT-2's Conv1D, the same with its weight transposed: its operator is not quantized."""
    for name, module in list(network.named_modules()):
        if isinstance(module, Conv1D):
            linear = torch.nn.Linear(module.nx, module.nf, dtype=module.weight.dtype)
            linear.weight, linear.bias = torch.nn.Parameter(module.weight.T.contiguous()), module.bias
            network.set_submodule(name, linear)


def _decoder(network: PreTrainedModel) -> Any:
    config = network.config
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    layers = config.num_hidden_layers
    shape = (_ROWS, heads, _PAST, size)
    past = [torch.randn(shape, dtype=network.dtype) for _ in range(2 * layers)]
    arguments = (
        torch.full((_ROWS, _TOKENS), 1),
        torch.ones(_ROWS, _PAST + _TOKENS, dtype=torch.long),
        torch.arange(_PAST, _PAST + _TOKENS).expand(_ROWS, _TOKENS).contiguous(),
        past,
    )
    ids, mask = {0: _BATCH, 1: _SEQUENCE}, {0: _BATCH, 1: "total_sequence_length"}
    shapes = (ids, mask, ids, [{0: _BATCH, 2: "past_sequence_length"} for _ in past])
    kinds = [(layer, kind) for layer in range(layers) for kind in ("key", "value")]
    inputs = ["input_ids", "attention_mask", "position_ids", *(f"past_key_values.{n}.{kind}" for n, kind in kinds)]
    return _Decoder(network), arguments, shapes, inputs, ["logits", *(f"present.{n}.{kind}" for n, kind in kinds)]


def _classifier(network: PreTrainedModel, base: BaseModel) -> Any:
    known = base.tokenizer.model_input_names
    inputs = [name for name in ("input_ids", "attention_mask", "token_type_ids") if name in known]
    first = torch.full((_ROWS, _TOKENS), 3)
    arguments = (first, torch.ones_like(first), torch.zeros_like(first))[: len(inputs)]
    return _Classifier(network), arguments, tuple({0: _BATCH, 1: _SEQUENCE} for _ in inputs), inputs, ["logits"]


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    folder, out, task_type, dtype, *basis = sys.argv[1:]
    export_graph(Path(folder), Path(out), task_type, dtype, Path(basis[0]) if basis else None)
