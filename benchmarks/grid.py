"""Cells of ``make parity``: all measured configurations, and the subset for the tests."""

import itertools
from dataclasses import replace
from typing import Any

from benchmarks.cells import Cell


def product_cells() -> list[Cell]:
    """Return the product stage x reduce_scatter x accumulation x dtype x sum dtype at SP 2."""
    dtypes = (("fp32", ""), ("bf16", ""), ("bf16", "bf16"), ("bf16", "fp16"))
    cells = [
        Cell(stage=stage, reduce_scatter=scatter, gas=gas, dtype=dtype, sums=sums)
        for stage, scatter, gas, (dtype, sums) in itertools.product((0, 1, 2, 3), (True, False), (1, 4), dtypes)
    ]
    return [cell for cell in cells if cell.stage or cell.reduce_scatter]


_FACTORS: dict[str, tuple[Any, ...]] = {
    "sp_size": (4, 2),
    "stage": (3, 2, 1, 0),
    "reduce_scatter": (True, False),
    "gas": (2, 1),
    "dtype": ("fp32", "bf16"),
    "clip": (0.0, 0.5),
    "contiguous_gradients": (True, False),
    "overlap_comm": (False, True),
    "grad_accum": ("", "fp32"),
    "sums": ("", "bf16", "fp16"),
    "offload_optimizer": (False, True),
    "kv_heads": (1, 2, 4),
    "odd_lengths": (True, False),
    "unequal_labels": (True, False),
    "tied": (False, True),
    "checkpointing": ("", "reentrant", "non-reentrant"),
    "lora": (False, True),
    "tiles": (True, False),
    "offload": ("", "outputs", "host", "disk"),
    "lean": (False, True),
}


def _is_possible(cell: Cell) -> bool:
    """Return False for settings that DeepSpeed ignores, or rejects at SP 1 too."""
    zero_only = cell.overlap_comm or cell.offload_optimizer or not cell.contiguous_gradients or not cell.reduce_scatter
    if cell.lean and not cell.checkpointing:
        return False
    if cell.stage == 0 and (zero_only or cell.grad_accum):
        return False
    # An fp32 run accumulates in fp32 anyway.
    return not (cell.grad_accum and cell.dtype == "fp32")


def pairwise_cells(world_size: int = 4) -> list[Cell]:
    """Return few cells that cover every possible pair of two factors' levels (greedy, deterministic)."""
    names = list(_FACTORS)
    levels = {(name, level) for name in names for level in _FACTORS[name]}
    wanted = {
        frozenset(pair) for pair in itertools.combinations(sorted(levels, key=str), 2) if pair[0][0] != pair[1][0]
    }
    cells: list[Cell] = []
    while wanted:
        best, gain = None, 0
        for seed in sorted(wanted, key=lambda pair: sorted(map(str, pair)))[:12]:
            chosen = _complete(dict(seed), wanted, world_size)
            if chosen and (new := len(wanted & _pairs(chosen))) > gain:
                best, gain = chosen, new
        if best is None:
            # These pairs occur in no possible cell.
            wanted -= set(sorted(wanted, key=lambda pair: sorted(map(str, pair)))[:12])
            continue
        wanted -= _pairs(best)
        cells.append(best)
    return cells


def _complete(fixed: dict[str, Any], wanted: set[frozenset], world_size: int) -> Cell | None:
    """Return a possible cell with the fixed levels, the others chosen to cover the most new pairs."""
    plain = {name: next(level for level in (*_FACTORS[name],)) for name in _FACTORS} | {"offload_optimizer": False}
    choices = [fixed]
    for name in [name for name in plain if name not in fixed]:
        choices = [{**choice, name: level} for choice in choices for level in _FACTORS[name]]
        candidates = [Cell(world_size=world_size, **{**plain, **choice}) for choice in choices]
        scored = sorted(
            zip(candidates, choices, strict=True),
            key=lambda each: (-_is_possible(each[0]), -len(wanted & _pairs(each[1]))),
        )
        choices = [choice for _, choice in scored[:4]]
    cell = Cell(world_size=world_size, **choices[0])
    return cell if _is_possible(cell) and all(getattr(cell, name) == level for name, level in fixed.items()) else None


