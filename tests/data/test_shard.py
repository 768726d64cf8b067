"""One batch, cut: every cell says which row and token it is, so a failure names the token that went astray.

Legend: B batch, S whole sequence, P ranks.
"""

from collections import UserDict

import pytest
import torch

from deepspeed_alst.data.sharding import (
    PLACE,
    REAL_TOKENS,
    ShardingConfig,
    pad_as_before,
    pad_on_the_right,
    shard_batch,
    shift_labels,
)
from deepspeed_alst.data.validation import check_mask
from deepspeed_alst.errors import DataError

# B, S, P, multiple: ragged, exact, shorter than one shard, a single token, more padding than tokens.
SIZES = [(1, 7, 2, 2), (2, 13, 2, 8), (3, 63, 3, 9), (2, 24, 4, 8), (1, 3, 4, 32), (2, 1, 2, 2), (5, 1000, 7, 63)]


def tokens(B: int, S: int, offset: int = 0) -> torch.Tensor:
    """``[B, S]``, each cell 10,000 * row + token + 1: no cell is the padding's 0."""
    return offset + 10_000 * torch.arange(B)[:, None] + torch.arange(S) + 1


def cut(batch, sp_size=2, multiple=2):
    return shard_batch(batch, sp_size, ShardingConfig(multiple))


def whole(sharded, key: str, dim: int = 1) -> torch.Tensor:
    return torch.cat([shard[key] for shard in sharded.shards], dim)


def padded_rows(rows: list[list[int]], multiple: int, value: int) -> list[list[int]]:
    """The definition of padding, a token at a time."""
    padded = []
    for row in rows:
        row = list(row)
        while len(row) % multiple:
            row.append(value)
        padded.append(row)
    return padded


def shifted_rows(rows: list[list[int]]) -> list[list[int]]:
    """The definition of a shift: a token's label is the next token's; the last token of a row has none."""
    return [[*row[1:], -100] for row in rows]


def refusal(batch, sp_size=2, multiple=2) -> str:
    with pytest.raises(DataError) as refused:
        shard_batch(batch, sp_size, ShardingConfig(multiple))
    return str(refused.value)


# --- what the shards hold


@pytest.mark.parametrize(("B", "S", "P", "multiple"), SIZES)
def test_the_shards_put_together_are_the_padded_whole(B, S, P, multiple):
    ids, labels = tokens(B, S), tokens(B, S, offset=500_000)
    sharded = shard_batch({"input_ids": ids, "labels": labels}, P, ShardingConfig(multiple))
    assert len(sharded.shards) == P and sharded.common == {}
    sizes = {tuple(x.shape) for shard in sharded.shards for x in shard.values()}
    length = -(-S // multiple) * multiple
    assert sizes == {(B, length // P)}, "every shard is as long as every other"
    assert whole(sharded, "input_ids").tolist() == padded_rows(ids.tolist(), multiple, 0)
    assert whole(sharded, "labels").tolist() == padded_rows(labels.tolist(), multiple, -100)
    assert whole(sharded, "position_ids").tolist() == [[min(place, S - 1) for place in range(length)]] * B
    assert whole(sharded, "shift_labels").tolist() == padded_rows(shifted_rows(labels.tolist()), multiple, -100)


def test_real_tokens_are_neither_the_masks_padding_nor_ours():
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]])
    for batch, real in (
        ({}, [[1] * 5 + [0] * 3] * 2),
        ({"attention_mask": mask}, [[1] * 5 + [0] * 3, [1, 1] + [0] * 6]),
    ):
        sharded = shard_batch({"input_ids": tokens(2, 5), **batch}, 4, ShardingConfig(8, marks_padding=True))
        assert whole(sharded, REAL_TOKENS).tolist() == torch.tensor(real).bool().tolist()


def test_a_batch_without_labels_gets_none():
    sharded = cut({"input_ids": tokens(2, 5)})
    assert [set(shard) for shard in sharded.shards] == [{"input_ids", "position_ids"}] * 2


def test_labels_are_shifted_before_the_cut_so_that_the_last_token_of_a_shard_has_the_next_shards_first_label():
    labels = tokens(1, 6)
    sharded = cut({"input_ids": tokens(1, 6), "labels": labels}, sp_size=3, multiple=3)
    assert [shard["shift_labels"].tolist() for shard in sharded.shards] == [[[2, 3]], [[4, 5]], [[6, -100]]]
    assert whole(sharded, "labels").tolist() == labels.tolist(), "the labels themselves stay where they are"


