"""Layers in chunks give the loss and the gradients of the ordinary model, in fp64, on two and four ranks."""

import pytest

from benchmarks.families import FAMILIES, family_config
from deepspeed_alst.config.schema import MemoryLeanConfig
from tests.models import split_and_whole

EXACT = 1e-12
# 19 tokens of a shard: chunks of 8, 8 and 3, tiles of 3, 3 and 2.
LEAN = MemoryLeanConfig(chunk_tokens=8, tile_tokens=3, key_block=5)
DENSE = [each for each in FAMILIES if each not in ("mixtral", "qwen3_moe", "olmoe")]


@pytest.mark.parametrize("model_type", DENSE)
def test_a_family_is_exact_in_chunks(model_type, ranks2):
    loss, grads = ranks2.run(split_and_whole, family_config(model_type), 37, 2, 2, 0, 0, LEAN)[0]
    assert loss < EXACT
    assert max(grads.values()) < EXACT, max(grads, key=grads.get)
