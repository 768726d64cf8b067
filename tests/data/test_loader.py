"""P samples in, P micro-steps out, on real gloo ranks. Each token says whose it is.

A token is 100,000 * rank + 1,000 * batch + 100 * row + position + 1: a failure names the one that went astray.
Legend: P = sp_size ranks of a sequence.
"""

import functools
import os
import time
import warnings
from collections.abc import Iterator
from itertools import chain
from typing import Any

import pytest
import torch
import torch.distributed as dist

from benchmarks.ranks import Ranks
from deepspeed_alst.data.loader import ShardedDataLoader
from deepspeed_alst.data.sharding import ShardingConfig
from deepspeed_alst.data.validation import Vocabulary
from deepspeed_alst.distributed.collectives import raise_on_all_ranks
from deepspeed_alst.distributed.mesh import build_control_group, build_groups
from deepspeed_alst.errors import DataError

# Long enough for a busy machine, and short of gloo's 30 minutes: a rank that waits for another shows here.
SECONDS = 200.0
MULTIPLE = 4


# --- what runs on the ranks; pickled by name, so at module level


@functools.cache
def groups_of(sp_size: int):
    """Process groups are built once per rank process."""
    return build_groups(sp_size, build_control_group())


def ids_of(rank: int, batch: int, rows: int, length: int) -> torch.Tensor:
    first = 100_000 * rank + 1_000 * batch + 1
    return first + 100 * torch.arange(rows)[:, None] + torch.arange(length)


def batch_of(rank: int, batch: int, rows: int = 1, length: int = 7) -> dict[str, Any]:
    ids = ids_of(rank, batch, rows, length)
    return {"input_ids": ids, "labels": ids + 50}


def plain(value: Any) -> Any:
    """A value as the parent can take it: tensors as (dtype, nested lists)."""
    return (str(value.dtype), value.tolist()) if isinstance(value, torch.Tensor) else value


def shards_of(loader: Any, sp_size: int, multiple: int = MULTIPLE) -> dict[str, Any]:
    """An epoch of this rank: its micro-batches, and the warnings that were given."""
    sharded = ShardedDataLoader(loader, groups_of(sp_size), ShardingConfig(multiple))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        batches = [{key: plain(value) for key, value in batch.items()} for batch in sharded]
    return {"batches": batches, "warnings": [str(each.message) for each in caught]}


def epoch_of_sizes(sp_size: int, sizes: list[list[tuple[int, int]]], multiple: int) -> dict[str, Any]:
    """``sizes[rank]`` are (rows, length) of each batch of that rank."""
    rank = dist.get_rank()
    batches = [batch_of(rank, i, rows, length) for i, (rows, length) in enumerate(sizes[rank])]
    return shards_of(batches, sp_size, multiple)


class Tokens(torch.utils.data.Dataset):
    """Samples of equal length, known by their index."""

    def __init__(self, size: int, constant: bool = False) -> None:
        self.size, self.constant = size, constant

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = 1_000 * (0 if self.constant else index) + torch.arange(7)
        return {"input_ids": ids, "labels": ids}


class TokenStream(torch.utils.data.IterableDataset):
    """The same without a length."""

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        return iter(Tokens(9)[index] for index in range(9))


def epoch_of_dataset(sp_size: int, dataset: Any, batch_size: int, sampler: str) -> dict[str, Any]:
    chosen = None
    if sampler == "distributed":
        chosen = torch.utils.data.DistributedSampler(dataset, dist.get_world_size(), dist.get_rank(), shuffle=False)
    elif sampler == "per replica":
        groups = groups_of(sp_size)
        chosen = torch.utils.data.DistributedSampler(dataset, groups.dp_size, groups.dp_rank, shuffle=False)
    return shards_of(torch.utils.data.DataLoader(dataset, batch_size=batch_size, sampler=chosen), sp_size)


class Broken:
    """What others cannot read though its owner can send it."""

    def __reduce__(self) -> tuple[Any, ...]:
        return int, ("no number",)


