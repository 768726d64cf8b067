"""Cross-entropy that overwrites a tile of logits with their gradient, by this package's kernel and by Liger's.

With ``z = cap * tanh(logit_scale * x / cap)`` (``logit_scale * x`` without a cap), the loss of a row is ``logsumexp(z)
- (1 - smoothing) * z[label] - smoothing * mean(z)``; ``x`` becomes ``scale`` times its derivative. The normalizer is an
online softmax (arXiv:1805.02867). All math is in fp32.

Bytes moved per logit: 3 * itemsize, the row read twice and written once (6 in bf16, 12 in fp32), a third of it without
a gradient. A single read would need the full row on chip: 128256 logits in bf16 are 251 KiB, and a block of an H100 has
227 KiB of shared memory.

Legend: t rows of a tile, V vocabulary.
"""

from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from deepspeed_alst.errors import DataError
from deepspeed_alst.kernels.registry import OPS, Op, launch_config, pick

IGNORED_LABEL = -100
# (logits per block, warps). No autotuning: a trial run would overwrite the logits, and ranks could choose differently.
CONFIGS = ((1024, 4), (4096, 8), (8192, 16))


def cross_entropy_reference(
    logits_tV: torch.Tensor,
    labels_t: torch.Tensor,
    scale: torch.Tensor,
    label_smoothing: float = 0.0,
    softcap: float = 0.0,
    logit_scale: float = 1.0,
    gradient: bool = True,
) -> torch.Tensor:
    """Compute ``cross_entropy_`` in PyTorch, as reference and fallback; fp64 stays fp64."""
    with torch.enable_grad():
        leaf_tV = logits_tV.detach().to(torch.promote_types(logits_tV.dtype, torch.float32), copy=True).requires_grad_()
        z_tV = leaf_tV * logit_scale
        if softcap:
            z_tV = softcap * torch.tanh(z_tV / softcap)
        # ignore_index is IGNORED_LABEL by default
        loss = F.cross_entropy(z_tV, labels_t, reduction="sum", label_smoothing=label_smoothing)
    if gradient:
        (grad_tV,) = torch.autograd.grad(loss, leaf_tV)
        logits_tV.copy_(grad_tV * scale.to(grad_tV))
    return loss.detach()


@triton.jit
def _tanh(x):
    # Cephes' polynomial near 0, where 1 - 2 / (exp(2x) + 1) loses precision.
    a = tl.abs(x)
    s = a * a
    near = -5.70498872745e-3 * s + 2.06390887954e-2
    near = (near * s - 5.37397155531e-2) * s + 1.33314422036e-1
    near = x + x * s * (near * s - 3.33332819422e-1)
    far = 1.0 - 2.0 / (tl.exp(2.0 * a) + 1.0)
    return tl.where(a < 0.625, near, tl.where(x < 0, -far, far))


@triton.jit
def _capped(x, softcap, logit_scale, HAS_CAP: tl.constexpr):
    z = x * logit_scale
    if HAS_CAP:
        z = softcap * _tanh(z / softcap)
    return z


@triton.jit
def _cross_entropy_kernel(
    x_ptr,
    labels_ptr,
    scale_ptr,
    losses_ptr,
    row_stride,
    V,
    smoothing,
    softcap,
    logit_scale,
    HAS_CAP: tl.constexpr,
    SMOOTH: tl.constexpr,
    GRADIENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)  # t*V exceeds 2**31
    x_ptr += row * row_stride
    label = tl.load(labels_ptr + row)
    scale = tl.load(scale_ptr).to(tl.float32)
    is_known = (label >= 0) & (label < V)
    # Loaded before the first reduction, which is a barrier, so that no thread reads an overwritten logit.
    x_label = tl.load(x_ptr + label, mask=is_known, other=0.0).to(tl.float32)
    lanes = tl.arange(0, BLOCK)

    highest = float("-inf")
    total = 0.0
    sum_z = 0.0
    for begin in range(0, V, BLOCK):
        inside = begin + lanes < V
        x = tl.load(x_ptr + begin + lanes, mask=inside, other=0.0).to(tl.float32)
        z = _capped(x, softcap, logit_scale, HAS_CAP)
        if SMOOTH:
            sum_z += tl.sum(tl.where(inside, z, 0.0), axis=0)
        z = tl.where(inside, z, float("-inf"))
        higher = tl.maximum(highest, tl.max(z, axis=0))
        # In a block of only -inf (a masked vocabulary), -inf - -inf would be NaN.
        base = tl.where(higher == float("-inf"), 0.0, higher)
        total = total * tl.exp(highest - base) + tl.sum(tl.exp(z - base), axis=0)
        highest = higher

    # The max logit and the sum stay separate: the rounding of their sum would be in every probability.
    z_label = _capped(x_label, softcap, logit_scale, HAS_CAP)
    loss = (highest - z_label) + tl.log(total)
    if SMOOTH:
        loss += smoothing * (z_label - sum_z / V)
    inverse_total = 1.0 / total
    factor = scale * logit_scale
    # An ignored row has loss 0; a label outside the vocabulary makes its row NaN.
    unlabelled = tl.where(label == -100, 0.0, float("nan"))
    loss = tl.where(is_known, loss, unlabelled)
    tl.store(losses_ptr + row, loss)
    if not GRADIENT:
        return

    for begin in range(0, V, BLOCK):
        columns = begin + lanes
        inside = columns < V
        x = tl.load(x_ptr + columns, mask=inside, other=0.0).to(tl.float32)
        z = _capped(x, softcap, logit_scale, HAS_CAP)
        grad = tl.exp(z - highest) * inverse_total - tl.where(columns == label, 1.0 - smoothing, 0.0)
        if SMOOTH:
            grad -= smoothing / V
        if HAS_CAP:
            capped = z / softcap
            grad *= 1.0 - capped * capped
        grad = tl.where(is_known, grad * factor, unlabelled)
        tl.store(x_ptr + columns, grad.to(x_ptr.dtype.element_ty), mask=inside)


