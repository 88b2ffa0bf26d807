"""Training R: a transformers Trainer that trains, saves and resumes nothing else."""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file
from tqdm import tqdm

from . import environment
from .artifact import Adapter, Basis, versions
from .base import SEQ_CLS, BaseModel
from .capture import capture, is_little, words
from .data import TaskData, collate, encode, load_task, row_losses
from .errors import ArtifactError, OutputError, TrainingError
from .layer import head_parameters
from .plot import plot_losses
from .settings import FitSettings
from .storage import atomic_folder, read_json, refuse_existing, write_json

environment.hide_broken_packages()  # before transformers looks for them
from transformers import (  # noqa: E402
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)
_COMPLETE = "complete.json"  # written last into a checkpoint: without it, the checkpoint is not resumed from


def fit(
    model: str | BaseModel,
    basis: str | Path | Basis,
    data: str | Path | TaskData,
    out: str | Path,
    settings: FitSettings | None = None,
    *,
    resume: bool = False,
    overwrite: bool = False,
    network: PreTrainedModel | None = None,
) -> Adapter:
    """Train one task's R in a frozen basis and write the adapter folder `out`.

    While it runs, checkpoints lie in the hidden sibling `.NAME.run`; it is removed once `out` is in place.

    Args:
        basis: a basis folder, a Hub id, or a loaded Basis.
        data: folder, file, Hub dataset id, or loaded task.
        resume: go on from the last complete checkpoint of an interrupted run with the same settings and data;
            from the beginning where there is none.
        network: the loaded base, where the caller already has it; its adapters are replaced.

    Raises:
        OutputError: `out` exists, or an interrupted run does and neither `resume` nor `overwrite` is given.
        TrainingError: other settings or data than the interrupted run's, or a loss that is not finite.
        DataError, BaseModelError, ArtifactError: the inputs are bad or do not belong together.
    """
    started = time.monotonic()
    settings = settings or FitSettings()
    out = Path(os.path.abspath(out))
    base = model if isinstance(model, BaseModel) else BaseModel.resolve(model)
    basis = basis if isinstance(basis, Basis) else Basis.load(basis)
    task = data if isinstance(data, TaskData) else load_task(out.name, data)
    base.verify(basis.base, basis.modules)
    refuse_existing(out, overwrite)

    run = out.parent / f".{out.name}.run"
    identity = {
        "settings": asdict(settings),
        "data_sha256": task.sha256,
        "basis_sha256": basis.sha256,
        "base_fingerprint": basis.base.fingerprint,
    }
    checkpoint = _open_run(run, identity, resume, overwrite)

    if network is None:
        count = len(task.labels) if task.task_type == SEQ_CLS else None
        network = base.load(task.task_type, dtype=settings.dtype, num_labels=count, seed=settings.seed)
    captured = _captured(base, network, basis, task)
    adapter = Adapter.attach(network, basis, scaling=settings.scaling, init=settings.init)
    adapter.task_type = task.task_type
    if task.task_type == SEQ_CLS:
        adapter.head = {name: parameter.requires_grad_(True) for name, parameter in head_parameters(network).items()}

    tokenizer = base.load_tokenizer()
    rows = {
        split: encode(task.splits[split], tokenizer, task.task_type, task.labels, settings.max_length)
        for split in ("train", "valid")
        if task.splits.get(split)
    }
    trainer = _RTrainer(
        adapter=adapter,
        identity=identity,
        model=network,
        args=_arguments(settings, run, has_valid="valid" in rows, rows=len(rows["train"])),
        train_dataset=rows["train"],
        eval_dataset=rows.get("valid"),
        data_collator=lambda batch: collate(batch, tokenizer.pad_token_id),
        compute_loss_func=_mean_loss,
        callbacks=[_Progress(task.name), _StopOnBadLoss()],
    )
    trainer.remove_callback(PrinterCallback)  # both print to stdout, which is for results
    trainer.remove_callback(ProgressCallback)
    result = trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    network.eval()

    adapter.training = {**_summary(task, settings, trainer, result.training_loss), "capture": captured}
    with atomic_folder(out, overwrite=overwrite) as temporary:
        adapter.write_into(temporary, out)
        history = [entry for entry in trainer.state.log_history if "loss" in entry or "eval_loss" in entry]
        (temporary / "training_log.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in history))
        plot_losses(history, temporary / adapter.training["plot"], title=f"{task.name}: loss")
        provenance = {"kind": "adapter", **identity, "seconds": round(time.monotonic() - started, 1)}
        write_json(temporary / "lorasb.json", {**provenance, "base": dict(basis.base.__dict__), "versions": versions()})
    shutil.rmtree(run)
    adapter.folder = out
    return adapter


def _captured(base: BaseModel, network: PreTrainedModel, basis: Basis, task: TaskData) -> dict[str, float] | None:
    """How much of the task's gradient a basis calibrated without it holds; None when it was calibrated with it."""
    if task.sha256 in {source["sha256"] for source in basis.calibration.get("data", [])}:
        return None
    found = capture(base, network, basis, task)
    if is_little(found):
        logger.warning(
            "%s: %s. Training in it may fall short: consider --basis own, or calibrate with this task's rows",
            task.name,
            words(found),
        )
    return {way: round(found[way], 4) for way in ("basis", "own", "random")}


def _summary(task: TaskData, settings: FitSettings, trainer: Trainer, loss: float) -> dict[str, Any]:
    """What the adapter's config and card say about its training."""
    valid = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    rows = len(trainer.train_dataset)  # type: ignore[arg-type]
    return {
        "task": task.name,
        "data": task.source,
        "data_sha256": task.sha256,
        "rows": rows,
        "rows_left_out": len(task.splits["train"]) - rows,
        "labels": task.labels,
        "steps": trainer.state.global_step,
        "train_loss": round(loss, 6),
        "valid_loss": round(valid[-1], 6) if valid else None,
        "trainable_parameters": trainer.get_num_trainable_parameters(),
        "settings": asdict(settings),
        "plot": "training.png",
    }


def _open_run(run: Path, identity: Mapping[str, Any], resume: bool, overwrite: bool) -> Path | None:
    """Prepare the working folder; returns the checkpoint to resume from, None to start from the beginning."""
    if resume:
        last = _last_complete(run)
        if last is None:  # killed before its first checkpoint
            shutil.rmtree(run, ignore_errors=True)
            return None
        saved = read_json(last / _COMPLETE)
        differing = [key for key in identity if saved.get(key) != json.loads(json.dumps(identity[key]))]
        if differing:
            raise TrainingError(
                f"the interrupted run had other {', '.join(differing)}",
                where=run,
                fix="Resume with the same settings and data, or start afresh with --overwrite",
            )
        return last
    if _last_complete(run) is not None and not overwrite:
        raise OutputError(
            "an interrupted run is there", where=run, fix="Continue it with --resume, or start afresh with --overwrite"
        )
    shutil.rmtree(run, ignore_errors=True)
    return None


def _last_complete(run: Path) -> Path | None:
    done = [marker.parent for marker in run.glob(f"checkpoint-*/{_COMPLETE}")]
    return max(done, key=lambda folder: int(folder.name.rpartition("-")[2]), default=None)


def _arguments(settings: FitSettings, run: Path, *, has_valid: bool, rows: int) -> TrainingArguments:
    per_epoch = math.ceil(rows / (settings.batch_size * settings.accumulate))
    steps = settings.max_steps or math.ceil(settings.epochs * per_epoch)
    return TrainingArguments(
        output_dir=str(run),
        num_train_epochs=settings.epochs,
        max_steps=settings.max_steps or -1,
        per_device_train_batch_size=settings.batch_size,
        per_device_eval_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.accumulate,
        learning_rate=settings.learning_rate,
        lr_scheduler_type=settings.schedule,
        warmup_steps=settings.warmup,
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        optim="adamw_torch_fused",
        logging_steps=max(1, min(10, steps // 10)),
        logging_nan_inf_filter=False,
        eval_strategy="steps" if has_valid else "no",
        eval_steps=math.ceil(steps / 4),
        save_steps=settings.checkpoint_every,
        save_total_limit=2,  # the newest may be incomplete when the process is killed
        seed=settings.seed,
        report_to="none",
        remove_unused_columns=False,
        dataloader_pin_memory=torch.accelerator.is_available(),
    )


def _mean_loss(outputs: Any, labels: torch.Tensor, num_items_in_batch: torch.Tensor | int | None = None) -> Any:
    """Mean over the labels of the whole optimizer step, whatever its split into batches and processes."""
    losses, counts = row_losses(outputs.logits, labels)
    return losses.sum() / (counts.sum() if num_items_in_batch is None else num_items_in_batch)


class _Progress(TrainerCallback):
    """One bar with the latest losses, on stderr when that is a terminal."""

    bar: Any

    def __init__(self, task: str) -> None:
        self.task = task

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.bar = tqdm(desc=f"fit {self.task}", total=state.max_steps, unit="step", disable=None)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        shown = {key: f"{float(logs[key]):.4f}" for key in ("loss", "eval_loss") if logs and key in logs}
        if shown:
            self.bar.set_postfix(shown)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.bar.close()


class _StopOnBadLoss(TrainerCallback):
    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        loss = (logs or {}).get("loss")
        if loss is not None and not math.isfinite(float(loss)):
            raise TrainingError(
                f"the loss is {loss} at step {state.global_step}", fix="Lower the learning rate, or use --dtype float32"
            )


class _RTrainer(Trainer):
    """Checkpoints hold R (and a head), the optimizer, the scheduler and the RNG; never the base."""

    def __init__(self, *, adapter: Adapter, identity: Mapping[str, Any], **options: Any) -> None:
        super().__init__(**options)
        self.adapter = adapter
        self.identity = identity

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        super().log({key: value for key, value in logs.items() if not key.endswith("_per_second")}, *args, **kwargs)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        folder = Path(str(output_dir or self.args.output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "adapter.safetensors").write_bytes(self.adapter.tensor_bytes())

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        folder = Path(str(self.args.output_dir)) / f"checkpoint-{self.state.global_step}"
        if self.args.should_save:
            write_json(folder / _COMPLETE, self.identity)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        path = Path(resume_from_checkpoint) / "adapter.safetensors"
        saved = load_file(path)
        live = self.adapter.tensors()
        if set(saved) != set(live):
            raise ArtifactError("the checkpoint holds other tensors than this adapter", where=path)
        for name, tensor in live.items():
            tensor.data.copy_(saved[name])