class Fails:
    """A loader that breaks on one rank: in iter(), in a batch, or with a batch that cannot be cut."""

    def __init__(self, where: str, rank: int, after: int = 0) -> None:
        self.where, self.rank, self.after = where, rank, after

    def __iter__(self) -> Iterator[Any]:
        if self.where == "iter" and dist.get_rank() == self.rank:
            raise OSError("the disk is gone")
        return self._batches()

    def _batches(self) -> Iterator[Any]:
        for i in range(self.after + 2):
            if i == self.after and dist.get_rank() == self.rank:
                if self.where == "dataset":
                    raise KeyError("text")
                if self.where == "left padding":
                    yield {**batch_of(0, i), "attention_mask": torch.tensor([[0, 1, 1, 1, 1, 1, 1]])}
                if self.where == "tuple":
                    yield tuple(batch_of(0, i).values())
                if self.where == "a gradient":
                    yield {"inputs_embeds": torch.ones(1, 7, 4, requires_grad=True)}
                if self.where == "a mask that is a list":
                    yield {**batch_of(0, i), "attention_mask": [[1] * 7]}
                if self.where == "a value that cannot be pickled":
                    yield {**batch_of(0, i), "function": lambda: None}
                if self.where == "a value that cannot be unpickled":
                    yield {**batch_of(0, i), "value": Broken()}
                if self.where == "a tensor without data":
                    yield {**batch_of(0, i), "scale": torch.empty(3, device="meta")}
            yield batch_of(dist.get_rank(), i)


def epoch_that_fails(sp_size: int, where: str, rank: int, after: int) -> tuple[str, str, int, float]:
    """Class and message of what the epoch ended with, the micro-steps before it, and the seconds that it took."""
    sharded = ShardedDataLoader(Fails(where, rank, after), groups_of(sp_size), ShardingConfig(MULTIPLE))
    steps, started = 0, time.monotonic()
    try:
        for _ in sharded:
            steps += 1
    except Exception as error:
        return type(error).__name__, str(error), steps, time.monotonic() - started
    return "nothing", "", steps, time.monotonic() - started


def epoch_that_fails_on_every_rank(sp_size: int) -> str:
    def batches() -> Iterator[Any]:
        raise OSError(f"no disk {dist.get_rank()}")
        yield

    with pytest.raises(DataError) as raised:
        list(ShardedDataLoader(batches(), groups_of(sp_size), ShardingConfig(MULTIPLE)))
    return str(raised.value)


def epoch_with_everything(sp_size: int) -> list[dict[str, Any]]:
    rank = dist.get_rank()
    batch = {
        **batch_of(rank, 0, rows=2, length=5),
        "name": f"sample {rank}",
        "names": [f"row {rank}", "row"],
        "nested": {"of": [rank, (1.5, None)]},
        "three_bytes": torch.tensor([1, 2, 3], dtype=torch.uint8),
        "count": torch.tensor(10 + rank),
        "scale": torch.tensor(0.1 + rank, dtype=torch.float64),
        "flags": torch.tensor([[True, False, True, False, rank == 0]] * 2),
        "weights": (torch.arange(10).view(2, 5) / 3 + rank).to(torch.bfloat16),
        "bytes": torch.arange(10, dtype=torch.uint8).view(2, 5) + rank,
        "none": torch.empty(0, 3),
        "per_row": torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]) + rank,
    }
    return shards_of([batch], sp_size)["batches"]


def epoch_of_encodings(sp_size: int, num_batches: list[int]) -> list[tuple[str, bool]]:
    from transformers import BatchEncoding

    rank = dist.get_rank()
    loader = [BatchEncoding(batch_of(rank, i)) for i in range(num_batches[rank])]
    sharded = ShardedDataLoader(loader, groups_of(sp_size), ShardingConfig(MULTIPLE))
    return [(type(batch).__name__, "input_ids" in batch) for batch in sharded]