def test_labels_that_are_shifted_already_are_not_shifted_again():
    ready = tokens(2, 5, offset=900_000)
    for batch in ({"shift_labels": ready}, {"shift_labels": ready, "labels": tokens(2, 5)}):
        sharded = cut({"input_ids": tokens(2, 5), **batch})
        assert whole(sharded, "shift_labels").tolist() == padded_rows(ready.tolist(), 2, -100)


def test_labels_of_no_token_at_all_stay_labels_of_no_token():
    labels = torch.full((2, 5), -100)
    sharded = cut({"input_ids": tokens(2, 5), "labels": labels})
    assert (whole(sharded, "shift_labels") == -100).all()


def test_given_positions_are_kept_and_the_last_is_repeated_in_the_padding():
    positions = torch.arange(5).expand(2, 5)
    sharded = cut({"input_ids": tokens(2, 5), "position_ids": positions}, sp_size=2, multiple=4)
    assert whole(sharded, "position_ids").tolist() == [[0, 1, 2, 3, 4, 4, 4, 4]] * 2


def test_positions_of_one_dim_are_those_of_every_row():
    sharded = cut({"input_ids": tokens(3, 5), "position_ids": torch.arange(5)})
    assert whole(sharded, "position_ids").tolist() == [[0, 1, 2, 3, 4, 4]] * 3


def test_positions_of_a_single_row_are_cut_like_any_other():
    sharded = cut({"input_ids": tokens(3, 5), "labels": tokens(3, 5), "position_ids": torch.arange(5)[None]})
    assert whole(sharded, "position_ids").tolist() == [[0, 1, 2, 3, 4, 4]]
    assert whole(sharded, "shift_labels").tolist() == padded_rows(shifted_rows(tokens(3, 5).tolist()), 2, -100)


def test_positions_of_three_dims_are_cut_along_the_sequence():
    # Multi-dimensional rotary embeddings: text, height, width. The first counts the tokens.
    positions_3BS = torch.stack([torch.arange(5).expand(2, 5), tokens(2, 5, 100), tokens(2, 5, 200)])
    sharded = cut({"input_ids": tokens(2, 5), "labels": tokens(2, 5), "position_ids": positions_3BS})
    assert [tuple(shard["position_ids"].shape) for shard in sharded.shards] == [(3, 2, 3)] * 2
    got = whole(sharded, "position_ids", dim=-1)
    assert torch.equal(got[..., :5], positions_3BS)
    assert torch.equal(got[..., 5], positions_3BS[..., 4])


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.bool, torch.bfloat16, torch.float64, torch.uint8])
def test_a_tensor_keeps_its_dtype_where_it_is_padded(dtype):
    extra = (tokens(2, 5) % 2).to(dtype)
    sharded = cut({"input_ids": tokens(2, 5), "extra": extra})
    got = whole(sharded, "extra")
    assert got.dtype == dtype and torch.equal(got[:, :5], extra) and not got[:, 5:].any()


def test_ids_labels_and_positions_keep_their_dtype_where_they_are_padded():
    positions = torch.arange(5, dtype=torch.int32).expand(2, 5)
    ids, labels = tokens(2, 5).int(), tokens(2, 5).int()
    shard = cut({"input_ids": ids, "labels": labels, "position_ids": positions}).shards[1]
    assert {key: x.dtype for key, x in shard.items()} == dict.fromkeys(shard, torch.int32)


@pytest.mark.parametrize("tail", [(), (3,), (3, 5)])
def test_an_extra_tensor_with_a_sequence_dim_is_cut_and_padded_with_zeros(tail):
    extra = torch.randn(2, 7, *tail)
    sharded = cut({"input_ids": tokens(2, 7), "extra": extra}, sp_size=3, multiple=9)
    got = whole(sharded, "extra")
    assert got.shape == (2, 9, *tail)
    assert torch.equal(got[:, :7], extra) and not got[:, 7:].any()
    assert "extra" not in sharded.common


