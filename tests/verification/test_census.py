"""The census in short, and the probe that lets an unlisted model through or refuses it."""

import sys
import time

import pytest
import torch
import torch.distributed as dist
from transformers import LlamaForCausalLM, OlmoeForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from benchmarks.census import VARIANTS, Row, ask, ask_check, small_of, tally
from benchmarks.ranks import LateError, RankError, Ranks, finished
from deepspeed_alst.errors import UnsupportedModelError
from deepspeed_alst.verification.hf_parity_trial import Verdict, check_custom_modules
from deepspeed_alst.verification.verify_model import VERIFIED_MODEL_TYPES
from tests.models import proved

SHORT = ("llama", "gpt2", "deepseek_v3", "granitemoe", "gemma3_text", "llama4_text", "qwen3_next")


@pytest.mark.parametrize(("family", "packed"), [(each, False) for each in SHORT] + [("mistral", True), ("opt", True)])
def test_a_family_of_the_list_is_right_on_four_ranks(family, packed, ranks4):
    assert family in VERIFIED_MODEL_TYPES
    verdicts = ranks4.run(ask, family, 4, packed)
    assert len(set(verdicts)) == 1 and verdicts[0].outcome == "right", verdicts[0]


@pytest.mark.parametrize("family", ["gpt_oss", "flex_olmo", "jamba"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_family_of_the_list_passes_the_model_check(family, dtype, ranks4):
    assert {verdict.why for verdict in ranks4.run(ask_check, family, dtype)} == {""}


def test_the_list_holds_families_that_the_census_asks_about():
    assert {*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *VARIANTS} >= VERIFIED_MODEL_TYPES


def one_fails(which: int, seconds: float) -> None:
    if dist.get_rank() == which:
        raise ValueError("of its own")
    time.sleep(seconds)


@pytest.mark.slow
@pytest.mark.parametrize("which", [-1, 0])
def test_ranks_that_are_late_are_told_from_those_that_fail(which):
    late = r"no answer within 10 s: the machine was too busy, or a build lock"
    with Ranks(2) as ranks:
        ranks.run(one_fails, -1, 0.0)  # with all that it imports
        with pytest.raises(RankError, match=late) as caught:
            ranks.run(one_fails, which, 60.0, seconds=10)
    assert isinstance(caught.value, LateError) == (which == -1)


def test_a_family_that_has_not_answered_has_not_crashed():
    rows = [Row("llama", (Verdict("right"), Verdict("no answer", "busy"))), Row("gpt2", (Verdict("right"),))]
    assert rows[0].outcome == "no answer"
    assert tally(rows) == {"right": 1, "refused": 0, "not built": 0, "wrong": 0, "crash": 0, "no answer": 1}
    assert "no answer" not in tally(rows[1:])


def test_a_process_that_is_late_is_an_error_in_words():
    with pytest.raises(TimeoutError, match="the machine was too busy, or a build lock is in the way"):
        finished([sys.executable, "-c", "import time; time.sleep(60)"], 0.5)
    assert finished([sys.executable, "-c", "print(7)"], 60.0, capture_output=True).stdout == "7\n"


class ByItself(LlamaForCausalLM):
    """A model that looks at its neighbours in a way of its own: on shards it sees fewer of them."""

    def forward(self, input_ids=None, **kwargs):
        output = super().forward(input_ids=input_ids, **kwargs)
        output.loss = output.loss * (1 + self.lm_head.weight.mean() * input_ids.shape[1])
        return output


class Leaking(LlamaForCausalLM):
    """A model that is right on one document, and counts those that begin in its shard alone."""

    def forward(self, input_ids=None, position_ids=None, **kwargs):
        output = super().forward(input_ids=input_ids, position_ids=position_ids, **kwargs)
        if position_ids is not None:
            output.loss = output.loss * (1 + 10 * self.lm_head.weight.mean() * (position_ids[:, 1:] == 0).sum())
        return output


class Large(LlamaForCausalLM):
    """A model whose size no small config takes away."""

    def __init__(self, config):
        super().__init__(config)
        self.table = torch.nn.Embedding(2**20, 64)


def _unlisted(model_class):
    sizes = {"hidden_size": 2048, "num_attention_heads": 16, "num_key_value_heads": 4, "num_hidden_layers": 2}
    config = model_class.config_class(**sizes)
    config.output_router_logits, config.router_aux_loss_coef = True, 1.0  # which Llama has no use for
    config.model_type = "of_my_own"
    with torch.device("meta"):
        model = model_class(config)
    return proved(model)


@pytest.mark.parametrize("model_class", [LlamaForCausalLM, OlmoeForCausalLM])
def test_an_unlisted_model_is_let_through_by_a_small_one_of_its_kind(model_class, ranks2):
    assert ranks2.run(_unlisted, model_class)[0].startswith("a tiny model is right to")


@pytest.mark.parametrize(
    ("model_class", "words"),
    [
        (ByItself, "and the trial of a tiny model on a sequence failed (wrong): "),
        (Leaking, "and the trial of a tiny model on a packed sequence failed (wrong): "),
        (Large, "and the trial of a tiny model on a sequence failed (refused): the tiny model has 67,"),
    ],
)
def test_an_unlisted_model_that_is_not_right_in_small_is_refused_on_all_ranks(model_class, words, ranks2):
    with pytest.raises(RankError) as caught:
        ranks2.run(_unlisted, model_class)
    for error in caught.value.errors:
        assert isinstance(error, UnsupportedModelError)
        assert f"{model_class.__name__} (model_type='of_my_own')" in str(error) and words in str(error)
        assert "Set sequence_parallel_size to 1" in str(error)


# --- what is the program's own in a model of a listed family


class Cumulative(LlamaForCausalLM):
    """A listed model_type, and a sum over the tokens before."""

    def forward(self, input_ids=None, **kwargs):
        embeds = self.get_input_embeddings()(input_ids)
        return super().forward(inputs_embeds=embeds + embeds.cumsum(1), **kwargs)


class Mixing(torch.nn.Module):
    """Around an MLP: adds the mean of all tokens, or of those before."""

    def __init__(self, inner, causal):
        super().__init__()
        self.inner, self.causal = inner, causal

    def forward(self, x):
        return self.inner(x + (x.cumsum(1) if self.causal else x.mean(1, keepdim=True)))


class Adapter(torch.nn.Module):
    """Around a linear layer: LoRA of one's own."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner
        self.down = torch.nn.Linear(inner.in_features, 2, bias=False)
        self.up = torch.nn.Linear(2, inner.out_features, bias=False)

    def forward(self, x):
        return self.inner(x) + self.up(self.down(x))


def _own(put_in, model_class=LlamaForCausalLM, dtype=torch.float32):
    config = model_class.config_class(hidden_size=32, intermediate_size=48, num_hidden_layers=2, vocab_size=97)
    config.num_attention_heads = config.num_key_value_heads = 4
    config.head_dim = 8
    model = model_class(config).to(dtype)
    put_in(model)
    return proved(model)


def _nothing(model):
    pass


class Norm(torch.nn.Module):
    """RMSNorm of one's own, whose weight is no matrix."""

    def __init__(self, size):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(size))

    def forward(self, x):
        return self.weight * x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt()


class Squared(torch.nn.Module):
    """An activation of one's own."""

    def forward(self, x):
        return torch.relu(x).square()


def _norms(model):
    for layer in model.model.layers:
        layer.input_layernorm = Norm(layer.input_layernorm.weight.numel()).to(layer.input_layernorm.weight.dtype)
        layer.mlp.act_fn = Squared()


def _adapters(model):
    for layer in model.model.layers:
        layer.mlp.down_proj = Adapter(layer.mlp.down_proj).to(layer.mlp.down_proj.weight.dtype)


def _mean(model):
    model.model.layers[1].mlp = Mixing(model.model.layers[1].mlp, causal=False)


def _sum_before(model):
    model.model.layers[0].mlp = Mixing(model.model.layers[0].mlp, causal=True)


def test_a_class_of_ones_own_with_a_listed_model_type_is_tried(ranks2):
    with pytest.raises(RankError) as caught:
        ranks2.run(_own, _nothing, Cumulative)
    for error in caught.value.errors:
        own = f"{Cumulative.__module__}.Cumulative"
        assert f"runs the program's own code ({own}), and the trial of a tiny model on a sequence failed" in str(error)


class OfLogits(LlamaForCausalLM):
    def forward(self, **kwargs):
        output = super().forward(**kwargs)
        output.loss = output.loss + 0.1 * output.logits.logsumexp(-1).square().mean()
        return output


class OfWeights(LlamaForCausalLM):
    def forward(self, **kwargs):
        output = super().forward(**kwargs)
        output.loss = output.loss + 0.1 * self.lm_head.weight.square().sum()
        return output


def test_a_term_that_a_forward_adds_to_the_loss_is_right_of_weights_and_named_of_logits(ranks2):
    assert all("is right to" in said for said in ranks2.run(_own, _nothing, OfWeights))
    with pytest.raises(RankError) as caught:
        ranks2.run(_own, _nothing, OfLogits)
    for error in caught.value.errors:
        assert "is off by" in str(error) and "Add it in the training loop, to outputs.loss" in str(error)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("put_in", [_adapters, _norms])
def test_token_wise_modules_of_ones_own_are_let_through(put_in, dtype, ranks2):
    assert ranks2.run(_own, put_in, LlamaForCausalLM, dtype) == ["", ""]


@pytest.mark.parametrize(("put_in", "name"), [(_mean, "model.layers.1.mlp"), (_sum_before, "model.layers.0.mlp")])
def test_a_module_put_in_that_mixes_tokens_is_refused_by_name(put_in, name, ranks2):
    with pytest.raises(RankError) as caught:
        ranks2.run(_own, put_in)
    for error in caught.value.errors:
        assert isinstance(error, UnsupportedModelError)
        mixing = f"{Mixing.__module__}.Mixing"
        assert f"{name} is a {mixing}, which mixes tokens" in str(error)


def _sharded():
    """Under ZeRO 3 the module's weights are on no rank alone."""
    import deepspeed

    config = LlamaForCausalLM.config_class(hidden_size=32, intermediate_size=48, num_hidden_layers=2, vocab_size=97)
    with deepspeed.zero.Init(
        config_dict_or_path={"zero_optimization": {"stage": 3}, "train_micro_batch_size_per_gpu": 1}
    ):
        model = LlamaForCausalLM(config)
        _adapters(model)
    check_custom_modules(model, None)
    assert model.model.layers[0].mlp.down_proj.up.weight.numel() == 0  # sharded again
    with deepspeed.zero.Init(
        config_dict_or_path={"zero_optimization": {"stage": 3}, "train_micro_batch_size_per_gpu": 1}
    ):
        _mean(model)
    check_custom_modules(model, None)


def test_it_is_so_for_sharded_weights(ranks2):
    with pytest.raises(RankError, match=r"model\.layers\.1\.mlp is a tests\.verification\.test_census\.Mixing"):
        ranks2.run(_sharded)


# --- models that transformers has no sdpa for


@pytest.mark.parametrize("core", ["flex_attention", "flash_attention_2"])
@pytest.mark.parametrize("model_type", ["gemma2", "gpt_oss"])
def test_a_model_without_sdpa_trains_with_the_cores_that_it_has(model_type, core, ranks2):
    """Tried with plain attention, soft-cap and sinks, as no list has them; the cores themselves are in test_cores."""
    for said in ranks2.run(_with_core, model_type, core):
        assert said.startswith("a tiny model is right to") and said.endswith("packed: right")


def _with_core(model_type, core):
    model_class, config = small_of(model_type)
    config.model_type = "of_my_own"
    config._attn_implementation = "eager"
    model = model_class(config)
    model.config._attn_implementation = core
    return proved(model)
