"""What can be set, with its defaults: the sections [basis] and [fit] of lorasb.toml. Imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass

from .errors import SettingsError

ALL_LINEAR = "all-linear"


@dataclass(frozen=True)
class CalibrationSettings:
    """How a basis is calibrated.

    Attributes:
        rank: r.
        samples: rows of each task: a count, or a fraction below 1. None is 0.1 %, and at least 32.
        targets: `all-linear` (every Linear but the heads) or comma-separated module name endings.
        reduction: `sign` (the paper) or `raw` (the gradient sum itself).
        eta: η, the size of the simulated first step. It scales R0 alone, never B or A. The paper gives no value;
            the default is of the order of the first warm-up step of its schedules.
        batch_size: rows per backward pass; has no effect on the result beyond rounding.
        max_length: rows are cut after this many tokens.
        dtype: `auto` (the checkpoint's) or a torch float type; B and A are stored in it.
        seed: draws the rows and the random start of the SVD. The global RNG is left alone.
    """

    rank: int = 64
    samples: float | None = None
    targets: str = ALL_LINEAR
    reduction: str = "sign"
    eta: float = 3e-6
    batch_size: int = 8
    max_length: int = 512
    dtype: str = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.reduction not in ("sign", "raw"):
            raise SettingsError(f"reduction is {self.reduction!r}", fix="Use sign or raw")
        for name in ("rank", "eta", "batch_size", "max_length"):
            if getattr(self, name) <= 0:
                raise SettingsError(f"{name} is {getattr(self, name)}, must be positive")
        if self.samples is not None and self.samples <= 0:
            raise SettingsError(f"samples is {self.samples}, must be positive", fix="A count, or a fraction below 1")


@dataclass(frozen=True)
class FitSettings:
    """How an adapter is trained.

    Attributes:
        epochs: passes over the training rows.
        max_steps: stop after this many optimizer steps; overrides `epochs`.
        batch_size: rows per forward pass.
        accumulate: forward passes per optimizer step.
        learning_rate: peak rate of AdamW.
        schedule: `linear`, `cosine` or `constant_with_warmup`.
        warmup: share of the steps spent warming up.
        weight_decay: on R; 0 by default.
        max_grad_norm: gradient norm clip.
        scaling: s.
        init: R0: `svd` (S/s, the paper) or `zero` (start as the base model).
        max_length: rows are cut after this many tokens.
        checkpoint_every: optimizer steps between checkpoints.
        dtype: `auto` (the checkpoint's) or a torch float type for the frozen base; R is fp32 in any case.
        seed: row order, and a new classification head.
    """

    epochs: float = 3.0
    max_steps: int | None = None
    batch_size: int = 8
    accumulate: int = 1
    learning_rate: float = 6e-3
    schedule: str = "linear"
    warmup: float = 0.06
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    scaling: float = 1.0
    init: str = "svd"
    max_length: int = 512
    checkpoint_every: int = 50
    dtype: str = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.init not in ("svd", "zero"):
            raise SettingsError(f"init is {self.init!r}", fix="Use svd or zero")
        if self.schedule not in ("linear", "cosine", "constant_with_warmup"):
            raise SettingsError(f"schedule is {self.schedule!r}", fix="Use linear, cosine or constant_with_warmup")
        for name in ("epochs", "batch_size", "accumulate", "learning_rate", "scaling", "max_length"):
            if getattr(self, name) <= 0:
                raise SettingsError(f"{name} is {getattr(self, name)}, must be positive")
        if self.checkpoint_every < 1 or (self.max_steps is not None and self.max_steps < 1):
            raise SettingsError("checkpoint_every and max_steps must be at least 1")
