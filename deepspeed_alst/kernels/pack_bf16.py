"""Kernels of the bf16 codec, one launch each way; ``bf16_codec.py`` has the format.

Bytes moved per value: 2 are read and 1.39 written, plus one per escape; unpacking is the same with reads and writes
exchanged. This is the minimum. Before packing, the area of escapes is zeroed, another 1/16.
"""

import torch
import triton
import triton.language as tl

from deepspeed_alst.kernels import bf16_codec as codec
from deepspeed_alst.kernels.registry import OPS, Op

# 16 bytes of values per thread, twice.
_WARPS = 8
_BLOCK, _GROUP, _SEGMENT = tl.constexpr(codec.BLOCK), tl.constexpr(codec.GROUP), tl.constexpr(codec.SEGMENT)
_WINDOW, _ROUNDS = tl.constexpr(codec.WINDOW), tl.constexpr(codec.ROUNDS)
_ESCAPES, _HEADER = tl.constexpr(codec.ESCAPES), tl.constexpr(codec.HEADER)


@triton.jit
def _sections(packed_ptr, segment):
    """Return pointers to a segment's sign and mantissa, low and high bits of codes, first exponents and start."""
    S = tl.num_programs(0).to(tl.int64)
    mantissas = packed_ptr + _HEADER + _ESCAPES * S
    low = mantissas + _SEGMENT * S
    high = low + 2 * _SEGMENT // _GROUP * S
    first = high + _SEGMENT // _GROUP * S
    starts = first + _SEGMENT // _BLOCK * S
    return (
        mantissas + segment * _SEGMENT,
        low.to(tl.pointer_type(tl.uint16)) + segment * (_SEGMENT // _GROUP),
        high + segment * (_SEGMENT // _GROUP),
        first + segment * (_SEGMENT // _BLOCK),
        starts.to(tl.pointer_type(tl.int64)) + segment,
    )


@triton.jit
def _first_exponents(exponents_bv):
    top_b = tl.max(exponents_bv, 1)
    first_b = tl.maximum(top_b - (_WINDOW - 1), 0)
    most_b = tl.sum((exponents_bv >= first_b[:, None]).to(tl.int32), 1)
    for _ in tl.static_range(_ROUNDS - 1):
        top_b = tl.max(tl.where(exponents_bv < top_b[:, None], exponents_bv, -1), 1)
        low_b = tl.maximum(top_b - (_WINDOW - 1), 0)
        is_covered_bv = (exponents_bv >= low_b[:, None]) & (exponents_bv <= top_b[:, None])
        covered_b = tl.sum(is_covered_bv.to(tl.int32), 1)
        first_b = tl.where(covered_b > most_b, low_b, first_b)
        most_b = tl.maximum(covered_b, most_b)
    return first_b


@triton.jit
def _pack_bf16_kernel(bits_ptr, packed_ptr, n):
    segment = tl.program_id(0).to(tl.int64)  # n exceeds 2**31
    mantissas, low, high, first, start = _sections(packed_ptr, segment)
    values, groups = tl.arange(0, _SEGMENT), tl.arange(0, _SEGMENT // _GROUP)
    places = segment * _SEGMENT + values
    bits = tl.load(bits_ptr + places, mask=places < n, other=tl.load(bits_ptr + n - 1)).to(tl.int32)
    tl.store(mantissas + values, ((bits >> 8) & 0x80 | bits & 0x7F).to(tl.uint8))
    exponents = (bits >> 7) & 0xFF
    exponents_bv = tl.reshape(exponents, [_SEGMENT // _BLOCK, _BLOCK])
    first_b = _first_exponents(exponents_bv)
    tl.store(first + tl.arange(0, _SEGMENT // _BLOCK), first_b.to(tl.uint8))
    codes_bv = exponents_bv - first_b[:, None]
    is_escape_bv = (codes_bv < 0) | (codes_bv >= _WINDOW)
    codes_g8 = tl.reshape(tl.where(is_escape_bv, _WINDOW, codes_bv), [_SEGMENT // _GROUP, _GROUP])
    words_g = tl.sum(codes_g8 << (3 * tl.arange(0, _GROUP))[None, :], 1)
    tl.store(low + groups, words_g.to(tl.uint16))
    tl.store(high + groups, (words_g >> 16).to(tl.uint8))
    is_escape = tl.reshape(is_escape_bv.to(tl.int32), [_SEGMENT])
    begin = tl.atomic_add(packed_ptr.to(tl.pointer_type(tl.int64)), tl.sum(is_escape).to(tl.int64), sem="relaxed")
    tl.store(start, begin)
    places = begin + tl.cumsum(is_escape, 0) - 1
    fits = (is_escape > 0) & (places < _ESCAPES * tl.num_programs(0).to(tl.int64))
    tl.store(packed_ptr + _HEADER + places, exponents.to(tl.uint8), mask=fits)


@triton.jit
def _unpack_bf16_kernel(packed_ptr, bits_ptr, n):
    segment = tl.program_id(0).to(tl.int64)  # n exceeds 2**31
    mantissas, low, high, first, start = _sections(packed_ptr, segment)
    values, groups = tl.arange(0, _SEGMENT), tl.arange(0, _SEGMENT // _GROUP)
    words_g = tl.load(low + groups).to(tl.int32) | (tl.load(high + groups).to(tl.int32) << 16)
    codes_g8 = (words_g[:, None] >> (3 * tl.arange(0, _GROUP))[None, :]) & 7
    codes_bv = tl.reshape(codes_g8, [_SEGMENT // _BLOCK, _BLOCK])
    first_b = tl.load(first + tl.arange(0, _SEGMENT // _BLOCK)).to(tl.int32)
    in_window = tl.reshape(codes_bv + first_b[:, None], [_SEGMENT])
    is_escape = (tl.reshape(codes_bv, [_SEGMENT]) == _WINDOW).to(tl.int32)
    places = tl.load(start) + tl.cumsum(is_escape, 0) - 1
    fits = (is_escape > 0) & (places < _ESCAPES * tl.num_programs(0).to(tl.int64))
    escaped = tl.load(packed_ptr + _HEADER + places, mask=fits, other=0).to(tl.int32)
    exponents = tl.where(is_escape > 0, escaped, in_window)
    kept = tl.load(mantissas + values).to(tl.int32)
    bits = (kept & 0x80) << 8 | exponents << 7 | kept & 0x7F
    places = segment * _SEGMENT + values
    tl.store(bits_ptr + places, bits.to(tl.int16), mask=places < n)


def _launch_pack(bits: torch.Tensor, packed: torch.Tensor) -> None:
    n = bits.numel()
    S = triton.cdiv(n, codec.SEGMENT)
    packed[: codec.HEADER + codec.ESCAPES * S].zero_()
    if n:
        _pack_bf16_kernel[(S,)](bits, packed, n, num_warps=_WARPS)


def _launch_unpack(packed: torch.Tensor, bits: torch.Tensor) -> None:
    if n := bits.numel():
        _unpack_bf16_kernel[(triton.cdiv(n, codec.SEGMENT),)](packed, bits, n, num_warps=_WARPS)


_pack_op = torch.library.custom_op("deepspeed_alst::pack_bf16_", _launch_pack, mutates_args=("packed",))
_unpack_op = torch.library.custom_op("deepspeed_alst::unpack_bf16_", _launch_unpack, mutates_args=("bits",))


def _example(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Create bits of normally distributed values with some outliers, of one segment: the order of others may differ."""
    x_n = torch.randn(codec.SEGMENT - 71, device=device)
    x_n[::97] *= 1000
    bits_n = x_n.bfloat16().view(torch.int16)
    return bits_n, torch.zeros(codec.packed_bytes(bits_n.numel()), dtype=torch.uint8, device=device)


def _packed_example(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Create the example, packed, and zeros to unpack into."""
    bits_n, packed_m = _example(device)
    codec.pack_reference(bits_n, packed_m)
    return packed_m, torch.zeros_like(bits_n)


OPS["pack_bf16_"] = Op(codec.pack_reference, _pack_op, _launch_pack, _example)
OPS["unpack_bf16_"] = Op(codec.unpack_reference, _unpack_op, _launch_unpack, _packed_example)
