"""Models whose masks and positions are those of the whole sequence: windows, chunks, packed documents, RoPE by length.

Run here, in fp64 where no layer runs twice, against SP 1 under sdpa with transformers' own masks, on the sample as it
is, without the padding of the split run.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from benchmarks.cells import Cell, build_model, ds_config, full_weight
from benchmarks.families import family_config
from benchmarks.ranks import RankError
from deepspeed_alst.attention import hf_masks as masks
from deepspeed_alst.attention.attention_cache import saving_frame
from deepspeed_alst.attention.hf_masks import MaskSpec
from deepspeed_alst.core.forward_context import ForwardContext
from deepspeed_alst.core.hf_model_spec import ModelSpec
from deepspeed_alst.core.patching import PatchSet
from deepspeed_alst.data.sharding import ShardingConfig, shard_batch
from deepspeed_alst.distributed.mesh import SequenceGroups, build_control_group, build_groups
from deepspeed_alst.errors import DataError, UnsupportedModelError
from deepspeed_alst.sequence_parallel import hf_positions
from deepspeed_alst.sequence_parallel.batch_check import check_batches
from deepspeed_alst.sequence_parallel.feature import patch_model
from deepspeed_alst.verification.hf_support_checks import check_model
from tests.attention.test_cores import EXACT, packed_batch, split_step, whole_step, worst
from tests.attention.test_kept_attention import checkpoint_layers
from tests.models import family_batch

PER_LAYER = {"sliding_window": 11, "layer_types": ["sliding_attention", "full_attention"]}
CHUNKS = {
    "attention_chunk_size": 11,
    "layer_types": ["chunked_attention", "full_attention"],
    "no_rope_layers": [1, 0],  # the second scales its queries by their places
    "floor_scale": 8,
    "attn_scale": 0.5,
    "num_local_experts": 2,
    "intermediate_size_mlp": 48,
}


@contextlib.contextmanager
def split(model: torch.nn.Module) -> Iterator[tuple[SequenceGroups, ForwardContext]]:
    """Inside, a model is split over two ranks, with the guard of its batches."""
    with PatchSet() as undo:
        groups, calls = build_groups(2, build_control_group()), ForwardContext(saving_frame=saving_frame)
        undo.callback(groups.destroy)
        patch_model(ModelSpec(model), groups.sp_group, undo, calls)
        check_batches(ModelSpec(model), groups, calls, undo)
        yield groups, calls


def shard_of(batch: dict[str, torch.Tensor], groups: SequenceGroups) -> dict[str, Any]:
    sharded = shard_batch(batch, 2, ShardingConfig(8, packing=True))
    return {**sharded.shards[groups.sp_rank], **sharded.common}


def in_turns(
    config: Callable[[], Any],
    batches: list[dict[str, torch.Tensor]],
    prepare: Callable[[Any], Any] = lambda model: model,
) -> float:
    """The error of fp32 gradients of batches that all go forward before any goes backward."""
    model, whole = build_model(config()), build_model(config())
    with split(model) as (groups, _):
        run = prepare(model)
        losses = [run(**shard_of(batch, groups)).loss for batch in batches]
        for loss in losses:
            loss.backward()
        grads = {name: param.grad for name, param in model.named_parameters()}
        for grad in grads.values():
            dist.all_reduce(grad, group=groups.sp_group)
            grad /= 2
    true = sum(whole(**batch, use_cache=False).loss for batch in batches)
    true.backward()
    truths = {name: param.grad for name, param in whole.named_parameters()}
    return worst((sum(loss.item() for loss in losses), grads), (true.item(), truths))


# --- masks


@contextlib.contextmanager
def masks_dropped(wanted: bool) -> Iterator[None]:
    """Inside, every mask is taken for plain causal."""
    with mock.patch.object(masks, "read_mask", lambda *_: MaskSpec()) if wanted else contextlib.nullcontext():
        yield


def errors_of(model_type: str, changed: dict[str, Any], length: int, drop: bool) -> dict[str, float]:
    """At SP 2 and 4, plain and packed."""
    found = {}
    config = functools.partial(family_config, model_type, **changed)
    for name, batch in (("plain", family_batch(length, 2)), ("packed", packed_batch())):
        true = whole_step("sdpa", config(), batch)
        for sp_size, multiple in ((2, 8), (4, 32)):
            with masks_dropped(drop):
                try:
                    error = worst(split_step("sdpa", config(), batch, sp_size, multiple), true)
                except UnsupportedModelError:  # documents that were told to nobody
                    error = float("inf")
            found[f"{name} SP {sp_size}"] = error
    return found


@pytest.mark.parametrize(
    ("model_type", "changed", "length"),
    [
        ("mistral", {"sliding_window": 2}, 37),
        pytest.param("mistral", {"sliding_window": 12}, 37, marks=pytest.mark.slow),
        ("mistral", {"sliding_window": 30}, 37),  # longer than a shard, and shorter than the whole
        ("mistral", {"sliding_window": 12}, 181),  # several blocks
        ("qwen2", {"use_sliding_window": True, "sliding_window": 11, "max_window_layers": 1}, 37),
        pytest.param("phi3", {"sliding_window": 11}, 37, marks=pytest.mark.slow),
        pytest.param("starcoder2", {"sliding_window": 11}, 37, marks=pytest.mark.slow),
        pytest.param("mixtral", {"sliding_window": 11}, 37, marks=pytest.mark.slow),
        ("gemma3_text", PER_LAYER, 37),
        pytest.param("cohere2", PER_LAYER, 37, marks=pytest.mark.slow),
        pytest.param("olmo3", PER_LAYER, 37, marks=pytest.mark.slow),
        ("llama4_text", CHUNKS, 37),
    ],
)
def test_a_mask_is_that_of_the_whole_sequence(model_type, changed, length, ranks4):
    found = ranks4.run(errors_of, model_type, changed, length, False)[0]
    assert max(found.values()) < EXACT, found


def test_the_errors_see_a_mask_that_is_dropped(ranks4):
    for model_type, changed in (("mistral", {"sliding_window": 12}), ("llama4_text", CHUNKS)):
        found = ranks4.run(errors_of, model_type, changed, 37, True)[0]
        assert min(found.values()) > 1e-3, found


def errors_of_recomputed_masks(reentrant: bool, keeps: bool) -> tuple[float, int]:
    """And the layers that kept attention's output, of three batches of other documents each."""
    frames = []

    def prepare(model: Any) -> Any:
        frames.append(checkpoint_layers(model, keeps, reentrant))
        return model

    batches = [packed_batch(), packed_batch((20, 9)), family_batch(29, 1)]
    error = in_turns(functools.partial(family_config, "mistral", sliding_window=5), batches, prepare)
    return error, sum(bool(frame.saved_attention) for frame in frames[0])


