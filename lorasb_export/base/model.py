"""The frozen base model: found, read from its headers, fingerprinted, loaded."""

from __future__ import annotations

import gc
import hashlib
import json
import logging
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..choices import CAUSAL_LM, NF4, SEQ_CLS, LoadedDtype, require_choice
from ..errors import BaseModelError, require_path
from ..files.storage import FLOATS, TensorInfo, expanded, read_json
from ..hub.fetch import snapshot
from ..hub.ids import parse_hub_id
from .device import check_dtype, default_device
from .network import auto_class, empty_network, mend_defaults, read_network
from .side_files import FETCHED, FETCHED_TEXTS, LOOKED_AT_FIRST, NOT_FETCHED
from .supported import architecture, check_supported, generates, refuse_merged, why_it_does_not
from .tensors import checkpoint_tensors, possible_keys
from .tokenizer import padded_tokenizer

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

_SAMPLE_BYTES = 4096


@dataclass(frozen=True)
class BaseRef:
    """Which base an artifact belongs to: its name, its revision, and a fingerprint of its weights."""

    name_or_path: str
    revision: str | None
    fingerprint: str

    def resolve(self, elsewhere: AnyBase | None = None) -> BaseModel:
        """The base this names, or the one at `elsewhere` in its place; not yet compared with the fingerprint.

        Raises:
            BaseModelError: the folder it names is gone; else see `BaseModel.resolve`.
        """
        if elsewhere is not None:
            return BaseModel.resolve(elsewhere)
        if parse_hub_id(self.name_or_path) is None and not Path(self.name_or_path).exists():
            fix = "Put it back, or say with --model where it is now"
            raise BaseModelError("the base model that this was made for is not there", where=self.name_or_path, fix=fix)
        return BaseModel.resolve(self.name_or_path, self.revision)


