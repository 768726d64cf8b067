"""Twenty families give the loss and the gradients of the run without sequence parallelism, in fp64."""

import pytest
import torch
import torch.distributed as dist
from transformers import LlamaForCausalLM, LlamaForSequenceClassification

from benchmarks.cells import build_model
from benchmarks.census import small_of
from benchmarks.families import FAMILIES, family_config
from benchmarks.ranks import RankError
from deepspeed_alst.core.hf_model_spec import ModelSpec
from deepspeed_alst.core.patching import PatchSet
from deepspeed_alst.data.sharding import ShardingConfig, shard_batch
from deepspeed_alst.errors import UnsupportedModelError
from deepspeed_alst.sequence_parallel.feature import patch_model
from deepspeed_alst.verification.hf_support_checks import check_model
from tests.models import family_batch, proved, split_and_whole

EXACT = 1e-12


@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_family_is_exact(model_type, ranks2):
    loss, grads = ranks2.run(split_and_whole, family_config(model_type), 37, 2)[0]
    assert loss < EXACT
    assert max(grads.values()) < EXACT, max(grads, key=grads.get)


@pytest.mark.parametrize("kv_heads", [1, 2, 4, 8])
@pytest.mark.parametrize("sp_size", [2, 4])
def test_heads_are_split_and_replicated_exactly(kv_heads, sp_size, ranks4):
    config = family_config("llama", num_attention_heads=8, num_key_value_heads=kv_heads)
    loss, grads = ranks4.run(split_and_whole, config, 61, 1, sp_size)[0]
    assert loss < EXACT and max(grads.values()) < EXACT


def test_a_routers_loss_on_four_ranks_of_which_two_have_padding_alone(ranks4):
    config = family_config("qwen3_moe", output_router_logits=True, router_aux_loss_coef=1.0)
    loss, grads = ranks4.run(split_and_whole, config, 5, 2, 4, 16, 1)[0]
    assert loss < EXACT and max(grads.values()) < EXACT


@pytest.mark.parametrize("core", ["eager"])
def test_another_attention_core_is_refused_by_name(core):
    model = build_model(family_config("llama"))
    model.set_attn_implementation(core)
    with pytest.raises(UnsupportedModelError, match=f"attn_implementation='{core}'.*sdpa"):
        check_model(ModelSpec(model))


@pytest.mark.parametrize(
    ("model_type", "core", "words"),
    [
        ("bloom", "eager", "transformers has neither sdpa nor flash nor flex attention for it.* cannot run under"),
        ("rwkv", "eager", "transformers has neither sdpa nor flash nor flex attention for it.* cannot run under"),
        ("xlstm", "eager", "transformers has neither sdpa nor flash nor flex attention for it.* cannot run under"),
        ("gemma2", "eager", r"load the model with attn_implementation='flash_attention_2' \(.*\) or 'flex_attention'"),
        ("llama", "eager", r"load the model with attn_implementation='sdpa' or .*'flex_attention'\.$"),
        ("gemma3", "sdpa", r"vision_tower is a part with a Siglip.*train its language model alone, Gemma3ForCausalLM"),
        (
            "gemma4",
            "sdpa",
            r"is a part with a Gemma4.*train .* alone, Gemma4ForCausalLM of config\.get_text_config",
        ),
    ],
)
def test_a_way_out_is_one_that_the_model_has(model_type, core, words):
    model_class, config = small_of(model_type)
    config._attn_implementation = core
    with torch.device("meta"):
        model = model_class(config)
    with pytest.raises(UnsupportedModelError, match=words) as caught:
        check_model(ModelSpec(model))
    assert ("quadratic" in str(caught.value)) == (model_type in ("gemma2", "llama"))
    assert "None" not in str(caught.value) and ".." not in str(caught.value)


def test_rotary_embeddings_may_have_configs_of_their_own():
    model_class, config = small_of("granite_swa")
    config._attn_implementation = "flex_attention"
    config.layer_rope_theta = [1e4, 5e5] * (config.num_hidden_layers // 2)
    with torch.device("meta"):
        model = model_class(config)
    assert model.model.rotary_embs[0].config is not model.config
    assert [num_heads for num_heads, *_ in check_model(ModelSpec(model))] == [config.num_attention_heads]


def prove_it(model_type: str, core: str) -> str:
    model_class, config = small_of(model_type)
    config._attn_implementation = core
    with torch.device("meta"):
        model = model_class(config)
    return proved(model)


def test_a_stock_model_is_not_said_to_have_been_changed(ranks2):
    with pytest.raises(RankError) as caught:
        ranks2.run(prove_it, "falcon", "sdpa")
    for error in caught.value.errors:
        assert "modeling_falcon has an attention of its own, which cannot be split: use another model. S" in str(error)
        assert "Undo" not in str(error) and ".." not in str(error)


def test_a_stock_model_whose_rotary_embeddings_have_configs_is_let_through(ranks2):
    """Flex attention, as transformers has no sdpa for it; the census found it right."""
    assert ranks2.run(prove_it, "granite_swa", "flex_attention") == ["", ""]


def test_a_loss_of_the_programs_own_is_refused_by_name():
    model = build_model(family_config("llama"))
    model.loss_function = lambda logits, labels, **_: logits.sum()
    with pytest.raises(UnsupportedModelError, match=r"loss_function is .*lambda.*, not transformers' ForCausalLMLoss"):
        check_model(ModelSpec(model))


def test_all_reasons_are_given_at_once():
    model = build_model(family_config("llama", is_causal=False))
    model.loss_function = lambda logits, labels, **_: logits.sum()
    with pytest.raises(UnsupportedModelError) as caught:
        check_model(ModelSpec(model))
    assert "is_causal=False" in str(caught.value) and "loss_function is" in str(caught.value)


class OwnLoss(LlamaForCausalLM):
    """A user's subclass that makes its loss by itself."""

    def forward(self, *args, labels=None, shift_labels=None, **kwargs):
        output = super().forward(*args, **kwargs)
        output.loss = torch.nn.functional.cross_entropy(output.logits.flatten(0, 1), shift_labels.flatten())
        return output


def run_own_loss():
    config = family_config("llama")
    model = OwnLoss(config)
    with PatchSet() as undo:
        patch_model(ModelSpec(model), None, undo)
        model(**shard_batch(family_batch(16, 1), 2, ShardingConfig(2)).shards[dist.get_rank()])


def test_a_loss_that_goes_past_the_package_is_refused(ranks2):
    with pytest.raises(RankError) as caught:
        ranks2.run(run_own_loss)
    assert all("OwnLoss computed its loss without self.loss_function" in str(error) for error in caught.value.errors)


def test_another_head_than_a_language_models_is_refused():
    model = LlamaForSequenceClassification(family_config("llama", pad_token_id=0))
    with pytest.raises(UnsupportedModelError, match="only causal language models"):
        check_model(ModelSpec(model))


def test_a_wrapper_is_refused():
    wrapped = torch.nn.Sequential(build_model(family_config("llama")))
    with pytest.raises(UnsupportedModelError, match="Sequential is not a transformers model"):
        check_model(ModelSpec(wrapped))
