"""Kernels of one rectangle of attention: torch's flash attention, and plain torch where that has none.

Legend: B batch, h query heads, k KV heads, g = h/k, R rows, N keys of a rectangle, D head dim of q and k, E of v.
"""

from collections.abc import Iterable, Iterator
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F

from deepspeed_alst.attention.rectangles import Rectangle, blocks
from deepspeed_alst.random_draws.counter_based import attention_keeps

_aten = torch.ops.aten
_LARGEST_HEAD = 256  # of torch's flash attention on CUDA
_ROWS, _SCORES = 1024, 2**24  # of a block in plain torch, whose fp32 scores then take 64 MiB


class Kernel(Protocol):
    """Attention of the rows to the keys of one rectangle; both are in reverse order for an upper triangle."""

    def cut(self, parts: Iterable[Rectangle], heads: int) -> Iterable[Rectangle]:
        """Return the rectangles of a size that the kernel takes."""
        ...

    def forward(
        self, q_BhRD: torch.Tensor, k_BkND: torch.Tensor, v_BkNE: torch.Tensor, part: Rectangle
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return output ``[B, h, R, E]`` and log-sum-exp ``[B, h, R]``."""
        ...

    def backward(
        self,
        do_BhRE: torch.Tensor,
        q_BhRD: torch.Tensor,
        k_BkND: torch.Tensor,
        v_BkNE: torch.Tensor,
        o_BhRE: torch.Tensor,
        lse_BhR: torch.Tensor,
        part: Rectangle,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the gradients of q, k and v; output and log-sum-exp are those of all keys."""
        ...


class Dropout(NamedTuple):
    """Dropout of attention's weights, by counters: the masks of ``CountedDraws.attention`` on CPU."""

    p: float
    key: int
    heads: range
    first_sample: int = 0

    def factors(self, part: Rectangle, weights_BkgRN: torch.Tensor) -> torch.Tensor:
        """Return 0 or 1 / (1 - p) for each weight of a rectangle; 0 for all if p is 1."""
        B = weights_BkgRN.shape[0]
        samples = range(self.first_sample, self.first_sample + B)
        places = range(part.first_row, part.last_row), range(part.first_key, part.last_key)
        kept_BhRN = attention_keeps(self.key, samples, self.heads, *places, 1 - self.p, weights_BkgRN.device)
        if part.triangle == "upper":
            kept_BhRN = kept_BhRN.flip(2, 3)
        return kept_BhRN.view_as(weights_BkgRN).to(weights_BkgRN.dtype).mul_(1 / (1 - self.p) if self.p < 1 else 0)


def kernel_for(
    q_BHsD: torch.Tensor, scale: float | None, softcap: float | None, dropout: Dropout | None = None
) -> Kernel:
    """Return the kernel for such queries."""
    kind, half = q_BHsD.device.type, q_BHsD.dtype in (torch.bfloat16, torch.float16)
    if (
        softcap is None
        and dropout is None
        and (kind == "cpu" or (kind == "cuda" and half and q_BHsD.shape[3] <= _LARGEST_HEAD))
    ):
        return FlashKernel(scale)
    return TorchKernel(scale, softcap, dropout)


def from_sample(kernel: Kernel, samples: slice) -> Kernel:
    """Return the kernel for some samples of the batch."""
    if not isinstance(kernel, TorchKernel) or kernel.dropout is None:
        return kernel
    return kernel._replace(dropout=kernel.dropout._replace(first_sample=samples.start or 0))


class FlashKernel(NamedTuple):
    """torch's flash attention, on CPU or CUDA."""

    scale: float | None

    def cut(self, parts: Iterable[Rectangle], heads: int) -> Iterable[Rectangle]:
        """Return them as they are."""
        return parts

    def forward(
        self, q_BhRD: torch.Tensor, k_BkND: torch.Tensor, v_BkNE: torch.Tensor, part: Rectangle
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return output and log-sum-exp."""
        E, scale, causal = v_BkNE.shape[3], self.scale or q_BhRD.shape[3] ** -0.5, bool(part.triangle)
        q, k, v = _equal_heads(q_BhRD, k_BkND, v_BkNE)
        if q.device.type == "cuda":
            o, lse, *_ = _aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, scale=scale)
            return o[..., :E], lse
        o, lse = q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32))
        for q_part, o_part, lse_part in zip(*(_by_kv_head(x, k.shape[1], causal) for x in (q, o, lse)), strict=True):
            found_o, found_lse = _aten._scaled_dot_product_flash_attention_for_cpu(
                q_part, k, v, 0.0, causal, scale=scale
            )
            o_part.copy_(found_o)
            lse_part.copy_(found_lse)
        return o[..., :E], lse

    def backward(
        self,
        do_BhRE: torch.Tensor,
        q_BhRD: torch.Tensor,
        k_BkND: torch.Tensor,
        v_BkNE: torch.Tensor,
        o_BhRE: torch.Tensor,
        lse_BhR: torch.Tensor,
        part: Rectangle,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the gradients of q, k and v."""
        D, E, causal = q_BhRD.shape[3], v_BkNE.shape[3], bool(part.triangle)
        scale = self.scale or D**-0.5
        q, k, v, do, o = _equal_heads(q_BhRD, k_BkND, v_BkNE, do_BhRE, o_BhRE)
        if q.device.type == "cuda":
            # No lengths of packed documents; no dropout, so no random state.
            rows, keys, none = q.shape[2], k.shape[2], q.new_empty(0, dtype=torch.int64)
            # The kernel reads the log-sum-exp by its address alone, without strides.
            lse = lse_BhR.contiguous()
            found = _aten._scaled_dot_product_flash_attention_backward(
                do, q, k, v, o, lse, None, None, rows, keys, 0.0, causal, none, none, scale=scale
            )
            return found[0][..., :D], found[1][..., :D], found[2][..., :E]
        dq, dk, dv = q.new_empty(q.shape), None, None
        wide = torch.promote_types(q.dtype, torch.float32)
        for *of_part, dq_part in zip(
            *(_by_kv_head(x, k.shape[1], causal) for x in (do, q, o, lse_BhR, dq)), strict=True
        ):
            do, q, o, lse = of_part
            found = _aten._scaled_dot_product_flash_attention_for_cpu_backward(
                do, q, k, v, o, lse, 0.0, causal, scale=scale
            )
            dq_part.copy_(found[0])
            dk = found[1].to(wide) if dk is None else dk.add_(found[1])
            dv = found[2].to(wide) if dv is None else dv.add_(found[2])
        return dq[..., :D], dk[..., :D], dv[..., :E]


class TorchKernel(NamedTuple):
    """Matrix products in fp32, of blocks of scores: soft caps, dropout, and on CUDA fp32 and wide heads."""

    scale: float | None
    softcap: float | None
    dropout: Dropout | None = None

    def cut(self, parts: Iterable[Rectangle], heads: int) -> Iterator[Rectangle]:
        """Cut them into blocks."""
        for part in parts:
            yield from blocks(part, _ROWS, max(1, _SCORES // (_ROWS * heads)))

    def forward(
        self, q_BhRD: torch.Tensor, k_BkND: torch.Tensor, v_BkNE: torch.Tensor, part: Rectangle
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return output and log-sum-exp, at least fp32."""
        scores_BkgRN = self._scores(q_BhRD, k_BkND)
        if part.triangle:
            scores_BkgRN += torch.full_like(scores_BkgRN[0, 0, 0], -torch.inf).triu_(1)
        lse_BkgR = scores_BkgRN.logsumexp(-1)
        weights_BkgRN = scores_BkgRN.sub_(lse_BkgR[..., None]).exp_()
        if self.dropout is not None:
            weights_BkgRN.mul_(self.dropout.factors(part, weights_BkgRN))
        o_BkgRE = weights_BkgRN @ v_BkNE[:, :, None].to(weights_BkgRN.dtype)
        return o_BkgRE.flatten(1, 2), lse_BkgR.flatten(1, 2)

    def backward(
        self,
        do_BhRE: torch.Tensor,
        q_BhRD: torch.Tensor,
        k_BkND: torch.Tensor,
        v_BkNE: torch.Tensor,
        o_BhRE: torch.Tensor,
        lse_BhR: torch.Tensor,
        part: Rectangle,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the gradients of q, k and v, at least fp32."""
        scores_BkgRN = self._scores(q_BhRD, k_BkND)
        wide, k = scores_BkgRN.dtype, k_BkND.shape[1]
        q, do, o, lse = (x.to(wide).unflatten(1, (k, -1)) for x in (q_BhRD, do_BhRE, o_BhRE, lse_BhR))
        weights_BkgRN = (scores_BkgRN - lse[..., None]).exp_()
        if part.triangle:
            weights_BkgRN.tril_()
        d_scores, dropped = do @ v_BkNE[:, :, None].to(wide).transpose(3, 4), weights_BkgRN
        if self.dropout is not None:
            factors = self.dropout.factors(part, weights_BkgRN)
            d_scores.mul_(factors)
            dropped = factors.mul_(weights_BkgRN)
        dv_BkNE = (dropped.transpose(3, 4) @ do).sum(2)
        d_scores.sub_(torch.linalg.vecdot(do, o)[..., None]).mul_(weights_BkgRN)
        if self.softcap is not None:
            d_scores.mul_(1 - (scores_BkgRN / self.softcap).square_())
        d_scores.mul_(self._scale(q_BhRD))
        dq_BkgRD = d_scores @ k_BkND[:, :, None].to(wide)
        return dq_BkgRD.flatten(1, 2), (d_scores.transpose(3, 4) @ q).sum(2), dv_BkNE

    def _scale(self, q_BhRD: torch.Tensor) -> float:
        return self.scale or q_BhRD.shape[3] ** -0.5

    def _scores(self, q_BhRD: torch.Tensor, k_BkND: torch.Tensor) -> torch.Tensor:
        """Return all scores of a block, ``[B, k, g, R, N]``."""
        wide = torch.promote_types(q_BhRD.dtype, torch.float32)
        q_BkgRD = q_BhRD.to(wide).unflatten(1, (k_BkND.shape[1], -1))
        scores = (q_BkgRD @ k_BkND[:, :, None].to(wide).transpose(3, 4)).mul_(self._scale(q_BhRD))
        return scores if self.softcap is None else scores.div_(self.softcap).tanh_().mul_(self.softcap)


def _equal_heads(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """Pad the head dims to the largest, and on CUDA to a multiple of 8; zeros change no score and no output."""
    most = max(x.shape[-1] for x in tensors)
    most = most if tensors[0].device.type == "cpu" else -(-most // 8) * 8
    return [x if x.shape[-1] == most else F.pad(x, (0, most - x.shape[-1])) for x in tensors]


def _by_kv_head(x_Bh: torch.Tensor, num_kv_heads: int, causal: bool) -> list[torch.Tensor]:
    """Split query heads for CPU's kernel, which has no head groups: ``[B, h, R, ...]`` to parts of ``[B, k, ...]``.

    Without a triangle the rows of all heads of a KV head are one part; with one there is a part per head of the group.
    """
    grouped = x_Bh.unflatten(1, (num_kv_heads, -1))
    return list(grouped.unbind(2)) if causal else [grouped.flatten(2, 3)]
