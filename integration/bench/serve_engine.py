"""One vLLM engine in a process of its own, driven by lines of JSON on stdin; `serve` holds several, one at work."""

from __future__ import annotations

import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class Engine:
    """A model, and adapters under as many ids as wanted: the folders are used in turn."""

    def __init__(self, base: str, folders: list[str], ids: int, options: dict[str, Any]) -> None:
        if folders:
            options = {"max_loras": ids, "max_lora_rank": 64, "lora_target_modules": TARGETS} | options
        common = {"dtype": "bfloat16", "enforce_eager": True, "max_model_len": 512, "enable_prefix_caching": False}
        self.llm = LLM(base, enable_lora=bool(folders), **common | options)
        self.engine = self.llm.llm_engine
        self.adapters = [LoRARequest(f"a{n}", n + 1, folders[n % len(folders)]) for n in range(ids) if folders]
        times = [self._timed(lambda request=request: self.engine.add_lora(request)) for request in self.adapters]
        self.load_ms = 1000 * statistics.median(times) if times else 0.0
        self.requests = self.turn = 0

    def steps(self, rows: int, prompt: int, count: int, adapters: int = 0) -> list[float]:
        """CPU seconds of the step that reads `rows` prompts of `prompt` tokens, then of `count` steps of decode.

        So many `adapters` serve the rows (0: each row has its own), other ones in each call.
        """
        options = SamplingParams(max_tokens=count + 1, temperature=0, ignore_eos=True)
        self.turn += 37 * rows
        for row in range(rows):
            self.requests += 1
            ids = [(17 * self.requests + 5 * place) % 30000 + 100 for place in range(prompt)]
            number = self.turn + row % (adapters or rows)
            adapter = self.adapters[number % len(self.adapters)] if self.adapters else None
            self.engine.add_request(str(self.requests), {"prompt_token_ids": ids}, options, lora_request=adapter)
        times = []
        while self.engine.has_unfinished_requests():
            times.append(self._timed(self.engine.step))
        return times[: count + 1]

    def answers(self, prompts: list[list[int]], tokens: int, logprobs: bool) -> list[Any]:
        """[tokens, their log-probabilities] for each prompt by the base, then by each adapter: all in one batch."""
        options = SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True, logprobs=1 if logprobs else None)
        models = [None, *self.adapters]
        asked: Any = [({"prompt_token_ids": ids}, model) for ids in prompts for model in models]  # mixed
        outputs = self.llm.generate([ids for ids, _ in asked], options, lora_request=[model for _, model in asked])
        found: list[Any] = [None] * len(outputs)
        for place, output in enumerate(outputs):
            answer = output.outputs[0]
            chosen = [step[token].logprob for token, step in zip(answer.token_ids, answer.logprobs or (), strict=False)]
            found[place % len(models) * len(prompts) + place // len(models)] = [list(answer.token_ids), chosen]
        return found

    def resident_bytes(self) -> float:
        """What vLLM holds of one adapter: its part of the stack, and copies beside it."""
        manager = self.engine.model_executor.driver_worker.worker.model_runner.lora_manager._adapter_manager
        held = manager._registered_adapters.cache.values()
        copies = sum(adapter.block.nbytes for adapter in held if adapter.block is not None)
        return manager.stack[0].nbytes + copies / len(self.adapters)

    @staticmethod
    def _timed(call: Any) -> float:
        # One thread computes, so this is the wall time of a machine with nothing else to do.
        started = time.process_time()
        call()
        return time.process_time() - started


def main() -> None:
    base, ids, options, *folders = sys.argv[1:]
    answers = sys.stdout
    sys.stdout = sys.stderr  # vLLM prints
    engine = Engine(base, folders, int(ids), json.loads(options))
    is_shared = bool(folders) and not (Path(folders[0]) / "adapter_model.safetensors").exists()
    one_process = "tensor_parallel_size" not in options
    report = {
        "load_ms": engine.load_ms,
        "bytes_per_adapter": engine.resident_bytes() if is_shared and one_process else 0,
    }
    print(json.dumps(report), file=answers, flush=True)
    for line in sys.stdin:
        call, arguments = json.loads(line)
        print(json.dumps(getattr(engine, call)(**arguments)), file=answers, flush=True)


if __name__ == "__main__":
    main()
