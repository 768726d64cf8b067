"""An epoch of any size on real gloo ranks: the samples that come out are those that went in, each once; no hang.

A token is ``1000 * sample + place + 1``: what comes out says which sample it is of. P = 2 ranks of a sequence.
"""

import functools
import itertools
import json
import os
import random
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from deepspeed_alst.cli.launch import free_port, remove_shared_memory
from deepspeed_alst.data.loader import ShardedDataLoader
from deepspeed_alst.data.sharding import ShardingConfig
from deepspeed_alst.distributed.collectives import assert_same_on_all_ranks
from deepspeed_alst.distributed.mesh import build_control_group, build_groups
from deepspeed_alst.errors import DataError

# Short of gloo's 30 minutes: a rank that waits for another shows here.
SECONDS = 300.0
PROGRAM = Path(__file__).parents[1] / "programs" / "epochs.py"


@functools.cache
def groups() -> Any:
    return build_groups(2, build_control_group())


def by_program(folder: Path, function: str, cases: list[Any]) -> list[Any]:
    """Run a function of this file in a program on two ranks: those of ranks2 are daemons, which have no workers."""
    (folder / "cases.json").write_text(json.dumps(cases))
    port = free_port()
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "LOCAL_SIZE": "2"}
    environment = {**os.environ, **common, "PYTHONPATH": str(PROGRAM.parents[2])}
    ranks = [
        subprocess.Popen(
            [sys.executable, str(PROGRAM), function, str(folder)],
            env={**environment, "RANK": rank, "LOCAL_RANK": rank},
        )
        for rank in ("0", "1")
    ]
    try:
        assert [each.wait(timeout=200) for each in ranks] == [0, 0]
    finally:
        for each in ranks:
            each.kill()
        remove_shared_memory(port)
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(2)]


class Ragged(Dataset):
    """Samples of these lengths."""

    def __init__(self, lengths: list[int]) -> None:
        self.lengths = lengths

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> torch.Tensor:
        return 1000 * index + torch.arange(self.lengths[index]) + 1


def padded(samples: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    ids = torch.nn.utils.rnn.pad_sequence(samples, batch_first=True)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(each) for each in samples], batch_first=True)
    return {"input_ids": ids, "labels": ids.masked_fill(mask == 0, -100), "attention_mask": mask}


