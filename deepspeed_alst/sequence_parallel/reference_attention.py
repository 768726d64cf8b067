"""Reference attention with the full score matrix: for trials of about a hundred tokens, on any device.

Legend: B batch, S whole sequence, h query heads, k KV heads, D head dim.
"""

import torch

from deepspeed_alst.sequence_parallel.mask_spec import MaskSpec


def attend_plainly(
    q_BhSD: torch.Tensor,
    k_BkSD: torch.Tensor,
    v_BkSD: torch.Tensor,
    mask: MaskSpec | None,
    scaling: float | None,
    softcap: float | None = None,
    sinks_h: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attend causally: ``[B, h, S, D], 2 x [B, k, S, D] -> [B, h, S, D]``.

    Args:
        q_BhSD: queries.
        k_BkSD: keys.
        v_BkSD: values, whose head size may differ.
        mask: hidden tokens beside the causal mask.
        scaling: factor of the scores; ``D ** -0.5`` if None.
        softcap: scores are ``softcap * tanh(score / softcap)``, before the mask.
        sinks_h: one score per head that takes part in the softmax without a value, ``[h]``.
    """
    S, groups = q_BhSD.shape[2], q_BhSD.shape[1] // k_BkSD.shape[1]
    k, v = (x.repeat_interleave(groups, dim=1) for x in (k_BkSD, v_BkSD))
    scores = q_BhSD @ k.transpose(2, 3) * (q_BhSD.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    place = torch.arange(S, device=scores.device)
    rule = (mask or MaskSpec()).rule(S, scores.device)
    seen = rule(0, 0, place[:, None], place[None, :])
    scores = scores.masked_fill(~seen, -torch.inf)
    if sinks_h is not None:
        sinks = sinks_h.view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, sinks.to(scores.dtype)], dim=-1)
    return scores.float().softmax(-1).to(v.dtype)[..., :S] @ v
