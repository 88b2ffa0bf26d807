"""The settings of a fit as transformers' Trainer takes them."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from ..base.device import default_device
from ..settings import FitSettings


def trainer_arguments(settings: FitSettings, folder: Path, steps: int, name: str) -> TrainingArguments:
    """An item of the dataset is a whole optimizer step, of which there are `steps`; `settings` have one rate."""
    (rate,) = settings.rates
    renamed = hasattr(TrainingArguments, "activation_checkpointing")
    checkpointing = "activation_checkpointing" if renamed else "gradient_checkpointing"
    options: dict[str, Any] = {checkpointing: True, f"{checkpointing}_kwargs": {"use_reentrant": False}}
    # Of torch 2.13, on every process: transformers has no other name yet for what is set below.
    warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
    arguments = TrainingArguments(
        output_dir=str(folder),
        use_cpu=default_device().type == "cpu",  # or several processes on CPUs would train apart
        run_name=name,
        max_steps=steps,
        per_device_train_batch_size=1,
        learning_rate=rate,
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        logging_steps=max(1, min(10, steps // 10)),
        logging_nan_inf_filter=False,
        save_steps=settings.checkpoint_every,
        seed=settings.seed,
        report_to="none",  # a callback of ours does that
        ddp_find_unused_parameters=False,
        ddp_broadcast_buffers=False,  # B and A, before every forward pass
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        disable_tqdm=True,
        **(options if settings.gradient_checkpointing else {}),
    )
    arguments.mixed_precision = "no"  # accelerate's environment would have the whole network under autocast
    arguments._n_gpu = min(1, arguments.n_gpu)  # several GPUs are for several processes, never for DataParallel
    return arguments
