"""Sums of gradients over real ranks, against fp64: every dtype, odd sizes, small slices, adversarial values, memory."""

import math

import pytest
import torch
import torch.distributed as dist

from benchmarks.ranks import Ranks
from deepspeed_alst.grad_reduction.reduce import Fragment, Reduction
from deepspeed_alst.kernels.builder import load
from deepspeed_alst.profiler.ledger import Ledger

SIZES = (1, 7, 64, 1000, 4097)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
KINDS = ("reduce_scatter", "reduce_to_owners", "all_reduce")


@pytest.fixture(scope="module")
def ranks3():
    """Three ranks divide neither buckets nor their slices."""
    with Ranks(3) as ranks:
        yield ranks


def gradients(dtype: torch.dtype, rank: int, sizes: tuple[int, ...] = SIZES) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(rank)
    return [torch.randn(size, generator=generator).to(dtype) for size in sizes]


def cancelling(dtype: torch.dtype, rank: int, ranks: int) -> list[torch.Tensor]:
    """Large values that cancel over ranks and leave a small one: lost where a partial sum is rounded to 16 bits."""
    large = 240.0 if rank < ranks // 2 else -240.0 if rank < ranks // 2 * 2 else 0.0
    return [(torch.full((1001,), large) + (torch.arange(1001) % 5 == rank)).to(dtype)]


