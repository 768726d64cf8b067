"""Packed activations: every bit comes back, from the host and from disk, and their slots have the packed size."""

import contextlib
import gc
import io
import weakref
from dataclasses import replace
from unittest import mock

import pytest
import torch

from benchmarks import cells
from benchmarks.cells import Cell
from benchmarks.families import family_config
from deepspeed_alst.errors import OffloadError
from deepspeed_alst.formatting import format_bytes
from deepspeed_alst.kernels import bf16_codec as codec
from deepspeed_alst.offload import budget, feature
from deepspeed_alst.offload.activation_store import ActivationStore
from deepspeed_alst.offload.disk import DiskFile
from deepspeed_alst.offload.host_buffers import CopyStream, HostBufferPool, pages
from deepspeed_alst.offload.swapper import Swapper
from tests.monitoring.test_metrics import events_in
from tests.offload.test_activation_store import lazy  # noqa: F401

NUM_VALUES = 3 * codec.SEGMENT - 71


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1)).bfloat16()


def random_bits(num_values: int = NUM_VALUES) -> torch.Tensor:
    """Any bit pattern, NaN and infinity too: far more escapes than there is room for."""
    make = torch.Generator().manual_seed(2)
    return torch.randint(-(2**15), 2**15, (num_values,), generator=make, dtype=torch.int16).view(torch.bfloat16)


def not_finite() -> torch.Tensor:
    x_n = normal(NUM_VALUES)
    x_n[:4] = torch.tensor([0x7F80, 0xFF80 - 2**16, 0x7FC1, 0x7F81], dtype=torch.int16).view(torch.bfloat16)
    x_n[1000:1010] = 0.0
    return x_n


PACKED = {
    "normal": normal(1, 63, 257),
    "one in 97 larger": normal(NUM_VALUES) * torch.where(torch.arange(NUM_VALUES) % 97 == 0, 1000, 1).bfloat16(),
    "NaN, infinity and zeros": not_finite(),
    "transposed": normal(2, 70, 4, 60).transpose(1, 2),
    "with gaps": normal(100, 300)[:, ::2],
}
UNPACKED = {
    "fp32": torch.randn(NUM_VALUES),
    "fp16": torch.randn(NUM_VALUES).half(),
    "smaller unpacked": normal(2900),
    "empty": normal(0),
}


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(*(x.contiguous().view(torch.uint8) for x in (a, b)))


def new_store(copies: CopyStream | None = None, disk=None, budget: int = 2**40) -> ActivationStore:
    swapper = None if disk is None else Swapper(DiskFile(disk), copies)
    store = ActivationStore(HostBufferPool(0 if disk is not None else budget), swapper, copies)
    store.packs = True
    return store


@pytest.mark.parametrize("on_disk", [False, True], ids=["host", "disk"])
def test_every_bit_comes_back_and_the_packed_bytes_move(on_disk, lazy, tmp_path):  # noqa: F811
    store = new_store(lazy, tmp_path if on_disk else None)
    values = [*PACKED.values(), *UNPACKED.values()]
    sizes = [codec.packed_bytes(x.numel()) for x in PACKED.values()] + [x.nbytes for x in UNPACKED.values()]
    for _ in range(2):
        groups = [store.group().put(x.clone(memory_format=torch.preserve_format)) for x in values]
        store.release_copied()
        for _ in range(2):  # a graph that is kept is gone through twice
            for get, x in zip(reversed(groups), reversed(values), strict=True):
                found = get()
                assert same_bits(found, x)
                assert found.stride() == (x if x is not PACKED["with gaps"] else x.contiguous()).stride()
        del get, groups
        gc.collect()
        assert store.pool.in_use == 0
    counts = store.counts
    assert counts.overflows == 0 and counts.bytes_out == 2 * sum(sizes)
    assert counts.bytes_to_disk == (counts.bytes_out if on_disk else 0)
    store.close()