@dataclass(frozen=True)
class BaseModel:
    """A checkpoint folder with its config and the headers of its tensors; no weights are loaded."""

    name_or_path: str
    revision: str | None
    folder: Path
    config: Mapping[str, Any]

    def __repr__(self) -> str:
        revision = f"@{self.revision}" if self.revision else ""
        return f"<BaseModel {self.name_or_path}{revision}: {self.config['model_type']}>"

    @classmethod
    def resolve(cls, name_or_path: AnyBase, revision: str | None = None, *, weights: bool = True) -> BaseModel:
        """Find a folder or a Hub id (`owner/name` or `owner/name@revision`); a BaseModel is returned unchanged.

        Args:
            weights: fetch them too, from the Hub; else its config and tokenizer alone.

        Raises:
            BaseModelError: missing, a file, without safetensors, quantized, or of an unsupported architecture.
            ArtifactError: config.json is damaged.
            SettingsError: it is neither a path nor a Hub id, but a loaded network, say.
        """
        if isinstance(name_or_path, BaseModel):
            return name_or_path
        require_path("the base model", name_or_path, "Give its folder; where one is loaded, that as network= too")
        name = str(name_or_path)
        path = expanded(name)
        if path.is_file():
            raise BaseModelError(
                "the base model is a file", where=name, fix="Give the folder that holds config.json, or a Hub id"
            )
        if path.is_dir():
            folder = path.resolve()
        else:
            before = "the base model was not found: "
            name, revision, folder = snapshot(name, LOOKED_AT_FIRST, BaseModelError, before, revision)
        if not (folder / "config.json").is_file():
            raise BaseModelError("no config.json in the base model's folder", where=folder, fix="Give a model folder")
        config = read_json(folder / "config.json")
        check_supported(config, folder)
        if not path.is_dir():  # only now the weights
            files = FETCHED if weights else FETCHED_TEXTS
            snapshot(f"{name}@{revision}", files, BaseModelError, before, but=NOT_FETCHED, cached=folder)
        return cls(str(folder) if path.is_dir() else name, revision, folder, config)

    @cached_property
    def tensors(self) -> dict[str, tuple[Path, TensorInfo]]:
        """See `base.tensors.checkpoint_tensors`."""
        return checkpoint_tensors(self.folder)

    def tensor_key(self, name: str) -> str | None:
        """The checkpoint's name for the runtime parameter `name`, or None where it has none."""
        return next(filter(self.tensors.__contains__, possible_keys(name)), None)

    def weight_key(self, module: str) -> str:
        """The checkpoint's name for the weight of runtime module `module`.

        Raises:
            BaseModelError: the checkpoint has no such tensor.
        """
        if key := self.tensor_key(f"{module}.weight"):
            return key
        raise BaseModelError(
            f"the base has no weight for module {module}",
            where=self.folder,
            fix="Use the base model the basis was calibrated on",
        )

    @property
    def head_labels(self) -> list[Any]:
        """What the outputs of the base's own classification head are called, in order; empty where nothing says so."""
        names = self.config.get("id2label")
        if not isinstance(names, dict) or not all(str(key).isdecimal() for key in names):
            return []
        return [names[key] for key in sorted(names, key=int)]

    @property
    def generates(self) -> bool:
        """Whether it is a causal language model; one whose config.json does not say is taken for one if it can be."""
        return generates(self.config)

    @property
    def embeddings(self) -> float:
        """How many tokens have one; infinite where the config does not say."""
        count: float = self.config.get("vocab_size", math.inf)
        return count

    @property
    def stores_transposed(self) -> bool:
        """Whether target weights lie as (in, out): the families whose projections are transformers' Conv1D."""
        return self.config["model_type"] in ("gpt2", "openai-gpt")

    def fingerprint(self, modules: Iterable[str]) -> str:
        """sha256 over the targets' sorted names, shapes, dtypes and a sample of their bytes (three pages each)."""
        digest = hashlib.sha256()
        for module in sorted(modules):
            file, info = self.tensors[self.weight_key(module)]
            digest.update(json.dumps([module, list(info.shape), info.dtype]).encode())
            with file.open("rb") as stream:
                middle = (info.start + info.end) // 2
                for offset in (info.start, middle, max(info.start, info.end - _SAMPLE_BYTES)):
                    stream.seek(offset)
                    digest.update(stream.read(min(_SAMPLE_BYTES, info.end - offset)))
        return digest.hexdigest()

    def ref(self, modules: Iterable[str]) -> BaseRef:
        """The reference that a basis of these modules, by their full names, keeps to this base: to their weights.

        Raises:
            BaseModelError: the checkpoint has no weight for one of them.
        """
        return BaseRef(self.name_or_path, self.revision, self.fingerprint(modules))

    def verify(self, ref: BaseRef, modules: Iterable[str]) -> None:
        """Refuse this base when it is not the one `ref` names.

        Raises:
            BaseModelError: other weights (another model, another revision, or an already merged one).
        """
        refuse_merged(self.folder)
        if self.fingerprint(modules) != ref.fingerprint:
            raise BaseModelError(
                f"the base's weights are not those the artifact was made for ({ref.name_or_path})",
                where=self.folder,
                fix="Use that base at the same revision, or calibrate a basis for this one",
            )

    def require_task(self, task_type: str) -> None:
        """Raise BaseModelError for what does not generate and is asked to."""
        if task_type == CAUSAL_LM and not self.generates:
            name = architecture(self.config) or self.config["model_type"]
            raise BaseModelError(
                f"{name} does not generate text{why_it_does_not(self.config)}",
                where=self.folder,
                fix="Use a causal language model for prompt/completion data, or text/label data with this one",
            )

    def load(
        self,
        task_type: str = CAUSAL_LM,
        *,
        dtype: str = "auto",
        device: str | torch.device | None = None,
        num_labels: int | None = None,
        seed: int = 0,
    ) -> PreTrainedModel:
        """The frozen transformers model in evaluation mode.

        Args:
            task_type: CAUSAL_LM or SEQ_CLS.
            dtype: `auto` (the checkpoint's), `float32`, `bfloat16`, `float16` or `float64`; or `nf4`, linear layers in
                four bits and all else as in the checkpoint, for which bitsandbytes must be installed.
            device: where it goes; by default the accelerator torch sees, else the CPU.
            num_labels: outputs of the classification head (SEQ_CLS); where the checkpoint has none, or one of another
                size, it is drawn with `seed`; the global RNG is untouched.

        Raises:
            BaseModelError: it is asked to generate and does not; a weight the checkpoint lacks; whatever transformers
                raises on files that contradict each other.
            SettingsError: unknown `dtype`, or one the device does not support; or `nf4` of a base in float64.
            MissingPackageError: `nf4` without bitsandbytes.
        """
        import torch

        from .products import compute_in_float32

        self.require_task(task_type)
        require_choice("dtype", dtype, LoadedDtype)
        device = torch.device(device or default_device())
        empty = None
        if dtype == NF4:
            from .nf4 import loading_options

            empty = self.load_empty(task_type, dtype="auto", num_labels=num_labels)
            options = loading_options(empty, device)
        else:
            options = {"dtype": dtype if dtype == "auto" else getattr(torch, dtype)}
        if num_labels is not None:
            options |= {"num_labels": num_labels, "ignore_mismatched_sizes": True}  # a base that has another head
        self.tensors  # noqa: B018  # the headers are read and checked before transformers maps the files
        if device.type != "cpu":
            gc.collect()  # the base of an earlier training, if something holds it in a cycle: both might not fit
        network = read_network(self.folder, auto_class(task_type), options, seed, empty)
        self._prepare(network, task_type)
        check_dtype(network.dtype, device, self.folder, was_chosen=dtype != "auto")
        network.to(device)  # type: ignore[arg-type]
        compute_in_float32(network)
        return network

    def load_empty(self, task_type: str, *, dtype: str = "float32", num_labels: int | None = None) -> PreTrainedModel:
        """As `load`, but with parameters that take no memory, and in float32: most ask only for the shapes.

        Its buffers are as the network makes them.

        Raises:
            BaseModelError: it is asked to generate and does not; whatever transformers raises on a config.json that
                contradicts itself.
        """
        self.require_task(task_type)
        wanted = None if dtype in ("auto", NF4) else dtype
        network = empty_network(self.folder, task_type, wanted, num_labels, self._stored_dtype)
        self._prepare(network, task_type)
        return network

    def _stored_dtype(self) -> torch.dtype:
        """That of the first weight in the files, for a config.json that names none."""
        import torch

        from ..tensors import TORCH_DTYPES

        stored = (TORCH_DTYPES[info.dtype] for _, info in self.tensors.values() if info.dtype in FLOATS)
        return next(stored, torch.float32)

    def _prepare(self, network: PreTrainedModel, task_type: str) -> None:
        mend_defaults(network)
        network.requires_grad_(False).eval()
        if task_type == SEQ_CLS:  # a decoder looks for the last token before the padding, which the tokenizer makes
            network.config.pad_token_id = self.tokenizer.pad_token_id

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The base's tokenizer; a pad token that is missing, or has no embedding, is replaced by the end of sequence.

        It makes token types only for a model that tells them apart: others refuse them, or read them as tokens (GPT-2).

        Raises:
            BaseModelError: that has none either; the tokenizer's files are missing or damaged.
        """
        return padded_tokenizer(self)


AnyBase = str | Path | BaseModel  # a folder, a Hub id, or what was found behind one
