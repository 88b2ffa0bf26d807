"""Random small models, dtypes, ranks, targets and adapters through every way out: the logits agree.

What has to come out is computed by hand, W0 + s·B·R·A in float64. The gap of a way is ‖found - expected‖ / ‖expected‖
over all positions, each position's logits less their mean (servers give log-probabilities, which differ by a constant).
Every adapter must move the logits by several tolerances, so that an update left out or wrong cannot pass.

Case k of seed s is always the same. Every 20th is served by vLLM too, folded and shared, with four adapters.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import traceback
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path

from .agree_ways import SERVED_WAYS, WAYS, Answers  # first: it hides broken optional packages

import torch  # isort: skip
import transformers

from .agree_world import World, draw
from .forks import fork_exporters, import_exporters
from .tally import Tally

# In units of the dtype's eps; ONNX graphs are fp32 whatever the base is stored in. Rounding errors add up over sums,
# roots and layers: correct ways were found at up to 12 eps of float32 and 2 eps of bfloat16, whose sums are kept in
# float32 by the kernels. Where the same weights by hand, rounded once and run by torch in that dtype, are off by more
# than a fifth of it, five times that is the tolerance: some random models amplify every rounding. (In one of them
# random errors of bfloat16 in the linears' outputs, nothing else changed, gave gaps from 0.013 to 0.061.)
TOLERANCE = {
    "float32": 64 * torch.finfo(torch.float32).eps,  # 7.6e-6
    "bfloat16": 8 * torch.finfo(torch.bfloat16).eps,  # 0.063
}
_ROUNDED = 5.0
SEEN = 2.0  # tolerances an adapter must move the logits by, at least
_WORKERS = 2
_ONE_SERVER = get_context("fork").Lock()  # at a time: it takes gigabytes


def run(n: int, seed: int, every: int = 20) -> Tally:
    """`n` cases, one in `every` served by vLLM; 0: none."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # else tokenizers warns of every fork
    tally = Tally("agree", seed)
    if any(way.startswith("onnx") for way in WAYS):
        import_exporters()  # here, once for all workers
    with (
        tempfile.TemporaryDirectory() as folder,
        ProcessPoolExecutor(_WORKERS, get_context("fork"), _prepare) as pool,
    ):
        for problems in pool.map(partial(try_case, Path(folder), seed, every), range(n)):
            tally.add("wrong" if problems else "ok", "; ".join(problems))
    return tally


def _prepare() -> None:
    torch.set_num_threads(1)
    fork_exporters()
    transformers.utils.logging.disable_progress_bar()


def try_case(folder: Path, seed: int, every: int, number: int) -> list[str]:
    """The case, and a line for each way that disagrees or fails; empty when all agree."""
    served = bool(every) and number % every == every - 1
    case = draw(seed, number, served)
    root = folder / str(number)
    root.mkdir()
    problems = []
    try:
        world = World(case, root)
        for name in case.adapters:
            effect = distance(world.expected["base"], world.expected[name])
            if effect < SEEN * _tolerance(world, name, case.dtype):
                problems.append(f"{name} moves the logits by {effect:.2g} only: nothing would be seen")
        for way, take in WAYS.items():
            problems += _judge_way(way, take, world)
        if served:
            with _ONE_SERVER:
                for way, take in SERVED_WAYS.items():
                    problems += _judge_way(way, take, world)
    except Exception:
        problems.append(f"cannot be made: {traceback.format_exc(limit=-2)}")
    shutil.rmtree(root)
    return [f"{case}", *problems] if problems else []


def _judge_way(way: str, take: Callable[[World], Answers], world: World) -> list[str]:
    dtype = "float32" if way.startswith("onnx") else world.case.dtype
    problems = []
    try:
        for name, found in take(world):
            gap = distance(found, world.expected[name])
            tolerance = _tolerance(world, name, dtype)
            if not gap <= tolerance:  # NaN is not either
                problems.append(f"{way}, {name}: gap {gap:.2g}, tolerance {tolerance:.2g}")
    except Exception:
        problems.append(f"{way}: {traceback.format_exc(limit=-2)}")
    return problems


def _tolerance(world: World, name: str, dtype: str) -> float:
    if dtype != world.case.dtype:
        return TOLERANCE[dtype]
    return max(TOLERANCE[dtype], _ROUNDED * distance(world.rounded[name], world.expected[name]))


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    """‖found - expected‖ / ‖expected‖ of centred logits (rows, tokens, vocabulary)."""
    found, expected = (logits - logits.mean(-1, keepdim=True) for logits in (found, expected))
    return float((found - expected).norm() / expected.norm())