@pytest.mark.filterwarnings("ignore:alst.activation_checkpoint_cpu_offload.packing")
@pytest.mark.parametrize("on_disk", [False, True], ids=["host", "disk"])
def test_an_overflow_is_stored_unpacked_before_the_values_are_freed(on_disk, lazy, tmp_path):  # noqa: F811
    store, alive, memory, gets = new_store(lazy, tmp_path if on_disk else None), [], [], []
    values = [normal(NUM_VALUES), random_bits(), normal(NUM_VALUES), random_bits(), normal(NUM_VALUES)]
    for x in values:
        group = store.group()
        mine = x.clone()
        alive.append(weakref.ref(mine))
        memory.append(mine.detach())
        gets.append(group.put(mine))
        del mine
        gc.collect()
        assert all(ref() is None for ref in alive[:-2])
        for freed in memory[:-2]:
            freed.zero_()  # by whoever gets the memory next
    store.release_copied()
    assert all(ref() is None for ref in alive)
    for freed in memory:
        freed.zero_()
    packed = pages(codec.packed_bytes(NUM_VALUES))
    assert store.counts.overflows == 2
    assert store.counts.bytes_out == 5 * codec.packed_bytes(NUM_VALUES) + 2 * 2 * NUM_VALUES
    assert on_disk or store.pool.in_use == 3 * packed + 2 * pages(2 * NUM_VALUES)
    for get, x in zip(reversed(gets), reversed(values), strict=True):
        assert same_bits(get(), x)
    del get, gets
    gc.collect()
    assert store.pool.in_use == 0 and (not on_disk or not store.swapper.file._used)
    store.close()


def test_an_overflow_warns_and_without_room_is_an_error_that_frees_its_slot():
    budget = pages(codec.packed_bytes(NUM_VALUES))
    assert budget < 2 * NUM_VALUES
    store = new_store(budget=budget)
    get = store.group().put(random_bits())
    with pytest.warns(match=r"packing: .* unpacked"), pytest.raises(OffloadError, match="exceed this rank's budget"):
        store.release_copied()
    del get
    assert store.pool.in_use == 0
    again = store.group().put(normal(NUM_VALUES))
    store.release_copied()
    assert same_bits(again(), normal(NUM_VALUES))


@pytest.mark.filterwarnings("ignore:alst.activation_checkpoint_cpu_offload.packing")
def test_an_overflow_whose_slot_on_the_host_is_too_small_goes_to_disk(lazy, tmp_path):  # noqa: F811
    store = new_store(lazy, tmp_path)
    store.pool.budget = pages(codec.packed_bytes(NUM_VALUES))
    get = store.group().put(random_bits())
    assert store.pool.in_use and not store.counts.bytes_to_disk
    store.release_copied()
    assert not store.pool.in_use and store.counts.bytes_to_disk == 2 * NUM_VALUES
    other = store.group().put(normal(NUM_VALUES))
    assert same_bits(get(), random_bits()) and same_bits(other(), normal(NUM_VALUES))
    store.close()


def test_what_an_exception_leaves_behind_is_released(lazy):  # noqa: F811
    store = new_store(lazy)
    for _ in range(3):
        left = [store.group().put(each) for each in (normal(NUM_VALUES), random_bits(), normal(NUM_VALUES))]
        del left
        gc.collect()
        assert store.pool.in_use == 0
    get = store.group().put(normal(NUM_VALUES))
    store.release_copied()
    assert same_bits(get(), normal(NUM_VALUES))


def test_a_change_in_place_before_the_copy_has_ended_is_an_error():
    store, x = new_store(), random_bits()
    get = store.group().put(x)
    x.zero_()
    with pytest.raises(OffloadError, match="changed in place"):
        store.release_copied()
    assert get is not None


# --- engines at SP 2

HIDDEN, TOKENS, CHUNK = 512, 24, 8
INPUT_BYTES = 2 * HIDDEN * TOKENS


