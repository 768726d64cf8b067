"""Programs as users have them for DeepSpeed's own ALST: by hand, with accelerate, with the HF Trainer.

Each trains a cell of the parity table (benchmarks/cells.py) and returns what it gave. Nothing in the loops knows this
package; what the tests want to see is taken from the engine's ``step`` (``Recorder``).
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.nn.functional  # accelerate's and DeepSpeed's loops take it for granted
from torch.utils.data import DataLoader

from benchmarks import upstream
from benchmarks.cells import Cell, Recorder, Result, build_model, ds_config, model_config, sgd
from benchmarks.trainer import CellTrainer, samples_in_turn
from benchmarks.upstream import aggregated, forgotten, shard_loss


def own_samples(cell: Cell) -> list[dict[str, torch.Tensor]]:
    """This rank's samples of a cell, step after step, with position_ids as DeepSpeed's adapter demands them."""
    return every_ranks_samples(cell)[dist.get_rank() :: cell.world_size]


def every_ranks_samples(cell: Cell) -> list[dict[str, torch.Tensor]]:
    """All ranks' samples, dealt out in turn: sample i is rank i % W's."""
    return [{**each, "position_ids": torch.arange(len(each["input_ids"]))} for each in samples_in_turn(cell)]


def config_of(cell: Cell, alst: bool = True) -> dict[str, Any]:
    """The ds_config of a recipe: the SP degree comes from the program alone."""
    config = ds_config(cell, cell.sp_size)
    del config["sequence_parallel_size"]
    if not alst:
        del config["alst"]
    return config


def model_of(cell: Cell) -> torch.nn.Module:
    model = build_model(model_config(cell))
    if cell.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": cell.checkpointing == "reentrant"})
        model.train()
    return model


def registered(cell: Cell, model: Any) -> Any:
    from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF

    return UlyssesSPAttentionHF.register_with_transformers(
        model_name_or_path=model,
        core_attn_implementation="sdpa",
        sequence_parallel_size=cell.sp_size,
        micro_batch_size=1,
        seq_length_is_variable=True,
    )


def adapter_for(dataset: Any, engine: Any) -> Any:
    return upstream.adapter_for(DataLoader(dataset, batch_size=1), engine)


Loss = Callable[[Any, dict[str, torch.Tensor], Any], torch.Tensor]


def tutorial(cell: Cell, loss_of: Loss = shard_loss, alst: bool = True) -> Result:
    """https://www.deepspeed.ai/tutorials/ulysses-alst-sequence-parallelism/, by hand."""
    import deepspeed
    from deepspeed.runtime.utils import move_to_device
    from deepspeed.utils import groups

    with forgotten():
        model = model_of(cell)
        mpu, optimizer = registered(cell, model), sgd(model, cell)
        engine, *_ = deepspeed.initialize(config=config_of(cell, alst), model=model, optimizer=optimizer, mpu=mpu)
        try:
            sp_group = groups._get_sequence_parallel_group()
            recorder = Recorder(engine)
            for batch in adapter_for(own_samples(cell), engine):
                batch = move_to_device(batch, engine.device)
                loss = aggregated(loss_of(engine, batch, sp_group), batch["shift_labels"], sp_group)
                engine.backward(loss)
                engine.step()
            return recorder.result()
        finally:
            engine.destroy()


@contextmanager
def accelerates_state_forgotten() -> Iterator[None]:
    """accelerate keeps its state for the whole process, part of it in the environment."""
    from accelerate.state import AcceleratorState, GradientState, PartialState
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    with forgotten():
        try:
            yield
        finally:
            AcceleratorState._reset_state()
            GradientState._reset_state()
            PartialState._reset_state()
            unset_hf_deepspeed_config()
            for name in [name for name in os.environ if name.startswith("ACCELERATE_")]:
                del os.environ[name]


def parallelism(cell: Cell) -> Any:
    from accelerate.utils import DeepSpeedSequenceParallelConfig, ParallelismConfig

    return ParallelismConfig(
        sp_backend="deepspeed",
        sp_size=cell.sp_size,
        dp_shard_size=cell.world_size // cell.sp_size,
        sp_handler=DeepSpeedSequenceParallelConfig(sp_seq_length_is_variable=True, sp_attn_implementation="sdpa"),
    )


@contextmanager
def accelerator_of(cell: Cell) -> Iterator[Any]:
    """accelerate's Accelerator as its guide to sequence parallelism makes it."""
    from accelerate import Accelerator
    from accelerate.utils import DeepSpeedPlugin, InitProcessGroupKwargs

    with accelerates_state_forgotten():
        yield Accelerator(
            deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=config_of(cell)),
            gradient_accumulation_steps=cell.gas * cell.sp_size,
            # Without a GPU accelerate 1.15 takes every rank for the only one, unless it is given a backend.
            kwargs_handlers=[InitProcessGroupKwargs(backend="gloo")],
            parallelism_config=parallelism(cell),
        )


