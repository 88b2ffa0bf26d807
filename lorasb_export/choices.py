"""What can be chosen between, as types: settings are declared with them, and the command line offers them."""

from __future__ import annotations

from typing import Any, Final, Literal, get_args

from .errors import SettingsError

TaskType = Literal["CAUSAL_LM", "SEQ_CLS"]
CAUSAL_LM = "CAUSAL_LM"
SEQ_CLS = "SEQ_CLS"

Directions = Literal["gradient", "random", "block"]
Reduction = Literal["sign", "raw"]
LossMean = Literal["sample", "token"]
Dtype = Literal["auto", "float32", "bfloat16", "float16", "float64"]
LoadedDtype = Literal[Dtype, "nf4"]
MergedOnto = Literal["auto", "nf4"]
NF4: Final = "nf4"  # the linear layers' weights in four bits, all else as in the checkpoint
Optimizer = Literal["muon", "adamw"]
Init = Literal["svd", "zero"]
Schedule = Literal["linear", "cosine", "constant_with_warmup"]
Metric = Literal["loss", "exact_match", "accuracy", "mcc", "f1", "pearson", "rmse"]
Keep = Literal["best", "last"]
Tracker = Literal["none", "tensorboard", "trackio", "wandb"]
Split = Literal["train", "valid", "test"]
ExportFormat = Literal["peft", "onnx", "onnx-adapters"]
Precision = Literal["fp32", "fp16", "bf16", "int8", "int4"]
ServingMode = Literal["shared", "folded", "auto"]

MAX_DROP = 2.0  # points of a metric that an ONNX graph may lose, unless told otherwise
MAX_COMPARED = 32  # adapters on one ONNX graph whose answers are compared with torch's: each takes seconds


def require_choice(name: str, value: object, choices: Any) -> None:
    """Raise SettingsError where `value` is none of `choices`, one of the types above."""
    allowed = get_args(choices)
    if value not in allowed:
        raise SettingsError(f"{name} is {value!r}", fix=f"Use {', '.join(allowed)}")
