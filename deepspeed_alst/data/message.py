"""What ranks tell one another about a batch, and how its tensors lie in a message of bytes."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from deepspeed_alst.data.shard import ShardedBatch

# Every tensor of a message starts at a multiple of the widest dtype, so that its bytes can be viewed in place.
_ALIGNMENT = 16


@dataclass(frozen=True)
class TensorSpec:
    """A tensor on the way: where it stands in the message, and what it is."""

    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int


@dataclass(frozen=True)
class Header:
    """What a rank says about its next batch before the bytes travel."""

    error: str | None = None
    ended: bool = False
    kind: type = dict
    """What the batch is: BatchEncoding and its like have methods of their own (.to), which programs use."""
    specs: tuple[TensorSpec, ...] = ()
    num_bytes: int = 0
    values: dict[str, Any] = field(default_factory=dict)
    digest: str = ""
    num_seen: int = 0
    """Samples this rank has taken in this epoch, this batch included."""
    num_samples: int | None = None
    """Of the whole dataset; None where it has no length."""
    sampler: str = ""
    place: str = ""
    """Where this rank is in its data, of what must be the same on all; empty where nobody counts."""


def tokens_of(shard: dict[str, torch.Tensor]) -> torch.Tensor:
    """The tensor of a shard that has its tokens, whole or embedded."""
    return shard["input_ids"] if "input_ids" in shard else shard["inputs_embeds"]


def layout(sharded: ShardedBatch) -> tuple[tuple[TensorSpec, ...], int]:
    """Where each tensor of a shard stands in the message; the same for all shards of a batch."""
    specs, offset = [], 0
    common = {key: x for key, x in sharded.common.items() if isinstance(x, torch.Tensor)}
    for key, x in {**sharded.shards[0], **common}.items():
        specs.append(TensorSpec(key, x.dtype, tuple(x.shape), offset))
        offset += -(-x.numel() * x.element_size() // _ALIGNMENT) * _ALIGNMENT
    return tuple(specs), offset


def message_of(sharded: ShardedBatch, specs: Sequence[TensorSpec], num_bytes: int) -> torch.Tensor:
    """The bytes of all shards of a batch, one after the other, ``[P * num_bytes]``."""
    message = torch.zeros(num_bytes * len(sharded.shards), dtype=torch.uint8)
    for shard, piece in zip(sharded.shards, message.view(len(sharded.shards), -1), strict=True):
        for spec in specs:
            view(piece, spec).copy_(shard[spec.key] if spec.key in shard else sharded.common[spec.key])
    return message


def view(piece: torch.Tensor, spec: TensorSpec) -> torch.Tensor:
    """The bytes of one tensor in a message, as that tensor."""
    numel = 1
    for size in spec.shape:
        numel *= size
    return piece[spec.offset : spec.offset + numel * spec.dtype.itemsize].view(spec.dtype).view(spec.shape)


def digest_of(sharded: ShardedBatch) -> str:
    """A fingerprint of a batch's tokens."""
    digest = hashlib.blake2b(digest_size=16)
    for shard in sharded.shards:
        digest.update(tokens_of(shard).detach().cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()
