"""The plans, as integers, for sizes of every kind: what is cut is whole again, each piece once, and within its room.

Legend: B batch, S whole sequence, P ranks of a sequence, H query heads, K key/value heads.
"""

import itertools
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from deepspeed_alst.attention.head_plan import HeadPlan
from deepspeed_alst.config.schema import TiledLossConfig, TiledMLPConfig
from deepspeed_alst.data.sharding import REAL_TOKENS, ShardedBatch, ShardingConfig, shard_batch
from deepspeed_alst.errors import DataError, OffloadError, ShapeError
from deepspeed_alst.grad_reduction.reduce import pieces_by_owner, segments
from deepspeed_alst.offload.budget import LayerSizes, MemoryBudget, Plan, make_plan
from deepspeed_alst.offload.disk import DiskFile
from deepspeed_alst.offload.host_buffers import PAGE, HostBufferPool
from deepspeed_alst.tiling.loss import loss_tile_rows
from deepspeed_alst.tiling.tiled_mlp import min_tile_bytes, row_bytes, sums_fit, tile_rows


@pytest.fixture(scope="module")
def disk_file(tmp_path_factory):
    file = DiskFile(tmp_path_factory.mktemp("disk"))
    yield file
    file.close()


# --- heads


@settings(max_examples=400)
@given(st.integers(1, 64), st.integers(1, 256), st.integers(0, 256))
def test_every_head_is_computed_once_beside_the_keys_that_it_reads_or_the_sizes_are_refused(P, H, K):
    try:
        plan = HeadPlan(P, H, K)
    except ShapeError as error:
        assert K < 1 or H % K
        assert str(H) in str(error)
        return
    of_groups = (plan.heads_of(rank) for rank in range(0, P, plan.row_groups))
    assert list(itertools.chain(*of_groups)) == list(range(H))
    for rank in range(P):
        assert list(plan.kv_heads_of(rank)) == sorted({head * K // H for head in plan.heads_of(rank)})
    copies = [sum(head in plan.kv_heads_of(rank) for rank in range(P)) for head in range(K)]
    assert not plan.is_even or set(copies) == {max(1, P // K)}


# --- tiles

SIZES = st.integers(0, 2**20) | st.integers(0, 2**45)


@settings(max_examples=400)
@given(
    st.builds(
        TiledMLPConfig,
        tile_tokens=st.none() | st.integers(1, 2**20),
        min_tokens=st.integers(0, 2**20),
    )
    | st.builds(TiledMLPConfig, tile_bytes=st.just("auto") | st.integers(1, 2**45), min_tokens=st.integers(0, 2**20)),
    SIZES,
    st.integers(0, 2**20),
    st.integers(1, 8),
    SIZES,
)
def test_tiles_cover_each_row_once_evenly_and_within_the_budget_where_that_is_possible(
    budget, rows, features, element_size, sum_bytes
):
    bytes_per_row = row_bytes(features, element_size)
    tile = tile_rows(budget, rows, bytes_per_row, sum_bytes)
    assert 0 <= tile <= rows and (tile > 0 or not rows)
    if not rows or budget.tile_tokens is not None:
        assert tile == min(rows, budget.tile_tokens or 0)
        return
    if rows < budget.min_tokens:
        assert tile == rows
        return
    num_tiles = -(-rows // tile)
    # As even as whole rows of 64 allow: with a row of 64 fewer in each, there would be a tile more.
    assert tile == rows or tile % 64 == 0
    assert num_tiles == 1 or (tile - 64) * num_tiles < rows
    room = 2**29 if budget.tile_bytes == "auto" else budget.tile_bytes - sum_bytes
    assert tile * bytes_per_row <= max(room, min(rows, 256) * bytes_per_row)
    if budget.tile_bytes != "auto" and sums_fit(budget, sum_bytes, bytes_per_row):
        assert tile * bytes_per_row + sum_bytes <= budget.tile_bytes
        assert budget.tile_bytes >= min_tile_bytes(sum_bytes, bytes_per_row)


@given(
    st.builds(TiledLossConfig, tile_bytes=st.integers(1, 2**45))
    | st.builds(TiledLossConfig, tile_tokens=st.integers(1, 2**20)),
    st.integers(1, 2**20),
    st.booleans(),
)
def test_a_tile_of_logits_is_within_its_bytes_or_the_fewest_rows(budget, vocab, in_place):
    rows = loss_tile_rows(budget, vocab, in_place)
    assert rows >= 1
    if budget.tile_tokens is None:
        assert rows == 64 or rows * vocab * (4 if in_place else 16) <= budget.tile_bytes
    else:
        assert rows == budget.tile_tokens


# --- slices of a reduction


@given(st.lists(st.integers(0, 300), max_size=8), st.integers(1, 400))
def test_every_element_of_a_bucket_travels_in_one_slice(columns, width):
    slices = list(segments(columns, width))
    seen = [(part.index, column) for parts in slices for part in parts for column in range(part.start, part.stop)]
    assert seen == [(index, column) for index, number in enumerate(columns) for column in range(number)]
    for parts in slices:
        ends = list(itertools.accumulate(part.width for part in parts))
        assert [part.at for part in parts] == [0, *ends[:-1]] and ends[-1] <= width
    assert len(slices) == -(-sum(columns) // width)


@given(st.data(), st.lists(st.integers(0, 40), max_size=8), st.integers(1, 8), st.integers(1, 400))
def test_every_element_of_a_slice_goes_to_the_one_rank_that_owns_it(data, sizes, num_ranks, width):
    owners = data.draw(st.lists(st.integers(0, num_ranks - 1), min_size=len(sizes), max_size=len(sizes)))
    for parts in segments(sizes, width):
        share = -(-sum(part.width for part in parts) // num_ranks)
        owned = pieces_by_owner(parts, owners, share, num_ranks)
        assert [len(of_rank) for of_rank in owned] == [num_ranks] * num_ranks
        got = [
            (piece.index, i, owner)
            for of_rank in owned
            for owner, pieces in enumerate(of_rank)
            for piece in pieces
            for i in range(piece.start, piece.stop)
        ]
        slice_ = [(part.index, i, owners[part.index]) for part in parts for i in range(part.start, part.stop)]
        assert sorted(got) == slice_


# --- what waits for the backward

LAYERS = st.builds(
    LayerSizes,
    num_layers=st.integers(0, 100),
    keep_last=st.integers(0, 8),
    input_bytes=st.integers(1, 2**16),
    output_bytes=st.integers(0, 2**16),
    lse_bytes=st.integers(0, 2**10),
    matrix_elements=st.sampled_from([1, 2**31]),
    head_elements=st.just(1),
)
BYTES = st.integers(0, 2**24) | st.integers(0, 2**42)


@settings(max_examples=400)
@given(
    LAYERS,
    st.integers(1, 2**12) | st.integers(1, 2**24),
    st.builds(MemoryBudget, BYTES, st.none() | BYTES),
    st.sampled_from([True, False, "auto"]),
    st.integers(1, 8),
    st.integers(1, 4),
)
def test_what_waits_has_room_and_else_the_longest_sequence_that_is_named_has(
    layers, tokens, room, wanted, sp_size, batch
):
    def plan(tokens: int) -> Plan:
        return make_plan(layers, tokens, room, wanted, (sp_size, batch))

    tokens *= batch
    try:
        found = plan(tokens)
    except OffloadError as error:
        _, *words = str(error).split("at most ")  # nothing is said where not even one token has room
        longest = int(words[0].split(" tokens")[0].replace(",", "")) if words else 0
        assert longest % sp_size == 0 and 0 <= longest // sp_size * batch < tokens
        if longest:
            plan(longest // sp_size * batch)
        with pytest.raises(OffloadError):
            make_plan(layers, (longest // sp_size + 1) * batch, room, "attention outputs" in str(error))
        return
    needed = layers.offloaded_bytes(tokens, found.num_saved)
    assert found.host_bytes + found.staging_bytes <= room.host_bytes
    assert found.disk_bytes <= (room.disk_bytes or 0)
    assert found.host_bytes + found.disk_bytes >= needed
    assert wanted == "auto" or found.num_saved == layers.num_layers * wanted
    fits_one_more = found.num_saved < layers.num_layers and (
        layers.offloaded_bytes(tokens, found.num_saved + 1) <= room.host_bytes
    )
    assert wanted != "auto" or not fits_one_more or not layers.copy_is_hidden(tokens // batch * sp_size)


@settings(max_examples=60)
@given(steps=st.lists(st.tuples(st.booleans(), st.integers(1, 9), st.integers(0, 9)), max_size=60))
def test_slots_of_a_file_never_overlap_and_lie_within_it(disk_file, steps):
    taken = []
    for take, size, which in steps:
        if take:
            taken.append((disk_file.allocate(size * PAGE), size * PAGE))
        elif taken:
            disk_file.free(*taken.pop(which % len(taken)))
        ends = [0, *itertools.chain(*((offset, offset + size) for offset, size in sorted(taken)))]
        assert ends == sorted(ends) and ends[-1] <= disk_file.reserved_bytes
    for slot in taken:
        disk_file.free(*slot)
    # The file is empty again.
    assert disk_file.allocate(PAGE) == 0
    disk_file.free(0, PAGE)


STEPS = st.lists(st.tuples(st.sampled_from(["take", "give", "round"]), st.integers(1, 5 * PAGE), st.integers(0, 9)))


@settings(max_examples=60)
@given(st.integers(0, 12), st.lists(st.integers(1, 4 * PAGE), max_size=3), STEPS)
def test_the_hosts_buffers_are_large_enough_and_stay_within_the_budget(pages, sizes, steps):
    pool, taken = HostBufferPool(budget=pages * PAGE), []
    pool.set_sizes(sizes)
    for what, size, which in steps:
        if what == "take" and (buffer := pool.acquire(size)) is not None:
            assert buffer.numel() >= size and buffer.numel() % PAGE == 0
            taken.append(buffer)
        elif what == "give" and taken:
            pool.release(taken.pop(which % len(taken)))
        elif what == "round":
            pool.set_sizes([size])
        assert pool.in_use == sum(buffer.numel() for buffer in taken)
        assert pool.in_use <= pool.num_bytes <= pool.budget
    for buffer in taken:
        pool.release(buffer)
    pool.close()
    assert (pool.in_use, pool.num_bytes) == (0, 0)


# --- a batch and its shards


@st.composite
def batches(draw) -> tuple[dict[str, Any], list[list[int]]]:
    """A batch that is all right, and the lengths of each row's documents."""
    B, S = draw(st.integers(1, 3)), draw(st.integers(1, 40))
    ids = torch.arange(1, B * S + 1).view(B, S)
    batch: dict[str, Any] = {"input_ids": ids}
    documents = [[S]] * B
    if B == 1 and draw(st.booleans()):
        cuts = sorted(draw(st.sets(st.integers(1, S - 1), max_size=4))) if S > 1 else []
        documents = [[end - start for start, end in itertools.pairwise([0, *cuts, S])]]
        bounds = torch.tensor([0, *cuts, S], dtype=draw(st.sampled_from([torch.int32, torch.int64])))
        how = draw(st.sampled_from(["positions", "bounds", "both"]))
        if how != "bounds":
            batch["position_ids"] = torch.cat([torch.arange(n) for n in documents[0]])[None]
        if how != "positions":
            batch |= {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": max(documents[0])}
    elif draw(st.booleans()):
        batch["position_ids"] = draw(st.sampled_from([torch.arange(S), torch.arange(S).expand(B, S)]))
    labels = ids + 1000
    if draw(st.booleans()):
        labels = labels.masked_fill(torch.tensor(draw(st.lists(st.booleans(), min_size=S, max_size=S))), -100)
    if len(documents[0]) == 1 and draw(st.booleans()):
        real = torch.tensor(draw(st.lists(st.integers(1, S), min_size=B, max_size=B)))
        mask = (torch.arange(S) < real[:, None]).long()
        batch["attention_mask"], labels = mask, labels.masked_fill(mask == 0, -100)
    if draw(st.booleans()):
        batch["labels"] = labels
    return batch, documents


def whole(sharded: ShardedBatch, key: str) -> list[list[int]]:
    return torch.cat([shard[key] for shard in sharded.shards], dim=1).tolist()


@settings(max_examples=300)
@given(batches(), st.integers(1, 8), st.integers(1, 9))
def test_shards_put_together_are_the_batch_with_labels_moved_once(made, P, factor):
    batch, documents = made
    multiple = P * factor
    sharded = shard_batch(batch, P, ShardingConfig(multiple, packing=True, marks_padding=True))
    ids = batch["input_ids"].tolist()
    B, S = len(ids), len(ids[0])
    padded = -(-S // multiple) * multiple
    fill = padded - S
    assert len(sharded.shards) == P
    assert {tuple(shard[key].shape) for shard in sharded.shards for key in shard} == {(B, padded // P)}
    assert whole(sharded, "input_ids") == [row + [0] * fill for row in ids]
    mask = batch.get("attention_mask", torch.ones(B, S)).tolist()
    assert whole(sharded, REAL_TOKENS) == [[bool(x) for x in row] + [False] * fill for row in mask]
    packed = len(documents[0]) > 1 or "cu_seq_lens_q" in batch
    positions = [[place for n in row for place in range(n)] for row in documents]
    padding = [[min(i, max(row)) if packed else row[-1] for i in range(fill)] for row in positions]
    assert whole(sharded, "position_ids") == [row + more for row, more in zip(positions, padding, strict=True)]
    if "labels" in batch:
        assert whole(sharded, "shift_labels") == [[*row[1:], *[-100] * (fill + 1)] for row in batch["labels"].tolist()]
    bounds = [0, *itertools.accumulate(documents[0])]
    assert set(sharded.common) == ({"cu_seq_lens_q", "cu_seq_lens_k"} if packed else set())
    for key in sharded.common:
        assert sharded.common[key].tolist() == bounds + ([padded] if fill else [])


DTYPES = st.sampled_from([torch.int64, torch.int32, torch.uint8, torch.bool, torch.float32, torch.bfloat16])
TENSORS = st.builds(
    lambda shape, dtype, fill: torch.full(shape, fill).to(dtype),
    st.lists(st.integers(0, 4), max_size=4),
    DTYPES,
    st.sampled_from([0, 1, -1, -100, 7]),
) | st.builds(lambda values, dtype: torch.tensor(values).to(dtype), st.lists(st.integers(0, 5), max_size=5), DTYPES)
VALUES = TENSORS | st.none() | st.integers() | st.text(max_size=3) | st.lists(st.lists(st.integers()), max_size=3)
KEYS = st.sampled_from(
    (
        *("input_ids", "inputs_embeds", "labels", "shift_labels", "position_ids", "attention_mask", "seq_idx"),
        *("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "pixel_values"),
    )
)


@settings(max_examples=600)
@given(
    st.dictionaries(KEYS | st.integers(), VALUES, max_size=5),
    st.none() | st.tuples(st.integers(0, 3), st.integers(0, 5)),
    st.integers(1, 8),
    st.booleans(),
    st.booleans(),
)
@example({"labels": torch.ones(3, 4).long()}, (2, 4), 2, True, True)
@example({"position_ids": torch.arange(4).expand(3, 4)}, (2, 4), 2, True, True)
@example({"position_ids": torch.tensor(0)}, (2, 4), 2, True, True)
@example({"attention_mask": torch.ones(3, 4)}, (2, 4), 2, False, True)
@example({"cu_seq_lens_q": torch.tensor([0, 5, 3, 4], dtype=torch.uint8)}, (1, 4), 2, True, False)
@example({1: 2, "labels": None}, None, 2, True, True)
@example({"labels": torch.ones(2, 4, 3).long()}, (2, 4), 2, True, True)
@example({"labels": [[1, 2, 3, 4]]}, (1, 4), 2, True, True)
@example({}, (0, 4), 2, True, True)
def test_anything_for_a_batch_is_cut_into_equal_shards_or_refused(batch, shape, P, packing, marks_padding):
    if shape is not None:
        batch = {**batch, "input_ids": torch.ones(shape, dtype=torch.long)}
    try:
        sharded = shard_batch(batch, P, ShardingConfig(P, packing, marks_padding))
    except DataError as error:
        assert str(error)
        return
    tokens = [shard.get("input_ids", shard.get("inputs_embeds")) for shard in sharded.shards]
    assert len({each.shape for each in tokens}) == 1 and len(tokens) == P and tokens[0].shape[0] * tokens[0].shape[1]
    rows = tokens[0].shape[0]
    for shard in sharded.shards:
        assert all(x.shape[-2 if key == "position_ids" else 0] in (1, rows) for key, x in shard.items())
        for key in ("labels", "shift_labels", REAL_TOKENS):
            assert key not in shard or shard[key].shape == tokens[0].shape[:2]


@pytest.mark.parametrize("batch", [None, 3, "text", [], torch.ones(2, 2)])
def test_what_is_no_mapping_is_refused(batch):
    with pytest.raises(DataError, match="a batch must be a mapping"):
        shard_batch(batch, 2, ShardingConfig(2))
