"""Lossless codec for bf16 activations: 11.64 bits a value, exact for every bit pattern.

Exponents of a layer's input are close together, so a block of 64 values stores the smallest of a window of 7 exponents
once, and a 3-bit code per value. Code 7 is an escape: its exponent is stored in an area that all blocks share. Sign and
mantissa stay as they are. The window is the one that covers the most values of the block, of those that end at one of
its 6 largest exponents: outlier channels become escapes instead of widening the window.

The packed size depends on the number of values alone, so it is known without a device sync: the area has room for 1/16
of the values. Packed values with more escapes are unusable; the count in front of them says so. Read it on the host,
where it arrives with the copy, before the values themselves are freed, and copy them as they are if it is too large. An
offload frees them two layers later and can wait for the copy's event there: two layers of work are queued on the device
by then, so it does not run idle. A host slot of raw size would need no wait but would save no host memory.

Format, for S segments of 64 blocks, padded with copies of the last value: 8 bytes count of escapes and 8 unused, then
escapes ``[256 S]``, sign and mantissa ``[4096 S]``, the low 16 and the high 8 bits of 8 codes ``[512 S]``, first
exponents ``[64 S]``, and the place of each segment's first escape ``[S]``, int64. Segments take their places in any
order. Implementations read each other's output: Triton's kernel (pack_bf16.py) and the reference here.

Legend: n values, m bytes, S segments, b blocks, v values of a block, g groups of 8 codes.
"""

from typing import NamedTuple

import torch

from deepspeed_alst.kernels import define_ops

BLOCK, GROUP, SEGMENT = 64, 8, 4096
# Exponents in a window. Comparing more than 6 windows gains nothing, even with 1 % of the channels 1000 times larger.
WINDOW, ROUNDS = 7, 6
# Escapes per segment that the area has room for.
ESCAPES = SEGMENT // 16
HEADER = 16
_SEGMENT_BYTES = ESCAPES + SEGMENT + 3 * SEGMENT // GROUP + SEGMENT // BLOCK + 8


class _Sections(NamedTuple):
    header: torch.Tensor
    escapes_m: torch.Tensor
    mantissas_n: torch.Tensor
    low_g: torch.Tensor
    high_g: torch.Tensor
    first_b: torch.Tensor
    starts: torch.Tensor


