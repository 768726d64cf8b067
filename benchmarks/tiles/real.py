"""Measurements on real tensors: gathers and reduce hooks under ZeRO-3, bf16 weight gradients, and step times."""

import functools
import time
from collections import Counter
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.figures import in_turns
from deepspeed_alst.core.patching import PatchSet

# deepspeed and transformers are imported in the functions, after benchmarks.ranks has set the environment.

WORLD_SIZE = 2
GATHER_TILES, GRADIENT_TILES = (1, 4, 64), (1, 4, 16, 64, 128)
_SAMPLE, _STEPS = 64, 2
_ROWS, _HIDDEN, _INNER = 2048, 256, 704
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


def gathers(system: str, tiles: int) -> tuple[int, float]:
    """Return this rank's all-gathers in the last step, and hook calls per MLP weight in it.

    Each rank has its own sample, so only ZeRO issues collectives.
    """
    import deepspeed
    from transformers import LlamaConfig

    from benchmarks.tally import Tally
    from benchmarks.tiles.systems import build, put_tiles
    from deepspeed_alst.config.schema import TiledLossConfig, TiledMLPConfig
    from deepspeed_alst.tiling.zero3_leaf import ZeRO3Leaves

    keys = {"hidden_size": 32, "intermediate_size": 56, "num_attention_heads": 4, "num_key_value_heads": 2}
    tally, fired = Tally(), Counter()
    with PatchSet() as undo:
        model = build(LlamaConfig(**keys, vocab_size=97), 2, torch.float32)
        model.gradient_checkpointing_enable({"use_reentrant": system == "upstream"})
        model.enable_input_require_grads()
        size, leaf = {"tile_tokens": _SAMPLE // tiles}, ZeRO3Leaves(model, 3, undo)
        budgets = TiledMLPConfig(**size), TiledLossConfig(**size)
        step = put_tiles(model, system, undo, *budgets, num_shards=tiles, leaf=leaf)
        if system == "upstream":
            model.forward = lambda use_cache, **batch: SimpleNamespace(loss=step(batch))
        weights = [param for name, param in model.named_parameters() if ".mlp." in name]
        engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=_CONFIG)
        for param in weights:
            param.register_post_accumulate_grad_hook(lambda param: fired.update([id(param)]))
        ids = torch.randint(97, (1, _SAMPLE), generator=torch.Generator().manual_seed(dist.get_rank()))
        undo.enter_context(tally.installed())
        for index in range(_STEPS):
            fired.clear()
            with tally.phase(f"step {index}"):
                engine.backward(engine(input_ids=ids, labels=ids, use_cache=False).loss)
            engine.step()
        engine.destroy()
    last = [each for each in tally.of(f"step {_STEPS - 1}") if "gather" in each.name]
    return len(last), sum(fired.values()) / len(weights)


def gradient_errors(tiles: tuple[int, ...] = GRADIENT_TILES) -> dict[str, list[float]]:
    """Return the largest bf16 weight gradient error of an MLP against fp64, by system and tile count."""
    from deepspeed.runtime.sequence_parallel.ulysses_sp import TiledMLP
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaMLP

    from deepspeed_alst.tiling.tiled_module import TiledModule

    config = LlamaConfig(hidden_size=_HIDDEN, intermediate_size=_INNER, num_attention_heads=4)
    torch.manual_seed(1)
    module = LlamaMLP(config).bfloat16()
    x, seed = (torch.randn(1, _ROWS, _HIDDEN).bfloat16() for _ in range(2))
    truth = LlamaMLP(config).double()
    truth.load_state_dict({name: param.double() for name, param in module.state_dict().items()})
    truth(x.double()).backward(seed.double())
    exact, weights = [param.grad for param in truth.parameters()], list(module.parameters())

    def error(output: torch.Tensor) -> float:
        module.zero_grad()
        output.backward(seed)
        return max(
            ((param.grad.double() - true).norm() / true.norm()).item()
            for param, true in zip(weights, exact, strict=True)
        )

    found: dict[str, list[float]] = {"ours": [], "upstream": []}
    for count in tiles:
        leaf = x.clone().requires_grad_()
        found["ours"].append(error(TiledModule("mlp", module).run_tiled(_ROWS // count, leaf)))
        found["upstream"].append(error(TiledMLP.apply(LlamaMLP.forward, module, leaf, count, weights)))
    return found


def step_times(rounds: int = 5) -> tuple[list[float], list[float]]:
    """Return median step seconds and FLOPs with attention: untiled, ours, upstream's; 2 threads, in turns."""
    from transformers import LlamaConfig

    from benchmarks.tiles.systems import System, build, second_step
    from deepspeed_alst.config.schema import TiledMLPConfig

    keys = {"hidden_size": 1024, "intermediate_size": 3584, "num_attention_heads": 8, "num_key_value_heads": 2}
    config = LlamaConfig(**keys, vocab_size=256, max_position_embeddings=_ROWS)
    ids = torch.arange(_ROWS).remainder(256)[None]
    batch: dict[str, Any] = {"input_ids": ids, "labels": ids}
    systems = (System("untiled", "non-reentrant"), System("ours", "non-reentrant"), System("upstream", "reentrant"))
    # Two MLP tiles in both systems, as upstream's rule gives.
    budget = TiledMLPConfig(tile_tokens=_ROWS // 2)
    steps, flops = {}, []

    def run(model: Any, step: Any) -> None:
        model.zero_grad()
        step(batch).backward()

    threads = torch.get_num_threads()
    with PatchSet() as undo:
        torch.set_num_threads(2)
        undo.callback(torch.set_num_threads, threads)
        for each in systems:
            model = build(config, 1, torch.float32)
            step = undo.enter_context(each.on(model, 1, budget))
            steps[each.name] = functools.partial(run, model, step)
            flops.append(second_step(model, step, batch).ledger.flops.total())
        seconds = in_turns(steps, rounds, time.perf_counter)
    return list(seconds.values()), flops
