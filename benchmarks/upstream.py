"""DeepSpeed's own ALST in the same process as ours: its attention, its loader, and its documented loss.

The recipe is https://www.deepspeed.ai/tutorials/ulysses-alst-sequence-parallelism/, unchanged: a shard without labels
makes the loss NaN, and gradients are too large by the SP degree on ZeRO 0, 1 and 2.

Legend: B batch, S whole sequence, s = S/P one shard, V vocabulary, P = sp_size.
"""

import copy
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.nn.functional as differentiable
import torch.nn.functional as F
from deepspeed.runtime.sequence_parallel import parallel_state_sp
from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF, UlyssesSPDataLoaderAdapter
from deepspeed.runtime.utils import move_to_device
from deepspeed.sequence import layer as sequence_layer
from deepspeed.utils import groups
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

IGNORED_LABEL = -100


@contextmanager
def forgotten() -> Iterator[None]:
    """Undo DeepSpeed's registration afterwards, which is for the whole process and refused a second time."""
    before, mpu = dict(ALL_ATTENTION_FUNCTIONS._local_mapping), groups.mpu
    try:
        yield
    finally:
        groups.mpu = mpu
        parallel_state_sp._release_sequence_parallel_groups()
        ALL_ATTENTION_FUNCTIONS._local_mapping.clear()
        ALL_ATTENTION_FUNCTIONS._local_mapping.update(before)


@contextmanager
def registered(model_config: Any, sp_size: int, micro_batch_size: int = 1) -> Iterator[Any]:
    """Install its attention for models of a config; yield the mpu for ``deepspeed.initialize``. Collective.

    Args:
        model_config: a transformers config; only its head counts and head size are read.
        sp_size: ranks that share a sequence, more than 1.
        micro_batch_size: B of every batch; DeepSpeed's wrapper asserts it.
    """
    config = copy.deepcopy(model_config)
    # A bare config has no attention or "eager", which DeepSpeed compares with the requested one.
    config._attn_implementation = "sdpa"
    with forgotten():
        yield UlyssesSPAttentionHF.register_with_transformers(
            model_name_or_path=SimpleNamespace(config=config),
            core_attn_implementation="sdpa",
            sequence_parallel_size=sp_size,
            micro_batch_size=micro_batch_size,
            seq_length_is_variable=True,
        )
        own = (parallel_state_sp.get_sequence_parallel_group(), parallel_state_sp.get_sequence_data_parallel_group())
    sequence_layer._all_to_all_groups.pop(own[0].group_name, None)
    for group in own:
        dist.destroy_process_group(group)


def loader(batches: Iterable[Mapping[str, torch.Tensor]], engine: Any) -> Any:
    """Wrap batches ``[B, S]`` in DeepSpeed's adapter; yields ``[B, s]`` with ``shift_labels``.

    The adapter requires position_ids, and gathers unequal lengths unchanged, which gloo rejects. Other keys are
    dropped, the attention mask too: DeepSpeed's wrapper discards it, and padding is on the right.
    """
    group, padded = groups._get_sequence_parallel_group(), []
    for batch in batches:
        B, S = batch["input_ids"].shape
        longest = torch.tensor(S, device=engine.device)
        dist.all_reduce(longest, dist.ReduceOp.MAX, group=group)
        P = dist.get_world_size(group)
        missing = -(-longest.item() // P) * P - S
        padded.append(
            {
                "input_ids": F.pad(batch["input_ids"], (0, missing), value=0),
                "labels": F.pad(batch["labels"], (0, missing), value=IGNORED_LABEL),
                # Contiguous, as gloo rejects an expanded view.
                "position_ids": torch.arange(S + missing).expand(B, -1).contiguous(),
            }
        )
    return adapter_for(padded, engine)


def adapter_for(dataloader: Any, engine: Any) -> UlyssesSPDataLoaderAdapter:
    """Wrap a loader of complete batches in DeepSpeed's adapter."""
    return UlyssesSPDataLoaderAdapter(
        dataloader,
        sp_rank=groups._get_sequence_parallel_rank(),
        sp_group=groups._get_sequence_parallel_group(),
        sp_world_size=groups._get_sequence_parallel_world_size(),
        device=engine.device,
    )


def documented_loss(engine: Any, batch: Mapping[str, Any]) -> torch.Tensor:
    """Return the loss of the documented loops, equal on all ranks; NaN if a shard has no label."""
    # The shards are views until copied to a GPU, and transformers' loss rejects a view at B > 1.
    batch = {key: x.contiguous() for key, x in move_to_device(dict(batch), engine.device).items()}
    group = groups._get_sequence_parallel_group()
    return aggregated(shard_loss(engine, batch, group), batch["shift_labels"], group)


def shard_loss(model: Any, batch: Mapping[str, torch.Tensor], group: Any) -> torch.Tensor:
    """Return the tutorial's loss of a shard, before the aggregation."""
    logits_BsV = model(**batch).logits
    return model.module.loss_function(
        logits=logits_BsV,
        labels=None,
        shift_labels=batch["shift_labels"],
        vocab_size=model.module.config.vocab_size,
    )


def aggregated(loss: torch.Tensor, shift_labels: torch.Tensor, group: Any) -> torch.Tensor:
    """Return the mean of the shards' losses, weighted by their labelled tokens."""
    losses = _AllGather.apply(group, loss)
    weights = _AllGather.apply(group, (shift_labels != IGNORED_LABEL).sum())
    total = sum(each * weight for each, weight in zip(losses, weights, strict=True))
    return total / max(sum(weights), 1)


class _AllGather(differentiable._AllGather):
    """``torch.distributed.nn.functional.all_gather`` with its NCCL backward on every backend.

    On gloo, torch's own confuses group ranks with global ones and raises in every group but the first (2.13).
    """

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[None, torch.Tensor]:
        summed_P = torch.stack(grads)
        dist.all_reduce(summed_P, group=ctx.group)
        return None, summed_P[dist.get_rank(ctx.group)]
