"""Liger's cross-entropy kernel for the tiled loss: overwrites a tile of logits with their gradient.

The kernel is launched as in Liger's fused linear cross-entropy, with fp32 losses. ``cross_entropy_forward`` would round
the losses to the logits' dtype and sync with the device three times per tile. The kernel computes in fp32, so
``n_non_ignore`` carries the factor of the gradient before rounding.

Bytes moved per logit: 3 * itemsize, as in cross_entropy.py. Importing liger_kernel takes seconds.

Legend: t rows of a tile, V vocabulary.
"""

import torch
import triton
from liger_kernel.ops.cross_entropy import MAX_FUSED_SIZE, liger_cross_entropy_kernel
from liger_kernel.ops.utils import is_hip

from deepspeed_alst.errors import ShapeError
from deepspeed_alst.kernels.cross_entropy import IGNORED_LABEL, has_own_rows

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def _launch(
    logits_tV: torch.Tensor,
    labels_t: torch.Tensor,
    divisor: float,
    label_smoothing: float,
    softcap: float,
    gradient: bool,
) -> torch.Tensor:
    t, V = logits_tV.shape
    losses_t = torch.zeros(t, dtype=torch.float32, device=logits_tV.device)
    if t:
        liger_cross_entropy_kernel[(t,)](
            X_ptr=logits_tV,
            X_stride=logits_tV.stride(0),
            Y_ptr=labels_t,
            Y_stride=1,
            weight_ptr=None,
            loss_ptr=losses_t,
            z_loss_ptr=None,
            loss_stride=1,
            token_accuracy_ptr=None,
            token_accuracy_stride=0,
            predicted_tokens_ptr=None,
            predicted_tokens_stride=0,
            n_cols=V,
            n_non_ignore=divisor,
            sum_non_ignore_weight=divisor,
            weight_sum=0.0,
            ignore_index=IGNORED_LABEL,
            lse_square_scale=0.0,
            label_smoothing=label_smoothing,
            reduction="mean",
            softcap=softcap if softcap else None,
            RETURN_Z_LOSS=False,
            RETURN_TOKEN_ACCURACY=False,
            RETURN_PREDICTED_TOKENS=False,
            BLOCK_SIZE=min(MAX_FUSED_SIZE, triton.next_power_of_2(V)),
            HAS_WEIGHT=False,
            HAS_SOFTCAPPING=softcap != 0,
            HAS_GRADIENTS=gradient,
            num_warps=16 if is_hip() else 32,
        )
    return losses_t.sum() * divisor


_op = torch.library.custom_op("deepspeed_alst::liger_cross_entropy_", _launch, mutates_args=("logits_tV",))


@_op.register_fake
def _fake(logits_tV, labels_t, divisor, label_smoothing, softcap, gradient):
    return logits_tV.new_empty((), dtype=torch.float32)


def liger_cross_entropy_(
    logits_tV: torch.Tensor,
    labels_t: torch.Tensor,
    divisor: float,
    label_smoothing: float = 0.0,
    softcap: float = 0.0,
    gradient: bool = True,
) -> torch.Tensor:
    """Sum a tile's losses and overwrite its logits with their gradient: ``[t, V], [t] -> []`` in fp32.

    The kernel reads out of bounds for a label outside the vocabulary, so all labels must have passed ``check_labels``
    of cross_entropy.py. Rows labelled -100 have loss 0 and gradient 0.

    Args:
        logits_tV: bf16, fp16 or fp32; contiguous rows, row stride >= V.
        labels_t: int64 on the same device.
        divisor: divides the gradient, not the loss.
        label_smoothing: as in ``torch.nn.functional.cross_entropy``.
        softcap: logits are squashed into (-softcap, softcap); 0 for none.
        gradient: if False, the logits of labelled rows are unchanged.

    Raises:
        ShapeError: a dtype or strides that the kernel does not support.
    """
    if logits_tV.dtype not in _DTYPES or not has_own_rows(logits_tV):
        raise ShapeError(
            f"liger_cross_entropy_: logits must be one of {', '.join(map(str, _DTYPES))} with contiguous rows; they "
            f"are {logits_tV.dtype} with strides {list(logits_tV.stride())}"
        )
    return _op(logits_tV, labels_t.contiguous(), divisor, label_smoothing, softcap, gradient)