def _pairs(chosen: Cell | dict[str, Any]) -> set[frozenset]:
    """Return the pairs of levels in a cell, or among some of its settings."""
    levels = chosen if isinstance(chosen, dict) else {name: getattr(chosen, name) for name in _FACTORS}
    return {frozenset(pair) for pair in itertools.combinations(levels.items(), 2)}


_ALL = Cell(stage=3, gas=2, checkpointing="non-reentrant", tiles=True)


def short_cells() -> list[Cell]:
    """Return the tests' cells: each stage with and without reduce_scatter, other levels spread over them."""
    cells = [
        Cell(stage=0, gas=4),
        Cell(stage=1, gas=4, dtype="bf16", odd_lengths=True, clip=0.5, tiles=True),
        Cell(stage=1, reduce_scatter=False, kv_heads=1, overlap_comm=True),
        Cell(
            stage=2,
            unequal_labels=True,
            contiguous_gradients=False,
            checkpointing="reentrant",
            tiles=True,
            offload="outputs",
        ),
        Cell(stage=2, reduce_scatter=False, gas=4, dtype="bf16", grad_accum="fp32"),
        Cell(
            stage=3,
            gas=4,
            odd_lengths=True,
            unequal_labels=True,
            clip=0.5,
            checkpointing="non-reentrant",
            tiles=True,
            offload="disk",
        ),
        Cell(stage=3, reduce_scatter=False, dtype="bf16", tied=True, tiles=True, sums="bf16"),
        Cell(
            stage=3, gas=4, lora=True, odd_lengths=True, clip=0.5, checkpointing="reentrant", tiles=True, offload="host"
        ),
        Cell(stage=2, gas=2, lora=True, dtype="bf16", unequal_labels=True),
        *(replace(_ALL, odd_lengths=True, unequal_labels=True, model=kind) for kind in ("gated delta net", "Mamba 2")),
        replace(_ALL, documents=True, model="mixture"),
        *lean_cells()[:5],
    ]
    return cells + [
        replace(cell, world_size=4, **changed)
        for cell, changed in (
            (Cell(stage=0, dtype="bf16", odd_lengths=True, sums="fp16"), {"sp_size": 4}),
            (Cell(stage=1, gas=2, unequal_labels=True, kv_heads=1), {"sp_size": 4}),
            (Cell(stage=2, dtype="bf16", offload_optimizer=True, odd_lengths=True, sums="bf16"), {"sp_size": 2}),
            (Cell(stage=3, gas=2, reduce_scatter=False, odd_lengths=True, clip=0.5), {"sp_size": 2}),
            (Cell(stage=2, gas=2, model="window 7", documents=True), {"sp_size": 4}),
        )
    ]


def kernel_cells() -> list[Cell]:
    """Return cells of all stages and dtypes with Triton loss kernels, run by the interpreter.

    Those in bf16 repeat the tiled ones of ``short_cells``, with a bit-equal loss.
    """
    tiled = Cell(tiles=True, unequal_labels=True)
    in_bf16 = [cell for cell in short_cells() if cell.tiles and cell.dtype == "bf16" and cell.world_size == 2]
    return [
        replace(tiled, stage=3, gas=2, loss="triton", odd_lengths=True, clip=0.5),
        replace(tiled, stage=3, gas=2, loss="liger", odd_lengths=True, clip=0.5),
        replace(tiled, stage=0, gas=2, loss="triton"),
        replace(tiled, stage=2, loss="liger"),
        *(replace(tiled, stage=1, dtype="fp16", loss=loss) for loss in ("triton", "liger")),
        *(replace(cell, loss=loss) for cell in in_bf16 for loss in ("triton", "liger")),
    ]


