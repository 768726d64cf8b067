"""Gated activation of an MLP, ``a = act(gate) * up``, and its gradients, both in place.

``act`` is silu (SwiGLU), gelu or tanh gelu (GeGLU, arXiv:2002.05202). The forward overwrites ``gate`` with ``a``. The
backward overwrites ``gate`` and ``up`` with their gradients, and the gradient of ``a`` with ``a``, for the weight
gradient of the down projection. All math is in fp32 and rounded once.

The normal CDF in gelu is ``exp(-x^2 / 2)``, which the derivative also needs, times a polynomial fitted to
``erfcx(|x| / sqrt(2)) / 2``. This keeps the precision of the lower tail, which ``1 + erf`` loses.

Bytes moved per element, the minimum: forward 3 * itemsize, two reads and one write (6 in bf16, 12 in fp32); backward
6 * itemsize, three reads and three writes (12 and 24).

Legend: t rows of a tile, F inner features.
"""

import functools
from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl

from deepspeed_alst.kernels.registry import OPS, Op, launch_config, pick

ACTIVATIONS = ("silu", "gelu", "gelu_tanh")
# (features per block, warps), for 16-byte accesses per thread in bf16.
CONFIGS = ((128, 1), (1024, 4))
# Elements that the reference processes at a time, to bound its fp32 copies.
_BLOCK = 2**16

_ATEN = torch.ops.aten
_ACT = (_ATEN.silu, _ATEN.gelu, functools.partial(_ATEN.gelu, approximate="tanh"))
_TANH_BACKWARD = functools.partial(_ATEN.gelu_backward, approximate="tanh")
_ACT_BACKWARD = (_ATEN.silu_backward, _ATEN.gelu_backward, _TANH_BACKWARD)


def gated_activation_reference(gate_tF: torch.Tensor, up_tF: torch.Tensor, kind: int) -> None:
    """Compute ``gated_activation_`` in PyTorch, as reference and fallback; fp64 stays fp64."""
    for gate, up in _blocks(gate_tF, up_tF):
        gate.copy_(_ACT[kind](_wide(gate)) * _wide(up))


def gated_gradients_reference(gate_tF: torch.Tensor, up_tF: torch.Tensor, grad_tF: torch.Tensor, kind: int) -> None:
    """Compute ``gated_gradients_`` in PyTorch, as reference and fallback; fp64 stays fp64."""
    for gate, up, grad in _blocks(gate_tF, up_tF, grad_tF):
        x, u, d = _wide(gate), _wide(up), _wide(grad)
        act = _ACT[kind](x)
        results = _ACT_BACKWARD[kind](d * u, x), d * act, act * u
        for each, result in zip((gate, up, grad), results, strict=True):
            each.copy_(result)


