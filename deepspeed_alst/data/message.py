"""Headers that ranks exchange about a batch, and the byte layout of its tensors in a message."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from deepspeed_alst.data.sharding import ShardedBatch

# Tensors start at a multiple of the widest dtype's size, so that their bytes can be viewed in place.
_ALIGNMENT = 16


@dataclass(frozen=True)
class TensorSpec:
    """Key, dtype, shape and byte offset of a tensor in a message."""

    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int


@dataclass(frozen=True)
class Header:
    """Description of a rank's next batch, exchanged before its bytes."""

    error: str | None = None
    ended: bool = False
    kind: type = dict
    """Type of the batch: BatchEncoding and similar types have methods (.to) that programs use."""
    specs: tuple[TensorSpec, ...] = ()
    num_bytes: int = 0
    values: dict[str, Any] = field(default_factory=dict)
    digest: str = ""
    num_seen: int = 0
    """Samples this rank has taken in this epoch, this batch included."""
    num_samples: int | None = None
    """Samples of the whole dataset; None if it has no length."""
    sampler: str = ""
    place: str = ""
    """Position of this rank in its data, which must be equal on all ranks; empty if it is not counted."""


def tokens_of(shard: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return the tensor with a shard's tokens, as ids or embeddings."""
    return shard["input_ids"] if "input_ids" in shard else shard["inputs_embeds"]


def layout(sharded: ShardedBatch) -> tuple[tuple[TensorSpec, ...], int]:
    """Return each tensor's offset in a shard's message and the size in bytes; equal for all shards of a batch."""
    specs, offset = [], 0
    common = {key: x for key, x in sharded.common.items() if isinstance(x, torch.Tensor)}
    for key, x in {**sharded.shards[0], **common}.items():
        specs.append(TensorSpec(key, x.dtype, tuple(x.shape), offset))
        offset += -(-x.numel() * x.element_size() // _ALIGNMENT) * _ALIGNMENT
    return tuple(specs), offset


def message_of(sharded: ShardedBatch, specs: Sequence[TensorSpec], num_bytes: int) -> torch.Tensor:
    """Return the bytes of all shards of a batch, concatenated, ``[P * num_bytes]``."""
    message = torch.zeros(num_bytes * len(sharded.shards), dtype=torch.uint8)
    for shard, piece in zip(sharded.shards, message.view(len(sharded.shards), -1), strict=True):
        for spec in specs:
            view(piece, spec).copy_(shard[spec.key] if spec.key in shard else sharded.common[spec.key])
    return message


def view(piece: torch.Tensor, spec: TensorSpec) -> torch.Tensor:
    """View the bytes of one tensor in a message as that tensor."""
    numel = 1
    for size in spec.shape:
        numel *= size
    return piece[spec.offset : spec.offset + numel * spec.dtype.itemsize].view(spec.dtype).view(spec.shape)


def digest_of(sharded: ShardedBatch) -> str:
    """Return a digest of a batch's tokens."""
    digest = hashlib.blake2b(digest_size=16)
    for shard in sharded.shards:
        digest.update(tokens_of(shard).detach().cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()
