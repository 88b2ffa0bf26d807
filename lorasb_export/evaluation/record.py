"""What an evaluation found, put into the adapter's folder: its config and its card."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..adapter import Adapter
from ..cards import card
from ..errors import ArtifactError
from ..files.atomic import atomic_file
from ..files.kind import ADAPTER_CONFIG
from ..files.lock import only_writer
from ..files.storage import read_json, write_json
from ..format import sealed

_KEPT = ("base", "adapter", "rows", "data_sha256", "split_sha256", "dtype")


def record_evaluation(adapter: Adapter, result: Mapping[str, Any]) -> None:
    """Put an evaluation's figures into an adapter's config and card, replacing those of the same split and metric, and
    those of the split that are of other rows.

    `data_sha256` of the task, `split_sha256` of the rows and the `dtype` that was asked for may stand beside them.

    Raises:
        ArtifactError: there is another adapter by now.
        OutputError: the folder cannot be written, or its disk has no locks.
    """
    folder = adapter.folder
    assert folder is not None
    path = folder / ADAPTER_CONFIG
    if not path.is_file():  # the lock would make the folder anew
        raise ArtifactError("the adapter was removed while it was scored", where=folder, fix="Train or fetch it again")
    card.own_readme(folder)  # or its figures would stand in the config alone
    with only_writer(path, wait=True):  # another evaluation of it may end at this moment
        with atomic_file(path) as temporary:
            config = read_json(path)
            if config["sha256"] != adapter.sha256:
                what = "the adapter was replaced while it was scored"
                raise ArtifactError(what, where=folder, fix="Evaluate it again")
            evaluation, rows = config["training"].setdefault("evaluation", {}), result.get("split_sha256")
            found = {key: result[key] for key in _KEPT if key in result}
            before = evaluation.get(result["split"], {}).items()
            of_these = {name: one for name, one in before if rows is None or one.get("split_sha256") in (None, rows)}
            evaluation[result["split"]] = of_these | {result["metric"]: found}
            write_json(temporary, sealed(config))
        card.write(folder, card.adapter_card(config))
