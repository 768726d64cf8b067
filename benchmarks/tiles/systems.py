"""Systems under comparison, each patched onto a model and removed again, and one step under a ledger.

All use the same attention (ours under sequence parallelism, else the model's own). DeepSpeed's tiles are applied as in
ArcticTraining: MLP or MoE block in ``ceil(tokens / hidden size)`` shards, the loss in shards of 1 GiB of fp32 logits.

Legend: B batch, s tokens of this rank's shard, V vocabulary.
"""

import functools
import math
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

from deepspeed_alst.config.schema import AlstConfig, TiledLossConfig, TiledMLPConfig
from deepspeed_alst.core.forward_context import ForwardContext
from deepspeed_alst.core.hf_model_spec import ModelSpec
from deepspeed_alst.core.patching import PatchSet
from deepspeed_alst.liger.hf_liger import use_liger_without_data
from deepspeed_alst.profiler.ledger import Ledger
from deepspeed_alst.sequence_parallel.feature import patch_model
from deepspeed_alst.tiling.tiled_loss import patch_unsharded_loss, tile_loss
from deepspeed_alst.tiling.tiled_mlp import tile_mlps

aten = torch.ops.aten
IGNORED_LABEL = -100
LOSS_SHARD_BYTES = 2**30
Step = Callable[[dict[str, torch.Tensor]], torch.Tensor]


NORMS_AND_ROPE = {"swiglu": False}
"""``alst.liger_kernel``: RMSNorm and rotary embedding."""


class System:
    """Tiles (untiled, upstream or ours) and checkpointing (none, non-reentrant or reentrant).

    ``liger`` is a value of ``alst.liger_kernel``; on fake tensors its functions allocate, and nothing is launched.
    """

    def __init__(self, tiles: str, checkpointing: str = "", liger: Any = False) -> None:
        self.tiles, self.checkpointing = tiles, checkpointing
        self.keys = AlstConfig.model_validate({"alst": {"liger_kernel": liger}})
        self.name = f"{tiles}, {checkpointing or 'no checkpoints'}"

    @contextmanager
    def on(self, model: torch.nn.Module, sp_size: int = 1, mlp: TiledMLPConfig | None = None) -> Iterator[Step]:
        """Patch the model and yield ``step(batch)``, which returns the loss; ``mlp`` is our tile budget."""
        with PatchSet() as undo:
            use_liger_without_data(ModelSpec(model), self.keys, undo)
            if self.checkpointing:
                model.activation_checkpointing_enable({"use_reentrant": self.checkpointing == "reentrant"})
                model.enable_input_require_grads()
                undo.callback(model.disable_input_require_grads)
                undo.callback(model.activation_checkpointing_disable)
            calls = ForwardContext()
            if sp_size > 1:
                patch_model(ModelSpec(model), dist.group.WORLD, undo, calls)
            yield put_tiles(model, self.tiles, undo, mlp or TiledMLPConfig(), calls=calls, sp_size=sp_size)


def put_tiles(
    model: Any,
    tiles: str,
    undo: PatchSet,
    mlp: TiledMLPConfig | None,
    loss: TiledLossConfig | None = None,
    *,
    num_shards: int | None = None,
    leaf: Callable[[Any], None] = lambda module: None,
    calls: ForwardContext | None = None,
    sp_size: int = 1,
) -> Step:
    """Put a system's tiles on a model and return ``step(batch)``, its loss; ``num_shards`` is upstream's."""
    calls = calls or ForwardContext()
    if sp_size == 1:
        undo.enter_context(_without_mask(model))
    if tiles == "upstream":
        calls.inside = True  # its loss calls the decoder directly
        for layer in model.model.layers:
            undo.set(layer.mlp, "forward", functools.partial(_upstream_mlp, layer.mlp, layer.mlp.forward, num_shards))
        return lambda batch: _upstream_loss(model, batch, num_shards)
    if tiles == "ours":
        if mlp is not None:
            tile_mlps(ModelSpec(model), mlp, leaf, undo)
        tile_loss(ModelSpec(model), loss or TiledLossConfig(), calls, leaf, undo)
        if sp_size == 1:
            patch_unsharded_loss(ModelSpec(model), undo)
    return lambda batch: model(**batch, use_cache=False).loss


@contextmanager
def _without_mask(model: torch.nn.Module) -> Iterator[None]:
    """Omit the S x S mask, which transformers omits for unpacked real tensors only."""
    module = sys.modules[type(model).__module__]
    name = "create_sliding_window_causal_mask" if not hasattr(module, "create_causal_mask") else "create_causal_mask"
    with mock.patch.object(module, name, lambda **_: None):
        yield


def _upstream_mlp(module: Any, original: Any, num_shards: int | None, x: torch.Tensor) -> torch.Tensor:
    from deepspeed.runtime.sequence_parallel.ulysses_sp import TiledMLP

    # An MoE block takes only [B, s, hidden], but the backward's shards are flat.
    def whole(_: Any, x: torch.Tensor) -> torch.Tensor:
        return original(x if x.dim() == 3 else x.unsqueeze(0)).view_as(x)

    shards = num_shards or math.ceil(x.shape[-2] / x.shape[-1])
    return TiledMLP.apply(whole, module, x, shards, list(module.parameters()))


def _upstream_loss(model: Any, batch: dict[str, torch.Tensor], num_shards: int | None) -> torch.Tensor:
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


class ForwardRows(TorchDispatchMode):
    """Rows multiplied with each linear weight in forward direction, by parameter name: recomputation and tiles too."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.rows: Counter[str] = Counter()
        self._matrices = {_place(x): (name, x.stride()) for name, x in model.named_parameters() if x.dim() == 2}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count a matmul: the forward uses the transposed weight, the input gradient the weight itself."""
        if getattr(func, "overloadpacket", None) in (aten.mm, aten.addmm, aten.bmm):
            x, weight = args[-2:]
            name, stride = self._matrices.get(_place(weight), ("", ()))
            if name and weight.stride()[-2:] == stride[::-1]:
                self.rows[name] += x.shape[:-1].numel()
        return func(*args, **(kwargs or {}))


def _place(x: torch.Tensor) -> tuple[int, int]:
    return x.untyped_storage()._cdata, int(x.storage_offset())


def second_step(model: Any, step: Step, batch: dict[str, torch.Tensor]) -> Any:
    """Return a ledger of the second step, live bytes after its forward, and rows; the first may set up state."""
    step(batch).backward()
    model.zero_grad()
    with ForwardRows(model) as forward, Ledger(model) as ledger:
        loss = step(batch)
        kept = ledger.timeline[-1]
        loss.backward()
    return SimpleNamespace(ledger=ledger, kept=kept, rows=forward.rows)
