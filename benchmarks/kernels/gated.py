"""Test cases of the gated activation, run by judge.py.

Legend: t rows of a tile, F inner features.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch

from benchmarks.kernels.interpreter import faithful
from benchmarks.kernels.judge import Verdict, bytes_of, errors_of

# F of Llama-3.1-8B, Gemma 7B, phi-3-mini and Llama 2 7B; 4097 and 63 have no useful divisors.
COMPILED = (
    ("bf16, F 14336, silu", (14336, torch.bfloat16, "silu", "apart")),
    ("bf16, F 4097, silu", (4097, torch.bfloat16, "silu", "apart")),
    ("bf16, F 8192, silu, fused", (8192, torch.bfloat16, "silu", "fused")),
    ("bf16, F 24576, gelu_tanh", (24576, torch.bfloat16, "gelu_tanh", "apart")),
    ("bf16, F 4097, gelu, fused", (4097, torch.bfloat16, "gelu", "fused")),
    ("fp16, F 11008, gelu", (11008, torch.float16, "gelu", "apart")),
    ("fp32, F 14336, gelu", (14336, torch.float32, "gelu", "apart")),
    ("fp32, F 63, gelu_tanh, fused", (63, torch.float32, "gelu_tanh", "fused")),
)


@dataclass(frozen=True)
class Case:
    """One launch, forward or backward."""

    t: int
    F: int
    dtype: torch.dtype
    activation: str = "silu"
    backward: bool = True
    layout: str = "apart"
    """Gate and up ``"apart"``, ``"fused"`` in one row, or ``"turned"``: fused with up first."""
    gap: int = 0
    """Elements between consecutive rows, filled with NaN."""


CASES = (
    Case(3, 14336, torch.bfloat16, backward=False),
    Case(3, 14336, torch.bfloat16),
    Case(3, 4097, torch.bfloat16, "gelu", gap=3),
    Case(3, 8192, torch.bfloat16, "silu", layout="fused"),
    Case(3, 4097, torch.float32, "gelu", backward=False, layout="turned", gap=1),
    Case(3, 4097, torch.float32, "gelu", layout="turned"),
    Case(3, 24576, torch.float32, "gelu_tanh"),
    Case(3, 11008, torch.float16, "gelu_tanh", gap=5),
)


def launch(F: int, dtype: torch.dtype, activation: str, layout: str) -> None:
    """Launch the kernels of ``gated_activation_`` and ``gated_gradients_`` on meta tensors."""
    from deepspeed_alst.kernels.gated import ACTIVATIONS
    from deepspeed_alst.kernels.registry import OPS

    kind = ACTIVATIONS.index(activation)
    gate_tF, up_tF, grad_tF, _ = tensors(Case(523, F, dtype, layout=layout), "meta")
    OPS["gated_activation"].launch(gate_tF, up_tF, kind)
    OPS["gated_gradients"].launch(gate_tF, up_tF, grad_tF, kind)


def tensors(case: Case, device: str = "cpu") -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    """Create gate, up and a gradient ``[t, F]``, and views of the gaps between their rows."""
    widths = (case.F, case.F, case.F) if case.layout == "apart" else (2 * case.F, case.F)
    rows = [torch.full((case.t, width + case.gap), torch.nan, dtype=case.dtype, device=device) for width in widths]
    gaps = [each[:, width:] for each, width in zip(rows, widths, strict=True)]
    halves = [half for each in rows for half in each[:, : each.shape[1] - case.gap].split(case.F, 1)]
    for half in halves:
        half.copy_(torch.randn(half.shape))
    gate, up, grad = (halves[1], halves[0], halves[2]) if case.layout == "turned" else halves
    gate *= 3
    return gate, up, grad, gaps


def judge(case: Case, within: Callable[[], AbstractContextManager[Any]] = faithful, device: str = "cpu") -> Verdict:
    """Run one launch in the interpreter, or in another context ``within``, and compare with fp64.

    An incomplete result, or a write outside it, is an error too.
    """
    from deepspeed_alst.kernels.gated import gated_activation_, gated_gradients_

    torch.manual_seed(0)
    *three, gaps = tensors(case, device)
    results = {}
    for name, dtype in (("truth", torch.float64), ("torch", case.dtype)):
        results[name] = run_reference(case, *(each.contiguous().to(dtype, copy=True) for each in three))
    up_before = three[1].clone()
    with within() as traffic:
        if case.backward:
            gated_gradients_(*three, case.activation)
        else:
            gated_activation_(*three[:2], case.activation)
    assert all(each.isnan().all() for each in gaps), "it wrote between the rows"
    assert case.backward or torch.equal(three[1], up_before), "the forward wrote over up"
    names, found = (("gate", "up", "act"), three) if case.backward else (("act",), three[:1])
    errors = errors_of(names, found, results["torch"], results["truth"])
    return Verdict(errors, bytes_of(traffic) / up_before.numel(), (6 if case.backward else 3) * case.dtype.itemsize)


def run_reference(case: Case, gate: torch.Tensor, up: torch.Tensor, grad: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Run the reference in place and return its results."""
    from deepspeed_alst.kernels.gated import ACTIVATIONS, gated_activation_reference, gated_gradients_reference

    kind = ACTIVATIONS.index(case.activation)
    if not case.backward:
        gated_activation_reference(gate, up, kind)
        return (gate,)
    gated_gradients_reference(gate, up, grad, kind)
    return gate, up, grad


@contextmanager
def by_autograd() -> Iterator[None]:
    """Run tiles of a gated MLP by autograd, as those of any module."""
    from deepspeed_alst.tiling.tiled_module import TiledModule

    with mock.patch.object(TiledModule, "closed_form", lambda *_: None):
        yield


def mlp_peak(closed: bool, tile_tokens: int | None = None) -> tuple[int, int]:
    """Return rows per tile and peak bytes of the backward: Llama-3.1-8B's MLP, 32K tokens, fake tensors."""
    from transformers import LlamaConfig

    from benchmarks.tiles.systems import build
    from deepspeed_alst.config.schema import TiledMLPConfig
    from deepspeed_alst.profiler.fake import fake_world
    from deepspeed_alst.profiler.ledger import Ledger
    from deepspeed_alst.tiling.tiled_mlp import row_bytes, tile_rows
    from deepspeed_alst.tiling.tiled_module import TiledModule

    T, M, F = 32768, 4096, 14336
    with fake_world(1), nullcontext() if closed else by_autograd():
        sizes = {"hidden_size": M, "intermediate_size": F, "num_attention_heads": 32, "vocab_size": 8}
        module = build(LlamaConfig(**sizes), 1, torch.bfloat16).model.layers[0].mlp
        x_1TM = torch.empty(1, T, M, dtype=torch.bfloat16, requires_grad=True)
        work = TiledModule("mlp", module)
        form = work.closed_form([x_1TM], 3)
        per_row = row_bytes(2 * F + M, 2) if form is None else form.row_bytes(2)
        rows = tile_tokens or tile_rows(TiledMLPConfig(), T, per_row, 0)
        value_1TM = work.run_tiled(rows, x_1TM)
        with Ledger(module) as ledger:
            value_1TM.backward(torch.empty_like(value_1TM))
        return rows, ledger.peak.bytes - ledger.timeline[0].total
