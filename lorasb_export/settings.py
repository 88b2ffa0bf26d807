"""What can be set, with its defaults: the sections [basis] and [fit] of lorasb.toml. Imports nothing heavy."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from types import UnionType
from typing import Any, Final, Literal, get_args, get_origin, get_type_hints

from .choices import (
    CAUSAL_LM,
    Directions,
    Init,
    Keep,
    LoadedDtype,
    LossMean,
    Metric,
    Optimizer,
    Reduction,
    Schedule,
    Tracker,
    require_choice,
)
from .errors import SettingsError

ALL_LINEAR, MLP_OUTPUT = "all-linear", "mlp-output"
_FLOAT32_MAX = 3.4e38
_INT64 = 2**63  # what tokenizers and torch count to
_NOT_LEARNT = ("gradient_checkpointing", "checkpoint_every", "report_to")
GRADIENT: Final = "gradient"
RANDOM: Final = "random"
BLOCK: Final = "block"
DRAWN = (RANDOM, BLOCK)  # without data


@dataclass(frozen=True)
class CalibrationSettings:
    """How a basis is calibrated.

    Attributes:
        rank: r.
        directions: what B and A span: `gradient`, the first step of full fine-tuning (the paper); `random`; or
            `block`, r rows and r columns of the weight, side by side, at a random place. For the last two no data is
            read, and of the settings below `targets`, `dtype` and `seed` alone matter.
        samples: rows of each task: a count, or a fraction below 1. None is 0.1 %, and at least 32; of more than 32
            tasks at least the task's share of 1024.
        targets: `all-linear` (every Linear but the heads), `mlp-output` (the last layer of every MLP, `down_proj` in
            most models), module name endings, comma-separated or a list, or a regular expression that whole names
            match.
        reduction: `sign` (the paper) or `raw` (the gradient sum itself).
        loss: `sample`: every row counts the same; `token`: every token with a label does.
        eta: η, the size of the simulated first step. It scales R0 alone, never B or A. The paper gives no value;
            the default is of the order of the first warm-up step of its schedules.
        batch_size: rows per backward pass; has no effect on the result beyond rounding.
        max_length: rows are cut after this many tokens.
        gradient_checkpointing: recompute activations in the backward pass, where the model's class can: less memory,
            a quarter more time.
        capture: also measure how much of each task's gradient the basis of a mixture of up to 32 tasks holds; a
            second pass over the rows. Of a single task it is known anyway. Where it is not measured, `fit` does not
            measure it of further tasks either.
        dtype: `auto` (the checkpoint's) or a torch float type; B and A are stored in it. Or `nf4`: the base's linear
            layers in four bits, B and A in the checkpoint's type.
        seed: draws the rows, a random basis or block, a classifier's head whose gradient is taken, and the random start
            of the SVD. The global RNG is left alone.
    """

    rank: int = 64
    directions: Directions = GRADIENT
    samples: float | None = None
    targets: str = ALL_LINEAR
    reduction: Reduction = "sign"
    loss: LossMean = "sample"
    eta: float = 3e-6
    batch_size: int = 8
    max_length: int = 512
    gradient_checkpointing: bool = True
    capture: bool = True
    dtype: LoadedDtype = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        if isinstance(self.targets, list | tuple):  # as PEFT takes them
            if not all(isinstance(target, str) for target in self.targets):
                raise SettingsError(f"targets is {self.targets!r:.60}", fix="Give endings of module names, in quotes")
            object.__setattr__(self, "targets", ",".join(self.targets))
        _check(self, positive=("rank", "eta", "batch_size", "max_length"))
        if self.samples is not None and (self.samples <= 0 or (self.samples > 1 and self.samples != int(self.samples))):
            raise SettingsError(f"samples is {self.samples}", fix="Give a count, or a fraction above 0 and below 1")


@dataclass(frozen=True)
class FitSettings:
    """How an adapter is trained.

    Attributes:
        epochs: passes over the training rows.
        max_steps: train for this many optimizer steps, whatever `epochs` says.
        batch_size: rows per forward pass; with several processes they share these rows.
        accumulate: forward passes per optimizer step.
        group_by_length: batches of rows of like length: less padding, a less random order.
        optimizer: of R: `muon`, or `adamw` (the paper). A classifier's head is trained by AdamW in any case.
        learning_rate: peak rate. None is 3e-3 for text generation (AdamW: 6e-3), 1e-3 for classes and numbers; three
            times that in a random basis or a block. These hold for r = 64 on all linear layers; with Muon they are
            multiplied by 3 at r = 16, divided by 3 at r = 256, and doubled where a quarter of the layers is trained.
            A tuple trains at each rate and keeps the best on the valid split.
        head_learning_rate: of a classifier's head. None is the learning rate, or 1e-3 where that is None too.
        schedule: `linear`, `cosine` or `constant_with_warmup`.
        warmup: share of the steps spent warming up.
        weight_decay: on R, not on a classifier's head; 0 by default.
        max_grad_norm: gradient norm clip.
        scaling: s.
        init: R0: `svd` (S/s, the paper) or `zero` (start as the base model).
        max_length: rows are cut after this many tokens.
        gradient_checkpointing: recompute activations in the backward pass: less memory, a third more time.
        evaluate_every: optimizer steps between evaluations on the valid split. None is a quarter of the run; with
            patience, a quarter of the run divided by that.
        metric: what the best checkpoint is chosen by, and patience counts: `loss`; `exact_match` (answers the
            valid prompts, which takes time) for text generation; `accuracy`, `mcc` or `f1` for classes;
            `pearson` or `rmse`.
        keep: `best`, the R of the best evaluation, or `last`. Without a valid split it is the last.
        patience: stop after so many evaluations without a better one; never when None.
        checkpoint_every: optimizer steps between checkpoints.
        report_to: `none`, or `tensorboard`, `trackio` or `wandb`, which must be installed.
        dtype: of the frozen base: `auto` (the checkpoint's), a torch float type, or `nf4`, its linear layers in four
            bits; R is fp32 in any case.
        seed: row order, and a new classification head.
    """

    epochs: float = 3.0
    max_steps: int | None = None
    batch_size: int = 8
    accumulate: int = 1
    group_by_length: bool = False
    optimizer: Optimizer = "muon"
    learning_rate: float | tuple[float, ...] | None = None
    head_learning_rate: float | None = None
    schedule: Schedule = "linear"
    warmup: float = 0.06
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    scaling: float = 1.0
    init: Init = "svd"
    max_length: int = 512
    gradient_checkpointing: bool = False
    evaluate_every: int | None = None
    metric: Metric = "loss"
    keep: Keep = "best"
    patience: int | None = None
    checkpoint_every: int = 50
    report_to: Tracker = "none"
    dtype: LoadedDtype = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        _check(self, positive=("epochs", "batch_size", "accumulate", "scaling", "max_length"))
        for name in ("weight_decay", "max_grad_norm"):
            if getattr(self, name) < 0:
                raise SettingsError(f"{name} is {getattr(self, name)}", fix="Give 0 or more")
        if not 0 <= self.warmup < 1:
            raise SettingsError(f"warmup is {self.warmup}", fix="Give a share of the steps, 0 or more and below 1")
        if isinstance(self.learning_rate, list | tuple):  # TOML and JSON know lists alone
            object.__setattr__(self, "learning_rate", tuple(self.learning_rate))
        of_head = [] if self.head_learning_rate is None else [self.head_learning_rate]
        for name, rates in (("learning_rate", self.rates), ("head_learning_rate", of_head)):
            for rate in rates:
                if isinstance(rate, bool) or not isinstance(rate, int | float) or not 0 < rate < _FLOAT32_MAX:
                    raise SettingsError(f"{name} is {rate!r}", fix="Give a positive number of float32")
        if self.learning_rate is not None and len(set(self.rates)) < max(1, len(self.rates)):
            raise SettingsError("learning_rate names none, or one twice", fix="Give one rate, or several, each once")
        for name in ("checkpoint_every", "max_steps", "evaluate_every", "patience"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise SettingsError(f"{name} is {getattr(self, name)}", fix="Give at least 1")

    @property
    def rates(self) -> tuple[float, ...]:
        """The learning rates to train at, one or several; none before `for_task` where none was given."""
        if self.learning_rate is None:
            return ()
        return self.learning_rate if isinstance(self.learning_rate, tuple) else (self.learning_rate,)

    def decisive(self) -> dict[str, Any]:
        """Those that decide what is learnt; not how much memory it takes, how often it is saved, or who is told."""
        return {name: value for name, value in asdict(self).items() if name not in _NOT_LEARNT}

    def for_task(self, task_type: str, directions: str, rank: int, share: float) -> FitSettings:
        """These settings with the default learning rate, for where none is set. In docs/benchmarks.md it is the best
        rate of most tuned runs, or one grid step from it.

        Args:
            share: of the linear layers, those in the basis. A step of Muon is equally long in each of them, so that
                at a rate of 1/√share all together go as far.
        """
        of_text = 3e-3 if self.optimizer == "muon" else 6e-3
        of_head = None if task_type == CAUSAL_LM else 1e-3  # it is AdamW's, whatever the basis is
        rate = of_head or of_text
        if self.optimizer == "muon":
            rate *= (64 / rank) ** math.log(3, 4) / math.sqrt(share)
        rate = float(f"{3 * rate if directions in DRAWN else rate:.1e}")
        return replace(self, learning_rate=rate, head_learning_rate=self.head_learning_rate or of_head)


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs among the settings that both name: `rank 4, not 2`."""
    return [f"{name} {value}, not {now[name]}" for name, value in before.items() if now.get(name, value) != value]


def types_of(settings: type) -> dict[str, tuple[type, ...]]:
    """The types that a value of each setting may have besides None, from those it is declared with."""
    as_given: dict[Any, tuple[type, ...]] = {float: (int, float), Literal: (str,), tuple: (list, tuple)}
    allowed: dict[str, tuple[type, ...]] = {}
    for name, kinds in _declared(settings).items():
        given = [as_given.get(get_origin(kind) or kind, (kind,)) for kind in kinds if kind is not type(None)]
        allowed[name] = tuple(kind for of_kind in given for kind in of_kind)
    return allowed


def _declared(settings: type) -> dict[str, tuple[Any, ...]]:
    """Setting → what is declared of it, a union as its members."""
    hints = get_type_hints(settings)
    return {name: get_args(hint) if get_origin(hint) is UnionType else (hint,) for name, hint in hints.items()}


def is_one_of(value: object, allowed: tuple[type, ...]) -> bool:
    """Whether `value` is of an `allowed` type; True and False are no numbers."""
    return isinstance(value, allowed) and (bool in allowed or not isinstance(value, bool))


def _check(settings: CalibrationSettings | FitSettings, *, positive: Sequence[str]) -> None:
    allowed_types = types_of(type(settings))
    for setting in fields(settings):
        value, types = getattr(settings, setting.name), allowed_types[setting.name]
        if not (is_one_of(value, types) or (value is None and setting.default is None)):
            right = " or ".join(kind.__name__ for kind in types)
            raise SettingsError(f"{setting.name} is {value!r}, which has the wrong type", fix=f"Give {right}")
    for name, (choices, *_) in _declared(type(settings)).items():
        if get_origin(choices) is Literal:
            require_choice(name, getattr(settings, name), choices)
    for name, value in vars(settings).items():
        if isinstance(value, float) and not math.isfinite(value):
            raise SettingsError(f"{name} is {value}", fix="Give a finite number")
    for name in positive:
        if not 0 < getattr(settings, name) < _INT64:
            raise SettingsError(f"{name} is {getattr(settings, name)}", fix="Give a positive number below 2**63")
    if not 0 <= settings.seed < 2**32:  # what numpy takes
        raise SettingsError(f"seed is {settings.seed}", fix=f"Give 0 or more, below {2**32}")
