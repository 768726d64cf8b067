"""The pictures of the README, into docs/images: ``make pictures``.

    python -m benchmarks.pictures [memory | curve ...]

memory: the bytes of a step by owner, on tensors without data; one rank of 8 that share a sequence, 32,768 tokens a
rank, Llama-3.1-8B in bf16. Weights and gradients, which ZeRO divides, are left out, and so is DeepSpeed's own offload,
which takes the same slope off. curve: the loss of ``make demo`` at SP 1 and SP 2.
"""

import argparse
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from benchmarks.curve import run
from benchmarks.tiles.shapes import REAL_SIZE
from benchmarks.tiles.systems import System, build, second_step
from deepspeed_alst.cli.picture import draw_curves
from deepspeed_alst.ledger.fake import fake_world
from deepspeed_alst.ledger.known import Known
from deepspeed_alst.ledger.picture import draw
from deepspeed_alst.models.fused import fuse_norms_and_rope
from deepspeed_alst.models.offload import Keeping, keep_activations
from deepspeed_alst.offload.pool import HostPool
from deepspeed_alst.offload.store import Store

IMAGES = Path(__file__).parents[1] / "docs" / "images"
SP_SIZE = 8
# Without tiles, the logits go far beyond.
TOP = 20 * 2**30
STEPS = {
    "checkpointed layers, no tiles": (System("untiled", "non-reentrant"), False),
    "DeepSpeed's TiledMLP and TiledFusedLogitsLoss": (System("upstream", "non-reentrant"), False),
    "this package's tiles and kernels": (System("ours", "non-reentrant"), False),
    "the same, layer inputs on the host": (System("ours", "non-reentrant"), True),
}


def memory(path: Path) -> None:
    """Four ways to do a step, below one another."""
    timelines = {name: _step(REAL_SIZE[0], *how).ledger.timeline for name, how in STEPS.items()}
    draw(timelines, str(path), left_out=("host", "weights", "gradients"), top=TOP)


def _step(shape: Any, system: System, offloads: bool) -> Any:
    with fake_world(SP_SIZE), ExitStack() as undo:
        model = build(shape.config(), shape.num_layers, torch.bfloat16)
        ids = torch.arange(shape.tokens)[None]
        batch = {"input_ids": ids, "position_ids": ids, "labels": ids, "shift_labels": ids}
        step = undo.enter_context(system.on(model, SP_SIZE, shape.mlp))
        if system.tiles == "ours":
            fuse_norms_and_rope(model, undo)
        if offloads:
            store = Store(HostPool())
            undo.callback(store.close)
            keep_activations(model, Keeping(store, keep_last=1), undo)
        with Known(shape.tokens, 0):
            return second_step(model, step, batch)


def curve(path: Path) -> None:
    """The demo's losses at SP 1 and SP 2, drawn over one another."""
    with tempfile.TemporaryDirectory() as folder:
        runs = {name: run(file, Path(folder))[0] for name, file in (("SP 1", "sp1"), ("SP 2", "sp2"))}
    draw_curves({name: [line["loss"] for line in lines] for name, lines in runs.items()}, str(path))


PICTURES = {"memory": memory, "curve": curve}


def main() -> int:
    """Draw what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", choices=[*PICTURES, []], default=list(PICTURES))
    IMAGES.mkdir(exist_ok=True)
    for name in parser.parse_args().names:
        PICTURES[name](IMAGES / f"{name}.png")
        print(f"docs/images/{name}.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
