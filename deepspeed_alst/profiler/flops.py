"""FLOPs of an operator: torch's formulas, and those that torch lacks.

The convention is torch's: a multiply-add is 2, only matmuls, convolutions and attention count, causal attention counts
in full (all S x S scores), and its backward recomputes the scores.
"""

from typing import Any

import torch
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop, sdpa_flop

aten = torch.ops.aten


def _grouped_mm(a: torch.Tensor, b: torch.Tensor, *args: Any, **kwargs: Any) -> int:
    """Count a grouped matmul; groups split one of its sizes, two 3D operands are a batched matmul."""
    groups = a.shape[0] if a.dim() == b.dim() == 3 else 1
    return 2 * groups * a.shape[-2] * a.shape[-1] * b.shape[-1]


def _matrix_vector(a: torch.Tensor, b: torch.Tensor, *args: Any, **kwargs: Any) -> int:
    return 2 * a.shape[0] * a.shape[1]


def _plus(product: Any) -> Any:
    """Return the formula of a product that is added to a first operand."""
    return lambda _, *args, **kwargs: product(*args, **kwargs)


# torch's own formulas take precedence.
FORMULAS: dict[Any, Any] = {
    aten._scaled_dot_product_flash_attention_for_cpu: sdpa_flop,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: sdpa_backward_flop,
    aten._grouped_mm: _grouped_mm,
    aten._scaled_grouped_mm: _grouped_mm,
    aten.mv: _matrix_vector,
    aten.addmv: _plus(_matrix_vector),
    aten.addbmm: _plus(flop_registry[aten.bmm]),
}


def formula(func: Any) -> Any:
    """Return an operator's formula, called with its arguments and ``out_val``; None if it does not count."""
    packet = getattr(func, "_overloadpacket", func)
    return flop_registry.get(packet) or FORMULAS.get(packet)


def is_attention(operator: str) -> bool:
    """Return True if the operator is a fused attention (flash, memory-efficient, flex)."""
    return "attention" in operator
