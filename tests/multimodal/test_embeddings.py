"""No rank makes a sample's embeddings whole; and keys without sequence parallelism reach the language model."""

import contextlib

import pytest
import torch

from benchmarks.cells import KeepFp64
from benchmarks.multimodal import _control_group, ask, judge, split, step
from benchmarks.multimodal_families import batch_of, tiny_model
from deepspeed_alst.config.schema import parse
from deepspeed_alst.core.forward_context import ForwardContext
from deepspeed_alst.core.hf_model_spec import ModelSpec
from deepspeed_alst.core.patching import PatchSet
from deepspeed_alst.features import RunContext, features_of
from deepspeed_alst.multimodal.deferred import Deferred
from deepspeed_alst.tiling.zero3_leaf import ZeRO3Leaves


def refuse(self: Deferred) -> None:
    raise AssertionError(f"{self} was made whole")


def ask_for_shards(name: str) -> list[str]:
    with PatchSet() as patches:
        patches.set(Deferred, "whole", refuse)
        return [each.outcome for each in ask(name)][:3]


@pytest.mark.parametrize(
    "name",
    ["mistral3", *(pytest.param(name, marks=pytest.mark.slow) for name in ("qwen2_5_vl", "qwen3_vl", "gemma3"))],
)
def test_no_rank_makes_embeddings_or_features_whole(name, ranks2):
    assert ranks2.run(ask_for_shards, name)[0] == ["right"] * 3


def merged_otherwise(kind: str) -> tuple[float, int]:
    """Merge as no model that is known; return the error and how often a whole tensor was made."""
    made = list[str]()

    def note(self: Deferred) -> torch.Tensor:
        made.append(type(self).__name__)
        return whole(self)

    with KeepFp64(), PatchSet() as patches:
        model = tiny_model("llava")
        places = model.model.get_placeholder_mask

        def otherwise(input_ids, inputs_embeds, image_features):
            if kind == "in place":
                inputs_embeds[:, :2] = inputs_embeds[:, :2] * 2
                image_features[:, :1] = image_features[:, :1] + image_features[:, 1:2]
            mask = places(input_ids, inputs_embeds=inputs_embeds, image_features=image_features)
            return mask.expand(inputs_embeds.shape).clone() if kind == "by element" else mask

        patches.set(model.model, "get_placeholder_mask", otherwise)
        batch = batch_of("llava", model, (2, 1))
        truth = step(model, batch)
        session, whole = split(model, patches), Deferred.whole
        patches.set(Deferred, "whole", note)
        return judge(truth, step(model, batch, session)).error, len(made)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["by element", "in place"])
def test_a_merge_that_is_not_known_gets_whole_tensors(kind, ranks2):
    error, made = ranks2.run(merged_otherwise, kind)[0]
    assert error < 1e-11
    assert made


LEAN = {"memory_lean_layer": {"chunk_tokens": 10, "key_block": 7}}
TILES = {"tiled_mlp_compute": {"tile_tokens": 7}, "tiled_logits_loss": {"tile_tokens": 5}}


def at_sp1(name: str, keys: dict) -> tuple[float, str]:
    in_fp32 = "memory_lean_layer" in keys  # the mode does not reach the recomputation
    with contextlib.nullcontext() if in_fp32 else KeepFp64(), PatchSet() as patches:
        model = tiny_model(name, torch.float32 if in_fp32 else torch.float64)
        if in_fp32:
            model.gradient_checkpointing_enable()
        batch = batch_of(name, model, (2, 1))
        truth = step(model, batch)
        config = parse({"train_micro_batch_size_per_gpu": 1, "alst": keys})
        leaves = ZeRO3Leaves(model, 0, patches)
        run = RunContext(ModelSpec(model), config, 0, _control_group(), None, None, ForwardContext(), leaves, "cpu")
        features = features_of(run, "")
        for feature in features:
            feature.prepare_model(run, patches)
        report = "; ".join(words for feature in features for _, words in feature.report())
        return judge(truth, step(model, batch)).error, report


@pytest.mark.parametrize(
    ("name", "keys", "words"),
    [
        ("qwen2_vl", TILES, "in 4 layers"),
        *(
            pytest.param(name, keys, words, marks=pytest.mark.slow)
            for name in ("llava", "qwen3_vl", "gemma3")
            for keys, words in ((TILES, "in 4 layers"), (LEAN, "4 layers in"))
        ),
    ],
)
def test_keys_reach_the_language_model_without_sequence_parallelism(name, keys, words, ranks2):
    error, report = ranks2.run(at_sp1, name, keys)[0]
    assert error < (1e-4 if keys is LEAN else 1e-11)
    assert words in report
