"""HF Trainer in a parity cell: an unmodified Trainer, configured for sequence parallelism by its ds_config.

The same program runs at SP 1 and at SP P, with every batch key "auto". Its loss is the mean over all labelled tokens of
a step on all ranks (the Trainer's ``num_items_in_batch``), so the fp64 run takes the same mean.
"""

import math
import tempfile
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from transformers import Trainer, TrainingArguments
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from benchmarks.cells import (
    STEPS,
    Cell,
    KeepFp64,
    Result,
    build_model,
    ds_config,
    full_weight,
    learning_rates,
    model_config,
    samples,
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


def run_trainer(cell: Cell, sp_size: int) -> Result:
    """Run three steps of the Trainer; runs differ in ``sp_size`` only."""
    # transformers keeps the last ds_config while its TrainingArguments live, and would build the model sharded.
    unset_hf_deepspeed_config()
    model = build_model(model_config(cell))
    batches = samples(cell, model.config.vocab_size)
    # In the order in which the Trainer's ranks draw them.
    dataset = [ranks[rank][micro] for ranks in batches for micro in range(cell.gas) for rank in range(cell.world_size)]
    dataset = [{key: x[0] for key, x in sample.items()} for sample in dataset]
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
        trainer = _Trainer(model=model, args=args, train_dataset=dataset, cell=cell)
        trainer.train()
        engine = trainer.model_wrapped
        changes = {name: full_weight(p) - trainer.before[name] for name, p in engine.module.named_parameters()}
        engine.destroy()
    first = trainer.state.log_history[0]
    norm = first.get("grad_norm") if cell.stage or cell.dtype != "fp32" else None
    result = Result(first["loss"], norm, trainer.grads, changes)
    return result if dist.get_rank() == 0 else replace(result, grads={}, changes={})


class _Trainer(Trainer):
    """Trainer with SGD that keeps the gradients of its first step."""

    def __init__(self, *args: Any, cell: Cell, **kwargs: Any) -> None:
        self._cell = cell
        self.before: dict[str, torch.Tensor] = {}
        self.grads: dict[str, torch.Tensor] = {}
        super().__init__(*args, **kwargs)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Use SGD, as Adam hides a wrong gradient scale."""
        if self.optimizer is None:
            matrix_rate, norm_rate = learning_rates(self._cell)
            params = [p for p in self.model.parameters() if p.requires_grad]
            dims = [getattr(p, "ds_shape", p.shape) for p in params]
            self.optimizer = torch.optim.SGD(
                [
                    {"params": [p for p, d in zip(params, dims, strict=True) if len(d) > 1], "lr": matrix_rate},
                    {"params": [p for p, d in zip(params, dims, strict=True) if len(d) == 1], "lr": norm_rate},
                ]
            )
        return self.optimizer

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        prepared = super()._prepare_for_training(*args, **kwargs)
        engine = self.model_wrapped
        named = list(engine.module.named_parameters())
        self.before = {name: full_weight(param) for name, param in named}
        engine.step = self._keeping_gradients(engine.step, named)
        return prepared

    def _keeping_gradients(self, step: Callable[..., Any], named: list[Any]) -> Callable[..., Any]:
        from deepspeed.utils import safe_get_full_grad

        def kept(*args: Any, **kwargs: Any) -> Any:
            if not self.grads:
                self.grads = {name: safe_get_full_grad(param).double().clone() for name, param in named}
            return step(*args, **kwargs)

        return kept


def run_trainer_truth(cell: Cell) -> Result:
    """Run the cell in fp64 plain torch, averaging over a step's labelled tokens."""
    hf_config = model_config(cell)
    rounding = {"fp32": torch.float32, "bf16": torch.bfloat16}[cell.dtype]
    model = build_model(hf_config).to(rounding).double()
    before = {name: param.detach().clone() for name, param in model.named_parameters()}
    result = Result(0.0, None)
    with KeepFp64():
        for index, ranks in enumerate(samples(cell, hf_config.vocab_size)):
            batches = [batch for micros in ranks for batch in micros]
            count = sum(int(batch["labels"][:, 1:].ne(-100).sum()) for batch in batches)
            loss = sum(_token_losses(model, batch) for batch in batches) / count
            model.zero_grad()
            loss.backward()
            grads = {name: param.grad.clone() for name, param in model.named_parameters()}
            norm = math.sqrt(sum(grad.square().sum().item() for grad in grads.values()))
            if index == 0:
                result = Result(loss.item(), norm, grads)
            factor = max(1.0, (norm + 1e-6) / cell.clip) if cell.clip else 1.0
            with torch.no_grad():
                for name, param in model.named_parameters():
                    param -= learning_rates(cell)[param.dim() == 1] * grads[name] / factor
    result.changes = {name: param.detach() - before[name] for name, param in model.named_parameters()}
    result.before = before
    return result


def _token_losses(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    logits = model(input_ids=batch["input_ids"]).logits
    return F.cross_entropy(logits[0, :-1], batch["labels"][0, 1:], ignore_index=-100, reduction="sum")