def train(
    cell: Cell, head_dim: int = HIDDEN // 4, on_model=lambda model: model, alst=(), keys=(), **block: object
) -> tuple[cells.Result, ActivationStore]:
    """Run a cell with layer inputs of whole segments, and other keys, also in the blocks of alst and the offload."""
    original, stores = cells.ds_config, []

    def ds_config(*args):
        config = original(*args)
        if cell.lean:
            config["alst"]["memory_lean_layer"] = {"chunk_tokens": CHUNK, "tile_tokens": 5, "key_block": 11}
        if cell.offload:
            config["alst"]["activation_checkpoint_cpu_offload"] |= block
        config["alst"] |= dict(alst)
        return config | dict(keys)

    def on_engine(engine):
        stores.append(getattr(engine, "alst_offload", None))

    wide = family_config("llama", hidden_size=HIDDEN, intermediate_size=64, head_dim=head_dim)
    with mock.patch.multiple(cells, ds_config=ds_config, model_config=lambda cell: wide):
        result = cells.run_alst(cell, on_model=on_model, on_engine=on_engine)
    return result, stores[0]


def same_run(cell: Cell, num_tensors: int, num_values: int, others: int, block: dict, packed: bool = True) -> None:
    plain, _ = train(replace(cell, offload=""))
    offloaded, store = train(cell, **block)
    assert (offloaded.loss, offloaded.norm) == (plain.loss, plain.norm)
    for what in ("grads", "changes"):
        for name, tensor in getattr(plain, what).items():
            assert torch.equal(getattr(offloaded, what)[name], tensor), f"{what} of {name}"
    size = codec.packed_bytes(num_values) if packed else 2 * num_values
    micro_steps = 3 * 2
    assert store.counts.bytes_out == micro_steps * (num_tensors * size + others)
    assert store.counts.overflows == 0
    assert (store.counts.bytes_to_disk > 0) == (cell.offload == "disk")
    assert not packed or size <= 11.7 / 16 * 2 * num_values


_ALL, _LSE = HIDDEN * TOKENS, 2 * 4 * TOKENS * 4  # of two layers in fp32
_SHORT = 2 * (2 * INPUT_BYTES - 1)  # a byte less than two layers' inputs unpacked, for both ranks
AUTO = {"packing": "auto"}
LOSSLESS = {"packing": "lossless"}


@pytest.mark.parametrize(
    ("cell", "expected"),
    [
        (Cell(offload="host", dtype="bf16", checkpointing="plain"), (2, _ALL, 0, LOSSLESS)),
        pytest.param(
            *(Cell(offload="outputs", dtype="bf16", checkpointing="reentrant", stage=3), (4, _ALL, _LSE, LOSSLESS)),
            marks=pytest.mark.slow,
        ),
        (Cell(offload="disk", dtype="bf16", checkpointing="plain", stage=1), (2, _ALL, 0, LOSSLESS)),
        # Two layers and the last norm in three chunks each.
        (Cell(offload="host", dtype="bf16", checkpointing="plain", lean=True), (9, HIDDEN * CHUNK, 0, LOSSLESS)),
        (Cell(offload="host", dtype="bf16", checkpointing="plain"), (2, _ALL, 0, AUTO | {"host_budget": _SHORT})),
        pytest.param(
            *(
                Cell(offload="host", dtype="bf16", checkpointing="plain"),
                (2, _ALL, 0, AUTO | {"host_budget": _SHORT + 2}, False),
            ),
            marks=pytest.mark.slow,
        ),
    ],
    ids=["host", "outputs", "disk", "lean", "auto, short", "auto, ample"],
)
def test_packing_changes_no_bit_of_a_training(cell, expected, ranks2):
    ranks2.run(same_run, cell, *expected)


def reported(dtype: str, packing: str) -> tuple[str, str, int]:
    """Return the rows on packing at the start and on the offload at the first step, and the bytes that moved."""
    from deepspeed_alst import initialize as story

    start, first = [], []
    with (
        mock.patch.object(story, "print_report", start.extend),
        mock.patch.object(feature, "print_report", first.extend),
    ):
        _, store = train(Cell(offload="host", dtype=dtype, checkpointing="plain"), packing=packing)
    return dict(start)["packing"], dict(first)["offload"], store.counts.bytes_out


