"""Logits and loss of a shard: peak bytes and FLOPs with a share of the tokens trained.

The model has no layers: hidden states are the input, and only the norm and the head remain.

Legend: T tokens, H hidden size, V vocabulary.
"""

from contextlib import nullcontext
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from transformers import LlamaConfig

from benchmarks.tiles.systems import IGNORED_LABEL, build, put_tiles, second_step
from deepspeed_alst.config.schema import TiledLossConfig
from deepspeed_alst.core.patching import PatchSet
from deepspeed_alst.profiler.fake import Known, fake_world

SYSTEMS = ("whole", "upstream", "ours")


@dataclass(frozen=True)
class LossCase:
    """Sizes, and the tiles of both systems: upstream's shards and our budget."""

    name: str
    tokens: int
    hidden: int
    vocab: int
    is_real: bool = False
    num_shards: int | None = None
    budget: TiledLossConfig = field(default_factory=TiledLossConfig)


FAKE = LossCase("Llama-3.1-8B's head", 32768, 4096, 128256)
SCALED = LossCase("for real, 1/16", 4096, 256, 8016, True, 8, TiledLossConfig(tile_tokens=512))
SMALL = LossCase("for real, small", 512, 32, 997, True, 8, TiledLossConfig(tile_tokens=64))


def run(case: LossCase, system: str, trained: float) -> SimpleNamespace:
    """Run a step with this share of labelled tokens and return its ledger."""
    num_trained, sizes = round(case.tokens * trained), {"hidden_size": case.hidden, "intermediate_size": case.hidden}
    with nullcontext() if case.is_real else fake_world(1):
        config = LlamaConfig(
            **sizes,
            vocab_size=case.vocab,
            num_attention_heads=case.hidden // 32,
            max_position_embeddings=case.tokens,
        )
        model = build(config, 0, torch.bfloat16)
        hidden_1TH = torch.randn(1, case.tokens, case.hidden, dtype=torch.bfloat16, requires_grad=True)
        labels_1T = torch.full((1, case.tokens), IGNORED_LABEL)
        labels_1T[:, :num_trained] = 1
        batch = {"inputs_embeds": hidden_1TH, "labels": labels_1T, "shift_labels": labels_1T}
        with PatchSet() as undo, nullcontext() if case.is_real else Known(num_trained):
            step = put_tiles(model, system, undo, None, case.budget, num_shards=case.num_shards)
            return second_step(model, step, batch)


def peak_beyond_weights(ledger: Any) -> int:
    """Return the peak bytes beyond the weights, with the head's gradient."""
    return max(sample.total - sample.bytes["weights"] for sample in ledger.timeline)
