"""Test cases of the lossless bf16 codec, run by judge.py.

Legend: n values, m bytes.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.kernels.interpreter import faithful
from benchmarks.kernels.judge import Verdict, bytes_of


@dataclass(frozen=True)
class Case:
    """Normally distributed values, and channels of another scale."""

    n: int
    outliers: float = 0.0
    """Share of the channels that are 1000 times larger."""

    def values(self, device: str = "cpu") -> torch.Tensor:
        """Create the values, ``[n]`` bf16."""
        torch.manual_seed(0)
        scale_c = torch.where(torch.rand(512, device=device) < self.outliers, 1000.0, 1.0)
        x_nc = torch.randn(-(-self.n // 512), 512, device=device)
        return (x_nc * scale_c).bfloat16().flatten()[: self.n]


# A chunk of 1,024 tokens of width 4096, and a number of values without useful divisors.
COMPILED = (("bf16, 4 Mi", (1 << 22,)), ("bf16, 1,000,003", (1_000_003,)))

CASES = (Case(1 << 17), Case((1 << 17) - 1000, outliers=0.01))


def launch(n: int) -> None:
    """Launch the kernels on meta tensors."""
    from deepspeed_alst.kernels.bf16_codec import packed_bytes
    from deepspeed_alst.kernels.pack_bf16 import OPS

    bits_n = torch.empty(n, dtype=torch.int16, device="meta")
    packed_m = torch.empty(packed_bytes(n), dtype=torch.uint8, device="meta")
    OPS["pack_bf16_"].launch(bits_n, packed_m)
    OPS["unpack_bf16_"].launch(packed_m, bits_n)


def judge(case: Case, within: Callable[[], AbstractContextManager[Any]] = faithful, device: str = "cpu") -> Verdict:
    """Run both launches in the interpreter, or ``within``; count values that differ afterwards, of which none may."""
    from deepspeed_alst.kernels import bf16_codec as codec

    x_n = case.values(device)
    packed_m = torch.full((codec.packed_bytes(case.n),), 0xFF, dtype=torch.uint8, device=device)
    expected_m, got_n = packed_m.clone(), torch.full_like(x_n, torch.nan)
    codec.pack_reference(x_n.view(torch.int16), expected_m)
    with within() as traffic:
        codec.pack_(x_n, packed_m)
        codec.unpack_(packed_m, got_n)
    differ = {
        "packed": float((packed_m != expected_m).sum()),
        "unpacked": float((got_n.view(torch.int16) != x_n.view(torch.int16)).sum()),
    }
    # Each value and each byte in use once in each direction; the rest of the area of escapes is not touched.
    segments = -(-case.n // codec.SEGMENT)
    in_use = codec.packed_bytes(case.n) - codec.HEADER - codec.ESCAPES * segments + codec.num_escapes(packed_m)
    least = 2 * (x_n.nbytes + in_use) / case.n
    return Verdict({name: (count, 0.0) for name, count in differ.items()}, bytes_of(traffic) / case.n, least)