def lean_cells() -> list[Cell]:
    """Return cells of memory-lean layers: stages, dtypes, offload, adapters, windows, documents, shared KV heads."""
    lean = Cell(checkpointing="non-reentrant", lean=True)
    full = replace(lean, gas=2, odd_lengths=True, unequal_labels=True, clip=0.5, tiles=True)
    sp4 = {"sp_size": 4, "world_size": 4}
    return [
        replace(lean, stage=0, gas=4),
        replace(full, stage=3, offload="outputs"),
        replace(full, stage=3, lora=True, offload="host"),
        replace(lean, stage=2, gas=2, model="some layers' window", documents=True),
        replace(lean, stage=1, gas=4, dtype="bf16", checkpointing="reentrant"),
        replace(lean, stage=2, dtype="bf16", grad_accum="fp32", offload="disk"),
        replace(lean, stage=3, gas=2, dtype="bf16", tied=True, tiles=True),
        replace(full, stage=2, kv_heads=1, **sp4),
        replace(lean, stage=3, model="chunks", **sp4),
        replace(lean, stage=2, model="window 7", documents=True, **sp4),
        replace(full, stage=2, frozen="layer 0"),
        replace(lean, stage=2, gas=2, model="mixture", documents=True),
        replace(full, stage=3, model="many experts", offload="outputs"),
    ]


def uneven_cells() -> list[Cell]:
    """Return cells of SP 3, which divides neither 4 query heads nor a scan's 8; the first three are the tests'."""
    uneven = Cell(sp_size=3, world_size=3, gas=2)
    full = replace(uneven, odd_lengths=True, unequal_labels=True, clip=0.5)
    return [
        replace(full, stage=0),
        replace(uneven, stage=2, model="window 7", documents=True),
        replace(full, stage=3, tiles=True, checkpointing="non-reentrant", offload="outputs"),
        replace(full, stage=3, lora=True, kv_heads=4),
        replace(uneven, stage=2, dtype="bf16", kv_heads=1, checkpointing="reentrant"),
        replace(full, stage=2, lean=True, checkpointing="non-reentrant"),
        replace(uneven, stage=3, model="mixture", documents=True),
        replace(full, stage=1, model="gated delta net"),
        replace(full, stage=2, model="Mamba 2"),
    ]


def grid_cells() -> list[Cell]:
    """Return cells of SP 4 with 1 or 2 query heads, whose rows ranks share; the first two are the tests'."""
    grid = Cell(sp_size=4, world_size=4, gas=2, heads=2)
    full = replace(grid, odd_lengths=True, unequal_labels=True, clip=0.5)
    return [
        replace(full, stage=0),
        replace(full, stage=3, tiles=True, kv_heads=1, checkpointing="non-reentrant", offload="outputs"),
        replace(grid, stage=2, model="window 7", documents=True),
        replace(full, stage=3, lora=True, heads=1, kv_heads=1),
        replace(grid, stage=2, dtype="bf16", kv_heads=1, checkpointing="reentrant", offload="outputs"),
        replace(full, stage=1, dtype="bf16", sums="bf16"),
        replace(full, stage=2, lean=True, heads=1, kv_heads=1, checkpointing="non-reentrant", offload="outputs"),
        replace(grid, stage=3, model="chunks", documents=True),
        replace(full, stage=1, model="gated delta net"),
    ]