def fragments_of(sizes: list[int], ranks: int) -> list[Fragment]:
    """Contiguous partitions, as ZeRO makes them: most gradients have one owner, some have two."""
    partition = math.ceil(sum(sizes) / ranks)
    found, at = [], 0
    for size in sizes:
        while size:
            taken = min(size, partition - at % partition)
            found.append(Fragment(taken, at // partition))
            at, size = at + taken, size - taken
    # Backward fills buckets from the last layer on, so their owners do not come in order.
    return found[::-1]


def reduced(kind: str, reduction: Reduction, grads: list[torch.Tensor], out: torch.dtype) -> list[torch.Tensor]:
    """What this rank ends up with, gradient by gradient or fragment by fragment; empty where it owns nothing."""
    P, r = dist.get_world_size(), dist.get_rank()
    group = dist.group.WORLD
    if kind == "reduce_scatter":
        places = [torch.full((math.ceil(grad.numel() / P),), math.nan, dtype=out) for grad in grads]
        shares = list(reduction.reduce_scatter(grads, places.__getitem__, False, group))
        return [share[: max(0, grad.numel() - r * share.numel())] for share, grad in zip(shares, grads, strict=True)]
    if kind == "all_reduce":
        outs = [torch.full_like(grad, math.nan, dtype=out) for grad in grads]
        reduction.all_reduce(grads, outs, P, group)
        return outs
    bucket = torch.cat(grads)
    apart = out != bucket.dtype
    fragments = [
        Fragment(each.numel, each.owner, torch.zeros(each.numel, dtype=out) if apart and each.owner == r else None)
        for each in fragments_of([grad.numel() for grad in grads], P)
    ]
    reduction.reduce_to_owners(bucket, fragments, out, group)
    places = bucket.split([each.numel for each in fragments])
    return [
        place[:0].to(out) if each.owner != r else place if each.out is None else each.out
        for place, each in zip(places, fragments, strict=True)
    ]


def expected(kind: str, grads: list[list[torch.Tensor]], out: torch.dtype, add: torch.dtype) -> list[torch.Tensor]:
    """The same of all ranks' gradients, added in ``add`` in the order of ranks, divided once and rounded once."""
    P, r = dist.get_world_size(), dist.get_rank()
    averages = []
    for each in zip(*grads, strict=True):
        total = each[0].to(add)
        for grad in each[1:]:
            total = total + grad.to(add)
        averages.append((total * torch.tensor(1 / P, dtype=add)).to(out))
    if kind == "all_reduce":
        return averages
    if kind == "reduce_scatter":
        sizes = [math.ceil(average.numel() / P) for average in averages]
        return [average[r * c : (r + 1) * c] for average, c in zip(averages, sizes, strict=True)]
    fragments = fragments_of([average.numel() for average in averages], P)
    parts = torch.cat(averages).split([each.numel for each in fragments])
    return [part if each.owner == r else part[:0] for part, each in zip(parts, fragments, strict=True)]


def is_the_sum(kind: str, dtype: torch.dtype, out: torch.dtype, slice_bytes: int, made_by) -> None:
    P, r = dist.get_world_size(), dist.get_rank()
    got = reduced(kind, Reduction(torch.float32, slice_bytes), made_by(dtype, r, P), out)
    wanted = expected(kind, [made_by(dtype, rank, P) for rank in range(P)], out, torch.float32)
    for index, (ours, true) in enumerate(zip(got, wanted, strict=True)):
        assert ours.dtype == out and torch.equal(ours, true), f"{kind}, part {index}"


def plain(dtype: torch.dtype, rank: int, ranks: int) -> list[torch.Tensor]:
    return gradients(dtype, rank)


def short(dtype: torch.dtype, rank: int, ranks: int) -> list[torch.Tensor]:
    """For the smallest slices, each of which is an exchange."""
    return gradients(dtype, rank, (1, 7, 64, 257))


@pytest.mark.parametrize("slice_bytes", [64, 4096, 2**26])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_fp32_sums_are_the_sums_in_the_order_of_ranks_bit_by_bit(kind, dtype, slice_bytes, ranks2, ranks3, ranks4):
    for ranks in (ranks2, ranks3, ranks4):
        for out in {dtype, torch.float32}:
            ranks.run(is_the_sum, kind, dtype, out, slice_bytes, short if slice_bytes == 64 else plain)


@pytest.mark.parametrize("kind", KINDS)
def test_what_cancels_over_ranks_leaves_what_is_left(kind, ranks2, ranks3, ranks4):
    for ranks in (ranks2, ranks3, ranks4):
        ranks.run(is_the_sum, kind, torch.bfloat16, torch.float32, 4096, cancelling)
        for rank_found in ranks.run(error_of, kind, torch.float32, cancelling):
            assert rank_found < 1e-6
    assert max(ranks4.run(error_of, kind, torch.bfloat16, cancelling)) > 1e-2, "bf16 sums should lose it"


def error_of(kind: str, summed_in: torch.dtype, made_by) -> float:
    """The relative error against fp64 on this rank, of bf16 gradients."""
    P, r = dist.get_world_size(), dist.get_rank()
    got = torch.cat(reduced(kind, Reduction(summed_in, 4096), made_by(torch.bfloat16, r, P), torch.float32))
    grads = [made_by(torch.bfloat16, rank, P) for rank in range(P)]
    true = torch.cat(expected(kind, grads, torch.float64, torch.float64))
    return float((got.double() - true).norm() / true.norm()) if true.numel() else 0.0


@pytest.mark.parametrize("summed_in, most", [(torch.bfloat16, 1e-2), (torch.float16, 2e-3)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_sums_in_16_bits_have_the_error_of_16_bits(kind, summed_in, most, ranks2, ranks4):
    for ranks in (ranks2, ranks4):
        assert 1e-5 < max(ranks.run(error_of, kind, summed_in, plain)) < most


def special(dtype: torch.dtype, rank: int, ranks: int) -> list[torch.Tensor]:
    """Subnormals everywhere, and on one rank an infinity or a NaN."""
    tiny = torch.finfo(dtype).smallest_normal
    values = torch.full((9,), tiny / 4, dtype=torch.float64)
    if rank == ranks - 1:
        values[2], values[5], values[7] = math.inf, -math.inf, math.nan
    return [values.to(dtype)]


def infinities_go_through(kind: str, dtype: torch.dtype, summed_in: torch.dtype) -> None:
    P, r = dist.get_world_size(), dist.get_rank()
    got = reduced(kind, Reduction(summed_in, 64), special(dtype, r, P), torch.float32)
    grads = [special(dtype, rank, P) for rank in range(P)]
    for ours, true in zip(got, expected(kind, grads, torch.float32, torch.float32), strict=True):
        assert torch.equal(ours.isnan(), true.isnan()) and torch.equal(ours.isinf(), true.isinf())
        assert torch.equal(ours.sign().nan_to_num(), true.sign().nan_to_num()), "a subnormal was flushed to zero"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_infinities_nans_and_subnormals_go_through(kind, dtype, ranks2, ranks4):
    for ranks in (ranks2, ranks4):
        ranks.run(infinities_go_through, kind, dtype, torch.float32)


def accumulated(out: torch.dtype) -> None:
    """Two micro-steps: the second's averages are rounded to the dtype of what is there, and added in it."""
    P, r = dist.get_world_size(), dist.get_rank()
    places = [torch.zeros(math.ceil(size / P), dtype=out) for size in SIZES]
    wanted = []
    for step in range(2):
        grads = [gradients(torch.bfloat16, rank + 10 * step) for rank in range(P)]
        shares = list(
            Reduction(slice_bytes=256).reduce_scatter(grads[r], places.__getitem__, step > 0, dist.group.WORLD)
        )
        averages = expected("reduce_scatter", grads, out, torch.float32)
        wanted = [had + new for had, new in zip(wanted, averages, strict=True)] if step else averages
    for share, true in zip(shares, wanted, strict=True):
        assert torch.equal(share[: true.numel()], true) and not share[true.numel() :].any()


@pytest.mark.parametrize("out", [torch.float32, torch.bfloat16], ids=str)
def test_micro_steps_add_up_in_the_dtype_of_the_shares(out, ranks2, ranks3):
    for ranks in (ranks2, ranks3):
        ranks.run(accumulated, out)


def extra_bytes(kind: str, dtype: torch.dtype, out: torch.dtype, slice_bytes: int, numel: int) -> int:
    """The most that is alive during a reduction beside the gradients and the places of the results."""
    P, r = dist.get_world_size(), dist.get_rank()
    assert load("cpu") == "csrc op"  # the definition in torch needs a little more
    reduction, group = Reduction(slice_bytes=slice_bytes), dist.group.WORLD
    grads = gradients(dtype, r, (numel, 1001))
    places = [
        torch.zeros(grad.numel() if kind == "all_reduce" else math.ceil(grad.numel() / P), dtype=out) for grad in grads
    ]
    bucket = torch.cat(grads)
    own = [Fragment(bucket.numel(), 0, torch.zeros(bucket.numel(), dtype=out) if out != dtype and r == 0 else None)]
    with Ledger(torch.nn.Module()) as ledger:
        for tensor in (*grads, *places, bucket, *([own[0].out] if own[0].out is not None else [])):
            tensor.mul_(1)  # the ledger knows what it has seen
        before = ledger.timeline[-1].total
        if kind == "reduce_scatter":
            list(reduction.reduce_scatter(grads, places.__getitem__, False, group))
        elif kind == "all_reduce":
            reduction.all_reduce(grads, places, P, group)
        else:
            reduction.reduce_to_owners(bucket, own, out, group)
    return max(sample.total for sample in ledger.timeline) - before


@pytest.mark.parametrize("out", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_the_extra_memory_is_a_slice_and_its_pieces_however_large_the_bucket(kind, out, ranks2, ranks4):
    slice_bytes = 1 << 16
    for ranks in (ranks2, ranks4):
        small, large = (
            max(ranks.run(extra_bytes, kind, torch.bfloat16, out, slice_bytes, n)) for n in (1 << 18, 1 << 21)
        )
        assert slice_bytes < small <= 2 * slice_bytes + 4096
        assert large <= small + 4096
