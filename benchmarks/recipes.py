"""Table of the ds_configs recipes: their purposes, and the bytes needed per GPU and host.

    python -m benchmarks.recipes

The tables are those of ds_configs/README.md and docs/multi_node.md. Everything is read from the JSON files and computed
from model shapes, not measured. The exit status is non-zero if a recipe breaks a rule (``problems``).

Legend: N parameters, P = sp_size, S tokens of a sequence, s = S/P, D head dim; GB are 1e9 bytes.
"""

import json
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.figures import Figure, Part, markdown, report
from benchmarks.tiles.shapes import REAL_SIZE, Shape
from deepspeed_alst.attention.head_plan import HeadPlan
from deepspeed_alst.cli.measure import Model
from deepspeed_alst.cli.memory import Machine, static_bytes
from deepspeed_alst.config.compatibility import value_at
from deepspeed_alst.config.schema import AlstConfig, parse

FOLDER = Path(__file__).parents[1] / "ds_configs"
GPU_GB = {"h100": 80.0, "h200": 141.0}
RANKS_PER_HOST = 8
# Per GPU and second: bytes to other hosts (a 400 Gb/s link each) and FLOPs (half of an H100's bf16 peak).
LINK_BYTES, FLOPS = 50e9, 500e12
_LENGTHS = {"128K": 2**17, "1M": 2**20, "8M": 2**23}
# Host memory of an 8-GPU node as in the paper (arXiv:2506.13996, section 5.2), also assumed for a single GPU.
HOST_GB = 1900.0
_SHAPES = {shape.name: shape for shape in REAL_SIZE}
_MODELS = {"llama-8b": "Llama-3.1-8B", "llama-70b": "Llama-3.1-70B", "qwen3-32b": "Qwen3-32B"}

# For the longest sequences: the optimizer's share of a GPU above which offloading it pays, the same for weights on a
# single GPU, and the share of host memory for states above which activations need a disk too.
OPTIMIZER_SHARE, WEIGHTS_SHARE, STATES_SHARE = 0.1, 0.15, 0.5

PURPOSES = {
    "sp1": "the demo without sequence parallelism: each rank a sample of its own",
    "sp2": "the demo: two ranks share a sequence, ZeRO 2, fp32",
    "sp2_zero3": "the same with ZeRO 3",
    "cpu-sp2-all": "the demo with everything on, on a machine without a GPU",
    "sp8_zero3_bf16": "one 8-GPU node per sequence; a multiple of 8 ranks are replicas",
    "sp8_zero3_bf16_offload": "the same for longer sequences",
    "trainer_sp1": "the HF Trainer's demo without sequence parallelism",
    "trainer_sp2": "the HF Trainer's demo, two ranks share a sequence",
    "trainer_sp8_zero3": "the HF Trainer, one 8-GPU node per sequence",
    "run-sp1-llama-8b-baseline": "correctness baseline without this package: 8 sequences a step, one on each GPU",
    "run-sp8-llama-8b": "the same with this package: the same 8 sequences a step, one after the other, each on 8 GPUs",
    "llama-8b-h100x8-baseline": "ablation 1: nothing of this package",
    "llama-8b-h100x8-loss": "ablation 2: and tiled logits and loss",
    "llama-8b-h100x8-loss-sp": "ablation 3: and sequence parallelism",
    "llama-8b-h100x8-loss-sp-mlp": "ablation 4: and tiled MLPs",
    "llama-8b-h100x8-loss-sp-offload": "ablation 5: 3 and layer inputs on the host",
    "llama-8b-h100x8": "ablation 6: all; the longest sequences on a node",
    **{
        f"{model}-{gpu}x{count}": f"the longest sequences on {count} x {gpu.upper()}"
        for model in _MODELS
        for gpu, counts in {"h100": (1, 8, 16, 32, 64), "h200": (1,)}.items()
        for count in counts
        # On one GPU the 70B's weights alone are 141 GB, and its host states 1.4 TB.
        if (model, count) not in {("llama-70b", 1), ("llama-8b", 8)}
    },
}
_PINNED = (
    "PyTorch pins host memory in powers of two. Of the bf16 gradients, one buffer a rank, that takes beyond the table, "
    "where it is\nmore than 20 GB:"
)
# Ranks of recipes whose name does not contain them.
_RANKS = {"sp1": 2, "sp2": 2, "sp2_zero3": 2, "cpu-sp2-all": 2, "trainer_sp1": 2, "trainer_sp2": 2}


