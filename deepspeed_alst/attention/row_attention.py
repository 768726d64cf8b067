"""Attention with more ranks than heads: each rank computes some query rows of its heads against all keys.

Any backend's softmax attention is computed here, by torch's kernels, rectangle by rectangle
(rectangle_attention.py): no backend's causal mask fits rows that are apart.

Legend: B batch, h query heads, k KV heads, R rows, S whole sequence, D head dim of q and k, E of v.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from deepspeed_alst.attention.attention_cache import CheckpointFrame
from deepspeed_alst.attention.attention_kernels import Dropout, Kernel, kernel_for
from deepspeed_alst.attention.hf_attention import IN_THE_MASK, AttentionBackend, find_backend
from deepspeed_alst.attention.hf_masks import MaskSpec
from deepspeed_alst.attention.rectangle_attention import add_gradients, attend, sinks_gradient
from deepspeed_alst.attention.rectangles import Rectangle, in_block, of_size, rectangles
from deepspeed_alst.core.hf_model_spec import ModelSpec
from deepspeed_alst.errors import UnsupportedModelError
from deepspeed_alst.random_draws.draw_mode import current_draws

KEY_BLOCK = 2**16
"""Keys of one kernel call, as in memory-lean layers."""
_KNOWN_ARGUMENTS = (*IN_THE_MASK, "softcap", "s_aux", "dropout", "kernel_options")


@dataclass(frozen=True)
class RowCall:
    """One call: its rows, as intervals of the sequence, and what they see."""

    rows: Sequence[tuple[int, int]]
    length: int
    mask: MaskSpec | None
    kernel: Kernel
    frame: CheckpointFrame | None

    def pieces(self, key_block: int) -> Iterator[tuple[slice, int, list[Rectangle]]]:
        """Yield where an interval is in R, its first row in the sequence, and its rectangles."""
        start = 0
        for first, last in self.rows:
            here = slice(start, start := start + last - first)
            yield here, first, list(rectangles(first, last, self.length, self.mask, key_block))


_WAY_OUT = "Set sequence_parallel_size to at most the model's query heads"


def check_rows(spec: ModelSpec) -> None:
    """Raise UnsupportedModelError if a model's attention is known to have no kernel for a part of the rows."""
    backend = find_backend(spec.config._attn_implementation)
    if backend is not None and backend.is_programs_own:
        raise UnsupportedModelError(f"{spec.name}: {_own_function(backend)}")


def _own_function(backend: AttentionBackend) -> str:
    return (
        f"the program's own function under attn_implementation='{backend.name}' cannot share the rows of a head among "
        f"ranks. {_WAY_OUT}, or leave transformers' function there"
    )


def attend_rows(
    module: torch.nn.Module,
    heads: range,
    rows: Sequence[tuple[int, int]],
    mask: MaskSpec | None,
    scaling: float | None,
    arguments: dict[str, Any],
    backend: AttentionBackend,
    frame: CheckpointFrame | None,
    *qkv: torch.Tensor,
) -> torch.Tensor:
    """Attend by ``heads`` from some rows to all: ``[B, h, R, D], [B, k, S, D], [B, k, S, E] -> [B, h, R, E]``.

    With a ``frame`` the output is saved for the recomputation. ``qkv`` come last, as from ``ulysses_attention``.

    Raises:
        UnsupportedModelError: an argument without a kernel here, or a function of the program.
    """
    if backend.is_programs_own:
        raise UnsupportedModelError(f"{type(module).__name__}: {_own_function(backend)}")
    rate, draws, dropout = arguments.get("dropout"), current_draws(), None
    known = _KNOWN_ARGUMENTS if draws is not None else [name for name in _KNOWN_ARGUMENTS if name != "dropout"]
    if unknown := [name for name in arguments if name not in known]:
        raise UnsupportedModelError(
            f"{type(module).__name__}: attention with {' and '.join(unknown)} cannot share the rows of a head among "
            f"ranks. {_WAY_OUT}"
        )
    if not backend.uses_mask:
        documents = arguments.get("cu_seq_lens_q")
        bounds = () if documents is None else tuple(documents.tolist())
        mask = MaskSpec(arguments.get("sliding_window"), None, bounds)
    kind = qkv[0].device.type
    if torch.is_autocast_enabled(kind):  # as torch's attention
        qkv = tuple(x.to(torch.get_autocast_dtype(kind)) for x in qkv)
    if rate and draws is not None:
        dropout = Dropout(rate, draws.attention_key(), heads)
    kernel = kernel_for(qkv[0], scaling, arguments.get("softcap"), dropout)
    call = RowCall(rows, qkv[1].shape[2], mask, kernel, frame)
    with torch.autocast(kind, enabled=False):
        return _RowAttention.apply(*qkv, arguments.get("s_aux"), call)  # type: ignore[no-untyped-call, no-any-return]


