"""Which rank holds which heads. P ranks, H query heads, K key/value heads."""

import itertools

import pytest

from deepspeed_alst.errors import AlstError, ShapeError
from deepspeed_alst.sequence_parallel.ulysses import HeadPlan

SIZES = [
    (P, H, K)
    for P, H, K in itertools.product(
        [1, 2, 3, 4, 5, 6, 7, 8, 12, 16], [1, 2, 3, 4, 6, 8, 9, 12, 14, 15, 24, 32, 48, 71, 128], range(1, 33)
    )
    if H % K == 0 and H % P == 0 and (K % P == 0 or P % K == 0)
]


def test_the_sizes_below_cover_kv_heads_split_shared_and_single():
    kinds = {"split": 0, "one each": 0, "shared": 0, "single": 0, "odd": 0}
    for P, _, K in SIZES:
        kinds["split"] += K > P > 1
        kinds["one each"] += K == P > 1
        kinds["shared"] += P > K > 1
        kinds["single"] += P > K == 1
        kinds["odd"] += P % 2 == 1 and P > 1
    assert min(kinds.values()) >= 10, kinds


@pytest.mark.parametrize(("P", "H", "K"), SIZES)
def test_every_query_head_is_on_one_rank_with_exactly_the_kv_heads_that_the_rank_needs(P, H, K):
    plan = HeadPlan(P, H, K)
    ranks = [list(plan.heads_of(rank)) for rank in range(P)]
    assert [head for heads in ranks for head in heads] == list(range(H)), "in rank order, each once"
    assert {len(heads) for heads in ranks} == {plan.heads_per_rank}
    for rank, heads in enumerate(ranks):
        # Grouped-query attention: query head i reads kv head i // (H / K).
        used = sorted({head // (H // K) for head in heads})
        assert list(plan.kv_heads_of(rank)) == used, f"rank {rank} of {plan}"
        assert plan.kv_heads_per_rank == len(used)
        # Attention on the rank counts groups by its own sizes; they must be those of the whole.
        local = [i // (plan.heads_per_rank // plan.kv_heads_per_rank) for i in range(plan.heads_per_rank)]
        assert [used[i] for i in local] == [head // (H // K) for head in heads]
    holders = [sum(head in plan.kv_heads_of(rank) for rank in range(P)) for head in range(K)]
    assert set(holders) == {plan.kv_replicas}
    assert P * plan.kv_heads_per_rank == K * plan.kv_replicas


@pytest.mark.parametrize(
    ("P", "H", "K", "message"),
    [
        (3, 8, 8, "8 query heads cannot be split over sequence_parallel_size=3 ranks"),
        (16, 8, 4, "8 query heads cannot be split over sequence_parallel_size=16 ranks"),
        (2, 71, 71, "71 query heads cannot be split over sequence_parallel_size=2 ranks"),
        (4, 12, 6, "6 key/value heads and sequence_parallel_size=4 do not divide one another"),
        (6, 36, 9, "9 key/value heads and sequence_parallel_size=6 do not divide one another"),
        (2, 8, 3, "8 query heads are not a multiple of 3 key/value heads"),
        (1, 4, 8, "4 query heads are not a multiple of 8 key/value heads"),
        (1, 4, 0, "4 query heads are not a multiple of 0 key/value heads"),
    ],
)
def test_heads_that_the_ranks_cannot_split_are_refused_with_their_numbers(P, H, K, message):
    with pytest.raises(ShapeError) as refused:
        HeadPlan(P, H, K)
    assert str(refused.value) == message
    assert isinstance(refused.value, AlstError)


def test_a_plan_is_a_value_that_does_not_change():
    plan = HeadPlan(2, 8, 4)
    assert plan == HeadPlan(2, 8, 4) and hash(plan) == hash(HeadPlan(2, 8, 4))
    with pytest.raises(AttributeError):
        plan.sp_size = 4
