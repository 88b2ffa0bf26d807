"""Exported ONNX folders on plain onnxruntime: greedy decoding, and a classifier's logits."""

from __future__ import annotations

import math
import sys
from collections.abc import Collection, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ..bars import progress_bar
from ..base.tokenizer import tokenizer_of
from ..environment import require_packages
from ..errors import ArtifactError, DataError, SettingsError, first_line, some
from ..evaluation.answer_end import ends_of
from ..files.storage import expanded, read_json
from .onnx_build import GRAPH
from .onnx_exporter import GENAI
from .onnx_graph import read_graph
from .onnx_record import read_record
from .onnx_swap import IDS, SUFFIX, read_adapter

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_ROWS = 8  # prompts decoded together,
_PREFILL_TOKENS = 2048  # as long as their prompts fit in this many tokens: the graph returns logits for each of them
_KEPT = 64  # adapters in memory: of thousands, those that were used last
_FLOATS = {"tensor(float)": np.float32, "tensor(float16)": np.float16}


def open_session(folder: Path, threads: int | None = None) -> Any:
    """onnxruntime's session on the CPU for the graph of `folder`, which is checked first (`onnx_graph.read_graph`).

    Args:
        threads: onnxruntime's threads; None takes all cores.

    Raises:
        ArtifactError: the graph is damaged or dangerous, or does not run on the CPU (bf16 needs CUDA).
        MissingPackageError: onnx or onnxruntime is not installed.
    """
    require_packages("onnx", "onnxruntime")
    import onnxruntime as ort

    read_graph(folder / GRAPH)
    options = ort.SessionOptions()
    options.log_severity_level = 3  # else it warns of every R that a run may replace
    options.intra_op_num_threads = threads or 0
    # Waiting threads sleep: busy ones steal the cores from torch and other processes (half the speed when shared).
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    try:
        return ort.InferenceSession(str(folder / GRAPH), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's errors have no base class of their own
        raise ArtifactError(
            f"onnxruntime cannot load the graph on the CPU: {error}", where=folder, fix="Export it as fp32 or int8"
        ) from None


class _Chosen(NamedTuple):
    """An adapter, or none, as a run of the graph is given it."""

    run_options: Any
    number: int = 0  # in a routed folder
    adapter: Any = None  # held here: RunOptions does not keep it alive


class OnnxDecoder:
    """An exported decoder on the CPU.

    Threads may share one: `generate` answers to its end with the adapter that was in use when it began. Where they use
    different ones, they hold one lock around `use` and `generate` together; in a routed folder `generate` is told them.

    Args:
        folder: what `export` wrote, in the format `onnx` or `onnx-adapters`.
        adapter: the name of one of the folder's adapters, or an `.onnx_adapter` file made for it; None runs the graph's
            own weights. `use` changes it.
        threads: onnxruntime's threads; None takes all cores.

    Attributes:
        ids: adapter → its number, in a routed folder, whose rows may use different ones.
        context: how many tokens a prompt and its answer may have.
        eos_ids: the tokens that end an answer.

    Raises:
        ArtifactError: a file is missing, damaged or of another graph, or the graph does not run on the CPU.
        MissingPackageError: onnxruntime is not installed.
    """

    def __init__(self, folder: str | Path, adapter: str | Path | None = None, threads: int | None = None) -> None:
        self.folder = expanded(folder)
        record = read_record(self.folder)
        self.context = context_of(self.folder)
        # The builder's GroupQueryAttention takes each row's length from the sum of its mask and appends the next key
        # at that position; torch's graphs take any mask.
        self._pad_right = record["exporter"] == GENAI
        self.ids = {name: entry["id"] for name, entry in record.get("adapters", {}).items() if "id" in entry}
        self._session = open_session(self.folder, threads)
        import onnxruntime as ort

        self._ort = ort
        self._outputs = [output.name for output in self._session.get_outputs()]
        self._inputs = {item.name for item in self._session.get_inputs()}
        self._past = {i.name: i for i in self._session.get_inputs() if i.name.startswith("past_")}
        self._loaded: dict[tuple[Path, int | None], Any] = {}
        self.use(adapter)

    @cached_property
    def eos_ids(self) -> set[int]:
        """The tokens that end an answer. Raises ArtifactError when the folder's tokenizer does not load."""
        return ends_of(self.folder, tokenizer_in(self.folder))

    def use(self, adapter: str | Path | None) -> None:
        """Answer with this adapter from now on. A file is checked when it is first used, and again when it changed.

        Raises:
            ArtifactError: the folder has no such adapter; or the file is missing, damaged or of another graph.
        """
        run_options = self._ort.RunOptions()  # a new one: of two active adapters the first would win
        if adapter is None:
            self._chosen = _Chosen(run_options)
        elif IDS in self._inputs:
            self._chosen = _Chosen(run_options, number=self._number(str(adapter)))
        else:
            loaded = self._load(adapter)
            run_options.add_active_adapter(loaded)
            self._chosen = _Chosen(run_options, adapter=loaded)

    def _load(self, adapter: str | Path) -> Any:
        """onnxruntime's adapter of that file, new or kept."""
        path = expanded(adapter) if str(adapter).endswith(SUFFIX) else self.folder / f"{adapter}{SUFFIX}"
        state = (path, path.stat().st_mtime_ns if path.is_file() else None)
        loaded = self._loaded.pop(state, None)
        if loaded is None:
            replaceable = self._session.get_overridable_initializers()
            expected = {item.name: (item.shape, _FLOATS[item.type]) for item in replaceable}
            if {name: (list(array.shape), array.dtype) for name, array in read_adapter(path).items()} != expected:
                fix = f"Use one exported into {self.folder}"
                raise ArtifactError("the ONNX adapter belongs to another graph", where=path, fix=fix)
            loaded = self._ort.LoraAdapter()
            loaded.Load(str(path))
        self._loaded[state] = loaded  # the last one: the first is the one that was used longest ago
        if len(self._loaded) > _KEPT:
            del self._loaded[next(iter(self._loaded))]
        return loaded

    def _number(self, adapter: str) -> int:
        if adapter not in self.ids:
            raise ArtifactError(f"no adapter {adapter!r}", where=self.folder, fix=f"It has {some(self.ids)}")
        return int(self.ids[adapter])

    def generate(
        self,
        prompt_ids: Sequence[Sequence[int]],
        max_tokens: int,
        eos_ids: Collection[int] | None = None,
        adapters: Sequence[str | None] | None = None,
    ) -> list[list[int]]:
        """Greedy continuations: for each prompt at most `max_tokens` ids, up to and including the first of `eos_ids`.

        Args:
            eos_ids: None for the decoder's own.
            adapters: the adapter of each prompt, None for the base; only in a routed folder.

        Raises:
            DataError: a prompt is empty, or does not fit into the model's context with its answer.
            SettingsError: `adapters` for a folder that is not routed.
        """
        lengths = [len(prompt) for prompt in prompt_ids]
        if not all(lengths):
            raise DataError("the prompt has no tokens", where=f"prompt {lengths.index(0) + 1}", fix="Leave it out")
        longest = max(lengths, default=1)
        if longest + max_tokens > self.context:
            raise DataError(
                f"{longest} prompt tokens and {max_tokens} new ones exceed the model's context of {self.context}",
                fix="Shorten the prompt, or ask for fewer tokens",
            )
        chosen = self._chosen  # read once: another thread may call `use` meanwhile
        numbers = [chosen.number] * len(prompt_ids)
        if adapters is not None:
            if IDS not in self._inputs:
                fix = "Export it with --routed, or call `use` before each batch"
                raise SettingsError("this folder has one adapter for a whole batch", where=self.folder, fix=fix)
            numbers = [0 if name is None else self._number(name) for name in adapters]
        eos_ids = self.eos_ids if eos_ids is None else eos_ids
        answers: dict[int, list[int]] = {}
        for part in progress_bar(_batches(lengths), desc="generate", leave=False):
            prompts, on_them = [prompt_ids[i] for i in part], np.array([numbers[i] for i in part])
            answers |= zip(part, self._generate(prompts, max_tokens, eos_ids, chosen.run_options, on_them), strict=True)
        return [answers[i] for i in range(len(prompt_ids))]

    def _generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_tokens: int,
        eos_ids: Collection[int],
        run_options: Any,
        numbers: np.ndarray[Any, Any],
    ) -> list[list[int]]:
        """One batch. Padding is on the side the graph takes; a row's mask covers its own tokens."""
        lengths = np.array([len(prompt) for prompt in prompts])
        ids, mask = np.zeros((2, len(prompts), lengths.max()), np.int64)
        for row, ones, prompt in zip(ids, mask, prompts, strict=True):
            place = slice(len(prompt)) if self._pad_right else slice(-len(prompt), None)
            row[place], ones[place] = prompt, 1
        value = self._ort.OrtValue.ortvalue_from_numpy
        last = lengths - 1 if self._pad_right else np.full_like(lengths, -1)
        cache = {
            name: value(np.zeros((len(prompts), item.shape[1], 0, item.shape[3]), _FLOATS[item.type]))
            for name, item in self._past.items()
        }
        answers: list[list[int]] = [[] for _ in prompts]
        for _ in range(max_tokens):
            positions = np.clip(mask.cumsum(-1) - 1, 0, None)[:, -ids.shape[1] :]
            feed = {"input_ids": ids, "attention_mask": mask, "position_ids": positions, IDS: numbers}
            values = {name: value(np.ascontiguousarray(array)) for name, array in feed.items() if name in self._inputs}
            # Not IO binding: onnxruntime ignores active adapters there, without a word.
            results = self._session.run_with_ort_values(self._outputs, values | cache, run_options)
            present = dict(zip(self._outputs, results, strict=True))
            tokens = present.pop("logits").numpy()[np.arange(len(prompts)), last].argmax(-1)
            for answer, token in zip(answers, tokens, strict=True):
                if not (answer and answer[-1] in eos_ids):
                    answer.append(int(token))
            if all(answer[-1] in eos_ids for answer in answers):
                break
            cache = {name.replace("present", "past_key_values"): value for name, value in present.items()}
            ids, last, lengths = tokens[:, None].astype(np.int64), np.zeros_like(last), lengths + 1
            if self._pad_right:
                mask = (np.arange(lengths.max()) < lengths[:, None]).astype(np.int64)
            else:
                mask = np.concatenate([mask, np.ones_like(ids)], axis=1)
        return answers


