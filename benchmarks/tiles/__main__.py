"""Our tiles against those of DeepSpeed 0.19.8: memory, FLOPs, gathers, gradients, loss and step time.

    python -m benchmarks.tiles [part ...]

Parts are shapes, loss, gathers, gradients and time; default: all. Bytes and FLOPs come from the ledger: FLOPs of
matmuls without attention scores, relative to a step without tiles and checkpoints. Exits non-zero on a missed target.
"""

import itertools
import sys
from collections.abc import Iterator

from benchmarks.figures import Figure, Part, report
from benchmarks.ranks import Ranks


def shapes() -> Iterator[Figure]:
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
            name, brief = f"{shape.name}, SP {sp_size}", sp_size > 1
            for what, kind, most in zip(("layer", "model"), ("layer_flops", "model_flops"), shape.most, strict=True):
                pair = [getattr(each, kind) / getattr(whole, kind) for each in (own, theirs)]
                texts = tuple(f"{each:.3f}" for each in pair)
                yield Figure(f"{name}: FLOPs of a {what}", texts, f"<= {most}", pair[0] <= most, brief=brief)
            kib = tuple(f"{each.layer_peak / 1024:.0f}; {each.kept / 1024:.0f}" for each in (own, theirs))
            yield Figure(f"{name}: KiB a token at a layer's peak; kept", kib, brief=brief)
            if own.forwards[0]:
                counts = tuple(f"{each.forwards[0]:.0f} and {each.forwards[1]:.0f}" for each in (own, theirs))
                met = own.forwards[0] <= 2
                yield Figure(f"{name}: forwards of first, last matrix", counts, "2", met, brief=brief)


def loss() -> Iterator[Figure]:
    """Yield peak bytes and FLOPs of the loss, with 100 % and 30 % of tokens trained."""
    from benchmarks.tiles.loss import FAKE, SCALED, SYSTEMS, peak_beyond_weights, run

    for case, trained in itertools.product((FAKE, SCALED), (1.0, 0.3)):
        ledgers = [run(case, system, trained).ledger for system in SYSTEMS]
        whole, theirs, own = (peak_beyond_weights(ledger) / 2**20 for ledger in ledgers)
        name = f"{case.name}, {trained:.0%} trained"
        yield Figure(f"{name}: peak MiB (whole {whole:.0f})", (f"{own:.0f}", f"{theirs:.0f}"), "< whole", own < whole)
        whole, theirs, own = (ledger.matmul_flops for ledger in ledgers)
        texts = f"{own / whole:.2f}", f"{theirs / whole:.2f}"
        yield Figure(f"{name}: FLOPs of the whole's", texts, f"{trained:.2f}", own / whole <= trained + 0.01)


def gathers() -> Iterator[Figure]:
    """Yield all-gathers per step under ZeRO-3, and reduce hook calls per weight."""
    from benchmarks.tiles import real

    with Ranks(real.WORLD_SIZE) as ranks:
        found = [[ranks.run(real.gathers, each, n)[0] for each in ("ours", "upstream")] for n in real.GATHER_TILES]
    fewest = min(own[0] for own, _ in found)
    for tiles, ((own, fired), (theirs, their_fired)) in zip(real.GATHER_TILES, found, strict=True):
        texts = str(own), str(theirs)
        yield Figure(f"{tiles} tiles: all-gathers a step", texts, f"{fewest} at any number", own == fewest)
        yield Figure(f"{tiles} tiles: reduce hooks a weight", (f"{fired:.0f}", f"{their_fired:.0f}"), "1", fired == 1)


def gradients() -> Iterator[Figure]:
    """Yield errors of bf16 weight gradients against fp64, by number of tiles."""
    from benchmarks.tiles.real import GRADIENT_TILES, gradient_errors

    errors = gradient_errors()
    most = 1.2 * errors["ours"][0]
    for tiles, *pair in zip(GRADIENT_TILES, errors["ours"], errors["upstream"], strict=True):
        texts = tuple(f"{each:.1e}" for each in pair)
        yield Figure(f"{tiles} tiles: error of weight gradients", texts, f"<= {most:.1e}", pair[0] <= most)


def times() -> Iterator[Figure]:
    """Yield step times on real tensors, relative to the checkpointed step without tiles."""
    from benchmarks.tiles.real import step_times

    (untiled, own, theirs), flops = step_times()
    predicted = flops[1] / flops[0]
    met = own / untiled <= predicted + 0.05 and own < theirs
    target = f"{predicted:.2f} by FLOPs, +- 0.05, and < DeepSpeed's"
    texts = f"{own / untiled:.2f}", f"{theirs / untiled:.2f}"
    yield Figure("seconds of a step, 2K tokens, hidden 1024, of untiled's", texts, target, met)


_ROWS = {"shapes": shapes, "loss": loss, "gathers": gathers, "gradients": gradients, "time": times}
PARTS = {name: Part(rows, ("this package", "DeepSpeed's")) for name, rows in _ROWS.items()}

if __name__ == "__main__":
    sys.exit(report(__doc__, PARTS))