@pytest.mark.parametrize("keeps", [False, True])
@pytest.mark.parametrize("reentrant", [False, True])
def test_a_recomputed_layer_has_the_mask_of_its_own_forward(reentrant, keeps, ranks4):
    error, kept = ranks4.run(errors_of_recomputed_masks, reentrant, keeps)[0]
    assert error < 1e-5
    assert kept == (3 * 2 if keeps else 0), "of three batches and two layers"


def trained(stage: int, sp_size: int) -> list[torch.Tensor]:
    """The weights after two steps of two accumulated batches a rank, through ``deepspeed.initialize``."""
    import deepspeed

    import deepspeed_alst

    model = build_model(family_config("mistral", sliding_window=7))
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    config = ds_config(Cell(stage=stage, gas=2, offload="outputs" if sp_size > 1 else ""), sp_size)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    lengths = [(9, 5, 20), (3, 30), (17, 17, 1), (40,), (1, 1, 1, 22), (8, 8), (23,), (2, 31)]
    places = range(dist.get_rank(), 16, 4)
    mine = [packed_batch(lengths[place % 8], seed=place) for place in places]
    for batch in deepspeed_alst.shard_dataloader(mine, engine):
        engine.backward(engine(**batch).loss)
        engine.step()
    weights = [full_weight(param) for param in engine.module.parameters()]
    engine.destroy()
    return weights


def test_steps_on_packed_documents_with_a_window_are_those_of_sp1(ranks4):
    """Attention's outputs are kept on the host, piece by piece; at SP 1 layers are recomputed."""
    ours, theirs = (ranks4.run(trained, 2, sp_size)[0] for sp_size in (4, 1))
    assert max(float((x - y).norm() / y.norm()) for x, y in zip(ours, theirs, strict=True)) < 1e-6