def epoch_of_none_entries(sp_size: int) -> list[dict[str, Any]]:
    batch = {**batch_of(dist.get_rank(), 0), "position_ids": None, "shift_labels": None, "attention_mask": None}
    return shards_of([batch], sp_size)["batches"]


class WithEpochs:
    """A loader of a program's own, with a ``set_epoch`` that changes what it yields."""

    dataset = "the dataset"

    def __init__(self) -> None:
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return 3

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter([batch_of(dist.get_rank(), 10 * self.epoch + i) for i in range(3)])


def first_ids(batches: Any) -> list[int]:
    """The first token of each micro-batch, where it is the sequence's first; else its negative."""
    return [int(b["input_ids"][0, 0]) * (1 if b["position_ids"][0, 0] == 0 else -1) for b in batches]


def attributes_of_a_torch_loader(sp_size: int) -> dict[str, Any]:
    dataset = Tokens(11)
    sampler = torch.utils.data.DistributedSampler(dataset, dist.get_world_size(), dist.get_rank())
    loader = torch.utils.data.DataLoader(dataset, batch_size=2, sampler=sampler)
    sharded = ShardedDataLoader(loader, groups_of(sp_size), ShardingConfig(MULTIPLE))
    with pytest.raises(AttributeError, match="zzz"):
        _ = sharded.zzz
    return {
        "dataset": sharded.dataset is dataset,
        "sampler": sharded.sampler is sampler,
        "batch_sampler": sharded.batch_sampler is loader.batch_sampler,
        "batch_size": sharded.batch_size,
        "len": len(sharded),
        "len of loader": len(loader),
        "steps": sum(1 for _ in sharded),
    }


def epochs_that_are_set(sp_size: int) -> dict[str, Any]:
    inner = WithEpochs()
    sharded = ShardedDataLoader(inner, groups_of(sp_size), ShardingConfig(MULTIPLE))
    before = first_ids(sharded)
    sharded.set_epoch(1)
    return {"before": before, "after": first_ids(sharded), "epoch": inner.epoch, "dataset": sharded.dataset}


def epochs_with_a_break(sp_size: int, steps: int) -> dict[str, Any]:
    sharded = ShardedDataLoader(WithEpochs(), groups_of(sp_size), ShardingConfig(MULTIPLE))
    part = []
    for batch in sharded:
        part += first_ids([batch])
        if len(part) == steps:
            break
    return {"part": part, "whole": first_ids(sharded), "again": first_ids(sharded)}


def steps_until_the_sampler_is_refused(sp_size: int, dataset: Any, sampler: str) -> tuple[int, str]:
    sharded = torch.utils.data.DataLoader(dataset, sampler=None)
    if sampler == "per replica":
        groups = groups_of(sp_size)
        chosen = torch.utils.data.DistributedSampler(dataset, groups.dp_size, groups.dp_rank, shuffle=False)
        sharded = torch.utils.data.DataLoader(dataset, sampler=chosen)
    steps = 0
    with pytest.raises(DataError) as raised:
        for _ in ShardedDataLoader(sharded, groups_of(sp_size), ShardingConfig(MULTIPLE)):
            steps += 1
    return steps, str(raised.value)


def epoch_where_only_the_first_group_repeats_itself(sp_size: int) -> str:
    groups = groups_of(sp_size)
    seed = 0 if groups.dp_rank == 0 else dist.get_rank()
    loader = torch.utils.data.DataLoader([batch_of(seed, i)["input_ids"][0] for i in range(9)], collate_fn=as_batch)
    with pytest.raises(DataError) as raised:
        list(ShardedDataLoader(loader, groups, ShardingConfig(MULTIPLE)))
    return str(raised.value)