def accelerate_loop(cell: Cell) -> Result:
    """accelerate's guide, docs/source/concept_guides/sequence_parallelism.md, with its gradient accumulation."""
    from deepspeed.utils import groups

    # Before the Accelerator, under whose ZeRO-3 config the model's weights would be drawn sharded, and differently.
    model = model_of(cell)
    with accelerator_of(cell) as accelerator:
        # accelerate shards a loader that all ranks share: give it one whose every W-th sample is this rank's.
        loader = DataLoader(every_ranks_samples(cell), batch_size=1)
        engine, optimizer, loader = accelerator.prepare(model, sgd(model, cell), loader)
        try:
            recorder = Recorder(engine)
            for batch in loader:
                with accelerator.accumulate(engine):
                    outputs = engine(**batch)
                    loss = aggregated(outputs.loss, batch["shift_labels"], groups._get_sequence_parallel_group())
                    accelerator.backward(loss)
                    optimizer.step()
                    optimizer.zero_grad()
            return recorder.result()
        finally:
            engine.destroy()


def hf_trainer(cell: Cell, resume_from: str | None = None, then: Any = None, **changed: Any) -> Any:
    """The HF Trainer with ``TrainingArguments(parallelism_config=...)``; the result of ``then``, given it, if asked."""
    from accelerate import PartialState
    from transformers import TrainingArguments, default_data_collator

    model = model_of(cell)
    with accelerates_state_forgotten():
        os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
        PartialState(backend="gloo")  # see accelerator_of
        arguments = TrainingArguments(
            **{
                "output_dir": "trainer",
                "deepspeed": config_of(cell),
                "parallelism_config": parallelism(cell),
                "per_device_train_batch_size": 1,
                "gradient_accumulation_steps": cell.gas * cell.sp_size,
                "num_train_epochs": 1,
                "max_grad_norm": cell.clip,
                "lr_scheduler_type": "constant",
                "accelerator_config": {"use_configured_state": True},
                "report_to": [],
                "save_strategy": "no",
                "disable_tqdm": True,
                "train_sampling_strategy": "sequential",
                "remove_unused_columns": False,
                **changed,
            }
        )
        data = {"train_dataset": every_ranks_samples(cell), "data_collator": default_data_collator}
        trainer = CellTrainer(cell, model, args=arguments, **data)
        try:
            trainer.train(resume_from_checkpoint=resume_from)
            return then(trainer) if then else trainer.recorder.result()
        finally:
            trainer.model_wrapped.destroy()


def own_forward_loss(model: Any, batch: dict[str, torch.Tensor], group: Any) -> torch.Tensor:
    """The loss that a forward of the program's own has made of the shard."""
    return model(**batch).loss


@contextmanager
def tiled_llama(num_tiles: int) -> Iterator[None]:
    """Llama with DeepSpeed's tiles, as its tutorial and its docstrings patch them in."""
    from deepspeed.runtime.sequence_parallel.ulysses_sp import TiledFusedLogitsLoss, TiledMLP
    from transformers.modeling_outputs import CausalLMOutputWithPast
    from transformers.models.llama import modeling_llama

    def tiled_mlp_forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        def mlp_forward(self: Any, x: torch.Tensor) -> torch.Tensor:
            return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))

        compute_params = [self.down_proj.weight, self.gate_proj.weight, self.up_proj.weight]
        return TiledMLP.apply(mlp_forward, self, x, num_tiles, compute_params)

    def tiled_forward(
        self: Any, input_ids: Any, position_ids: Any, shift_labels: torch.Tensor, **kwargs: Any
    ) -> CausalLMOutputWithPast:
        hidden = self.model(input_ids=input_ids, position_ids=position_ids, use_cache=False).last_hidden_state

        def loss_fn(self: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            logits = self.lm_head(x).float()
            return torch.nn.functional.cross_entropy(logits.view(-1, logits.shape[-1]), y.view(-1), reduction="sum")

        total = TiledFusedLogitsLoss.apply(
            loss_fn, self, hidden, shift_labels, None, num_tiles, [self.lm_head.weight], "sum"
        )
        return CausalLMOutputWithPast(loss=total / (shift_labels != -100).sum().clamp(min=1))

    mlp, model = modeling_llama.LlamaMLP, modeling_llama.LlamaForCausalLM
    before = mlp.forward, model.forward
    mlp.forward, model.forward = tiled_mlp_forward, tiled_forward
    try:
        yield
    finally:
        mlp.forward, model.forward = before


def tiled_tutorial(cell: Cell, num_tiles: int, alst: bool = True) -> Result:
    """The tutorial's loop with MLP and loss in tiles."""
    with tiled_llama(num_tiles):
        return tutorial(cell, own_forward_loss, alst)