def _launch(
    logits_tV: torch.Tensor,
    labels_t: torch.Tensor,
    scale: torch.Tensor,
    label_smoothing: float,
    softcap: float,
    logit_scale: float,
    gradient: bool,
) -> torch.Tensor:
    t, V = logits_tV.shape
    losses_t = torch.empty(t, dtype=torch.float32, device=logits_tV.device)
    block, warps = launch_config(CONFIGS, V)
    if t:
        _cross_entropy_kernel[(t,)](
            logits_tV,
            labels_t,
            scale,
            losses_t,
            logits_tV.stride(0),
            V,
            label_smoothing,
            softcap,
            logit_scale,
            HAS_CAP=softcap != 0,
            SMOOTH=label_smoothing != 0,
            GRADIENT=gradient,
            BLOCK=block,
            num_warps=warps,
        )
    return losses_t.sum()


# No autograd formula: tiling/loss.py uses the gradient that replaces the logits.
_op = torch.library.custom_op("deepspeed_alst::cross_entropy_", _launch, mutates_args=("logits_tV",))


@_op.register_fake
def _fake(logits_tV, labels_t, scale, label_smoothing, softcap, logit_scale, gradient):
    return logits_tV.new_empty((), dtype=torch.float32)


def _example(device: torch.device) -> tuple[Any, ...]:
    logits_tV = 3 * torch.randn(7, 1500, device=device)
    labels_t = torch.randint(0, 1500, (7,), device=device)
    labels_t[3] = IGNORED_LABEL
    return logits_tV, labels_t, torch.tensor(0.37, device=device), 0.1, 20.0, 0.7, True


OPS["cross_entropy"] = Op(cross_entropy_reference, _op, _launch, _example)


def has_writable_rows(logits_tV: torch.Tensor) -> bool:
    """Return True if the kernels can write the rows of a tile in place."""
    t, V = logits_tV.shape
    return (V == 1 or logits_tV.stride(1) == 1) and (t <= 1 or logits_tV.stride(0) >= V)


def check_labels(lowest: int, highest: int, vocab: int) -> None:
    """Raise DataError for labels outside the vocabulary; the caller reads their range from the device once per loss."""
    if lowest < 0 or highest >= vocab:
        raise DataError(
            f"label {lowest if lowest < 0 else highest} is outside the vocabulary of {vocab} tokens. Labels must be in "
            f"[0, {vocab}), or {IGNORED_LABEL} for tokens without a loss."
        )


def cross_entropy_(
    logits_tV: torch.Tensor,
    labels_t: torch.Tensor,
    scale: torch.Tensor,
    label_smoothing: float = 0.0,
    softcap: float = 0.0,
    logit_scale: float = 1.0,
    gradient: bool = True,
) -> torch.Tensor:
    """Sum a tile's losses and overwrite its logits with their gradient: ``[t, V], [t], [] -> []`` in fp32.

    Rows labelled -100 have loss 0 and gradient 0. A label outside the vocabulary makes the loss and gradient of its row
    NaN, without an out-of-bounds read; the caller passes the range of all tiles' labels to ``check_labels``.

    Args:
        logits_tV: bf16, fp16 or fp32 (fp64 uses the reference); contiguous rows, row stride >= V.
        labels_t: int64 on the same device.
        scale: fp32 scalar on the same device, applied to the gradient but not to the loss.
        label_smoothing: as in ``torch.nn.functional.cross_entropy``.
        softcap: bound of the soft-capped logits; 0 for none.
        logit_scale: factor of the logits before the softcap.
        gradient: False to leave the logits unchanged and read them once.
    """
    function = pick("cross_entropy", logits_tV)
    return function(logits_tV, labels_t.contiguous(), scale.float(), label_smoothing, softcap, logit_scale, gradient)


@torch.library.custom_op("deepspeed_alst::liger_cross_entropy_", mutates_args=("logits_tV",))
def liger_cross_entropy_(
    logits_tV: torch.Tensor,
    labels_t: torch.Tensor,
    divisor: float,
    label_smoothing: float = 0.0,
    softcap: float = 0.0,
    gradient: bool = True,
) -> torch.Tensor:
    """Compute ``cross_entropy_`` by Liger's kernel, with the gradient divided by ``divisor``; no fp64.

    All labels must have passed ``check_labels``: Liger reads out of bounds for a label outside the vocabulary.
    """
    # Liger's cross_entropy_forward would round the losses to the logits' dtype and sync with the device three times per
    # tile. Its kernel multiplies the gradient by 1 / n_non_ignore in fp32, before rounding.
    from liger_kernel.ops.backends._triton.cross_entropy import cross_entropy_loss_and_grad_triton  # takes seconds

    losses_t, *_ = cross_entropy_loss_and_grad_triton(
        logits_tV,
        labels_t,
        ce_weight=None,
        ignore_index=IGNORED_LABEL,
        lse_square_scale=0.0,
        label_smoothing=label_smoothing,
        reduction="mean",
        softcap=softcap or None,
        n_non_ignore=divisor,
        sum_non_ignore_weight=divisor,
        weight_sum=0.0,
        return_z_loss=False,
        return_token_accuracy=False,
        return_predicted_tokens=False,
        has_gradients=gradient,
    )
    return losses_t.sum() * divisor


@liger_cross_entropy_.register_fake
def _liger_fake(logits_tV, labels_t, divisor, label_smoothing=0.0, softcap=0.0, gradient=True):
    return logits_tV.new_empty((), dtype=torch.float32)
