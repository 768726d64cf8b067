"""Positions and lengths of the whole sequence: RoPE that depends on them, padding, and models that count themselves.

Run here, in fp64, against SP 1 on the sample as it is, without the padding of the split run.
"""

import functools
from contextlib import ExitStack
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from benchmarks.cells import build_model
from benchmarks.ranks import RankError
from deepspeed_alst.data.shard import shard_batch
from deepspeed_alst.errors import DataError, UnsupportedModelError
from deepspeed_alst.models import patches
from deepspeed_alst.models.batch_guard import guard_batches
from deepspeed_alst.models.calls import Calls
from deepspeed_alst.models.families import check_model
from deepspeed_alst.models.patches import patch_model
from deepspeed_alst.parallel.groups import build_control_group, build_groups
from tests.models import family_batch, family_config
from tests.test_cores import EXACT, packed_batch, split_step, whole_step, worst
from tests.test_kept_attention import checkpoint_layers

ORIGINAL = 20
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0, 1.1, 1.2, 1.3],
    "long_factor": [2.0, 3.0, 4.0, 5.0],
    "original_max_position_embeddings": ORIGINAL,
}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
ROPES = {
    "phi3": {
        "max_position_embeddings": 64,
        "original_max_position_embeddings": ORIGINAL,
        "rope_parameters": LONGROPE,
    },
    "llama": {"max_position_embeddings": ORIGINAL, "rope_parameters": DYNAMIC},
}
# One set of frequencies for each kind of layer.
ROPES["gemma3_text"] = {
    "max_position_embeddings": ORIGINAL,
    "layer_types": ["sliding_attention", "full_attention"],
    "sliding_window": 11,
    "rope_parameters": {"full_attention": DYNAMIC, "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}},
}


def errors_of_rope(model_type: str, length: int, told: bool) -> list[float]:
    """At SP 2 and 4, where padding goes past the length at which frequencies change; with the length told or not."""
    config = functools.partial(family_config, model_type, **ROPES[model_type])
    batch = family_batch(length, 2)
    true = whole_step("sdpa", config(), batch)
    with mock.patch.object(patches, "give_whole_length", patches.give_whole_length if told else lambda *_: None):
        return [
            worst(split_step("sdpa", config(), batch, sp_size, multiple), true)
            for sp_size, multiple in ((2, 8), (4, 32))
        ]


@pytest.mark.parametrize("length", [ORIGINAL - 3, ORIGINAL, ORIGINAL + 1, 37])
@pytest.mark.parametrize("model_type", ROPES)
def test_rope_goes_by_the_whole_sequences_length(model_type, length, ranks4):
    assert max(ranks4.run(errors_of_rope, model_type, length, True)[0]) < EXACT


@pytest.mark.parametrize("model_type", ROPES)
def test_the_errors_see_a_length_that_is_not_told(model_type, ranks4):
    assert min(ranks4.run(errors_of_rope, model_type, 37, False)[0]) > 1e-3


def errors_of_packed_rope(lengths: tuple[int, ...]) -> list[float]:
    found = []
    for model_type, changed in ROPES.items():
        config = functools.partial(family_config, model_type, **changed)
        batch = packed_batch(lengths)
        true = whole_step("sdpa", config(), batch)
        # 32 tokens of padding are a longer document than any other.
        found.append(worst(split_step("sdpa", config(), batch, 2, sum(lengths) + 32), true))
    return found


@pytest.mark.parametrize("lengths", [(15, 1, 18), (9, 23)])
def test_rope_of_packed_documents_goes_by_the_longest_of_them(lengths, ranks4):
    assert max(ranks4.run(errors_of_packed_rope, lengths)[0]) < EXACT


def rope_in_turns(reentrant: bool) -> float:
    """A short batch goes forward after a long one, and both go backward then, in recomputed layers."""
    config = functools.partial(family_config, "phi3", **ROPES["phi3"])
    batches = [family_batch(37, 1), family_batch(13, 1)]
    with ExitStack() as undo:
        groups = build_groups(2, build_control_group())
        undo.callback(groups.destroy)
        model, whole, calls = build_model(config()), build_model(config()), Calls()
        patch_model(model, groups.sp_group, undo, calls)
        guard_batches(model, groups, calls, undo)
        checkpoint_layers(model, False, reentrant)
        shards = [shard_batch(batch, 2, 8).shards[groups.sp_rank] for batch in batches]
        losses = [model(**shard).loss for shard in shards]
        for loss in losses:
            loss.backward()
        grads = {name: param.grad for name, param in model.named_parameters()}
        for grad in grads.values():
            dist.all_reduce(grad, group=groups.sp_group)
            grad /= 2
        total = sum(whole(**batch, use_cache=False).loss for batch in batches)
        total.backward()
    true = {name: param.grad for name, param in whole.named_parameters()}
    return worst((sum(loss.item() for loss in losses), grads), (total.item(), true))


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_recomputed_layer_has_the_frequencies_of_its_own_forward(reentrant, ranks4):
    assert ranks4.run(rope_in_turns, reentrant)[0] < 1e-5


def generated() -> tuple[torch.Tensor, torch.Tensor]:
    """The same prompt continued before and after there was sequence parallelism, past the original length."""
    prompt = family_batch(17, 1)["input_ids"]
    with ExitStack() as undo:
        groups = build_groups(2, build_control_group())
        undo.callback(groups.destroy)
        model, calls = build_model(family_config("phi3", **ROPES["phi3"])), Calls()
        before = model.generate(prompt, max_new_tokens=9, do_sample=False)
        patch_model(model, groups.sp_group, undo, calls)
        guard_batches(model, groups, calls, undo)
        model(**shard_batch(family_batch(37, 1), 2, 8).shards[groups.sp_rank])
        return before, model.generate(prompt, max_new_tokens=9, do_sample=False)


def test_generation_has_its_own_length(ranks4):
    before, after = ranks4.run(generated)[0]
    assert torch.equal(before, after)


# --- padding


def guarded(positions_2s: list[list[int]]) -> str | None:
    """What two ranks say to these positions, of two shards; the others do the same."""
    with ExitStack() as undo:
        groups = build_groups(2, build_control_group())
        undo.callback(groups.destroy)
        model, calls = build_model(family_config("llama")), Calls()
        patch_model(model, groups.sp_group, undo, calls)
        guard_batches(model, groups, calls, undo)
        mine = torch.tensor(positions_2s[groups.sp_rank])[None]
        try:
            model(input_ids=torch.ones_like(mine), position_ids=mine, labels=mine, shift_labels=mine)
        except DataError as error:
            return str(error)
        assert calls.highest == max(map(max, positions_2s))
        return None


@pytest.mark.parametrize("shards", [[[0, 1, 2], [3, 4, 4]], [[0, 1, 2], [2, 2, 2]], [[0, 1, 1], [1, 1, 1]]])
def test_padding_that_repeats_the_last_position_is_a_part_of_the_sequence(shards, ranks4):
    assert ranks4.run(guarded, shards) == [None] * 4


@pytest.mark.parametrize(
    ("shards", "sentence"),
    [
        ([[0, 1, 2], [0, 1, 2]], "position_ids that start at [0, 0]"),
        ([[0, 1, 2], [4, 5, 6]], "position_ids that start at [0, 4]"),
        ([[0, 1, 2], [1, 1, 1]], "position_ids that start at [0, 1]"),
        ([[0, 1, 1], [2, 3, 4]], "position_ids that start at [0, 2]"),
        ([[0, 0, 1], [3, 4, 5]], "its position_ids restart"),
        ([[0, 1, 2], [3, 3, 4]], "its position_ids restart"),
    ],
)
def test_other_positions_are_refused(shards, sentence, ranks4):
    assert all(sentence in str(error) for error in ranks4.run(guarded, shards))


# --- models that count positions themselves


@pytest.mark.parametrize(
    ("model_type", "changed", "sentence"),
    [
        ("bart", {"is_decoder": True}, "BartForCausalLM: it takes no position_ids"),
        ("roberta", {"is_decoder": True}, "roberta.embeddings counts positions from behind the padding token"),
    ],
)
def test_a_model_that_counts_positions_of_a_shard_is_refused(model_type, changed, sentence):
    model = build_model(family_config(model_type, **changed, pad_token_id=1))
    with pytest.raises(UnsupportedModelError, match=sentence):
        check_model(model)


def rotary_in_the_layers() -> None:
    """A rotary embedding within the layers, which are recomputed after another batch."""
    with ExitStack() as undo:
        groups = build_groups(2, build_control_group())
        undo.callback(groups.destroy)
        model, calls = build_model(family_config("phi3", **ROPES["phi3"])), Calls()
        rotary = model.model.rotary_emb
        for layer in model.model.layers:
            layer.self_attn.forward = functools.partial(_with_own_rotary, layer.self_attn.forward, rotary)
        patch_model(model, groups.sp_group, undo, calls)
        guard_batches(model, groups, calls, undo)
        checkpoint_layers(model, False, False)
        model(**shard_batch(family_batch(37, 1), 2, 8).shards[groups.sp_rank]).loss.backward()


def _with_own_rotary(forward: Any, rotary: Any, **kwargs: Any) -> Any:
    return forward(**kwargs | {"position_embeddings": rotary(kwargs["hidden_states"], kwargs["position_ids"])})


def test_a_length_that_is_asked_for_in_a_recomputation_is_refused(ranks4):
    with pytest.raises(RankError) as caught:
        ranks4.run(rotary_in_the_layers)
    assert all("is recomputed in the backward" in str(error) for error in caught.value.errors)
