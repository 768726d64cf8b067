"""More ranks than query heads: loss and gradients are those of the run without it, in fp64.

Ranks then share the query rows of their heads, each with the whole sequence's keys and values.
"""

import pytest

from benchmarks.families import family_config
from tests.sequence_parallel.test_uneven_heads import assert_exact, heads

ON_FOUR = {
    "2/2": ("qwen3", heads(2, 2), ""),
    "2/1": ("llama", heads(2, 1), ""),
    "3/1": ("qwen3", heads(3, 1), ""),
    "3/3, unequal heads": ("qwen3", heads(3, 3), ""),
    "1/1": ("qwen3", heads(1, 1), ""),
    "a window": ("mistral", heads(2, 1, sliding_window=7), ""),
}


@pytest.mark.parametrize("name", ON_FOUR)
def test_four_ranks_are_exact(name, ranks4):
    model_type, changed, core = ON_FOUR[name]
    assert_exact(ranks4, 4, family_config(model_type, **changed), None, core)
