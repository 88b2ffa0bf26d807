"""Many tasks on one ONNX graph: the base model once, B and A once, and kilobytes per task.

Swappable: one small `.onnx_adapter` file per task, active for a whole batch; the graph alone is the base model.
Routed: one graph that holds every task's R, and a number per row of a batch.
"""

from __future__ import annotations

import copy
import logging
import shutil
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from ..adapter import Adapter
from ..base.model import BaseModel, BaseRef
from ..belonging import check_same_basis
from ..cards import card
from ..choices import CAUSAL_LM, MAX_COMPARED, MAX_DROP
from ..data.source import AnySource
from ..data.task import TaskData, load_held_out
from ..errors import ArtifactError, BaseModelError, SettingsError, some
from ..evaluation.evaluate import require_same_kind
from ..files.atomic import atomic_folder, link_or_copy, put_back
from ..files.kind import RECORD, artifact_kind
from ..files.lock import only_writer
from ..files.output import cannot_write, refuse_own_input, require_room
from ..files.storage import expanded
from ..names import name_problem
from ..other_base import warn_of_another_template, warn_of_other_weights
from .onnx_build import DATA, GRAPH, build
from .onnx_exporter import GENAI, PRECISIONS, check_request, exporter_for, genai_outputs, parameter_count
from .onnx_graph import read_graph
from .onnx_quantize import quantize
from .onnx_record import finish, onnx_provenance, read_record, write_record
from .onnx_swap import (
    BASIS_FILE,
    SUFFIX,
    Arrays,
    add_basis,
    add_to_stack,
    make_swappable,
    name_of_R,
    scaled_R,
    write_adapter,
)
from .onnx_verify import HeldOut, held_out_rows, require_equal, verify_folder

logger = logging.getLogger(__name__)


