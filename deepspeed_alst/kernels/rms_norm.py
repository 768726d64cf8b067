"""RMSNorm that saves only its input and weight for the backward, and makes no full-size fp32 copy.

``y = x / sqrt(mean(x^2) + eps) * (offset + weight)`` per row (arXiv:1910.07467), in fp32 whatever the dtype of x. The
backward recomputes the reciprocal RMS, since it reads x anyway; saving it would cost 4 bytes per row. rms_norm_ops.py
states the bytes moved per launch. On CPU torch computes.

The gradient of x is a new tensor: autograd passes the same gradient to both inputs of a residual sum, and does not tell
who owns it.

Legend: T rows, H elements of a row.
"""

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from deepspeed_alst.errors import ShapeError
from deepspeed_alst.kernels.rms_norm_ops import rms_norm_backward_op, rms_norm_op

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_TH: torch.Tensor, weight_H: torch.Tensor | None, eps: float, offset: float, cast_first: bool
    ) -> torch.Tensor:
        ctx.save_for_backward(x_TH, weight_H)
        ctx.eps, ctx.offset = eps, offset
        return rms_norm_op(x_TH, weight_H, eps, offset, cast_first)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_TH: torch.Tensor) -> tuple[Any, ...]:
        x_TH, weight_H = ctx.saved_tensors
        wanted = ctx.needs_input_grad[1]
        dy_TH = dy_TH if _has_dense_rows(dy_TH) else dy_TH.contiguous()
        dx_TH, dweight_H = rms_norm_backward_op(dy_TH, x_TH, weight_H, ctx.eps, ctx.offset, wanted)
        return dx_TH, dweight_H.to(weight_H.dtype) if wanted else None, None, None, None


def _has_dense_rows(x_TH: torch.Tensor) -> bool:
    return x_TH.shape[1] == 1 or x_TH.stride(1) == 1


def _check(x: torch.Tensor, weight_H: torch.Tensor | None, cast_first: bool) -> None:
    if x.dim() == 0 or x.shape[-1] == 0:
        wrong = "x must be [..., H] with H >= 1"
    elif x.dtype not in DTYPES:
        wrong = f"x must be one of {', '.join(map(str, DTYPES))}"
    elif weight_H is None:
        return
    elif weight_H.shape != x.shape[-1:]:
        wrong = "the weight must be [H]"
    elif weight_H.device != x.device or not weight_H.is_floating_point():
        wrong = "the weight must be of a floating-point dtype, on x's device"
    elif cast_first and weight_H.dtype != x.dtype:
        wrong = "cast_first multiplies in x's dtype, which must be the weight's"
    else:
        return
    of_weight = "none" if weight_H is None else f"{list(weight_H.shape)}, {weight_H.dtype} on {weight_H.device}"
    raise ShapeError(f"rms_norm: {wrong}; x is {list(x.shape)}, {x.dtype} on {x.device}, the weight {of_weight}")


def rms_norm(
    x: torch.Tensor, weight_H: torch.Tensor | None, eps: float, offset: float = 0.0, cast_first: bool = False
) -> torch.Tensor:
    """Apply RMSNorm per row: ``[..., H] -> [..., H]`` in x's dtype.

    Each row is divided by its RMS and multiplied by ``offset + weight``. The result has the memory order of x, without
    gaps. x is saved as it is, even a view; it is copied only if its rows are not evenly strided.

    Args:
        x: bf16, fp16 or fp32.
        weight_H: any floating-point dtype, or None.
        eps: added to the mean square.
        offset: added to the weight; 1 in the Gemma family.
        cast_first: round the row to x's dtype before the multiplication too, as in Llama.

    Raises:
        ShapeError: incompatible sizes, dtypes or devices.
    """
    _check(x, weight_H, cast_first)
    # Enumerate rows in memory order, so that those of a transposed x are evenly strided too.
    order = sorted(range(x.dim() - 1), key=x.stride, reverse=True)
    in_order = x.permute(*order, -1)
    x_TH = in_order.reshape(-1, x.shape[-1])
    y_TH = _RmsNorm.apply(x_TH if _has_dense_rows(x_TH) else x_TH.contiguous(), weight_H, eps, offset, cast_first)
    back = sorted(range(len(order)), key=order.__getitem__)
    return y_TH.view(in_order.shape).permute(*back, -1)
