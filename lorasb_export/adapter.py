"""Adapter: R of one task, and which basis it belongs to (format version 1, docs/reference/files.md).

Shapes everywhere: W (out, in), B (out, r), R (r, r), A (r, in), S (r,); the update of a module is s·B·R·A.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from . import basis_source, distributed
from .adapter_folder import tensor_bytes, write_adapter
from .base.model import BaseRef
from .base.structure import classifies
from .basis import Basis
from .belonging import basis_for_next, check_same_basis
from .choices import CAUSAL_LM, SEQ_CLS, Init, require_choice
from .errors import ArtifactError
from .files.atomic import atomic_folder
from .files.kind import ADAPTER_CONFIG, ADAPTER_FILES, ADAPTER_WEIGHTS, BASIS_CONFIG, BASIS_FILES
from .files.storage import absolute, expanded, read_header
from .format import AGAIN, read_adapter_config
from .hub.fetch import resolve_folder
from .names import name_of
from .tensors import check_savable, gathered, head_shapes, load_tensors

logger = logging.getLogger(__name__)


@dataclass(eq=False)  # tensors have no one answer to ==
class Adapter:
    """One task: an r×r matrix R per module of a basis, and for classification the trained head.

    Attributes:
        base: the model it was trained on: name, revision, fingerprint of the weights. The chat template is not in the
            fingerprint; `training` records it.
        basis_sha256: hash of the basis its R belong to.
        basis_source: where that basis is: an absolute folder or a Hub id@revision; None when it lies in the
            adapter's own folder, or was never saved (then `save` puts it there).
        R: module → (r, r) fp32. Of `attach` these are the live parameters of the model; of `fit` and `load`, plain
            tensors on the CPU.
        head: full tensor name → tensor, of the trained classification head (empty for CAUSAL_LM).
        training: what `fit` reports about the run; JSON. Keys of your own may hold anything: what is no JSON is
            saved as numbers or text. If R has changed since loading, `save` drops the recorded steps, losses and
            scores, unless you updated any of them. Keys that the card shows are as `fit` and `evaluate` write them:
            `task` and `data` text, `labels` a list, `settings` by name, `evaluation`
            {split: {metric: {"base", "adapter", "rows"}}}.
        folder: where its files are; for an adapter from the Hub, a cache folder that must not be modified.
        basis: its basis, where it is loaded (`load_basis`). Give several adapters the same, and it is held once.
        hub_source: of one from the Hub, `owner/name@commit`.
        as_loaded: set by `load`, by which `save` finds out whether R has changed.
    """

    base: BaseRef
    basis_sha256: str
    basis_source: str | None
    R: Mapping[str, torch.Tensor]
    scaling: float = 1.0
    task_type: str = CAUSAL_LM
    head: Mapping[str, torch.Tensor] = field(default_factory=dict)
    training: Mapping[str, Any] = field(default_factory=dict)
    folder: Path | None = None
    basis: Basis | None = None
    hub_source: str | None = None
    as_loaded: tuple[str, Mapping[str, Any]] | None = None  # `sha256` and `training` as they were read

    def __repr__(self) -> str:
        of = f"{self.task_type}, rank {self.rank} on {len(self.R)} modules of {self.base.name_or_path}"
        return f"<Adapter {self.name}: {of}, basis {self.basis_sha256[:12]}>"

    @classmethod
    def attach(
        cls,
        model: torch.nn.Module,
        basis: Basis,
        *,
        scaling: float = 1.0,
        init: Init = "svd",
        start: Adapter | None = None,
    ) -> Adapter:
        """Put a fresh adapter on every module of `basis` in `model`; all other parameters are frozen.

        The exception is a sequence classifier's head, which is trained with R in fp32 and saved in the adapter. Its
        labels are those of the model's config. Only names and shapes are compared with the basis; `BaseModel.verify`
        checks the weights. An adapter already on the model is replaced; `lorasb_export.remove(model)`
        takes the adapter off.

        Args:
            scaling: s.
            init: `svd` starts at R0 = S/s, the first step of the paper; `zero` starts at the base model.
            start: an adapter of this basis to go on from: R, and a classifier's head and labels, start as copies of its
                own, and s is its own, whatever `scaling` and `init` say. It stays as it is.

        Returns:
            an adapter whose `R` are the model's live parameters: train them, then `save`.

        Raises:
            ArtifactError: the model lacks a module of the basis, or its shape differs; `start` is of another basis, or
                has another head than the model.
            BaseModelError: it carries PEFT layers; a module is neither Linear nor Conv1D, quantized (but for nf4),
                offloaded, or sharded.
            SettingsError: `init` is neither `svd` nor `zero`.
        """
        from .layers.head import labels_of, train_head  # only now: these bring transformers
        from .layers.inject import inject

        if start is not None:
            check_same_basis(start, basis)
            basis, scaling = basis_for_next(start, basis), start.scaling
        adapter = cls.fresh(basis, scaling=scaling, init=init)
        adapter.R = inject(model, basis.modules, adapter.R, scaling)
        if classifies(model):
            adapter.task_type, adapter.head, adapter.training = SEQ_CLS, train_head(model), labels_of(model.config)
        if start is not None:
            heads = [{name: t.shape for name, t in one.head.items()} for one in (start, adapter)]
            if heads[0] != heads[1]:  # copied nevertheless, one row would fill them all
                fix = "Load the base for the adapter's kind of task, with its number of labels"
                raise ArtifactError("the model has another head than the adapter to start from", fix=fix)
            copy_tensors(start.tensors(), adapter)
            adapter.training = {key: start.training[key] for key in ("labels", "regression") if key in start.training}
        return adapter

    @classmethod
    def fresh(cls, basis: Basis, *, scaling: float = 1.0, init: Init = "svd") -> Adapter:
        """A fresh adapter that is on no model yet; arguments as for `attach`."""
        require_choice("init", init, Init)
        R0 = {
            name: torch.diag(module.S.float() / scaling if init == "svd" else torch.zeros_like(module.S))
            for name, module in basis.modules.items()
        }
        return cls(basis.base, basis.sha256, basis.source, R0, scaling, basis=basis)

    def inject(self, model: torch.nn.Module) -> None:
        """Put this adapter on `model`, frozen: its R on the modules of its basis, and its head where it has one.

        The model gets copies: `save` does not see later changes to them. To continue training, use
        `attach(model, adapter.load_basis(), start=adapter)`. An adapter already on the model is replaced;
        `lorasb_export.remove(model)` takes the adapter off.

        Raises:
            ArtifactError: as for `load_basis`; the model lacks a module of the basis or a parameter of the head, or has
                it in another shape.
            BaseModelError: as for `attach`.
        """
        from .layers.head import load_head
        from .layers.inject import inject

        inject(model, self.load_basis().modules, self.R, self.scaling)
        model.requires_grad_(False)
        load_head(model, self.head)

    @property
    def labels(self) -> list[Any]:
        """Class names in the order of the head's outputs; empty for CAUSAL_LM and for regression."""
        return list(self.training.get("labels") or [])

    @property
    def regression(self) -> bool:
        """Whether the head predicts a number."""
        return bool(self.training.get("regression"))

    @property
    def num_labels(self) -> int | None:
        """Outputs of the head; None for CAUSAL_LM."""
        return 1 if self.regression else len(self.labels) or None

    @property
    def name(self) -> str | None:
        """The name of its folder, or of its repository on the Hub; None before it is saved."""
        source = self.hub_source or self.folder
        return name_of(source) if source else None

    @property
    def rank(self) -> int:
        """r, of every R (r, r)."""
        return int(next(iter(self.R.values())).shape[0])

    @property
    def sha256(self) -> str:
        """sha256 of `adapter.safetensors` as `save` would write it now."""
        return hashlib.sha256(tensor_bytes(self)).hexdigest()

    def tensors(self) -> dict[str, torch.Tensor]:
        """What `adapter.safetensors` holds, by name; the live tensors, not copies."""
        return {f"{name}.R": R for name, R in sorted(self.R.items())} | dict(self.head)

    def save(self, folder: str | Path, *, overwrite: bool = False, embed: bool = False) -> None:
        """Write the adapter folder, whole or not at all; `folder` and `name` are those of what was written then.

        In a process group the first process writes. Where FSDP2 shards the model, all must call this: R is gathered.

        Args:
            overwrite: replace the folder, where it is an adapter.
            embed: put the basis inside, so that the folder stands alone. Done anyway where the basis was saved nowhere
                but in an adapter (of a new adapter with a warning), and for a basis of blocks, which takes less room
                than R.

        Raises:
            OutputError: the folder exists and `overwrite` is false, or it holds something other than an adapter.
            ArtifactError: `training` has a key that the card shows in another shape; a tensor is not finite, or is
                a part of one (of FSDP1, of ZeRO-3); or the card that is there cannot be kept.
        """
        folder = expanded(folder)
        R, head = gathered(self.R), gathered(self.head)
        check_savable(R, head, (self.rank, self.rank))
        self.basis_source = self.basis_source or self._saved_since()
        if distributed.is_main():
            with atomic_folder(folder, overwrite=overwrite, kind="adapter") as temporary:
                write_adapter(replace(self, R=R, head=head), temporary, folder, embed=embed)
            if not (embed or self.basis_source or self.folder or self.load_basis().is_blocks):
                logger.warning("%s holds the whole basis, saved nowhere else (adapters name one: basis.save)", folder)
        self.folder, self.hub_source = absolute(folder), None

    def _saved_since(self) -> str | None:
        """Where the basis was saved after this adapter was made; None for one that lies in an adapter: this one's."""
        source = self.basis.source if self.basis is not None else None
        if source is None or not os.path.isfile(os.path.join(source, BASIS_CONFIG)):
            return None
        return None if os.path.isfile(os.path.join(source, ADAPTER_CONFIG)) else source

    @classmethod
    def load(cls, source: str | Path) -> Adapter:
        """Load and validate an adapter folder, or one on the Hub; its basis is not read yet (`load_basis`).

        Raises:
            ArtifactError: as for `Basis.load`.
        """
        adapter, folder, config = describe(source)
        where, rank, modules = folder / ADAPTER_CONFIG, config["r"], config["target_modules"]
        if rank < 1 or not modules:
            raise ArtifactError(f"rank {rank} on {len(modules)} target modules", where=where, fix=AGAIN)
        expected = {f"{name}.R": [rank, rank] for name in modules}
        path = folder / ADAPTER_WEIGHTS
        header = read_header(path)
        head = head_shapes(header, modules, path) if config["task_type"] == SEQ_CLS else {}
        tensors = load_tensors(path, expected | head, config["sha256"])
        if adapter.basis_source is None and adapter.hub_source is not None:
            resolve_folder(adapter.hub_source, BASIS_FILES)
        adapter.R = {name: tensors[f"{name}.R"] for name in modules}
        adapter.head = {name: tensors[name] for name in head}
        return adapter

    def find_basis(self) -> str | Path:
        """Where its basis lies. Raises ArtifactError when nothing says so."""
        source = self.basis_source or self.folder
        if source is None:
            raise ArtifactError("the adapter names no basis", fix="Give it one: adapter.basis = Basis.load(folder)")
        return source

    def load_basis(self) -> Basis:
        """This adapter's basis, read once and checked against the adapter.

        Raises:
            ArtifactError: it is missing, or is not the basis the adapter was trained in.
        """
        if self.basis is None:
            self.basis = Basis.load(self.find_basis())
        check_same_basis(self, self.basis)
        return self.basis

    def as_lora(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """The update of module `name` as LoRA's B and A, in fp32: s·B·R and A, of the shapes (out, r) and (r, in)."""
        module = self.load_basis().modules[name]
        R = self.R[name].to(module.B.device, torch.float32)  # of a model on a GPU, maybe
        return self.scaling * (module.B.float() @ R), module.A.float()


def describe(source: str | Path) -> tuple[Adapter, Path, dict[str, Any]]:
    """What an adapter's config says, without its tensors: an adapter with neither R nor head, its folder, the config.

    Raises:
        ArtifactError: as for `Adapter.load`, of the config alone.
    """
    folder, found_at = resolve_folder(source, ADAPTER_FILES)
    hub_source, config = None if found_at == str(folder) else found_at, read_adapter_config(folder)
    adapter = Adapter(
        BaseRef(config["base_model_name_or_path"], config["revision"], config["base_fingerprint"]),
        config["basis"]["sha256"],
        basis_source.resolved(config["basis"]["source"], folder, hub_source),
        {},
        config["scaling"],
        config["task_type"],
        training=config["training"],
        folder=folder,
        hub_source=hub_source,
        as_loaded=(config["sha256"], deepcopy(config["training"])),
    )
    return adapter, folder, config


def copy_tensors(tensors: Mapping[str, torch.Tensor], adapter: Adapter) -> None:
    """Put R, and a head, into those that an adapter has on its model."""
    for name, live in adapter.tensors().items():
        live.data.copy_(tensors[name])