@dataclass(frozen=True)
class Recipe:
    """One JSON file, with its ranks and model."""

    name: str
    ds_config: dict[str, Any]
    config: AlstConfig
    ranks: int
    gpu: str = ""
    """Key of GPU_GB; empty if the recipe is for any machine."""
    shape: Shape | None = None
    """Model shape; None if the recipe is for any model."""

    def zero(self, path: str, default: Any = None) -> Any:
        """Return a value of the zero_optimization block."""
        return value_at(self.ds_config, f"zero_optimization.{path}", default)

    @property
    def ranks_per_host(self) -> int:
        """Ranks per host, at most 8."""
        return min(self.ranks, RANKS_PER_HOST)

    def states(self) -> tuple[float, float]:
        """Return bytes of weights, gradients and optimizer of a recipe with a model: per GPU, and per host."""
        assert self.shape is not None and self.zero("stage") == 3, self.name
        on_host = [bool(self.zero(f"offload_{what}")) for what in ("optimizer", "param")]
        gpu, host = states(num_params(self.shape), self.ranks, *on_host)
        return gpu, host * self.ranks_per_host


def load(name: str) -> Recipe:
    """Read a recipe by its file name without ``.json``."""
    ds_config = json.loads((FOLDER / f"{name}.json").read_text())
    machine = next((part for part in name.split("-") if part.startswith(tuple(f"{gpu}x" for gpu in GPU_GB))), "")
    model = next((shape for key, shape in _MODELS.items() if key in name), "")
    gpu, _, ranks = machine.partition("x")
    gpu, shape = gpu or ("h100" if model else ""), _SHAPES[model] if model else None
    return Recipe(name, ds_config, parse(ds_config), int(ranks or _RANKS.get(name, RANKS_PER_HOST)), gpu, shape)


def num_params(shape: Shape) -> int:
    """Count a model's parameters: gated MLPs, RMSNorms, no biases, untied head; q and k norms for Qwen3."""
    keys = shape.keys
    hidden, heads, kv_heads = keys["hidden_size"], keys["num_attention_heads"], keys["num_key_value_heads"]
    D = head_dim(shape)
    attention = 2 * hidden * D * (heads + kv_heads) + (2 * D if shape.model_type == "qwen3" else 0)
    layer = attention + 3 * hidden * keys["intermediate_size"] + 2 * hidden
    return shape.num_layers * layer + 2 * keys["vocab_size"] * hidden + hidden