def packed(samples: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    positions = torch.cat([torch.arange(len(each)) for each in samples])
    ids = torch.cat(samples)
    return {"input_ids": ids[None], "labels": ids[None], "position_ids": positions[None]}


def epoch(
    lengths: list[int], batch_size: int, drop_last: bool, seed: int, packing: bool, workers: int, uneven: int
) -> list[list[list[int]]]:
    """This rank's shard of each micro-step: its rows without padding."""
    dataset = Ragged(lengths)
    sampler = DistributedSampler(dataset, 2, dist.get_rank(), shuffle=True, seed=seed, drop_last=drop_last)
    loader: Any = DataLoader(
        dataset,
        batch_size,
        sampler=sampler,
        drop_last=drop_last,
        num_workers=workers,
        collate_fn=packed if packing else padded,
    )
    with warnings.catch_warnings():
        if uneven and dist.get_rank() == 1:
            loader = itertools.islice(loader, max(0, len(loader) - uneven))
        warnings.simplefilter("ignore")  # datasets as small as these may give two ranks the same samples
        steps = list(ShardedDataLoader(loader, groups(), ShardingConfig(4, packing=packing)))
    return [[row[row > 0].tolist() for row in step["input_ids"]] for step in steps]


def epochs(cases: list[tuple[Any, ...]]) -> list[list[list[list[int]]]]:
    return [epoch(*case) for case in cases]


def went_in(case: tuple[Any, ...]) -> list[list[list[list[int]]]]:
    """The batches of each rank, as torch's own loader gives them."""
    lengths, batch_size, drop_last, seed, _, _, uneven = case
    dataset = Ragged(lengths)
    batches = []
    for rank in range(2):
        sampler = DistributedSampler(dataset, 2, rank, shuffle=True, seed=seed, drop_last=drop_last)
        whole = DataLoader(dataset, batch_size, sampler=sampler, drop_last=drop_last, collate_fn=list)
        stop = max(0, len(whole) - uneven) if rank == 1 else len(whole)
        batches.append([[each.tolist() for each in batch] for batch in itertools.islice(whole, stop)])
    return batches


def check_epoch(case: tuple[Any, ...], shards: list[list[list[list[int]]]]) -> None:
    packing = case[4]
    assert len(shards[0]) == len(shards[1]), "micro-steps of the two ranks"
    steps = [[one + two for one, two in zip(*rows, strict=True)] for rows in zip(*shards, strict=True)]
    batches = went_in(case)
    # Rank 0's batch, then rank 1's, as long as either has any.
    turns = [batch for pair in itertools.zip_longest(*batches) for batch in pair if batch is not None]
    assert steps == [[list(itertools.chain(*batch))] if packing else batch for batch in turns]
    if not case[2] and not case[6]:
        samples = {token // 1000 for step in steps for row in step for token in row}
        assert samples == set(range(len(case[0]))), "a sample is missing"


def random_case(draw: random.Random, workers: int) -> tuple[Any, ...]:
    lengths = [draw.randint(1, 30) for _ in range(draw.randint(2, 17))]
    return (
        lengths,
        draw.randint(1, 4),
        draw.random() < 0.5,
        draw.randrange(1000),
        draw.random() < 0.5,
        workers,
        draw.choice([0, 0, 1, 2, 9]),
    )


def test_an_epoch_of_any_size_gives_each_sample_once_and_both_ranks_as_many_steps(ranks2):
    draw = random.Random(0)
    cases = [random_case(draw, 0) for _ in range(150)]
    results = ranks2.run(epochs, cases, seconds=SECONDS)
    for number, case in enumerate(cases):
        check_epoch(case, [results[0][number], results[1][number]])


class Breaks(Ragged):
    """A sample that cannot be read, or is no sample, on one rank."""

    def __init__(self, lengths: list[int], rank: int, at: int, how: str) -> None:
        super().__init__(lengths)
        self.rank, self.at, self.how = rank, at, how

    def __getitem__(self, index: int) -> Any:
        if dist.get_rank() == self.rank and index // 2 == self.at:
            if self.how == "an error":
                raise RuntimeError("a page of it cannot be read")
            return torch.zeros(0, dtype=torch.long) if self.how == "no token" else torch.ones(2, 3, dtype=torch.long)
        return super().__getitem__(index)


def broken_epochs(cases: list[tuple[Any, ...]]) -> list[tuple[int, str]]:
    outcomes = []
    for lengths, rank, at, how, workers in cases:
        dataset = Breaks(lengths, rank, at, how)
        sampler = DistributedSampler(dataset, 2, dist.get_rank(), shuffle=False)
        loader = DataLoader(dataset, 1, sampler=sampler, num_workers=workers, collate_fn=padded)
        steps = 0
        with pytest.raises(DataError) as raised:
            for _ in ShardedDataLoader(loader, groups(), ShardingConfig(4)):
                steps += 1
        outcomes.append((steps, str(raised.value)))
    return outcomes


def check_broken_epochs(cases: list[tuple[Any, ...]], results: list[Any]) -> None:
    for (_, rank, at, how, _), *outcomes in zip(cases, *results, strict=True):
        assert [steps for steps, _ in outcomes] == [2 * at] * 2
        assert f"rank {rank}: " in outcomes[1 - rank][1]
        assert how != "an error" or all("a page of it cannot be read" in message for _, message in outcomes)


def broken_cases(workers: int, times: int) -> list[tuple[Any, ...]]:
    draw = random.Random(2)
    return [
        ([draw.randint(1, 20) for _ in range(12)], draw.randrange(2), draw.randrange(6), how, workers)
        for how in ("an error", "no token", "three dims")
        for _ in range(times)
    ]


def test_a_sample_that_is_none_ends_the_epoch_on_both_ranks_at_the_same_step(ranks2):
    cases = broken_cases(0, 6)
    check_broken_epochs(cases, ranks2.run(broken_epochs, cases, seconds=SECONDS))


def both(cases: list[list[tuple[Any, ...]]]) -> list[Any]:
    whole, broken = cases
    return [epochs(whole), broken_epochs(broken)]


@pytest.mark.slow
def test_the_same_with_two_workers(tmp_path):
    draw = random.Random(1)
    whole, broken = [random_case(draw, 2) for _ in range(4)], broken_cases(2, 1)
    results = by_program(tmp_path, "both", [whole, broken])
    for number, case in enumerate(whole):
        check_epoch(case, [good[number] for good, _ in results])
    check_broken_epochs(broken, [bad for _, bad in results])


def alike_with_nan() -> None:
    settings = {"gradient_clipping": float("nan"), "alst": {"a": [float("nan")]}}
    assert_same_on_all_ranks(settings, groups().control_group)
    with pytest.raises(Exception, match=r"gradient_clipping=0 on rank 0, 1 on rank 1"):
        assert_same_on_all_ranks({**settings, "gradient_clipping": dist.get_rank()}, groups().control_group)


def test_ranks_that_read_the_same_nan_have_the_same_ds_config(ranks2):
    ranks2.run(alike_with_nan, seconds=SECONDS)
