"""Model-parallel unit (mpu): the process groups in the form that DeepSpeed expects.

DeepSpeed is told that the SP degree is 1 and that its ZeRO world is all ranks. With the real degree it divides
gradients by world / SP on some paths and by world on others, in one case both within one step (measured on deepspeed
0.19.8: stage3.py:1878 and coalesced_collectives.py:124). With 1 it divides by the world on every path, and the loss
compensates (distributed/sequence_loss.py).
"""

import contextlib
from collections.abc import Iterator
from typing import Any

from deepspeed.utils import groups as deepspeed_groups

from deepspeed_alst.distributed.mesh import SequenceGroups


class UlyssesMpu:
    """Mpu for ``deepspeed.initialize``.

    It must have: ``initialize_sequence_parallel``, by which DeepSpeed tells a Ulysses mpu from Megatron's; real
    model-parallel groups of size 1, under both names; data-parallel sizes for the batch arithmetic. It must not have
    ``get_data_parallel_group``, over which ZeRO-3 would shard and reduce instead of the world.
    """

    def __init__(self, groups: SequenceGroups) -> None:
        self._groups = groups

    def initialize_sequence_parallel(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing: the groups exist. DeepSpeed looks for the attribute and never calls it."""

    def get_model_parallel_rank(self) -> int:
        """Return 0: there is no model parallelism."""
        return 0

    def get_model_parallel_world_size(self) -> int:
        """Return 1: there is no model parallelism."""
        return 1

    def get_model_parallel_group(self) -> Any:
        """Return the group of this rank alone."""
        return self._groups.self_group

    # The universal checkpoint loader uses these names.
    get_tensor_model_parallel_rank = get_model_parallel_rank
    get_tensor_model_parallel_world_size = get_model_parallel_world_size
    get_tensor_model_parallel_group = get_model_parallel_group

    def get_data_parallel_world_size(self) -> int:
        """Return the number of replicas; train_batch_size = micro batch x accumulation steps x this."""
        return self._groups.dp_size

    def get_data_parallel_rank(self) -> int:
        """Return the index of this rank's replica."""
        return self._groups.dp_rank

    def get_sequence_parallel_world_size(self) -> int:
        """Return 1, for any SP degree: see the module docstring."""
        return 1

    def get_sequence_parallel_rank(self) -> int:
        """Return this rank's index in its sequence."""
        return self._groups.sp_rank

    def get_sequence_parallel_group(self) -> Any:
        """Return the group of this rank's sequence."""
        return self._groups.sp_group

    def get_sequence_data_parallel_world_size(self) -> int:
        """Return the number of all ranks."""
        return self._groups.dp_size * self._groups.sp_size

    def get_sequence_data_parallel_rank(self) -> int:
        """Return this rank's index among all ranks."""
        return self._groups.dp_rank * self._groups.sp_size + self._groups.sp_rank

    def get_sequence_data_parallel_group(self) -> Any:
        """Return the group of all ranks, over which ZeRO shards and reduces."""
        return self._groups.world_group


@contextlib.contextmanager
def installed(mpu: Any) -> Iterator[None]:
    """Set DeepSpeed's global ``deepspeed.utils.groups.mpu`` inside the context and restore it afterwards.

    DeepSpeed sets it when an engine is built and never resets it, so that a second engine would inherit it.
    """
    before = deepspeed_groups.mpu
    deepspeed_groups.mpu = mpu
    try:
        yield
    finally:
        deepspeed_groups.mpu = before
