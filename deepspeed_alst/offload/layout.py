"""Memory layout of tensors: offloaded tensors come back with the same strides, which some kernels depend on."""

import torch


def is_dense(x: torch.Tensor) -> bool:
    """Return True if a tensor fills its memory range without gaps, in any order of dims."""
    inner_last = sorted(range(x.dim()), key=lambda dim: x.stride(dim), reverse=True)
    return x.permute(inner_last).is_contiguous()


def laid_flat(x: torch.Tensor) -> torch.Tensor:
    """Return a dense tensor's elements in memory order, ``[numel]``; a view."""
    return x.as_strided((x.numel(),), (1,), x.storage_offset())
