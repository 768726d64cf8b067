"""Triton kernels that pack and unpack around an all-to-all, one launch each; the format is in ``head_layout.py``.

Bytes moved per element of the buffer, the minimum: 2 * itemsize to pack (4 in bf16, 8 in fp32), each piece read once
and the buffer written once, or ``(1 + 1/m) * itemsize`` if a piece goes to m ranks; the same to unpack.

Legend: P ranks, s tokens of a shard, B batch, h heads of a rank, D head dim, g pieces, m = P/g, W = all h*D.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from deepspeed_alst.kernels.head_layout import buffer_shape, by_heads, pack_reference, unpack_reference
from deepspeed_alst.kernels.registry import OPS, Op

# Elements and warps per program: in bf16, 2 loads of 16 bytes per thread. The block width is the one that pads a
# part's h * D the least; the narrowest, 128 bytes in bf16, still fills a cache line.
_BLOCK, _WARPS = 4096, 8
_COLUMNS = (1024, 512, 256, 128, 64)


@triton.jit
def _num_blocks(s, B, SIZES: tl.constexpr, BLOCK: tl.constexpr):
    return SIZES[0] * B * tl.cdiv(s, BLOCK // SIZES[4]) * ((SIZES[2] * SIZES[3] + SIZES[4] - 1) // SIZES[4])


@triton.jit
def _move(block, buffer_ptr, x_ptr, strides, s, B, W, SIZES: tl.constexpr, BLOCK: tl.constexpr, PACK: tl.constexpr):
    COPIES: tl.constexpr = SIZES[1]
    h: tl.constexpr = SIZES[2]
    D: tl.constexpr = SIZES[3]
    COLUMNS: tl.constexpr = SIZES[4]
    ROWS: tl.constexpr = BLOCK // COLUMNS
    num_columns: tl.constexpr = (h * D + COLUMNS - 1) // COLUMNS
    num_rows = tl.cdiv(s, ROWS)
    piece = block // num_columns // num_rows
    g, b = (piece // B).to(tl.int64), (piece % B).to(tl.int64)  # P*s*B*W exceeds 2**31
    tokens = (block // num_columns % num_rows).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = block % num_columns * COLUMNS + tl.arange(0, COLUMNS)
    inside = (tokens < s)[:, None] & (columns < h * D)[None, :]
    column_offsets = (columns // D).to(tl.int64) * strides[3] + columns % D
    x = x_ptr + g * strides[0] + b * strides[2] + (tokens * strides[1])[:, None] + column_offsets[None, :]
    buffer = buffer_ptr + (g * COPIES * s * B + b) * W + SIZES[5] + (tokens * B * W)[:, None] + columns[None, :]
    to_next_rank = s.to(tl.int64) * B * W
    if PACK:
        value = tl.load(x, mask=inside)
        for copy in range(COPIES):
            tl.store(buffer + copy * to_next_rank, value, mask=inside)
    elif COPIES == 1:
        tl.store(x, tl.load(buffer, mask=inside), mask=inside)
    else:
        total = tl.load(buffer, mask=inside, other=0.0).to(tl.float32)
        for copy in range(1, COPIES):
            total += tl.load(buffer + copy * to_next_rank, mask=inside, other=0.0).to(tl.float32)
        tl.store(x, total.to(x_ptr.dtype.element_ty), mask=inside)


# The sequence length changes from batch to batch; specializing on its divisors would only recompile.
@triton.jit(do_not_specialize=["s"])
def _heads_kernel(buffer_ptr, x_ptrs, strides, s, B, W, SIZES: tl.constexpr, BLOCK: tl.constexpr, PACK: tl.constexpr):
    block = tl.program_id(0)
    for part in tl.static_range(len(SIZES)):
        num_blocks = _num_blocks(s, B, SIZES[part], BLOCK)
        if (block >= 0) & (block < num_blocks):
            _move(block, buffer_ptr, x_ptrs[part], strides[part], s, B, W, SIZES[part], BLOCK, PACK)
        block -= num_blocks


def _launch(buffer_PsBW: torch.Tensor, pieces: Sequence[torch.Tensor], is_pack: bool) -> None:
    P, s, B, W = buffer_PsBW.shape
    sizes, blocks, first = [], 0, 0
    for x_gsBhD in pieces:
        g, _, _, h, D = x_gsBhD.shape
        columns = min(_COLUMNS, key=lambda each: (triton.cdiv(h * D, each) * each, -each))
        sizes.append((g, P // g, h, D, columns, first))
        blocks += g * B * triton.cdiv(s, _BLOCK // columns) * triton.cdiv(h * D, columns)
        first += h * D
    if blocks:
        strides = tuple(x.stride()[:4] for x in pieces)
        _heads_kernel[(blocks,)](
            buffer_PsBW, tuple(pieces), strides, s, B, W, tuple(sizes), _BLOCK, is_pack, num_warps=_WARPS
        )


def _launch_pack(pieces: Sequence[torch.Tensor], num_ranks: int) -> torch.Tensor:
    buffer_PsBW = pieces[0].new_empty(buffer_shape(pieces, num_ranks))
    _launch(buffer_PsBW, pieces, is_pack=True)
    return buffer_PsBW


def _launch_unpack(buffer_PsBW: torch.Tensor, pieces: Sequence[torch.Tensor]) -> None:
    _launch(buffer_PsBW, pieces, is_pack=False)


# No autograd formula: the backward in attention/ulysses.py packs the tensors that its forward unpacked.
_pack_op = torch.library.custom_op("deepspeed_alst::pack_heads", _launch_pack, mutates_args=())
_unpack_op = torch.library.custom_op("deepspeed_alst::unpack_heads_", _launch_unpack, mutates_args=("pieces",))


@_pack_op.register_fake
def _fake(pieces, num_ranks):
    return pieces[0].new_empty(buffer_shape(pieces, num_ranks))


def _example_pieces(device: torch.device) -> list[torch.Tensor]:
    """Return pieces for 4 ranks, 2 per KV head: 3 tokens, 2 samples, head dims 40 and 24."""
    return [
        by_heads(torch.randn(2, 3, heads, D, device=device).transpose(1, 2), pieces)
        for heads, D, pieces in ((8, 40, 4), (2, 40, 2), (2, 24, 2))
    ]


OPS["pack_heads"] = Op(pack_reference, _pack_op, _launch_pack, lambda device: (_example_pieces(device), 4))
OPS["unpack_heads_"] = Op(
    unpack_reference,
    _unpack_op,
    _launch_unpack,
    lambda device: (torch.randn(4, 3, 2, 144, device=device), _example_pieces(device)),
)
