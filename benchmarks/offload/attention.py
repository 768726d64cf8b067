"""Step time and attention forwards of a checkpointed Llama with and without kept attention.

2 layers, hidden 512, 8 heads of 64, fp32 on CPU without sequence parallelism. Both variants alternate in one process on
one thread; times are CPU time of the faster round, since load on the machine only adds to it.
"""

import time
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig

from benchmarks.cells import build_model
from benchmarks.figures import Figure, one_thread
from deepspeed_alst.attention.attention_cache import CheckpointFrame
from deepspeed_alst.attention.hf_one_rank import cache_attention
from deepspeed_alst.core.patching import PatchSet

LENGTHS = (8192, 16384)
LAYERS = 2
ROUNDS = 2
# Tolerance of the measured over the predicted ratio of the two steps.
SLACK = 0.05
_FORWARD = "aten::_scaled_dot_product_flash_attention_for_cpu"


class Clock(TorchDispatchMode):
    """Dispatch mode that records the CPU seconds of each attention call, forward and backward."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds: dict[str, list[float]] = defaultdict(list)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        if not name.startswith(_FORWARD):
            return func(*args, **(kwargs or {}))
        begin = time.thread_time()
        result = func(*args, **(kwargs or {}))
        self.seconds["forward" if name == _FORWARD else "backward"].append(time.thread_time() - begin)
        return result


def checkpointed(keeps: bool, length: int) -> torch.nn.Module:
    """Build the model with each layer run in a frame."""
    sizes = {"vocab_size": 512, "hidden_size": 512, "intermediate_size": 512, "num_attention_heads": 8}
    model = build_model(LlamaConfig(**sizes, num_hidden_layers=LAYERS, max_position_embeddings=length))
    if keeps:
        cache_attention(model, PatchSet())

    def in_frame(function: Any, *args: Any) -> Any:
        frame = CheckpointFrame(saves_attention=keeps)

        def run(*args: Any) -> Any:
            with frame.running():
                return function(*args)

        return checkpoint(run, *args, use_reentrant=False)

    for layer in model.model.layers:
        layer.gradient_checkpointing, layer._gradient_checkpointing_func = True, in_frame
    return model.train()


def step(model: torch.nn.Module, ids: torch.Tensor) -> tuple[float, Clock]:
    """Return the seconds of a forward and backward, and the clock of attention in it."""
    model.zero_grad()
    begin = time.thread_time()
    with Clock() as clock:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    return time.thread_time() - begin, clock


def of_length(length: int) -> Iterator[Figure]:
    """Yield the rows of one sequence length."""
    models = {keeps: checkpointed(keeps, length) for keeps in (False, True)}
    ids = torch.randint(0, 512, (1, length), generator=torch.Generator().manual_seed(0))
    for model in models.values():
        step(model, ids[:, :256])  # warm-up
    found: dict[bool, list[tuple[float, Clock]]] = {False: [], True: []}
    for round in range(ROUNDS):
        for keeps in (False, True) if round % 2 else (True, False):
            found[keeps].append(step(models[keeps], ids))
    (plain, clock), (kept, _) = (min(found[keeps], key=lambda one: one[0]) for keeps in (False, True))
    # From the same step, as machine speed varies between steps; it ran each layer's forward twice.
    forward, backward = sum(clock.seconds["forward"]) / 2, sum(clock.seconds["backward"])
    ratio, predicted = kept / plain, 1 - forward / plain
    runs = {keeps: len(each[0][1].seconds["forward"]) / LAYERS for keeps, each in found.items()}
    name = f"{length:,} tokens"
    yield Figure(f"{name}: attention of all layers, forward and backward", (f"{forward:.2f} s, {backward:.2f} s",))
    yield Figure(f"{name}: a step without", (f"{plain:.2f} s",))
    target = f"<= {predicted:.3f} by attention's own times, + {SLACK}"
    yield Figure(f"{name}: a step with kept attention, of it", (f"{ratio:.3f}",), target, ratio <= predicted + SLACK)
    texts = (f"{runs[True]:g}, {runs[False]:g} without",)
    yield Figure(f"{name}: attention forwards per layer and step", texts, "1", runs[True] == 1)


def rows() -> Iterator[Figure]:
    """Yield all figures with their targets."""
    with one_thread():
        for length in LENGTHS:
            yield from of_length(length)
