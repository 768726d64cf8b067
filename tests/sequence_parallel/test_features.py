"""Each feature of DeepSpeed that the compatibility table calls right, trained and compared with SP 1."""

import re
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from benchmarks.cells import Cell, build_model, ds_config, full_weight, model_config, samples
from benchmarks.parity import measure

PAGE = Path(__file__).parents[2] / "docs" / "compatibility.md"
_ZERO3 = {"stage": 3, "reduce_bucket_size": 2000, "stage3_param_persistence_threshold": 0}

CELLS = {
    "fp16": Cell(stage=2, dtype="fp16", gas=2, clip=0.5),
    "bf16": Cell(stage=1, dtype="bf16", odd_lengths=True),
    "gradient clipping": Cell(stage=3, gas=2, clip=0.5),
    "optimizer offload to CPU": Cell(stage=2, offload_optimizer=True, gas=2),
    "parameter offload to CPU": Cell(
        stage=3, gas=2, extra=(("zero_optimization", {**_ZERO3, "offload_param": {"device": "cpu"}}),)
    ),
    "reduce_scatter off": Cell(stage=3, reduce_scatter=False, gas=2),
    "contiguous_gradients off": Cell(stage=2, contiguous_gradients=False),
    "overlap_comm": Cell(stage=2, overlap_comm=True, gas=2),
    "fp32 gradient accumulation": Cell(stage=1, dtype="bf16", grad_accum="fp32", gas=2),
}


def test_every_right_row_has_a_cell():
    assert set(CELLS) | {"Muon"} == set(re.findall(r"^\| ([^|]+) \| [^|]+ \| right \|$", PAGE.read_text(), re.M))


# The others are of system/test_parity.py's cells too.
QUICK = ("fp16", "parameter offload to CPU", "overlap_comm")


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name not in QUICK)) for name in CELLS])
def test_a_right_row_is_right(name, ranks2):
    cell = CELLS[name]
    if cell.dtype == "fp16":
        ranks2.run(allow_fp16_on_cpu)
    row = measure(cell, ranks2, with_upstream=False)
    if cell.dtype == "fp16":
        ranks2.run(forbid_fp16_on_cpu)
    assert not isinstance(row.sp1, str), row.sp1
    assert not row.problems()


def allow_fp16_on_cpu():
    """DeepSpeed refuses fp16 on CPU for its speed; the arithmetic is there."""
    from deepspeed.accelerator import get_accelerator

    get_accelerator().is_fp16_supported = lambda: True


def forbid_fp16_on_cpu():
    """As it was; Muon asks, and rounds to fp16 where it may."""
    from deepspeed.accelerator import get_accelerator

    del get_accelerator().is_fp16_supported


@torch.compiler.set_stance("force_eager")  # its iterations compiled take a minute
def changes_by_muon(cell: Cell, sp_size: int) -> dict[str, torch.Tensor]:
    """How three steps of DeepSpeed's Muon change each weight."""
    import deepspeed

    import deepspeed_alst

    model = build_model(model_config(cell))
    config = {**ds_config(cell, sp_size), "optimizer": {"type": "Muon", "params": {"lr": 0.02}}}
    # Its Adam is DeepSpeed's without the op, which takes minutes to compile.
    with mock.patch("deepspeed.ops.adam.fused_adam.FusedAdamBuilder", side_effect=RuntimeError):
        engine = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)[0]
    named = dict(engine.module.named_parameters())
    before = {name: full_weight(param) for name, param in named.items()}
    for ranks in samples(cell, model.config.vocab_size):
        own = ranks[dist.get_rank()]
        for batch in deepspeed_alst.shard_dataloader(own, engine) if sp_size > 1 else own:
            engine.backward(engine(**batch).loss)
            engine.step()
    changes = {name: full_weight(param) - before[name] for name, param in named.items()}
    engine.destroy()
    return changes


# On 1 and 2 a matrix that two ranks own in part must be whole on both; on 3 DeepSpeed asks for no reduce_scatter.
@pytest.mark.parametrize(
    "cell", [Cell(stage=0), Cell(stage=2, gas=2), Cell(stage=3, reduce_scatter=False)], ids=Cell.name
)
def test_muon_steps_as_at_sp1(cell, ranks2):
    whole, split = (ranks2.run(changes_by_muon, cell, sp_size)[0] for sp_size in (1, 2))
    # Its iterations make small singular values larger, and rounding with them.
    assert all((split[name] - change).norm() < 1e-3 * change.norm() for name, change in whole.items())


def logits_of_training():
    """A ZeRO-3 engine's output in training: its keys, and its logits."""
    import deepspeed

    import deepspeed_alst

    config = {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 2, "sequence_parallel_size": 2}
    config |= {"zero_optimization": {"stage": 3}, "alst": {"pad_to_multiple_of": 2}}
    config |= {"optimizer": {"type": "AdamW", "params": {"torch_adam": True}}}
    model = build_model(model_config(Cell())).train()
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)
    ids = torch.arange(12)[None] + dist.get_rank()
    (batch, *_) = deepspeed_alst.shard_dataloader([{"input_ids": ids, "labels": ids}], engine)
    output = engine(**batch)
    found = list(output), output.logits
    engine.destroy()
    return found


def test_logits_of_a_shard_are_none_in_training_on_zero_3_too(ranks2):
    # DeepSpeed's hooks write each entry of the output to its attribute, detached: a loss of them would train nothing.
    for keys, logits in ranks2.run(logits_of_training):
        assert logits is None and "logits" not in keys and "loss" in keys
