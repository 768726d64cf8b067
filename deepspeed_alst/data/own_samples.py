"""Check that the ranks of a sequence get different samples."""

import warnings
from typing import Any

import torch.distributed as dist

from deepspeed_alst.data.message import Header
from deepspeed_alst.errors import DataError

BATCHES_COMPARED = 4


def check_own_samples(digests: list[list[str]], everyone: list[Header], sp_size: int) -> None:
    """Raise DataError if all ranks of a sequence get the same samples: each would be trained P times.

    Every rank checks the ranks of every sequence, so that all raise or none. ``digests`` has one list per batch so far,
    with one entry per rank; after an epoch of fewer than four batches it only warns.
    """
    for first in range(0, len(everyone), sp_size) if sp_size > 1 else ():
        batches = [per_rank[first : first + sp_size] for per_rank in digests]
        if any(len(set(batch)) > 1 for batch in batches):
            continue
        header = everyone[first]
        # An iterable without a length counts as having more.
        larger = header.num_samples is None or header.num_samples > header.num_seen
        if len(batches) < BATCHES_COMPARED or not larger or len({batch[0] for batch in batches}) == 1:
            if dist.get_rank() == first:
                warnings.warn(
                    "all ranks of a sequence are given the same samples; is the dataset that small?", stacklevel=3
                )
            continue
        raise DataError(
            f"the first {BATCHES_COMPARED} batches are the same on all {sp_size} ranks of a sequence: the loader's "
            f"{header.sampler} gives every rank the same samples, so each would be trained {sp_size} times. Use "
            "torch.utils.data.DistributedSampler(dataset, num_replicas=dist.get_world_size(), rank=dist.get_rank())."
        )


def num_samples(loader: Any) -> int | None:
    """Return the number of samples in a loader's dataset, or None if it has no length."""
    try:
        return len(loader.dataset)
    except (TypeError, AttributeError):
        return None