def test_embeddings_take_the_place_of_ids():
    embeds, labels = torch.randn(2, 5, 3), tokens(2, 5)
    sharded = cut({"inputs_embeds": embeds, "labels": labels})
    assert torch.equal(whole(sharded, "inputs_embeds")[:, :5], embeds)
    assert whole(sharded, "position_ids").tolist() == [[0, 1, 2, 3, 4, 4]] * 2
    assert whole(sharded, "shift_labels").tolist() == padded_rows(shifted_rows(labels.tolist()), 2, -100)


def test_what_has_no_sequence_dim_goes_to_every_rank_as_it_is():
    extra = {
        "num_items_in_batch": torch.tensor(17),
        "weights": torch.tensor([0.5, 2.0]),
        "one_per_token_but_no_batch": torch.arange(5),
        "pixel_values": torch.randn(2, 3, 4, 4),
        "name": "a document",
        "names": ["a", "b"],
        "nested": {"ids": [1, [2, 3]]},
        "count": 5,
        "nothing": None,
    }
    sharded = cut({"input_ids": tokens(2, 5), **extra})
    assert set(sharded.common) == set(extra)
    for key, value in extra.items():
        assert sharded.common[key] is value
    assert all(set(shard) == {"input_ids", "position_ids"} for shard in sharded.shards)


@pytest.mark.parametrize("key", ["position_ids", "labels", "shift_labels", "attention_mask", "inputs_embeds"])
def test_an_entry_that_is_none_is_an_entry_that_is_not_there(key):
    plain = {"input_ids": tokens(2, 5)}
    if key == "shift_labels":
        plain["labels"] = tokens(2, 5)
    sharded, without = cut({**plain, key: None}), cut(plain)
    assert not set(sharded.shards[0]) & set(sharded.common), "what goes to every rank would overwrite the shard"
    for got, expected in zip(sharded.shards, without.shards, strict=True):
        assert {k: x.tolist() for k, x in got.items()} == {k: x.tolist() for k, x in expected.items()}


def test_a_batch_is_not_changed_by_cutting_it():
    batch = {"input_ids": tokens(2, 5), "labels": tokens(2, 5), "attention_mask": torch.ones(2, 5)}
    before = {key: x.clone() for key, x in batch.items()}
    cut(batch)
    assert set(batch) == set(before) and all(torch.equal(batch[key], before[key]) for key in before)


def test_a_batch_may_be_a_user_dict_as_transformers_makes_it():
    sharded = cut(UserDict({"input_ids": tokens(2, 5), "labels": tokens(2, 5)}))
    assert whole(sharded, "input_ids").tolist() == padded_rows(tokens(2, 5).tolist(), 2, 0)


# --- masks


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.float32])
@pytest.mark.parametrize("lengths", [(7, 7), (7, 4), (1, 6)])
def test_a_mask_of_ones_or_of_padding_on_the_right_is_dropped(lengths, dtype):
    mask = (torch.arange(7) < torch.tensor(lengths)[:, None]).to(dtype)
    labels = tokens(2, 7).masked_fill(mask == 0, -100)
    batch = {"input_ids": tokens(2, 7), "labels": labels}
    sharded, without = cut({**batch, "attention_mask": mask}), cut(batch)
    assert "attention_mask" not in sharded.common
    for got, expected in zip(sharded.shards, without.shards, strict=True):
        assert {key: x.tolist() for key, x in got.items()} == {key: x.tolist() for key, x in expected.items()}


def test_a_label_on_a_padding_token_is_refused_with_its_row():
    # A masked token does not see itself at SP=1; without the mask it does, and its loss would be another.
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    message = refusal({"input_ids": tokens(2, 5), "labels": tokens(2, 5), "attention_mask": mask})
    assert "label" in message and "row 1" in message


def test_a_mask_with_padding_on_the_left_is_refused_with_its_row_and_the_way_out():
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])
    message = refusal({"input_ids": tokens(2, 5), "attention_mask": mask})
    assert "padding on the left in row 1" in message and "tokenizer.padding_side = 'right'" in message


def test_a_mask_with_holes_is_refused_with_its_row():
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 0, 1, 1, 0]])
    assert "holes in row 2" in refusal({"input_ids": tokens(3, 5), "attention_mask": mask})


def test_a_mask_of_four_dims_is_refused_with_its_shape():
    message = refusal({"input_ids": tokens(2, 5), "attention_mask": torch.ones(2, 1, 5, 5)})
    assert "attention_mask has shape [2, 1, 5, 5]" in message


