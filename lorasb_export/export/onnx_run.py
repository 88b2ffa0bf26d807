"""Greedy decoding of an exported ONNX folder on plain onnxruntime."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from ..errors import ArtifactError, DataError, MissingPackageError
from ..storage import read_json

_ROWS = 8  # prompts decoded together,
_PREFILL_TOKENS = 2048  # as long as their prompts fit in this many tokens: the graph returns logits for each of them
_FLOATS = {"tensor(float)": np.float32, "tensor(float16)": np.float16}


def require_packages(*names: str) -> None:
    """Raise MissingPackageError for the first of `names` that is not installed."""
    for name in names:
        if find_spec(name) is None:
            raise MissingPackageError(
                f"the package {name.replace('_', '-')} is not installed", fix="pip install 'lorasb[cpu]' (or [gpu])"
            )


class OnnxDecoder:
    """An exported decoder on the CPU.

    Args:
        folder: what `export_onnx` or `export_onnx_adapters` wrote.
        adapter: an `.onnx_adapter` file of that folder; None runs the graph's own weights.
        threads: onnxruntime's threads; None takes all cores.

    Attributes:
        eos_ids: the tokens that end an answer, from `genai_config.json`.

    Raises:
        ArtifactError: a file is missing, or the graph does not run on the CPU (bf16 needs CUDA).
        MissingPackageError: onnxruntime is not installed.
    """

    def __init__(self, folder: str | Path, adapter: str | Path | None = None, threads: int | None = None) -> None:
        require_packages("onnxruntime")
        import onnxruntime as ort

        folder = Path(folder)
        config = read_json(folder / "genai_config.json")["model"]
        eos, decoder = config["eos_token_id"], config["decoder"]
        self.eos_ids = set(eos if isinstance(eos, list) else [eos])
        self._context = int(config["context_length"])
        self._kv_shape = (decoder["num_key_value_heads"], 0, decoder["head_size"])  # after the batch: nothing cached
        options = ort.SessionOptions()
        options.log_severity_level = 3  # else it warns of every R that a run may replace
        options.intra_op_num_threads = threads or 0
        # Waiting threads sleep: busy ones steal the cores from torch and other processes (half the speed when shared).
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        path = folder / decoder["filename"]
        try:
            self._session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime's errors have no base class of their own
            raise ArtifactError(
                f"onnxruntime cannot load the graph on the CPU: {error}", where=path, fix="Export it as fp32 or int8"
            ) from None
        self._value = ort.OrtValue.ortvalue_from_numpy
        self._outputs = [output.name for output in self._session.get_outputs()]
        self._past = {i.name: _FLOATS[i.type] for i in self._session.get_inputs() if i.name.startswith("past_")}
        self._run_options = ort.RunOptions()
        self._adapter = ort.LoraAdapter()  # kept: RunOptions does not keep it alive
        if adapter is not None:
            if not Path(adapter).is_file():
                raise ArtifactError("no such ONNX adapter", where=adapter, fix="Give an .onnx_adapter of the folder")
            replaceable = {item.name for item in self._session.get_overridable_initializers()}
            if set(ort.AdapterFormat.read_adapter(str(adapter)).get_parameters()) != replaceable:
                raise ArtifactError(
                    "the ONNX adapter belongs to another graph", where=adapter, fix=f"Use one exported into {folder}"
                )
            self._adapter.Load(str(adapter))
            self._run_options.add_active_adapter(self._adapter)

    def generate(
        self, prompt_ids: Sequence[Sequence[int]], max_tokens: int, eos_ids: Collection[int]
    ) -> list[list[int]]:
        """Greedy continuations: for each prompt at most `max_tokens` ids, up to and including the first of `eos_ids`.

        Raises:
            DataError: a prompt is empty, or does not fit into the model's context with its answer.
        """
        lengths = [len(prompt) for prompt in prompt_ids]
        if not all(lengths):
            raise DataError("a prompt has no tokens", where=f"prompt {lengths.index(0)}")
        longest = max(lengths, default=1)
        if longest + max_tokens > self._context:
            raise DataError(
                f"{longest} prompt tokens and {max_tokens} new ones exceed the model's context of {self._context}",
                fix="Shorten the prompt, or ask for fewer tokens",
            )
        rows = max(1, min(_ROWS, _PREFILL_TOKENS // longest))
        groups = (prompt_ids[start : start + rows] for start in range(0, len(prompt_ids), rows))
        return [answer for group in groups for answer in self._generate(group, max_tokens, eos_ids)]

    def _generate(self, prompts: Sequence[Sequence[int]], max_tokens: int, eos_ids: Collection[int]) -> list[list[int]]:
        """One batch. GroupQueryAttention takes each row's length from the sum of its mask and appends the row's next
        key at that position, so padding is on the right and the mask of a row is always its length in ones."""
        lengths = np.array([len(prompt) for prompt in prompts])
        ids = np.zeros((len(prompts), lengths.max()), np.int64)
        for row, prompt in zip(ids, prompts, strict=True):
            row[: len(prompt)] = prompt
        rows, last = np.arange(len(prompts)), lengths - 1
        cache = {name: self._value(np.zeros((len(rows), *self._kv_shape), t)) for name, t in self._past.items()}
        answers: list[list[int]] = [[] for _ in prompts]
        for _ in range(max_tokens):
            mask = (np.arange(lengths.max()) < lengths[:, None]).astype(np.int64)
            feed = {"input_ids": self._value(ids), "attention_mask": self._value(mask), **cache}
            # Not IO binding: onnxruntime ignores active adapters there, without a word.
            results = self._session.run_with_ort_values(self._outputs, feed, self._run_options)
            present = dict(zip(self._outputs, results, strict=True))
            tokens = present.pop("logits").numpy()[rows, last].argmax(-1)
            for answer, token in zip(answers, tokens, strict=True):
                if not (answer and answer[-1] in eos_ids):
                    answer.append(int(token))
            if all(answer[-1] in eos_ids for answer in answers):
                break
            cache = {name.replace("present", "past_key_values"): value for name, value in present.items()}
            ids, last, lengths = tokens[:, None].astype(np.int64), np.zeros_like(last), lengths + 1
        return answers
