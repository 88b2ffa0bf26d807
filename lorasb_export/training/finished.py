"""Is an adapter that is there what a run would make, so that `--resume` may keep it?"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from ..adapter import Adapter
from ..base.model import BaseModel
from ..basis import Basis
from ..data.task import TaskData
from ..data.trained_template import TEMPLATE_KEY, template_sha256
from ..errors import ArtifactError
from ..files.kind import RECORD
from ..files.storage import read_json
from ..settings import CalibrationSettings, FitSettings, changes


def differences(
    out: Path,
    base: BaseModel,
    basis: Basis | CalibrationSettings,
    task: TaskData,
    settings: FitSettings,
    start: Adapter | None,
) -> list[str]:
    """How the training of the adapter in `out` differs from what these inputs ask for.

    An adapter of a user's own loop records no settings, so no difference is found.

    Raises:
        ArtifactError: the adapter, or its record, is damaged.
    """
    record = out / RECORD
    made, adapter = read_json(record) if record.is_file() else {}, Adapter.load(out)
    if "settings" not in made:
        return []
    try:
        kept, data = made["settings"]["learning_rate"], made["data_sha256"]
        rates = sorted(made.get("learning_rates", [kept]))
    except (KeyError, TypeError):
        fix = "Train it anew with --overwrite"
        raise ArtifactError("the record of its training is damaged", where=record, fix=fix) from None
    if settings.rates == (kept,):  # as it came out of a search, it is written down
        rates = [kept]
    before = made["settings"] | {"learning_rate": rates}
    now = settings.decisive() | {"learning_rate": sorted(settings.rates)}
    found = changes(before, now)
    if data != task.sha256 and _learns_others(adapter, task):
        found.append("other data")
    is_itself = start is not None and start.folder == out  # with the same rows it is not to be trained once more
    if made.get("start_sha256") != (start and start.sha256) and not is_itself:
        found.append("another start")
    if base.fingerprint(adapter.R) != adapter.base.fingerprint:
        found.append("another base model")
    here = template_sha256(base.folder)
    if adapter.training.get(TEMPLATE_KEY, here) != here:  # a loop of one's own does not say
        found.append("another chat template")
    if isinstance(basis, CalibrationSettings) and adapter.basis_source is None:  # the task's own, as is asked for
        return found + adapter.load_basis().differences(asdict(basis))
    same = isinstance(basis, Basis) and basis.sha256 == adapter.basis_sha256
    return found if same else [*found, "another basis"]


def _learns_others(adapter: Adapter, task: TaskData) -> bool:
    """Whether rows that decide over R, train and valid, are others than then; test rows do not."""
    then = adapter.training.get("splits_sha256") or {}
    now = {split: task.split_sha256(split) for split in task.splits if split != "test"}
    return adapter.regression != task.regression or now != {split: then[split] for split in then if split != "test"}