@pytest.mark.parametrize("mask", [torch.ones(2, 4), torch.ones(2, 6), torch.ones(5), torch.tensor(1)])
def test_a_mask_of_another_length_is_refused_with_both(mask):
    message = refusal({"input_ids": tokens(2, 5), "attention_mask": mask})
    assert f"attention_mask has shape {list(mask.shape)}" in message and "5 tokens" in message


def test_a_mask_that_is_no_tensor_is_refused_by_its_name():
    # Anything but a DataError here leaves the other ranks waiting: the loader tells them of no other.
    message = refusal({"input_ids": tokens(1, 3), "attention_mask": [[1, 1, 1]]})
    assert "attention_mask" in message and "list" in message


# --- packed samples


@pytest.mark.parametrize(
    ("positions", "where"),
    [
        ([[0, 1, 2, 3, 4], [0, 1, 0, 1, 2]], "token 2 of row 1"),
        ([[0, 0, 0, 1, 2], [0, 1, 2, 3, 4]], "token 1 of row 0"),
        ([[0, 1, 2, 4, 5], [0, 1, 2, 3, 4]], "token 3 of row 0"),
    ],
)
def test_positions_that_do_not_count_on_are_refused_as_packed_with_the_token(positions, where):
    message = refusal({"input_ids": tokens(2, 5), "position_ids": torch.tensor(positions)})
    assert f"position_ids restart at {where}" in message and "packed" in message


def test_packed_positions_in_one_row_for_all_are_refused_too():
    for positions in (torch.tensor([0, 1, 2, 0, 1]), torch.tensor([[0, 1, 2, 0, 1]])):
        assert "token 3 of row 0" in refusal({"input_ids": tokens(2, 5), "position_ids": positions})


def test_packed_text_positions_of_three_dims_are_refused():
    positions_4BS = torch.arange(5).expand(4, 2, 5).clone()
    positions_4BS[0, 1] = torch.tensor([0, 1, 2, 0, 1])
    assert "token 3 of row 1" in refusal({"input_ids": tokens(2, 5), "position_ids": positions_4BS})


def test_positions_by_time_height_and_width_stand_for_one_document():
    positions_3BS = torch.tensor([0, 1, 1, 1, 2]).expand(3, 2, 5)
    sharded = shard_batch(
        {"input_ids": tokens(2, 5), "position_ids": positions_3BS}, 2, ShardingConfig(2, packing=True)
    )
    assert [shard["position_ids"][0, 1].tolist() for shard in sharded.shards] == [[0, 1, 1], [1, 2, 2]]
    assert "cu_seq_lens_q" not in sharded.common


def test_packed_documents_come_with_their_bounds_and_padding_is_a_document_of_its_own():
    positions = torch.tensor([[0, 1, 2, 0, 1]])
    batch = {"input_ids": tokens(1, 5), "labels": tokens(1, 5), "position_ids": positions}
    sharded = shard_batch(batch, 2, ShardingConfig(4, packing=True))
    assert {key: x.tolist() for key, x in sharded.common.items()} == {
        "cu_seq_lens_q": [0, 3, 5, 8],
        "cu_seq_lens_k": [0, 3, 5, 8],
    }
    assert {x.dtype for x in sharded.common.values()} == {torch.int32}
    assert whole(sharded, "position_ids").tolist() == [[0, 1, 2, 0, 1, 0, 1, 2]]
    # transformers' loss moves the row's labels and looks at no document; packing collators mask the first of each.
    assert whole(sharded, "labels").tolist() == [[1, 2, 3, 4, 5, -100, -100, -100]]
    assert whole(sharded, "shift_labels").tolist() == [[2, 3, 4, 5, -100, -100, -100, -100]]


def test_positions_of_the_padding_of_packed_documents_are_not_higher_than_theirs():
    sharded = shard_batch(
        {"input_ids": tokens(1, 5), "position_ids": torch.tensor([[0, 1, 2, 0, 1]])}, 2, ShardingConfig(12, True)
    )
    assert whole(sharded, "position_ids").tolist() == [[0, 1, 2, 0, 1, 0, 1, 2, 2, 2, 2, 2]]


def test_documents_that_fill_the_row_need_no_padding():
    positions = torch.tensor([[0, 1, 2, 0]])
    sharded = shard_batch({"input_ids": tokens(1, 4), "position_ids": positions}, 2, ShardingConfig(4, packing=True))
    assert sharded.common["cu_seq_lens_q"].tolist() == [0, 3, 4]


