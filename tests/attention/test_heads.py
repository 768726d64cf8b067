"""Which rank holds which heads. P ranks, H query heads, K key/value heads."""

import itertools
import math

import pytest

from deepspeed_alst.attention.head_plan import HeadPlan
from deepspeed_alst.errors import AlstError, ShapeError

SIZES = [
    (P, H, K)
    for H, K in itertools.product([1, 2, 3, 4, 5, 6, 7, 8, 9, 12, 14, 15, 24, 28, 32, 40, 71, 128], range(1, 41))
    for P in range(1, min(H, 17) + 1)
    if H % K == 0
]


def test_the_sizes_below_cover_kv_heads_split_shared_straddled_and_single():
    kinds = dict.fromkeys(("split", "one each", "shared", "single", "odd", "uneven", "straddled", "expanded"), 0)
    for P, H, K in SIZES:
        plan = HeadPlan(P, H, K)
        kinds["split"] += K > P > 1
        kinds["one each"] += K == P > 1
        kinds["shared"] += P > K > 1
        kinds["single"] += P > K == 1
        kinds["odd"] += P % 2 == 1 and P > 1
        kinds["uneven"] += H % P > 0
        kinds["straddled"] += H % P == 0 and not plan.is_even
        kinds["expanded"] += any(max(plan.kv_copies_of(rank)) > 1 for rank in range(P))
    assert min(kinds.values()) >= 10, kinds


