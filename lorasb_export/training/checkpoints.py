"""What lies in the working folder of a training run: checkpoints, complete or not, and what they belong to."""

from __future__ import annotations

import hashlib
import json
import logging
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from ..adapter import Adapter, copy_tensors
from ..base.model import BaseModel
from ..basis import Basis
from ..data.task import TaskData
from ..data.trained_template import TEMPLATE_KEY, recorded_template
from ..errors import ArtifactError, OutputError, TrainingError, some
from ..files.atomic import discard
from ..files.storage import names_in, read_json
from ..settings import FitSettings, changes

logger = logging.getLogger(__name__)

_OF_A_RUN = re.compile(r"(checkpoint|rate|best|basis|capture)-.+|\..+")  # hidden: what atomic and lock leave
TOGETHER = "together+*"  # the names of joint runs: no task's name may have a +
COMPLETE = "complete.json"  # written last into a checkpoint: without it, the checkpoint is not resumed from
SAME = "Resume with the same settings and data, or start afresh with --overwrite"
RESUME = "Free or repair that disk, then go on with the same command and --resume"


def rate_folder(folder: Path, rate: float, settings: FitSettings) -> Path:
    """Where in the working folder the checkpoints at `rate` lie."""
    return folder / f"rate-{rate}" if len(settings.rates) > 1 else folder


def open_folder(folder: Path, out: Path, settings: FitSettings, resume: bool, overwrite: bool) -> None:
    """Make the working folder of a run, empty unless it is resumed.

    Args:
        out: an adapter of the run; the next one of it removes what a kill leaves of the old folder.

    Raises as `check_folder`, but that `overwrite` drops a run of other learning rates.
    """
    try:
        check_folder(folder, settings, resume, overwrite)
    except TrainingError as other:
        if not overwrite:
            raise
        drop_run(folder, other)
    if not resume:
        discard(folder, out)  # in place, a kill might leave complete.json of a checkpoint that is half gone
    folder.mkdir(parents=True, exist_ok=True)


def check_folder(folder: Path, settings: FitSettings, resume: bool, overwrite: bool) -> None:
    """Raise where a run cannot have the working folder `folder`.

    Raises:
        OutputError: an interrupted run would be lost; or it is a link, or holds what no run leaves.
        TrainingError: the one to be resumed had learning rates that are not in `settings`.
    """
    others = [path.name for path in folder.glob("*") if not _OF_A_RUN.fullmatch(path.name)]
    if folder.is_symlink():
        raise OutputError("the working folder of this run is a link", where=folder, fix="Remove the link")
    if others:  # which would be removed, now or at the end
        raise OutputError("a run never wrote this file", where=folder / others[0], fix="Move it to another folder")
    begun = {marker.parents[1] for marker in folder.glob(f"**/checkpoint-*/{COMPLETE}")}
    if resume and begun - {rate_folder(folder, rate, settings) for rate in settings.rates}:
        raise TrainingError("the interrupted run had other learning rates", where=folder, fix=SAME)
    if not (resume or overwrite):
        refuse_begun(folder)


def drop_run(folder: Path, other: TrainingError) -> None:
    """Remove the checkpoints in a working folder, of the run that `other` tells of. What was measured stays: its names
    say of what."""
    logger.warning("%s (%s): it is dropped, and training begins anew", other.what, folder)
    for marker in folder.glob(f"**/checkpoint-*/{COMPLETE}"):
        marker.unlink()  # before the rest, or a kill might leave it beside a half
    for path in [path for kind in ("checkpoint", "rate", "best") for path in folder.glob(f"{kind}-*")]:
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def refuse_begun(folder: Path) -> None:
    """Raise OutputError where an interrupted run in `folder` would be lost."""
    if any(folder.glob(f"**/checkpoint-*/{COMPLETE}")):
        fix = "Continue it with --resume, or start afresh with --overwrite"
        raise OutputError("an interrupted run is there", where=folder, fix=fix)


def working_folder(out: Path) -> Path:
    """Where the run that makes the adapter `out` keeps its checkpoints."""
    return out.parent / f".{out.name}.run"


def together_folder(folder: Path, tasks: Iterable[TaskData]) -> Path:
    """The working folder of `tasks` that train together: theirs alone, since others may be training beside them."""
    names = json.dumps(sorted(task.name for task in tasks))
    return folder / f".{TOGETHER.replace('*', hashlib.sha256(names.encode()).hexdigest()[:12])}.run"


