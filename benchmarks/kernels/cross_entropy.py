"""Test cases of the cross-entropy kernel, run by judge.py.

Legend: t rows of a tile, V vocabulary.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.kernels.interpreter import faithful
from benchmarks.kernels.judge import Verdict, bytes_of, errors_of
from deepspeed_alst.core.hf_model_spec import ModelSpec
from deepspeed_alst.core.patching import PatchSet

# Vocabularies of Llama 3, GPT-2, Gemma 2 and Qwen 2.5; 50257, 32001 and 151665 have no useful divisors.
COMPILED = (
    ("bf16, V 128256", (128256, torch.bfloat16, 0.0, 0.0)),
    ("bf16, V 50257", (50257, torch.bfloat16, 0.0, 0.0)),
    ("bf16, V 256000, soft-cap", (256000, torch.bfloat16, 0.0, 30.0)),
    ("bf16, V 151665, all", (151665, torch.bfloat16, 0.1, 30.0)),
    ("fp16, V 32001, smoothing", (32001, torch.float16, 0.1, 0.0)),
    ("fp32, V 128256", (128256, torch.float32, 0.0, 0.0)),
    ("fp32, V 151665, all", (151665, torch.float32, 0.1, 30.0)),
    ("bf16, V 4001, all", (4001, torch.bfloat16, 0.1, 30.0)),
    ("bf16, V 259, all", (259, torch.bfloat16, 0.1, 30.0)),
    ("bf16, V 128256, loss alone", (128256, torch.bfloat16, 0.0, 0.0, False)),
)


@dataclass(frozen=True)
class Case:
    """One launch."""

    t: int
    V: int
    dtype: torch.dtype
    label_smoothing: float = 0.0
    softcap: float = 0.0
    logit_scale: float = 1.0
    gap: int = 0
    """Elements between consecutive rows, filled with NaN."""


CASES = (
    Case(11, 1000, torch.float32),
    Case(3, 50257, torch.float32, label_smoothing=0.1, softcap=30.0, logit_scale=0.7),
    Case(3, 128256, torch.bfloat16),
    Case(3, 50257, torch.bfloat16, label_smoothing=0.1, gap=7),
    Case(3, 151665, torch.bfloat16, softcap=30.0),
    Case(3, 32001, torch.float16, logit_scale=0.7),
)


def launch(V: int, dtype: torch.dtype, smoothing: float, softcap: float, gradient: bool = True) -> None:
    """Launch the kernel of ``cross_entropy_`` on meta tensors."""
    from deepspeed_alst.kernels.cross_entropy import cross_entropy_reference
    from deepspeed_alst.kernels.registry import OPS

    op = OPS["cross_entropy"]
    assert op.reference is cross_entropy_reference
    logits_tV = torch.empty(523, V, dtype=dtype, device="meta")
    labels_t = torch.empty(523, dtype=torch.int64, device="meta")
    op.launch(logits_tV, labels_t, torch.empty((), device="meta"), smoothing, softcap, 1.0, gradient)


def judge(case: Case, within: Callable[[], AbstractContextManager[Any]] = faithful, device: str = "cpu") -> Verdict:
    """Run one launch in the interpreter, or in another context ``within``, and compare with fp64.

    An incomplete gradient, or a write outside it, is an error too.
    """
    from deepspeed_alst.kernels.cross_entropy import cross_entropy_, cross_entropy_reference

    torch.manual_seed(0)
    storage = torch.full((case.t, case.V + case.gap), torch.nan, dtype=case.dtype, device=device)
    logits_tV = storage[:, : case.V]
    logits_tV.copy_(3 * torch.randn(case.t, case.V))
    labels_t = torch.randint(0, case.V, (case.t,), device=device)
    labels_t[2::5] = -100
    scale = torch.tensor(0.37, device=device)
    options = (case.label_smoothing, case.softcap, case.logit_scale)
    results = {}
    for name, dtype in (("truth", torch.float64), ("torch", case.dtype)):
        grad_tV = logits_tV.to(dtype, copy=True)
        results[name] = (cross_entropy_reference(grad_tV, labels_t, scale, *options), grad_tV)
    with within() as traffic:
        loss = cross_entropy_(logits_tV, labels_t, scale, *options)
    assert storage[:, case.V :].isnan().all(), "it wrote between the rows"
    errors = errors_of(("loss", "gradient"), (loss, logits_tV), results["torch"], results["truth"])
    # Each row is read twice and written once; its label is read, and its loss written.
    least = 3 * logits_tV.numel() * case.dtype.itemsize + labels_t.nbytes + 4 * case.t
    return Verdict(errors, bytes_of(traffic) / logits_tV.numel(), least / logits_tV.numel())


def upstreams_bytes_a_logit(t: int, V: int) -> float:
    """Return bytes per bf16 logit moved by DeepSpeed's kernels of ``install_chunked_causal_lm_loss``."""
    from deepspeed.ops.triton_ops import _triton

    _triton._TRITON_AVAILABLE = True  # it checks for a GPU
    from deepspeed.runtime.chunked_cross_entropy import _TritonCrossEntropy

    logits_tV = torch.randn(t, V).bfloat16().requires_grad_()
    with faithful() as traffic:
        _TritonCrossEntropy.apply(logits_tV, torch.randint(0, V, (t,)), -100).mean().backward()
    return (traffic.read + traffic.written) / logits_tV.numel()


def tile_peak(backend: str, tile_tokens: int | None) -> int:
    """Return peak bytes beyond the weights of a 32K-token loss: Llama-3.1-8B's head, on fake tensors."""
    import dataclasses

    from benchmarks.tiles.loss import FAKE, peak_beyond_weights, run
    from deepspeed_alst.config.schema import TiledLossConfig

    budget = TiledLossConfig.model_validate({"backend": backend, "tile_tokens": tile_tokens})
    return peak_beyond_weights(run(dataclasses.replace(FAKE, budget=budget), "ours", 1.0).ledger)


def in_a_model(model: torch.nn.Module, batch: dict[str, torch.Tensor], backend: str, undo: PatchSet) -> Any:
    """Return loss and gradients of a model whose tiled loss uses this backend."""
    from deepspeed_alst.config.schema import TiledLossConfig
    from deepspeed_alst.core.forward_context import ForwardContext
    from deepspeed_alst.tiling.tiled_loss import patch_unsharded_loss, tile_loss

    tile_loss(
        ModelSpec(model), TiledLossConfig(backend=backend, tile_tokens=13), ForwardContext(), lambda module: None, undo
    )
    patch_unsharded_loss(ModelSpec(model), undo)
    model.zero_grad()
    loss = model(**batch, use_cache=False).loss
    (loss * 0.37).backward()
    return loss.detach(), {name: param.grad.clone() for name, param in model.named_parameters()}
