"""All-gathers and reduce hook calls per step under ZeRO-3, on 2 gloo ranks, by number of tiles.

Each rank has its own sample, so only ZeRO issues collectives. Legend: S tokens of a sample.
"""

from collections import Counter
from typing import Any

import torch
import torch.distributed as dist

from deepspeed_alst.core.patching import PatchSet

# The ranks import deepspeed and transformers after benchmarks.ranks has set their environment.

WORLD_SIZE = 2
TILES = (1, 4, 64)
S = 64
_STEPS = 2
_CONFIG = {
    "train_micro_batch_size_per_gpu": 1,
    "optimizer": {"type": "SGD", "params": {"lr": 0.1}},
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
    "steps_per_print": 10**9,
    # Without prefetch and persistent parameters, every use of a weight is a separate all-gather.
    "zero_optimization": {
        "stage": 3,
        "stage3_param_persistence_threshold": 0,
        "stage3_prefetch_bucket_size": 0,
        "stage3_max_reuse_distance": 0,
    },
}


def measure(system: str, tiles: int) -> tuple[int, float]:
    """Return this rank's all-gathers in the last step, and hook calls per MLP weight in it."""
    import deepspeed
    from transformers import LlamaConfig

    from benchmarks.tally import Tally
    from benchmarks.tiles.systems import build, without_mask

    keys = {"hidden_size": 32, "intermediate_size": 56, "num_attention_heads": 4, "num_key_value_heads": 2}
    tally, fired = Tally(), Counter()
    with PatchSet() as undo:
        model = build(LlamaConfig(**keys, vocab_size=97), 2, torch.float32)
        model.gradient_checkpointing_enable({"use_reentrant": system == "upstream"})
        model.enable_input_require_grads()
        undo.enter_context(without_mask(model))
        _tile(model, system, tiles, undo)
        weights = [param for name, param in model.named_parameters() if ".mlp." in name]
        engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=_CONFIG)
        for param in weights:
            param.register_post_accumulate_grad_hook(lambda param: fired.update([id(param)]))
        make = torch.Generator().manual_seed(dist.get_rank())
        ids = torch.randint(97, (1, S), generator=make)
        undo.enter_context(tally.installed())
        for step in range(_STEPS):
            fired.clear()
            with tally.phase(f"step {step}"):
                engine.backward(engine(input_ids=ids, labels=ids, use_cache=False).loss)
            engine.step()
        engine.destroy()
    last = [each for each in tally.of(f"step {_STEPS - 1}") if "gather" in each.name]
    return len(last), sum(fired.values()) / len(weights)


def _tile(model: Any, system: str, tiles: int, undo: PatchSet) -> None:
    """Tile MLP and loss, as each system does before an engine is built."""
    from types import SimpleNamespace

    from benchmarks.tiles.systems import upstream_loss, upstream_mlps
    from deepspeed_alst.config.schema import TiledLossConfig, TiledMLPConfig
    from deepspeed_alst.sequence_parallel.forward_context import ForwardContext
    from deepspeed_alst.tiling.tiled_loss import replace_whole_loss, tile_loss
    from deepspeed_alst.tiling.tiled_mlp import tile_mlps
    from deepspeed_alst.tiling.zero3_leaf import ZeRO3Leaves

    if system == "upstream":
        undo.enter_context(upstream_mlps(model, tiles))

        def forward(use_cache: bool, **batch: torch.Tensor) -> SimpleNamespace:
            return SimpleNamespace(loss=upstream_loss(model, batch, tiles))

        model.forward = forward
        return
    leaves = ZeRO3Leaves(model, 3, undo)
    tile_mlps(model, TiledMLPConfig(tile_tokens=S // tiles), leaves, undo)
    tile_loss(model, TiledLossConfig(tile_tokens=S // tiles), ForwardContext(), leaves, undo)
    replace_whole_loss(model, undo)