def own_loss_cells() -> list[Cell]:
    """Return cells of losses that the program makes of logits and hidden states."""
    full = Cell(gas=4, odd_lengths=True, unequal_labels=True, clip=0.5, tiles=True)
    sp4 = {"sp_size": 4, "world_size": 4}
    return [
        replace(full, stage=0, own="entropy"),
        replace(full, stage=1, own="entropy", dtype="bf16"),
        replace(full, stage=3, own="entropy", **sp4),
        replace(full, stage=2, own="preference", lora=True),
        Cell(stage=3, own="preference", dtype="bf16"),
        Cell(stage=2, own="preference", **sp4),
        replace(full, stage=3, own="distillation"),
        Cell(stage=0, own="distillation", dtype="bf16", tiles=True, **sp4),
        replace(full, stage=2, own="by_hand"),
        Cell(stage=3, gas=4, own="by_hand", dtype="bf16", unequal_labels=True),
        replace(full, stage=1, own="hidden_states"),
        Cell(stage=3, gas=4, own="hidden_states", dtype="bf16", checkpointing="non-reentrant"),
        Cell(stage=0, own="hidden_states", **sp4),
        replace(full, stage=3, own="dpo", lora=True, clip=0.0, **sp4),
        Cell(stage=1, own="dpo", dtype="bf16"),
        replace(full, stage=2, own="ipo"),
        Cell(stage=3, own="ipo", dtype="bf16"),
        Cell(stage=0, gas=4, own="hinge", tiles=True),
        Cell(stage=2, own="hinge", dtype="bf16", **sp4),
        replace(full, stage=1, own="kto", clip=0.0),
        Cell(stage=3, own="kto", dtype="bf16", **sp4),
        replace(full, stage=3, own="grpo"),
        Cell(stage=2, gas=4, own="grpo", dtype="bf16", tiles=True, **sp4),
        replace(full, stage=0, own="rloo", **sp4),
        Cell(stage=2, own="rloo", dtype="bf16"),
        replace(full, stage=0, own="soft_prompt"),
        replace(full, stage=2, own="soft_prompt", **sp4),
        Cell(stage=3, own="soft_prompt", dtype="bf16", checkpointing="non-reentrant"),
        Cell(stage=2, gas=4, own="classes", odd_lengths=True, **sp4),
        Cell(stage=3, own="classes", dtype="bf16"),
        Cell(stage=3, gas=4, own="reward", odd_lengths=True, clip=0.5, **sp4),
        Cell(stage=1, own="reward", dtype="bf16"),
    ]


def image_cells() -> list[Cell]:
    """Return cells of models of images, on ZeRO 0 to 3 with and without accumulation."""
    families = "qwen2_5_vl", "gemma3", "llava_next"
    cells = [Cell(stage=stage, gas=gas, media=name) for name in families for stage in range(4) for gas in (1, 4)]
    return cells + [Cell(stage=stage, media=name, dtype="bf16") for stage, name in enumerate(families, 1)]


def model_cells() -> list[Cell]:
    """Return cells of other models than a Llama: windows, packed documents, router losses, attention-free layers."""
    other, sp4 = Cell(gas=2), {"sp_size": 4, "world_size": 4}
    packed = replace(other, documents=True)
    return [
        replace(other, stage=0, model="window 7"),
        replace(other, stage=3, model="window 31", unequal_labels=True, odd_lengths=True, clip=0.5, tiles=True),
        replace(other, stage=2, model="window 7", **sp4),
        replace(other, stage=1, model="some layers' window", checkpointing="non-reentrant"),
        replace(other, stage=3, model="chunks", **sp4),
        replace(packed, stage=1),
        replace(packed, stage=3, checkpointing="reentrant", tiles=True, offload="outputs"),
        replace(packed, stage=2, dtype="bf16"),
        replace(packed, stage=3, clip=0.5, **sp4),
        replace(packed, stage=2, model="window 7", **sp4),
        replace(other, stage=2, model="mixture", unequal_labels=True, odd_lengths=True),
        replace(_ALL, model="mixture"),
        replace(other, stage=3, model="many experts", clip=0.5, **sp4),
        replace(packed, stage=1, model="mixture"),
        replace(_ALL, model="gated delta net", odd_lengths=True, unequal_labels=True),
        replace(other, stage=2, model="gated delta net", unequal_labels=True, **sp4),
        replace(other, stage=3, model="Kimi delta attention"),
        replace(_ALL, model="Mamba 2", odd_lengths=True),
        replace(other, stage=1, model="Mamba 2 beside attention", odd_lengths=True),
        replace(other, stage=2, model="Mamba", odd_lengths=True),
        replace(other, stage=3, model="Mamba and attention", clip=0.5),
        replace(other, stage=3, model="short convolution", unequal_labels=True, **sp4),
    ]
