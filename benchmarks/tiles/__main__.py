"""Our tiles against those of DeepSpeed 0.19.8: memory, FLOPs, gathers, gradients, loss and step time.

    python -m benchmarks.tiles [part ...] [--picture runs/loss_memory.png]

Parts are shapes, loss, gathers, gradients and time; default: all. Bytes and FLOPs come from the ledger: FLOPs of
matmuls without attention scores, relative to a step without tiles and checkpoints. Exits non-zero on a missed target.
"""

import argparse
import itertools
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.ranks import Ranks

Row = tuple[str, str, str, str, bool]
"""Row name, our figure, DeepSpeed's, the target, and True if it is met."""


def shapes() -> Iterator[Row]:
    """Yield bytes per token, FLOPs and MLP forwards of real-size (fake) and small (real) shapes."""
    from benchmarks.tiles.shapes import BASELINE, REAL_SIZE, SCALED, SYSTEMS, measure

    _, upstream, ours = SYSTEMS
    with Ranks(8) as ranks:
        for shape, sp_size in itertools.product((*REAL_SIZE, *SCALED), (1, 8)):
            on_ranks = shape.is_real and sp_size > 1
            whole, theirs, own = (
                ranks.run(measure, shape, sp_size, each)[0] if on_ranks else measure(shape, sp_size, each)
                for each in (BASELINE, upstream, ours)
            )
            name, (layer, model) = f"{shape.name}, SP {sp_size}", shape.most
            pair = [each.layer_flops / whole.layer_flops for each in (own, theirs)]
            yield f"{name}: FLOPs of a layer", f"{pair[0]:.3f}", f"{pair[1]:.3f}", f"<= {layer}", pair[0] <= layer
            pair = [each.model_flops / whole.model_flops for each in (own, theirs)]
            yield f"{name}: FLOPs of the model", f"{pair[0]:.3f}", f"{pair[1]:.3f}", f"<= {model}", pair[0] <= model
            kib = (f"{each.layer_peak / 1024:.0f}; {each.kept / 1024:.0f}" for each in (own, theirs))
            yield f"{name}: KiB a token at a layer's peak; kept", *kib, "", True
            if own.forwards[0]:
                counts = (f"{each.forwards[0]:.0f} and {each.forwards[1]:.0f}" for each in (own, theirs))
                yield f"{name}: forwards of first, last matrix", *counts, "2", own.forwards[0] <= 2


def loss() -> Iterator[Row]:
    """Yield peak bytes and FLOPs of the loss, with 100 % and 30 % of tokens trained."""
    from benchmarks.tiles.loss import FAKE, SCALED, SYSTEMS, peak_beyond_weights, run

    for case, trained in itertools.product((FAKE, SCALED), (1.0, 0.3)):
        ledgers = [run(case, system, trained).ledger for system in SYSTEMS]
        whole, theirs, own = (peak_beyond_weights(ledger) / 2**20 for ledger in ledgers)
        name = f"{case.name}, {trained:.0%} trained"
        yield f"{name}: peak MiB (whole {whole:.0f})", f"{own:.0f}", f"{theirs:.0f}", "< whole", own < whole
        whole, theirs, own = (ledger.matmul_flops for ledger in ledgers)
        figures = f"{own / whole:.2f}", f"{theirs / whole:.2f}", f"{trained:.2f}"
        yield f"{name}: FLOPs of the whole's", *figures, own / whole <= trained + 0.01


def gathers() -> Iterator[Row]:
    """Yield all-gathers per step under ZeRO-3, and reduce hook calls per weight."""
    from benchmarks.tiles import real

    with Ranks(real.WORLD_SIZE) as ranks:
        found = [[ranks.run(real.gathers, each, n)[0] for each in ("ours", "upstream")] for n in real.GATHER_TILES]
    fewest = min(own[0] for own, _ in found)
    for tiles, ((own, fired), (theirs, their_fired)) in zip(real.GATHER_TILES, found, strict=True):
        yield f"{tiles} tiles: all-gathers a step", str(own), str(theirs), f"{fewest} at any number", own == fewest
        yield f"{tiles} tiles: reduce hooks a weight", f"{fired:.0f}", f"{their_fired:.0f}", "1", fired == 1


def gradients() -> Iterator[Row]:
    """Yield errors of bf16 weight gradients against fp64, by number of tiles."""
    from benchmarks.tiles.real import GRADIENT_TILES, gradient_errors

    errors = gradient_errors()
    most = 1.2 * errors["ours"][0]
    for tiles, own, theirs in zip(GRADIENT_TILES, errors["ours"], errors["upstream"], strict=True):
        yield f"{tiles} tiles: error of weight gradients", f"{own:.1e}", f"{theirs:.1e}", f"<= {most:.1e}", own <= most


def times() -> Iterator[Row]:
    """Yield step times on real tensors, relative to the checkpointed step without tiles."""
    from benchmarks.tiles.real import step_times

    (untiled, own, theirs), flops = step_times()
    predicted = flops[1] / flops[0]
    figures = f"{own / untiled:.2f}", f"{theirs / untiled:.2f}", f"{predicted:.2f} by FLOPs, +- 0.05, and < DeepSpeed's"
    met = own / untiled <= predicted + 0.05 and own < theirs
    yield "seconds of a step, 2K tokens, hidden 1024, of untiled's", *figures, met


PARTS = {"shapes": shapes, "loss": loss, "gathers": gathers, "gradients": gradients, "time": times}


def draw(path: Path) -> None:
    """Plot the memory of logits and loss over a step, whole and tiled, one file each."""
    from benchmarks.tiles.loss import FAKE, run

    path.parent.mkdir(parents=True, exist_ok=True)
    for system in ("whole", "ours"):
        target = path.with_stem(f"{path.stem}_{system}")
        run(FAKE, system, 1.0).ledger.draw(str(target))
        Console().print(f"{target}: {FAKE.tokens} tokens, {system}")


def main() -> int:
    """Print a table for each part; return 1 if a target is missed."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], metavar="part", help=", ".join(PARTS))
    parser.add_argument("--picture", type=Path)
    arguments = parser.parse_args()
    started, missed, console = time.monotonic(), 0, Console(width=150)
    for name in arguments.parts or ([] if arguments.picture else PARTS):
        table = Table("", "this package", "DeepSpeed's", "target", "verdict", title=name, title_justify="left")
        for what, own, theirs, target, met in PARTS[name]():
            missed += not met
            table.add_row(what, own, theirs, target, ("ok" if met else "MISSED") if target else "")
        console.print(table)
    if arguments.picture:
        draw(arguments.picture)
    console.print(f"{missed} targets missed; {time.monotonic() - started:.0f} s")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
