"""How a tensor lies in memory: what is put aside comes back with the same strides, for kernels that look at them."""

import torch


def is_dense(x: torch.Tensor) -> bool:
    """Whether a tensor's elements fill a stretch of memory without gaps, in whatever order of dims."""
    inner_last = sorted(range(x.dim()), key=lambda dim: x.stride(dim), reverse=True)
    return x.permute(inner_last).is_contiguous()


def laid_flat(x: torch.Tensor) -> torch.Tensor:
    """A dense tensor's elements in the order of memory, ``[numel]``; a view."""
    return x.as_strided((x.numel(),), (1,), x.storage_offset())
