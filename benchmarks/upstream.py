"""DeepSpeed's own ALST in the same process as ours: its attention, its loader, and its documented loss.

DeepSpeed enables it for the whole process without a way to disable it (deepspeed 0.19.8: a second size asserts, and
every sdpa model runs through the wrapper). Here its settings apply only inside ``Upstream.active()``, so that other
engines and SP degrees can run in the same process.

The recipe is https://www.deepspeed.ai/tutorials/ulysses-alst-sequence-parallelism/, unchanged: a shard without labels
makes the loss NaN, and gradients are too large by the SP degree on ZeRO 0, 1 and 2.

Legend: B batch, S whole sequence, s = S/P one shard, V vocabulary, P = sp_size.
"""

import contextlib
import copy
from collections.abc import Iterable, Iterator, Mapping
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.distributed.nn.functional as differentiable
import torch.nn.functional as F
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.sequence_parallel import parallel_state_sp
from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF, UlyssesSPDataLoaderAdapter
from deepspeed.runtime.utils import move_to_device
from deepspeed.sequence import layer as sequence_layer
from deepspeed.utils import groups as deepspeed_groups
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

_IGNORED_LABEL = -100
_CORE = "sdpa"
_GROUPS = ("_SEQUENCE_PARALLEL_GROUP", "_SEQUENCE_DATA_PARALLEL_GROUP")


class Upstream:
    """DeepSpeed's Ulysses for models of one config at one SP degree.

    Everything on its engine must run inside ``with upstream.active()``: construction, forward, backward, step, destroy.
    Its loader may be iterated anywhere.
    """

    def __init__(self, model_config: Any, sp_size: int, micro_batch_size: int = 1) -> None:
        """Create the groups and the attention wrapper, without installing them. Collective over all ranks.

        Args:
            model_config: a transformers config; only its head counts and head size are read.
            sp_size: ranks that share a sequence, more than 1.
            micro_batch_size: B of every batch; DeepSpeed's wrapper asserts it.

        Raises:
            ValueError: sp_size is 1, or cannot split the heads.
        """
        if sp_size == 1:
            raise ValueError("Upstream: sp_size must be more than 1, got 1: DeepSpeed does nothing then")
        config = copy.deepcopy(model_config)
        # A bare config has no attention or "eager", which DeepSpeed compares with the requested one.
        config._attn_implementation = _CORE
        self.mpu = parallel_state_sp
        """Module for ``deepspeed.initialize(mpu=...)``, valid inside ``active()``."""
        with (
            mock.patch.multiple(parallel_state_sp, **dict.fromkeys(_GROUPS)),
            mock.patch.dict(ALL_ATTENTION_FUNCTIONS._local_mapping),
        ):
            UlyssesSPAttentionHF.register_with_transformers(
                model_name_or_path=SimpleNamespace(config=config),
                core_attn_implementation=_CORE,
                sequence_parallel_size=sp_size,
                micro_batch_size=micro_batch_size,
                seq_length_is_variable=True,
            )
            self._groups = {name: getattr(parallel_state_sp, name) for name in _GROUPS}
            self._attention = ALL_ATTENTION_FUNCTIONS[_CORE]
        self._sp_size = sp_size
        self._sp_group = self._groups["_SEQUENCE_PARALLEL_GROUP"]

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Install attention, groups and mpu, and restore the previous ones in every case."""
        with (
            mock.patch.multiple(parallel_state_sp, **self._groups),
            mock.patch.dict(ALL_ATTENTION_FUNCTIONS._local_mapping, {_CORE: self._attention}),
            mock.patch.object(deepspeed_groups, "mpu", self.mpu),
        ):
            yield

    def loader(self, dataloader: Iterable[Mapping[str, Any]]) -> Any:
        """Wrap batches ``[B, S]`` in DeepSpeed's adapter; yields ``[B, s]`` with ``shift_labels``.

        Every rank's loader yields its own samples, as ours does; each gives P micro-batches.
        """
        return UlyssesSPDataLoaderAdapter(
            _Prepared(dataloader, self._sp_group),
            sp_rank=dist.get_rank(self._sp_group),
            sp_group=self._sp_group,
            sp_world_size=self._sp_size,
            device=get_accelerator().current_device_name(),
        )

    def loss(self, engine: Any, batch: Mapping[str, Any]) -> torch.Tensor:
        """Compute the documented loss: each shard's mean, weighted by its labelled tokens; equal on all ranks.

        NaN if a shard has no label: its mean is 0/0, which a weight of 0 does not remove; gradients stay finite.
        """
        # The shards are views until copied to a GPU, and transformers' loss rejects a view at B > 1.
        batch = {key: x.contiguous() for key, x in move_to_device(dict(batch), engine.device).items()}
        logits_BsV = engine(**batch).logits
        labels_Bs = batch["shift_labels"]
        loss = engine.module.loss_function(
            logits=logits_BsV, labels=None, shift_labels=labels_Bs, vocab_size=engine.module.config.vocab_size
        )
        losses = _AllGather.apply(self._sp_group, loss)
        weights = _AllGather.apply(self._sp_group, (labels_Bs != _IGNORED_LABEL).sum())
        total = sum(each * weight for each, weight in zip(losses, weights, strict=True))
        return total / max(sum(weights), 1)

    def close(self) -> None:
        """Destroy the process groups; the object is unusable afterwards. Collective over all ranks."""
        sequence_layer._all_to_all_groups.pop(self._sp_group.group_name, None)
        for group in self._groups.values():
            dist.destroy_process_group(group)


class _AllGather(differentiable._AllGather):
    """``torch.distributed.nn.functional.all_gather`` with its NCCL backward on every backend.

    On gloo, torch's own confuses group ranks with global ones and raises in every group but the first (2.13).
    """

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[None, torch.Tensor]:
        summed_P = torch.stack(grads)
        dist.all_reduce(summed_P, group=ctx.group)
        return None, summed_P[dist.get_rank(ctx.group)]


class _Prepared:
    """Batches of ``input_ids`` and ``labels`` with position_ids and a divisible length, as the adapter requires.

    Other keys are dropped, the attention mask too: DeepSpeed's wrapper discards it, and padding is on the right.
    """

    def __init__(self, loader: Any, group: Any) -> None:
        self._loader, self._group = loader, group

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        for batch in self._loader:
            B, S = batch["input_ids"].shape
            # Maximum over the group: the adapter gathers unequal lengths unchanged, which gloo rejects.
            longest = torch.tensor(S, device=get_accelerator().current_device_name())
            dist.all_reduce(longest, dist.ReduceOp.MAX, group=self._group)
            P = dist.get_world_size(self._group)
            missing = -(-longest.item() // P) * P - S
            yield {
                "input_ids": F.pad(batch["input_ids"], (0, missing), value=0),
                "labels": F.pad(batch["labels"], (0, missing), value=_IGNORED_LABEL),
                # Contiguous, as gloo rejects an expanded view.
                "position_ids": torch.arange(S + missing).expand(B, -1).contiguous(),
            }