def _wide(x: torch.Tensor) -> torch.Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _blocks(*each_tF: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    rows = max(1, _BLOCK // max(1, each_tF[0].shape[1]))
    return zip(*(each.split(rows) for each in each_tF), strict=True)


@triton.jit
def _act_and_slope(gate, KIND: tl.constexpr):
    # Beyond LIMIT the activation is exactly 0 or its argument, and the slope would be inf - inf. tl.where keeps NaN,
    # tl.minimum would not.
    LIMIT: tl.constexpr = 80.0 if KIND == 0 else (12.5 if KIND == 1 else 9.5)
    low = tl.where(gate < -LIMIT, -LIMIT, gate)
    x = tl.where(low > LIMIT, LIMIT, low)
    if KIND == 1:  # gelu
        bell = tl.exp(-0.5 * x * x)
        w = 1.0 / (1.0 + 0.26 * tl.abs(x))
        p = 0.030230146 * w - 0.15149373
        p = (p * w + 0.24873185) * w - 0.1477879
        p = (p * w + 0.15875784) * w + 0.051965185
        p = (p * w + 0.1027886) * w + 0.1030510
        tail = (p * w + 0.103757024) * w * bell  # tail of the normal distribution beyond |x|
        cdf = tl.where(x < 0, tail, 1.0 - tail)
        slope = cdf + 0.3989422804 * x * bell
    else:
        y, dy = x, 1.0
        if KIND == 2:  # tanh gelu: (1 + tanh(y)) / 2 is the sigmoid of 2y
            y = 1.5957691216 * x * (1.0 + 0.044715 * x * x)
            dy = 1.5957691216 * (1.0 + 0.134145 * x * x)
        odds = tl.exp(-y)
        cdf = 1.0 / (1.0 + odds)
        slope = cdf * (1.0 + x * (odds * cdf) * dy)  # 1 - cdf loses precision near 1
    return low * cdf, slope


@triton.jit
def _gated_activation_kernel(gate_ptr, up_ptr, gate_stride, up_stride, F, KIND: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)  # t*F exceeds 2**31
    lanes = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    gate_ptr += row * gate_stride + lanes
    inside = lanes < F
    gate = tl.load(gate_ptr, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * up_stride + lanes, mask=inside, other=0.0).to(tl.float32)
    act, _ = _act_and_slope(gate, KIND)
    tl.store(gate_ptr, (act * up).to(gate_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _gated_gradients_kernel(
    gate_ptr, up_ptr, grad_ptr, gate_stride, up_stride, grad_stride, F, KIND: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)  # t*F exceeds 2**31
    lanes = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    gate_ptr += row * gate_stride + lanes
    up_ptr += row * up_stride + lanes
    grad_ptr += row * grad_stride + lanes
    inside = lanes < F
    gate = tl.load(gate_ptr, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr, mask=inside, other=0.0).to(tl.float32)
    grad = tl.load(grad_ptr, mask=inside, other=0.0).to(tl.float32)
    act, slope = _act_and_slope(gate, KIND)
    tl.store(gate_ptr, (grad * up * slope).to(gate_ptr.dtype.element_ty), mask=inside)
    tl.store(up_ptr, (grad * act).to(up_ptr.dtype.element_ty), mask=inside)
    tl.store(grad_ptr, (act * up).to(grad_ptr.dtype.element_ty), mask=inside)


def _launch(kernel: Any, kind: int, *tensors_tF: torch.Tensor) -> None:
    t, F = tensors_tF[0].shape
    block, warps = launch_config(CONFIGS, F)
    strides = [x_tF.stride(0) for x_tF in tensors_tF]
    if t and F:
        kernel[(t, triton.cdiv(F, block))](*tensors_tF, *strides, F, KIND=kind, BLOCK=block, num_warps=warps)


def _launch_activation(gate_tF: torch.Tensor, up_tF: torch.Tensor, kind: int) -> None:
    _launch(_gated_activation_kernel, kind, gate_tF, up_tF)


def _launch_gradients(gate_tF: torch.Tensor, up_tF: torch.Tensor, grad_tF: torch.Tensor, kind: int) -> None:
    _launch(_gated_gradients_kernel, kind, gate_tF, up_tF, grad_tF)


# No autograd formula: tiling/gated_mlp.py implements the backward of a tile with these ops.
_activation = torch.library.custom_op(
    "deepspeed_alst::gated_activation_", _launch_activation, mutates_args=("gate_tF",)
)
_gradients = torch.library.custom_op(
    "deepspeed_alst::gated_gradients_", _launch_gradients, mutates_args=("gate_tF", "up_tF", "grad_tF")
)


def _example(num_tensors: int, device: torch.device) -> tuple[Any, ...]:
    return (*(3 * torch.randn(num_tensors, 7, 1500, device=device)), 1)


OPS["gated_activation"] = Op(
    gated_activation_reference, _activation, _launch_activation, functools.partial(_example, 2)
)
OPS["gated_gradients"] = Op(gated_gradients_reference, _gradients, _launch_gradients, functools.partial(_example, 3))


def gated_activation_(gate_tF: torch.Tensor, up_tF: torch.Tensor, activation: str) -> None:
    """Overwrite ``gate`` with ``act(gate) * up``: ``[t, F], [t, F]``.

    Args:
        gate_tF: bf16, fp16 or fp32 (fp64 uses the reference); contiguous rows, row stride >= F, as in one half of a
            fused projection's output.
        up_tF: same dtype and device, in other memory; unchanged.
        activation: one of ``ACTIVATIONS``.
    """
    pick("gated_activation", gate_tF)(gate_tF, up_tF, ACTIVATIONS.index(activation))


def gated_gradients_(gate_tF: torch.Tensor, up_tF: torch.Tensor, grad_tF: torch.Tensor, activation: str) -> None:
    """Compute the gradients of ``a = act(gate) * up`` from that of ``a``, in place: ``[t, F]`` three times.

    Afterwards ``gate_tF`` and ``up_tF`` hold their gradients, and ``grad_tF`` holds ``a``. The arguments are those of
    ``gated_activation_``.
    """
    pick("gated_gradients", gate_tF)(gate_tF, up_tF, grad_tF, ACTIVATIONS.index(activation))
