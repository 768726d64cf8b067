"""Time of a step in memory-lean layers beside the ordinary path and DeepSpeed's own ALST, on 2 gloo ranks.

2 layers of hidden size 512, 8 heads of 64 and 4 KV heads, in fp32, one thread a rank, with the tiles and the offload of
layer inputs of benchmarks/memory.py. The systems take turns; times are CPU seconds of both ranks, to which load on the
machine adds nothing.
"""

import statistics
import time
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.figures import Figure, Part
from benchmarks.ranks import Ranks
from deepspeed_alst.config.schema import MemoryLeanConfig
from deepspeed_alst.core.patching import PatchSet

# transformers and deepspeed are imported in the functions, after benchmarks.ranks has set the environment.

LENGTHS = (8192, 16384)
MOST = 0.75
_RANKS, _ROUNDS, _VOCAB = 2, 5, 512
_LEAN, _ORDINARY, _DEEPSPEED = "memory-lean", "ordinary path", "DeepSpeed's ALST"
_model: tuple[Any, Any] | None = None  # of this rank process: the model and its step


def put(system: str, chunk_tokens: int) -> None:
    """Build the model with a system, memory-lean layers in chunks of so many tokens. Runs on all ranks."""
    global _model
    from transformers import LlamaConfig

    from benchmarks.memory import host_store, put_deepspeeds, put_ours
    from benchmarks.tiles.systems import build

    sizes = {"hidden_size": 512, "intermediate_size": 1792, "num_attention_heads": 8, "num_key_value_heads": 4}
    config = LlamaConfig(**sizes, vocab_size=_VOCAB, num_hidden_layers=2, max_position_embeddings=LENGTHS[-1])
    model, undo = build(config, 2, torch.float32).train(), PatchSet()
    if system == _DEEPSPEED:
        step = put_deepspeeds(model, _RANKS, undo)
    else:
        lean = MemoryLeanConfig(chunk_tokens=chunk_tokens) if system == _LEAN else None
        step = put_ours(model, _RANKS, undo, lean=lean, store=host_store(undo))
    _model = model, step


def seconds(length: int) -> float:
    """Return the CPU seconds of one step on this rank's shard of a sequence. Runs on all ranks."""
    begin = time.process_time()
    _step(length)
    return time.process_time() - begin


def _step(length: int) -> None:
    assert _model is not None
    (model, step), s = _model, length // _RANKS
    positions = torch.arange(dist.get_rank() * s, (dist.get_rank() + 1) * s)[None]
    ids = positions.remainder(_VOCAB)
    batch = {"input_ids": ids, "position_ids": positions, "labels": ids, "shift_labels": ids}
    model.zero_grad()
    step(batch).backward()


def rows() -> Iterator[Figure]:
    """Yield a row for each length and chunk size."""
    for length in LENGTHS:
        for name, chunk_tokens in (("by default", 8192), ("4 chunks a shard", length // _RANKS // 4)):
            with ExitStack() as stack:
                ranks = {each: stack.enter_context(Ranks(_RANKS)) for each in (_LEAN, _ORDINARY, _DEEPSPEED)}
                for system, each in ranks.items():
                    each.run(put, system, chunk_tokens)
                    each.run(seconds, length // 8)  # warm-up
                rounds = [[sum(each.run(seconds, length)) for each in ranks.values()] for _ in range(_ROUNDS)]
            medians = (f"{statistics.median(each):.2f}" for each in zip(*rounds, strict=True))
            of_ordinary, ratio = (statistics.median(each[0] / each[other] for each in rounds) for other in (1, 2))
            values = (*medians, f"{of_ordinary:.3f}", f"{ratio:.3f}")
            yield Figure(f"{length:,} tokens, {name}", values, f"<= {MOST}", ratio <= MOST)


_CAPTION = (
    "Median of 5 rounds of steps, CPU seconds of 2 ranks. By count 0.78 to 0.81: matrix FLOPs are 1.26 of a plain "
    "step's against 1.56, attention runs forward once against twice, beside a backward of 2.5 forwards in both."
)
PART = Part(rows, (*(f"{each}, s" for each in (_LEAN, _ORDINARY, _DEEPSPEED)), "of ordinary", "of ALST"), _CAPTION)
