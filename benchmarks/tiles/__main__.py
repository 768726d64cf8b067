"""Our tiles against those of DeepSpeed 0.19.8: memory, FLOPs, gathers, gradients, loss and step time.

    python -m benchmarks.tiles [part ...] [--picture runs/loss_memory.png]

Parts are shapes, loss, gathers, gradients and time; default: all. Bytes and FLOPs come from the ledger: FLOPs of
matmuls without attention scores, relative to a step without tiles and checkpoints. The exit status is non-zero if a
target is missed.
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
            for_real = shape.is_real and sp_size > 1
            whole, theirs, own = (
                ranks.run(measure, shape, sp_size, each)[0] if for_real else measure(shape, sp_size, each)
                for each in (BASELINE, upstream, ours)
            )
            name = f"{shape.name}, SP {sp_size}"
            layer, model = shape.most
            for what, most, figures in (
                ("a layer", layer, [each.layer_flops / whole.layer_flops for each in (own, theirs)]),
                ("the model", model, [each.model_flops / whole.model_flops for each in (own, theirs)]),
            ):
                met = figures[0] <= most
                yield f"{name}: FLOPs of {what}", f"{figures[0]:.3f}", f"{figures[1]:.3f}", f"<= {most}", met
            yield (
                f"{name}: KiB a token at a layer's peak; kept",
                f"{own.layer_peak / 1024:.0f}; {own.kept / 1024:.0f}",
                f"{theirs.layer_peak / 1024:.0f}; {theirs.kept / 1024:.0f}",
                "",
                True,
            )
            if own.forwards[0]:
                first, last = own.forwards
                shown = " and ".join(f"{each:.0f}" for each in theirs.forwards)
                yield f"{name}: forwards of first, last matrix", f"{first:.0f} and {last:.0f}", shown, "2", first <= 2


def loss() -> Iterator[Row]:
    """Yield peak bytes and FLOPs of the loss, with 100 % and 30 % of tokens trained."""
    from benchmarks.tiles.loss import FAKE, SCALED, SYSTEMS, peak_beyond_weights, run

    for case in (FAKE, SCALED):
        for trained in (1.0, 0.3):
            ledgers = {system: run(case, system, trained).ledger for system in SYSTEMS}
            peak = {system: peak_beyond_weights(ledger) / 2**20 for system, ledger in ledgers.items()}
            flops = {system: ledger.matmul_flops for system, ledger in ledgers.items()}
            name = f"{case.name}, {trained:.0%} trained"
            yield (
                f"{name}: peak MiB (whole {peak['whole']:.0f})",
                f"{peak['ours']:.0f}",
                f"{peak['upstream']:.0f}",
                "< whole",
                peak["ours"] < peak["whole"],
            )
            ratios = [flops[system] / flops["whole"] for system in ("ours", "upstream")]
            yield (
                f"{name}: FLOPs of the whole's",
                f"{ratios[0]:.2f}",
                f"{ratios[1]:.2f}",
                f"{trained:.2f}",
                ratios[0] <= trained + 0.01,
            )


def gathers() -> Iterator[Row]:
    """Yield all-gathers per step under ZeRO-3, and reduce hook calls per weight."""
    from benchmarks.tiles.gathers import TILES, WORLD_SIZE, measure

    with Ranks(WORLD_SIZE) as ranks:
        found = {
            (system, tiles): ranks.run(measure, system, tiles)[0] for tiles in TILES for system in ("ours", "upstream")
        }
    fewest = min(found["ours", tiles][0] for tiles in TILES)
    for tiles in TILES:
        (own, fired), (theirs, their_fired) = found["ours", tiles], found["upstream", tiles]
        yield f"{tiles} tiles: all-gathers a step", str(own), str(theirs), f"{fewest} at any number", own == fewest
        yield f"{tiles} tiles: reduce hooks a weight", f"{fired:.0f}", f"{their_fired:.0f}", "1", fired == 1


def gradients() -> Iterator[Row]:
    """Yield errors of bf16 weight gradients against fp64, by number of tiles."""
    from benchmarks.tiles.real import TILES, gradient_errors

    errors = gradient_errors()
    for tiles, own, theirs in zip(TILES, errors["ours"], errors["upstream"], strict=True):
        most = 1.2 * errors["ours"][0]
        yield f"{tiles} tiles: error of weight gradients", f"{own:.1e}", f"{theirs:.1e}", f"<= {most:.1e}", own <= most


def times() -> Iterator[Row]:
    """Yield step times on real tensors, relative to the checkpointed step without tiles."""
    from benchmarks.tiles.real import TIMED, step_times

    seconds, flops = step_times()
    untiled, own, theirs = (system.name for system in TIMED)
    ratio, other = seconds[own] / seconds[untiled], seconds[theirs] / seconds[untiled]
    predicted = flops[own] / flops[untiled]
    target = f"{predicted:.2f} by FLOPs, +- 0.05, and < DeepSpeed's"
    met = ratio <= predicted + 0.05 and ratio < other
    yield "seconds of a step, 2K tokens, hidden 1024, of untiled's", f"{ratio:.2f}", f"{other:.2f}", target, met


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
    parser.add_argument("parts", nargs="*", metavar="part", help=", ".join(PARTS))
    parser.add_argument("--picture", type=Path)
    arguments = parser.parse_args()
    if unknown := set(arguments.parts) - set(PARTS):
        parser.error(f"unknown part {', '.join(sorted(unknown))}; use {', '.join(PARTS)}")
    started, missed, console = time.monotonic(), 0, Console(width=150)
    for name in arguments.parts or ([] if arguments.picture else PARTS):
        table = Table(title=name, title_justify="left")
        for column in ("", "this package", "DeepSpeed's", "target", "verdict"):
            table.add_column(column)
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
