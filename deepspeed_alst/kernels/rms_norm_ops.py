"""Ops of RMSNorm, forward and backward: PyTorch reference, Triton kernel, registration. rms_norm.py calls them.

Bytes moved per element: 2 * itemsize forward and 3 * itemsize backward (4 and 6 in bf16), each row read once; this is
the minimum. The weight is read once per 16 rows, and its gradient is written as an fp32 sum of 64 rows or more: at most
1.05 times the minimum. A row longer than 8192 exceeds the registers of a block: it is read twice, and its partial sum
moves with each row (3 * itemsize, and 5 * itemsize + 8). If H or a row stride is not a multiple of 16, elements are
read one by one, which takes more registers, and the limit is 4096.

Legend: T rows, H elements of a row, p programs.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from deepspeed_alst.kernels.registry import register

_LONGEST_BLOCK = 8192  # fp32 x, dy, weight and its gradient, in the registers of 16 warps
_LONGEST_UNALIGNED = 4096  # likewise, if elements are read one by one
_TILE = 1024  # elements of several short rows per program
_PER_WARP = 512
_ROWS_A_WEIGHT = 16
_ROWS_A_SUM = 64
_MOST_SUMS = 1024


def rms_norm_reference(
    x_TH: torch.Tensor, weight_H: torch.Tensor | None, eps: float, offset: float = 0.0, cast_first: bool = False
) -> torch.Tensor:
    """Compute ``rms_norm`` in PyTorch with the same steps as transformers; fp64 stays fp64."""
    wide_TH = x_TH.to(torch.promote_types(x_TH.dtype, torch.float32))
    y_TH = wide_TH * torch.rsqrt(wide_TH.pow(2).mean(-1, keepdim=True) + eps)
    if cast_first:
        y_TH = y_TH.to(x_TH.dtype)
    if weight_H is not None:
        y_TH = y_TH * (weight_H.to(y_TH.dtype) + offset if offset else weight_H.to(y_TH.dtype))
    return y_TH.to(x_TH.dtype)


def rms_norm_backward_reference(
    dy_TH: torch.Tensor,
    x_TH: torch.Tensor,
    weight_H: torch.Tensor | None,
    eps: float,
    offset: float = 0.0,
    weight_gradient: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the reference's gradients in closed form: dx in x's dtype, dweight in fp32 (empty if not wanted)."""
    dtype = torch.promote_types(x_TH.dtype, torch.float32)
    wide_TH, dy_TH = x_TH.to(dtype), dy_TH.to(dtype)
    scale_T1 = torch.rsqrt(wide_TH.pow(2).mean(-1, keepdim=True) + eps)
    normed_TH = wide_TH * scale_T1
    weighted_TH = dy_TH if weight_H is None else dy_TH * (weight_H.to(dtype) + offset)
    dx_TH = scale_T1 * (weighted_TH - normed_TH * (weighted_TH * normed_TH).mean(-1, keepdim=True))
    weighs = weight_gradient and weight_H is not None
    return dx_TH.to(x_TH.dtype), (dy_TH * normed_TH).sum(0) if weighs else dx_TH.new_empty(0)


