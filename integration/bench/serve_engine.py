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

    def __init__(self, base: str, folders: list[str], ids: int, tokens: int) -> None:
        options: dict[str, Any] = {}
        if folders:
            options = {"enable_lora": True, "max_loras": ids, "max_lora_rank": 64, "lora_target_modules": TARGETS}
        common = {"dtype": "bfloat16", "enforce_eager": True, "max_model_len": 512, "enable_prefix_caching": False}
        self.engine = LLM(base, max_num_batched_tokens=tokens, **common, **options).llm_engine
        self.adapters = [LoRARequest(f"a{n}", n + 1, folders[n % len(folders)]) for n in range(ids) if folders]
        times = [self._timed(lambda request=request: self.engine.add_lora(request)) for request in self.adapters]
        self.load_ms = 1000 * statistics.median(times) if times else 0.0
        self.requests = 0

    def steps(self, rows: int, prompt: int, count: int) -> list[float]:
        """CPU seconds of the step that reads `rows` prompts of `prompt` tokens, then of `count` steps of decode."""
        options = SamplingParams(max_tokens=count + 1, temperature=0, ignore_eos=True)
        for row in range(rows):
            self.requests += 1
            ids = [(17 * self.requests + 5 * place) % 40000 + 100 for place in range(prompt)]
            adapter = self.adapters[row] if self.adapters else None
            self.engine.add_request(str(self.requests), {"prompt_token_ids": ids}, options, lora_request=adapter)
        times = []
        while self.engine.has_unfinished_requests():
            times.append(self._timed(self.engine.step))
        return times[: count + 1]

    def resident_bytes(self) -> float:
        """What vLLM holds of one adapter: its part of the stack, and copies beside it."""
        manager = self.engine.model_executor.driver_worker.worker.model_runner.lora_manager._adapter_manager
        held = manager._registered_adapters.cache.values()
        copies = sum(adapter.R.nbytes for adapter in held if adapter.R is not None)
        return manager.stack[0].nbytes + copies / len(self.adapters)

    @staticmethod
    def _timed(call: Any) -> float:
        # One thread computes, so this is the wall time of a machine with nothing else to do.
        started = time.process_time()
        call()
        return time.process_time() - started


def main() -> None:
    base, ids, tokens, *folders = sys.argv[1:]
    answers = sys.stdout
    sys.stdout = sys.stderr  # vLLM prints
    engine = Engine(base, folders, int(ids), int(tokens))
    is_shared = bool(folders) and not (Path(folders[0]) / "adapter_model.safetensors").exists()
    report = {"load_ms": engine.load_ms, "bytes_per_adapter": engine.resident_bytes() if is_shared else 0}
    print(json.dumps(report), file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(engine.steps(**json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    main()
