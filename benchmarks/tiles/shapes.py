"""Real-size models on fake tensors and small ones on real ranks: layer memory, step FLOPs, MLP forwards.

Legend: s tokens of one rank's shard, P = sp_size.
"""

import tempfile
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist
from transformers import CONFIG_MAPPING

from benchmarks.tiles.systems import System, build, second_step
from deepspeed_alst.cli.measure import measure as planned
from deepspeed_alst.config.schema import TiledMLPConfig, parse
from deepspeed_alst.profiler.fake import Known, fake_ranks, fake_world

GATED = 1.25, 1.24
OTHER = 1.34, 1.34
BASELINE = System("untiled")
SYSTEMS = (System("untiled", "non-reentrant"), System("upstream", "reentrant"), System("ours", "non-reentrant"))


@dataclass(frozen=True)
class Shape:
    """One model, and the tokens of a rank's shard."""

    name: str
    model_type: str
    num_layers: int
    keys: dict[str, Any]
    tokens: int = 32768
    is_real: bool = False
    most: tuple[float, float] = GATED
    """FLOP limits of a layer and of the model, relative to no tiles and no checkpoints."""
    mlp: TiledMLPConfig = field(default_factory=TiledMLPConfig)

    def config(self) -> Any:
        """Build the model's config."""
        keys = {"max_position_embeddings": 8 * self.tokens, "num_hidden_layers": self.num_layers, **self.keys}
        return CONFIG_MAPPING[self.model_type](**keys, pad_token_id=None)

    def measured(self, ds_config: dict[str, Any]) -> Any:
        """Return the model's sizes and layers as ``ds_alst plan`` measures them."""
        with tempfile.TemporaryDirectory() as folder:
            self.config().to_json_file(f"{folder}/config.json")
            return planned(f"{folder}/config.json", parse(ds_config))


def _keys(*sizes: int, **more: Any) -> dict[str, Any]:
    names = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "vocab_size")
    return {**dict(zip(names, sizes, strict=True)), **more}


_A3B = {"head_dim": 128, "moe_intermediate_size": 768, "num_experts": 128, "num_experts_per_tok": 8}
REAL_SIZE = (
    Shape("Llama-3.1-8B", "llama", 32, _keys(4096, 14336, 32, 8, 128256)),
    Shape("Llama-3.1-70B", "llama", 80, _keys(8192, 28672, 64, 8, 128256)),
    Shape("Qwen3-32B", "qwen3", 64, _keys(5120, 25600, 64, 8, 151936, head_dim=128)),
    Shape("Qwen3-30B-A3B", "qwen3_moe", 48, _keys(2048, 6144, 32, 4, 151936, **_A3B), most=OTHER),
    Shape("StarCoder2-15B", "starcoder2", 40, _keys(6144, 24576, 48, 4, 49152), most=OTHER),
)
_SMALL = {"tokens": 1024, "is_real": True, "mlp": TiledMLPConfig(tile_tokens=256)}
_TINY_MOE = {"head_dim": 32, "moe_intermediate_size": 96, "num_experts": 8, "num_experts_per_tok": 2}
SCALED = (
    Shape("Llama, 1/16", "llama", 2, _keys(256, 896, 8, 2, 512), **_SMALL),
    Shape("Qwen3-MoE, 1/8", "qwen3_moe", 2, _keys(256, 768, 8, 2, 512, **_TINY_MOE), most=OTHER, **_SMALL),
)


@dataclass(frozen=True)
class Found:
    """Results of one system on one shape."""

    layer_peak: float
    """Peak bytes per token beyond the weights in a one-layer model's layer; gradients included."""
    kept: float
    """Bytes per token and layer between forward and backward."""
    layer_flops: int
    model_flops: int
    forwards: tuple[float, float]
    """Forwards of the MLP's first and last matrix; zeros if the weights are stacked."""


def measure(shape: Shape, sp_size: int, system: System) -> Found:
    """Measure a system on one rank of ``sp_size``; a layer is a 2-layer minus a 1-layer model."""
    one, two = (step_of(replace(shape, num_layers=count), sp_size, system) for count in (1, 2))
    layer = two.ledger.matmul_flops - one.ledger.matmul_flops
    in_layers = [each for each in one.ledger.timeline if each.moment.module.startswith("model.layers.")]
    of_mlp = [rows / shape.tokens for name, rows in one.rows.items() if ".mlp." in name and ".gate." not in name]
    return Found(
        max(sample.total - sample.bytes["weights"] for sample in in_layers) / shape.tokens,
        (_activations(two.kept) - _activations(one.kept)) / shape.tokens,
        layer,
        one.ledger.matmul_flops + (shape.num_layers - 1) * layer,
        (of_mlp[0], of_mlp[-1]) if of_mlp else (0.0, 0.0),
    )


def step_of(shape: Shape, sp_size: int, system: System) -> Any:
    """Return a ledger of the system's second step on one rank of ``sp_size`` (systems.second_step)."""
    # Inside real ranks the process group exists; else this process simulates one of them.
    world = (nullcontext if dist.is_initialized() else fake_ranks) if shape.is_real else fake_world
    experts = shape.keys.get("num_experts", 1)
    per_expert = shape.tokens * shape.keys.get("num_experts_per_tok", 1) // experts
    with world(sp_size):
        model = build(shape.config(), shape.num_layers, torch.float32 if shape.is_real else torch.bfloat16)
        ids = torch.arange(shape.tokens).remainder(shape.config().vocab_size)[None]
        batch = {"input_ids": ids, "position_ids": torch.arange(shape.tokens)[None], "labels": ids}
        if sp_size > 1:
            batch["shift_labels"] = ids
        with system.on(model, sp_size, shape.mlp) as step:
            if shape.is_real:
                return second_step(model, step, batch)
            with Known(shape.tokens, per_expert):
                return second_step(model, step, batch)


def _activations(sample: Any) -> int:
    return sample.total - sample.bytes["weights"] - sample.bytes["gradients"]
