"""Runs in TensorBoard, Trackio and Weights & Biases, by the callbacks that transformers has for them."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import distributed
from ..errors import SettingsError, first_line

if TYPE_CHECKING:
    from transformers import TrainerCallback

_LONGEST = 96  # letters of a name; W&B takes 128


def tracker_callbacks(tracker: str, events: Path, about: Mapping[str, Any]) -> list[TrainerCallback]:
    """What logs a run to a tracker, if any. What the tracker prints is for people, and goes to stderr.

    Args:
        tracker: as `report_to` of `FitSettings`.
        events: where TensorBoard's files go: of its own, or they would lie where everything is removed at the end.
        about: settings of the run. transformers tells its own, by which a batch is one row, whatever the optimizer.

    Raises:
        SettingsError: it does not start, now or when the training begins.
    """
    if tracker == "none" or (tracker == "tensorboard" and not distributed.is_main()):
        return []
    from transformers.integrations.integration_utils import TensorBoardCallback, get_reporting_integration_callbacks

    callback: Any
    with starting(tracker):
        if tracker == "tensorboard":
            from torch.utils.tensorboard import SummaryWriter

            writer = SummaryWriter(str(events))
            writer.add_text("lorasb", f"```json\n{json.dumps(about, indent=2)}\n```")
            callback = TensorBoardCallback(writer)
        else:
            (kind,) = get_reporting_integration_callbacks([tracker])
            callback = kind()
            callback.on_train_begin = _then_told(tracker, callback.on_train_begin, about)
    callback.on_train_begin = starting(tracker)(callback.on_train_begin)
    callback.on_train_end = _on_stderr()(callback.on_train_end)
    return [callback]


def _then_told(tracker: str, begin: Callable[..., None], about: Mapping[str, Any]) -> Callable[..., None]:
    """`begin`, and then the settings are in the run's table, under `lorasb`."""

    @functools.wraps(begin)
    def on_train_begin(*inputs: Any, **options: Any) -> None:
        begin(*inputs, **options)
        if distributed.is_main():
            if tracker == "wandb":
                import wandb as module
            else:
                import trackio as module
            module.config.update({"lorasb": dict(about)}, allow_val_change=True)

    return on_train_begin


@contextmanager
def _on_stderr() -> Iterator[None]:
    with redirect_stdout(sys.stderr):
        yield


@contextmanager
def starting(tracker: str) -> Iterator[None]:
    """Raise SettingsError for whatever a tracker raises within: it has no key, say, or its server is not reached."""
    try:
        with _on_stderr():
            yield
    except Exception as error:
        fix = "Set it up as its own pages say, or leave report_to out; then go on with --resume"
        raise SettingsError(f"{tracker} does not start: {first_line(error)}", where="report_to", fix=fix) from error


@contextmanager
def run_of_its_own(tracker: str) -> Iterator[None]:
    """What is trained in it is one run of Weights & Biases, unless the caller has one under way already.

    transformers begins a run where there is none and never ends it: all that is trained later would go there too.
    """
    if tracker != "wandb":
        yield
        return
    import wandb

    ours = wandb.run is None
    try:
        yield
    finally:
        if ours:
            with _on_stderr():
                wandb.finish()


def run_name(tracker: str, tasks: Sequence[str], identity: Mapping[str, Any]) -> str:
    """What a run is called, by its `tasks`.

    Trackio goes on with a run of the same name, so there the name ends in letters of what the run is
    (`checkpoints.identity_of`): a resumed run finds its curve, and one of other settings or data has its own.
    """
    name = "+".join(tasks)
    if len(name) > _LONGEST:
        name = f"{len(tasks)} tasks" if len(tasks) > 1 else name[:_LONGEST]
    if tracker != "trackio":
        return name
    return f"{name}-{hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:6]}"


def refuse_upload_of_base(tracker: str) -> None:
    """Raise SettingsError where transformers would send the whole model to Weights & Biases at the end of a run."""
    asked = os.environ.get("WANDB_LOG_MODEL", "false")
    if tracker == "wandb" and asked.lower() not in ("", "0", "false"):
        what = f"WANDB_LOG_MODEL={asked} would upload the whole base model with each run"
        raise SettingsError(what, where="report_to", fix="Unset it; lorasb push uploads adapters")