@triton.jit
def _read(pointers, inside):
    return tl.load(pointers, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _rms_norm_kernel(
    x_ptr,
    weight_ptr,
    y_ptr,
    x_stride,
    T,
    H,
    eps,
    offset,
    num_tiles,
    HAS_WEIGHT: tl.constexpr,
    CAST_FIRST: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    NUM_BLOCKS: tl.constexpr,
):
    lanes = tl.arange(0, BLOCK)
    weight = tl.full((BLOCK,), 1.0, tl.float32)
    if HAS_WEIGHT and NUM_BLOCKS == 1:
        weight = _read(weight_ptr + lanes, lanes < H) + offset
    first = tl.program_id(0).to(tl.int64) * num_tiles * ROWS  # T*H exceeds 2**31
    for tile in range(tl.minimum(num_tiles, tl.cdiv(T - first, ROWS))):
        rows = first + tile * ROWS + tl.arange(0, ROWS)
        here, x_row, y_row = (rows < T)[:, None], x_ptr + rows[:, None] * x_stride, y_ptr + rows[:, None] * H
        x = tl.zeros((ROWS, BLOCK), tl.float32)  # a single block stays in registers, as the compiler unrolls the loop
        squares = tl.zeros((ROWS,), tl.float32)
        for block in range(NUM_BLOCKS):
            columns = block * BLOCK + lanes
            x = _read(x_row + columns[None, :], here & (columns < H)[None, :])
            squares += tl.sum(x * x, axis=1)
        scale = tl.math.rsqrt(squares / H + eps)[:, None]
        for block in range(NUM_BLOCKS):
            columns = block * BLOCK + lanes
            if NUM_BLOCKS > 1:
                x = _read(x_row + columns[None, :], here & (columns < H)[None, :])
                if HAS_WEIGHT:
                    weight = _read(weight_ptr + columns, columns < H) + offset
            y = x * scale
            if CAST_FIRST:
                y = y.to(y_ptr.dtype.element_ty).to(tl.float32)
            y = (y * weight[None, :]).to(y_ptr.dtype.element_ty)
            tl.store(y_row + columns[None, :], y, mask=here & (columns < H)[None, :])


@triton.jit
def _rms_norm_backward_kernel(
    dy_ptr,
    x_ptr,
    weight_ptr,
    dx_ptr,
    sums_ptr,
    dy_stride,
    x_stride,
    T,
    H,
    eps,
    offset,
    num_tiles,
    HAS_WEIGHT: tl.constexpr,
    WEIGHT_GRADIENT: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    NUM_BLOCKS: tl.constexpr,
):
    lanes = tl.arange(0, BLOCK)
    weight = tl.full((BLOCK,), 1.0, tl.float32)
    if HAS_WEIGHT and NUM_BLOCKS == 1:
        weight = _read(weight_ptr + lanes, lanes < H) + offset
    sums = tl.zeros((ROWS, BLOCK), tl.float32)
    sums_ptr += tl.program_id(0).to(tl.int64) * H
    first = tl.program_id(0).to(tl.int64) * num_tiles * ROWS
    for tile in range(tl.minimum(num_tiles, tl.cdiv(T - first, ROWS))):
        rows = first + tile * ROWS + tl.arange(0, ROWS)
        here, x_row, dy_row = (rows < T)[:, None], x_ptr + rows[:, None] * x_stride, dy_ptr + rows[:, None] * dy_stride
        x = tl.zeros((ROWS, BLOCK), tl.float32)
        dy = tl.zeros((ROWS, BLOCK), tl.float32)
        squares = tl.zeros((ROWS,), tl.float32)
        products = tl.zeros((ROWS,), tl.float32)
        for block in range(NUM_BLOCKS):
            columns = block * BLOCK + lanes
            x = _read(x_row + columns[None, :], here & (columns < H)[None, :])
            dy = _read(dy_row + columns[None, :], here & (columns < H)[None, :])
            if HAS_WEIGHT and NUM_BLOCKS > 1:
                weight = _read(weight_ptr + columns, columns < H) + offset
            squares += tl.sum(x * x, axis=1)
            products += tl.sum(dy * weight[None, :] * x, axis=1)
        scale = tl.math.rsqrt(squares / H + eps)
        mean, scale = (products * scale / H)[:, None], scale[:, None]
        for block in range(NUM_BLOCKS):
            columns = block * BLOCK + lanes
            if NUM_BLOCKS > 1:
                x = _read(x_row + columns[None, :], here & (columns < H)[None, :])
                dy = _read(dy_row + columns[None, :], here & (columns < H)[None, :])
                if HAS_WEIGHT:
                    weight = _read(weight_ptr + columns, columns < H) + offset
            normed = x * scale
            if WEIGHT_GRADIENT and NUM_BLOCKS == 1:
                sums += dy * normed
            elif WEIGHT_GRADIENT:  # each thread adds to its own earlier write
                before = _read(sums_ptr + columns, (columns < H) & (tile > 0))
                tl.store(sums_ptr + columns, before + tl.sum(dy * normed, axis=0), mask=columns < H)
            dx = (scale * (dy * weight[None, :] - normed * mean)).to(dx_ptr.dtype.element_ty)
            tl.store(dx_ptr + rows[:, None] * H + columns[None, :], dx, mask=here & (columns < H)[None, :])
    if WEIGHT_GRADIENT and NUM_BLOCKS == 1:
        tl.store(sums_ptr + lanes, tl.sum(sums, axis=0), mask=lanes < H)


def _shape(*tensors_TH: torch.Tensor) -> dict[str, int]:
    """Return rows and columns per program, by a fixed rule: autotuning would give ranks different kernels."""
    H = tensors_TH[0].shape[1]
    is_aligned = all(number % 16 == 0 for number in (H, *(each.stride(0) for each in tensors_TH)))
    block = min(triton.next_power_of_2(H), _LONGEST_BLOCK if is_aligned else _LONGEST_UNALIGNED)
    rows = max(1, _TILE // block)
    warps = max(4, rows * block // (_PER_WARP if is_aligned else _PER_WARP // 2))
    return {"ROWS": rows, "BLOCK": block, "NUM_BLOCKS": triton.cdiv(H, block), "num_warps": warps}


def _launch(
    x_TH: torch.Tensor, weight_H: torch.Tensor | None, eps: float, offset: float, cast_first: bool
) -> torch.Tensor:
    (T, H), shape = x_TH.shape, _shape(x_TH)
    y_TH = x_TH.new_empty(T, H)
    num_tiles = max(1, _ROWS_A_WEIGHT // shape["ROWS"])
    if T:
        _rms_norm_kernel[(triton.cdiv(T, num_tiles * shape["ROWS"]),)](
            x_TH,
            weight_H,
            y_TH,
            x_TH.stride(0),
            T,
            H,
            eps,
            offset,
            num_tiles,
            HAS_WEIGHT=weight_H is not None,
            CAST_FIRST=cast_first,
            **shape,
        )
    return y_TH


def _launch_backward(
    dy_TH: torch.Tensor,
    x_TH: torch.Tensor,
    weight_H: torch.Tensor | None,
    eps: float,
    offset: float,
    weight_gradient: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    (T, H), shape = x_TH.shape, _shape(x_TH, dy_TH)
    dx_TH = x_TH.new_empty(T, H)
    weighs = weight_gradient and weight_H is not None
    num_tiles = triton.cdiv(max(_ROWS_A_SUM, triton.cdiv(T, _MOST_SUMS)), shape["ROWS"])
    programs = triton.cdiv(T, num_tiles * shape["ROWS"])
    sums_pH = x_TH.new_empty(programs if weighs else 0, H, dtype=torch.float32)
    if T:
        _rms_norm_backward_kernel[(programs,)](
            dy_TH,
            x_TH,
            weight_H,
            dx_TH,
            sums_pH,
            dy_TH.stride(0),
            x_TH.stride(0),
            T,
            H,
            eps,
            offset,
            num_tiles,
            HAS_WEIGHT=weight_H is not None,
            WEIGHT_GRADIENT=weighs,
            **shape,
        )
    return dx_TH, sums_pH.sum(0) if weighs else sums_pH.new_empty(0)


rms_norm_op = torch.library.custom_op("deepspeed_alst::rms_norm", _launch, mutates_args=())
rms_norm_backward_op = torch.library.custom_op("deepspeed_alst::rms_norm_backward", _launch_backward, mutates_args=())


@rms_norm_op.register_fake
def _fake(x_TH, weight_H, eps, offset, cast_first):
    return x_TH.new_empty(x_TH.shape)


@rms_norm_backward_op.register_fake
def _fake_backward(dy_TH, x_TH, weight_H, eps, offset, weight_gradient):
    num_weights = x_TH.shape[1] if weight_gradient and weight_H is not None else 0
    return x_TH.new_empty(x_TH.shape), x_TH.new_empty(num_weights, dtype=torch.float32)


def _example(device: torch.device) -> tuple[Any, ...]:
    return torch.randn(37, 1500, device=device), torch.randn(1500, device=device), 1e-5, 1.0, False


def _backward_example(device: torch.device) -> tuple[Any, ...]:
    x_TH, weight_H, eps, offset, _ = _example(device)
    return torch.randn(37, 1500, device=device), x_TH, weight_H, eps, offset, True


register(
    "rms_norm",
    reference=rms_norm_reference,
    op=rms_norm_op,
    launch=_launch,
    example=_example,
)
register(
    "rms_norm_backward",
    reference=rms_norm_backward_reference,
    op=rms_norm_backward_op,
    launch=_launch_backward,
    example=_backward_example,
)