def export_onnx_adapters(
    adapters: Sequence[str | Path],
    out: str | Path,
    *,
    base: str | Path | None = None,
    precision: str = "fp32",
    routed: bool = False,
    verify: bool = True,
    data: Mapping[str, AnySource | TaskData] = {},
    max_drop: float = MAX_DROP,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Write one ONNX folder for several adapters of one basis.

    Arguments and errors: as for `export`. The last part of an adapter's path is its name. `precision` is that of the
    base's weights; only fp16 changes that of B, A and R. The graph without an adapter is compared with the base.

    Raises:
        SettingsError: no adapter, two of one name (capitals aside), or a name that is no plain file name, or `base`.
    """
    check_request(precision, [name for name in PRECISIONS if name != "bf16"])  # numpy has no bf16
    wanted = PRECISIONS[precision]
    tasks = {name: load_held_out(name, task) for name, task in data.items()}
    out, loaded = expanded(out), _load(adapters, tasks)
    first = next(iter(loaded.values()))
    basis = first.load_basis()
    for adapter in loaded.values():
        check_same_basis(adapter, basis)
        refuse_own_input(out, adapter.folder, adapter.basis_source)
    base_model = first.base.resolve(base)
    for ref in {basis.base, *(adapter.base for adapter in loaded.values())}:  # blocks of several may have one sha256
        base_model.verify(ref, basis.modules)
    warn_of_another_template(loaded.values(), base_model.folder)
    warn_of_other_weights(loaded.values())
    exporter = exporter_for(base_model, CAUSAL_LM, basis.modules)
    asked = held_out_rows(tasks, base_model) if verify else {}
    card.check(out)
    with atomic_folder(out, overwrite=overwrite, kind="onnx-adapters") as folder:
        scratch = folder / "scratch"
        scratch.mkdir()
        require_room(folder, int(parameter_count(base_model) * wanted.room))
        build(exporter, base_model.folder, folder, precision, scratch, CAUSAL_LM, basis)
        shutil.rmtree(scratch)
        if wanted.bits:
            quantize(folder, wanted.bits, {f"{module}.{part}" for module in basis.modules for part in "ARB"})
        if exporter == GENAI:
            add_basis(folder / GRAPH, basis, genai_outputs(basis.modules), np.dtype(wanted.dtype))
        else:
            make_swappable(folder / GRAPH, basis)
        record = {"kind": "onnx-adapters", "exporter": exporter, **onnx_provenance(first, precision), "routed": routed}
        del record["adapter"], record["scaling"], record["training"]  # those of the first; each adapter's are listed
        record["adapters"] = {}
        _add(folder, record, loaded)
        if verify:
            _verify(folder, record, base_model, {"": None, **_first(loaded)}, asked, max_drop, out)
        return finish(folder, out, record)


def add_onnx_adapters(
    adapters: Sequence[str | Path],
    into: str | Path,
    *,
    base: str | Path | None = None,
    verify: bool = True,
    data: Mapping[str, TaskData] = {},
    max_drop: float = MAX_DROP,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Add tasks to an exported folder; its graph's base is not touched.

    Args:
        into: what `export_onnx_adapters` wrote.
        overwrite: replace adapters of the same names. A routed folder only grows.

    Returns:
        what `lorasb.json` records, with `out` and the `bytes` of the whole folder.

    Raises:
        ArtifactError: not such a folder, a damaged one, an adapter of another basis, or `verify` failed: the folder
            is then as it was.
        BaseModelError: a classifier; or `verify`, and not the base of the folder.
        DataError: `data` is of another task type than its adapter.
        SettingsError: a name that is taken; `data` under a name that is no adapter's.
    """
    folder = expanded(into)
    exported_record(folder)  # what is no such folder is refused before a lock lies beside it
    card.check(folder)
    with only_writer(folder, wait=True):
        before = exported_record(folder)
        record = copy.deepcopy(before)
        loaded = _load(adapters, data)
        present = {name.casefold(): name for name in record["adapters"]}
        for name, adapter in loaded.items():
            taken = present.get(name.casefold())
            replaceable = taken == name and not record["routed"]
            if taken and not (replaceable and overwrite):
                fix = "Rename the adapter, or pass --overwrite" if replaceable else "Rename the adapter"
                raise SettingsError(f"the folder has an adapter {taken!r}", where=folder, fix=fix)
            require_of_graph(adapter, record, folder)
        warn_of_another_template(loaded.values(), folder)
        warn_of_other_weights(loaded.values())
        with atomic_folder(folder, overwrite=True, kind="onnx-adapters") as new:
            _copy(folder, new)
            _add(new, record, loaded)
            if verify:
                ref = BaseRef(**record["base"])
                base_model = ref.resolve(base)
                base_model.verify(ref, next(iter(loaded.values())).R)
                _verify(new, record, base_model, _first(loaded), held_out_rows(data, base_model), max_drop, into)
            if read_record(folder) != before:  # by an export with --overwrite, which waits for nobody
                raise ArtifactError("somebody else replaced the folder meanwhile", where=folder, fix="Try again")
            return finish(new, into, record)


def exported_record(folder: Path) -> dict[str, Any]:
    """What `lorasb.json` of an `onnx-adapters` export says; a replacement that was cut short is undone first.

    Raises:
        ArtifactError: not such a folder, or a damaged one.
    """
    with cannot_write(folder):
        put_back(folder)  # it is read before it is written
    if artifact_kind(folder) != "onnx-adapters":
        raise ArtifactError("not an export of --format onnx-adapters", where=folder, fix="Export one first, with --out")
    return read_record(folder)


def require_exportable(name: str, adapter: Adapter) -> None:
    """Raise BaseModelError for a classifier, SettingsError for a name that is unfit for a file, or the base's."""
    if name == "base":
        what = "an adapter called 'base' would hide the base, which is told under that name"
        raise SettingsError(what, where=adapter.folder, fix="Rename the folder")
    if problem := name_problem(name, "name an exported adapter"):
        raise SettingsError(problem, where=adapter.folder, fix="Rename the folder")
    if adapter.task_type != CAUSAL_LM:
        raise BaseModelError(
            f"the adapter's task is {adapter.task_type}: every classifier has a head of its own",
            where=adapter.folder,
            fix="Export each one merged: --format onnx",
        )


def require_of_graph(adapter: Adapter, record: Mapping[str, Any], folder: Path) -> None:
    """Raise ArtifactError for an adapter of another basis or base than that of the graph which `record` describes."""
    name = adapter.name
    if adapter.basis_sha256 != record["basis"]["sha256"]:
        raise ArtifactError(
            f"adapter {name} belongs to another basis ({adapter.basis_sha256[:12]})",
            where=folder,
            fix=f"Export it with others of that basis; this graph's is {record['basis']['sha256'][:12]}",
        )
    if adapter.base.fingerprint != record["base"]["fingerprint"]:
        what = f"adapter {name} is for another base model, {adapter.base.name_or_path}"
        raise ArtifactError(what, where=folder, fix="Export it with others of that base")


def _add(folder: Path, record: dict[str, Any], adapters: Mapping[str, Adapter]) -> None:
    """Put adapters into a folder, and into what its `lorasb.json` will say."""
    dtype = np.dtype(PRECISIONS[record["precision"]].dtype)
    expected = {tensor.name: list(tensor.dims)[-2:] for tensor in read_graph(folder / GRAPH).graph.initializer}
    ending = name_of_R("", record["basis"]["sha256"])
    replaceable = {name: dims for name, dims in expected.items() if name.endswith(ending)}

    def arrays(adapter: Adapter) -> Arrays:
        own = scaled_R(adapter, dtype)
        if {name: list(array.shape) for name, array in own.items()} != replaceable:
            raise ArtifactError("the graph is not the one lorasb.json describes", where=folder, fix="Export it again")
        return own

    if record["routed"]:
        add_to_stack(folder / GRAPH, [arrays(adapter) for adapter in adapters.values()])
    for name, adapter in adapters.items():
        entry: dict[str, Any] = {"sha256": adapter.sha256, "scaling": adapter.scaling}
        if record["routed"]:
            entry["id"] = len(record["adapters"]) + 1  # 0 is the base
        else:
            path = folder / f"{name}{SUFFIX}"
            path.unlink(missing_ok=True)  # it is that of the folder which is being replaced, under a second name
            write_adapter(path, arrays(adapter))  # one by one: all of thousands are more than memory holds
        record["adapters"][name] = entry
        record.get("verify", {}).pop(name, None)  # of the adapter that it replaces


def _first(adapters: Mapping[str, Adapter]) -> dict[str, Adapter]:
    """Those whose answers are compared with torch's; of the others it is said that they are not."""
    if (left := len(adapters) - MAX_COMPARED) > 0:
        logger.warning("The first %d adapters are compared with torch, %d are not", MAX_COMPARED, left)
    return dict(islice(adapters.items(), MAX_COMPARED))


def _verify(
    folder: Path,
    record: dict[str, Any],
    base: BaseModel,
    adapters: Mapping[str, Adapter | None],
    asked: Mapping[str, HeldOut],
    max_drop: float,
    out: str | Path,
) -> None:
    write_record(folder, record)
    for name, found in verify_folder(folder, base, adapters, asked).items():
        record.setdefault("verify", {})[name or "base"] = require_equal(found, record["precision"], out, max_drop)


def _copy(folder: Path, new: Path) -> None:
    """Put what an exported folder holds into a new one, all that is the user's too, as `.git` and `.gitattributes`."""
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.copytree(path, new / path.name, symlinks=True, copy_function=link_or_copy)
        # What is large or many, never written in place; nor read by onnx, which refuses hard links, as the stack is.
        elif path.name in (DATA, BASIS_FILE) or path.suffix == SUFFIX:
            link_or_copy(path, new / path.name)
        elif path.name != RECORD:  # which is written anew
            shutil.copy2(path, new / path.name, follow_symlinks=False)


def _load(adapters: Sequence[str | Path], data: Mapping[str, TaskData]) -> dict[str, Adapter]:
    """Name → adapter.

    Raises:
        BaseModelError: a classifier.
        SettingsError: no adapter, two of one name (capitals aside), or a name unfit for a file, or the base's; `data`
            under a name that is none of theirs.
        DataError: rows of another kind.
    """
    loaded = {adapter.name or "": adapter for adapter in map(Adapter.load, adapters)}
    if not loaded or len({name.casefold() for name in loaded}) != len(adapters):
        what = "the adapters need different names, by more than capitals"  # one file on the disks of macOS and Windows
        raise SettingsError(what, where=some(loaded), fix="Rename a folder")
    if odd := [name for name in data if name not in loaded]:
        fix = "Give each task under its adapter's name"
        raise SettingsError(f"data is of {', '.join(odd)}, none of the adapters", fix=fix)
    for name, adapter in loaded.items():
        require_exportable(name, adapter)
        if name in data:
            require_same_kind(adapter, data[name])
    return loaded
