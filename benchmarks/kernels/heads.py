"""Test cases of packing and unpacking of heads, run by judge.py.

Legend: P ranks, H query heads, K KV heads, D and V head dims of q and k and of v, s tokens of a shard, B batch; m ranks
share a KV head.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.kernels.interpreter import faithful
from benchmarks.kernels.judge import Verdict, bytes_of, errors_of


@dataclass(frozen=True)
class Case:
    """One attention layer on one rank."""

    P: int
    H: int
    K: int
    D: int
    V: int
    s: int
    B: int = 1
    dtype: torch.dtype = torch.bfloat16
    heads_first: bool = False
    """True if tensors are stored as ``[B, H, s, D]`` instead of ``[B, s, H, D]``."""

    @property
    def m(self) -> int:
        """Number of ranks that share a KV head."""
        return max(1, self.P // self.K)

    def tensor(self, heads: int, tokens: int, D: int, device: str) -> torch.Tensor:
        """Create a random ``[B, heads, tokens, D]`` tensor."""
        if self.heads_first:
            return torch.randn(self.B, heads, tokens, D, device=device).to(self.dtype)
        return torch.randn(self.B, tokens, heads, D, device=device).to(self.dtype).transpose(1, 2)

    def shards(self, device: str = "cpu") -> list[torch.Tensor]:
        """Create pieces of q, k and v, or of their gradients, in the model's layout."""
        from deepspeed_alst.kernels.head_layout import by_heads

        sizes = ((self.H, self.D, 1), (self.K, self.D, self.m), (self.K, self.V, self.m))
        return [by_heads(self.tensor(heads, self.s, D, device), self.P // m) for heads, D, m in sizes]

    def sequences(self, device: str = "cpu") -> list[torch.Tensor]:
        """Create pieces of q, k and v in attention's layout."""
        from deepspeed_alst.kernels.head_layout import by_tokens

        h, k, S = self.H // self.P, max(1, self.K // self.P), self.s * self.P
        return [
            by_tokens(self.tensor(heads, S, D, device), self.P) for heads, D in ((h, self.D), (k, self.D), (k, self.V))
        ]


# Llama-3.1-8B; two ranks per KV head; head dim 80, two samples; unaligned sizes; DeepSeek-V3.
COMPILED = (
    ("heads, bf16, Llama-3.1-8B, P 8", (Case(8, 32, 8, 128, 128, 4096),)),
    ("heads, bf16, Qwen3-8B, P 16", (Case(16, 32, 8, 128, 128, 4096),)),
    ("heads, fp32, D 80, P 8", (Case(8, 32, 4, 80, 80, 4096, B=2, dtype=torch.float32),)),
    ("heads, fp16, D 75, P 6", (Case(6, 18, 3, 75, 75, 1001, B=3, dtype=torch.float16),)),
    ("heads, bf16, MLA, P 8", (Case(8, 128, 128, 192, 128, 4096),)),
)

CASES = (
    Case(8, 32, 8, 128, 128, 5),
    Case(8, 16, 2, 80, 80, 9, B=2, dtype=torch.float32),
    Case(4, 8, 2, 96, 96, 17, dtype=torch.float16, heads_first=True),
    Case(3, 9, 3, 75, 33, 7, B=3),
    Case(2, 6, 6, 192, 128, 33),
)


def launch(case: Case) -> None:
    """Launch the kernels of a layer's forward and backward on meta tensors."""
    from deepspeed_alst.kernels import pack_heads as heads
    from deepspeed_alst.kernels.registry import OPS

    packs, unpacks = OPS["pack_heads"], OPS["unpack_heads_"]
    assert (packs.reference, unpacks.reference) == (heads.pack_reference, heads.unpack_reference)
    buffer_PsBW = packs.launch(case.shards("meta"), case.P)
    unpacks.launch(buffer_PsBW, case.shards("meta"))


def judge(case: Case, within: Callable[[], AbstractContextManager[Any]] = faithful, device: str = "cpu") -> Verdict:
    """Run a layer's launches in the interpreter, or in another context ``within``, and compare with the reference."""
    with within() as traffic:
        errors = compare(case, device)
    least = elements = 0
    for x_gsBhD in (*case.shards(), *case.sequences()):
        copies = case.P // x_gsBhD.shape[0]
        least += 2 * (1 + copies) * x_gsBhD.nbytes
        elements += 2 * copies * x_gsBhD.numel()
    return Verdict(errors, bytes_of(traffic) / elements, least / elements)


def compare(case: Case, device: str = "cpu") -> dict[str, tuple[float, float]]:
    """Compare pack and unpack with their references: copies bit by bit, sums of copies by error."""
    from deepspeed_alst.kernels.head_layout import pack, pack_reference, unpack_, unpack_reference

    torch.manual_seed(0)
    errors = {}
    for name, pieces in (("shards", case.shards(device)), ("sequences", case.sequences(device))):
        assert torch.equal(pack(pieces, case.P), pack_reference(pieces, case.P)), name
        buffer_PsBW = torch.randn_like(pack_reference(pieces, case.P))
        got, same, truth = (
            [torch.full_like(x, torch.nan, dtype=dtype) for x in pieces]
            for dtype in (case.dtype, case.dtype, torch.float64)
        )
        unpack_(buffer_PsBW, got)
        unpack_reference(buffer_PsBW, same)
        unpack_reference(buffer_PsBW.double(), truth)
        assert all(torch.equal(x, y) for x, y, z in zip(got, same, pieces, strict=True) if z.shape[0] == case.P), name
        errors |= errors_of([f"{x} of {name}" for x in "qkv"], got, same, truth)
    return errors
