"""Plots of the README, written to docs/images: ``make pictures``.

    python -m benchmarks.pictures [memory | curve ...]

memory: bytes of a step by owner on fake tensors; one of 8 ranks that share a sequence, 32,768 tokens per rank,
Llama-3.1-8B in bf16. Weights and gradients, which ZeRO shards, are omitted, as is DeepSpeed's own offload, which
removes the same slope. curve: the loss of ``make demo`` at SP 1 and SP 2.
"""

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.curve import run
from benchmarks.kernels.liger import NORMS_AND_ROPE, WithLiger
from benchmarks.tiles.shapes import REAL_SIZE, step_of
from benchmarks.tiles.systems import System
from deepspeed_alst.config.schema import TiledMLPConfig
from deepspeed_alst.core.hf_model_spec import ModelSpec
from deepspeed_alst.core.patching import PatchSet
from deepspeed_alst.offload.activation_store import ActivationStore
from deepspeed_alst.offload.checkpoint_inputs import Keeping, keep_activations
from deepspeed_alst.offload.host_buffers import HostBufferPool
from deepspeed_alst.profiler.picture import draw, draw_curves

IMAGES = Path(__file__).parents[1] / "docs" / "images"
SP_SIZE = 8
# Without tiles, the logits exceed it by far.
TOP = 20 * 2**30


class Offloading(WithLiger):
    """Our tiles with Liger's norms and rotary embedding, and layer inputs offloaded to the host."""

    @contextmanager
    def on(self, model: Any, sp_size: int = 1, mlp: TiledMLPConfig | None = None) -> Iterator[Any]:
        """Patch the model as in WithLiger, with offload."""
        with super().on(model, sp_size, mlp) as step, PatchSet() as undo:
            store = ActivationStore(HostBufferPool())
            undo.callback(store.close)
            keep_activations(ModelSpec(model), Keeping(store, keep_last=1), undo)
            yield step


STEPS = {
    "checkpointed layers, no tiles": System("untiled", "non-reentrant"),
    "DeepSpeed's TiledMLP and TiledFusedLogitsLoss": System("upstream", "non-reentrant"),
    "this package's tiles and kernels": WithLiger(NORMS_AND_ROPE),
    "the same, layer inputs on the host": Offloading(NORMS_AND_ROPE),
}


def memory(path: Path) -> None:
    """Plot four variants of a step, one below another."""
    timelines = {name: step_of(REAL_SIZE[0], SP_SIZE, system).ledger.timeline for name, system in STEPS.items()}
    draw(timelines, str(path), left_out=("host", "weights", "gradients"), top=TOP)


def curve(path: Path) -> None:
    """Plot the demo's losses at SP 1 and SP 2 in one chart."""
    runs = {name: run(file)[0] for name, file in (("SP 1", "sp1"), ("SP 2", "sp2"))}
    draw_curves({name: [line["loss"] for line in lines] for name, lines in runs.items()}, str(path))


PICTURES = {"memory": memory, "curve": curve}


def main() -> int:
    """Draw the requested plots."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", choices=[*PICTURES, []], default=list(PICTURES))
    IMAGES.mkdir(exist_ok=True)
    for name in parser.parse_args().names:
        PICTURES[name](IMAGES / f"{name}.png")
        print(f"docs/images/{name}.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