def as_batch(rows: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    return {"input_ids": torch.stack(rows)}


def agree_on_an_error(sp_size: int, rank: int) -> str:
    error = DataError("the reason") if dist.get_rank() == rank else None
    with pytest.raises(DataError) as raised:
        raise_on_all_ranks(error, groups_of(sp_size).control_group)
    raise_on_all_ranks(None, groups_of(sp_size).control_group)
    return str(raised.value)


# --- the reference: what a sample must be, put together again


def expected_of(rank: int, batch: int, rows: int, length: int, multiple: int) -> dict[str, list[list[int]]]:
    padded = -(-length // multiple) * multiple
    ids = ids_of(rank, batch, rows, length).tolist()
    return {
        "input_ids": [row + [0] * (padded - length) for row in ids],
        "labels": [[x + 50 for x in row] + [-100] * (padded - length) for row in ids],
        "shift_labels": [[x + 50 for x in row[1:]] + [-100] * (padded - length + 1) for row in ids],
        "position_ids": [[min(place, length - 1) for place in range(padded)]] * rows,
    }


def put_together(shards: list[dict[str, Any]]) -> dict[str, list[list[int]]]:
    """The shards of one micro-step, in rank order, as whole sequences."""
    return {
        key: [list(chain(*rows)) for rows in zip(*(shard[key][1] for shard in shards), strict=True)]
        for key in shards[0]
    }


def check_epoch(results: list[dict[str, Any]], sp_size: int, sizes: list[list[tuple[int, int]]], multiple: int) -> None:
    """Every batch of every rank is one micro-step of its group, in rank order, whole; and nothing else is."""
    for group in (range(first, first + sp_size) for first in range(0, len(results), sp_size)):
        rounds = max(len(sizes[rank]) for rank in group)
        turns = [(rank, i) for i in range(rounds) for rank in group if i < len(sizes[rank])]
        steps = [results[rank]["batches"] for rank in group]
        assert [len(each) for each in steps] == [len(turns)] * len(group)
        for step, (rank, i) in enumerate(turns):
            shards = [each[step] for each in steps]
            lengths = {len(shard["input_ids"][1][0]) for shard in shards}
            assert len(lengths) == 1, f"step {step}: shards of different lengths {lengths}"
            rows, length = sizes[rank][i]
            expected = expected_of(rank, i, rows, length, multiple)
            assert put_together(shards) == expected, f"step {step}: sample {i} of rank {rank}"
            assert all(shard[key][0] == "torch.int64" for shard in shards for key in shard)


# --- samples in, micro-steps out


@pytest.mark.parametrize(
    ("sizes", "multiple"),
    [
        ([[(1, 7)] * 3, [(1, 7)] * 3], 2),
        ([[(1, 7), (1, 64), (1, 1)], [(1, 33), (1, 5), (1, 8)]], 8),
        ([[(3, 7), (3, 13)], [(3, 20), (3, 1)]], 4),
        ([[(4, 9), (4, 9), (1, 5)], [(4, 9), (4, 6), (2, 31)]], 6),
        ([[(1, 1000)], [(2, 63)]], 512),
    ],
    ids=["equal", "lengths differ", "batches", "short last batch", "long"],
)
def test_the_samples_of_2_ranks_are_2_micro_steps_in_rank_order_and_whole(ranks2, sizes, multiple):
    results = ranks2.run(epoch_of_sizes, 2, sizes, multiple, seconds=SECONDS)
    check_epoch(results, 2, sizes, multiple)
    assert not any(result["warnings"] for result in results)


@pytest.mark.parametrize("sp_size", [1, 2, 4])
def test_the_samples_of_4_ranks_stay_in_their_replica(ranks4, sp_size):
    sizes = [[(2, 5 + 8 * rank + i) for i in range(3)] for rank in range(4)]
    results = ranks4.run(epoch_of_sizes, sp_size, sizes, 8, seconds=SECONDS)
    check_epoch(results, sp_size, sizes, 8)
    assert [result["warnings"] for result in results] == [[]] * 4


@pytest.mark.parametrize("num_batches", [(3, 1), (1, 3), (2, 0), (0, 1), (5, 6), (0, 0)])
def test_loaders_of_a_sequence_that_end_at_different_times_lose_nothing(ranks2, num_batches):
    sizes = [[(1, 7 + i) for i in range(n)] for n in num_batches]
    results = ranks2.run(epoch_of_sizes, 2, sizes, MULTIPLE, seconds=SECONDS)
    check_epoch(results, 2, sizes, MULTIPLE)
    assert [result["warnings"] for result in results] == [[], []]


def test_replicas_that_end_at_different_times_stop_together_with_a_warning(ranks4):
    # The second replica has 3 + 2 batches, the first 1 + 1: after the first round one of them would train alone.
    sizes = [[(1, 7)] * n for n in (1, 1, 3, 2)]
    results = ranks4.run(epoch_of_sizes, 2, sizes, MULTIPLE, seconds=SECONDS)
    check_epoch(results, 2, [[(1, 7)]] * 4, MULTIPLE)
    (warning,) = results[0]["warnings"]
    assert "micro-steps left: [0, 2]" in warning and "ranks [2, 3]" in warning and "DistributedSampler" in warning
    assert [result["warnings"] for result in results[1:]] == [[]] * 3


def test_replicas_that_have_as_many_samples_in_another_order_of_ranks_lose_nothing(ranks4):
    sizes = [[(1, 7)] * n for n in (2, 1, 1, 2)]
    results = ranks4.run(epoch_of_sizes, 2, sizes, MULTIPLE, seconds=SECONDS)
    check_epoch(results, 2, sizes, MULTIPLE)
    assert [result["warnings"] for result in results] == [[]] * 4


# --- what else is in a batch


def test_every_kind_of_value_arrives_as_it_was_sent(ranks2):
    results = ranks2.run(epoch_with_everything, 2, seconds=SECONDS)
    for rank in (0, 1):
        shards = [result[rank] for result in results]
        for shard in shards:
            assert shard["name"] == f"sample {rank}" and shard["names"] == [f"row {rank}", "row"]
            assert shard["nested"] == {"of": [rank, (1.5, None)]}
            assert shard["three_bytes"] == ("torch.uint8", [1, 2, 3])
            assert shard["count"] == ("torch.int64", 10 + rank)
            assert shard["scale"] == ("torch.float64", 0.1 + rank)
            assert shard["none"] == ("torch.float32", [])
            assert shard["per_row"] == ("torch.float32", [[x + rank for x in row] for row in ([1, 2, 3], [4, 5, 6])])
        kinds = [shards[0][key][0] for key in ("flags", "weights", "bytes")]
        assert kinds == ["torch.bool", "torch.bfloat16", "torch.uint8"]
        cut = [{key: shard[key] for key in ("flags", "weights", "bytes")} for shard in shards]
        flags, weights, sent = put_together(cut).values()
        assert flags == [[True, False, True, False, rank == 0, False, False, False]] * 2
        exact = (torch.arange(10).view(2, 5) / 3 + rank).to(torch.bfloat16).tolist()
        assert weights == [row + [0.0] * 3 for row in exact]
        assert sent == [[first + rank + i for i in range(5)] + [0] * 3 for first in (0, 5)]


def test_an_entry_that_is_none_does_not_overwrite_the_shard(ranks2):
    results = ranks2.run(epoch_of_none_entries, 2, seconds=SECONDS)
    for step in (0, 1):
        shards = [result[step] for result in results]
        assert all(shard["position_ids"] and shard["shift_labels"] for shard in shards)
        assert put_together([{key: shard[key] for key in ("position_ids", "shift_labels")} for shard in shards]) == {
            key: expected_of(step, 0, 1, 7, MULTIPLE)[key] for key in ("position_ids", "shift_labels")
        }


@pytest.mark.parametrize("num_batches", [[2, 2], [1, 2], [2, 1], [0, 2]])
def test_a_batch_encoding_stays_one_on_every_rank(ranks2, num_batches):
    results = ranks2.run(epoch_of_encodings, 2, num_batches, seconds=SECONDS)
    assert results == [[("BatchEncoding", True)] * sum(num_batches)] * 2


# --- a loader like any other


def test_what_belongs_to_the_inner_loader_is_reached_through_the_sharded_one(ranks2):
    for got in ranks2.run(attributes_of_a_torch_loader, 2, seconds=SECONDS):
        assert got["dataset"] and got["sampler"] and got["batch_sampler"] and got["batch_size"] == 2
        assert got["len of loader"] == 3 and got["len"] == got["steps"] == 6


def test_set_epoch_reaches_the_inner_loader_and_changes_what_comes(ranks2):
    first, second = ranks2.run(epochs_that_are_set, 2, seconds=SECONDS)
    assert first["before"] == [1, 100_001, 1_001, 101_001, 2_001, 102_001]
    assert first["after"] == [10_001, 110_001, 11_001, 111_001, 12_001, 112_001]
    # 7 tokens are padded to 8: the second rank's shard starts at token 4.
    assert second["before"] == [-(x + 4) for x in first["before"]]
    assert {first["epoch"], second["epoch"]} == {1} and first["dataset"] == "the dataset"


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_an_epoch_that_was_left_starts_again_from_the_beginning(ranks2, steps):
    first, second = ranks2.run(epochs_with_a_break, 2, steps, seconds=SECONDS)
    assert first["whole"] == [1, 100_001, 1_001, 101_001, 2_001, 102_001] == first["again"]
    assert first["part"] == first["whole"][:steps]
    assert second["whole"] == second["again"] == [-(x + 4) for x in first["whole"]]


# --- one rank fails, all ranks raise


CAUSES = {
    "iter": "the data loader raised OSError: the disk is gone",
    "dataset": "the data loader raised KeyError: 'text'",
    "left padding": "attention_mask has padding on the left in row 0",
    "tuple": "a batch must be a mapping",
    "a gradient": "inputs_embeds requires a gradient, which the exchange between ranks does not pass on",
}


FAILURES = [("iter", 0), ("dataset", 0), ("dataset", 3), ("left padding", 1), ("tuple", 0), ("a gradient", 1)]


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(("where", "after"), FAILURES)
def test_an_error_of_one_rank_is_raised_on_all_ranks_within_seconds(ranks2, where, after, rank):
    results = ranks2.run(epoch_that_fails, 2, where, rank, after, seconds=SECONDS)
    for each, (kind, message, steps, seconds) in enumerate(results):
        assert kind == "DataError"
        assert CAUSES[where] in message
        if each != rank:
            assert message.startswith(f"rank {rank}: ")
        assert steps == 2 * after, "what came before the error is trained on"
        assert seconds < 100


def test_an_error_in_one_replica_is_raised_in_the_other_too(ranks4):
    results = ranks4.run(epoch_that_fails, 2, "dataset", 3, 1, seconds=SECONDS)
    for rank, (kind, message, steps, seconds) in enumerate(results):
        assert kind == "DataError" and CAUSES["dataset"] in message and steps == 2 and seconds < 100
        assert rank == 3 or message.startswith("rank 3: ")


def test_ranks_that_all_fail_raise_their_own_error_each(ranks2):
    messages = ranks2.run(epoch_that_fails_on_every_rank, 2, seconds=SECONDS)
    assert [f"no disk {rank}" in message for rank, message in enumerate(messages)] == [True, True], messages


@pytest.mark.parametrize("rank", [0, 1, 3])
def test_an_agreed_error_names_the_rank_on_the_others_and_none_passes_in_silence(ranks4, rank):
    messages = ranks4.run(agree_on_an_error, 2, rank, seconds=SECONDS)
    assert messages == ["the reason" if each == rank else f"rank {rank}: the reason" for each in range(4)]


# --- the same samples on every rank


@pytest.mark.parametrize("dataset", [Tokens(9), Tokens(4), TokenStream()], ids=["sized", "small", "stream"])
def test_a_loader_that_gives_every_rank_the_same_samples_is_refused_by_the_fourth_batch(ranks2, dataset):
    for steps, message in ranks2.run(steps_until_the_sampler_is_refused, 2, dataset, "none", seconds=SECONDS):
        assert steps == 6, "three batches of each of the two ranks went by"
        assert "the first 4 batches are the same on all 2 ranks" in message and "Sampler" in message
        assert "DistributedSampler(dataset, num_replicas=dist.get_world_size(), rank=dist.get_rank())" in message


def test_a_sampler_that_splits_over_replicas_only_is_refused_by_its_name_on_all_ranks(ranks4):
    for _, message in ranks4.run(steps_until_the_sampler_is_refused, 2, Tokens(18), "per replica", seconds=SECONDS):
        assert "the loader's DistributedSampler gives every rank the same samples" in message


@pytest.mark.parametrize("batch_size", [1, 2])
def test_a_sampler_over_all_ranks_is_accepted(ranks2, batch_size):
    results = ranks2.run(epoch_of_dataset, 2, Tokens(20), batch_size, "distributed", seconds=SECONDS)
    assert [result["warnings"] for result in results] == [[], []]
    steps = [put_together(list(shards))["input_ids"] for shards in zip(*(r["batches"] for r in results), strict=True)]
    samples = [row[0] // 1_000 for rows in steps for row in rows]
    assert sorted(samples) == list(range(20)) and len(steps) == 20 // batch_size


def test_data_that_is_the_same_everywhere_only_warns(ranks2):
    results = ranks2.run(epoch_of_dataset, 2, Tokens(20, constant=True), 1, "distributed", seconds=SECONDS)
    assert [len(result["batches"]) for result in results] == [20, 20]
    (warning,) = results[0]["warnings"]
    assert "the same samples" in warning
    assert results[1]["warnings"] == []


def test_an_epoch_of_fewer_than_four_batches_only_warns(ranks2):
    results = ranks2.run(epoch_of_dataset, 2, Tokens(3), 1, "none", seconds=SECONDS)
    assert [len(result["batches"]) for result in results] == [6, 6]
    (warning,) = results[0]["warnings"]
    assert "is the dataset that small?" in warning and not results[1]["warnings"]


# --- last, on ranks of their own: a rank that is left waiting here is ended, and cannot be used again


UNSENDABLE = [
    "a mask that is a list",
    "a value that cannot be pickled",
    "a value that cannot be unpickled",
    "a tensor without data",
]


def test_a_batch_that_cannot_be_read_or_sent_is_raised_on_all_ranks_too():
    with Ranks(2) as ranks:
        ranks.run(os.getpid)
        for where in UNSENDABLE:
            results = ranks.run(epoch_that_fails, 2, where, 1, 1, seconds=SECONDS)
            assert [(kind, steps) for kind, _, steps, _ in results] == [("DataError", 2)] * 2, where
            assert results[0][1].startswith("rank 1: "), where


def test_repeated_samples_in_one_replica_are_raised_in_the_other_too():
    with Ranks(4) as ranks:
        ranks.run(os.getpid)
        messages = ranks.run(epoch_where_only_the_first_group_repeats_itself, 2, seconds=SECONDS)
    assert all("the same on all 2 ranks" in message for message in messages)


# --- what a batch is made of


UNKNOWN = Vocabulary()


def refused_on_rank_1(sp_size: int, changed: dict[str, Any], vocabulary: Vocabulary = UNKNOWN) -> str:
    """The words of the error on this rank, where the second rank's second batch has other values."""
    rows = [batch_of(dist.get_rank(), 0), batch_of(dist.get_rank(), 1) | (changed if dist.get_rank() == 1 else {})]
    sharded = ShardedDataLoader(rows, groups_of(sp_size), ShardingConfig(MULTIPLE, vocabulary=vocabulary))
    with pytest.raises(DataError) as caught:
        list(sharded)
    return str(caught.value)


LABELS = batch_of(1, 1, rows=3)["labels"]


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        (
            {"labels": LABELS[:1].float()},
            "labels has dtype torch.float32, and must have integers: convert it",
        ),
        ({"labels": LABELS[:1] > 3}, "labels has dtype torch.bool, and must have integers"),
        ({"input_ids": LABELS[:1].double()}, "input_ids has dtype torch.float64, and must have integers"),
        ({"input_ids": [[1, 2], [3, 4]], "labels": [[1, 2], [3, 4]]}, "input_ids is a list, not a tensor"),
        ({"labels": LABELS[:1].tolist()}, "labels is a list, not a tensor"),
    ],
)
def test_what_is_no_tensor_of_whole_numbers_is_refused_by_its_key_on_all_ranks(changed, words, ranks2):
    mine, its = ranks2.run(refused_on_rank_1, 2, changed)
    assert its.startswith(words) and "collate_fn" in its
    assert mine == f"rank 1: {its}"


def labels_at(row: int, token: int, value: int) -> dict[str, torch.Tensor]:
    labels = LABELS.clone()
    labels[row, token] = value
    return {"input_ids": LABELS, "labels": labels}


@pytest.mark.parametrize("value", [200_000, -1, -101])
def test_a_label_without_a_logit_is_named_on_all_ranks(value, ranks2):
    mine, its = ranks2.run(refused_on_rank_1, 2, labels_at(2, 4, value), Vocabulary(logits=200_000))
    assert its.startswith(f"labels of row 2 has {value} at token 4, and the model has logits for 0 to 199999. Use")
    assert mine == f"rank 1: {its}"


@pytest.mark.parametrize("value", [200_000, -1, -100])
def test_a_token_without_an_embedding_is_named_on_all_ranks_though_it_has_no_label(value, ranks2):
    ids = labels_at(2, 4, value)["labels"]
    batch = {"input_ids": ids, "labels": torch.full_like(ids, -100)}
    mine, its = ranks2.run(refused_on_rank_1, 2, batch, Vocabulary(embeddings=200_000))
    assert its.startswith(f"input_ids of row 2 has {value} at token 4, and the model has embeddings for 0 to 199999.")
    assert mine == f"rank 1: {its}"


def epoch_in(dtype: torch.dtype, labels: str, copy_is_hidden: bool) -> list[dict[str, Any]]:
    """An epoch of one batch, with the smallest and the largest label that there is, and perhaps one that is none."""
    ids = torch.tensor([[0, 1, 2, 3, 4 + dist.get_rank(), 99]])
    hidden = ids.masked_fill(ids == 2, -100) if copy_is_hidden else ids
    batch = {"input_ids": ids.to(dtype), labels: hidden.to(dtype)}
    sharded = ShardedDataLoader([batch], groups_of(2), ShardingConfig(MULTIPLE, vocabulary=Vocabulary(100, 100)))
    return [{key: plain(value) for key, value in each.items()} for each in sharded]


@pytest.mark.parametrize("labels", ["labels", "shift_labels"])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.int8, torch.uint8])
def test_whole_numbers_of_any_dtype_are_those_of_int64(dtype, labels, ranks2):
    got = ranks2.run(epoch_in, dtype, labels, dtype.is_signed)
    assert got == ranks2.run(epoch_in, torch.int64, labels, dtype.is_signed)
    assert all(batch["shift_labels"][0] == "torch.int64" for batches in got for batch in batches)


def ends_of(num_batches: int) -> list[list[bool]]:
    """Of two epochs of accelerate's loader: what its accumulation is told of the end, micro-step by micro-step."""
    from accelerate.data_loader import DataLoaderShard
    from accelerate.state import GradientState

    inner = DataLoaderShard([batch_of(dist.get_rank(), each) for each in range(num_batches)], batch_size=None)
    sharded = ShardedDataLoader(inner, groups_of(2), ShardingConfig(MULTIPLE))
    return [[GradientState().end_of_dataloader for _ in sharded] for _ in range(2)]


@pytest.mark.parametrize("num_batches", [1, 4])
def test_accelerate_hears_of_the_end_at_the_last_micro_step(num_batches, ranks2):
    expected = [False] * (2 * num_batches - 1) + [True]
    assert ranks2.run(ends_of, num_batches) == [[expected, expected]] * 2