def packed_bytes(num_values: int) -> int:
    """Return the packed size of bf16 values in bytes."""
    return HEADER + -(-num_values // SEGMENT) * _SEGMENT_BYTES


def _sections(packed_m: torch.Tensor) -> _Sections:
    S = packed_m.numel() // _SEGMENT_BYTES
    sizes = [
        HEADER,
        ESCAPES * S,
        SEGMENT * S,
        2 * SEGMENT // GROUP * S,
        SEGMENT // GROUP * S,
        SEGMENT // BLOCK * S,
        8 * S,
    ]
    header, escapes_m, mantissas_n, low, high_g, first_b, starts = packed_m.split(sizes)
    return _Sections(
        header.view(torch.int64),
        escapes_m,
        mantissas_n,
        low.view(torch.int16),
        high_g,
        first_b,
        starts.view(torch.int64),
    )


def _first_exponents(exponents_bv: torch.Tensor) -> torch.Tensor:
    """Return the smallest exponent of each block's window, ``[b, 64] -> [b, 1]``."""
    top_b1 = exponents_bv.amax(1, keepdim=True)
    first_b1 = most_b1 = None
    for _ in range(ROUNDS):
        low_b1 = (top_b1 - (WINDOW - 1)).clamp(min=0)
        covered_b1 = ((exponents_bv >= low_b1) & (exponents_bv <= top_b1)).sum(1, keepdim=True)
        if first_b1 is None:
            first_b1, most_b1 = low_b1, covered_b1
        first_b1, most_b1 = torch.where(covered_b1 > most_b1, low_b1, first_b1), covered_b1.maximum(most_b1)
        top_b1 = exponents_bv.masked_fill(exponents_bv >= top_b1, -1).amax(1, keepdim=True)
    return first_b1


def _shifts(device: torch.device) -> torch.Tensor:
    return torch.arange(0, 3 * GROUP, 3, dtype=torch.int32, device=device)


def pack_reference(bits_n: torch.Tensor, packed_m: torch.Tensor) -> None:
    """Compute ``pack_`` in PyTorch, of int16 bits."""
    to = _sections(packed_m)
    to.header.zero_()
    to.escapes_m.zero_()
    if not bits_n.numel():
        return
    padding = bits_n[-1:].expand(-bits_n.numel() % SEGMENT)
    bits_bv = torch.cat([bits_n, padding]).view(-1, BLOCK)
    exponents_bv = bits_bv >> 7 & 0xFF
    first_b1 = _first_exponents(exponents_bv)
    codes_bv = exponents_bv - first_b1
    is_escape_bv = (codes_bv < 0) | (codes_bv >= WINDOW)
    codes_g8 = codes_bv.masked_fill(is_escape_bv, WINDOW).view(-1, GROUP).int()
    words_g = (codes_g8 << _shifts(bits_n.device)).sum(1, dtype=torch.int32)
    to.mantissas_n.copy_((bits_bv >> 8 & 0x80 | bits_bv & 0x7F).flatten())
    to.low_g.copy_(words_g.view(torch.int16)[::2])
    to.high_g.copy_(words_g.view(torch.uint8)[2::4])
    to.first_b.copy_(first_b1.flatten())
    # Without a boolean index, which would wait for the device.
    ends_n, room = is_escape_bv.flatten().cumsum(0), to.escapes_m.numel()
    place_n = (ends_n - 1).masked_fill(~is_escape_bv.flatten() | (ends_n > room), room)
    area_m = to.escapes_m.new_zeros(room + 1).scatter_(0, place_n, exponents_bv.flatten().to(torch.uint8))
    to.escapes_m.copy_(area_m[:room])
    ends_S = ends_n[SEGMENT - 1 :: SEGMENT]
    to.starts[0] = 0
    to.starts[1:].copy_(ends_S[:-1])
    to.header[0] = ends_S[-1]


def unpack_reference(packed_m: torch.Tensor, bits_n: torch.Tensor) -> None:
    """Compute ``unpack_`` in PyTorch, into int16 bits."""
    if not bits_n.numel():
        return
    of = _sections(packed_m)
    words_g = of.low_g.int() & 0xFFFF | of.high_g.int() << 16
    codes_bv = (words_g[:, None] >> _shifts(bits_n.device) & 7).view(-1, BLOCK)
    is_escape_bv = codes_bv == WINDOW
    place_Sn = is_escape_bv.view(-1, SEGMENT).cumsum(1) + (of.starts[:, None] - 1)
    escaped_bv = of.escapes_m[place_Sn.clamp(0, of.escapes_m.numel() - 1)].view(-1, BLOCK).int()
    exponents_bv = torch.where(is_escape_bv, escaped_bv, codes_bv + of.first_b.int()[:, None])
    mantissas_n = of.mantissas_n.int()
    found_n = (mantissas_n & 0x80) << 8 | exponents_bv.flatten() << 7 | mantissas_n & 0x7F
    bits_n.copy_(found_n.view(torch.int16)[::2][: bits_n.numel()])


def _bits(x_n: torch.Tensor, packed_m: torch.Tensor) -> torch.Tensor:
    """Return values as int16 bits. The kernels trust the sizes and layouts that are asserted here."""
    assert (x_n.dtype, packed_m.dtype, packed_m.numel()) == (torch.bfloat16, torch.uint8, packed_bytes(x_n.numel()))
    assert x_n.dim() == packed_m.dim() == 1 and x_n.is_contiguous() and packed_m.is_contiguous()
    assert packed_m.storage_offset() % HEADER == 0 and x_n.device == packed_m.device
    return x_n.detach().view(torch.int16)


def pack_(x_n: torch.Tensor, packed_m: torch.Tensor) -> None:
    """Pack bf16 values in one pass: ``[n] -> [packed_bytes(n)]``, uint8 at a multiple of 16 bytes, both contiguous."""
    bits_n, pick = _bits(x_n, packed_m), define_ops("pack_bf16")
    (pick("pack_bf16_", bits_n) if pick else pack_reference)(bits_n, packed_m)


def unpack_(packed_m: torch.Tensor, x_n: torch.Tensor) -> None:
    """Unpack bf16 values in one pass: ``[packed_bytes(n)] -> [n]``; arbitrary if ``has_overflowed``."""
    bits_n, pick = _bits(x_n, packed_m), define_ops("pack_bf16")
    (pick("unpack_bf16_", bits_n) if pick else unpack_reference)(packed_m, bits_n)


def num_escapes(packed_m: torch.Tensor) -> int:
    """Return the number of escapes of packed values; reads memory, so pass the copy on the host."""
    return int(packed_m[:8].view(torch.int64))


def has_overflowed(header_m: torch.Tensor, num_bytes: int) -> bool:
    """Return True if ``num_bytes`` of packed values, of which the first are given, cannot be unpacked; reads memory."""
    return num_escapes(header_m) > num_bytes // _SEGMENT_BYTES * ESCAPES
