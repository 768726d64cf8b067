"""Liger's cross-entropy kernel for the tiled loss, and Liger on fake tensors. Importing liger_kernel takes seconds.

Bytes moved per logit: 3 * itemsize, as in cross_entropy.py.

Legend: t rows of a tile, V vocabulary.
"""

from typing import Any

import torch
from liger_kernel.ops.backends._triton.cross_entropy import cross_entropy_loss_and_grad_triton
from torch._subclasses.fake_tensor import FakeTensor
from triton.runtime import Autotuner, JITFunction

from deepspeed_alst.core.patching import PatchSet
from deepspeed_alst.errors import ShapeError
from deepspeed_alst.kernels.cross_entropy import IGNORED_LABEL, has_own_rows


@torch.library.custom_op("deepspeed_alst::liger_cross_entropy_", mutates_args=("logits_tV",))
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
    if logits_tV.dtype == torch.float64 or not has_own_rows(logits_tV):
        raise ShapeError(
            "liger_cross_entropy_: logits must be bf16, fp16 or fp32 with contiguous rows; they are "
            f"{logits_tV.dtype} with strides {list(logits_tV.stride())}"
        )
    # Liger's cross_entropy_forward would round the losses to the logits' dtype, and sync with the device three times a
    # tile. The kernel multiplies the gradient by 1 / n_non_ignore in fp32, before rounding.
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
def _fake(logits_tV, labels_t, divisor, label_smoothing=0.0, softcap=0.0, gradient=True):
    return logits_tV.new_empty((), dtype=torch.float32)


def skip_fake_launches(patches: PatchSet) -> None:
    """Skip Triton kernels whose arguments are fake: of Liger's functions, what they allocate is left to measure."""

    def unless_fake(run: Any) -> Any:
        def launch(self: Any, *args: Any, **kwargs: Any) -> Any:
            if not any(isinstance(each, FakeTensor) for each in (*args, *kwargs.values())):
                return run(self, *args, **kwargs)

        return launch

    for kind in (JITFunction, Autotuner):
        patches.wrap(kind, "run", unless_fake)