def test_every_query_head_is_on_one_rank_with_exactly_the_kv_heads_that_the_rank_needs():
    for P, H, K in SIZES:
        plan = HeadPlan(P, H, K)
        ranks = [list(plan.heads_of(rank)) for rank in range(P)]
        assert [head for heads in ranks for head in heads] == list(range(H)), "in rank order, each once"
        assert max(map(len, ranks)) == plan.heads_per_rank and min(map(len, ranks)) == H // P
        assert plan.imbalance == pytest.approx(math.ceil(H / P) / (H / P))
        for rank, heads in enumerate(ranks):
            # Grouped-query attention: query head i reads kv head i // (H / K).
            used = sorted({head // (H // K) for head in heads})
            assert list(plan.kv_heads_of(rank)) == used, f"rank {rank} of {plan}"
            # Attention on the rank counts groups by its own sizes; they must be those of the whole.
            copies = plan.kv_copies_of(rank)
            local = [kv_head for kv_head, number in zip(used, copies, strict=True) for _ in range(number)]
            assert len(heads) % len(local) == 0, "a valid ratio"
            assert [local[i // (len(heads) // len(local))] for i in range(len(heads))] == [x // (H // K) for x in heads]
            groups = {sum(head // (H // K) == kv_head for head in heads) for kv_head in used}
            assert (set(copies) == {1}) == (len(groups) == 1), "copies only where they are needed"


def test_an_even_split_is_in_equal_parts_and_equal_copies():
    for P, H, K in SIZES:
        plan = HeadPlan(P, H, K)
        assert plan.is_even == (H % P == 0 and (K % P == 0 or P % K == 0))
        if not plan.is_even:
            continue
        h, k, m = H // P, max(1, K // P), max(1, P // K)
        for rank in range(P):
            assert plan.heads_of(rank) == range(rank * h, rank * h + h)
            assert plan.kv_heads_of(rank) == range(rank // m * k, rank // m * k + k)
            assert plan.kv_copies_of(rank) == [1] * k
        assert plan.imbalance == 1 and plan.summary == ""
        assert plan.exchanged_heads == (P - 1) * 2 * (h + k)


@pytest.mark.parametrize(
    ("P", "H", "K"),
    [(2, 7, 1), (3, 4, 2), (4, 6, 3), (4, 14, 2), (5, 12, 4), (7, 12, 3), (6, 14, 7), (8, 28, 4), (6, 32, 8)],
)
def test_ranks_with_a_head_more_are_where_attention_gets_the_fewest_kv_heads(P, H, K):
    few, extra = divmod(H, P)
    totals = []
    for larger in itertools.combinations(range(P), extra):
        bounds = [0, *itertools.accumulate(few + (rank in larger) for rank in range(P))]
        shares = [[head * K // H for head in range(*each)] for each in itertools.pairwise(bounds)]
        counts = [[share.count(kv_head) for kv_head in sorted(set(share))] for share in shares]
        totals.append(sum(sum(each) // math.gcd(*each) for each in counts))
    plan = HeadPlan(P, H, K)
    assert sum(sum(plan.kv_copies_of(rank)) for rank in range(P)) == min(totals)


@pytest.mark.parametrize(
    ("P", "H", "K", "heads", "kv_heads", "largest"),
    [
        (8, 28, 4, [3, 4, 3, 4, 3, 4, 3, 4], [1] * 8, 1),
        (4, 14, 2, [3, 4, 3, 4], [1] * 4, 1),
        (4, 6, 3, [1, 1, 2, 2], [1] * 4, 2),
        (8, 40, 8, [5] * 8, [1] * 8, 0),
        (8, 40, 10, [5] * 8, [2] * 8, 0),
        (3, 8, 4, [2, 3, 3], [1, 2, 2], 1),
    ],
)
def test_real_models_heads(P, H, K, heads, kv_heads, largest):
    plan = HeadPlan(P, H, K)
    assert [len(plan.heads_of(rank)) for rank in range(P)] == heads
    assert [len(plan.kv_heads_of(rank)) for rank in range(P)] == kv_heads
    assert plan.largest_rank == largest


def test_a_rank_whose_heads_straddle_kv_heads_has_these_as_often_as_makes_groups_of_one_size():
    assert HeadPlan(8, 40, 10).kv_copies_of(0) == [4, 1]
    assert HeadPlan(3, 18, 3).kv_copies_of(0) == [1]
    assert HeadPlan(2, 36, 3).kv_copies_of(0) == [2, 1], "12 and 6 heads: groups of 6"


@pytest.mark.parametrize(
    ("P", "H", "K", "message"),
    [
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


# --- more ranks than heads

GRIDS = [(P, H, K) for P in range(2, 25) for H in range(1, P) for K in range(1, H + 1) if H % K == 0]


def test_every_row_of_every_head_is_computed_once():
    for (P, H, K), s in zip(GRIDS, itertools.cycle((1, 2, 7, 24)), strict=False):
        plan = HeadPlan(P, H, K)
        assert plan.head_groups * plan.row_groups == P and plan.row_groups > 1
        computed = [
            (head, row) for share in plan.shares("q", s) for head in share.heads for row in itertools.chain(*share.rows)
        ]
        assert sorted(computed) == list(itertools.product(range(H), range(s)))
        for rank in range(P):
            of_shards = [p * s + row for p in range(P) for row in itertools.chain(*plan.stripes(rank, s))]
            intervals = list(plan.rows(rank, s))
            assert list(itertools.chain(*(range(*each) for each in intervals))) == of_shards
            assert all(first < last for first, last in intervals), "kernels get no empty rows"
            assert plan.shares("k", s)[rank] == (plan.kv_heads_of(rank), (range(s),)), "keys of all rows"
            assert list(plan.kv_heads_of(rank)) == sorted({head // (H // K) for head in plan.heads_of(rank)})


def test_row_groups_see_as_many_keys():
    for P, H, K in GRIDS:
        plan = HeadPlan(P, H, K)
        s = 32 * plan.row_groups
        seen = [sum(sum(range(first + 1, last + 1)) for first, last in plan.rows(rank, s)) for rank in range(P)]
        assert max(seen) * P <= 1.05 * sum(seen), f"{plan}: {seen}"
        assert plan.imbalance <= 8 / 7


@pytest.mark.parametrize(
    ("P", "H", "K", "groups", "kv_heads"),
    [
        (64, 32, 8, 32, 1),
        (16, 14, 2, 2, 1),  # 7 heads each, instead of 1 or 2
        (16, 14, 14, 8, 2),  # 1 or 2 heads each: 2 groups would have 7 KV heads
        (16, 12, 12, 4, 3),  # 8 groups would have 1.33 of the mean
        (32, 28, 4, 4, 1),
        (4, 3, 1, 1, 1),
        (3, 1, 1, 1, 1),
    ],
)
def test_ranks_share_rows_where_that_takes_the_fewest_kv_heads(P, H, K, groups, kv_heads):
    plan = HeadPlan(P, H, K)
    assert plan.head_groups == groups
    assert max(sum(plan.kv_copies_of(rank)) for rank in range(P)) == kv_heads


# --- in words


@pytest.mark.parametrize(
    ("P", "H", "K", "alike"), [(8, 28, 4, True), (3, 5, 5, True), (3, 4, 2, False), (8, 40, 10, True)]
)
def test_query_heads_share_kv_heads_on_all_ranks_or_it_is_said(P, H, K, alike):
    assert HeadPlan(P, H, K).shares_alike == alike


def test_unequal_shares_are_said_in_words():
    assert HeadPlan(8, 28, 4).summary == "3 or 4 of 28 query heads per rank, at most 1.14 of the mean"
    assert HeadPlan(8, 40, 10).summary == ""
    assert HeadPlan(64, 32, 8).summary == "1 of 32 query heads per rank, for 1/2 of the rows with all keys"
    assert HeadPlan(16, 14, 14).summary == (
        "1 or 2 of 14 query heads per rank, for 1/2 of the rows with all keys, at most 1.14 of the mean"
    )


def test_a_plan_is_a_value_that_does_not_change():
    plan = HeadPlan(2, 8, 4)
    assert plan == HeadPlan(2, 8, 4) and hash(plan) == hash(HeadPlan(2, 8, 4))
    with pytest.raises(AttributeError):
        plan.sp_size = 4