def head_dim(shape: Shape) -> int:
    """Return D."""
    return shape.keys.get("head_dim", shape.keys["hidden_size"] // shape.keys["num_attention_heads"])


def states(N: int, ranks: int, optimizer_on_host: bool, weights_on_host: bool) -> tuple[float, float]:
    """Compute bytes per rank on GPU and host of N parameters' states, under ZeRO 3 in bf16, as ``ds_alst plan`` does.

    A parameter has 2 bytes of weight, 2 of gradient and 12 of fp32 weight, momentum and variance. With the optimizer on
    the host the gradient is there too, plus 4 bytes of its fp32 copy, which the step reads.
    """
    on_host = {"offload_optimizer": optimizer_on_host, "offload_param": weights_on_host}
    zero = {"stage": 3, **{key: {"device": "cpu"} for key, is_there in on_host.items() if is_there}}
    ds_config = {"bf16": {"enabled": True}, "zero_optimization": zero}
    gpu, host = static_bytes(Model(N, 0), ds_config, Machine(ranks, 0, 0, ranks))
    return sum(gpu.get(key, 0) for key in ("weights", "gradients", "optimizer")), sum(host.values())


def activation_bytes(recipe: Recipe) -> float:
    """Return host bytes of layer inputs per token of the whole sequence; 0 without offload."""
    offload = recipe.config.alst.activation_checkpoint_cpu_offload
    if offload is None or recipe.shape is None:
        return 0.0
    layers = recipe.shape.num_layers - (1 if offload.keep_last is None else offload.keep_last)
    # A rank holds 1/P of its sequence; a host has several ranks.
    P = recipe.config.sequence_parallel_size
    return layers * recipe.shape.keys["hidden_size"] * 2 * recipe.ranks_per_host / P


def pinned_extra(recipe: Recipe) -> float:
    """Return GB per host beyond ``states``: PyTorch pins the bf16 gradient buffer as a power of two."""
    if recipe.shape is None or not recipe.zero("offload_optimizer.pin_memory"):
        return 0.0
    gradients = 2 * num_params(recipe.shape) / recipe.ranks
    return (2 ** math.ceil(math.log2(gradients)) - gradients) * recipe.ranks_per_host / 1e9


def row(recipe: Recipe) -> list[str]:
    """Return the recipe's table row."""
    alst, P = recipe.config.alst, recipe.config.sequence_parallel_size
    offload = alst.activation_checkpoint_cpu_offload
    features = {
        "loss": recipe.config.tiled_loss(),
        "MLP": alst.tiled_mlp_compute,
        "offload to host and disk" if offload and offload.nvme_path else "offload": offload,
    }
    on_host = {"optimizer": recipe.zero("offload_optimizer"), "weights": recipe.zero("offload_param")}
    cells = [f"`{recipe.name}.json`", PURPOSES[recipe.name], str(recipe.ranks), f"{P} x {recipe.ranks // P}"]
    cells += [str(recipe.zero("stage")), ", ".join(name for name, on in features.items() if on is not None) or "-"]
    cells += [", ".join(name for name, on in on_host.items() if on) or "-"]
    if recipe.shape is None:
        return [*cells, "-", "-", "-"]
    (gpu, host), waiting = recipe.states(), activation_bytes(recipe)
    texts = f"{host / 1e9:.0f}" if host else "-", f"{waiting * 1e6 / 1e9:.0f}" if waiting else "-"
    return [*cells, f"{gpu / 1e9:.1f}", *texts]


def table() -> str:
    """Format the recipes in Markdown."""
    head = ["file", "what it is for", "ranks", "SP x DP", "ZeRO", "tiled, offloaded", "on the host"]
    head += ["GB a GPU", "GB a host", "and each million tokens"]
    recipes = [load(name) for name in PURPOSES]
    lines = [f"- `{each.name}.json`: {extra:.0f} GB a host\n" for each in recipes if (extra := pinned_extra(each)) > 20]
    return markdown(head, [row(each) for each in recipes]) + f"\n{_PINNED}\n\n" + "".join(lines)


def crossing_bytes(shape: Shape, sp_size: int) -> int:
    """Return bytes per shard token leaving a host in a layer pass: q, k, v, output."""
    heads = [shape.keys[f"num_{kind}_heads"] for kind in ("attention", "key_value")]
    plan = HeadPlan(sp_size, *heads, node_size=RANKS_PER_HOST)
    per_rank = 2 * (plan.heads_per_rank + len(plan.kv_heads_of(0)) / plan.kv_parts) * head_dim(shape) * 2
    return max(0, sp_size - RANKS_PER_HOST) * round(per_rank)


def crossing_share(shape: Shape, sp_size: int, S: int) -> float:
    """Return a checkpointed layer's link time relative to its compute time, without overlap."""
    outside = 2 * shape.keys["vocab_size"] * shape.keys["hidden_size"]
    layer, s = (num_params(shape) - outside) / shape.num_layers, S / sp_size
    # 2 FLOPs per weight and token, 2 * S * width per token for causal attention. A backward is twice a forward, 2.5
    # times for attention; a checkpointed forward runs twice, attention once with its output kept.
    width = shape.keys["num_attention_heads"] * head_dim(shape)
    flops = s * (4 * 2 * layer + 3.5 * 2 * S * width)
    return (3 * crossing_bytes(shape, sp_size) * s / LINK_BYTES) / (flops / FLOPS)


def crossing_table() -> str:
    """Format bytes that leave the host under SP 16, 32 and 64, in Markdown."""
    rows = [
        [shape.name, str(P), f"{(P - RANKS_PER_HOST) / (P - 1):.2f}", f"{crossing_bytes(shape, P) / 1024:.0f}"]
        + [f"{crossing_share(shape, P, S):.1%}" for S in _LENGTHS.values()]
        for shape in (_SHAPES[name] for name in _MODELS.values())
        for P in (16, 32, 64)
        if shape.keys["num_attention_heads"] >= P
    ]
    head = ["model", "SP", "of the bytes sent, to other hosts", "KiB a token and pass"]
    return markdown([*head, *(f"{length} tokens" for length in _LENGTHS)], rows)


def problems(recipe: Recipe) -> list[str]:
    """Return the rules that a recipe with a model breaks."""
    if recipe.shape is None:
        return []
    N, memory, (gpu, host) = num_params(recipe.shape), GPU_GB[recipe.gpu] * 1e9, recipe.states()
    disk = getattr(recipe.config.alst.activation_checkpoint_cpu_offload, "nvme_path", None)
    optimizer_moves = 12 * N / recipe.ranks / memory > OPTIMIZER_SHARE
    weights_move = recipe.ranks == 1 and 2 * N / memory > WEIGHTS_SHARE
    rules = {
        "the optimizer belongs elsewhere": bool(recipe.zero("offload_optimizer")) == optimizer_moves,
        "the weights belong elsewhere": bool(recipe.zero("offload_param")) == weights_move,
        "layer inputs need a disk, or need none": bool(disk) == (host / 1e9 / HOST_GB > STATES_SHARE),
        "the states leave less than half of a GPU": gpu < memory / 2,
        "the states do not fit the host": host < HOST_GB * 1e9,
    }
    return [f"{recipe.name}: {what}" for what, kept in rules.items() if not kept]


def rules() -> Iterator[Figure]:
    """Yield the number of recipes that keep the rules, and those that break one."""
    broken = [line for name in PURPOSES for line in problems(load(name))]
    yield Figure("recipes", (str(len(PURPOSES)),), "all keep the rules", not broken, "; ".join(broken))


if __name__ == "__main__":
    print(table(), crossing_table(), sep="\n")
    sys.exit(report(__doc__, {"recipes": Part(rules)}))