def test_the_report_says_what_is_packed_and_fp32_is_not(ranks2):
    unpacked = 3 * 2 * 2 * INPUT_BYTES
    (found, _) = ranks2.run(reported, "fp32", "lossless")
    assert found == (
        "none: the model is not bf16; fp16 and fp32 tensors stay as they are",
        f"{format_bytes(2 * 2 * INPUT_BYTES)} on the host of a rank with 24 tokens",
        2 * unpacked,
    )
    (found, _) = ranks2.run(reported, "bf16", "lossless")
    size = codec.packed_bytes(_ALL)
    assert found == (
        "lossless, bf16 tensors to 0.73 of their size; fp16 and fp32 tensors stay as they are",
        f"{format_bytes(2 * pages(size))} on the host of a rank with 24 tokens, packed",
        3 * 2 * 2 * size,
    )


def with_outliers(model: torch.nn.Module) -> torch.nn.Module:
    """Give embeddings, and so all layer inputs, many more magnitudes than packing has room for."""
    with torch.no_grad():
        weight = model.get_input_embeddings().weight
        weight *= 2.0 ** torch.randint(-20, 21, weight.shape, generator=torch.Generator().manual_seed(3))
    return model


def overflowing(folder: str, host_budget: int) -> tuple[list[str], int, list[str]]:
    """Return attention's rows of the report, the overflows, and the metrics' lines; compare with the plain run."""
    cell, wide, lines = Cell(offload="host", dtype="bf16", checkpointing="plain"), HIDDEN // 2, io.StringIO()
    plain, _ = train(replace(cell, offload=""), wide, with_outliers)
    keys = {"steps_per_print": 1, "csv_monitor": {"enabled": True, "output_path": folder, "job_name": "run"}}
    block = {"packing": "lossless", "host_budget": host_budget}
    with (
        mock.patch.object(budget, "_FLOPS_PER_BYTE", 0),  # so small a layer would not hide the copy
        mock.patch.object(feature, "print_report") as said,
        contextlib.redirect_stderr(lines),
    ):
        found, store = train(cell, wide, with_outliers, {"save_attention_output": "auto"}, keys, **block)
    assert (found.loss, found.norm) == (plain.loss, plain.norm)
    for name, tensor in plain.changes.items():
        assert torch.equal(found.changes[name], tensor), name
    rows = [dict(call.args[0])["attention output"] for call in said.call_args_list]
    return rows, store.counts.overflows, [each for each in lines.getvalue().splitlines() if "alst: step" in each]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:alst.activation_checkpoint_cpu_offload.packing")
@pytest.mark.parametrize("room", ["of all outputs packed", "of one output"])
def test_outputs_leave_room_for_the_inputs_that_overflow(room, ranks2, tmp_path):
    # An output is twice as wide as an input: packed it is larger than an input that overflows.
    sizes = codec.packed_bytes(_ALL), 2 * _ALL, codec.packed_bytes(2 * _ALL), _LSE // 2
    packed, raw, output, lse = map(pages, sizes)
    assert packed < raw < output
    host = 2 * packed + 2 * (output + lse) if room == "of all outputs packed" else 2 * raw + output + lse
    assert host < 2 * raw + 2 * (output + lse)
    first, second = ranks2.run(overflowing, str(tmp_path), 2 * host)
    rows, overflows, lines = first
    assert rows == ["saved in the first 1 of 2 layers (auto: more exceeds the host's memory)"]
    # Both layers' inputs in each of 3 steps of 2 micro-steps.
    assert overflows == second[1] == 3 * 2 * 2
    assert len(lines) == 3 and all(" host, 4 overflows" in each for each in lines)
    assert [value for _, value in events_in(tmp_path)["offload_overflows"]] == [4.0] * 3
