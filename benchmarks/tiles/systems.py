"""Systems under comparison, each patched onto a model and removed again, and one step under a ledger.

All use the same attention (ours under sequence parallelism, else the model's own) and differ in tiles and
checkpointing. DeepSpeed's tiles are applied as in ArcticTraining: the forward of the MLP (or MoE block) runs through
``TiledMLP`` in ``ceil(tokens / hidden size)`` shards under reentrant checkpointing, and the loss through
``TiledFusedLogitsLoss`` in shards of 1 GiB of fp32 logits.

Legend: B batch, s tokens of this rank's shard, V vocabulary.
"""

import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

from deepspeed_alst.config.schema import TiledLossConfig, TiledMLPConfig
from deepspeed_alst.core.patching import PatchSet
from deepspeed_alst.profiler.ledger import Ledger
from deepspeed_alst.sequence_parallel.forward_context import ForwardContext
from deepspeed_alst.sequence_parallel.patch_model import patch_model
from deepspeed_alst.tiling.tiled_loss import replace_whole_loss, tile_loss
from deepspeed_alst.tiling.tiled_mlp import tile_mlps

IGNORED_LABEL = -100
LOSS_SHARD_BYTES = 2**30


class System:
    """Tiles (untiled, upstream or ours) and checkpointing (none, non-reentrant or reentrant)."""

    def __init__(self, tiles: str, checkpointing: str = "") -> None:
        self.tiles, self.checkpointing = tiles, checkpointing

    @property
    def name(self) -> str:
        """Display name."""
        return self.tiles + (f", {self.checkpointing}" if self.checkpointing else ", no checkpoints")

    @contextmanager
    def on(self, model: torch.nn.Module, sp_size: int = 1, mlp: TiledMLPConfig | None = None) -> Iterator[Any]:
        """Patch the model and yield ``step(batch)``, which returns the loss; ``mlp`` is our tile budget."""
        with PatchSet() as undo:
            if self.checkpointing:
                model.gradient_checkpointing_enable({"use_reentrant": self.checkpointing == "reentrant"})
                model.enable_input_require_grads()
                undo.callback(model.disable_input_require_grads)
                undo.callback(model.gradient_checkpointing_disable)
            calls = ForwardContext()
            if sp_size > 1:
                patch_model(model, dist.group.WORLD, undo, calls)
            else:
                undo.enter_context(without_mask(model))
            yield self._loss_of(model, sp_size, mlp or TiledMLPConfig(), calls, undo)

    def _loss_of(
        self, model: Any, sp_size: int, mlp: TiledMLPConfig, calls: ForwardContext, undo: PatchSet
    ) -> Callable[[dict[str, torch.Tensor]], torch.Tensor]:
        if self.tiles == "upstream":
            undo.enter_context(upstream_mlps(model))
            calls.inside = True  # its loss calls the decoder directly
            return lambda batch: upstream_loss(model, batch)
        if self.tiles == "ours":
            tile_mlps(model, mlp, lambda module: None, undo)
            tile_loss(model, TiledLossConfig(), calls, lambda module: None, undo)
            if sp_size == 1:
                replace_whole_loss(model, undo)
        return lambda batch: model(**batch, use_cache=False).loss


@contextmanager
def without_mask(model: torch.nn.Module) -> Iterator[None]:
    """Omit the S x S mask, which transformers omits for unpacked real tensors only."""
    module = sys.modules[type(model).__module__]
    name = "create_sliding_window_causal_mask" if not hasattr(module, "create_causal_mask") else "create_causal_mask"
    with mock.patch.object(module, name, lambda **_: None):
        yield


@contextmanager
def upstream_mlps(model: torch.nn.Module, num_shards: int | None = None) -> Iterator[None]:
    """Patch a model's MLP classes to run through ``TiledMLP``, by default in ceil(s / hidden) shards."""
    from deepspeed.runtime.sequence_parallel.ulysses_sp import TiledMLP

    kinds = {type(layer.mlp) for layer in model.model.layers}
    with PatchSet() as undo:
        for kind in kinds:

            def forward(self: Any, x: torch.Tensor, original: Any = kind.forward) -> torch.Tensor:
                shards = num_shards or math.ceil(x.shape[-2] / x.shape[-1])

                # An MoE block takes only [B, s, hidden], but the backward's shards are flat.
                def whole(self: Any, x: torch.Tensor) -> torch.Tensor:
                    return original(self, x if x.dim() == 3 else x.unsqueeze(0)).view_as(x)

                return TiledMLP.apply(whole, self, x, shards, list(self.parameters()))

            undo.enter_context(mock.patch.object(kind, "forward", forward))
        yield


def upstream_loss(model: Any, batch: dict[str, torch.Tensor], num_shards: int | None = None) -> torch.Tensor:
    """Return the mean loss of a shard by ``TiledFusedLogitsLoss``, summed and divided as in ArcticTraining."""
    from deepspeed.runtime.sequence_parallel.ulysses_sp import TiledFusedLogitsLoss

    batch = dict(batch)
    labels_Bs, shift_labels_Bs = batch.pop("labels"), batch.pop("shift_labels", None)
    if shift_labels_Bs is None:
        shift_labels_Bs = F.pad(labels_Bs, (0, 1), value=IGNORED_LABEL)[..., 1:]
    hidden_BsH = model.model(**batch, use_cache=False).last_hidden_state
    logit_bytes = 4 * shift_labels_Bs.numel() * model.lm_head.out_features
    shards = num_shards or max(1, math.ceil(logit_bytes / LOSS_SHARD_BYTES))

    def loss(self: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        logits = self.lm_head(x).float()
        return F.cross_entropy(logits.view(-1, logits.shape[-1]), y.view(-1), reduction="sum")

    total = TiledFusedLogitsLoss.apply(
        loss, model, hidden_BsH, shift_labels_Bs, None, shards, [model.lm_head.weight], "sum"
    )
    return total / (shift_labels_Bs != IGNORED_LABEL).sum()


def build(config: Any, num_layers: int, dtype: torch.dtype) -> Any:
    """Build a model from a config with another number of layers."""
    config.num_hidden_layers = num_layers
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:1] * num_layers
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa").train()


def second_step(model: Any, step: Callable[[Any], torch.Tensor], batch: dict[str, torch.Tensor]) -> Any:
    """Return a ledger of the second step and its live bytes after the forward; the first may set up state."""
    step(batch).backward()
    model.zero_grad()
    with Ledger(model) as ledger:
        with ledger.phase("forward"):
            loss = step(batch)
        kept = ledger.timeline[-1]
        loss.backward()
    return SimpleNamespace(ledger=ledger, kept=kept)
