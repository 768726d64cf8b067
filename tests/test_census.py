"""The census in short, and the probe that lets an unlisted model through or refuses it."""

import sys
import time

import pytest
import torch
import torch.distributed as dist
from transformers import LlamaForCausalLM, OlmoeForCausalLM

from benchmarks.census import Row, ask, everything, tally
from benchmarks.ranks import LateError, RankError, Ranks, finished
from deepspeed_alst.errors import UnsupportedModelError
from deepspeed_alst.models.probe import Verdict, prove
from deepspeed_alst.models.verified import RIGHT
from deepspeed_alst.parallel.groups import build_control_group, build_groups

SHORT = ("llama", "gpt2", "deepseek_v3", "granitemoe", "gemma3_text", "llama4_text", "qwen3_next")


@pytest.mark.parametrize(("family", "packed"), [(each, False) for each in SHORT] + [("mistral", True), ("opt", True)])
def test_a_family_of_the_list_is_right_on_four_ranks(family, packed, ranks4):
    assert family in RIGHT
    verdicts = ranks4.run(ask, family, 4, packed)
    assert len(set(verdicts)) == 1 and verdicts[0].outcome == "right", verdicts[0]


def test_the_list_holds_families_that_the_census_asks_about():
    assert set(everything()) >= RIGHT


def one_fails(which: int, seconds: float) -> None:
    if dist.get_rank() == which:
        raise ValueError("of its own")
    time.sleep(seconds)


@pytest.mark.parametrize("which", [-1, 0])
def test_ranks_that_are_late_are_told_from_those_that_fail(which):
    late = r"no answer within 3 s: the machine was too busy, or a build lock"
    with Ranks(2) as ranks:
        ranks.run(one_fails, -1, 0.0)  # with all that it imports
        with pytest.raises(RankError, match=late) as caught:
            ranks.run(one_fails, which, 60.0, seconds=3)
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
    groups = build_groups(2, build_control_group())
    try:
        return prove(model, groups)
    finally:
        groups.destroy()


@pytest.mark.parametrize("model_class", [LlamaForCausalLM, OlmoeForCausalLM])
def test_an_unlisted_model_is_let_through_by_a_small_one_of_its_kind(model_class, ranks2):
    assert ranks2.run(_unlisted, model_class)[0].startswith("a small model of its kind is right to")


@pytest.mark.parametrize(
    ("model_class", "words"),
    [
        (ByItself, "is wrong there on a sequence: "),
        (Leaking, "is wrong there on a packed sequence: "),
        (Large, "is refused there on a sequence: its small model has 67,"),
    ],
)
def test_an_unlisted_model_that_is_not_right_in_small_is_refused_on_all_ranks(model_class, words, ranks2):
    with pytest.raises(RankError) as caught:
        ranks2.run(_unlisted, model_class)
    for error in caught.value.errors:
        assert isinstance(error, UnsupportedModelError)
        assert f"{model_class.__name__} (model_type='of_my_own')" in str(error) and words in str(error)
        assert "Set sequence_parallel_size to 1" in str(error)
