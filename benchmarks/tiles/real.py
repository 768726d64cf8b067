"""Measurements that need real tensors: bf16 weight gradient errors of tiles, and step times."""

import functools
import statistics
import time
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP

from benchmarks.tiles.systems import System, build, second_step
from deepspeed_alst.config.schema import TiledMLPConfig
from deepspeed_alst.core.patching import PatchSet
from deepspeed_alst.tiling.tiled_module import TiledModule

TILES = (1, 4, 16, 64, 128)
_ROWS, _HIDDEN, _INNER = 2048, 256, 704
OURS = System("ours", "non-reentrant")
TIMED = (System("untiled", "non-reentrant"), OURS, System("upstream", "reentrant"))
TOKENS = 2048


def gradient_errors(tiles: tuple[int, ...] = TILES) -> dict[str, list[float]]:
    """Return the largest bf16 weight gradient error of an MLP against fp64, by system and tile count."""
    config = LlamaConfig(hidden_size=_HIDDEN, intermediate_size=_INNER, num_attention_heads=4)
    torch.manual_seed(1)
    module = LlamaMLP(config).bfloat16()
    x, seed = (torch.randn(1, _ROWS, _HIDDEN).bfloat16() for _ in range(2))
    truth = LlamaMLP(config).double()
    truth.load_state_dict({name: param.double() for name, param in module.state_dict().items()})
    truth(x.double()).backward(seed.double())
    exact = [param.grad for param in truth.parameters()]

    def error(output: torch.Tensor) -> float:
        module.zero_grad()
        output.backward(seed)
        pairs = zip(module.parameters(), exact, strict=True)
        return max(((param.grad.double() - true).norm() / true.norm()).item() for param, true in pairs)

    found: dict[str, list[float]] = {"ours": [], "upstream": []}
    for count in tiles:
        found["ours"].append(error(TiledModule("mlp", module).tiled(_ROWS // count, x.clone().requires_grad_())))
        found["upstream"].append(error(_upstream(module, x.clone().requires_grad_(), count)))
    return found


def _upstream(module: Any, x: torch.Tensor, shards: int) -> torch.Tensor:
    from deepspeed.runtime.sequence_parallel.ulysses_sp import TiledMLP

    return TiledMLP.apply(
        lambda self, tile: type(self).forward(self, tile), module, x, shards, list(module.parameters())
    )


def step_times(rounds: int = 5) -> tuple[dict[str, float], dict[str, float]]:
    """Return median step seconds and FLOPs with attention, by system; 2 threads, systems alternate."""
    keys = {"hidden_size": 1024, "intermediate_size": 3584, "num_attention_heads": 8, "num_key_value_heads": 2}
    config = LlamaConfig(**keys, vocab_size=256, max_position_embeddings=TOKENS)
    ids = torch.arange(TOKENS).remainder(256)[None]
    batch = {"input_ids": ids, "labels": ids}
    seconds: dict[str, list[float]] = {system.name: [] for system in TIMED}
    flops, threads = {}, torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with PatchSet() as stay:
            # Our patches stay on a separate model, since they keep state; DeepSpeed's are on a class.
            models = {system.name: build(config, 1, torch.float32) for system in TIMED}
            ours = stay.enter_context(_on(OURS, models[OURS.name]))
            contexts = {
                system.name: functools.partial(_on, system, models[system.name])
                if system is not OURS
                else (lambda: nullcontext(ours))
                for system in TIMED
            }
            for name, context in contexts.items():
                with context() as step:
                    flops[name] = second_step(models[name], step, batch).ledger.flops.total()
            for index in range(rounds):
                # Rotate the order, so that load on the machine affects all systems equally.
                for system in TIMED[index % 3 :] + TIMED[: index % 3]:
                    with contexts[system.name]() as step:
                        seconds[system.name].append(_timed(models[system.name], step, batch))
    finally:
        torch.set_num_threads(threads)
    return {name: statistics.median(each) for name, each in seconds.items()}, flops


def _on(system: System, model: Any) -> AbstractContextManager[Any]:
    """Patch the model with two MLP tiles in both systems, as upstream's rule gives."""
    return system.on(model, mlp=TiledMLPConfig(tile_tokens=TOKENS // 2))


def _timed(model: Any, step: Any, batch: dict[str, torch.Tensor]) -> float:
    model.zero_grad()
    started = time.perf_counter()
    step(batch).backward()
    return time.perf_counter() - started