class _RowAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q_BhRD: torch.Tensor,
        k_BkSD: torch.Tensor,
        v_BkSE: torch.Tensor,
        sinks_h: torch.Tensor | None,
        call: RowCall,
    ) -> torch.Tensor:
        frame = call.frame
        if frame is not None and frame.recomputing:
            # New tensors, since autograd takes ownership of them.
            o_BhRE, lse_BhR = (x.detach() for x in frame.load()[1])
        else:
            o_BhRE = q_BhRD.new_empty(*q_BhRD.shape[:3], v_BkSE.shape[3])
            lse_BhR = q_BhRD.new_empty(q_BhRD.shape[:3], dtype=torch.promote_types(q_BhRD.dtype, torch.float32))
            for here, first, parts in call.pieces(KEY_BLOCK):
                found = attend(q_BhRD[:, :, here], k_BkSD, v_BkSE, parts, first, call.kernel, sinks_h)
                o_BhRE[:, :, here], lse_BhR[:, :, here] = found
            if frame is not None:
                frame.saved_attention.append(type(call.kernel).__name__)
                frame.save(o_BhRE, lse_BhR, note=None)
        ctx.call = call
        ctx.save_for_backward(q_BhRD, k_BkSD, v_BkSE, sinks_h, o_BhRE, lse_BhR)
        return o_BhRE

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do_BhRE: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q_BhRD, k_BkSD, v_BkSE, sinks_h, o_BhRE, lse_BhR = ctx.saved_tensors
        dq_BhRD = torch.zeros_like(q_BhRD, dtype=lse_BhR.dtype)
        dk_BkSD, dv_BkSE = torch.empty_like(k_BkSD), torch.empty_like(v_BkSE)
        pieces, length = list(ctx.call.pieces(ctx.call.length)), ctx.call.length
        # The fp32 sums of a block of keys are finished before the next: whole, they would take twice K and V.
        for keys in of_size(0, length, KEY_BLOCK):
            k, v, dk, dv = (x[:, :, keys] for x in (k_BkSD, v_BkSE, dk_BkSD, dv_BkSE))
            sums = [torch.zeros_like(x, dtype=lse_BhR.dtype) for x in (k, v)]
            for here, first, parts in pieces:
                of_rows = [x[:, :, here] for x in (do_BhRE, q_BhRD, o_BhRE, lse_BhR)]
                inside = in_block(parts, keys.start, keys.stop)
                start = first, keys.start
                add_gradients(dq_BhRD[:, :, here], *sums, of_rows, (k, v), inside, start, ctx.call.kernel)
            dk.copy_(sums[0])
            dv.copy_(sums[1])
        d_sinks_h = None
        if ctx.needs_input_grad[3]:
            d_sinks_h = sinks_gradient(do_BhRE, o_BhRE, lse_BhR, sinks_h).to(sinks_h.dtype)
        return dq_BhRD.to(q_BhRD.dtype), dk_BkSD, dv_BkSE, d_sinks_h, None