def test_where_packing_is_possible_rows_of_one_document_stay_as_they_are():
    batch = {"input_ids": tokens(2, 5), "labels": tokens(2, 5)}
    packing, plain = shard_batch(batch, 2, ShardingConfig(4, packing=True)), shard_batch(batch, 2, ShardingConfig(4))
    assert packing.common == {}
    for got, expected in zip(packing.shards, plain.shards, strict=True):
        assert {key: x.tolist() for key, x in got.items()} == {key: x.tolist() for key, x in expected.items()}


@pytest.mark.parametrize(
    ("positions", "bounds"),
    [
        ([7, 8, 9, 10, 11], None),
        ([0, 1, 5, 6, 7], [0, 2, 5, 8]),
        ([0, 2, 4, 6, 8], [0, 1, 2, 3, 4, 5, 8]),
        ([0, 0, 0, 0, 0], [0, 1, 2, 3, 4, 5, 8]),
        ([3, 4, 0, 1, 2], [0, 2, 5, 8]),
    ],
)
def test_documents_are_those_that_transformers_reads_out_of_positions_and_shards_say_whose_they_are(positions, bounds):
    from transformers.masking_utils import find_packed_sequence_indices

    batch = {"input_ids": tokens(1, 5), "position_ids": torch.tensor([positions])}
    sharded = shard_batch(batch, 2, ShardingConfig(4, packing=True))
    found = sharded.common.get("cu_seq_lens_q")
    assert (found is None and bounds is None) or found.tolist() == bounds
    theirs = find_packed_sequence_indices(batch["position_ids"])
    if bounds is not None:
        numbers = torch.repeat_interleave(torch.arange(len(bounds) - 1), found.diff().long())[:5]
        assert torch.equal(numbers, theirs[0] - theirs[0, 0])
    else:
        assert theirs is None
    assert whole(sharded, "position_ids")[0, :5].tolist() == positions
    if positions == [0] * 5:  # a count from 0 in each document tells by itself
        assert all(PLACE not in shard for shard in sharded.shards)
    else:
        (rank_0, one), (rank_1, other) = (shard[PLACE].tolist() for shard in sharded.shards)
        assert (rank_0, rank_1) == (0, 1) and one == other


def test_with_a_mask_positions_are_positions_and_no_documents_as_in_transformers():
    batch = {"input_ids": tokens(2, 5), "position_ids": torch.tensor([[0, 1, 7, 8, 9], [0, 3, 4, 5, 6]])}
    sharded = shard_batch({**batch, "attention_mask": torch.ones(2, 5)}, 2, ShardingConfig(4, packing=True))
    assert sharded.common == {} and PLACE in sharded.shards[0]
    # Flash attention is given no mask of ones.
    with pytest.raises(DataError, match="2 rows"):
        again = {**batch, "position_ids": torch.tensor([0, 1, 0, 1, 2]), "attention_mask": torch.ones(2, 5)}
        shard_batch(again, 2, ShardingConfig(4, packing=True, by_lowest=True))


def test_flash_attention_starts_documents_at_the_lowest_position():
    batch = {"input_ids": tokens(1, 6), "position_ids": torch.tensor([[2, 3, 9, 2, 3, 4]])}
    assert shard_batch(batch, 2, ShardingConfig(6, True, by_lowest=True)).common["cu_seq_lens_q"].tolist() == [0, 3, 6]
    batch["position_ids"] = torch.tensor([[5, 6, 0, 1, 2, 3]])
    with pytest.raises(DataError, match="part of none"):
        shard_batch(batch, 2, ShardingConfig(6, True, by_lowest=True))


@pytest.mark.parametrize("S", [1, 2, 7, 63])
def test_the_last_token_of_a_row_has_no_label_and_every_other_the_next_tokens(S):
    labels = tokens(3, S)
    got = shift_labels(labels)
    assert got.tolist() == shifted_rows(labels.tolist())
    assert got.shape == labels.shape and got.dtype == labels.dtype


# --- what is no batch


