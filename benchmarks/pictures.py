"""Pictures of README.md and docs/, written to docs/images: ``make pictures``.

    python -m benchmarks.pictures [memory | longest | path | curve ...]

memory: bytes of a step by owner on fake tensors; one of 8 ranks that share a sequence, 32,768 tokens per rank,
Llama-3.1-8B in bf16. Weights and gradients, which ZeRO shards, are omitted, as is DeepSpeed's own offload, which
removes the same slope. longest: the longest sequences that ``ds_alst plan`` computes, by keys and by GPUs. path: what a
rank holds from the batch to the gradients. curve: loss and gradient norm of ``make demo`` at SP 1 and SP 2.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

from matplotlib import rc_context
from matplotlib.patches import Rectangle

from benchmarks.curve import run
from benchmarks.memory import host_store, put_ours
from benchmarks.tiles.shapes import REAL_SIZE, step_of
from benchmarks.tiles.systems import NORMS_AND_ROPE, System
from deepspeed_alst.cli.main import build_parser
from deepspeed_alst.cli.measure import measure
from deepspeed_alst.cli.memory import Plan, longest
from deepspeed_alst.cli.plan import machine_of
from deepspeed_alst.config.schema import MemoryLeanConfig, TiledMLPConfig, parse
from deepspeed_alst.core.hf_model_spec import ModelSpec
from deepspeed_alst.core.patching import PatchSet
from deepspeed_alst.offload.checkpoint_inputs import CheckpointPolicy, apply_checkpoint_policy
from deepspeed_alst.profiler.picture import draw, draw_curves, new_figure

ROOT = Path(__file__).parents[1]
IMAGES = ROOT / "docs" / "images"
SP_SIZE = 8
# Without tiles, the logits exceed it by far.
TOP = 20 * 2**30


class Offloading(System):
    """A system whose layer inputs are offloaded to the host."""

    @contextmanager
    def on(self, model: Any, sp_size: int = 1, mlp: TiledMLPConfig | None = None) -> Iterator[Any]:
        """Patch the model as in System, with offload."""
        with super().on(model, sp_size, mlp) as step, PatchSet() as undo:
            apply_checkpoint_policy(ModelSpec(model), CheckpointPolicy(host_store(undo), keep_last=1), undo)
            yield step


class InChunks(System):
    """Our tiles and memory-lean layers, with layer inputs and attention outputs offloaded to the host."""

    @contextmanager
    def on(self, model: Any, sp_size: int = 1, mlp: TiledMLPConfig | None = None) -> Iterator[Any]:
        """Patch the model as the keys do."""
        with PatchSet() as undo:
            yield put_ours(model, sp_size, undo, lean=MemoryLeanConfig(), store=host_store(undo))


STEPS = {
    "checkpointed layers, no tiles": System("untiled", "non-reentrant"),
    "DeepSpeed's TiledMLP and TiledFusedLogitsLoss": System("upstream", "non-reentrant"),
    "this package's tiles and kernels": System("ours", "non-reentrant", NORMS_AND_ROPE),
    "the same, layer inputs on the host": Offloading("ours", "non-reentrant", NORMS_AND_ROPE),
    "memory-lean layers, layer inputs and attention outputs on the host": InChunks("ours"),
}


# Recipes of ds_configs by the keys that they switch on, one after the other.
KEYS = {
    "ZeRO 3, optimizer on the host": "llama-8b-h100x8-baseline",
    "+ tiled_logits_loss": "llama-8b-h100x8-loss",
    "+ sequence_parallel_size: 8": "llama-8b-h100x8-loss-sp",
    "+ tiled_mlp_compute": "llama-8b-h100x8-loss-sp-mlp",
    "+ activation_checkpoint_cpu_offload": "llama-8b-h100x8",
}
GPUS = {1: "1", 8: "8", 16: "16", 32: "32", 64: "64: SP 32,\n2 replicas"}
BLUE, ORANGE, GREY = "#1f77b4", "#ff7f0e", "#7f7f7f"


def memory(path: Path) -> None:
    """Plot the variants of a step, one below another."""
    timelines = {name: step_of(REAL_SIZE[0], SP_SIZE, system).ledger.timeline for name, system in STEPS.items()}
    draw(timelines, str(path), left_out=("weights", "gradients"), top=TOP)


def longest_of(recipe: str, num_gpus: int, zero: Mapping[str, Any] = MappingProxyType({})) -> tuple[Plan, int]:
    """Return a recipe's plan for Llama-3.1-8B, as ``ds_alst plan`` with its default machine, and its SP degree.

    ``zero`` replaces keys of its zero_optimization block.
    """
    ds_config = json.loads((ROOT / "ds_configs" / f"{recipe}.json").read_text(encoding="utf-8"))
    ds_config["zero_optimization"] |= zero
    config = parse(ds_config)
    path = str(ROOT / "benchmarks" / "models" / "llama-3.1-8b.json")
    machine = machine_of(build_parser().parse_args(["plan", "--model", path, "--num_gpus", str(num_gpus)]))
    plan, _ = longest(*measure(path, config), ds_config, machine)
    return plan, config.sequence_parallel_size


def longest_sequences(path: Path) -> None:
    """Plot the longest sequences by keys on 8 GPUs, and by GPUs with all keys."""
    by_keys = {words: longest_of(recipe, 8) for words, recipe in KEYS.items()}
    by_gpus = {label: longest_of(f"llama-8b-h100x{count}", count) for count, label in GPUS.items()}
    figure = new_figure(12, 3.6)
    figure.suptitle("Longest sequence of Llama-3.1-8B in bf16, 80 GiB per GPU less 5 %, 1,769 GiB per host; computed")
    titles = "keys, one after the other, on 8 GPUs", "GPUs, with all keys"
    for axes, title, found in zip(figure.subplots(1, 2), titles, (by_keys, by_gpus), strict=True):
        tokens = [plan.tokens * sp_size for plan, sp_size in found.values()]
        bars = axes.barh(list(found), [each / 1e6 for each in tokens], color=BLUE)
        axes.bar_label(bars, [f"{each:,}" for each in tokens], padding=3)
        axes.set_title(title, loc="left", fontsize=10)
        axes.set_xlabel("million tokens")
        axes.margins(x=0.3)
        axes.invert_yaxis()
    figure.savefig(path, dpi=90)


# What rank 0 holds of a sample in each stage of a step: x, y, width and height, of tokens by heads; the tiles in it;
# and the collective to the next stage.
LEFT, TOP_HALF, WHOLE = (0, 0, 0.5, 1), (0, 0.5, 1, 0.5), (0, 0, 1, 1)
STAGES = (
    ("batch", "S tokens of\na sample each", WHOLE, 1, "all-to-all\nof bytes"),
    ("shards", "S/P tokens of one\nsample per micro-step", LEFT, 1, "all-to-all\nof q, k, v"),
    ("attention", "S tokens,\nH/P heads", TOP_HALF, 1, "all-to-all\nof outputs"),
    ("tiled MLP", "S/P tokens, all heads,\ntile by tile", LEFT, 4, ""),
    ("tiled head and loss", "S/P tokens; all-reduce of\nloss sum and token count", LEFT, 4, "backward;\nreduction"),
    ("gradients", "summed in fp32\nover all ranks", WHOLE, 1, ""),
)


def data_path(path: Path) -> None:
    """Draw what each of two ranks holds of a sample, from the batch to the gradients."""
    figure = new_figure(13, 3.2)
    axes = figure.subplots()
    axes.axis("off")
    axes.set(xlim=(-0.6, 2 * len(STAGES) - 0.6), ylim=(-0.7, 3.3))
    axes.text(-0.1, -0.15, "x: tokens\ny: heads", ha="right", va="top", fontsize=8.5, color=GREY)
    for place, (name, words, (dx, dy, width, height), tiles, collective) in enumerate(STAGES):
        x = 2 * place
        axes.text(x + 0.5, 3.2, name, ha="center", va="top", weight="bold")
        axes.text(x + 0.5, -0.15, words, ha="center", va="top", fontsize=8.5)
        axes.text(x + 1.5, 2.85, collective, ha="center", va="top", fontsize=8.5, color=GREY)
        for rank, y in enumerate((1.65, 0.05)):
            if place == 0:
                axes.text(-0.1, y + 0.5, f"rank {rank}", ha="right", va="center")
            color = {"gradients": GREY, "batch": (BLUE, ORANGE)[rank]}.get(name, BLUE)
            axes.add_patch(Rectangle((x, y), 1, 1, fill=False, edgecolor=GREY, linewidth=0.8))
            # Rank 1 holds the other half.
            left, bottom = x + dx + rank * (1 - width), y + dy - rank * (1 - height)
            for tile in range(tiles):
                corner = left + tile * width / tiles, bottom
                axes.add_patch(Rectangle(corner, width / tiles, height, facecolor=color, edgecolor="white"))
            receivers = () if name == "gradients" else (1.65, 0.05) if collective else (y,)
            for other in receivers:
                arrow = {"arrowstyle": "->", "color": GREY}
                axes.annotate("", (x + 1.92, other + 0.5), (x + 1.08, y + 0.5), arrowprops=arrow)
    with rc_context({"svg.hashsalt": "path", "svg.fonttype": "none"}):  # small, and the same file from every run
        figure.savefig(path, metadata={"Date": None})


def curve(path: Path) -> None:
    """Plot the demo's losses and gradient norms at SP 1 and SP 2."""
    runs = {name: run(file)[0] for name, file in (("SP 1", "sp1"), ("SP 2", "sp2"))}
    charts = {"loss, nats per byte": "loss", "gradient norm, before clipping": "grad_norm"}
    curves = {
        title: {name: [line[key] for line in lines] for name, lines in runs.items()} for title, key in charts.items()
    }
    draw_curves("make demo: 16,384-token documents on 2 ranks", curves, str(path))


PICTURES = {
    "memory": (memory, "png"),
    "longest": (longest_sequences, "png"),
    "path": (data_path, "svg"),
    "curve": (curve, "png"),
}


def main() -> int:
    """Draw the requested pictures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", choices=[*PICTURES, []], default=list(PICTURES))
    IMAGES.mkdir(exist_ok=True)
    for name in parser.parse_args().names:
        paint, suffix = PICTURES[name]
        paint(IMAGES / f"{name}.{suffix}")
        print(f"docs/images/{name}.{suffix}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