def _batches(lengths: Sequence[int]) -> list[list[int]]:
    """Prompts, by number, that are answered at once: those of like lengths, the longest first."""
    batches, left = [], sorted(range(len(lengths)), key=lambda i: -lengths[i])
    while left:
        rows = max(1, min(_ROWS, _PREFILL_TOKENS // lengths[left[0]]))
        batches.append(left[:rows])
        left = left[rows:]
    return batches


def context_of(folder: Path) -> int:
    """How many tokens a prompt and its answer may have in an exported decoder. Raises ArtifactError: no config.json."""
    context: int = read_json(folder / "config.json").get("max_position_embeddings", sys.maxsize)
    return context


def limits_in(folder: Path) -> dict[str, float]:
    """What `checked_prompt_ids` asks of an exported decoder. Raises ArtifactError: no config.json."""
    context, vocabulary = context_of(folder), read_json(folder / "config.json").get("vocab_size", math.inf)
    return {"reach": context, "made_for": context, "embeddings": vocabulary}


def tokenizer_in(folder: Path) -> PreTrainedTokenizerBase:
    """An exported folder's. Raises ArtifactError when it is damaged."""
    try:
        return tokenizer_of(folder)
    except Exception as error:  # of a dozen types
        what = f"transformers cannot load the tokenizer: {first_line(error):.300}"
        raise ArtifactError(what, where=folder, fix="Export it again") from error


def classify(folder: str | Path, batch: Mapping[str, np.ndarray[Any, Any]]) -> np.ndarray[Any, Any]:
    """Logits (rows, classes) of an exported classifier, of a regression (rows, 1).

    Args:
        folder: what `export` wrote, in the format `onnx`.
        batch: the arrays that its tokenizer returns, by name.

    Raises:
        ArtifactError: the graph is damaged or missing, or does not run on the CPU.
        DataError: the batch lacks an array that the graph reads; or the graph does not run on it: its texts may be
            longer than the model's positions reach.
        MissingPackageError: onnxruntime is not installed.
    """
    return run_classifier(open_session(expanded(folder)), batch)


def run_classifier(session: Any, batch: Mapping[str, np.ndarray[Any, Any]]) -> np.ndarray[Any, Any]:
    """`classify` in a session that is open."""
    names = [item.name for item in session.get_inputs()]
    if absent := [name for name in names if name not in batch]:
        fix = "Take what the tokenizer of the folder returns"
        raise DataError(f"the batch has no {', '.join(absent)}, which the graph reads", fix=fix)
    try:
        logits: np.ndarray[Any, Any] = session.run(None, {name: batch[name] for name in names})[0]
    except Exception as error:  # onnxruntime's errors have no base class of their own
        shapes = ", ".join(f"{name} {np.shape(batch[name])}" for name in names)
        fix = "Give numpy arrays as its tokenizer makes them, of texts cut where training did (max_length)"
        raise DataError(f"the graph does not run on {shapes}: {first_line(error):.300}", fix=fix) from None
    return logits