@pytest.mark.parametrize("key", ["labels", "shift_labels", "position_ids"])
@pytest.mark.parametrize("S", [4, 6])
def test_sequences_of_different_lengths_are_refused_with_both(key, S):
    x = torch.arange(S).expand(2, S)
    message = refusal({"input_ids": tokens(2, 5), key: x})
    assert f"{key} has shape [2, {S}]" in message and "5 tokens" in message


def test_labels_of_a_classification_are_refused():
    assert "labels has shape [2]" in refusal({"input_ids": tokens(2, 5), "labels": torch.tensor([0, 1])})


def test_ids_and_embeddings_of_different_lengths_are_refused():
    message = refusal({"input_ids": tokens(2, 5), "inputs_embeds": torch.randn(2, 4, 3)})
    assert "inputs_embeds has shape [2, 4, 3]" in message and "5 tokens" in message


@pytest.mark.parametrize(
    "batch",
    [{}, {"labels": torch.ones(2, 5)}, {"input_ids": [[1, 2]]}, {"input_ids": torch.arange(5)}, {"input_ids": None}],
    ids=["empty", "labels only", "lists", "no batch dim", "None"],
)
def test_a_batch_without_ids_of_a_batch_and_a_sequence_dim_is_refused_with_the_keys_that_it_has(batch):
    message = refusal(batch)
    assert "input_ids or inputs_embeds of shape [batch, sequence, ...]" in message and str(sorted(batch)) in message


@pytest.mark.parametrize("batch", [(torch.ones(2, 5), torch.ones(2, 5)), [torch.ones(2, 5)], torch.ones(2, 5), "text"])
def test_a_batch_that_is_no_mapping_is_refused_with_its_type_and_the_way_out(batch):
    message = refusal(batch)
    assert f"not {type(batch).__name__}" in message and "collate_fn" in message


def test_sequences_of_no_token_are_refused():
    assert "length 0" in refusal({"input_ids": torch.ones(2, 0, dtype=torch.long)})


# --- padding on the left, in batches that the engine splits


def test_padding_moves_to_the_right_and_back():
    mask = torch.tensor([[0, 0, 1, 1, 1, 0], [1, 1, 1, 0, 0, 0], [0, 1, 1, 1, 1, 1]])
    ids = torch.arange(1, 19).view(3, 6) * mask
    batch = {"input_ids": ids, "attention_mask": mask, "wide": ids[..., None].expand(3, 6, 2), "flag": True}
    moved, first = pad_on_the_right(batch)
    assert moved["input_ids"][:, :3].tolist() == [[3, 4, 5], [7, 8, 9], [14, 15, 16]]
    assert moved["position_ids"].tolist() == [[2, 3, 4, 5, 5, 5], [0, 1, 2, 3, 4, 5], [1, 2, 3, 4, 5, 5]]
    check_mask(moved["attention_mask"], {})
    assert moved["flag"] is True and torch.equal(moved["wide"][..., 1], moved["input_ids"])
    for key in ("input_ids", "wide", "attention_mask"):
        assert torch.equal(pad_as_before(moved[key], first), batch[key])


def test_a_batch_without_padding_on_the_left_is_not_touched():
    batch = {"input_ids": torch.ones(2, 3), "attention_mask": torch.tensor([[1, 1, 0], [1, 1, 1]])}
    moved, first = pad_on_the_right(batch)
    assert moved is batch and first is None and pad_as_before(batch["input_ids"], first) is batch["input_ids"]


def test_a_label_that_padding_would_predict_is_refused():
    mask = torch.tensor([[0, 1, 1]])
    with pytest.raises(DataError, match="labels has a label on the first token of a row that is padded on the left"):
        pad_on_the_right({"input_ids": mask, "attention_mask": mask, "labels": torch.tensor([[-100, 5, 6]])})


def test_labels_of_a_few_tokens_may_begin_with_the_first_after_the_padding():
    mask = torch.tensor([[0, 0, 1, 1]])
    shifted = torch.tensor([[-100, -100, 7, -100]])
    moved, _ = pad_on_the_right({"input_ids": mask, "attention_mask": mask, "labels": shifted, "shift_labels": shifted})
    assert moved["shift_labels"].tolist() == [[7, -100, -100, -100]]
    shifted = torch.tensor([[-100, 6, 7, -100]])
    with pytest.raises(DataError, match="shift_labels has a label on the first token"):
        pad_on_the_right({"input_ids": mask, "attention_mask": mask, "labels": shifted, "shift_labels": shifted})