def error_of_compiled(model_type: str, changed: dict[str, Any]) -> float:
    compiled = functools.partial(torch.compile, backend="eager")
    return in_turns(functools.partial(family_config, model_type, **changed), [packed_batch()], compiled)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model_type", "changed"),
    [("mistral", {"sliding_window": 5}), ("llama4_text", CHUNKS)],
)
def test_a_compiled_model_has_its_masks(model_type, changed, ranks4):
    assert ranks4.run(error_of_compiled, model_type, changed, seconds=200)[0] < 1e-5


# --- RoPE that depends on the length

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
    # One set of frequencies for each kind of layer.
    "gemma3_text": {
        "max_position_embeddings": ORIGINAL,
        "rope_parameters": {
            "full_attention": DYNAMIC,
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
        **PER_LAYER,
    },
}


def errors_of_rope(model_type: str, length: int, told: bool) -> list[float]:
    """At SP 2 and 4, where padding goes past the length at which frequencies change; with the length told or not."""
    config = functools.partial(family_config, model_type, **ROPES[model_type])
    batch = family_batch(length, 2)
    true = whole_step("sdpa", config(), batch)
    with contextlib.nullcontext() if told else mock.patch.object(hf_positions, "give_whole_length"):
        return [worst(split_step("sdpa", config(), batch, *sizes), true) for sizes in ((2, 8), (4, 32))]


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


def error_of_recomputed_rope(reentrant: bool) -> float:
    def prepare(model: Any) -> Any:
        checkpoint_layers(model, False, reentrant)
        return model

    config = functools.partial(family_config, "phi3", **ROPES["phi3"])
    return in_turns(config, [family_batch(37, 1), family_batch(13, 1)], prepare)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_recomputed_layer_has_the_frequencies_of_its_own_forward(reentrant, ranks4):
    """A short batch goes forward after a long one, and both go backward then."""
    assert ranks4.run(error_of_recomputed_rope, reentrant)[0] < 1e-5


def rotary_in_the_layers() -> None:
    """A rotary embedding that each layer calls for itself, again in the recomputation."""
    model = build_model(family_config("phi3", **ROPES["phi3"]))
    for layer in model.model.layers:
        attention = layer.self_attn
        attention.forward = functools.partial(_with_own_rotary, attention.forward, model.model.rotary_emb)
    with split(model) as (groups, _):
        checkpoint_layers(model, False, False)
        model(**shard_of(family_batch(37, 1), groups)).loss.backward()


def _with_own_rotary(forward: Any, rotary: Any, **kwargs: Any) -> Any:
    return forward(**kwargs | {"position_embeddings": rotary(kwargs["hidden_states"], kwargs["position_ids"])})


def test_a_length_that_is_asked_for_in_a_recomputation_is_refused(ranks4):
    with pytest.raises(RankError) as caught:
        ranks4.run(rotary_in_the_layers)
    assert all("is recomputed in the backward" in str(error) for error in caught.value.errors)


def generated() -> tuple[torch.Tensor, torch.Tensor]:
    """The same prompt continued before and under sequence parallelism, past the original length."""
    model = build_model(family_config("phi3", **ROPES["phi3"]))
    prompt = family_batch(17, 1)["input_ids"]
    before = model.generate(prompt, max_new_tokens=9, do_sample=False)
    with split(model) as (groups, _):
        model(**shard_of(family_batch(37, 1), groups))
        return before, model.generate(prompt, max_new_tokens=9, do_sample=False)


def test_generation_has_its_own_length(ranks4):
    before, after = ranks4.run(generated)[0]
    assert torch.equal(before, after)


# --- padding


def guarded(positions_2s: list[list[int]]) -> str | None:
    """What two ranks say to these positions, of two shards; the other two do the same."""
    model = build_model(family_config("llama"))
    with split(model) as (groups, calls):
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
    ("model_type", "sentence"),
    [
        ("bart", "BartForCausalLM: it takes no position_ids"),
        ("roberta", "roberta.embeddings counts positions from behind the padding token"),
    ],
)
def test_a_model_that_counts_positions_of_a_shard_is_refused(model_type, sentence):
    model = build_model(family_config(model_type, is_decoder=True, pad_token_id=1))
    with pytest.raises(UnsupportedModelError, match=sentence):
        check_model(ModelSpec(model))