def runs_begun(folder: Path, name: str = "*") -> dict[Path, dict[str, Any]]:
    """Working folder → what a checkpoint in it belongs to, of every interrupted run that has one, or one under way.

    See `identity_of`; `tasks` are their names.

    Raises:
        ArtifactError: what one belongs to cannot be read.
    """
    found = {}
    for run in folder.glob(f".{name}.run"):
        names_in(run)  # raises where `glob` would find nothing
        for marker in run.glob(f"**/checkpoint-*/{COMPLETE}"):
            found[run] = read_json(marker)
    return found


def refuse_run_of_others(folder: Path, tasks: Sequence[TaskData]) -> None:
    """Raise TrainingError if the data of one of `tasks` is in an interrupted joint run with other tasks.

    `--resume` would not go on with that run.
    """
    names, data = {task.name for task in tasks}, {task.sha256 for task in tasks}
    for other, run in runs_begun(folder, TOGETHER).items():
        if data.isdisjoint(run["data_sha256"]):
            continue
        had = run.get("tasks", [])
        differing = {"with": [name for name in had if name not in names], "without": sorted(names.difference(had))}
        told = ", ".join(f"{how} {some(which)}" for how, which in differing.items() if which)
        command = f"lorasb fit {' '.join(had or ['TASKS'])} --together --resume"
        fix = f"Go on with it by `{command}`; or remove that folder, to train these from the beginning"
        raise TrainingError(f"an interrupted run together had other tasks than this one: {told}", where=other, fix=fix)


def last_complete(folder: Path) -> Path | None:
    """The newest checkpoint that was written to its end."""
    return next(reversed(_complete(folder)), None)


def remove_old(folder: Path) -> None:
    """Leave the two newest complete checkpoints."""
    for path in set(folder.glob("checkpoint-*")) - set(_complete(folder)[-2:]):
        shutil.rmtree(path, ignore_errors=True)


def _complete(folder: Path) -> list[Path]:
    """In the order of their steps: by the clocks of machines that share a disk they might be in another."""
    done = [marker.parent for marker in folder.glob(f"checkpoint-*/{COMPLETE}")]
    return sorted(done, key=step_of)


def step_of(checkpoint: Path) -> int:
    """After which optimizer step it was saved."""
    return int(checkpoint.name.rpartition("-")[2])


def identity_of(
    settings: FitSettings, tasks: Iterable[TaskData], base: BaseModel, basis: Basis | None, start: Adapter | None
) -> dict[str, Any]:
    """What a checkpoint belongs to; `settings` have one rate. Without a basis, as before a task's own is made, nothing
    is said of that."""
    tasks = list(tasks)
    return {
        "settings": settings.decisive(),
        "data_sha256": [task.sha256 for task in tasks],
        "labels": [task.labels for task in tasks],
        **({"basis_sha256": basis.sha256, "base_fingerprint": basis.base.fingerprint} if basis else {}),
        "start_sha256": start and start.sha256,
        **recorded_template(base.folder, *tasks),
    }


def _check_identity(checkpoint: Path, identity: Mapping[str, Any]) -> None:
    """Raise TrainingError when the checkpoint is of a run with other settings, data, basis or base."""
    saved, wanted = read_json(checkpoint / COMPLETE), json.loads(json.dumps(identity))
    differing = [key for key in wanted if key != "settings" and saved.get(key) != wanted[key]]
    differing = ["chat template" if key == TEMPLATE_KEY else key for key in differing]
    before = dict.fromkeys(wanted["settings"]) | saved["settings"]  # an update between the two may have brought more
    differing += [f"settings ({change})" for change in changes(before, wanted["settings"])]
    if differing:
        raise TrainingError(
            f"the interrupted run had other {', '.join(differing)}",
            where=checkpoint.parent,
            fix=SAME,
        )


def to_resume(
    folder: Path,
    settings: FitSettings,
    tasks: Sequence[TaskData],
    base: BaseModel,
    basis: Basis | None,
    start: Adapter | None,
) -> dict[float, Path]:
    """The checkpoint to go on from at every learning rate that has one; other arguments as for `identity_of`.

    Raises:
        TrainingError: one is of a run with other settings, data, basis or base.
    """
    found = {}
    for rate in settings.rates:
        if checkpoint := last_complete(rate_folder(folder, rate, settings)):
            _check_identity(checkpoint, identity_of(replace(settings, learning_rate=rate), tasks, base, basis, start))
            found[rate] = checkpoint
    return found


def restore_tensors(adapter: Adapter, path: Path) -> None:
    """Put the saved `adapter.tensors()` back into the live ones. Raises ArtifactError on other names."""
    saved = load_file(path)
    if set(saved) != set(adapter.tensors()):
        raise ArtifactError("the checkpoint holds other tensors than this adapter", where=path, fix=SAME)
    copy_tensors(saved, adapter)
