"""Computed cost of a sequence across hosts: bytes that leave a host, and their share of a layer's time.

``python -m benchmarks.recipes`` prints the table. Legend: P = sp_size, S tokens of a sequence, s = S/P, D head dim.
"""

from benchmarks.tiles.shapes import Shape
from deepspeed_alst.sequence_parallel.head_plan import HeadPlan

RANKS_PER_HOST = 8
# Per GPU and second: bytes to other hosts (a 400 Gb/s link each) and FLOPs (half of an H100's bf16 peak).
LINK_BYTES, FLOPS = 50e9, 500e12
_LENGTHS = {"128K": 2**17, "1M": 2**20, "8M": 2**23}


def num_params(shape: Shape) -> int:
    """Count a model's parameters: gated MLPs, RMSNorms, no biases, untied head; q and k norms for Qwen3."""
    keys = shape.keys
    hidden, heads, kv_heads = keys["hidden_size"], keys["num_attention_heads"], keys["num_key_value_heads"]
    D = keys.get("head_dim", hidden // heads)
    attention = 2 * hidden * D * (heads + kv_heads) + (2 * D if shape.model_type == "qwen3" else 0)
    layer = attention + 3 * hidden * keys["intermediate_size"] + 2 * hidden
    return shape.num_layers * layer + 2 * keys["vocab_size"] * hidden + hidden


def crossing_bytes(shape: Shape, sp_size: int) -> int:
    """Return bytes per shard token leaving a host in a layer pass: q, k, v, output."""
    keys = shape.keys
    heads = HeadPlan(sp_size, keys["num_attention_heads"], keys["num_key_value_heads"])
    D = keys.get("head_dim", keys["hidden_size"] // keys["num_attention_heads"])
    return max(0, sp_size - RANKS_PER_HOST) * 2 * (heads.heads_per_rank + heads.kv_heads_per_rank) * D * 2


def crossing_share(shape: Shape, sp_size: int, S: int) -> float:
    """Return a checkpointed layer's link time relative to its compute time, without overlap."""
    keys = shape.keys
    width = keys["num_attention_heads"] * keys.get("head_dim", keys["hidden_size"] // keys["num_attention_heads"])
    outside = 2 * keys["vocab_size"] * keys["hidden_size"]
    layer = (num_params(shape) - outside) / shape.num_layers
    s = S / sp_size
    # 2 FLOPs per weight and token, 2 * S * width per token for causal attention. A backward is twice a forward, 2.5
    # times for attention; a checkpointed forward runs twice, attention once with its output kept.
    flops = s * (4 * 2 * layer + 3.5 * 2 * S * width)
    return (3 * crossing_bytes(shape, sp_size) * s / LINK_BYTES) / (flops / FLOPS)


def crossing_table(shapes: list[Shape]) -> str:
    """Format bytes that leave the host under SP 16, 32 and 64, in Markdown."""
    rows = [
        [shape.name, str(P), f"{(P - RANKS_PER_HOST) / (P - 1):.2f}", f"{crossing_bytes(shape, P) / 1024:.0f}"]
        + [f"{crossing_share(shape, P, S):.1%}" for S in _LENGTHS.values()]
        for shape in shapes
        for P in (16, 32, 64)
        if shape.keys["num_attention_heads"] >= P
    ]
    head = ["model", "SP", "of the bytes sent, to other hosts", "KiB a token and pass"]
    return markdown([*head, *(f"{length} tokens" for length in _LENGTHS)], rows)


def markdown(head: list[str], rows: list[list[str]]) -> str:
    """Format a Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)
