"""HF Trainer in a parity cell: an unmodified Trainer, configured for sequence parallelism by its ds_config.

The same program runs at SP 1 and at SP P, with every batch key "auto". Its loss is the mean over all labelled tokens of
a step on all ranks (the Trainer's ``num_items_in_batch``), so the fp64 run takes the same mean.
"""

import tempfile
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from benchmarks.cells import (
    STEPS,
    Cell,
    Recorder,
    Result,
    build_model,
    ds_config,
    model_config,
    run_truth,
    samples,
    sgd,
)

_BATCH_KEYS = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")


def trainer_cells() -> list[Cell]:
    """Return cells of every stage on two ranks, and of SP 4 and SP 2 on four."""
    two = [
        Cell(stage=0, gas=2, odd_lengths=True),
        Cell(stage=1, gas=2, unequal_labels=True, clip=0.5),
        Cell(stage=2, dtype="bf16", odd_lengths=True, unequal_labels=True),
        Cell(stage=3, gas=2, odd_lengths=True, unequal_labels=True, clip=0.5),
        Cell(stage=3, gas=2, dtype="bf16", grad_accum="fp32"),
    ]
    four = [
        Cell(stage=2, sp_size=4, world_size=4, gas=2, odd_lengths=True, unequal_labels=True),
        Cell(stage=3, sp_size=4, world_size=4, odd_lengths=True, clip=0.5),
        Cell(stage=1, sp_size=2, world_size=4, gas=2, unequal_labels=True, odd_lengths=True),
        Cell(stage=3, sp_size=2, world_size=4, unequal_labels=True, kv_heads=1),
    ]
    return two + four


def trainer_config(cell: Cell, sp_size: int) -> dict[str, Any]:
    """Return the cell's ds_config with every batch key left to the Trainer."""
    return ds_config(cell, sp_size) | dict.fromkeys(_BATCH_KEYS, "auto")


def samples_in_turn(cell: Cell) -> list[dict[str, torch.Tensor]]:
    """Return all ranks' samples in the order in which a loader shared by the ranks draws them."""
    steps = samples(cell, model_config(cell).vocab_size)
    turns = [(micro, rank) for micro in range(cell.gas) for rank in range(cell.world_size)]
    return [{key: x[0] for key, x in ranks[rank][micro].items()} for ranks in steps for micro, rank in turns]


class CellTrainer(Trainer):
    """Trainer with the cell's SGD, whose engine's first step is recorded."""

    def __init__(self, cell: Cell, model: torch.nn.Module, **kwargs: Any) -> None:
        # Under DeepSpeed the Trainer drops an optimizer that it is given.
        self._sgd = sgd(model, cell)
        super().__init__(model=model, callbacks=[_Watch(self)], **kwargs)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Return the cell's optimizer."""
        self.optimizer = self.optimizer or self._sgd
        return self.optimizer


class _Watch(TrainerCallback):
    def __init__(self, trainer: CellTrainer) -> None:
        self._trainer = trainer

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self._trainer.recorder = Recorder(self._trainer.model_wrapped)


def run_trainer(cell: Cell, sp_size: int) -> Result:
    """Run three steps of the Trainer; runs differ in ``sp_size`` only."""
    # transformers keeps the last ds_config while its TrainingArguments live, and would build the model sharded.
    unset_hf_deepspeed_config()
    model = build_model(model_config(cell))
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            output_dir=folder,
            use_cpu=not torch.cuda.is_available(),
            deepspeed=trainer_config(cell, sp_size),
            per_device_train_batch_size=1,
            gradient_accumulation_steps=cell.gas,
            max_grad_norm=cell.clip,
            max_steps=STEPS,
            lr_scheduler_type="constant",
            bf16=cell.dtype == "bf16",
            train_sampling_strategy="sequential",
            logging_steps=1,
            logging_nan_inf_filter=False,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        trainer = CellTrainer(cell, model, args=args, train_dataset=samples_in_turn(cell))
        trainer.train()
        result = trainer.recorder.result()
        trainer.model_wrapped.destroy()
    first = trainer.state.log_history[0]
    norm = first.get("grad_norm") if cell.stage or cell.dtype != "fp32" else None
    return replace(result, loss=first["loss"], norm=norm)


def run_trainer_truth(cell: Cell) -> Result:
    """Run the cell in fp64 plain torch, averaging over a step's labelled tokens."""
    return run_truth(cell, _mean_of_tokens)


def _mean_of_tokens(model: torch.nn.Module, batches: list[dict[str, torch.Tensor]]) -> torch.Tensor:
    logits_1SV = [model(input_ids=batch["input_ids"]).logits for batch in batches]
    labels_S = [batch["labels"][0, 1:] for batch in batches]
    pairs = zip(logits_1SV, labels_S, strict=True)
    losses = [F.cross_entropy(x[0, :-1], y, ignore_index=-100, reduction="sum") for x, y in pairs]
    return sum(losses) / sum(int(y.ne(-100).sum()) for y in labels_S)
