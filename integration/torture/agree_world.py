"""A random model with random adapters of one basis, drawn from (seed, number), and the logits it has to give."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from tests.random_adapter import save_adapter  # first: it hides broken optional packages

import torch  # isort: skip
import transformers

from lorasb_export.adapter import Adapter
from lorasb_export.base.model import BaseModel
from lorasb_export.base.products import weight_of
from lorasb_export.layers.targets import find_targets
from lorasb_export.settings import BLOCK, RANDOM
from tests.tiny import VOCABULARY, save_tokenizer

# What vLLM's CPU build serves with LoRA, at head sizes of 32 and more.
SERVED = ("Llama", "Qwen2", "Qwen3", "Gemma")
# The last ones go through torch's ONNX exporter, which takes several times as long, and so are drawn less often.
FAMILIES = (*SERVED, *SERVED, *SERVED, *SERVED, "Mistral", "Mistral", "Gemma2", "Gemma2", "Phi3", "GPT2")
TOKENS = 20  # of a prompt; a sliding window is shorter
ROWS = 2


@dataclass(frozen=True)
class Case:
    """What is drawn. `adapters` maps a name to the size of its update relative to the weight; they share a basis."""

    seed: int
    number: int
    family: str
    config: Mapping[str, Any]
    dtype: str
    targets: str
    rank: int
    scaling: float
    adapters: Mapping[str, float]
    directions: str

    def __str__(self) -> str:
        sizes = " ".join(f"{key}={value}" for key, value in self.config.items() if not key.endswith("_token_id"))
        kind = f"{self.family} {self.dtype} {self.targets} {self.directions}"
        return f"#{self.number} {kind} r={self.rank} s={self.scaling} {sizes}"


def draw(seed: int, number: int, served: bool) -> Case:
    """Case `number`; a served one has a family and a head size that vLLM takes on a CPU, and more adapters."""
    random = Random(f"{seed}-{number}")
    family = random.choice(SERVED if served else FAMILIES)
    head = random.choice([32, 64] if served else [8, 16, 16, 32, 32, 64])
    groups, queries = random.choice([1, 2]), random.choice([1, 2, 3])
    heads, own_head = groups * queries, family in ("Qwen3", "Gemma", "Gemma2")
    hidden = 16 * heads * random.randint(1, max(1, 8 // heads)) if own_head else heads * head
    if family == "GPT2":
        config: dict[str, Any] = {"n_embd": hidden, "n_head": heads, "n_layer": random.randint(1, 3), "n_positions": 64}
        groups = heads
    else:
        config = {
            "hidden_size": hidden,
            "intermediate_size": 16 * random.randint(2, 10),
            "num_hidden_layers": random.randint(1, 3),
            "num_attention_heads": heads,
            "num_key_value_heads": groups,
            "max_position_embeddings": 64,
        }
        config |= {"head_dim": head} if own_head else {}
    if family in ("Mistral", "Gemma2"):
        config["sliding_window"] = random.choice([None, 8]) if family == "Mistral" else 8
    if family == "Phi3":
        config["original_max_position_embeddings"] = config["max_position_embeddings"]  # no long RoPE
    config["tie_word_embeddings"] = family.startswith("Gemma") or random.random() < 0.5
    dtype = random.choice(["float32", "bfloat16"])
    smallest = min(hidden, config.get("intermediate_size", hidden), groups * head)
    rank, scaling = min(random.choice([1, 2, 4, 8, 12, 16]), smallest), random.choice([0.5, 1.0, 2.0])
    targets = random.choice(["all-linear", "some kinds", "some modules"])
    adapters = {f"a{i}": round(random.uniform(0.6, 1.6), 2) for i in range(4 if served else 2)}
    directions = random.choice([RANDOM, BLOCK])
    return Case(seed, number, family, config, dtype, targets, rank, scaling, adapters, directions)


class World:
    """The case in folders: `base`, and one per adapter, the first with the basis in it."""

    def __init__(self, case: Case, root: Path) -> None:
        self.case, self.root = case, root
        self.generator = torch.Generator().manual_seed(case.number)
        self.base = self._save_base()
        model = BaseModel.resolve(self.base).load(dtype="float32", device="cpu")
        first, *others = case.adapters
        modules = self._modules(model)
        options: dict[str, Any] = {"rank": case.rank, "scaling": case.scaling, "seed": case.number}
        options["directions"] = case.directions
        start = save_adapter(self.base, model, root / first, modules, relative_size=case.adapters[first], **options)
        for name in others:
            random = {module: torch.randn(R.shape, generator=self.generator) for module, R in start.R.items()}
            size = case.adapters[name] / case.adapters[first]
            R = {module: size * R.norm() / random[module].norm() * random[module] for module, R in start.R.items()}
            source, basis = str(root / first), start.load_basis()
            Adapter(start.base, start.basis_sha256, source, R, case.scaling, basis=basis).save(root / name)
        self.ids = torch.randint(3, len(VOCABULARY), (ROWS, TOKENS), generator=self.generator)
        self.expected = {name: self._reference(name, "float64") for name in ("base", *case.adapters)}
        self.rounded = {name: self._reference(name, case.dtype) for name in ("base", *case.adapters)}

    def _save_base(self) -> Path:
        case = self.case
        width = case.config.get("hidden_size") or case.config["n_embd"]
        special = {"vocab_size": len(VOCABULARY), "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
        # So large that every layer, and every adapter, has its say in the logits.
        own = getattr(transformers, f"{case.family}Config")(**case.config, **special, initializer_range=width**-0.5)
        kind = "GPT2LMHeadModel" if case.family == "GPT2" else f"{case.family}ForCausalLM"
        with torch.random.fork_rng():
            torch.manual_seed(case.number)
            model = getattr(transformers, kind)(own)
        for parameter in model.parameters():
            if parameter.dim() == 1:  # biases are 0 and norms are 1: one that is left out would not be missed
                parameter.data += 0.1 * torch.randn(parameter.shape, generator=self.generator)
        model.to(getattr(torch, case.dtype)).save_pretrained(self.root / "base")
        save_tokenizer(self.root / "base")
        return self.root / "base"

    def _modules(self, model: transformers.PreTrainedModel) -> list[str]:
        found = list(find_targets(model, "all-linear"))
        random = Random(f"{self.case.seed}-{self.case.number}-targets")
        if self.case.targets == "some modules":
            return sorted(random.sample(found, random.randint(1, len(found))))
        if self.case.targets == "some kinds":
            kinds = sorted({name.rpartition(".")[2] for name in found})
            chosen = random.sample(kinds, random.randint(1, len(kinds)))
            return [name for name in found if name.rpartition(".")[2] in chosen]
        return found

    def adapter(self, name: str) -> Adapter:
        return Adapter.load(self.root / name)

    def _reference(self, name: str, dtype: str) -> torch.Tensor:
        """W0 + s·B·R·A by hand in float64, rounded to `dtype` once → logits (rows, tokens, vocabulary) in `dtype`."""
        model = BaseModel.resolve(self.base).load(dtype="float64", device="cpu")
        if name != "base":
            adapter, found = self.adapter(name), dict(model.named_modules())
            basis = adapter.load_basis()
            for module, R in adapter.R.items():
                B, A = basis.modules[module].B.double(), basis.modules[module].A.double()
                weight_of(found[module]).data += adapter.scaling * B @ R.double() @ A
        return logits(model.to(getattr(torch, dtype)), self.ids)


@torch.inference_mode()
def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    found: torch.Tensor = model(ids).logits
    return found.double()
