"""The groups as DeepSpeed expects them.

DeepSpeed is told that the SP degree is 1 and that its ZeRO world is all ranks: told the real degree it divides
gradients by world / SP on some paths and by world on others, in one case both within one step (measured on
deepspeed 0.19.8: stage3.py:1878 and coalesced_collectives.py:124). Told 1, it divides by the world on every path, and
the loss makes up for it (parallel/loss.py).
"""

import contextlib
from collections.abc import Iterator
from typing import Any

from deepspeed.utils import groups as deepspeed_groups

from deepspeed_alst.parallel.groups import SequenceGroups


class UlyssesMpu:
    """An mpu for ``deepspeed.initialize``.

    It must have: ``initialize_sequence_parallel``, by which DeepSpeed tells a Ulysses mpu from Megatron's; model
    parallel groups that are real and of size 1, under both their names; data-parallel sizes for the batch arithmetic.
    It must not have: ``get_data_parallel_group``, over which ZeRO-3 would shard and reduce instead of the world.
    """

    def __init__(self, groups: SequenceGroups) -> None:
        self._groups = groups

    def initialize_sequence_parallel(self, *args: Any, **kwargs: Any) -> None:
        """Nothing to do: the groups exist. DeepSpeed looks for the attribute and never calls it."""

    def get_model_parallel_rank(self) -> int:
        """0: there is no model parallelism."""
        return 0

    def get_model_parallel_world_size(self) -> int:
        """1: there is no model parallelism."""
        return 1

    def get_model_parallel_group(self) -> Any:
        """This rank alone."""
        return self._groups.self_group

    # The universal checkpoint loader asks under this name.
    get_tensor_model_parallel_rank = get_model_parallel_rank
    get_tensor_model_parallel_world_size = get_model_parallel_world_size
    get_tensor_model_parallel_group = get_model_parallel_group

    def get_data_parallel_world_size(self) -> int:
        """Number of replicas; train_batch_size = micro batch x accumulation steps x this."""
        return self._groups.dp_size

    def get_data_parallel_rank(self) -> int:
        """Which replica this rank belongs to."""
        return self._groups.dp_rank

    def get_sequence_parallel_world_size(self) -> int:
        """1, whatever the SP degree is: see the head of this file."""
        return 1

    def get_sequence_parallel_rank(self) -> int:
        """This rank's place in its sequence."""
        return self._groups.sp_rank

    def get_sequence_parallel_group(self) -> Any:
        """The ranks of this rank's sequence."""
        return self._groups.sp_group

    def get_sequence_data_parallel_world_size(self) -> int:
        """All ranks."""
        return self._groups.dp_size * self._groups.sp_size

    def get_sequence_data_parallel_rank(self) -> int:
        """This rank among all."""
        return self._groups.dp_rank * self._groups.sp_size + self._groups.sp_rank

    def get_sequence_data_parallel_group(self) -> Any:
        """All ranks: what ZeRO shards over and reduces over."""
        return self._groups.world_group


@contextlib.contextmanager
def installed(mpu: Any) -> Iterator[None]:
    """DeepSpeed's one global, ``deepspeed.utils.groups.mpu``, set for the length of a call and then put back.

    DeepSpeed sets it when an engine is built and never takes it back, so that a second engine would inherit it.
    """
    before = deepspeed_groups.mpu
    deepspeed_groups.mpu = mpu
    try:
        yield
    finally:
        deepspeed_groups.mpu = before
